"""Holds what was seen on the two sides against each other, field by field.

A difference is explained by a rule (`rules.py`) or it is one to report. Some rules leave the two sides in different
states: then the rest of the case says nothing any more and is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from tests.kernel.case import Case, Step
from tests.kernel.play import Seen
from tests.kernel.rules import RULES, Difference


@attrs.frozen
class Verdict:
    """What came of one case."""

    unexplained: Difference | None = None
    rules: tuple[str, ...] = ()
    """Those that explained something, in order."""
    compared: int = 0
    """Steps looked at."""


def _fields(seen: Seen) -> dict[str, Any]:
    return seen.what if not seen.memory else {**seen.what, "memory": seen.memory}


def differences(case: Case, kernel: Sequence[Seen], ours: Sequence[Seen]) -> Iterator[Difference]:
    """Walk through what differs, step by step."""
    for index, (theirs, mine) in enumerate(zip(kernel, ours, strict=True)):
        one, other = _fields(theirs), _fields(mine)
        for field in sorted(one.keys() | other.keys()):
            if one.get(field) != other.get(field):
                yield Difference(case, index, field, one.get(field), other.get(field), kernel, ours)


def judge(case: Case, kernel: Sequence[Seen], ours: Sequence[Seen]) -> Verdict:
    """Explain the differences as far as rules do."""
    used: list[str] = []
    ended = -1
    for difference in differences(case, kernel, ours):
        if 0 <= ended < difference.index:
            return Verdict(None, tuple(used), ended + 1)
        rule = next((rule for rule in RULES if rule.explains(difference)), None)
        if rule is None:
            if ended < 0:
                return Verdict(difference, tuple(used), difference.index + 1)
            continue
        if rule.name not in used:
            used.append(rule.name)
        if rule.ends:
            ended = difference.index
    return Verdict(None, tuple(used), len(case.steps))


def step_text(step: Step, most: int = 400) -> str:
    """Return a step on one line, not too long."""
    text = str(step)
    return text if len(text) <= most else text[:most] + "..."
