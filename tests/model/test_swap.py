"""Verbs, workers and deaths: any number of swaps, moves of rings, refusals, time-outs and deaths, of two and two."""

from __future__ import annotations

import pytest

from tests.model.checker import explore
from tests.model.swap import Swap


@pytest.mark.slow
def test_swap() -> None:
    """No thing is used after its verb has returned, no ring served twice, nothing kept for ever, nobody stuck."""
    result = explore(Swap())
    assert result.why is None, result.story()
    print(f"{result.states:,} states, {result.transitions:,} transitions, {result.seconds:.1f} s")


def test_swap_of_a_back_end_alone() -> None:
    """The same with nothing but swaps and deaths, which takes no time."""
    result = explore(Swap(moves=False, refusals=False, timeouts=False))
    assert result.why is None, result.story()


@pytest.mark.parametrize("bug", Swap.BUGS)
def test_planted_bug_is_found(bug: str) -> None:
    """Each bug is found, by the rule that it breaks, and the trace leads there step by step."""
    expected = Swap.BUGS[bug]
    quick = expected == "stuck" or "start" in bug
    result = explore(Swap(bug, timeouts=not quick, refusals=not quick, moves=expected != "stuck"))
    assert result.why is not None, "not found"
    assert expected in result.why, result.story()
    print(result.story())
