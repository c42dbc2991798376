"""The two sides of a case: which programs run, on which core, and what is read.

Both sides see the same front-end program on the same core, the back-end on the other core, and the same counters: the
front-end's own, by its own clock, or those of a network device. A peer that is nothing but a loop has no front-end, and
runs on the back-end's core in this process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import attrs

from vhostmp.tools._probe import copy_loop
from vhostmp.tools.bench import devices, placement
from vhostmp.tools.bench.cases import BUSY_POLL_US, Case
from vhostmp.tools.bench.flood import STRIDE, TSO_FROM, TSO_HEADER, Flood, Spec, tso_frame
from vhostmp.tools.bench.insight import Insight
from vhostmp.tools.bench.programs import Program, Serve, Testpmd

FrontEnd = Testpmd | Flood
Read = Callable[[], float]
#: Peers that are our own server, told to work otherwise.
OURSELVES: Final = ("poll", "one")
LOOPS: Final = ("write", "copy")


@attrs.frozen
class Plan:
    """How a run is made: `rounds` rounds of `windows` windows on `cores`, until `deadline` (monotonic; 0.0: none).

    A window that has to be dropped is measured again, `tries` times as many as are wanted at most.
    `against_itself` puts the peer on our side as well: the ratio must then come out as 1, or the harness is wrong.
    """

    cores: placement.Cores
    fifo: bool
    rounds: int = 5
    windows: int = 3
    tries: int = 4
    against_itself: bool = False
    deadline: float = 0.0

    @property
    def seconds_left(self) -> float:
        """Return how much of the time there is left."""
        return self.deadline - time.monotonic() if self.deadline else float("inf")


@attrs.frozen
class Side:
    """The programs of a side while they run. `read` gives the rate since its last call, millions a second.

    `bare`, where there are no programs, measures for so many seconds and returns the same.
    """

    programs: tuple[Program, ...] = ()
    commands: tuple[Testpmd, ...] = ()
    read: Read = float
    insight: Insight | None = None
    bare: Callable[[float], float] | None = None
    counting: Testpmd | None = None


def is_ours(case: Case, plan: Plan, *, ours: bool) -> bool:
    """Whether a side is our own server."""
    return case.peer in OURSELVES or (ours and not plan.against_itself)


@contextmanager
def opened(case: Case, plan: Plan, folder: Path, *, ours: bool, count: bool = False) -> Generator[Side]:
    """Start one side of a case afresh for the block. LocalError when a program does not do what it is for.

    `count`: a testpmd that is the back-end counts its own cycles.
    """
    with ExitStack() as stack:
        server = is_ours(case, plan, ours=ours)
        device: devices.Counted | None = None
        if case.backend == "packet":
            device = stack.enter_context(devices.Pair(devices.new_name()))
        elif case.backend == "tap" and (server or case.peer == "write"):
            device = stack.enter_context(devices.Tap(devices.new_name()))
        elif case.backend == "tap":
            device = devices.Counted(devices.new_name())  # DPDK makes its own
        if not server and case.peer in LOOPS:
            yield Side(bare=_bare(case, plan, device))
            return
        sockets = [folder / str(number) for number in range(case.devices)]
        insight: Insight | None = None
        counting: Testpmd | None = None
        back: Program
        if server:
            back = stack.enter_context(_serve(case, plan, sockets, device, ours=ours))
            insight = stack.enter_context(Insight(back.pid, case.workers, 2 * case.devices))
        else:
            back = counting = stack.enter_context(_dpdk(case, plan, sockets, device, count=count))
        front = _front_end(case, plan, sockets)
        stack.callback(front.end)
        commands = tuple(program for program in (front, counting) if isinstance(program, Testpmd))
        read = _read(case, front, devices.Rate(device) if device is not None else None)
        yield Side((back, front), commands, read, insight, counting=counting if count else None)


def _read(case: Case, front: FrontEnd, rate_of: devices.Rate | None) -> Read:
    if rate_of is not None:
        return lambda: rate_of() / 1e6
    return lambda: front.rates()[case.counter] / 1e6


def _serve(case: Case, plan: Plan, sockets: list[Path], device: devices.Counted | None, *, ours: bool) -> Serve:
    workers = 1 if case.peer == "one" and not ours else case.workers
    busy_poll = BUSY_POLL_US if case.peer == "poll" and not ours else case.busy_poll
    spec: str | list[str] = case.backend.format(size=case.size)
    if device is not None:
        spec = f"{case.backend}:{device.name}"
    elif case.backend == "patch":
        spec = ["patch:1", "patch:0"]
    return Serve(sockets, spec, plan.cores.backends(workers), workers=workers, busy_poll=busy_poll)


def _dpdk(case: Case, plan: Plan, sockets: list[Path], device: devices.Counted | None, *, count: bool) -> Testpmd:
    mode = case.peer.partition(":")[2]
    if device is not None:
        beside = f"net_tap0,iface={device.name}"
        return Testpmd.back_end(sockets, "io", plan.cores.backend, count=count, beside=beside)
    return Testpmd.back_end(sockets, mode, plan.cores.backend, size=case.size, count=count)


def _front_end(case: Case, plan: Plan, sockets: list[Path]) -> FrontEnd:
    if case.own:
        spec = Spec([str(path) for path in sockets], case.front, case.size, ring=case.ring, packed=case.packed)
        return Flood(spec, plan.cores.frontend)
    front = Testpmd.front_end(sockets, case.front, case.ring, plan.cores.frontend, packed=case.packed)
    try:
        front.command(f"set txpkts {','.join(map(str, case.segments or (case.size,)))}")
        front.command("start")
    except BaseException:
        front.end()
        raise
    return front


def _bare(case: Case, plan: Plan, device: devices.Counted | None) -> Callable[[float], float]:
    """Return what measures a loop on the back-end's core."""

    def measure(seconds: float) -> float:
        with pinned([plan.cores.backend], fifo=plan.fifo):
            if isinstance(device, devices.Device):
                large = case.size >= TSO_FROM
                frame = tso_frame(case.size).ljust(case.size, b"\0")
                return devices.bare_write(device, TSO_HEADER + frame if large else case.size, seconds) / 1e6
            done, nanoseconds = copy_loop(case.size, STRIDE, case.ring, seconds)
            return done * 1e3 / nanoseconds

    return measure


@contextmanager
def pinned(cores: Iterable[int], *, fifo: bool) -> Generator[None]:
    """Have this thread run on some cores, with a poller's priority, for the block."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
        if fifo:
            placement.set_fifo(0, placement.POLLER)
        yield
    finally:
        if fifo:
            placement.set_fifo(0, 0)
        os.sched_setaffinity(0, before)


def obstacle(case: Case, *, dpdk: str) -> str:
    """Return why a case cannot be measured here, "" when it can. `dpdk`: why testpmd cannot be run."""
    if case.needs_dpdk and dpdk:
        return dpdk
    if case.needs_device and os.geteuid() != 0:
        return "needs root, to make a network device"
    if case.backend == "tap" and not Path(devices.TUN).exists():
        return f"no {devices.TUN}"
    return ""
