"""What journal, checks and counters cost: the harness, with the same build on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vhostmp.errors import LocalError
from vhostmp.tools.bench import safety
from vhostmp.tools.guest import Layout


@pytest.mark.slow
def test_against_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sides of one build are measured in turn, and come to about the same."""
    monkeypatch.setattr(safety, "WINDOWS", 2)
    assert safety.main(["--against-itself", "--rounds", "2", "--ring", "packed", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ring_format"], found["rounds"]) == ("packed", 2)
    assert found["ns_per_packet"] > 0
    assert 1 / 3 < found["ratio"] < 3  # noqa: PLR2004 - other people are on the machine


def test_which_way_a_ratio_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that have a packet cost a quarter more let four fifths of the packets pass; whoever is asked first."""

    class Fake(safety.Side):
        """A side whose packets cost what its build says."""

        def __init__(self, tree: Path, *, packed: bool, without: str = "") -> None:
            """Start nothing."""
            del tree, packed
            self.cost = 40.0 if without == "checks" else 50.0

        def ns_per_packet(self) -> float:
            """Return the cost."""
            return self.cost

        def close(self) -> None:
            """End nothing."""

    monkeypatch.setattr(safety, "Side", Fake)
    found = safety.measure(Path("elsewhere"), "checks", packed=False, rounds=3)
    assert (found["ns_per_packet"], found["ns_per_packet_without"]) == (50.0, 40.0)
    assert (found["ratio"], found["ratio_quartiles"]) == (0.8, [0.8, 0.8])


class StopError(Exception):
    """What a fake raises once it has been asked."""


@pytest.mark.parametrize("form", ["split", "packed"])
def test_ring_format(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """The format that is asked for is the one that is measured, by the sides, and by the guest of a side."""
    asked: list[object] = []

    def stage(layout: Layout) -> None:
        asked.append(layout.packed)
        raise StopError

    def popen(command: list[str], **options: Any) -> None:
        del options
        asked.append(command[-1])
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(safety, "Stage", stage)
        with pytest.raises(StopError):
            safety.main(["--side", form])
    with monkeypatch.context() as patch:
        patch.setattr("vhostmp.tools.bench.safety.subprocess.Popen", popen)
        with pytest.raises(StopError):
            safety.main(["--against-itself", "--ring", form])
    assert asked == [form == "packed", form]


def test_a_build_that_is_another_one() -> None:
    """A side whose build is not what it is taken for is refused, and ended."""
    with pytest.raises(LocalError, match="is without nothing, not journal"):
        safety.Side(safety.ROOT, packed=False, without="journal")


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    """A number of rounds of which there are no quartiles is a mistake on the command line."""
    with pytest.raises(SystemExit):
        safety.parse(["--rounds", "1"])
    assert "choose 2 or more" in capsys.readouterr().err
