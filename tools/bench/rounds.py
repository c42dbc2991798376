"""The arithmetic on what was measured.

Rules. A *window* is a fraction of a second in which a rate is read. A *round* starts fresh processes for one side, then
for the other, a few windows each; which side goes first alternates. A window counts only where the distance between the
two cores, probed before and after it, was of one class, and where nobody else took the processors meanwhile. Only
windows of the same class are compared: cores that move apart change every rate by a factor, whatever is measured. A
ratio is taken inside a round; what is reported is the median over the rounds, with the smallest and the largest. What
DPDK says that a packet costs it is the median of such windows too, of a run of its own, and held against ours only
where it is of the result's class.

Where no round has two comparable windows, on a machine that others use or whose processors cannot be had for
themselves, a first look may take what there is (`evaluate` with `disturbed`); the result says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Final

import attrs

from vhostmp.tools.bench.cases import Case
from vhostmp.tools.bench.goals import Goal

#: Round-trip time of a cache line between the two cores, nanoseconds: below the first one near, above the second far.
NEAR_BELOW_NS: Final = 180.0
FAR_ABOVE_NS: Final = 330.0
#: A window in which the two pollers were kept from their processors for longer than this says little (milliseconds).
WAITED_MAX_MS: Final = 5.0
DROPPED: Final = "dropped"
#: What a result is called that was made from dropped windows for want of better ones.
DISTURBED: Final = "disturbed"


@attrs.frozen
class Work:
    """What the back-end did in a window, by its own counters.

    `busy_ns` is time inside work items that moved packets, `seconds` the window's length, `packets` and `batches` are
    those of all rings.
    """

    busy_ns: int
    seconds: float
    packets: int
    batches: int

    @property
    def duty(self) -> float:
        """Return the share of the time in which it was busy; of two workers up to 2."""
        return self.busy_ns / 1e9 / self.seconds

    @property
    def batch(self) -> float:
        """Return the mean number of packets that were given back at once."""
        return self.packets / self.batches if self.batches else 0.0


@attrs.frozen
class Window:
    """One window: packets a second in millions, the distance probed before and after it (nanoseconds; 0: unknown).

    `waited_ms` is how long the two pollers were kept from their processors meanwhile, milliseconds.
    """

    mpps: float
    before_ns: float
    after_ns: float
    waited_ms: float = 0.0
    work: Work | None = None

    @property
    def ns_per_packet(self) -> float | None:
        """Return the back-end's busy time a packet, None where it is not known."""
        if self.work is None or self.mpps <= 0:
            return None
        return self.work.busy_ns / (self.mpps * 1e6 * self.work.seconds)

    @property
    def placement(self) -> str:
        """Return the class of the window: near, middle, far; `DROPPED` where cores moved or were taken meanwhile."""
        return _placement(self.before_ns, self.after_ns, self.waited_ms)


@attrs.frozen
class PeerCost:
    """What a packet cost DPDK's testpmd in a window, nanoseconds, as it says; the rest as in `Window`."""

    ns_per_packet: float
    before_ns: float
    after_ns: float
    waited_ms: float = 0.0

    @property
    def placement(self) -> str:
        """Return the class of the window, as that of `Window`."""
        return _placement(self.before_ns, self.after_ns, self.waited_ms)


def _placement(before_ns: float, after_ns: float, waited_ms: float) -> str:
    if waited_ms > WAITED_MAX_MS:
        return DROPPED
    classes = {distance_class(before_ns), distance_class(after_ns)}
    return classes.pop() if len(classes) == 1 else DROPPED


def distance_class(nanoseconds: float) -> str:
    """Name the class of a round-trip time."""
    if nanoseconds <= 0:
        return "unknown"
    if nanoseconds < NEAR_BELOW_NS:
        return "near"
    return "middle" if nanoseconds <= FAR_ABOVE_NS else "far"


@attrs.frozen
class Round:
    """The windows of both sides of one round."""

    ours: Sequence[Window]
    peer: Sequence[Window]


@attrs.frozen
class Spread:
    """Median, smallest and largest of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Take them; the values must not be empty."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    def text(self, digits: int = 2) -> str:
        """Return `median [low-high]`."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}-{self.high:.{digits}f}]"


