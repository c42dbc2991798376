"""The orders that shm/ORDERING.md claims for words of ours are enough, and none of them is too many."""

from __future__ import annotations

import re
from typing import Final

import pytest

from tests.helpers import TORTURE_SECONDS
from tests.model.checker import ROOT, explore
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

#: Tags of shm/ORDERING.md that no program here is about, and why.
NOT_HERE: Final = {
    **dict.fromkeys(("D5", "D6", "D9", "D10"), "a command and its acknowledgement: one word each, as G1 and G2"),
    **dict.fromkeys(("D7", "D8"), "one word of the benchmark's, as G1 and G2"),
    "D12": "D2, on a packed ring",
    **dict.fromkeys(("I3", "I4"), "a report between two counts of it, as I1 and I2"),
    **dict.fromkeys(("J5", "J6"), "counters of what a death has cost; deaths are tried on the real thing"),
    **dict.fromkeys(("K1", "K2"), "the kernel's own order"),
    **dict.fromkeys(("K3", "K4", "L2"), "one word, looked at again"),
    **dict.fromkeys(("N1", "N2"), "J1 to J4 in a front-end's region; deaths are tried on the real thing"),
    **dict.fromkeys(("P1", "P2"), "words that carry nothing"),
    **dict.fromkeys(("W2", "W3"), "bits of the log that a death leaves out, which J1 to J4 have set by who comes next"),
}


def test_no_claim_is_forgotten() -> None:
    """A tag of the table is claimed by a program, or it is said why not; none is claimed that the table has not."""
    table = set(re.findall(r"^\| ([A-Z]\d+) \|", (ROOT / "shm" / "ORDERING.md").read_text(), re.M))
    claimed = {tag.split()[0] for _, tag in CLAIMS} - {"the"}  # what the other side is to do has no tag of ours
    assert claimed | set(NOT_HERE) == table
    assert not claimed & set(NOT_HERE)


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
    ("readers", "sections", "swaps", "deaths", "items"),
    [(1, 3, 3, 1, 1), (2, 1, 3, 2, 1), (1, 2, 3, 1, 2), pytest.param(2, 2, 2, 2, 1, id="long")],
)
def test_grace_period_in_full(readers: int, sections: int, swaps: int, deaths: int, items: int) -> None:
    """It holds for more sections, swaps, deaths and items, too. The last one takes a minute: with SECONDS=30 alone."""
    if (sections, swaps) == (2, 2) and TORTURE_SECONDS <= 1:
        pytest.skip("SECONDS=30 has time for it")
    result = explore(Machine(grace_period(readers, sections, swaps, deaths, items)))
    assert result.why is None, result.story()
    print(f"{result.states:,} states, {result.transitions:,} transitions, {result.seconds:.1f} s")
