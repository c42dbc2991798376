"""What the demo plays on: a device, its workers, its guests, and the four things that are done to them under load.

`Stage` builds it and takes it down. `swap` replaces the back-end. `move` moves the guest's packet buffers to another
segment and has the device follow. `kill` ends a worker by SIGKILL. `settle` lets the guests drain and count.

How a move proves something. Two segments take turns behind the same guest-physical addresses. While both are valid the
guest writes to both (_guest.pyx, DUAL). The moment `set_mem_table` has returned no worker may touch the old one any
more: its transmit part is filled with poison at once, the rest as soon as the guests have taken what was delivered
before. What a worker reads there later comes back as a damaged packet, what it writes there later leaves a cleared
buffer behind and a hole in the poison, for which the segment is searched before it is used again. A worker that finds
the old segment unmapped dies of it, which is counted as well.

Rules: names of segments are removed as soon as they are made, descriptors are handed on by number, so that nothing is
left behind however this process ends.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from types import TracebackType
from typing import Final, Self

import attrs

from vhostmp.errors import QueueBroken, VhostError, WorkerDied
from vhostmp.net import NetDevice
from vhostmp.rings import PACKED_START
from vhostmp.shm.memory import GuestMemory, MemoryRegion
from vhostmp.shm.segment import Segment
from vhostmp.supervisor import Pool
from vhostmp.tools import _board, _guest, guest

LOOPBACK: Final = "loopback"
PYTHON: Final = "python:vhostmp.tools.demo_backend:PythonLoopback"
BACKENDS: Final = (LOOPBACK, PYTHON)
WANTED_FEATURES: Final = (
    1 << _guest.F_VERSION_1 | 1 << _guest.F_IN_ORDER | 1 << _guest.F_EVENT_IDX | 1 << _guest.F_INDIRECT
)
POISON: Final = b"\xa5"
#: How long anything may take that takes a millisecond, seconds.
PATIENCE: Final = 10.0
PAGE: Final = 4096
POOL_PIECES: Final = 4
POLL_SECONDS: Final = 0.0002
#: While something is awaited, guests and rings are looked at this often, seconds.
LOOK_SECONDS: Final = 0.05
#: Workers poll their rings for so long before they sleep, microseconds. Not at all: with two processors the
#: control process needs what a worker without work leaves, and kicks and interrupts are shown as well.
BUSY_POLL_US: Final = 0


@attrs.frozen
class Swap:
    """One swap: when (CLOCK_MONOTONIC, nanoseconds), to what, and how long the grace period was (microseconds)."""

    at_ns: int
    backend: str
    grace_us: float


@attrs.frozen
class Quantiles:
    """Median, 99th percentile and maximum of a list of times, microseconds; 0 for an empty list."""

    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values_us: Sequence[float]) -> Quantiles:
        """Take them by nearest rank: each is one of the values."""
        if not values_us:
            return cls(0.0, 0.0, 0.0)
        ordered = sorted(values_us)
        ranks = (math.ceil(share * len(ordered)) - 1 for share in (0.5, 0.99, 1.0))
        return cls(*(round(ordered[rank], 1) for rank in ranks))


class Stage:
    """The demo's device with everything around it. Use it as a context manager."""

    def __init__(
        self,
        workers: int = 1,
        layout: guest.Layout | None = None,
        sizes: tuple[int, int] = (64, 64),
        seconds: float = 60.0,
    ) -> None:
        """Say what is to be built: a queue pair and a guest for each worker; frames of `sizes`; a run of `seconds`."""
        self.layout: Final = layout or guest.Layout(pairs=workers)
        self.bin_ns: Final = max(1_000_000, int(seconds * 1.5e9 / _board.BINS))
        self.start_ns = 0
        self.swaps: list[Swap] = []
        self.moves_ns: list[int] = []
        self.kill_ns = 0
        self.stray_writes = 0
        self._broken = False  # a broken ring is reported once; what comes after it may still be waited for
        self._sizes = sizes
        self._workers = workers
        self._cleanup = ExitStack()
        self._current = 0
        self._poison = POISON * self.layout.pool_size

    # -- up and down

    def __enter__(self) -> Self:
        """Build everything and let the guests run; what was built is taken down when building fails."""
        with ExitStack() as stack:
            self._build(stack)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take everything down: guests, device, workers, memory."""
        self._cleanup.close()

    def _build(self, stack: ExitStack) -> None:
        layout = self.layout
        self.base = self._memory(stack, layout.base_size, 0)
        self.pools = tuple(self._memory(stack, layout.pool_size, guest.POOL_GPA) for _ in range(2))
        self.pools[1].buf[:] = self._poison
        self._board_segment = Segment.create(guest.board_segment_size(layout.pairs))
        stack.callback(self._board_segment.close)
        self._board_segment.unlink()
        self.boards: list[_board.Board] = []
        stack.callback(self.boards.clear)
        self.boards.extend(
            _board.Board(self._board_segment.buf, guest.board_offset(pair)) for pair in range(layout.pairs)
        )
        #: The workers' processors, one each; none where there are too few.
        self.served, others = self._places(self._workers)
        self.pool = stack.enter_context(Pool(workers=self._workers, cpus=self.served))
        self.device = NetDevice(self.pool, queue_pairs=layout.pairs, backend=PYTHON, name="demo")
        stack.callback(self.device.close)
        self.device.set_backend(LOOPBACK)
        self.backend = LOOPBACK
        self._set_up_device(stack)
        self.guests: list[guest.GuestProcess] = []
        stack.callback(self._end_guests)
        self.guests.extend(guest.GuestProcess(self._spec(pair)) for pair in range(layout.pairs))
        for cpu, process in zip(others, self.guests, strict=False):
            os.sched_setaffinity(process.pid, {cpu})
        if others:
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, others)
        self.start_ns = time.monotonic_ns()
        for board in self.boards:
            board.clock(self.start_ns, self.bin_ns)
        self.order(_board.RUN)

    @staticmethod
    def _places(workers: int) -> tuple[list[int], list[int]]:
        """Return a processor for each worker, and those for the guests and this thread; none where there are too few.

        Workers and guests poll, or nearly so. Where the scheduler puts two of them, or one and the control process, on
        one processor, it takes milliseconds to part them, and the pauses would be those of the scheduler.
        """
        cpus = sorted(os.sched_getaffinity(0))
        return (cpus[-workers:], cpus[:-workers]) if len(cpus) >= 2 * workers else ([], [])

    @staticmethod
    def _memory(stack: ExitStack, size: int, gpa: int) -> GuestMemory:
        memory = stack.enter_context(GuestMemory.create(size, gpa=gpa))
        memory.unlink()
        return memory

    def _set_up_device(self, stack: ExitStack) -> None:
        """Bring the device up as a front-end would."""
        device = self.device
        device.set_owner()
        packed = self.layout.packed
        self.features = device.get_features() & (WANTED_FEATURES | packed << _guest.F_RING_PACKED)
        device.set_features(self.features)
        device.set_mem_table(self.table(0))
        self._kicks: list[int] = []
        self._calls: list[int] = []
        for index in range(2 * self.layout.pairs):
            place = self.layout.ring(index)
            for fds in (self._kicks, self._calls):
                fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
                stack.callback(os.close, fds[-1])
            device.set_vring_num(index, place.entries)
            uva = self.base.uva
            device.set_vring_addr(index, desc=uva + place.desc, avail=uva + place.avail, used=uva + place.used)
            device.set_vring_base(index, PACKED_START if packed else 0)
            device.set_vring_call(index, self._calls[index])
            device.set_vring_kick(index, self._kicks[index])
            device.set_vring_busyloop_timeout(index, BUSY_POLL_US)
            device.set_vring_enable(index, True)
            device.start_vring(index)

    def _spec(self, pair: int) -> guest.Spec:
        return guest.Spec(
            pair=pair,
            layout=self.layout,
            base_fd=self.base.fd,
            pool_fds=(self.pools[0].fd, self.pools[1].fd),
            board_fd=self._board_segment.fd,
            tx_kick_fd=self._kicks[2 * pair + 1],
            tx_call_fd=self._calls[2 * pair + 1],
            rx_kick_fd=self._kicks[2 * pair],
            rx_call_fd=self._calls[2 * pair],
            features=self.features,
            sizes=self._sizes,
        )

    def _end_guests(self) -> None:
        for board in self.boards:
            board.order(_board.STOP)
        for process in self.guests:
            process.wait(PATIENCE)

    @property
    def spare(self) -> GuestMemory:
        """The segment that the packet buffers are not in: poison all over, but for the time of a move."""
        return self.pools[1 - self._current]

    # -- what is done to it

    def table(self, number: int) -> Sequence[MemoryRegion]:
        """Make memory table `number`: the same memory each time, cut into other regions, the pool where it is now."""
        pool = self.pools[self._current].region
        base_pieces = 1 if number % 2 == 0 else 2 * self.layout.pairs
        return [*_cut(self.base.region, base_pieces), *_cut(pool, 1 + number % POOL_PIECES)]

    def swap(self, spec: str) -> Swap:
        """Replace the back-end; raises what set_backend raises."""
        at = time.monotonic_ns()
        self._mark()
        try:
            result = self.device.set_backend(spec)
        finally:
            self._mark()
        self.backend = spec
        self.swaps.append(Swap(at, spec, result.grace_us))
        return self.swaps[-1]

    def rest(self, seconds: float) -> None:
        """Let some time pass in a window like a swap's, in which nothing is swapped: `pauses_ns` has its pause too."""
        self._mark()
        time.sleep(seconds)
        self._mark()

    def _mark(self) -> None:
        for board in self.boards:
            board.swap_mark()

    def move(self) -> None:
        """Move the packet buffers to the other segment under load, and poison the place they were in."""
        old, new = self.pools[self._current], self.spare
        if bytes(new.buf) != self._poison:
            self.stray_writes += 1
        self.order(_board.DUAL)
        # Packets of the time when both are valid are what the workers shall have in their hands.
        self.wait_for_packets(self.layout.tx_entries)
        self._current = 1 - self._current
        self.moves_ns.append(time.monotonic_ns())
        self.device.set_mem_table(self.table(len(self.moves_ns)))
        for pair in range(self.layout.pairs):
            part = self.layout.transmit_part(pair)
            old.buf[part] = self._poison[part]
        self.order(_board.MOVED)
        old.buf[:] = self._poison
        # The last marked packets are dwelt on still (demo_backend.py): a swap now would be measured with that.
        self.wait_for_packets(self.layout.rx_entries)

    def kill(self, index: int = 0) -> None:
        """Kill worker `index` under load and wait until another one does its work. VhostError when none does.

        Everything sent before is settled first, so that what is found wrong later is the kill's doing.
        """
        hit = [pair for pair in range(self.layout.pairs) if self.device.worker_of(2 * pair) == index]
        self.order(_board.KILL, hit)
        restarts = self.pool.restarts
        self.kill_ns = time.monotonic_ns()
        self.pool.kill_worker(index)
        self._wait(lambda: self.pool.restarts > restarts, "the pool replaces the killed worker")
        self.wait_for_packets(4 * self.layout.rx_entries)

    def settle(self) -> None:
        """Let the guests stop sending and count what does not come back."""
        self.order(_board.DRAIN)

    def order(self, code: int, pairs: Sequence[int] | None = None) -> None:
        """Give all guests (or those of `pairs`) an order and wait until they have carried it out."""
        boards = self.boards if pairs is None else [self.boards[pair] for pair in pairs]
        orders = [(board, board.order(code)) for board in boards]
        self._wait(lambda: all(board.acknowledged(command) for board, command in orders), f"order {code} to the guest")

    def wait_for_packets(self, n: int) -> None:
        """Wait until each guest has got `n` packets more."""
        targets = [board.counters()["received"] + n for board in self.boards]
        self._wait(
            lambda: all(b.counters()["received"] >= target for b, target in zip(self.boards, targets, strict=True)),
            f"{n} packets to come back",
        )

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        limit = time.monotonic() + PATIENCE
        look = time.monotonic() + LOOK_SECONDS
        while not condition():
            now = time.monotonic()
            if now > look:
                look = now + LOOK_SECONDS
                self._check_on_everybody(what)
            if now > limit:
                raise VhostError(f"waited {PATIENCE:g} s for {what}: {self.describe_rings()}")
            time.sleep(POLL_SECONDS)

    def _check_on_everybody(self, what: str) -> None:
        """Raise when what is waited for will not come."""
        for process in self.guests:
            if process.ended:
                raise WorkerDied(f"the software guest (pid {process.pid}) ended while the demo waited for {what}")
        for queue in self.device.snapshot()["queues"]:
            if queue["broken"] and not self._broken:
                self._broken = True
                raise QueueBroken(f"ring {queue['index']} was stopped by its worker: {queue['broken']}")

    def describe_rings(self) -> str:
        """Return the state of the rings in one line, for an error message."""
        return "; ".join(
            f"ring {queue['index']} avail {queue['avail_idx']} used {queue['used_idx']} taken {queue['last_avail_idx']}"
            f" broken {queue['broken']}"
            for queue in self.device.snapshot()["queues"]
        )

    # -- what came of it

    def counters(self) -> dict[str, int]:
        """Return the sum of the guests' counters, without the pauses."""
        totals: dict[str, int] = {}
        for board in self.boards:
            for name, value in board.counters().items():
                totals[name] = totals.get(name, 0) + value
        return totals

    def pauses_ns(self) -> list[int]:
        """Return the pause of each swap, and each rest, as each guest saw it, nanoseconds."""
        return [pause for board in self.boards for pause in board.pauses_ns()]

    def packets_per_bin(self, seconds: float) -> list[int]:
        """Return packets received by all guests in each bin of `bin_ns`, for the first `seconds`."""
        n = int(seconds * 1e9) // self.bin_ns + 1
        return [sum(values) for values in zip(*(board.bins(n) for board in self.boards), strict=True)]


def _cut(region: MemoryRegion, pieces: int) -> list[MemoryRegion]:
    """Cut a region into `pieces` of whole pages (fewer if it has fewer pages)."""
    pages = region.size // PAGE
    pieces = min(pieces, pages)
    borders = [pages * piece // pieces * PAGE for piece in range(pieces)] + [region.size]
    return [
        attrs.evolve(
            region,
            gpa=region.gpa + start,
            size=end - start,
            uva=region.uva + start,
            mmap_offset=region.mmap_offset + start,
        )
        for start, end in pairwise(borders)
    ]
