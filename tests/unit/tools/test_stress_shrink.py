"""What makes failing cases small finds what matters, keeps what fails, and ends."""

from __future__ import annotations

import random

import pytest

from vhostmp.tools.stress.shrink import shrink, smaller_numbers

NEEDED = 37
LEAST = 100
SUM = 5000
TRIES = 25


def _nothing(_: int) -> list[int]:
    return []


def test_one_operation_of_many_matters() -> None:
    """Of a hundred operations the one remains that fails."""
    case = list(range(100))
    assert shrink(case, lambda found: NEEDED in found, _nothing) == [NEEDED]


def test_operations_that_matter_together() -> None:
    """Operations that fail only together remain together, in their order."""
    case = list(range(64))
    assert shrink(case, lambda found: [one for one in found if one in (5, 40)] == [5, 40], _nothing) == [5, 40]


def test_numbers_become_small() -> None:
    """The smallest number remains that fails."""
    assert shrink([7, 1000, 9], lambda found: any(one >= LEAST for one in found), smaller_numbers) == [LEAST]


def test_what_cannot_be_smaller_stays() -> None:
    """A case that fails only as it is, is returned as it is."""
    case = [3, 2, 1]
    assert shrink(case, lambda found: found == case, smaller_numbers) == case


def test_tries_are_bounded() -> None:
    """No more cases are run than allowed, and what is returned fails."""
    ran = 0

    def fails(found: list[int]) -> bool:
        nonlocal ran
        ran += 1
        return sum(found) > SUM

    small = shrink([100] * 200, fails, smaller_numbers, tries=TRIES)
    assert ran == TRIES
    assert sum(small) > SUM


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_returned_fails(seed: int) -> None:
    """For any set of operations that must be there together: they remain, and nothing else does."""
    rng = random.Random(seed)
    needed = set(rng.sample(range(200), rng.randrange(1, 6)))
    assert shrink(list(range(200)), lambda found: needed <= set(found), _nothing, tries=2000) == sorted(needed)


def test_smaller_numbers_are_smaller() -> None:
    """Simpler numbers come simplest first, none is as large, and 0 has none."""
    assert smaller_numbers(10) == [0, 1, 5, 9]
    assert smaller_numbers(2) == [0, 1]
    assert smaller_numbers(0) == []
