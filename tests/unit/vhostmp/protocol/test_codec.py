"""The decoder: messages out of bytes however they are cut, errors that name message and field."""

from __future__ import annotations

import pytest

from vhostmp.consts import Request
from vhostmp.protocol.codec import BadMessage, Decoder, Message, encode_reply, encode_request
from vhostmp.protocol.messages import MAX_PAYLOAD_SIZE
from vhostmp.protocol.payloads import U64, VringFd, VringNum, VringState
from vhostmp.tools.stress import frontend


def feed_all(decoder: Decoder, data: bytes, fds: tuple[int, ...] = (), *, chunk: int = 4096) -> list[Message]:
    """Feed bytes in pieces of at most `chunk`, the descriptors with the first."""
    found: list[Message] = []
    while data:
        size = min(decoder.wanted, chunk, len(data))
        message = decoder.feed(data[:size], fds)
        data, fds = data[size:], ()
        if message is not None:
            found.append(message)
    return found


@pytest.mark.parametrize("chunk", [1, 2, 5, 11, 12, 13, 4096])
def test_messages_survive_any_cut(chunk: int) -> None:
    """Three messages come out the same whatever pieces they arrive in."""
    data = (
        frontend.message(Request.SET_OWNER)
        + frontend.message(Request.SET_VRING_NUM, frontend.vring(1, 256), flags=9)
        + frontend.message(Request.GET_VRING_BASE, frontend.vring(0, 0), flags=9)
    )
    owner, num, base = feed_all(Decoder(), data, chunk=chunk)
    assert (owner.request, owner.need_reply) == (Request.SET_OWNER, False)
    assert (num.payload, num.need_reply) == (VringNum(1, 256), True)
    # a message with a reply of its own gets no acknowledgement
    assert (base.payload, base.need_reply) == (VringState(0, 0), False)


def test_fds_come_with_their_message() -> None:
    """Descriptors are handed on with the message they were received in, and not with the next."""
    decoder = Decoder()
    (kick,) = feed_all(decoder, frontend.message(Request.SET_VRING_KICK, frontend.u64(1)), (7,), chunk=3)
    assert (kick.fds, kick.payload) == ((7,), VringFd(1, True))
    (call,) = feed_all(decoder, frontend.message(Request.SET_VRING_CALL, frontend.u64(0x100)))
    assert (call.fds, call.payload) == ((), VringFd(0, False))


def test_fds_may_come_with_the_payload() -> None:
    """One batch of descriptors is taken wherever in the message it arrives."""
    decoder = Decoder()
    data = frontend.message(Request.SET_VRING_KICK, frontend.u64(1))
    assert decoder.feed(data[:12]) is None
    message = decoder.feed(data[12:], (9,))
    assert message is not None
    assert message.fds == (9,)


