"""Makes a case smaller while the two sides still differ on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import attrs

from tests.kernel.case import Case, Step

TRIES: Final = 150


def shrink(case: Case, differs: Callable[[Case], int | None], tries: int = TRIES) -> Case:
    """Return the smallest case found. `differs` returns the step at which a case differs, None when it does not.

    Steps go first, many at a time, then what `add` and `frames` hold. It takes at most `tries` runs.
    """
    smaller = True
    while smaller and tries:
        smaller = False
        for candidate in _smaller(case):
            if not tries:
                break
            tries -= 1
            at = differs(candidate)
            if at is not None:
                case = attrs.evolve(candidate, steps=candidate.steps[: at + 1])
                smaller = True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    """Walk through cases with something left out, from much to little."""
    for steps in _without(case.steps):
        yield attrs.evolve(case, steps=tuple(steps))
    for index, step in enumerate(case.steps):
        if step.name in ("add", "frames") and len(step.value) > 1:
            for value in _without(step.value):
                yield _with(case, index, list(value))
    for index, step in enumerate(case.steps):
        if step.name == "add":
            for place, chain in enumerate(step.value):
                if "t" in chain and not chain.get("bad"):
                    plain = {name: value for name, value in chain.items() if name != "t"}
                    yield _with(case, index, [*step.value[:place], plain, *step.value[place + 1 :]])


def _with(case: Case, index: int, value: list[Any]) -> Case:
    step = Step(case.steps[index].name, case.steps[index].ring, value)
    return attrs.evolve(case, steps=(*case.steps[:index], step, *case.steps[index + 1 :]))


def _without(items: Sequence[Any]) -> Iterator[list[Any]]:
    """Leave out one half, then one quarter, down to a single one; from the end, where less depends on them."""
    size = len(items) // 2
    while size:
        for end in range(len(items), 0, -size):
            yield [*items[: max(0, end - size)], *items[end:]]
        size //= 2
