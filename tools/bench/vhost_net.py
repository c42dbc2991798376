"""Linux's vhost-net and ours in turn, on one machine: one front-end, two taps set up alike, what a frame costs each.

    python -m vhostmp.tools.bench.vhost_net [--rounds 5] [--seconds 0.05] [--case 64 ...] [--against-itself]

As root, on a machine with /dev/vhost-net. `vhostmp bench --case vhost-net` runs it in a guest (in_guest.py). Prints a
line of JSON, `Costs`, for each case.

What is the same on both sides: the front-end (`_flood.pyx`, a thread of this process), the features, the ring, the tap
with its offloads and its header, set up by the same code, what is counted, which is the frames that the tap took, and
what is read: the processor time of the worker, a thread of the kernel's or a process of ours, over these frames. The
front-end keeps the ring full, so what the worker spends on a frame is what limits the rate. Windows of the two
sides alternate, the side that is not looked at sleeps. Beside them stands a thread that does nothing but `write()` one
constant frame to a tap of its own: what the kernel asks of any process.
Source: include/uapi/linux/vhost.h; proc(5), schedstat.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import struct
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol

import attrs

from vhostmp.backends import CSUM, HOST_TSO4, OFFLOADS, open_backend
from vhostmp.errors import LocalError, VhostError
from vhostmp.logs import writing_to
from vhostmp.net import EVENT_IDX, MRG_RXBUF, VERSION_1, NetDevice
from vhostmp.shm.memory import MemoryRegion
from vhostmp.shm.segment import Segment
from vhostmp.supervisor import Pool
from vhostmp.tools import _flood
from vhostmp.tools._probe import write_loop
from vhostmp.tools.bench.devices import Counted, frame
from vhostmp.tools.bench.flood import GPA, HEADER, LINE, STRIDE, TSO_FROM, TSO_HEADER, Board, tso_frame
from vhostmp.tools.guest import RINGS_BYTES, RingPlace

DEVICE: Final = Path("/dev/vhost-net")
W, R = 0x40000000, 0x80000000


def ioctl_number(direction: int, number: int, size: int = 8) -> int:
    """Return the number of one of vhost's ioctls. Source: include/uapi/asm-generic/ioctl.h."""
    return direction | size << 16 | 0xAF << 8 | number


SET_FEATURES: Final = ioctl_number(W, 0x00)
SET_OWNER: Final = ioctl_number(0, 0x01, 0)
SET_MEM_TABLE: Final = ioctl_number(W, 0x03)
SET_VRING_NUM: Final = ioctl_number(W, 0x10)
SET_VRING_ADDR: Final = ioctl_number(W, 0x11, 40)
SET_VRING_BASE: Final = ioctl_number(W, 0x12)
SET_VRING_KICK: Final = ioctl_number(W, 0x20)
SET_VRING_CALL: Final = ioctl_number(W, 0x21)
SET_VRING_BUSYLOOP_TIMEOUT: Final = ioctl_number(W, 0x23)
NET_SET_BACKEND: Final = ioctl_number(W, 0x30)

RINGS: Final = (0, 1)
WARM_SECONDS: Final = 0.02
#: A tap that has taken nothing for so long takes nothing until there is more to take.
STILL_SECONDS: Final = 0.01
PATIENCE: Final = 30.0


@attrs.frozen
class Case:
    """Frames of `size` bytes, by workers that poll for `busy_poll` microseconds before they ask for kicks."""

    size: int
    busy_poll: int = 0
    ring: int = 1024

    @property
    def name(self) -> str:
        """Return what --case takes."""
        return f"{self.size}-poll" if self.busy_poll else str(self.size)

    @property
    def features(self) -> int:
        """What is acked to both, of what a Linux guest acks."""
        bits = (VERSION_1, MRG_RXBUF, EVENT_IDX, *((CSUM, HOST_TSO4) if self.size >= TSO_FROM else ()))
        return sum(1 << bit for bit in bits)


CASES: Final = (Case(64), Case(1500), Case(64, 50), Case(1500, 50), Case(65226, ring=256))


@attrs.frozen
class Costs:
    """What came of a case: nanoseconds a frame in each round of ours, of the kernel's, and of a bare write()."""

    size: int
    busy_poll: int
    ours: Sequence[float]
    kernel: Sequence[float]
    bare: Sequence[float]


class Side(Protocol):
    """A device with a tap of its own."""

    tap: str

    @property
    def threads(self) -> Sequence[int]:
        """Its worker's threads."""
        ...

    def start(self, rig: Rig) -> None:
        """Take the memory, start both rings."""
        ...

    def close(self) -> None:
        """Stop, and remove the tap."""
        ...