@pytest.mark.parametrize(
    ("data", "fds", "field", "text"),
    [
        (frontend.message(0), (), "request", "request 0: request 0x0 is not supported"),
        (frontend.message(45, flags=9), (), "request", "request 45"),
        (frontend.message(255), (), "request", "request 255"),
        (frontend.message(0xFFFFFFFF), (), "request", "request 4294967295: request 0xffffffff"),
        (frontend.message(Request.GPU_SET_SOCKET), (), "request", "GPU_SET_SOCKET: request 0x21 is not supported"),
        (frontend.message(Request.SET_VRING_NUM, frontend.vring(0, 0)), (), "num", "SET_VRING_NUM: num 0"),
        (frontend.message(Request.SET_VRING_NUM, bytes(7)), (), "size", "SET_VRING_NUM: size 7 is not 8"),
        (frontend.message(Request.SET_OWNER, bytes(1)), (), "size", "SET_OWNER: size 1 is not 0"),
        (frontend.message(Request.GET_FEATURES), (5,), "fds", "GET_FEATURES: 1 fds came with it, wanted none"),
        (frontend.message(Request.SET_VRING_KICK, frontend.u64(0)), (), "fds", "SET_VRING_KICK: 0 fds"),
        (frontend.message(Request.SET_VRING_KICK, frontend.u64(0x100)), (5,), "fds", "SET_VRING_KICK: 1 fds"),
        (frontend.message(Request.SET_VRING_CALL, frontend.u64(0)), (5, 6), "fds", "SET_VRING_CALL: 2 fds"),
        (
            frontend.message(Request.SET_MEM_TABLE, frontend.mem_table(frontend.region(0, 1, 0))),
            (5, 6),
            "fds",
            "SET_MEM_TABLE: 2 fds came with it, wanted one for each region",
        ),
        (
            frontend.message(
                Request.SET_MEM_TABLE, frontend.mem_table(frontend.region(0, 1, 0), frontend.region(1, 1, 1))
            ),
            (5,),
            "fds",
            "SET_MEM_TABLE: 1 fds",
        ),
        (
            frontend.message(Request.ADD_MEM_REG, frontend.single_region(frontend.region(0, 1, 0))),
            (),
            "fds",
            "ADD_MEM_REG: 0 fds came with it, wanted exactly one",
        ),
        (
            frontend.message(Request.REM_MEM_REG, frontend.single_region(frontend.region(0, 1, 0))),
            (5, 6),
            "fds",
            "REM_MEM_REG: 2 fds came with it, wanted at most one",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("chunk", [1, 4096], ids=["bytewise", "whole"])
def test_a_bad_message_is_named_and_skipped(
    data: bytes, fds: tuple[int, ...], field: str, text: str, chunk: int
) -> None:
    """A message that is wrong in itself is refused by name and field, and the one behind it is understood."""
    decoder = Decoder()
    with pytest.raises(BadMessage) as caught:
        feed_all(decoder, data, fds, chunk=chunk)
    assert caught.value.field == field
    assert text in str(caught.value)
    assert not caught.value.fatal
    assert not decoder.inside
    assert [message.request for message in feed_all(decoder, frontend.message(3), chunk=chunk)] == [Request.SET_OWNER]


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (frontend.message(1, flags=0), "flags"),
        (frontend.message(1, flags=2), "flags"),
        (frontend.message(1, flags=5), "flags"),
        (frontend.message(1, flags=0x21), "flags"),
        (frontend.message(1, size=0x1000), "size"),
        (frontend.message(1, size=0xFFFFFFFF), "size"),
    ],
)
def test_a_bad_header_is_fatal(data: bytes, field: str) -> None:
    """Behind a header that cannot be trusted nothing can be understood, and no payload is waited for."""
    with pytest.raises(BadMessage) as caught:
        feed_all(Decoder(), data)
    assert (caught.value.field, caught.value.fatal) == (field, True)
    assert "GET_FEATURES" in str(caught.value)


def test_two_batches_of_fds_are_refused_at_once() -> None:
    """Descriptors in two parts of one message are refused before the message is complete: they cannot pile up."""
    decoder = Decoder()
    data = frontend.message(Request.SET_MEM_TABLE, bytes(40))
    decoder.feed(data[:1], (5,))
    with pytest.raises(BadMessage) as caught:
        decoder.feed(data[1:2], (6,))
    assert (caught.value.field, caught.value.fatal) == ("fds", True)


def test_a_fault_is_held_against_its_message() -> None:
    """What was wrong with the ancillary data refuses the message it came with, once that is complete, and no other."""
    decoder = Decoder()
    data = frontend.message(Request.SET_FEATURES, frontend.u64(0), flags=9)
    assert decoder.feed(data[:4], (), "ancillary data of level 1 type 2") is None
    with pytest.raises(BadMessage) as caught:
        feed_all(decoder, data[4:])
    assert (caught.value.field, caught.value.need_reply, caught.value.fatal) == ("fds", True, False)
    assert "SET_FEATURES: ancillary data" in str(caught.value)
    assert len(feed_all(decoder, frontend.message(3))) == 1


@pytest.mark.parametrize(
    ("request_", "flags", "wants"), [(Request.SET_VRING_NUM, 9, True), (Request.SET_VRING_NUM, 1, False), (45, 9, True),
                                    (Request.GET_VRING_BASE, 9, False)],
)  # fmt: skip
def test_need_reply_of_a_bad_message(request_: int, flags: int, wants: bool) -> None:
    """A refused message says whether an acknowledgement is due: asked for, and the message has no reply of its own."""
    with pytest.raises(BadMessage) as caught:
        feed_all(Decoder(), frontend.message(request_, bytes(3), flags=flags))
    assert caught.value.need_reply is wants


@pytest.mark.parametrize(
    ("sent", "text"), [(3, "header: hang-up after 3 of 12"), (15, "SET_VRING_NUM: hang-up after 3 of 8")]
)
def test_the_end_inside_a_message(sent: int, text: str) -> None:
    """The end of the stream inside a message is an error that says how far it came."""
    decoder = Decoder()
    feed_all(decoder, frontend.message(Request.SET_VRING_NUM, frontend.vring(0, 1))[:sent])
    with pytest.raises(BadMessage, match=text):
        decoder.end()


def test_the_end_between_messages() -> None:
    """The end of the stream between two messages is no error."""
    decoder = Decoder()
    feed_all(decoder, frontend.message(3))
    decoder.end()


def test_more_than_wanted_is_our_mistake() -> None:
    """Feeding nothing, or beyond the part being read, is a mistake of the caller and changes nothing."""
    decoder = Decoder()
    for data in (b"", bytes(13)):
        with pytest.raises(ValueError, match="wanted"):
            decoder.feed(data)
    assert not decoder.inside


def test_largest_payload_is_skipped() -> None:
    """A message that is not ours is skipped up to the largest payload, byte for byte."""
    decoder = Decoder()
    with pytest.raises(BadMessage):
        feed_all(decoder, frontend.message(99, bytes(MAX_PAYLOAD_SIZE)))
    assert len(feed_all(decoder, frontend.message(3))) == 1


def test_encoding() -> None:
    """Requests and replies have the document's flags and the payload's size."""
    assert encode_request(Request.SET_VRING_NUM, bytes(8)) == frontend.message(8, bytes(8))
    assert encode_request(3, need_reply=True) == frontend.message(3, flags=9)
    assert encode_reply(Request.GET_FEATURES, U64(5)) == frontend.message(1, frontend.u64(5), flags=5)
