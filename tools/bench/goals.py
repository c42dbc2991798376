"""A goal: a bound on one number of a case, and whether it is met."""

from __future__ import annotations

import attrs


@attrs.frozen
class Goal:
    """What `case` is to reach: `value` at least (or `at_most`) `bound`, both in `unit`; `text` says it for people."""

    case: str
    text: str
    value: float
    bound: float
    unit: str
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether it is, as the value is printed: two digits behind the point."""
        value = round(self.value, 2)
        return value <= self.bound if self.at_most else value >= self.bound
