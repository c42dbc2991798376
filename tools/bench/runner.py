"""One case: its rounds, the two sides interleaved, fresh programs for each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vhostmp.tools.bench import placement
from vhostmp.tools.bench.cases import Case
from vhostmp.tools.bench.insight import Insight
from vhostmp.tools.bench.programs import pollers_of
from vhostmp.tools.bench.rounds import DROPPED, PeerCost, Round, Window, Work
from vhostmp.tools.bench.sides import Plan, Side, opened

WINDOW_SECONDS: Final = 0.15
#: Between two measurements in which the pollers ran with real-time priority, everybody else gets a turn.
REST_SECONDS: Final = 0.15
#: What a round takes, seconds, before one has been seen.
ROUND_SECONDS: Final = 4.0
DPDK_ROUND_SECONDS: Final = 9.0

Say = Callable[[str], None]


def run_case(case: Case, plan: Plan, say: Say) -> list[Round]:
    """Measure a case; what the programs cannot do raises LocalError. Rounds for which there is no time are left out."""
    rounds: list[Round] = []
    needed = DPDK_ROUND_SECONDS if case.needs_dpdk else ROUND_SECONDS
    for number in range(plan.rounds):
        if plan.seconds_left < needed:
            break
        say(f"{case.title} {case.ring_format}: round {number + 1} of {plan.rounds}")
        began = time.monotonic()
        found: dict[bool, list[Window]] = {}
        for ours in (True, False) if number % 2 else (False, True):
            with (
                tempfile.TemporaryDirectory(prefix="vhostmp-bench-") as folder,
                opened(case, plan, Path(folder), ours=ours) as side,
            ):
                found[ours] = list(_windows(case, plan, side))
        rounds.append(Round(found[True], found[False]))
        needed = max(needed if number == 0 else 0.0, 1.2 * (time.monotonic() - began))
    return rounds


def peer_costs(case: Case, plan: Plan, wanted: str) -> list[PeerCost]:
    """Return what DPDK's testpmd, as the back-end of `case`, says that a packet costs it, a window each.

    In a run of its own: counting costs it a little. It goes on until there are enough windows of the class of placement
    `wanted`, or too many of others. None where it does not say.
    """
    with (
        tempfile.TemporaryDirectory(prefix="vhostmp-bench-") as folder,
        opened(case, plan, Path(folder), ours=False, count=True) as side,
    ):
        found: list[PeerCost] = []
        if side.counting is None:
            return found
        pollers = pollers_of(side.programs)
        for _ in range(plan.tries * plan.windows):
            before = placement.distance_ns(plan.cores, fifo=plan.fifo)
            with _measuring(case, plan, [tid for _, tid in pollers], side):
                side.counting.ns_per_packet()
                waiting = sum(placement.waited_ns(*poller) for poller in pollers)
                time.sleep(WINDOW_SECONDS)
                cost = side.counting.ns_per_packet()
                waited = (sum(placement.waited_ns(*poller) for poller in pollers) - waiting) / 1e6
            after = placement.distance_ns(plan.cores, fifo=plan.fifo)
            found += [] if cost is None else [PeerCost(cost, before, after, waited)]
            if sum(one.placement == wanted for one in found) == plan.windows or plan.seconds_left < 1.0:
                break
            time.sleep(REST_SECONDS)
        return found


def _windows(case: Case, plan: Plan, side: Side) -> Iterator[Window]:
    """Measure windows while a side runs at full speed."""
    # Workers that have to share a processor wait for one another, which is part of what is measured then.
    pollers = pollers_of(side.programs) if _apart(case, plan) else []
    good = 0
    for _ in range(plan.tries * plan.windows):
        before = placement.distance_ns(plan.cores, fifo=plan.fifo)
        if side.bare is not None:
            mpps, work, waited = side.bare(WINDOW_SECONDS), None, 0.0
        else:
            with _measuring(case, plan, [tid for _, tid in pollers], side):
                side.read()  # takes a moment, in which whoever waited for a processor has got it
                waiting = sum(placement.waited_ns(*poller) for poller in pollers)
                with _at_work(side.insight) as work_of:
                    time.sleep(WINDOW_SECONDS)
                    work = work_of()
                    mpps = side.read()
                waited = (sum(placement.waited_ns(*poller) for poller in pollers) - waiting) / 1e6
        for program in side.programs:
            program.check()
        window = Window(mpps, before, placement.distance_ns(plan.cores, fifo=plan.fifo), waited, work)
        yield window
        good += window.placement != DROPPED
        if good == plan.windows or plan.seconds_left < 1.0:
            return
        time.sleep(REST_SECONDS)


@contextmanager
def _at_work(insight: Insight | None) -> Generator[Callable[[], Work | None]]:
    """Lend what says how much our back-end has done since the block began."""
    if insight is None:
        yield lambda: None
        return
    before, began = insight.counts(), time.monotonic_ns()

    def work() -> Work:
        after, seconds = insight.counts(), (time.monotonic_ns() - began) / 1e9
        packets, batches = after.packets - before.packets, after.batches - before.batches
        return Work(after.busy_ns - before.busy_ns, seconds, packets, batches)

    yield work


def _apart(case: Case, plan: Plan) -> bool:
    """Whether each worker of a case has a processor of its own."""
    return len(plan.cores.backends(case.workers)) == case.workers


@contextmanager
def _measuring(case: Case, plan: Plan, threads: list[int], side: Side) -> Generator[None]:
    # Two workers on one processor would never get it from one another, with real-time priority.
    if not plan.fifo or not _apart(case, plan):
        yield
        return
    # testpmd's first thread takes commands; it must get through to the processor that its other thread fills.
    with placement.measuring(threads, [program.pid for program in side.commands]):
        yield
