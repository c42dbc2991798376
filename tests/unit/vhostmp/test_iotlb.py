"""The IOTLB over vhost-user: what is answered and refused, what the front-end is asked, and when."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Generator, Iterator, Sequence
from typing import Final, cast

import attrs
import pytest

from tests.fakes import FakeDeviceBehindIommu
from tests.iommu_guest import F_ACCESS_PLATFORM
from tests.rig import Rig
from tests.unit.vhostmp.test_keeper import FakeStore
from vhostmp import adoption
from vhostmp.consts import BackendRequest, IotlbType, ProtocolFeature, Request
from vhostmp.errors import LocalError
from vhostmp.iotlb import DeviceIotlb, Miss
from vhostmp.keeper import Keeper
from vhostmp.kept_device import RecordedDevice
from vhostmp.net import NetDevice
from vhostmp.parts import Part
from vhostmp.shm import layout
from vhostmp.shm._iotlb import IotlbTable
from vhostmp.show import render
from vhostmp.supervisor import Pool
from vhostmp.transport import connected_pair

PAGE = 4096
TOP = 1 << 64
UPDATE, INVALIDATE = IotlbType.UPDATE, IotlbType.INVALIDATE


def entry(iova: int, size: int, uaddr: int, perm: int, kind: int) -> bytes:
    """Pack an IOTLB message."""
    return struct.pack("=QQQBB6x", iova, size, uaddr, perm, kind)


def question(iova: int, perm: int, kind: int = IotlbType.MISS) -> bytes:
    """Pack one of ours, with its header."""
    return struct.pack("=III", BackendRequest.IOTLB_MSG, 1, 32) + entry(iova, 0, 0, perm, kind)


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A pool of one worker."""
    with Pool(workers=1) as one:
        yield one


@pytest.fixture
def device() -> FakeDeviceBehindIommu:
    """A device behind an IOMMU; the connection closes it."""
    return FakeDeviceBehindIommu()


@pytest.fixture
def rig(device: FakeDeviceBehindIommu) -> Iterator[Rig]:
    """A connection with a channel to come, and without REPLY_ACK."""
    with Rig(device) as rig:
        rig.negotiate(ProtocolFeature.BACKEND_REQ.mask)
        yield rig


@pytest.fixture
def channel(rig: Rig) -> Generator[socket.socket, None, None]:
    """The front-end's end of the channel."""
    with new_channel(rig) as ours:
        yield ours


