"""A control process that is killed at any step, twice, and its worker with it."""

from __future__ import annotations

import pytest

from tests.model.adopt import Adopt
from tests.model.checker import explore


def test_adoption() -> None:
    """No message is lost or done twice with effect, no reply is newer than the record, no worker uses what is gone."""
    result = explore(Adopt())
    assert result.why is None, result.story()
    print(f"{result.states:,} states, {result.transitions:,} transitions, {result.seconds:.1f} s")


@pytest.mark.parametrize("bug", Adopt.BUGS)
def test_planted_bug_is_found(bug: str) -> None:
    """Each bug is found, by the rule that it breaks, and the trace leads there step by step."""
    result = explore(Adopt(bug))
    assert result.why is not None, "not found"
    assert Adopt.BUGS[bug] in result.why, result.story()
    print(result.story())
