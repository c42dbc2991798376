"""Regions of what is in flight, as messages: who owns them, how large the answer is, for which rings there is one."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.rig import Rig, descriptor_count
from vhostmp.consts import ProtocolFeature, Request
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import REPLY_ACK, u64

INFLIGHT = REPLY_ACK | ProtocolFeature.INFLIGHT_SHMFD.mask
REQUEST = frontend.inflight(0, 0, 2, 128)
BYTES = 2 * 2112  # 16 bytes of header, 128 entries of 16, to the next multiple of 64
PACKED_BYTES = 4160  # 32 bytes of header, 128 entries of 32, to the next multiple of 64


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A connection with INFLIGHT_SHMFD."""
    with Rig() as rig:
        rig.negotiate(INFLIGHT)
        yield rig


def get(rig: Rig, payload: bytes) -> tuple[bytes, list[int]]:
    """Ask for a region; return the answer's payload and descriptors."""
    rig.send(Request.GET_INFLIGHT_FD, payload)
    rig.settle()
    data, fds, _flags, _address = socket.recv_fds(rig.sock, 100, 8)
    assert struct.unpack_from("=III", data) == (Request.GET_INFLIGHT_FD, 5, len(data) - 12)
    return data[12:], fds


@pytest.mark.parametrize("payload", [REQUEST, REQUEST[:20]], ids=["padded", "packed"])
def test_there_and_back(rig: Rig, payload: bytes) -> None:
    """The answer has the size of the question and one descriptor; given back, on any connection, it is taken."""
    count = descriptor_count()
    answer, fds = get(rig, payload)
    (fd,) = fds
    assert answer == frontend.inflight(BYTES, 0, 2, 128)[: len(payload)]
    assert os.fstat(fd).st_size == BYTES
    assert rig.do(Request.SET_INFLIGHT_FD, answer, [fd]) == 0
    assert descriptor_count() == count + 1
    with Rig() as other:
        other.negotiate(INFLIGHT)
        assert other.do(Request.SET_INFLIGHT_FD, answer, [fd]) == 0
    os.pwrite(fd, b"\1", 16)
    assert rig.do(Request.SET_INFLIGHT_FD, answer, [fd]) != 0
    os.close(fd)


def test_many_in_a_row(rig: Rig) -> None:
    """A front-end that asks again and again and takes the answers leaves nothing open at our end."""
    count = descriptor_count()
    for _ in range(100):
        _, fds = get(rig, REQUEST)
        os.close(fds[0])
    assert descriptor_count() == count


def test_answers_that_nobody_takes() -> None:
    """Regions that wait in a full socket are bounded, and closed with the connection."""
    count = descriptor_count()
    with Rig() as rig:
        rig.negotiate(INFLIGHT)
        for _ in range(50):
            rig.send(Request.GET_INFLIGHT_FD, REQUEST)
        rig.settle()
    assert descriptor_count() == count


def test_packed_rings(rig: Rig) -> None:
    """A region for packed rings is larger and not begun yet; the device keeps what is given back."""
    assert rig.port.session is not None
    rig.port.session.state.features = 1 << 34 | 1 << 32 | 1 << 30
    answer, fds = get(rig, REQUEST)
    assert answer == frontend.inflight(2 * PACKED_BYTES, 0, 2, 128)
    assert os.pread(fds[0], 2 * PACKED_BYTES, 0) == bytes(2 * PACKED_BYTES)
    count = descriptor_count()
    for _ in range(3):
        assert rig.do(Request.SET_INFLIGHT_FD, answer, fds) == 0
        assert descriptor_count() == count + 1
    for size, offset in ((2 * PACKED_BYTES - 1, 0), (2 * PACKED_BYTES, 1), (2 * PACKED_BYTES, 64)):
        assert rig.do(Request.SET_INFLIGHT_FD, frontend.inflight(size, offset, 2, 128), fds) != 0
    with frontend.memfd() as fd:
        os.truncate(fd, 1 << 20)
        assert rig.do(Request.SET_INFLIGHT_FD, frontend.inflight(2 * PACKED_BYTES, 32, 2, 128), [fd]) != 0
        assert rig.do(Request.SET_INFLIGHT_FD, frontend.inflight(2 * PACKED_BYTES, 64, 2, 128), [fd]) == 0
    os.close(fds[0])


def test_base_inflight_needs_a_region(rig: Rig) -> None:
    """GET_VRING_BASE_INFLIGHT is refused without INFLIGHT_SHMFD, as there is no place to note it."""
    bit = ProtocolFeature.GET_VRING_BASE_INFLIGHT.mask
    assert rig.do(Request.SET_PROTOCOL_FEATURES, u64(REPLY_ACK | bit)) != 0
    assert rig.do(Request.SET_PROTOCOL_FEATURES, u64(INFLIGHT | bit)) == 0