class Rig:
    """Guest memory with two rings, and the driver of the transmit ring."""

    def __init__(self, case: Case, stack: ExitStack) -> None:
        """Make them; they go with `stack`."""
        self.case: Final = case
        strides = (max(STRIDE, (HEADER + case.size + LINE) // (2 * LINE) * 2 * LINE + LINE), STRIDE)
        self.memory: Final = Segment.nameless(RINGS_BYTES + case.ring * sum(strides))
        stack.callback(self.memory.close)
        self.address: Final = ctypes.addressof(ctypes.c_char.from_buffer(self.memory.buf))
        self.places: Final = [RingPlace.at(index * RINGS_BYTES // 2, case.ring) for index in RINGS]
        self.kicks: Final = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in RINGS]
        self.calls: Final = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in RINGS]
        for fd in (*self.kicks, *self.calls):
            stack.callback(os.close, fd)
        self._board: Final = Board()
        stack.callback(self._board.close)
        rx, tx = (
            (case.ring, place.desc, place.avail, place.used, self.kicks[index], self.calls[index])
            for index, place in enumerate(self.places)
        )
        large = case.size >= TSO_FROM
        flow = _flood.Flow(
            *(self.memory.buf, self._board.view, 0),
            gpa=GPA,
            tx=tx,
            rx=rx,
            slots=RINGS_BYTES,
            strides=strides,
            size=case.size,
            header=TSO_HEADER if large else bytes(HEADER),
            sends=True,
            receives=False,
            packed=False,
            event_idx=True,
            gap_ns=0,
        )
        if large:
            flow.preset(TSO_HEADER + tso_frame(case.size))
        self._flows = [flow]
        stack.callback(self._flows.clear)

    def cost(self, side: Side, seconds: float) -> float:
        """Send for so many seconds as fast as the device goes along; returns what a frame cost its worker."""
        self._board.again()
        driver = threading.Thread(target=_flood.flood, args=(self._flows, self._board.view), daemon=True)
        driver.start()
        try:
            time.sleep(WARM_SECONDS)
            meter = Meter(side.tap, side.threads)
            time.sleep(seconds)
            found = meter.cost()
        finally:
            self._board.stop()
            driver.join()
        if bad := self._board.totals()["bad"]:
            raise LocalError(f"{bad} ring entries of {side.tap} were not what they should be")
        _await_still(side.tap)
        return found


class Meter:
    """Processor time of some threads, for each frame that a tap takes."""

    def __init__(self, tap: str, threads: Sequence[int]) -> None:
        """Begin."""
        self._tap: Final = Counted(tap)
        self._threads: Final = threads
        self._before = self._now()

    def _now(self) -> tuple[int, int]:
        times = (Path(f"/proc/{thread}/schedstat").read_text().split()[0] for thread in self._threads)
        return sum(map(int, times)), self._tap.taken

    def cost(self) -> float:
        """Return it since the beginning, nanoseconds. LocalError when there were no frames."""
        nanoseconds, taken = (now - then for now, then in zip(self._now(), self._before, strict=True))
        if taken <= 0:
            raise LocalError(f"{self._tap.name} took no frame in a whole window")
        return nanoseconds / taken


class Kernel:
    """/dev/vhost-net."""

    def __init__(self, tap: str) -> None:
        """Open it, with a tap of that name."""
        self.tap = tap
        with ExitStack() as stack:
            self._fd: Final = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, self._fd)
            self._backend: Final = open_backend(f"tap:{tap}", 1)
            stack.callback(self._backend.close)
            others = _vhost_threads()
            fcntl.ioctl(self._fd, SET_OWNER)
            self.threads: Final = sorted(_vhost_threads() - others)
            if not self.threads:
                raise LocalError("there is no thread of the kernel's with the name of a vhost worker")
            self.close: Final = stack.pop_all().close

    def start(self, rig: Rig) -> None:
        """Take the memory, start both rings."""
        case = rig.case
        self._backend.part(case.features)  # the tap's header and offloads
        fcntl.ioctl(self._fd, SET_FEATURES, struct.pack("Q", case.features & ~OFFLOADS))
        region = struct.pack("QQQQ", GPA, rig.memory.size, rig.address, 0)
        fcntl.ioctl(self._fd, SET_MEM_TABLE, bytearray(struct.pack("II", 1, 0) + region))
        for index, place in enumerate(rig.places):
            at = [rig.address + offset for offset in (place.desc, place.used, place.avail)]
            self._ring(SET_VRING_NUM, index, case.ring)
            self._ring(SET_VRING_BASE, index, 0)
            fcntl.ioctl(self._fd, SET_VRING_ADDR, struct.pack("IIQQQQ", index, 0, *at, 0))
            self._ring(SET_VRING_CALL, index, rig.calls[index])
            self._ring(SET_VRING_KICK, index, rig.kicks[index])
            self._ring(SET_VRING_BUSYLOOP_TIMEOUT, index, case.busy_poll)
            self._ring(NET_SET_BACKEND, index, self._backend.fds[0])

    def _ring(self, request: int, index: int, value: int) -> None:
        fcntl.ioctl(self._fd, request, struct.pack("II", index, value))


class Ours:
    """A NetDevice with a tap."""

    def __init__(self, tap: str, pool: Pool) -> None:
        """Make it, with a tap of that name."""
        self.tap = tap
        self._pool: Final = pool
        self._device: Final = NetDevice(pool, backend=f"tap:{tap}", name=tap, offloads=True)
        self.close: Final = self._device.close

    @property
    def threads(self) -> Sequence[int]:
        """Its worker's threads, of which one has nothing to do."""
        (worker,) = self._pool.workers
        return [int(thread.name) for thread in Path(f"/proc/{worker.pid}/task").iterdir()]

    def start(self, rig: Rig) -> None:
        """Take the memory, start both rings."""
        device, case, memory = self._device, rig.case, rig.memory
        device.set_owner()
        device.set_features(case.features)
        device.set_mem_table([MemoryRegion(gpa=GPA, size=memory.size, uva=rig.address, fd=memory.fd, mmap_offset=0)])
        for index, place in enumerate(rig.places):
            device.set_vring_num(index, case.ring)
            device.set_vring_base(index, 0)
            at = {name: rig.address + getattr(place, name) for name in ("desc", "avail", "used")}
            device.set_vring_addr(index, **at)
            device.set_vring_call(index, rig.calls[index])
            device.set_vring_kick(index, rig.kicks[index])
            device.set_vring_busyloop_timeout(index, case.busy_poll)
            device.set_vring_enable(index, True)
            device.start_vring(index)


def _vhost_threads() -> set[int]:
    """Return the workers of our vhost devices: threads of the kernel's, or since Linux 6.4 of ours."""
    name = f"vhost-{os.getpid()}\n"
    found: set[int] = set()
    for thread in (*Path("/proc/self/task").iterdir(), *Path("/proc").glob("[0-9]*")):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if (thread / "comm").read_text() == name:
                found.add(int(thread.name))
    return found


def _await_still(tap: str) -> None:
    """Wait until what was sent has been taken. LocalError when that goes on."""
    device = Counted(tap)
    limit = time.monotonic() + PATIENCE
    taken = -1
    while taken != (taken := device.taken):
        if time.monotonic() > limit:
            raise LocalError(f"{tap} goes on taking frames that nobody sends")
        time.sleep(STILL_SECONDS)


def bare_cost(case: Case, tap: str, seconds: float) -> float:
    """Write a frame to a tap of that name again and again; returns what one costs, nanoseconds."""
    backend = open_backend(f"tap:{tap}", 1)
    try:
        backend.part(case.features)
        large = case.size >= TSO_FROM
        data = TSO_HEADER + tso_frame(case.size).ljust(case.size, b"\0") if large else bytes(HEADER) + frame(case.size)
        write_loop(backend.fds[0], data, WARM_SECONDS)
        meter = Meter(tap, [threading.get_native_id()])
        write_loop(backend.fds[0], data, seconds)
        return meter.cost()
    finally:
        backend.close()


@contextmanager
def _sides(pool: Pool, *, against_itself: bool) -> Generator[tuple[Side, Side]]:
    """Yield ours and the kernel's, or the kernel's twice."""
    with ExitStack() as stack:
        ours: Side = Kernel("vmpours") if against_itself else Ours("vmpours", pool)
        stack.callback(ours.close)
        kernel = Kernel("vmpkernel")
        stack.callback(kernel.close)
        yield ours, kernel


def measure(case: Case, pool: Pool, *, rounds: int, seconds: float, against_itself: bool) -> Costs:
    """Measure one case."""
    found: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as stack:
        rigs = [Rig(case, stack) for _ in RINGS]
        sides = stack.enter_context(_sides(pool, against_itself=against_itself))
        for side, rig in zip(sides, rigs, strict=True):
            side.start(rig)
        for number in range(rounds):
            for which in (0, 1) if number % 2 else (1, 0):
                found[which].append(rigs[which].cost(sides[which], seconds))
    bare = [bare_cost(case, "vmpbare", seconds) for _ in range(rounds)]
    return Costs(case.size, case.busy_poll, *found, bare)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vhostmp.tools.bench.vhost_net", description="What a frame costs Linux's vhost-net and ours."
    )
    names = [case.name for case in CASES]
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="of each case (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.05, help="how long a window is (default: %(default)s)")
    parser.add_argument("--case", metavar="NAME", nargs="+", choices=names, default=names, help=" ".join(names))
    parser.add_argument(
        "--against-itself", action="store_true", help="the kernel's on both sides: as much must come out (proves this)"
    )
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.seconds <= 0:
        parser.error("--rounds and --seconds: choose more than nothing")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all cases; returns the exit status."""
    args = parse(argv)
    if not DEVICE.exists():
        print(f"vhost-net: no {DEVICE}: load the module vhost_net", file=sys.stderr)
        return 1
    try:
        with writing_to(sys.stderr, "error"), Pool() as pool:
            for case in CASES:
                if case.name in args.case:
                    costs = measure(
                        case, pool, rounds=args.rounds, seconds=args.seconds, against_itself=args.against_itself
                    )
                    print(json.dumps(attrs.asdict(costs)), flush=True)
    except (VhostError, OSError) as error:
        print(f"vhost-net: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
