"""Every order that shm/ORDERING.md claims for words of ours is enough, and none of them is too many."""

from __future__ import annotations

from typing import Final

import pytest

from tests.helpers import TORTURE_SECONDS
from tests.model.checker import explore
from tests.model.order import PROGRAMS, grace_period
from tests.model.weak import Machine

CLAIMS: Final = [(name, tag) for name, make in PROGRAMS.items() for tag in make().tags()]
#: Claims that the program at hand does not need, and why they are made.
NOT_NEEDED: Final = {
    ("used, packed", "V6 not the first"): "J3 does: the batch is in the slot before its descriptors are in the ring",
    ("journal, split", "J1 repaired first"): "slot.used_idx comes last and has the order for both",
    (
        "journal, split",
        "J2",
    ): "the dead store nothing any more; it is for who has only let go of the ring",
    ("journal, packed", "J3 finished descriptors"): "the first descriptor comes after them and has the order",
    ("journal, packed", "J3 finished used_idx"): "batch_n = 0 comes after it and has the order",
    ("journal, packed", "J4"): "as J2",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_orders_are_enough(name: str) -> None:
    """With every order in place nothing bad can happen, whatever else C11 lets compilers and processors do."""
    result = explore(Machine(PROGRAMS[name]()))
    assert result.why is None, result.story()


@pytest.mark.parametrize(("name", "tag"), CLAIMS, ids=[f"{name}: {tag}" for name, tag in CLAIMS])
def test_each_order_is_needed(name: str, tag: str) -> None:
    """Without one of them something bad can happen, and the trace says what: a fence that is taken out is found."""
    result = explore(Machine(PROGRAMS[name]().without(tag)))
    if (name, tag) in NOT_NEEDED:
        assert result.why is None, f"{tag} is needed after all: {result.story()}"
        return
    assert result.why is not None, f"nothing goes wrong without {tag}"
    assert result.trace
    print(result.story())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("readers", "sections", "swaps", "deaths"),
    [(1, 3, 3, 1), (2, 1, 3, 2), pytest.param(2, 2, 2, 2, id="long")],
)
def test_grace_period_in_full(readers: int, sections: int, swaps: int, deaths: int) -> None:
    """It holds for more sections, swaps and deaths too. The last one takes a minute: with SECONDS=30 alone."""
    if (sections, swaps) == (2, 2) and TORTURE_SECONDS <= 1:
        pytest.skip("SECONDS=30 has time for it")
    result = explore(Machine(grace_period(readers, sections, swaps, deaths)))
    assert result.why is None, result.story()
    print(f"{result.states:,} states, {result.transitions:,} transitions, {result.seconds:.1f} s")
