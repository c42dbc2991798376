"""The channel on which we ask: what is sent, how often, and that the front-end can spoil nothing but the channel."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Generator, Iterator

import pytest

from tests.rig import Rig, descriptor_count
from vhostmp.backchannel import QUEUE_MAX, BackendChannel
from vhostmp.consts import BackendRequest, ProtocolFeature, Request, mask
from vhostmp.eventloop import EventLoop
from vhostmp.protocol.payloads import U64, VringState
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import Frontend, Reply, message, u64, vring
from vhostmp.transport import connected_pair

CALL = BackendRequest.VRING_CALL
FEATURES = mask((ProtocolFeature.REPLY_ACK, ProtocolFeature.BACKEND_REQ))


class Channel:
    """A channel and the front-end's end of it."""

    def __init__(self, *, reply_ack: bool = True) -> None:
        """Connect them."""
        self.loop = EventLoop()
        ours, theirs = connected_pair()
        self.peer = Frontend(theirs)
        self.ours = BackendChannel(self.loop, ours, "0", reply_ack=reply_ack)

    def settle(self) -> None:
        """Let our end deal with everything that was sent."""
        while self.loop.turn(0):
            pass

    def received(self) -> list[Reply]:
        """Read every message that has arrived."""
        found: list[Reply] = []
        self.settle()
        self.peer.sock.setblocking(False)
        try:
            while True:
                found.append(self.peer.reply())
                self.settle()
        except BlockingIOError:
            return found

    def answer(self, request: int, value: int = 0) -> None:
        """Acknowledge a message."""
        self.peer.send_raw(message(request, u64(value), flags=5))
        self.settle()

    def close(self) -> None:
        """Take everything down."""
        self.ours.close()
        self.peer.close()
        self.loop.close()


@pytest.fixture
def channel() -> Iterator[Channel]:
    """A channel with REPLY_ACK."""
    made = Channel()
    yield made
    made.close()


@pytest.fixture
def plain() -> Generator[Channel, None, None]:
    """A channel without REPLY_ACK."""
    made = Channel(reply_ack=False)
    yield made
    made.close()


def test_a_signal_is_one_message_until_it_is_answered(channel: Channel) -> None:
    """However often it is raised, one is under way; raised meanwhile, one follows; signals of others do not wait."""
    for _ in range(100):
        channel.ours.signal(CALL, VringState(0, 0))
    channel.ours.signal(CALL, VringState(1, 0))
    assert channel.received() == [Reply(CALL, 9, vring(0, 0)), Reply(CALL, 9, vring(1, 0))]
    channel.answer(CALL)
    assert channel.received() == [Reply(CALL, 9, vring(0, 0))]
    channel.answer(CALL)
    channel.answer(CALL)
    assert channel.received() == []
    channel.ours.signal(CALL, VringState(0, 0))
    assert len(channel.received()) == 1


def test_without_reply_ack_nothing_is_asked(plain: Channel) -> None:
    """Without REPLY_ACK no message asks for an answer, and each signal that the socket takes is sent."""
    for _ in range(3):
        plain.ours.signal(CALL, VringState(0, 0))
    assert plain.received() == [Reply(CALL, 1, vring(0, 0))] * 3


def test_a_front_end_that_never_reads_costs_nothing(plain: Channel) -> None:
    """What waits is bounded, the loop is not woken, and when the front-end reads at last all comes in order."""
    while len(plain.ours._output) == 0:  # pyright: ignore[reportPrivateUsage] - until the socket is full
        plain.ours.signal(CALL, VringState(0, 0))
    for _ in range(1000):
        plain.ours.signal(CALL, VringState(0, 0))
        plain.ours.signal(CALL, VringState(1, 0))
    posted = sum(plain.ours.post(BackendRequest.IOTLB_MSG, U64(number)) for number in range(2 * QUEUE_MAX))
    assert posted == QUEUE_MAX - 2
    assert plain.ours.dropped == QUEUE_MAX + 2
    assert not plain.loop.turn(0)
    found = [reply.payload for reply in plain.received() if reply.request == BackendRequest.IOTLB_MSG]
    assert found == [u64(number) for number in range(posted)]
    plain.settle()
    assert not plain.loop.turn(0)
    assert plain.ours.post(BackendRequest.IOTLB_MSG, U64(0))


