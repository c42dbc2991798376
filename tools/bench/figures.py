"""A figure: one number of a measure that is not packets a second, beside its peer's where it has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs

from vhostmp.tools._flood import value_of
from vhostmp.tools.bench.goals import Goal
from vhostmp.tools.bench.sides import Plan

PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)


@attrs.frozen
class Figure:
    """`value` in `unit`, of the measure `case`; `what` tells it from the measure's others.

    `ratio` is to the peer's, taken inside rounds where there are rounds. `bound`: what is aimed at, for the ratio if it
    `bounds_ratio`, at most so much unless `at_least`. `spread`: smallest and largest ratio of the rounds.
    """

    case: str
    what: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None
    ratio: float | None = None
    bound: float | None = None
    bounds_ratio: bool = False
    at_least: bool = False
    size: int = 0
    placement: str = ""
    spread: tuple[float, float] | None = None

    def goals(self) -> list[Goal]:
        """Return what is aimed at, and whether it is met."""
        value = self.ratio if self.bounds_ratio else self.value
        if self.bound is None or value is None:
            return []
        unit = "x" if self.bounds_ratio else self.unit
        against = f"x {self.peer}" if self.bounds_ratio else f" {self.unit}"
        text = f"{self.what}: {'at least' if self.at_least else 'at most'} {self.bound:g}{against}"
        return [Goal(self.case, text, value, self.bound, unit, at_most=not self.at_least)]

    def to_json(self) -> dict[str, Any]:
        """Return the object for the JSON report: the keys of a case, and value and unit."""
        return {
            "case": self.case,
            "size": self.size,
            "ring": None,
            "mpps": None,
            "peer": self.peer or None,
            "peer_mpps": None,
            "ratio": None if self.ratio is None else round(self.ratio, 3),
            "ratio_spread": None if self.spread is None else [round(bound, 3) for bound in self.spread],
            "ns_per_packet": None,
            "placement": self.placement or None,
            "what": self.what,
            "value": round(self.value, 3),
            "unit": self.unit,
            "peer_value": None if self.peer_value is None else round(self.peer_value, 3),
        }


@attrs.frozen
class Measure:
    """Something to take: `text` for people, and for how many seconds at least."""

    name: str
    text: str
    seconds: float
    take: Callable[[Plan], list[Figure]]
    quick: bool = False


def percentile(counts: Sequence[int], share: float) -> float:
    """Return the time, nanoseconds, that `share` per cent of those in a board's times did not exceed; 0 if empty."""
    wanted = share / 100 * sum(counts)
    seen = 0
    for slot, count in enumerate(counts):
        seen += count
        if count and seen >= wanted:
            return value_of(slot)
    return 0.0


def number(value: float) -> str:
    """Write a number with three digits that say something."""
    for bound, digits in ((100, 0), (10, 1), (1, 2)):
        if abs(value) >= bound:
            return f"{value:,.{digits}f}"
    return f"{value:.3g}"
