"""A build whose barrier does nothing must be seen to fail, and the demo must be what sees it.

Why it fails with certainty. While memory moves, each batch that the guest sends is marked, and the back-end in Python
dwells on a marked batch, inside its work item, with views of guest memory in its hands, before it copies a byte. It
does little else then, so a new table is published within such a dwell with a probability of four in five or more.
Without the barrier `set_mem_table` returns while the dwell goes on: the old memory is unmapped and poisoned under the
views. What the worker copies then kills it (SIGSEGV), or is poison. Sixteen moves that all miss a dwell are one in
10 ** 11. The demo's dwell is half a millisecond, the one here forty times that (backends.py): on a busy machine it can
take longer than the demo's from the publication to the poison, and the views would be copied before anything is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostmp.tools import demo
from vhostmp.tools.demo_stage import Stage

pytestmark = pytest.mark.slow
MOVES = 16
PATIENT = f"python:{Path(__file__).with_name('backends.py')}:Patient"


@pytest.fixture
def stage() -> Iterator[Stage]:
    """Build the demo's stage."""
    with Stage() as built:
        yield built


def _no_barrier(*_: object) -> int:
    """Wait for nobody."""
    return 0


def _no_retirement(*_: object) -> dict[int, int]:
    """Keep everything old mapped."""
    return {}


def _play_moves(stage: Stage) -> demo.Report:
    """Play a demo of moves alone, with the Python back-end in service."""
    return demo.perform(
        stage, demo.SECONDS_MAX, acts=[lambda: stage.swap(PATIENT), *(stage.move for _ in range(MOVES))]
    )


def test_with_the_barrier_nothing_is_wrong(stage: Stage) -> None:
    """With the real barrier the same moves leave no packet wrong, and no worker dies but the one that is killed."""
    report = _play_moves(stage)
    assert report.problems == ()
    assert report.memory_moves == MOVES
    assert report.lost == report.duplicated == report.reordered == 0
    assert report.restarts == 1


def test_without_the_barrier_the_demo_fails(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a synchronize() that returns at once the demo reports failure: workers die on memory pulled away."""
    monkeypatch.setattr("vhostmp.flush.synchronize", _no_barrier)
    report = _play_moves(stage)
    assert report.problems
    assert report.restarts > 0
    assert any("died" in problem for problem in report.problems)


def test_without_the_barrier_poison_is_seen(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the old memory stays mapped nobody dies, and what was read from it is found out packet by packet."""
    monkeypatch.setattr("vhostmp.flush.synchronize", _no_barrier)
    monkeypatch.setattr("vhostmp.flush.retire", _no_retirement)
    report = _play_moves(stage)
    seen = " ".join(report.problems)
    assert "corrupted" in seen or "indirect" in seen, seen  # poison in a frame, or in the table of a frame in pieces
    assert report.lost > 0
