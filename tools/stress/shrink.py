"""Makes a failing case small: a list of operations, of which few matter, with numbers, of which most could be 0.

Theory of operation: first pieces of the list are left out, halves, then quarters, down to single operations (delta
debugging, ddmin), then each operation is replaced by simpler ones. Whatever still fails is kept. This goes on until
nothing helps any more, or until the tries are used up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

Op = TypeVar("Op")


def shrink(
    case: Sequence[Op],
    fails: Callable[[list[Op]], bool],
    smaller: Callable[[Op], Iterable[Op]],
    *,
    tries: int = 200,
) -> list[Op]:
    """Return a smaller case that fails too; at worst the case itself.

    `fails` runs a case, and is called `tries` times at the most. `smaller`: simpler operations than one, the simplest
    first; each must be simpler in a sense that has an end.
    """
    search = _Search(fails, tries)
    best = list(case)
    while True:
        before = list(best)
        best = search.drop(best)
        best = search.simplify(best, smaller)
        if best == before or not search.left:
            return best


class _Search(Generic[Op]):
    """The tries that are left, and what is tried."""

    def __init__(self, fails: Callable[[list[Op]], bool], tries: int) -> None:
        self._fails = fails
        self.left = tries

    def _works(self, case: list[Op]) -> bool:
        """Whether a smaller case fails as well."""
        if not self.left:
            return False
        self.left -= 1
        return self._fails(case)

    def drop(self, case: list[Op]) -> list[Op]:
        """Leave pieces out, large ones first."""
        size = max(len(case) // 2, 1)
        while case and self.left:
            start = 0
            while start < len(case):
                shorter = case[:start] + case[start + size :]
                if self._works(shorter):
                    case = shorter
                else:
                    start += size
            if size == 1:
                break
            size //= 2
        return case

    def simplify(self, case: list[Op], smaller: Callable[[Op], Iterable[Op]]) -> list[Op]:
        """Replace operations by simpler ones."""
        for place in range(len(case)):
            again = True
            while again and self.left:
                again = False
                for simpler in smaller(case[place]):
                    changed = [*case[:place], simpler, *case[place + 1 :]]
                    if self._works(changed):
                        case, again = changed, True
                        break
        return case


def smaller_numbers(value: int) -> list[int]:
    """Return simpler numbers than one, the simplest first."""
    return [one for one in dict.fromkeys((0, 1, value // 2, value - 1)) if 0 <= one < value]
