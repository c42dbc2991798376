"""What the benchmarks must not claim: goals met for want of evidence, percentiles of too few, unlike compared."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import attrs
import pytest

from vhostmp.errors import LocalError
from vhostmp.tools.bench import command, costs, latency, placement, runner, sides
from vhostmp.tools.bench.cases import CASES
from vhostmp.tools.bench.figures import Figure
from vhostmp.tools.bench.rounds import PeerCost, Result, Round, Window, Work, evaluate

NEAR: Final = 100.0
FAR: Final = 400.0
PLAN: Final = sides.Plan(placement.Cores(0, 1), fifo=False, rounds=4, windows=3, tries=2)
CASE: Final = attrs.evolve(CASES[0], goal=0.0, cost_goal=0.25)
QUICK_NS: Final = 50
SLOW_NS: Final = 2500


def times(**counts: int) -> list[int]:
    """Make a board's times: so many quick packets, so many slow ones."""
    made = [0] * 2560
    made[QUICK_NS], made[SLOW_NS] = counts.get("quick", 0), counts.get("slow", 0)
    return made


def verdicts(figures: Sequence[Figure]) -> list[bool]:
    """Return which of the figures' goals are met."""
    return [goal.met for figure in figures for goal in figure.goals()]


def test_memory_of_no_worker_is_not_small() -> None:
    """Where no process has a worker's name nothing is said of its memory, rather than that it is nothing."""
    assert costs.largest_worker([3.0, 7.0, 5.0]) == pytest.approx(7.0)
    with pytest.raises(LocalError, match="worker's name"):
        costs.largest_worker([])


def test_quiet_device_is_judged_by_what_was_due() -> None:
    """Few packets that came back at once, of many that were due, meet no goal; nor do none at all."""
    assert verdicts(costs.quiet_figures(times(quick=590), due=600)) == [True, True]
    assert verdicts(costs.quiet_figures(times(quick=541), due=600)) == [True, True]
    starved = costs.quiet_figures(times(quick=100), due=600)
    assert verdicts(starved) == [False]
    assert [figure.what.endswith("of the 17 % that came back") for figure in starved] == [False, True, True]
    assert verdicts(costs.quiet_figures(times(), due=600)) == [False]
    assert verdicts(costs.quiet_figures(times(quick=500, slow=99), due=600)) == [True, False]


@pytest.mark.parametrize(
    ("fewest", "shares"),
    [
        (99, [50.0, 90.0]),
        (100, [50.0, 90.0, 99.0]),
        (999, [50.0, 90.0, 99.0]),
        (1000, [50.0, 90.0, 99.0, 99.9]),
    ],
)
def test_percentiles_take_packets(fewest: int, shares: list[float]) -> None:
    """p99 is told from 100 packets on, p99.9 from 1,000 on, in each of the rounds."""
    assert latency.shares([times(quick=5000), times(quick=fewest)]) == shares


def test_event_mode_has_percentiles_both_sides_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio is told only of percentiles for which both sides have packets enough."""

    def served(*_: object) -> tuple[list[int], float]:
        return times(quick=2000), 0.0

    def bare(*_: object) -> list[int]:
        return times(quick=500)

    monkeypatch.setattr(latency, "_served", served)
    monkeypatch.setattr(latency, "_bare", bare)
    found = [figure.what.rpartition(" ")[2] for figure in latency.event(PLAN)]
    assert found == ["p50", "p90", "p99"] * len(latency.LOADS)


def test_log_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which side goes first alternates by round, and each cost is told of the side it was measured on."""
    order: list[bool] = []

    def cost(plan: sides.Plan, *, log: bool) -> float:
        del plan
        order.append(log)
        return 12.0 if log else 10.0

    monkeypatch.setattr(costs, "_loop_cost", cost)
    (found,) = costs.dirty_log(PLAN)
    assert order == [False, True, True, False] * 2
    assert (found.value, found.peer_value, found.ratio) == (12.0, 10.0, 1.2)


def result(distance: float) -> Result:
    """Evaluate a round in which we cost 20 ns a packet."""
    work = Work(busy_ns=2_000_000, seconds=0.1, packets=1, batches=1)
    ours = Window(1.0, distance, distance, work=work)
    found = evaluate(CASE, [Round([ours], [Window(1.0, distance, distance)])])
    assert found is not None
    return found


def test_processor_time_is_held_against_the_median_of_its_class() -> None:
    """Of DPDK's windows those of our class count, their median and not the least; without any there is no verdict."""
    windows = [
        *(PeerCost(ns, NEAR, NEAR) for ns in (40.0, 80.0, 90.0)),
        *(PeerCost(1.0, *pair) for pair in ((FAR, FAR), (NEAR, FAR), (FAR, NEAR))),
        PeerCost(1.0, NEAR, NEAR, waited_ms=6.0),
    ]
    found = result(NEAR).beside(windows)
    assert found.peer_ns_per_packet == pytest.approx(80.0)
    assert [goal.value for goal in found.goals()] == [pytest.approx(0.25)]
    moved = result(FAR).beside([PeerCost(80.0, NEAR, NEAR), PeerCost(80.0, FAR, NEAR)])
    assert moved.peer_ns_per_packet is None
    assert moved.goals() == []


class Counting:
    """A testpmd that says what a packet costs it: the first of each two answers is of the time before the window."""

    def __init__(self) -> None:
        """Count from one on."""
        self._costs = itertools.count(1.0)

    def ns_per_packet(self) -> float:
        """Say it."""
        return next(self._costs)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have the runner measure a made-up testpmd; lends the distances that the probe is to find."""
    distances: list[float] = []

    @contextmanager
    def opened(*_: object, **__: object) -> Generator[Any]:
        yield sides.Side(counting=Counting())  # type: ignore[arg-type]

    def nobody(_: object) -> list[tuple[int, int]]:
        return []

    def probe(*_: object, **__: object) -> float:
        return distances.pop(0)

    monkeypatch.setattr(runner, "opened", opened)
    monkeypatch.setattr(runner, "pollers_of", nobody)
    monkeypatch.setattr(runner, "WINDOW_SECONDS", 0.0)
    monkeypatch.setattr(runner, "REST_SECONDS", 0.0)
    monkeypatch.setattr(placement, "distance_ns", probe)
    return distances


def test_peer_is_measured_until_it_is_in_our_class(counting: list[float]) -> None:
    """The distance is probed before and after each of DPDK's windows; it goes on until enough are of the class."""
    counting += [NEAR, NEAR, NEAR, FAR, FAR, FAR, NEAR, NEAR, NEAR, NEAR, NEAR, NEAR]
    found = runner.peer_costs(CASE, PLAN, "near")
    assert [one.ns_per_packet for one in found] == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert [one.placement for one in found] == ["near", "dropped", "far", "near", "near"]


def test_peer_in_another_class_is_no_verdict(counting: list[float]) -> None:
    """Where DPDK's windows are all of another class the search ends, and the report says what is not known."""
    counting += [FAR] * 2 * PLAN.tries * PLAN.windows
    run = command.Run(PLAN, quick=False)
    assert run.beside_peer(result(NEAR)).goals() == []
    assert counting == []
    assert len(run.skipped) == 1
    assert "null-64 split: processor time against DPDK's: no window" in run.skipped[0]
