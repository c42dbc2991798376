"""`vhostmp stress --load`: frames through every pair at once, counted, and the round trips of some timed."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.integration.serving import serving
from vhostmp.cli import main

UNUSABLE = 2
NAMES = {"p50", "p90", "p99", "p99.9", "max"}


@pytest.fixture
def path(tmp_path: Path) -> Generator[Path, None, None]:
    """The socket of a back-end that sends frames back, on two pairs."""
    with serving(tmp_path, "--socket-path", str(tmp_path / "s"), "--backend", "loopback", "--queue-pairs", "2"):
        yield tmp_path / "s"


@pytest.mark.slow
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_load(path: Path, ring: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Frames pass both ways and none is bad; percentiles are in order; the table says so too."""
    report = tmp_path / "load.json"
    words = ["--load", "--time", "0.5", "--size", "100", "--ring", ring, "--json", str(report)]
    assert main(["stress", "--socket-path", str(path), *words]) == 0
    found = json.loads(report.read_text())
    assert found["received"] > 0
    assert found["sent"] >= found["received"]
    assert found["bad"] == 0
    assert found["samples"] > 0
    latency = found["latency_us"]
    assert set(latency) == NAMES
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99.9"] <= latency["max"]
    assert "packets/s" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--processes", "2"],
            "needs 3 queue pairs, and the back-end has 2: serve it with more (vhostmp serve --queue-pairs 3",
        ),
        (["--processes", "0"], "--processes 0 is not from 1 to 15"),
        (["--size", "59"], "--size 59 is not from 60 to 1514 bytes"),
        (["--time", "0"], "--time 0 is not a positive number of seconds"),
        (["--device", "blk"], "--load needs one --socket-path, of a network back-end"),
    ],
)
def test_mistakes(path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be is said in one line, with what to do."""
    assert main(["stress", "--socket-path", str(path), "--load", *words]) == UNUSABLE
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_nothing_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A back-end that sends nothing back cannot be loaded so."""
    with serving(tmp_path, "--socket-path", str(tmp_path / "s"), "--backend", "null", "--queue-pairs", "2"):
        assert main(["stress", "--socket-path", str(tmp_path / "s"), "--load"]) == UNUSABLE
    assert "--load needs a back-end that sends frames back" in capsys.readouterr().err
