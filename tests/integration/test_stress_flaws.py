"""`vhostmp stress` finds what is wrong: a back-end that is right passes, and each flaw planted in it is found.

The back-end is a small one in plain Python (tests/flawed): the tool must not depend on anything of ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from tests.flawed.device import FLAWS
from tests.flawed.running import flawed
from vhostmp.cli import main
from vhostmp.tools.stress.clause import CLAUSES
from vhostmp.tools.stress.clauses import load_all

FINDS: Final[dict[str, tuple[str, ...]]] = {
    "unbounded_chain": ("ring-next-loop.split",),
    "double_fetch": ("fetch-addr.split",),
    "no_barrier": ("mem-table-swapped-busy.split",),
    "lost_first_kick": ("ring-full-before-start.split",),
    "num_buffers": ("receive-merged.split",),
    "leaked_fd": ("fds-on-plain-message",),
    "unlogged_used": ("log-used-ring.split",),
    "used_length": ("traffic.split",),
    "base": ("base-is-where-it-stopped.split",),
    "late_write": ("stop-is-real.split",),
    "no_interrupt": ("one-at-a-time.split",),
    "ring_size": ("vring-num-zero",),
    "short_region": ("desc-past-region.split",),
    "wild_index": ("index-first-outside",),
}
"""The clauses that find each flaw. They pass where it is not planted."""

TRIES: Final = {"double_fetch": 8}
"""Flaws that show by chance: it takes a change between two looks."""


def stress(path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Run the command, and return its exit status and its JSON report."""
    report = path.with_suffix(".json")
    status = main(["stress", "--socket-path", str(path), "--json", str(report), *words])
    return status, json.loads(report.read_text())


def chosen(ids: tuple[str, ...]) -> list[str]:
    """Return the arguments that ask these clauses."""
    return [word for id_ in ids for word in ("--clause", id_)]


@pytest.mark.parametrize("flaw", FINDS)
def test_flaw_is_found(flaw: str, tmp_path: Path) -> None:
    """Each flaw makes a clause fail."""
    path = tmp_path / "sock"
    status, found = 0, dict[str, Any]()
    for seed in range(1, 1 + TRIES.get(flaw, 1)):
        with flawed(path, flaw) as backend:
            words = ["--pid", str(backend.pid), "--seed", str(seed), "--patience", "2"]
            status, found = stress(path, *words, *chosen(FINDS[flaw]))
        path.unlink()
        if status:
            break
    assert status == 1
    assert found["summary"]["fail"] > 0


def test_clauses_that_find_flaws_pass_without(tmp_path: Path) -> None:
    """The clauses that find flaws find none in a back-end that has none."""
    path = tmp_path / "sock"
    ids = tuple(sorted({id_ for ids in FINDS.values() for id_ in ids}))
    with flawed(path) as backend:
        status, found = stress(path, "--pid", str(backend.pid), "--seed", "1", *chosen(ids))
    assert [one for one in found["clauses"] if one["verdict"] != "pass"] == []
    assert status == 0


def test_dead_backend_ends_the_run(tmp_path: Path) -> None:
    """When the back-end dies the clause that killed it has failed, and the rest is not asked."""
    path = tmp_path / "sock"
    with flawed(path, "short_region") as backend:
        backend.kill()
        backend.wait()
        status = main(["stress", "--socket-path", str(path)])
    assert status == 2  # noqa: PLR2004  the exit status of a mistake, see vhostmp/cli.py


def test_ids_are_those_of_clauses() -> None:
    """The table names clauses that there are, and every flaw that can be planted."""
    load_all()
    assert set(FINDS) == set(FLAWS)
    assert {id_ for ids in FINDS.values() for id_ in ids} <= set(CLAUSES)