@attrs.frozen
class Result:
    """What a case came to, in one class of placement. `ns_per_packet`, `duty` and `batch` are our back-end's.

    `peer_ns_per_packet` is what DPDK's testpmd says of itself (record-core-cycles), in the same class of placement.
    """

    case: Case
    placement: str
    rounds: int
    dropped: int
    mpps: Spread
    peer_mpps: Spread
    ratio: Spread
    distance_ns: float
    ns_per_packet: float | None = None
    duty: float | None = None
    batch: float | None = None
    peer_ns_per_packet: float | None = None

    def beside(self, costs: Sequence[PeerCost]) -> Result:
        """Return it with what DPDK's testpmd costs a packet: the median of the windows in the same class, if any."""
        cost = _median(one.ns_per_packet for one in costs if one.placement == self.placement)
        return attrs.evolve(self, peer_ns_per_packet=cost)

    def goals(self) -> list[Goal]:
        """Return what is aimed at, and whether it is met."""
        goals: list[Goal] = []
        case = self.case
        title = f"{case.title} {case.ring_format}"
        if case.goal:
            goals.append(Goal(title, f"at least {case.goal:g}x {case.peer_name}", self.ratio.median, case.goal, "x"))
        if case.cost_goal and self.ns_per_packet and self.peer_ns_per_packet:
            share = self.ns_per_packet / self.peer_ns_per_packet
            what = f"processor time a packet at most {case.cost_goal:g} of DPDK's {self.peer_ns_per_packet:.1f} ns"
            goals.append(Goal(title, what, share, case.cost_goal, "x", at_most=True))
        if case.gigabits_goal:
            gigabits = self.mpps.median * case.size * 8e-3
            goals.append(Goal(title, f"at least {case.gigabits_goal:g} Gbit/s", gigabits, case.gigabits_goal, "Gbit/s"))
        if case.ns_goal and self.ns_per_packet:
            what = f"busy at most {case.ns_goal:g} ns a packet, at batches of {self.batch or 0:.0f}"
            goals.append(Goal(title, what, self.ns_per_packet, case.ns_goal, "ns", at_most=True))
        return goals

    def to_json(self) -> dict[str, Any]:
        """Return the object for the JSON report; rates in millions of packets a second."""
        case = self.case
        return {
            "case": case.name,
            "size": case.size,
            "ring": case.ring,
            "ring_format": case.ring_format,
            "mpps": round(self.mpps.median, 3),
            "peer": case.peer_name,
            "peer_mpps": round(self.peer_mpps.median, 3),
            "ratio": round(self.ratio.median, 3),
            "ns_per_packet": _rounded(self.ns_per_packet, 2),
            "placement": self.placement,
            "front_end": case.front_name,
            "mode": "polling" if case.busy_poll else "event",
            "workers": case.workers,
            "peer_ns_per_packet": _rounded(self.peer_ns_per_packet, 2),
            "duty": _rounded(self.duty, 3),
            "batch": _rounded(self.batch, 1),
            "wall_ns_per_packet": round(1e3 / self.mpps.median, 1) if self.mpps.median else None,
            "gbit_per_second": round(self.mpps.median * case.size * 8e-3, 2),
            "mpps_spread": [round(self.mpps.low, 3), round(self.mpps.high, 3)],
            "peer_mpps_spread": [round(self.peer_mpps.low, 3), round(self.peer_mpps.high, 3)],
            "ratio_spread": [round(self.ratio.low, 3), round(self.ratio.high, 3)],
            "rounds": self.rounds,
            "windows_dropped": self.dropped,
            "core_round_trip_ns": round(self.distance_ns),
        }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def evaluate(case: Case, rounds: Sequence[Round], *, disturbed: bool = False) -> Result | None:
    """Compare the sides of `case` within one class of placement: the one most rounds have on both sides.

    Returns None when no round has a window of the same class on both sides; with `disturbed` all windows are taken
    then, and the result is called so.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for done in rounds:
        for placement in {window.placement for window in done.ours} - {DROPPED}:
            ours = [window.mpps for window in done.ours if window.placement == placement]
            peer = [window.mpps for window in done.peer if window.placement == placement]
            if peer:
                pairs.setdefault(placement, []).append((statistics.median(ours), statistics.median(peer)))
    if not pairs and disturbed:
        found = [
            (statistics.median(w.mpps for w in done.ours), statistics.median(w.mpps for w in done.peer))
            for done in rounds
            if done.ours and done.peer
        ]
        pairs = {DISTURBED: found} if found else {}
    if not pairs:
        return None
    placement, found = max(pairs.items(), key=lambda item: len(item[1]))
    windows = [window for done in rounds for window in (*done.ours, *done.peer)]
    counted = [w for w in windows if placement in (w.placement, DISTURBED)]
    of_ours = [window for done in rounds for window in done.ours if window in counted]
    works = [window.work for window in of_ours if window.work is not None]
    return Result(
        case=case,
        placement=placement,
        rounds=len(found),
        dropped=sum(window.placement != placement for window in windows),
        mpps=Spread.of(ours for ours, _ in found),
        peer_mpps=Spread.of(peer for _, peer in found),
        ratio=Spread.of(ours / peer if peer else float("inf") for ours, peer in found),
        distance_ns=statistics.median(window.before_ns for window in counted),
        ns_per_packet=_median(window.ns_per_packet for window in of_ours),
        duty=_median(work.duty for work in works),
        batch=_median(work.batch for work in works),
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
