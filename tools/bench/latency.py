"""Round trips: how long a packet takes through a loopback and back, under three loads, polling and asleep.

Polling, the front-end sends on a schedule, at a share of what the loop carries at full speed; a packet's time counts
from when it was to be sent, so that a back-end that stands still for a while is charged for all who waited meanwhile.
Asleep (event mode), one packet is under way at a time; a load of 100 % means that the next one is sent when the last
one is back, at 1 % there are 99 pauses as long as a round trip between two of them. The peer of event mode is two
processes that wake each other through two eventfds, with the same pauses: what no back-end can be faster than.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs

from vhostmp.errors import LocalError
from vhostmp.tools.bench import placement
from vhostmp.tools.bench.figures import PERCENTILES, Figure, percentile
from vhostmp.tools.bench.flood import Flood, Spec
from vhostmp.tools.bench.programs import Program, Serve
from vhostmp.tools.bench.sides import Plan

LOADS: Final = (1, 50, 90)
WINDOW_SECONDS: Final = 0.3
#: In which packets come back that were due while others had the processors.
WARM_SECONDS: Final = 0.1
#: Round trips that are waited for; at 1 % load of event mode they take their time, so that there may be fewer.
ENOUGH: Final = 1000
FEWEST: Final = 10
LONGEST_SECONDS: Final = 3.0
CASE: Final = "round-trip"
POLL_US: Final = 50
BUSY_BOUND_US: Final = 3.0
EVENT_BOUND: Final = 1.2


def _times(plan: Plan, programs: Sequence[Program], front: Flood) -> list[int]:
    """Return how many packets took how long in a window in which the programs have the processors to themselves."""
    with placement.measuring([tid for program in programs for tid in _threads(program)] if plan.fifo else [], []):
        time.sleep(WARM_SECONDS)
        before = front.board.times()
        limit = time.monotonic() + LONGEST_SECONDS
        while True:
            time.sleep(WINDOW_SECONDS)
            found = [now - then for now, then in zip(front.board.times(), before, strict=True)]
            if sum(found) >= ENOUGH or time.monotonic() > limit:
                break
    for program in programs:
        program.check()
    if sum(found) < FEWEST:
        raise LocalError(f"{sum(found) or 'no'} packets came back in time")
    return found


def shares(rounds: Sequence[Sequence[int]]) -> list[float]:
    """Return the percentiles that each round has packets enough for: one at least that is expected beyond them.

    p99 takes 100 packets, p99.9 takes 1,000: of fewer it would be the slowest one by another name.
    """
    fewest = min(map(sum, rounds))
    return [share for share in PERCENTILES if fewest >= round(100 / (100 - share))]


def _threads(program: Program) -> list[int]:
    return [tid for pid in program.pids() for tid in placement.threads_of(pid)]


def _served(plan: Plan, spec: Spec, busy_poll: int) -> tuple[list[int], float]:
    """Run a loopback for a window; returns its times and packets a second."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vhostmp-bench-"))
        socket = Path(folder) / "s"
        back = stack.enter_context(Serve([socket], "loopback", plan.cores.backend, busy_poll=busy_poll))
        front = stack.enter_context(Flood(attrs.evolve(spec, sockets=[str(socket)]), plan.cores.frontend))
        if not spec.gap_ns and spec.way == "loop":
            front.rates()
            time.sleep(WINDOW_SECONDS)
            return [], front.rates()["Rx"]
        return _times(plan, (back, front), front), 0.0


def _bare(plan: Plan, gap_ns: int) -> list[int]:
    """Run two processes that wake each other; returns the times."""
    with ExitStack() as stack:
        fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2)]
        for fd in fds:
            stack.callback(os.close, fd)
        answering = stack.enter_context(Flood(Spec([], "answer", fds=fds), plan.cores.backend))
        asking = stack.enter_context(Flood(Spec([], "ask", fds=fds, gap_ns=gap_ns), plan.cores.frontend))
        return _times(plan, (answering, asking), asking)


def polling(plan: Plan) -> list[Figure]:
    """Measure round trips with a back-end that polls, at shares of what the loop carries."""
    _, rate = _served(plan, Spec([], "loop"), POLL_US)
    if rate <= 0:
        raise LocalError("no packet came back")
    figures: list[Figure] = []
    for load in LOADS:
        spec = Spec([], "loop", gap_ns=max(1, round(1e9 / rate * 100 / load)))
        rounds = [_served(plan, spec, POLL_US)[0] for _ in range(plan.rounds)]
        for share in shares(rounds):
            value = statistics.median(percentile(times, share) for times in rounds) / 1e3
            bound = BUSY_BOUND_US if (load, share) == (LOADS[0], PERCENTILES[0]) else None
            figures.append(Figure(CASE, f"polling, {load} % load, p{share:g}", value, "us", bound=bound, size=64))
    return figures


def event(plan: Plan) -> list[Figure]:
    """Measure round trips with both ends asleep between packets, each round beside the bare ping-pong."""
    trip = percentile(_served(plan, Spec([], "ping", event_idx=True, gap_ns=1), 0)[0], 50)
    figures: list[Figure] = []
    for load in LOADS:
        gap_ns = round(trip * 100 / load)
        rounds: list[tuple[list[int], list[int]]] = []
        for number in range(plan.rounds):
            spec = Spec([], "ping", event_idx=True, gap_ns=gap_ns)
            if number % 2:
                ours = _served(plan, spec, 0)[0]
                rounds.append((ours, _bare(plan, gap_ns)))
            else:
                bare = _bare(plan, gap_ns)
                rounds.append((_served(plan, spec, 0)[0], bare))
        for share in shares([times for both in rounds for times in both]):
            pairs = [(percentile(ours, share) / 1e3, percentile(bare, share) / 1e3) for ours, bare in rounds]
            goal = (load, share) == (LOADS[0], PERCENTILES[0])
            figures.append(
                Figure(
                    CASE,
                    f"event mode, {load} % load, p{share:g}",
                    statistics.median(ours for ours, _ in pairs),
                    "us",
                    "eventfd ping-pong",
                    statistics.median(bare for _, bare in pairs),
                    statistics.median(ours / bare for ours, bare in pairs),
                    bound=EVENT_BOUND if goal else None,
                    bounds_ratio=True,
                    size=64,
                )
            )
    return figures
