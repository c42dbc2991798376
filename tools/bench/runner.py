"""One case: its rounds, the two sides interleaved.

Both sides of a case see the same front-end program on the same core, the back-end on the other core, and the same
counters: the front-end's own, by its own clock. For the tap case both sides are counted by the tap device.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import attrs

from vhostmp.tools.bench import placement, tap
from vhostmp.tools.bench.cases import DROPPED, Case, Round, Window
from vhostmp.tools.bench.programs import Program, Serve, Testpmd, poller_of

WINDOW_SECONDS: Final = 0.15
#: Between two measurements in which the pollers ran with real-time priority, everybody else gets a turn.
REST_SECONDS: Final = 0.15
#: A window that has to be dropped is measured again, so many times at most.
TRIES: Final = 4

Say = Callable[[str], None]
Read = Callable[[], float]


@attrs.frozen
class Plan:
    """How a run is made: `rounds` rounds of `windows` windows on `cores`.

    `against_itself` puts DPDK on our side as well: the ratio must then come out as 1, or the harness is wrong.
    """

    cores: placement.Cores
    fifo: bool
    rounds: int = 5
    windows: int = 3
    against_itself: bool = False


def run_case(case: Case, plan: Plan, say: Say) -> list[Round]:
    """Measure a case; what the programs cannot do raises LocalError."""
    rounds: list[Round] = []
    for number in range(plan.rounds):
        say(f"{case.title}: round {number + 1} of {plan.rounds}")
        found: dict[bool, list[Window]] = {}
        for ours in (True, False) if number % 2 else (False, True):
            with tempfile.TemporaryDirectory(prefix="vhostmp-bench-") as folder:
                found[ours] = list(_side(case, plan, Path(folder), ours=ours))
        rounds.append(Round(found[True], found[False]))
    return rounds


def _side(case: Case, plan: Plan, folder: Path, *, ours: bool) -> Iterator[Window]:
    """Start one side of a case afresh and measure its windows."""
    if case.backend == "tap":
        yield from _tap_side(case, plan, folder, ours=ours)
        return
    socket = folder / "s"
    with ExitStack() as stack:
        back: Program
        if ours and not plan.against_itself:
            back = stack.enter_context(Serve(socket, case.backend, plan.cores.backend))
        else:
            back = stack.enter_context(Testpmd.back_end(socket, case.peer_mode, plan.cores.backend))
        front = stack.enter_context(_front_end(case, plan, socket))
        yield from _windows(plan, back, front, lambda: front.rates()[case.counter] / 1e6)


def _front_end(case: Case, plan: Plan, socket: Path) -> Testpmd:
    front = Testpmd.front_end(socket, case.front_mode, case.ring, plan.cores.frontend, packed=case.packed)
    front.command(f"set txpkts {case.size}")
    front.command("start")
    return front


def _tap_side(case: Case, plan: Plan, folder: Path, *, ours: bool) -> Iterator[Window]:
    """Measure the tap: our data path into it, or the bare loop."""
    with tap.Tap(f"vmpb{_serial():x}") as device:
        if not ours or plan.against_itself:
            for _ in range(plan.windows):
                before = placement.distance_ns(plan.cores, fifo=plan.fifo)
                rate = tap.bare_write(device, case.size, plan.cores.backend, WINDOW_SECONDS, fifo=plan.fifo)
                yield Window(rate / 1e6, before, placement.distance_ns(plan.cores, fifo=plan.fifo))
                time.sleep(REST_SECONDS)
            return
        with (
            Serve(folder / "s", f"tap:{device.name}", plan.cores.backend) as back,
            _front_end(case, plan, folder / "s") as front,
        ):
            rate_of = tap.Rate(device)
            yield from _windows(plan, back, front, lambda: rate_of() / 1e6)


_numbers = itertools.count(int(time.time()) & 0xFFFF)


def _serial() -> int:
    return next(_numbers)


def _windows(plan: Plan, back: Program, front: Testpmd, read: Read) -> Iterator[Window]:
    """Measure windows while `back` and `front` run at full speed. `read` gives the rate since its last call (Mpps)."""
    pollers = [poller_of(back), poller_of(front)]
    good = 0
    for _ in range(TRIES * plan.windows):
        before = placement.distance_ns(plan.cores, fifo=plan.fifo)
        with _measuring(plan, pollers, front):
            read()  # takes a moment, in which whoever waited for a processor has got it
            waited = [placement.waited_ns(*poller) for poller in pollers]
            time.sleep(WINDOW_SECONDS)
            mpps = read()
            waited = [placement.waited_ns(*poller) - old for poller, old in zip(pollers, waited, strict=True)]
        back.check()
        front.check()
        window = Window(mpps, before, placement.distance_ns(plan.cores, fifo=plan.fifo), sum(waited) / 1e6)
        yield window
        good += window.placement != DROPPED
        if good == plan.windows:
            return
        time.sleep(REST_SECONDS)


@contextmanager
def _measuring(plan: Plan, pollers: list[tuple[int, int]], front: Testpmd) -> Generator[None]:
    if not plan.fifo:
        yield
        return
    # testpmd's first thread takes commands; it must get through to the processor that its other thread fills.
    with placement.measuring([tid for _, tid in pollers], [front.pid]):
        yield
