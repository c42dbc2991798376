"""The reports of `vhostmp stress`: JSON, JUnit, HTML, the table, and the list of clauses."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from vhostmp.cli import main
from vhostmp.tools.stress import report
from vhostmp.tools.stress.clause import CLAUSES, PROFILES, Clause, Context, register
from vhostmp.tools.stress.clauses import load_all
from vhostmp.tools.stress.examiner import asked
from vhostmp.tools.stress.result import Result
from vhostmp.tools.stress.verdict import Verdict


def ask(_: Context) -> None:
    """Is 1 < 2?

    A second paragraph is no question.
    """


RESULTS = [
    Result.of(Clause("a", "good", "spec 1", ask), Verdict.PASS, seed=1, seconds=0.5),
    Result.of(Clause("b", "hostile", "CVE-0", ask), Verdict.FAIL, "it\n<died>\0", seed=7),
    Result.of(Clause("c", "hostile", "CVE-1", ask), Verdict.NOT_APPLICABLE, "not offered"),
]


def test_json() -> None:
    """The report for machines has what is promised, and no more."""
    got = json.loads(report.as_json(RESULTS))
    assert got["summary"] == {"pass": 1, "fail": 1, "not_applicable": 1}
    assert got["clauses"][1] == {
        "id": "b",
        "profile": "hostile",
        "verdict": "fail",
        "source": "CVE-0",
        "detail": "it <died>?",
        "seed": 7,
    }


def test_junit() -> None:
    """A CI system reads a suite with a failure and a skipped case."""
    root = ElementTree.fromstring(report.as_junit(RESULTS, "x").encode())
    assert {key: root.get(key) for key in ("tests", "failures", "skipped")} == {
        "tests": "3",
        "failures": "1",
        "skipped": "1",
    }
    cases = {case.get("name"): [child.tag for child in case] for case in root}
    assert cases == {"a": [], "b": ["failure"], "c": ["skipped"]}


def test_html_is_escaped_and_whole() -> None:
    """The page names every clause, and a back-end's words are no markup in it."""
    page = report.as_html(RESULTS, "run <1>")
    assert "it &lt;died&gt;?" in page
    assert "run &lt;1&gt;" in page
    assert "<died>" not in page
    assert page.count('<tr class="is-') == len(RESULTS)
    assert "Is 1 &lt; 2?" in page


def test_table_says_how_to_repeat() -> None:
    """A failure stands with its words, its source and the way to see it again; the rest is counted."""
    table = report.as_table(RESULTS)
    assert "FAIL  b: Is 1 < 2?" in table
    assert "again: --clause b --seed 7" in table
    assert "pass  a" not in table
    assert table.splitlines()[-1].split() == ["all", "1", "1", "1"]
    assert "pass  a" in report.as_table(RESULTS, everything=True)


def test_every_clause_has_a_question_and_a_source() -> None:
    """Nobody reads a clause that does not say what it asks, and where that is written."""
    load_all()
    bad = [
        one.id
        for one in CLAUSES.values()
        if not one.question.endswith((".", "?")) or one.question == one.id or len(one.source) < len("spec 1")
    ]
    assert bad == []
    assert {one.profile for one in CLAUSES.values()} <= set(PROFILES)


def test_a_name_is_taken_once() -> None:
    """Two clauses of one name are a mistake."""
    load_all()
    one = next(iter(CLAUSES.values()))
    with pytest.raises(ValueError, match="taken"):
        register(one)


def test_clauses_are_found_by_name() -> None:
    """A name without its format means both formats; an unknown one is no clause."""
    load_all()
    assert [one.id for one in asked([], ["traffic"])] == ["traffic.split", "traffic.packed"]
    assert [one.id for one in asked([], ["traffic.packed"])] == ["traffic.packed"]
    with pytest.raises(KeyError):
        asked([], ["traff"])
    assert all(one.profile == "hostile" for one in asked(["hostile"], []))


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    """The list needs no back-end."""
    assert main(["stress", "--list", "--profile", "hostile"]) == 0
    out = capsys.readouterr().out
    assert "ring-next-loop.split" in out
    assert "traffic" not in out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "no --socket-path"),
        (
            ["--socket-path", "/nonexistent/x", "--patience", "0.1"],
            "there is no socket /nonexistent/x: start the back-end first",
        ),
        (["--socket-path", "/dev/null"], "is not a socket"),
        (["--socket-path", "/x", "--jobs", "2"], "--socket-path as often"),
        (["--socket-path", "/x", "--socket-path", "/x"], "given twice"),
        (["--socket-path", "/x", "--clause", "nonsense"], "--list"),
        (["--socket-path", "/x", "--pid", "999999999"], "no process"),
        (["--socket-path", "/x", "--time", "0"], "positive"),
        (["--socket-path", "/x", "--json", "/"], "cannot write /"),
        (["--socket-path", "/x", "--load", "--json", "/nonexistent/x"], "no such directory"),
        (["--socket-path", "/nonexistent/x", "--listen"], "cannot listen"),
    ],
)
def test_mistakes(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A user's mistake is one line that says what to do."""
    assert main(["stress", *words]) == 2  # noqa: PLR2004  the exit status of a mistake, see vhostmp/cli.py
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("vhostmp stress:")]
    assert len(lines) == 1
    assert text in lines[0]