def test_posts_are_answered_in_order(channel: Channel) -> None:
    """Each post's callback gets its own answer, in pieces or not; what is unanswered at the end gets None."""
    answers: list[tuple[int, int | None]] = []
    count = 3
    for number in range(count):

        def on_reply(value: int | None, number: int = number) -> None:
            answers.append((number, value))

        assert channel.ours.post(BackendRequest.IOTLB_MSG, U64(number), on_reply=on_reply)
    assert len(channel.received()) == count
    data = message(BackendRequest.IOTLB_MSG, u64(0), flags=5) + message(BackendRequest.IOTLB_MSG, u64(7), flags=5)
    for byte in data:
        channel.peer.send_raw(bytes([byte]))
        channel.settle()
    assert answers == [(0, 0), (1, 7)]
    channel.ours.close()
    assert answers == [(0, 0), (1, 7), (2, None)]
    assert not channel.ours.post(BackendRequest.IOTLB_MSG, U64(0))


def test_descriptors_go_along(channel: Channel) -> None:
    """A post's descriptors arrive with it."""
    with frontend.memfd() as fd:
        assert channel.ours.post(BackendRequest.SHMEM_MAP, U64(1), [fd])
        data, fds, _flags, _address = socket.recv_fds(channel.peer.sock, 64, 8)
        assert data == message(BackendRequest.SHMEM_MAP, u64(1))
        assert os.path.samestat(os.fstat(fds[0]), os.fstat(fd))
        os.close(fds[0])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (message(CALL, u64(0), flags=5), "request 4 is answered"),
        (message(BackendRequest.CONFIG_CHANGE_MSG, u64(0), flags=1), "flags 1"),
        (message(BackendRequest.CONFIG_CHANGE_MSG, u64(0), flags=6), "flags 6"),
        (message(BackendRequest.CONFIG_CHANGE_MSG, u64(0), flags=0xFFFFFFF5), "flags 0xfffffff5"),
        (message(BackendRequest.CONFIG_CHANGE_MSG, b"", flags=5), "size 0"),
        (message(BackendRequest.CONFIG_CHANGE_MSG, b"", flags=5, size=0xFFFFFFFF), "size 0xffffffff"),
        (message(BackendRequest.CONFIG_CHANGE_MSG, u64(0), flags=5) * 2, "nothing was asked"),
        (b"\xff" * 12, "request 0xffffffff"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_answer_ends_the_channel(
    channel: Channel, data: bytes, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers to what was not asked end the channel with one line; raising signals later is harmless."""
    channel.ours.signal(BackendRequest.CONFIG_CHANGE_MSG)
    channel.settle()
    with caplog.at_level(logging.WARNING):
        channel.peer.send_raw(data)
        channel.settle()
    assert channel.ours.closed
    (record,) = caplog.records
    assert record.getMessage().startswith("device 0: back-end channel closed: ")
    assert why in record.getMessage()
    channel.ours.signal(BackendRequest.CONFIG_CHANGE_MSG)
    assert channel.peer.sock.recv(4096)


def test_a_refusal_is_logged(channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    """An answer other than zero is logged with the message's name, and the channel goes on."""
    channel.ours.signal(BackendRequest.CONFIG_CHANGE_MSG)
    channel.settle()
    channel.answer(BackendRequest.CONFIG_CHANGE_MSG, 1)
    assert "device 0: the front-end refused CONFIG_CHANGE_MSG: 0x1" in caplog.text
    assert not channel.ours.closed


def test_descriptors_that_come_with_an_answer_are_not_kept(channel: Channel) -> None:
    """Descriptors beside an answer are dropped."""
    channel.ours.signal(CALL, VringState(0, 0))
    channel.settle()
    count = descriptor_count()
    with frontend.eventfds(8) as fds:
        channel.peer.send_raw(message(CALL, u64(0), flags=5), fds)
        channel.settle()
    assert descriptor_count() == count


def test_of_a_session() -> None:
    """SET_BACKEND_REQ_FD brings a channel, a second one replaces it, the end of the connection ends it."""
    count = descriptor_count()
    with Rig() as rig:
        rig.negotiate(FEATURES)
        for _ in range(2):
            ours, theirs = connected_pair()
            with ours, theirs:
                assert rig.do(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()]) == 0
                theirs.close()
                session = rig.port.session
                assert session is not None
                assert session.channel is not None
                session.channel.signal(CALL, VringState(1, 0))
                assert ours.recv(64) == struct.pack("=IIIII", CALL, 9, 8, 1, 0)
            rig.settle()
            assert session.channel.closed
        assert rig.do(Request.SET_FEATURES, u64(1 << 32 | 1 << 30)) == 0
        ours, theirs = connected_pair()
        with ours, theirs:
            assert rig.do(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()]) == 0
            theirs.close()
            rig.sock.close()
            rig.settle()
            assert ours.recv(1) == b""
    assert descriptor_count() == count
