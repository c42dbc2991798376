"""Messages made up by a machine: cut anywhere, filled with anything, in any order.

Seeds: hypothesis prints the example it found; SEED=n in the environment searches elsewhere (see conftest.py).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import FEATURES
from tests.rig import MEMORY_BYTES, UVA, Rig, descriptor_count
from vhostmp.consts import Request
from vhostmp.protocol.codec import BadMessage, Decoder, Message
from vhostmp.protocol.messages import MAX_PAYLOAD_SIZE, MESSAGES
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import message, u64, vring, vring_addr
from vhostmp.transport import connected_pair
from vhostmp.verbs import offered_protocol_features

GOOD_BYTES = b"".join(
    (
        message(Request.SET_OWNER),
        message(Request.SET_FEATURES, u64(FEATURES | 1 << 30)),
        message(Request.SET_VRING_NUM, vring(0, 256), flags=9),
        message(Request.SET_VRING_ADDR, vring_addr(0, desc=UVA)),
        message(Request.GET_VRING_BASE, vring(0, 0)),
        message(Request.SET_VRING_NUM, vring(0, 3)),
        message(77, bytes(100), flags=9),
        message(Request.SET_VRING_CALL, u64(0x100)),
    )
)


def outcome(pieces: Sequence[bytes]) -> list[str]:
    """Return what comes out of a decoder that is fed these pieces, as text."""
    decoder = Decoder()
    found: list[str] = []
    for piece in pieces:
        rest = piece
        while rest:
            part, rest = rest[: decoder.wanted], rest[decoder.wanted :]
            try:
                item: Message | BadMessage | None = decoder.feed(part)
            except BadMessage as bad:
                item = bad
                if bad.fatal:
                    return [*found, str(bad)]
            if item is not None:
                found.append(str(item))
    return found


@given(st.lists(st.integers(0, len(GOOD_BYTES)), max_size=12))
def test_cut_anywhere(cuts: list[int]) -> None:
    """Good and bad messages alike come out the same wherever the stream is cut."""
    edges = [0, *sorted(cuts), len(GOOD_BYTES)]
    pieces = [GOOD_BYTES[start:end] for start, end in itertools.pairwise(edges)]
    assert outcome(pieces) == outcome([GOOD_BYTES])


@given(st.binary(max_size=2000), st.integers(1, 64))
def test_any_bytes(data: bytes, chunk: int) -> None:
    """Any bytes are decoded or refused, the same however they are cut, and nothing but BadMessage is ever raised."""
    assert outcome([data]) == outcome([data[at : at + chunk] for at in range(0, len(data), chunk)])


@given(st.sampled_from(sorted(MESSAGES)), st.binary(max_size=300), st.integers(0, 9))
def test_any_payload(request: Request, payload: bytes, count: int) -> None:
    """Any payload with any number of descriptors is decoded to an equal one, or refused by the message's name."""
    decoder = Decoder()
    data = message(request, payload)
    fds = tuple(range(100, 100 + count))
    found: Message | BadMessage | None
    try:
        found = decoder.feed(data[:12], fds)
        if payload:
            found = decoder.feed(data[12:])
    except BadMessage as bad:
        found = bad
    assert found is not None
    assert not decoder.inside
    assert found.request == request
    if isinstance(found, Message):
        assert found.fds == fds
        assert len(found.payload.pack()) == len(payload)
    else:
        assert str(found).startswith(f"{request.name}: ")
        assert not found.fatal


# --- whole conversations ------------------------------------------------------------------------------------------

numbers = st.sampled_from([0, 1, 2, 3, 255, 256, 257, 0x1FF, 4096, 32768, 32769, 65535, 65536, (1 << 32) - 1])
wide = st.one_of(numbers, st.sampled_from([UVA, UVA + 0x4000, UVA + MEMORY_BYTES, 1 << 63, (1 << 64) - 1, 1 << 30]))
regions = st.builds(frontend.region, wide, wide, wide, st.sampled_from([0, 1, 0x1000, 1 << 63]))
payloads = st.one_of(
    st.just(b""),
    st.builds(u64, wide),
    st.builds(vring, st.integers(0, 3), numbers),
    st.builds(vring_addr, st.integers(0, 3), st.integers(0, 2), desc=wide, used=wide, avail=wide, log=wide),
    st.lists(regions, max_size=9).map(lambda items: frontend.mem_table(*items)),
    st.just(frontend.mem_table(frontend.region(0, MEMORY_BYTES, UVA))),
    st.builds(frontend.single_region, regions),
    st.builds(frontend.config, st.integers(0, 260), st.binary(max_size=64), st.integers(0, 2)),
    st.builds(frontend.log_area, wide, wide),
    st.binary(max_size=80),
)
requests = st.one_of(st.sampled_from(sorted(MESSAGES)), st.integers(0, 50), st.just(0xFFFFFFFF))
flags = st.sampled_from([1, 1, 1, 1, 9, 9, 9, 9, 0, 5, 0x11])
sizes = st.sampled_from([None] * 12 + [0, 7, MAX_PAYLOAD_SIZE, 0x1000, 0xFFFFFFFF])
fd_lists = st.lists(st.sampled_from(["memory", "event", "null", "socket"]), max_size=9)
steps = st.tuples(requests, payloads, flags, sizes, fd_lists)


@pytest.fixture
def kinds() -> Iterator[dict[str, int]]:
    """One descriptor of each kind."""
    with frontend.memfd(MEMORY_BYTES) as memory, frontend.eventfds(1) as events:
        null = os.open("/dev/null", os.O_RDWR)
        ours, theirs = connected_pair()
        with ours, theirs:
            yield {"memory": memory, "event": events[0], "null": null, "socket": theirs.fileno()}
        os.close(null)


@pytest.mark.slow
@given(st.lists(steps, max_size=25), st.sampled_from(["nothing", "negotiated", "running"]))
def test_any_conversation(
    kinds: dict[str, int],
    caplog: pytest.LogCaptureFixture,
    script: list[tuple[int, bytes, int, int | None, list[str]]],
    start: str,
) -> None:
    """Whatever is sent, from whatever state: no exception, no descriptor left, and the device is free at the end."""
    caplog.clear()
    count = descriptor_count()
    with Rig() as rig:
        if start == "negotiated":
            rig.negotiate(offered_protocol_features(rig.device, channel=True))
        elif start == "running":
            rig.start_all(kinds["memory"], [kinds["event"]] * 4)
        for request, payload, flag, size, names in script:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                rig.send_raw(message(request, payload, flags=flag, size=size), [kinds[name] for name in names])
            rig.settle()
        rig.sock.close()
        rig.settle()
        assert not rig.port.connected
        assert not rig.device.owned
    assert descriptor_count() == count
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
