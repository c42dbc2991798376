"""What goes on while a worker dies: verbs that it dies under, and guests whose front-end has more to do with the rings.

A verb is a generator. What is before its `yield` is done in a thread while the worker stands at a kill point, and so it
waits for the worker's death; what is behind it is done afterwards, with the ring as death and verb have left it.
"""

from __future__ import annotations

import os
import signal
import struct
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any, Final

import attrs

from tests.adversity.killing import FEW, NUM, PATIENCE, ROOM, Loopback, NetRig, Requests, Rig
from tests.dirty import ADDR_FLAG_LOG, LOG_ALL, PAGE, DirtyLog, pages
from tests.helpers import process_state, wait_until
from tests.iommu_guest import Iommu, StrictGuest
from tests.net_driver import SEND_ROOM, Buffers, Guest
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.shm import inflight, layout
from vhostmp.shm.memory import GuestMemory
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.packed import PackedDriver
from vhostmp.tools.stress.ring import F_RING_PACKED, RingLayout
from vhostmp.tools.stress.split import SplitDriver

Verb = Callable[[Rig, int], Generator[None]]

#: Points at which Python runs, or may: the channel thread gets no further either, so that a verb waits earlier.
IN_PYTHON: Final = ("begun", "transmitted", "answered", "processed")
#: Points at which the driver may see what is not in the log yet: that is cleared before the worker comes there.
PUBLISHING: Final = ("half_shown", "shown", "avail_noted")
#: Guest memory that a log speaks of: each new region of buffers begins a GiB above the one before.
LOGGED_BYTES: Final = 64 << 30
POISON: Final = b"\xa5"
#: Of a guest behind an IOMMU: so many turns it sends as much as it can, and so many only after these without anything.
BUSY_TURNS: Final = 24
IDLE_TURNS: Final = 4
#: Of a packed ring's region, from byte 8 on: version, desc_num, free_head, old_free_head, used_idx, old_used_idx, both
#: wrap counters.
HEADER: Final = struct.Struct("=HHHHHHBB")


def driver_of(rig: Rig, ring: int) -> SplitDriver | PackedDriver:
    """Return the driver's side of a ring."""
    if isinstance(rig, NetRig):
        return (rig.pair.rx, rig.pair.tx)[ring]
    assert isinstance(rig, Requests)
    driver: SplitDriver | PackedDriver = rig.guest.rings[ring]
    return driver


def start(rig: Rig, ring: int, base: int) -> None:
    """Start a ring that was stopped; the driver has had back what is before `base`, and nothing else."""
    rig.turn(sending=False)
    driver = driver_of(rig, ring)
    if isinstance(rig, Logged):
        assert ring not in rig.unlogged(), "not in the log"
    if isinstance(rig, Regioned):
        rig.check_region(ring)
    stands = driver.used_idx | driver.used_idx << 16 if isinstance(driver, PackedDriver) else driver.used_idx
    assert base == stands, f"stopped at {base:#x}, the driver is at {stands:#x}"
    if isinstance(rig, NetRig):
        rig.guest.start(ring, base)
    elif isinstance(rig, Requests):
        rig.guest.start_one(ring, base)


def move(rig: Rig, ring: int) -> Generator[None]:
    """Have the other worker serve the ring."""
    rig.device.attach_vring_worker(ring, 1 - rig.device.worker_of(ring))
    yield


def disable(rig: Rig, ring: int) -> Generator[None]:
    """Disable it, until the replacement has left nothing half done."""
    rig.device.set_vring_enable(ring, False)
    yield
    wait_until(lambda: not rig.device.unfinished(ring), PATIENCE, "a whole ring")
    rig.device.set_vring_enable(ring, True)


def toggle(rig: Rig, ring: int) -> Generator[None]:
    """Disable it and enable it at once."""
    with rig.pool.lock:
        rig.device.set_vring_enable(ring, False)
        rig.device.set_vring_enable(ring, True)
    yield


def stop(rig: Rig, ring: int) -> Generator[None]:
    """Stop it."""
    base = rig.device.stop_vring(ring)
    yield
    start(rig, ring, base)


def disable_and_stop(rig: Rig, ring: int) -> Generator[None]:
    """Disable and stop it, before there is a replacement."""
    with rig.pool.lock:
        rig.device.set_vring_enable(ring, False)
        base = rig.device.stop_vring(ring)
    yield
    start(rig, ring, base)


