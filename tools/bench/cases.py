"""What is measured, and the arithmetic on it.

Rules. A *window* is a fraction of a second in which a rate is read. A *round* starts fresh processes for one side, then
for the other, a few windows each; which side goes first alternates. A window counts only where the distance between the
two cores, probed before and after it, was of one class, and where nobody else took the processors meanwhile. Only
windows of the same class are compared: cores that move apart change every rate by a factor, whatever is measured. A
ratio is taken inside a round; what is reported is the median over the rounds, with the smallest and the largest.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Final

import attrs

#: Round-trip time of a cache line between the two cores, nanoseconds: below the first one near, above the second far.
NEAR_BELOW_NS: Final = 180.0
FAR_ABOVE_NS: Final = 330.0
#: A window in which the two pollers were kept from their processors for longer than this says little (milliseconds).
WAITED_MAX_MS: Final = 5.0
DROPPED: Final = "dropped"
#: Formats of virtqueues, by whether they are packed.
RING_FORMATS: Final = ("split", "packed")


@attrs.frozen
class Case:
    """One case: what `vhostmp serve` runs, what DPDK's testpmd runs against it, and which of its counters is the rate.

    `counter` is "Tx" (packets the front-end got rid of) or "Rx" (packets that came back to it).
    """

    name: str
    size: int
    backend: str
    peer: str
    peer_mode: str
    front_mode: str
    counter: str
    ring: int = 1024
    packed: bool = False

    @property
    def title(self) -> str:
        """Return name and size, as --case takes it."""
        return f"{self.name}-{self.size}"

    @property
    def ring_format(self) -> str:
        """Return the format of its virtqueues, as --ring takes it."""
        return RING_FORMATS[self.packed]


_DPDK: Final = "DPDK net_vhost, testpmd"
CASES: Final = (
    *(Case("null", size, "null", f"{_DPDK} rxonly", "rxonly", "txonly", "Tx") for size in (64, 512, 1500)),
    *(Case("loopback", size, "loopback", f"{_DPDK} macswap", "macswap", "flowgen", "Rx") for size in (64, 512, 1500)),
    *(Case("tap", size, "tap", "bare write() loop", "", "txonly", "tap") for size in (64, 1500)),
)


@attrs.frozen
class Window:
    """One window: packets a second in millions, the distance probed before and after it (nanoseconds; 0: unknown).

    `waited_ms` is how long the two pollers were kept from their processors meanwhile, milliseconds.
    """

    mpps: float
    before_ns: float
    after_ns: float
    waited_ms: float = 0.0

    @property
    def placement(self) -> str:
        """Return the class of the window: near, middle, far; `DROPPED` where cores moved or were taken meanwhile."""
        if self.waited_ms > WAITED_MAX_MS:
            return DROPPED
        classes = {distance_class(self.before_ns), distance_class(self.after_ns)}
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
    """What a case came to, in one class of placement."""

    case: Case
    placement: str
    rounds: int
    dropped: int
    mpps: Spread
    peer_mpps: Spread
    ratio: Spread
    distance_ns: float

    def to_json(self) -> dict[str, Any]:
        """Return the object for the JSON report; rates in millions of packets a second."""
        return {
            "case": self.case.name,
            "size": self.case.size,
            "ring": self.case.ring,
            "ring_format": self.case.ring_format,
            "mpps": round(self.mpps.median, 3),
            "peer": self.case.peer,
            "peer_mpps": round(self.peer_mpps.median, 3),
            "ratio": round(self.ratio.median, 3),
            "ns_per_packet": round(1e3 / self.mpps.median, 1) if self.mpps.median else None,
            "placement": self.placement,
            "mpps_spread": [round(self.mpps.low, 3), round(self.mpps.high, 3)],
            "peer_mpps_spread": [round(self.peer_mpps.low, 3), round(self.peer_mpps.high, 3)],
            "ratio_spread": [round(self.ratio.low, 3), round(self.ratio.high, 3)],
            "rounds": self.rounds,
            "windows_dropped": self.dropped,
            "core_round_trip_ns": round(self.distance_ns),
        }


def evaluate(case: Case, rounds: Sequence[Round]) -> Result | None:
    """Compare the sides of `case` within one class of placement: the one most rounds have on both sides.

    Returns None when no round has a window of the same class on both sides.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for done in rounds:
        for placement in {window.placement for window in done.ours} - {DROPPED}:
            ours = [window.mpps for window in done.ours if window.placement == placement]
            peer = [window.mpps for window in done.peer if window.placement == placement]
            if peer:
                pairs.setdefault(placement, []).append((statistics.median(ours), statistics.median(peer)))
    if not pairs:
        return None
    placement, found = max(pairs.items(), key=lambda item: len(item[1]))
    windows = [window for done in rounds for window in (*done.ours, *done.peer)]
    return Result(
        case=case,
        placement=placement,
        rounds=len(found),
        dropped=sum(window.placement != placement for window in windows),
        mpps=Spread.of(ours for ours, _ in found),
        peer_mpps=Spread.of(peer for _, peer in found),
        ratio=Spread.of(ours / peer if peer else float("inf") for ours, peer in found),
        distance_ns=statistics.median(window.before_ns for window in windows if window.placement == placement),
    )
