"""Fuzz target "codec": any bytes as a stream of vhost-user messages.

What must hold: nothing but BadMessage is raised; what comes out does not depend on where the stream is cut; a message
that is taken packs to the bytes that it came from, but for padding; after a refusal that is not fatal the decoder is at
the next message.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

from tests.fuzz.feed import Feed
from vhostmp.consts import VHOST_USER_VERSION
from vhostmp.protocol.codec import BadMessage, Decoder, Message, encode_reply
from vhostmp.protocol.messages import MESSAGES, Header
from vhostmp.protocol.payloads import MacAddress, MemTable, SingleRegion, describe

KNOWN: Final = sorted(MESSAGES)
PADDED: Final = (MacAddress, MemTable, SingleRegion)
FDS_MAX: Final = 10


def decode(data: bytes, cut: int, counts: Sequence[int]) -> list[str]:
    """Return what comes out of a stream that arrives `cut` bytes at a time, as text."""
    decoder = Decoder()
    found: list[str] = []
    at = 0
    while at < len(data):
        size = min(decoder.wanted, cut, len(data) - at)
        fds = () if decoder.inside else range(100, 100 + counts[len(found) % len(counts)])
        item: Message | BadMessage | None
        try:
            item = decoder.feed(data[at : at + size], fds)
        except BadMessage as bad:
            item = bad
            if bad.fatal:
                return [*found, str(bad)]
        at += size
        if item is None:
            continue
        assert not decoder.inside, "a message came out, and the decoder is inside one"
        assert decoder.wanted == Header.SIZE, "the next message does not begin with a header"
        if isinstance(item, Message):
            check(item)
        found.append(str(item))
    with contextlib.suppress(BadMessage):
        decoder.end()
        assert not decoder.inside, "a hang-up inside a message, and nobody says so"
    return found


def check(message: Message) -> None:
    """What holds of a message that was taken."""
    spec = MESSAGES[message.request]
    packed = message.payload.pack()
    assert len(message.fds) in spec.fds.wanted(message.payload), "another number of descriptors than it wants"
    assert not (message.need_reply and spec.has_reply), "an acknowledgement beside a reply"
    again = spec.payload.unpack(packed)
    assert again == message.payload, "a payload that unpacks to another one"
    assert isinstance(message.payload, PADDED) or again.pack() == packed, "a payload that packs to other bytes"
    assert Header.unpack(encode_reply(message.request, message.payload)[: Header.SIZE]).size == len(packed)
    describe(message.payload)


def one(data: bytes) -> None:
    """Decode a stream of messages, some of them good, in one piece and in many."""
    source = Feed(data)
    cut = 1 + source.u8() % 64
    counts = [source.u8() % FDS_MAX for _ in range(4)]
    stream = bytearray()
    while source:
        kind = source.u8()
        if kind & 0x80:  # any bytes
            stream += source.bytes(kind & 0x3F)
            continue
        request: int = source.pick(KNOWN) if kind & 0x40 else source.u8()
        payload = source.bytes(source.u8())
        flags = VHOST_USER_VERSION if kind & 0x20 else source.u8()
        size = len(payload) if kind & 0x10 else source.number(4)
        stream += Header(request, flags | (kind & 8), size).pack() + payload
    whole = decode(bytes(stream), len(stream) + 1, counts)
    assert decode(bytes(stream), cut, counts) == whole, "another outcome when the stream is cut"