def move_and_stop(rig: Rig, ring: int) -> Generator[None]:
    """Disable it, have the other worker serve it, and stop it."""
    with rig.pool.lock:
        rig.device.set_vring_enable(ring, False)
        rig.device.attach_vring_worker(ring, 1 - rig.device.worker_of(ring))
        base = rig.device.stop_vring(ring)
    yield
    start(rig, ring, base)


def swap(rig: Rig, ring: int) -> Generator[None]:
    """Put a new back-end of the same kind in the place of the one there is; a worker that dies over it is a refusal."""
    del ring
    try:
        rig.device.set_backend(rig.device.backend)
    except LocalError as error:
        assert "channel closed, while it" in str(error)  # noqa: PT017 - and else there is none
    yield


def renew_memory(rig: Rig, ring: int) -> Generator[None]:
    """Give another memory table: with new buffers, where those who use the old ones can be told apart."""
    del ring
    if isinstance(rig, NetRig):
        rig.guest.renew_buffers()
    elif isinstance(rig, Requests):
        rig.device.set_mem_table([rig.guest.memory.region])
    yield


def move_memory(rig: Rig, ring: int) -> Generator[None]:
    """Stop the device and go on with all memory elsewhere; nothing is in the old one that anybody may look at."""
    del ring
    assert isinstance(rig, NetRig)
    rig.guest.move(POISON)
    yield


def nothing(rig: Rig, ring: int) -> Generator[None]:
    """Do nothing."""
    del rig, ring
    yield


#: What can be done to any ring.
ANY: Final = (move, disable, toggle, stop, disable_and_stop, move_and_stop, swap, renew_memory)


class Killer:
    """Kills a worker that has come by a kill point, once a verb waits for it, or `go`."""

    def __init__(self, rig: Rig, ring: int, point: str) -> None:
        """Wait for that."""
        rig.set_slot(ring, kill_left=1, kill_signal=0, kill_point=1 + layout.KILL_POINTS.index(point))
        self.rig: Final = rig
        self.ring: Final = ring
        self.index: Final = rig.device.worker_of(ring)
        self.pid: Final = rig.pool.worker(self.index).pid
        self._pidfd: Final = os.pidfd_open(self.pid)
        self._go: Final = threading.Event()
        self._thread: Final = threading.Thread(target=self._run, name="killer")
        self._thread.start()

    @property
    def is_there(self) -> bool:
        """Whether the worker has come by the point."""
        return self.rig.slot(self.ring, "kill_point") == 0

    @property
    def is_waited_for(self) -> bool:
        """Whether a verb sleeps until the worker's work item ends."""
        return layout.WORKER.read(self.rig.pool.buf, layout.worker_offset(self.index), "waiters") != 0

    def kill(self) -> None:
        """Have the worker killed now."""
        self._go.set()
        self._thread.join()

    def replaced(self) -> None:
        """Wait for its replacement."""
        wait_until(lambda: self.rig.pool.worker(self.index).pid != self.pid, PATIENCE, "the replacement")

    def _run(self) -> None:
        with suppress(AssertionError):  # that it does not come is the test's to say
            wait_until(lambda: self.is_there and (self._go.is_set() or self.is_waited_for), 2 * PATIENCE)
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        os.close(self._pidfd)


def die_under(rig: Rig, ring: int, point: str, verb: Verb) -> None:
    """Have the worker of a ring die at a kill point while a verb is under way."""
    is_cleared = isinstance(rig, Logged) and point in PUBLISHING
    if isinstance(rig, Logged) and is_cleared:
        rig.approach(ring)
    killer = Killer(rig, ring, point)
    if is_cleared:
        os.kill(killer.pid, signal.SIGCONT)
    both_halves = verb(rig, ring)
    failed: list[BaseException] = []

    def first_half() -> None:
        try:
            next(both_halves)
        except BaseException as error:
            failed.append(error)

    try:
        rig.drive(lambda: killer.is_there, f"to {point} of ring {ring}")
        if isinstance(rig, Logged) and not is_cleared:
            rig.begin()
        thread = threading.Thread(target=first_half, name="verb")
        thread.start()

        def is_under_way() -> bool:
            if killer.is_waited_for or not thread.is_alive():
                return True
            if point not in IN_PYTHON or not rig.pool.lock.acquire(blocking=False):
                return point in IN_PYTHON
            rig.pool.lock.release()
            return False

        wait_until(is_under_way, PATIENCE, "the verb")
    finally:
        killer.kill()
    thread.join()
    killer.replaced()
    if failed:
        raise failed[0]
    next(both_halves, None)


