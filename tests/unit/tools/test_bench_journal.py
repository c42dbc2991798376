"""What the journal costs: the harness, with the same build on both sides."""

from __future__ import annotations

import json

import pytest

from vhostmp.errors import LocalError
from vhostmp.tools.bench import journal


@pytest.mark.slow
def test_against_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sides of one build are measured in turn, and come to about the same."""
    monkeypatch.setattr(journal, "WINDOWS", 2)
    assert journal.main(["--against-itself", "--rounds", "2", "--ring", "packed", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ring_format"], found["rounds"]) == ("packed", 2)
    assert found["ns_per_packet"] > 0
    assert 1 / 3 < found["ratio"] < 3  # noqa: PLR2004 - other people are on the machine


def test_a_build_that_is_another_one() -> None:
    """A side whose build is not what it is taken for is refused, and ended."""
    with pytest.raises(LocalError, match="has a journal"):
        journal.Side(journal.ROOT, packed=False, journal=False)


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    """A number of rounds of which there are no quartiles is a mistake on the command line."""
    with pytest.raises(SystemExit):
        journal.parse(["--rounds", "1"])
    assert "choose 2 or more" in capsys.readouterr().err
