"""The device status over vhost-user: kicks start rings, zero stops them, FEATURES_OK is not for the asking."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import pytest

from tests.fakes import FEATURES
from tests.rig import MEMORY_BYTES, Rig
from vhostmp.consts import ProtocolFeature, Request
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import PROTOCOL_FEATURES, REPLY_ACK, u64, vring

STATUS = REPLY_ACK | ProtocolFeature.STATUS.mask
DRIVER, DRIVER_OK, FEATURES_OK = 3, 4, 8


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A connection with STATUS and two rings that are set up."""
    with Rig() as rig, frontend.memfd(MEMORY_BYTES) as memory:
        rig.negotiate(STATUS)
        rig.give_memory(memory)
        for index in range(2):
            rig.set_ring(index)
        yield rig


@pytest.fixture
def events() -> Generator[Sequence[int], None, None]:
    """Four eventfds."""
    with frontend.eventfds(4) as fds:
        yield fds


def status(rig: Rig) -> int:
    """Ask for the status."""
    return rig.ask(Request.GET_STATUS).u64


def started(rig: Rig) -> list[bool]:
    """Say which rings run."""
    return [ring.started for ring in rig.device.rings]


def test_kicks_start_rings_whatever_the_status(rig: Rig, events: Sequence[int]) -> None:
    """Rings start when they are kicked, before DRIVER_OK and without it; the status is read back as it was written."""
    rig.start_ring(0, events[0], events[2])
    assert started(rig) == [True, False]
    assert rig.do(Request.SET_STATUS, u64(DRIVER | DRIVER_OK | FEATURES_OK)) == 0
    assert status(rig) == DRIVER | DRIVER_OK | FEATURES_OK
    rig.start_ring(1, events[1], events[3])
    assert started(rig) == [True, True]


def test_zero_stops_rings_and_keeps_where_they_stood(rig: Rig, events: Sequence[int]) -> None:
    """Zero stops all rings; their positions can be asked for afterwards, features and memory are still there."""
    assert rig.do(Request.SET_STATUS, u64(0xF)) == 0
    rig.start_ring(0, events[0], events[2])
    rig.device.rings[0].base = 77
    assert rig.do(Request.SET_STATUS, u64(0)) == 0
    assert (started(rig), status(rig)) == ([False, False], 0)
    assert rig.ask(Request.GET_VRING_BASE, vring(0, 0)).payload == vring(0, 77)
    assert rig.device.acked_features == FEATURES & ~(1 << 26)
    assert rig.device.table
    assert rig.do(Request.SET_VRING_NUM, vring(0, 64)) == 0
    assert rig.do(Request.SET_VRING_KICK, u64(0), [events[0]]) == 0
    assert started(rig) == [True, False]


def test_features_ok_needs_features() -> None:
    """FEATURES_OK before SET_FEATURES is read back unset; afterwards it is taken; RESET_DEVICE forgets both."""
    with Rig() as rig:
        rig.send(Request.SET_OWNER)
        rig.send(Request.SET_PROTOCOL_FEATURES, u64(STATUS | ProtocolFeature.RESET_DEVICE.mask))
        for _ in range(2):
            assert rig.do(Request.SET_STATUS, u64(DRIVER | FEATURES_OK)) == 0
            assert status(rig) == DRIVER
            assert rig.do(Request.SET_FEATURES, u64(1 << 32 | PROTOCOL_FEATURES)) == 0
            assert rig.do(Request.SET_STATUS, u64(DRIVER | FEATURES_OK)) == 0
            assert status(rig) == DRIVER | FEATURES_OK
            assert rig.do(Request.RESET_DEVICE) == 0
            assert status(rig) == 0