class Regioned(Loopback):
    """The front-end keeps a region of what is in flight. Of split rings nothing is written there while they run."""

    def make_guest(self, device: NetDevice, features: int) -> Guest:
        """Give the region."""
        guest = super().make_guest(device, features)
        self.packed = bool(features >> 34 & 1)
        self.region, self.region_bytes = inflight.create(2, NUM, packed=self.packed)
        self.stack.callback(os.close, self.region)
        bases = guest.stop()
        self.give(device)
        for ring, base in enumerate(bases):
            guest.start(ring, base)
        return guest

    def give(self, device: NetDevice) -> None:
        """Give a device the region. LocalError when it cannot be used."""
        if self.packed:
            device.set_inflight(self.region, 0, self.region_bytes, 2, NUM)
        else:
            inflight.adopt(self.region, 0, self.region_bytes, 2, NUM)

    def begin_anew(self) -> None:
        """Have the rings served by another device, which has nothing to go by but the region and the rings."""
        device = self.make_device(self.pool)
        self.stack.callback(device.close)
        self.device = self.guest.device = device  # type: ignore[misc]
        device.set_owner()
        device.set_features(self.guest.features)
        self.guest.set_mem_table()
        self.give(device)
        for ring in range(2):
            self.guest.start(ring, 0x8000 if self.packed else 0)

    def check_whole(self) -> None:
        """Check that the region says that nothing is in flight, and where the rings stand."""
        super().check_whole()
        self.guest.stop()
        if self.packed:
            for ring in range(2):
                self.check_region(ring)
        else:
            inflight.adopt(self.region, 0, self.region_bytes, 2, NUM)

    def check_region(self, ring: int) -> None:
        """Check what the region says of a packed ring that is stopped."""
        size = inflight.queue_bytes(NUM, packed=True)
        part = os.pread(self.region, size, ring * size)
        at = driver_of(self, ring).used_idx
        offset, wrap = at & 0x7FFF, at >> 15
        assert HEADER.unpack_from(part, 8) == (1, NUM, 0, 0, offset, offset, wrap, wrap)
        assert not any(part[inflight.PACKED_HEADER_BYTES :: inflight.PACKED_ENTRY_BYTES]), "a chain in flight"


class Behind(Loopback):
    """The guest is behind an IOMMU, and maps each buffer for its one use."""

    _turns = _idle = 0

    def make_device(self, pool: Pool) -> NetDevice:
        """Return the device."""
        return NetDevice(pool, backend=self.spec, iommu=True)

    def make_guest(self, device: NetDevice, features: int) -> Guest:
        """Return a guest that is strict."""
        options: dict[str, Any] = {"features": features, "room": ROOM}
        return StrictGuest(device, num=NUM, rx_limit=FEW, **options)

    def send(self) -> None:
        """Send; for a while only now and then, so that the worker comes to an end: it is slower than we are."""
        self._turns += 1
        self._idle = 0 if self.pair.tx.in_flight else self._idle + 1
        if self._turns % (2 * BUSY_TURNS) < BUSY_TURNS or self._idle > IDLE_TURNS:
            super().send()

    @property
    def iommu(self) -> Iommu:
        """What answers the device's questions."""
        assert isinstance(self.guest, StrictGuest)
        return self.guest.iommu


class NotedBuffers(Buffers):
    """Tells of everything that is read."""

    def __init__(self, gpa: int, count: int, room: int, noted: Callable[[int, bytes], None]) -> None:
        """Allocate them."""
        super().__init__(gpa, count, room)
        self.noted: Final = noted

    def read(self, gpa: int, size: int) -> bytes:
        """Read at an address."""
        data = super().read(gpa, size)
        self.noted(gpa, data)
        return data