def new_channel(rig: Rig) -> socket.socket:
    """Give the back-end a channel and return our end."""
    ours, theirs = connected_pair()
    rig.send(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
    rig.settle()
    theirs.close()
    ours.setblocking(False)
    return ours


def test_always_answered(rig: Rig, device: FakeDeviceBehindIommu) -> None:
    """Entries are acted upon and answered though REPLY_ACK is not negotiated; what is refused has another answer."""
    assert rig.ask(Request.IOTLB_MSG, entry(1, 2, 3, 1, UPDATE)).u64 == 0
    assert rig.ask(Request.IOTLB_MSG, entry(4, 5, 0, 0, INVALIDATE)).u64 == 0
    for refused in (entry(13, 1, 0, 1, UPDATE), entry(0, 1, 0, 1, IotlbType.MISS), entry(0, 1, 0, 1, 0xFF)):
        assert rig.ask(Request.IOTLB_MSG, refused).u64 == 1
    assert device.iotlb.calls == [(1, 2, 3, 1), (4, 5)]
    assert rig.port.connected


@pytest.mark.parametrize("size", [0, 31, 33])
def test_other_sizes_end_the_connection(rig: Rig, size: int) -> None:
    """A message that has not the size of one cannot be answered for certain."""
    rig.send(Request.IOTLB_MSG, bytes(size))
    assert rig.hung_up()


def test_without_an_iommu() -> None:
    """A device that offers none has no use for entries."""
    with Rig() as rig:
        rig.negotiate(ProtocolFeature.BACKEND_REQ.mask)
        rig.send(Request.IOTLB_MSG, entry(1, 2, 3, 1, UPDATE))
        assert rig.hung_up()


def test_questions(rig: Rig, device: FakeDeviceBehindIommu, channel: socket.socket) -> None:
    """What is missed is asked for once; what is denied is told; on another channel what is open is asked for again."""
    device.iotlb.miss(Miss(0, PAGE, 2), Miss(1, 7, 1, denied=True))
    rig.settle()
    assert channel.recv(1000) == question(PAGE, 2) + question(7, 1, IotlbType.ACCESS_FAIL)
    rig.settle()
    with pytest.raises(BlockingIOError):
        channel.recv(1)
    device.iotlb.open = [Miss(0, PAGE, 2)]
    with new_channel(rig) as other:
        assert other.recv(1000) == question(PAGE, 2)
        rig.sock.close()
        rig.settle()
        device.iotlb.miss(Miss(0, PAGE, 2))
        assert not rig.loop.turn(0), "nobody listens any more"


def test_questions_wait_for_a_channel(rig: Rig, device: FakeDeviceBehindIommu) -> None:
    """Without a channel a miss is no error, and does not keep the loop awake."""
    device.iotlb.miss(Miss(0, PAGE, 3))
    rig.settle()
    device.iotlb.open = [Miss(0, PAGE, 3)]
    with new_channel(rig) as ours:
        assert ours.recv(1000) == question(PAGE, 3)


@attrs.frozen
class Recorded:
    """What a session goes on by of a device that was found: nothing runs, and there is no memory yet."""

    name: str = "0"
    rings: tuple[()] = ()

    @property
    def state(self) -> Recorded:
        """The state, of which the rings count."""
        return self

    def regions_known(self) -> frozenset[tuple[int, int, int]]:
        """Return none."""
        return frozenset()


@pytest.mark.parametrize("comes", ["before", "after"])
def test_questions_of_the_dead_wait_for_a_channel(
    rig: Rig, device: FakeDeviceBehindIommu, comes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What whoever died had left open is asked though it had no channel, once there is one; early or late."""
    monkeypatch.setattr(adoption, "QUESTIONS_SECONDS", 0.0)
    session = rig.port.session
    assert session is not None
    device.iotlb.left = [Miss(0, PAGE, 2)]
    with contextlib.ExitStack() as stack:
        keeper = stack.enter_context(contextlib.closing(Keeper(FakeStore())))
        plain = adoption.describe_session(session, {})
        if comes == "after":
            adoption.restore_session(session, plain, cast("RecordedDevice", Recorded()), keeper)
            rig.settle()
        ours = stack.enter_context(new_channel(rig))
        if comes == "before":
            adoption.restore_session(session, plain, cast("RecordedDevice", Recorded()), keeper)
            rig.settle()
        assert ours.recv(1000) == question(PAGE, 2)


def test_address_of_what_is_whole(pool: Pool) -> None:
    """Where something lies is known without a question if all of it is entered, for that access, in one piece."""
    device = NetDevice(pool, iommu=True)
    iotlb = device.iotlb
    assert iotlb is not None
    device.set_owner()
    device.set_features(1 << 32 | F_ACCESS_PLATFORM)
    iotlb.update(PAGE, PAGE, 10 * PAGE, 3)
    assert iotlb.address(PAGE + 16, PAGE - 16, 3) == 10 * PAGE + 16
    assert iotlb.address(PAGE + 16, PAGE, 1) is None, "the end is not there"
    iotlb.update(2 * PAGE, PAGE, 11 * PAGE, 1)
    assert iotlb.address(PAGE + 16, PAGE, 1) == 10 * PAGE + 16
    assert iotlb.address(PAGE + 16, PAGE, 3) is None, "the end may only be read"
    iotlb.update(2 * PAGE, PAGE, 12 * PAGE, 3)
    assert iotlb.address(PAGE + 16, PAGE, 1) is None, "in two pieces"
    iotlb.invalidate(PAGE, PAGE)
    assert iotlb.address(PAGE, 16, 1) is None


def test_ranges_of_a_real_one() -> None:
    """Empty and wrapping ranges are refused, the ends of the address space are not; nothing without ACCESS_PLATFORM."""
    with Pool(workers=1) as pool:
        assert NetDevice(pool, name="plain").iotlb is None
        device = NetDevice(pool, iommu=True)
        assert device.get_features() & F_ACCESS_PLATFORM
        assert device.iotlb is not None
        device.set_owner()
        with pytest.raises(LocalError, match="ACCESS_PLATFORM"):
            device.iotlb.update(0, PAGE, 0, 1)
        device.set_features(1 << 32 | F_ACCESS_PLATFORM)
        for iova, size, uva, access in (
            (0, 0, 0, 1),
            (PAGE, TOP - PAGE + 1, 0, 1),
            (0, PAGE, TOP - PAGE + 1, 1),
            (0, TOP - 1, PAGE, 1),
            (0, PAGE, 0, 0),
            (0, PAGE, 0, 4),
        ):
            with pytest.raises(LocalError):
                device.iotlb.update(iova, size, uva, access)
        for iova, size in ((PAGE, 0), (PAGE, TOP - PAGE + 1), (1, TOP - 1 + 1)):
            with pytest.raises(LocalError):
                device.iotlb.invalidate(iova, size)
        device.iotlb.update(TOP - PAGE, PAGE, 0, 1)
        device.iotlb.update(0, TOP - 1, 0, 3)
        assert device.snapshot()["iotlb"]["entries"] == 1, "the large one took the place of what it overlaps"
        device.iotlb.invalidate(0, 0)
        assert device.snapshot()["iotlb"]["entries"] == 0
        device.iotlb.update(0, PAGE, 0, 1)
        device.stop_all()
        assert device.snapshot()["iotlb"]["entries"] == 0, "another guest's"


def negotiated(pool: Pool) -> tuple[NetDevice, DeviceIotlb]:
    """Return a device that the driver lets look up its addresses, and its IOTLB."""
    device = NetDevice(pool, iommu=True)
    assert device.iotlb is not None
    device.set_owner()
    device.set_features(1 << 32 | F_ACCESS_PLATFORM)
    return device, device.iotlb


REPORT: Final[Sequence[str]] = ("miss_begun", "miss_iova", "miss_version", "miss")
"""In the order in which a worker writes."""


def write_report(
    pool: Pool, number: int, version: int = 0, *, iova: int = PAGE, access: int = 1, words: Sequence[str] = REPORT
) -> None:
    """Write what the worker of ring 1 writes when it misses an address in the table's `version`, or some of it."""
    report = number << 2 | access
    values: dict[str, int] = dict(zip(REPORT, (report, iova, version % (1 << 32), report), strict=True))
    for name in words:
        layout.RING.write(pool.buf, layout.ring_offset(1), name, values[name])


def test_half_a_report_is_not_read() -> None:
    """Whatever of a report a worker has written, the access of one miss is never asked for at another's address."""
    for written in range(1, len(REPORT)):
        with Pool(workers=1) as pool:
            iotlb = NetDevice(pool, iommu=True).iotlb
            assert iotlb is not None
            write_report(pool, 1, access=3)
            write_report(pool, 2, iova=2 * PAGE, words=REPORT[:written])
            assert iotlb.misses() == []
            write_report(pool, 2, iova=2 * PAGE, words=REPORT[written:])
            assert iotlb.misses() == [Miss(1, 2 * PAGE, 1)]


def test_nothing_is_asked_for_a_ring_that_was_stopped() -> None:
    """A guest that has stopped a ring may have unmapped what its worker still missed."""
    with Pool(workers=1) as pool:
        iotlb = NetDevice(pool, iommu=True).iotlb
        assert iotlb is not None
        write_report(pool, 1)
        assert iotlb.misses() == [Miss(1, PAGE, 1)]
        write_report(pool, 2)
        iotlb.forget_ring(1)
        assert iotlb.misses() == []
        assert iotlb.unanswered() == []


def test_a_report_from_before_the_answer_is_not_asked_for() -> None:
    """What a worker missed before it saw the answer may be unmapped by now: nothing is asked for; what is new is."""
    with Pool(workers=1) as pool:
        _, iotlb = negotiated(pool)
        version = 0

        def report(number: int) -> list[Miss]:
            write_report(pool, number, version)
            return iotlb.misses()

        asked = [Miss(1, PAGE, 1)]
        assert report(1) == asked
        iotlb.update(PAGE, PAGE, 0, 1)
        iotlb.invalidate(PAGE, PAGE)
        assert report(2) == []
        assert iotlb.unanswered() == []
        version = 1000  # when the answer was there
        assert report(3) == asked
        version = -2  # from before it, and numbers wrap
        iotlb.update(PAGE, PAGE, 0, 1)
        iotlb.invalidate(PAGE, PAGE)
        assert report(4) == []
        iotlb.begin(in_use=True)
        version = 0
        assert report(5) == asked, "another guest's"


def adopted(pool: Pool, device: NetDevice, running: set[int]) -> DeviceIotlb:
    """Return what the next control process would have of a device's IOTLB; the caller closes it."""
    assert device.iotlb is not None
    found = Part(fds=tuple(map(os.dup, device.iotlb.part.fds)), borrowed=True)
    again = DeviceIotlb(pool, device, found)
    again.go_on(True, running)
    return again


@pytest.mark.parametrize("was_asked", [True, False])
def test_questions_of_a_control_process_that_died(was_asked: bool) -> None:
    """Asked or not, what a ring still misses is asked once more, unless its answer has come; and an answer wakes it."""
    with Pool(workers=1) as pool:
        device, iotlb = negotiated(pool)
        iotlb.update(2 * PAGE, PAGE, 0, 1)
        write_report(pool, 1, iotlb_version(iotlb))
        assert not was_asked or iotlb.misses() == [Miss(1, PAGE, 1)]
        with contextlib.closing(adopted(pool, device, {0, 1})) as again:
            assert again.unanswered() == []
            assert again.misses() == []
            assert again.left_open() == [Miss(1, PAGE, 1)]
            assert again.left_open() == []
            assert again.unanswered() == [Miss(1, PAGE, 1)]
            assert again.snapshot()["unanswered"] == 1
        with contextlib.closing(adopted(pool, device, {0})) as again:
            assert again.left_open() == [], "a ring that was stopped misses nothing"
        with contextlib.closing(adopted(pool, device, {0, 1})) as again:
            again.update(PAGE, PAGE, 0, 1)
            assert again.left_open() == []
            assert again.snapshot()["unanswered"] == 0
        with contextlib.closing(adopted(pool, device, {0, 1})) as again:
            assert again.left_open() == [], "the ring looks again, the table has changed"


def iotlb_version(iotlb: DeviceIotlb) -> int:
    """Return the number of a table's content."""
    with contextlib.closing(IotlbTable(iotlb.part.fds[0])) as table:
        return table.version


def test_show() -> None:
    """`vhostmp show` has a line for it."""
    shown = render({"devices": [{"device": "0", "iotlb": {"entries": 3, "hits": 2, "misses": 1}}]})
    assert "  IOTLB:      entries=3 hits=2 misses=1" in shown.splitlines()
