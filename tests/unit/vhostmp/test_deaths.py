"""Which deaths count against a ring, and when a worker is held back."""

from __future__ import annotations

import pytest

from vhostmp.deaths import EARLY_DEATH, EARLY_DEATHS_MAX, RESTART_DELAY, Deaths, RestartLimit
from vhostmp.errors import LocalError

RING = 7


@pytest.mark.parametrize(
    ("text", "limit"),
    [("5/10", RestartLimit(5, 10.0)), ("1/0.5", RestartLimit(1, 0.5)), ("0", RestartLimit(0, 0.0))],
)
def test_limit_as_written(text: str, limit: RestartLimit) -> None:
    """Deaths and seconds, or 0 for no limit."""
    assert RestartLimit.parse(text) == limit


@pytest.mark.parametrize("text", ["", "5", "-1", "5/0", "0/5", "x/10", "5/x", "5/-1", "5/inf", "5/nan", "5/10/2"])
def test_limit_that_is_none(text: str) -> None:
    """Anything else is refused in one line."""
    with pytest.raises(LocalError, match="restart limit"):
        RestartLimit.parse(text)


def test_without_progress_each_death_counts() -> None:
    """A ring that gets nothing done between deaths is to blame at the limit, whatever they were."""
    deaths = Deaths(RestartLimit(3, 10.0))
    assert [deaths.blame(RING, at, 5, own_doing=False) for at in (0.0, 1.0, 2.0)] == [False, False, True]


def test_progress_clears_what_came_from_outside() -> None:
    """Kills of a ring that is served in between never count up; faults of the worker's own do."""
    deaths = Deaths(RestartLimit(3, 10.0))
    assert not any(deaths.blame(RING, at / 10, at, own_doing=False) for at in range(50))
    assert [deaths.blame(RING, 5 + at / 10, 50 + at, own_doing=True) for at in range(3)] == [False, False, True]


def test_old_deaths_are_forgotten() -> None:
    """Only what happened within the window counts."""
    deaths = Deaths(RestartLimit(3, 10.0))
    assert not any(deaths.blame(RING, 6.0 * at, 0, own_doing=True) for at in range(20))


def test_time_of_standing_still_does_not_count() -> None:
    """Workers that hang for a minute each reach the limit all the same."""
    deaths = Deaths(RestartLimit(3, 10.0))
    assert [deaths.blame(RING, 61.0 * at, 0, own_doing=False, spent=60.0) for at in range(3)] == [False, False, True]


def test_rings_are_judged_alone_and_forgiven() -> None:
    """Another ring's deaths do not count, nor those before a new start."""
    deaths = Deaths(RestartLimit(2, 10.0))
    assert not deaths.blame(RING, 0.0, 0, own_doing=True)
    assert not deaths.blame(RING + 1, 0.0, 0, own_doing=True)
    deaths.forgive(RING)
    assert not deaths.blame(RING, 0.0, 0, own_doing=True)
    assert deaths.blame(RING, 0.0, 0, own_doing=True)


def test_no_limit() -> None:
    """With 0 no ring is ever to blame."""
    deaths = Deaths(RestartLimit(0))
    assert not any(deaths.blame(RING, 0.0, 0, own_doing=True) for _ in range(100))


def test_worker_that_dies_before_it_does_anything() -> None:
    """It is started again at once a few times, then only after a while; one that has worked is not held back."""
    deaths = Deaths(RestartLimit())
    delays: list[float] = []
    for at in range(EARLY_DEATHS_MAX):
        deaths.started(0, float(at), items=9)
        delays.append(deaths.delay(0, at + EARLY_DEATH / 2, items=9))
    assert delays == [0.0] * (EARLY_DEATHS_MAX - 1) + [RESTART_DELAY]
    deaths.started(0, 100.0, items=9)
    assert deaths.delay(0, 100.0, items=10) == 0.0


@pytest.fixture
def early() -> Deaths:
    """Return a record in which one more early death of worker 0 has it held back."""
    deaths = Deaths(RestartLimit())
    for at in range(EARLY_DEATHS_MAX - 1):
        deaths.started(0, float(at), items=9)
        assert deaths.delay(0, float(at), items=9) == 0.0
    deaths.started(0, 100.0, items=9)
    return deaths


def test_worker_that_dies_late(early: Deaths) -> None:
    """One that has lived for a while is not held back, though it had nothing to do."""
    assert early.delay(0, 100.0 + 2 * EARLY_DEATH, items=9) == 0.0


def test_worker_beside_one_that_is_held_back(early: Deaths) -> None:
    """Each worker is judged alone."""
    early.started(1, 100.0, items=9)
    assert early.delay(1, 100.0, items=9) == 0.0
    assert early.delay(0, 100.0, items=9) == RESTART_DELAY


def test_worker_that_is_new_in_its_slot(early: Deaths) -> None:
    """What was in the slot before is not held against one that is started for another reason than a death."""
    early.new(0)
    assert early.delay(0, 100.0, items=9) == 0.0