class LoggedGuest(Guest):
    """A guest whose used rings are logged; `noted` hears of what it receives."""

    def __init__(self, device: NetDevice, noted: Callable[[int, bytes], None], **options: Any) -> None:
        """As Guest."""
        self.noted: Final = noted
        super().__init__(device, **options)

    def _new_buffers(self) -> Buffers:
        gpa, self._next_gpa = self._next_gpa, self._next_gpa + (1 << 30)
        return NotedBuffers(gpa, 2 * self.num, SEND_ROOM, self.noted)

    def lay_out(self, start: int) -> RingLayout:
        """Have what says that a batch is there on a page of its own: else other words of the ring have it logged."""
        plain = super().lay_out(start)
        if self.features & F_RING_PACKED:
            return attrs.evolve(plain, used=start + PAGE, end=start + PAGE + 4)
        used = start + 2 * PAGE - 4  # flags and index, and on the next page the elements
        return attrs.evolve(plain, used=used, end=used + plain.end - plain.used)

    def addresses(self, index: int) -> dict[str, int]:
        """Return what the device is told of where a ring lies."""
        return {**super().addresses(index), "flags": ADDR_FLAG_LOG, "log": self.rings.gpa + self.layouts[index].used}


class Logged(Loopback):
    """Everything is logged: what has changed since `begin` must be in the log once the guest sees it."""

    _before: dict[int, bytes] | None = None

    def make_guest(self, device: NetDevice, features: int) -> Guest:
        """Switch the log on."""
        self.log = self.stack.enter_context(DirtyLog(LOGGED_BYTES // PAGE // 8))
        guest = LoggedGuest(device, self.noted, num=NUM, features=features, room=ROOM, rx_limit=FEW)
        device.set_log_base(self.log.fd, self.log.size, 0)
        device.set_features(features | LOG_ALL)
        return guest

    def approach(self, ring: int) -> None:
        """Have a ring's worker stop as it begins to publish, and clear the log there."""
        pid = self.pool.worker(self.device.worker_of(ring)).pid
        self.set_slot(ring, kill_left=1, kill_signal=signal.SIGSTOP, kill_point=1 + layout.KILL_POINTS.index("noted"))
        self.drive(lambda: process_state(pid) == "T", f"to a publication on ring {ring}")
        self.begin()

    def begin(self) -> None:
        """Clear the log; the worker stands still. What was shown to the guest before is taken, and out of it."""
        self._before = None
        super().turn(sending=False)
        self.log.clear()
        self._before = {memory.gpa: bytes(memory.buf) for memory in self._memories()}
        self._used = [driver.used_idx for driver in (self.pair.rx, self.pair.tx)]

    def settle(self) -> None:
        """Look at the rings, too."""
        super().settle()
        wait_until(lambda: not self.unlogged(), what="the rings' pages in the log")  # their bits come after the index

    def unlogged(self) -> list[int]:
        """List the rings that went on and are not in the log."""
        found: list[int] = []
        for ring, driver in enumerate((self.pair.rx, self.pair.tx)):
            place = self.guest.layouts[ring]
            written = (place.desc,) if isinstance(driver, PackedDriver) else (place.used, place.used + 4)
            if self._before is not None and driver.used_idx != self._used[ring]:
                found += [ring] if not all(self.is_logged(at // PAGE) for at in written) else []
        return found

    def noted(self, gpa: int, data: bytes) -> None:
        """Look at what the guest has received."""
        if self._before is None:
            return
        for page in pages(gpa, len(data)):
            first, last = max(gpa, page * PAGE), min(gpa + len(data), (page + 1) * PAGE)
            was = next(
                (
                    old[first - start : last - start]
                    for start, old in self._before.items()
                    if start <= first < start + len(old)
                ),
                None,
            )
            if was != data[first - gpa : last - gpa]:
                assert self.is_logged(page), f"page {page:#x} was received and is not in the log"

    def is_logged(self, page: int) -> bool:
        """Whether a page's bit is set."""
        return bool(self.log.map[page // 8] >> page % 8 & 1)

    def check_whole(self) -> None:
        """Check that everything was within the log."""
        super().check_whole()
        assert self.count("log_outside") == 0

    def _memories(self) -> list[GuestMemory]:
        return [memory.memory for memory in (self.guest.buffers, *self.guest.old_buffers)]
