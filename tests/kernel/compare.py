"""Holds what was seen on the two sides against each other, field by field.

A difference is explained by a rule (`rules.py`) or it is one to report. Some rules leave the two sides in different
states: then the rest of the case says nothing any more and is not looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from tests.kernel.case import Case
from tests.kernel.play import Seen
from tests.kernel.rules import RULES, Difference, Rule


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
    for index, found in itertools.groupby(differences(case, kernel, ours), key=lambda difference: difference.index):
        step = [(difference, _rule_for(difference)) for difference in found]
        used += [rule.name for _, rule in step if rule is not None and rule.name not in used]
        if any(rule is not None and rule.ends for _, rule in step):
            return Verdict(None, tuple(dict.fromkeys(used)), index + 1)
        for difference, rule in step:
            if rule is None:
                return Verdict(difference, tuple(dict.fromkeys(used)), index + 1)
    return Verdict(None, tuple(dict.fromkeys(used)), len(case.steps))


def _rule_for(difference: Difference) -> Rule | None:
    """Return the rule that explains a difference; one that ends the case before one that does not."""
    found = [rule for rule in RULES if rule.explains(difference)]
    return next((rule for rule in found if rule.ends), found[0] if found else None)
