"""The control side of a device's IOTLB: entries come and go, misses become questions to the front-end.

Rules: nothing here waits for the front-end. `update` and `invalidate` return when no worker uses what went: the answer
to the message is the barrier. One question a ring is open at a time, and one that is not answered is repeated once a
second at the most, and only while its ring has something to do.

Theory of operation: the table is in shared memory (shm/_iotlb.pyx), so a change costs no flush: it is written, where
something went a grace period is waited for, and workers with rings that waited for it are nudged. A worker that misses
an address writes it into the ring's slot and signals `fileno`; `misses` then says what to ask (workers/_iommu.pxd).
A report may be older than the answer to the one before: what it names may have been used and unmapped since. So it
carries the version of the table in which nothing was found, and one from before the answer is not asked for: the ring
looks again. A guest's IOMMU takes a question about what is not mapped for a fault of the device.

Who may call: any thread, as with the device's verbs; the pool's lock excludes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import attrs

from vhostmp.errors import LocalError, SysError
from vhostmp.flush import Placement, wait_for_items
from vhostmp.parts import Part
from vhostmp.shm import layout
from vhostmp.shm._iotlb import IotlbTable, read_miss

if TYPE_CHECKING:
    import threading

    from vhostmp.workers.processes import WorkerProcess

ADDRESS_END: Final = 1 << 64
REPEAT_SECONDS: Final = 0.9
"""After so long a question may be asked again; a worker repeats a report after a second."""
BY_ANOTHER: Final = 0.0
"""When a question was asked, if a control process before us has asked it, or meant to."""

_ACCESS_BITS: Final = 2
_ACCESS_MASK: Final = (1 << _ACCESS_BITS) - 1


class WorkersOf(Protocol):
    """What is needed of a pool."""

    @property
    def lock(self) -> threading.RLock:
        """Guards everything."""
        ...

    @property
    def buf(self) -> memoryview:
        """The control segment."""
        ...

    @property
    def workers(self) -> Sequence[WorkerProcess]:
        """The workers, by slot."""
        ...


@attrs.frozen
class Miss:
    """A question for the front-end: what does `iova` stand for? `access`: 1 to read, 2 to write, 3 for both.

    With `denied` it has answered, and does not allow the access: that is a message of its own.
    """

    ring: int
    iova: int
    access: int
    denied: bool = False


@attrs.define
class _Open:
    """A question that was asked."""

    iova: int
    access: int
    asked: float
    denied: bool = False


class DeviceIotlb:
    """The IOTLB of one device. Lives as long as the device; empty whenever no guest uses it."""

    def __init__(self, pool: WorkersOf, place: Placement, found: Part | None = None) -> None:
        """Make an empty one for a device, which may get its place later. SysError when there is no memory.

        With the part that a control process before us had (`part`), go on with that; it is taken over.
        """
        self._pool: Final = pool
        self._place: Final = place
        self._table: Final = IotlbTable() if found is None else IotlbTable(found.fds[0], own=True)
        try:
            self._wake: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if found is None else found.fds[1]
        except OSError as error:
            self._table.close()
            raise SysError.wrap("cannot make an eventfd", error) from error
        # What workers are sent: the table, and the eventfd that they signal.
        self.part: Final = found or Part(fds=(self._table.fd, self._wake), borrowed=True)
        self._open: dict[int, _Open] = {}
        self._seen: dict[int, int] = {}
        self._answered: dict[int, int] = {}  # by ring, the table's version with the last answer to it
        self._denied: list[Miss] = []
        self.in_use = False
        """Whether a guest has acked ACCESS_PLATFORM; entries are refused before."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when `misses` has something to say."""
        return self._wake

    def update(self, iova: int, size: int, uva: int, access: int) -> None:
        """Enter that `size` bytes at `iova` stand for those at front-end address `uva`; `access` as in Miss.

        Replaces every entry that it overlaps, whole. What is not in guest memory now may be later: it is entered and
        cannot be used. EINVAL for an empty range, one that wraps, or an unknown access; EPERM without ACCESS_PLATFORM;
        SynchronizeTimeout when a worker may still use what was replaced.
        """
        if size <= 0 or iova + size > ADDRESS_END or uva + size > ADDRESS_END:
            raise LocalError(f"IOTLB update of {size:#x} bytes at {iova:#x} for {uva:#x} is empty or wraps")
        last = iova + size - 1
        with self._pool.lock:
            self._check_in_use()
            if self._table.update(iova, last, uva, access):
                self._synchronize()
            self._answer(iova, last, access)

    def invalidate(self, iova: int, size: int) -> None:
        """Remove every entry that `size` bytes at `iova` overlap; size 0 at 0, as 2^64, is everything.

        After the return no worker uses what went, ever. EINVAL for a range that wraps, EPERM without ACCESS_PLATFORM,
        SynchronizeTimeout when a worker may still use it.
        """
        if iova == size == 0:
            size = ADDRESS_END
        if size <= 0 or iova + size > ADDRESS_END:
            raise LocalError(f"IOTLB invalidation of {size:#x} bytes at {iova:#x} is empty or wraps")
        last = iova + size - 1
        with self._pool.lock:
            self._check_in_use()
            self._table.invalidate(iova, last)
            self._synchronize()
            # Who was denied may be allowed next time.
            again = [
                ring
                for ring, asked in self._open.items()
                if asked.denied and (iova <= asked.iova <= last or not asked.access)
            ]
            for ring in again:
                del self._open[ring]
            self._nudge(again)

    def misses(self) -> list[Miss]:
        """Return what the front-end is to be told, each once. Clears `fileno`."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with self._pool.lock:
            told, self._denied = self._denied, []
            woken: list[int] = []
            for ring in range(self._place.num_queues):
                found = read_miss(self._pool.buf, layout.ring_offset(self._place.first_ring + ring))
                if found is None or found[0] == self._seen.get(ring, 0):
                    continue
                number, iova, version = found
                self._seen[ring] = number
                if self._is_old(ring, version):
                    woken.append(ring)
                    continue
                told += self._report(ring, iova, number & _ACCESS_MASK, woken)
            self._nudge(woken)
            return told

    def unanswered(self) -> list[Miss]:
        """Return the open questions, to ask them on another channel."""
        with self._pool.lock:
            return [
                Miss(ring, asked.iova, asked.access)
                for ring, asked in self._open.items()
                if not asked.denied and asked.asked != BY_ANOTHER
            ]

    def address(self, iova: int, size: int, access: int) -> int | None:
        """Return the front-end address of `size` bytes, when all of them are entered, in one piece and for `access`.

        So nobody has to be asked for them. The caller holds the pool's lock.
        """
        start: int | None = None
        at = iova
        while at < iova + size:
            entry = self._table.find(at)
            if entry is None or entry[3] & access != access:
                return None
            uva = entry[2] + at - entry[0]
            start = uva if start is None else start
            if uva - start != at - iova:
                return None
            at = entry[1] + 1
        return start

    def left_open(self) -> list[Miss]:
        """Return, once, what a control process before us may have asked, or not, and what is not answered yet.

        To be called when the answers that had come before us have been entered: a front-end that is asked for what it
        has answered may have unmapped it by now, and takes the question for a fault of the device.
        """
        with self._pool.lock:
            left = [(ring, one) for ring, one in self._open.items() if not one.denied and one.asked == BY_ANOTHER]
            for _, one in left:
                one.asked = time.monotonic()
            return [Miss(ring, one.iova, one.access) for ring, one in left]

    def forget_ring(self, ring: int) -> None:
        """Take note that a ring was stopped, and its worker has let go of it: what it missed is not wanted any more."""
        self._open.pop(ring, None)
        self._seen[ring] = self._read(ring, "miss")

    def forget(self) -> None:
        """Forget everything. No ring runs: what went meanwhile a front-end need not have told, and QEMU does not."""
        with self._pool.lock:
            self._table.invalidate(0, ADDRESS_END - 1)
            self._open.clear()
            self._answered.clear()
            self._denied.clear()

    def begin(self, in_use: bool) -> Part | None:
        """Begin with another guest, or none. No ring runs. Returns the part for the device's state, if any."""
        with self._pool.lock:
            self.forget()
            self.in_use = in_use
            return self.part if in_use else None

    def go_on(self, in_use: bool, running: Collection[int]) -> None:
        """Go on where a control process before us stopped; these rings run.

        What it had asked is not known. A ring that missed something in the table as it is now still waits for that,
        and says it once: it is open (`left_open`). Any other ring looks again, and reports what it still misses, as
        soon as its worker is nudged, which the first flush does.
        """
        self.in_use = in_use
        for ring in range(self._place.num_queues):
            found = read_miss(self._pool.buf, layout.ring_offset(self._place.first_ring + ring))
            if found is None:  # it is about to be told, which is a signal for us
                continue
            number, iova, version = found
            self._seen[ring] = number
            if in_use and number and ring in running and version == self._table.version:
                access = number & _ACCESS_MASK
                self._open[ring] = _Open(iova, access, BY_ANOTHER, denied=not access)

    def snapshot(self) -> dict[str, int]:
        """Return what `vhostmp show` prints of it."""
        totals = {
            name: sum(self._read(ring, f"iotlb_{name}") for ring in range(self._place.num_queues))
            for name in ("hits", "misses", "unusable")
        }
        return {
            "entries": len(self._table),
            **totals,
            "evicted": self._table.evicted,
            "unanswered": sum(asked.access != 0 for asked in self._open.values()),
        }

    def close(self) -> None:
        """Unmap and close. The device's rings are stopped. Idempotent."""
        if self._table.fd >= 0:
            self._table.close()
            os.close(self._wake)

    def _read(self, ring: int, name: str) -> int:
        return layout.RING.read(self._pool.buf, layout.ring_offset(self._place.first_ring + ring), name)

    def _check_in_use(self) -> None:
        if not self.in_use:
            raise LocalError("IOTLB entries need ACCESS_PLATFORM, which the guest has not acked", errno.EPERM)

    def _is_old(self, ring: int, version: int) -> bool:
        """Whether a ring missed in `version`, which wraps, what it missed before its last question was answered."""
        answered = self._answered.get(ring)
        return answered is not None and (version - answered) % (1 << 32) >= 1 << 31

    def _report(self, ring: int, iova: int, access: int, woken: list[int]) -> Iterable[Miss]:
        """Deal with what a ring missed; rings for which the answer has come meanwhile are added to `woken`."""
        if not access:  # an entry that cannot be used: no question, but any change may mend it
            self._open[ring] = _Open(iova, 0, time.monotonic(), denied=True)
            woken.append(ring)  # one that came before this report did: it looks once more, and says nothing new
            return
        entry = self._table.find(iova)
        if entry is not None and entry[3] & access == access:
            woken.append(ring)
            return
        asked = self._open.get(ring)
        now = time.monotonic()
        same = asked is not None and (asked.iova, asked.access) == (iova, access)
        if asked is not None and same and (asked.denied or now - asked.asked < REPEAT_SECONDS):
            return
        self._open[ring] = _Open(iova, access, now)
        yield Miss(ring, iova, access)

    def _answer(self, iova: int, last: int, access: int) -> None:
        """Let rings go on that waited for an entry; note those to which it does not allow what they need."""
        woken: list[int] = []
        for ring, asked in self._open.items():
            if asked.access and not iova <= asked.iova <= last:
                continue
            if access & asked.access == asked.access:
                woken.append(ring)
            elif not asked.denied:
                asked.denied = True
                self._denied.append(Miss(ring, asked.iova, asked.access, denied=True))
        for ring in woken:
            del self._open[ring]
            self._answered[ring] = self._table.version
        self._nudge(woken)
        if self._denied:
            os.eventfd_write(self._wake, 1)

    def _synchronize(self) -> None:
        wait_for_items(self._pool.buf, self._pool.workers)

    def _nudge(self, rings: Iterable[int]) -> None:
        """Have the workers of these rings look again."""
        serving = {self._read(ring, "worker") - 1 for ring in rings}
        for worker in self._pool.workers:
            if worker.index in serving:
                worker.nudge()
