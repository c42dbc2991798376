"""The table and the figure of how long replacements take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs
import pytest

from tests.unit.tools.test_demo_chaos import report_of
from vhostmp.tools import demo_chaos, demo_plot, replacement
from vhostmp.tools.guest import Layout

ROOT: Final = Path(__file__).parents[3]
PAUSES: Final = (4.0, 2.0, 3.0, 40.0)


def test_shares() -> None:
    """Each pause comes with how many in a hundred are not longer."""
    assert replacement.shares(PAUSES) == ([2.0, 3.0, 4.0, 40.0], [25.0, 50.0, 75.0, 100.0])


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both formats are played, calm and not, with what was asked for; rows are Markdown; what is wrong ends with 1."""
    drawn: list[object] = []
    played: list[tuple[bool, bool, int, int]] = []

    def perform(workers: int, layout: Layout, kills: int, seed: int, show: object, *, calm: bool) -> demo_chaos.Report:
        del show
        assert workers == 1
        played.append((layout.packed, calm, kills, seed))
        wrong = ("lost tx: 1",) if layout.packed and calm else ()
        return attrs.evolve(report_of(), pauses_ms=PAUSES, problems=wrong)

    def draw(runs: Sequence[replacement.Run], path: str) -> None:
        drawn.extend([len(runs), path])

    monkeypatch.setattr(demo_chaos, "perform", perform)
    monkeypatch.setattr(demo_plot, "check", drawn.append)
    monkeypatch.setattr(replacement, "draw", draw)
    path = str(tmp_path / "x.svg")
    assert replacement.main([path, "--kills", "7", "--seed", "3"]) == 1
    assert played == [(packed, calm, 7, 3) for calm in (True, False) for packed in (False, True)]
    out, err = capsys.readouterr()
    rows = out.splitlines()
    assert len(rows) == len(played) + len(replacement.HEADER.splitlines())
    assert {row.count("|") for row in rows} == {9}
    assert rows[2] == "| `--calm`, split | 60 | 5.0 ms | 15.0 ms | 20.0 ms | 0 | 128 | 0 |"
    assert err == "replacement: `--calm`, packed: lost tx: 1\n"
    assert drawn == [path, len(played), path]


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that cannot be drawn is one line, before anything is played."""
    assert replacement.main([str(tmp_path / "x.txt")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_figure(tmp_path: Path) -> None:
    """A real run, of a few kills, writes a picture, and four rows."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "x.png"
    words = [sys.executable, "-m", "vhostmp.tools.replacement", str(path), "--kills", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert done.stdout.count("| 2 |") == 4  # noqa: PLR2004 - two formats, calm and not


@pytest.mark.slow
def test_pauses() -> None:
    """A run tells the pause of each kill."""
    report = demo_chaos.perform(1, Layout(), 3, 1, lambda make: None, calm=True)
    assert report.problems == ()
    assert len(report.pauses_ms) >= report.kills
    assert max(report.pauses_ms) == pytest.approx(report.replacement_ms["max"], abs=0.1)
