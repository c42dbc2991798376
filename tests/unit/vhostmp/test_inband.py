"""Notifications as messages: kicks that start and wake rings, calls and errors on the back-end's channel."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.rig import MEMORY_BYTES, UVA, Rig, descriptor_count
from vhostmp.consts import BackendRequest, ProtocolFeature, Request, mask
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import u64, vring

INBAND = mask(
    (
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.BACKEND_REQ,
        ProtocolFeature.INBAND_NOTIFICATIONS,
        ProtocolFeature.RESET_DEVICE,
    )
)


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A connection with in-band notifications and two rings that are set up."""
    with Rig() as rig, frontend.memfd(MEMORY_BYTES) as memory:
        rig.negotiate(INBAND)
        rig.give_memory(memory)
        for index in range(2):
            rig.set_ring(index)
        yield rig


def kick(rig: Rig, index: int) -> int:
    """Kick by message."""
    return rig.do(Request.VRING_KICK, vring(index, 0))


def fd(rig: Rig, index: int, name: str) -> int:
    """Return the device's descriptor."""
    found: int | None = getattr(rig.device.rings[index], name)
    assert found is not None
    return found


def test_a_kick_starts_and_wakes(rig: Rig, channel: socket.socket) -> None:
    """The first kick starts the ring and signals its eventfd, each later one signals it again."""
    for _ in range(3):
        assert kick(rig, 1) == 0
        assert rig.device.rings[1].started
        assert os.eventfd_read(fd(rig, 1, "kick")) == 1
    assert not rig.device.rings[0].started
    rig.ask(Request.GET_VRING_BASE, vring(1, 0))
    assert not rig.device.rings[1].started
    assert kick(rig, 1) == 0
    assert rig.device.rings[1].started
    assert os.eventfd_read(fd(rig, 1, "kick")) == 1


def test_a_kick_restarts_a_ring_that_had_lost_its_memory(rig: Rig, channel: socket.socket) -> None:
    """A ring that was stopped because it was not in new memory starts with the next kick, once it is there again."""
    assert kick(rig, 1) == 0
    with frontend.memfd(MEMORY_BYTES) as memory:
        elsewhere = frontend.mem_table(frontend.region(0, MEMORY_BYTES, 2 * UVA))
        assert rig.do(Request.SET_MEM_TABLE, elsewhere, [memory]) == 0
        assert not rig.device.rings[1].started
        assert kick(rig, 1) != 0
        rig.give_memory(memory)
    assert kick(rig, 1) == 0
    assert rig.device.rings[1].started
    assert os.eventfd_read(fd(rig, 1, "kick")) == 1


def test_a_ring_that_cannot_start_is_left_as_it_was(rig: Rig, channel: socket.socket) -> None:
    """A kick that is refused, by message or by descriptor, leaves no call and err of ours behind, and none open."""
    assert rig.do(Request.SET_VRING_ADDR, frontend.vring_addr(1, desc=0)) == 0
    before = rig.state()
    count = descriptor_count()
    assert kick(rig, 1) != 0
    assert rig.state() == before
    with frontend.eventfds(1) as events:
        assert rig.do(Request.SET_VRING_KICK, u64(1), events) != 0
    assert rig.state() == before
    assert descriptor_count() == count


def test_calls_and_errors_are_messages(rig: Rig, channel: socket.socket) -> None:
    """What a worker writes to the call or err eventfd goes out with the ring's index, once until it is acknowledged."""
    kick(rig, 0)
    kick(rig, 1)
    for _ in range(3):
        os.eventfd_write(fd(rig, 1, "call"), 1)
        rig.settle()
    os.eventfd_write(fd(rig, 0, "err"), 1)
    rig.settle()
    wanted = struct.pack("=IIIII", BackendRequest.VRING_CALL, 9, 8, 1, 0)
    assert channel.recv(100) == wanted + struct.pack("=IIIII", BackendRequest.VRING_ERR, 9, 8, 0, 0)
    channel.send(struct.pack("=IIIQ", BackendRequest.VRING_CALL, 5, 8, 0))
    rig.settle()
    assert channel.recv(100) == wanted


@pytest.mark.parametrize("first", [False, True])
def test_what_the_front_end_sets_is_preferred(rig: Rig, channel: socket.socket, first: bool) -> None:
    """A call descriptor of the front-end's is used whenever it comes, and no message is sent; no-fd means polling."""
    if not first:
        kick(rig, 0)
    with frontend.eventfds(1) as fds:
        assert rig.do(Request.SET_VRING_CALL, u64(0), fds) == 0
        assert rig.do(Request.SET_VRING_ERR, u64(0x100)) == 0
        if first:
            kick(rig, 0)
        assert os.path.samestat(os.fstat(fd(rig, 0, "call")), os.fstat(fds[0]))
        os.eventfd_write(fd(rig, 0, "call"), 1)
        assert os.eventfd_read(fds[0]) == 1
    assert rig.device.rings[0].err is None
    rig.settle()
    with pytest.raises(BlockingIOError):
        channel.recv(1)


def test_a_kick_descriptor_is_preferred(rig: Rig, channel: socket.socket) -> None:
    """A ring with the front-end's kick descriptor is not kicked by messages, which are harmless."""
    with frontend.eventfds(1) as fds:
        assert rig.do(Request.SET_VRING_KICK, u64(0), fds) == 0
        assert kick(rig, 0) == 0
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fds[0])
    kick(rig, 1)
    assert rig.do(Request.SET_VRING_KICK, u64(0x101)) == 0
    assert kick(rig, 1) == 0
    assert rig.device.rings[1].kick is None
    assert rig.port.session is not None
    assert rig.port.session.inband is not None
    assert not any(map(rig.port.session.inband.is_kicked, range(2)))


def test_a_ring_that_cannot_start(rig: Rig) -> None:
    """A kick for a ring that cannot start is refused, with nothing kept; once it can the next kick starts it."""
    assert rig.do(Request.SET_VRING_ADDR, frontend.vring_addr(0, desc=1 << 50, avail=1 << 50, used=1 << 50)) == 0
    before = rig.device.rings[0].kick
    assert kick(rig, 0) != 0
    assert rig.device.rings[0].kick is before is None
    rig.set_ring(0)
    assert kick(rig, 0) == 0
    assert rig.device.rings[0].started


def test_nothing_is_left(channel: socket.socket, rig: Rig) -> None:
    """RESET_DEVICE closes every eventfd of ours and forgets what was chosen; so does the end of the connection."""
    count = descriptor_count()
    for _ in range(2):
        with frontend.eventfds(1) as fds:
            assert rig.do(Request.SET_VRING_CALL, u64(0), fds) == 0
        kick(rig, 0)
        kick(rig, 1)
        assert rig.do(Request.RESET_DEVICE) == 0
        assert descriptor_count() == count
    rig.do(Request.SET_FEATURES, u64(1 << 32 | 1 << 30))
    kick(rig, 0)
    os.eventfd_write(fd(rig, 0, "call"), 1)
    rig.settle()
    assert channel.recv(100)


def test_without_a_channel(rig: Rig) -> None:
    """A front-end that negotiates in-band notifications and brings no channel hears nothing and harms nobody."""
    kick(rig, 0)
    os.eventfd_write(fd(rig, 0, "call"), 1)
    rig.settle()
    assert kick(rig, 0) == 0
