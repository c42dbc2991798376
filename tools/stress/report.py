"""Reports of a run: a table for a terminal, JSON, JUnit's XML, and an HTML page."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Final
from xml.etree import ElementTree

from vhostmp.tools.stress.result import Result, summary
from vhostmp.tools.stress.verdict import Verdict

_WORDS: Final = {Verdict.PASS: "pass", Verdict.FAIL: "FAIL", Verdict.NOT_APPLICABLE: "n/a"}


def as_json(results: Sequence[Result]) -> str:
    """Return the report for machines: {"clauses": [...], "summary": {...}}."""
    return json.dumps({"clauses": [one.as_json() for one in results], "summary": summary(results)}, indent=1) + "\n"


def as_table(results: Sequence[Result], *, everything: bool = False) -> str:
    """Return what failed, with its source and how to repeat it, and how many passed, by profile."""
    lines: list[str] = []
    for one in results:
        if one.verdict is Verdict.FAIL or everything:
            lines.append(f"{_WORDS[one.verdict]}  {one.id}: {one.question}")
            if one.detail:
                lines.append(f"      {one.detail}")
            if one.verdict is Verdict.FAIL:
                lines.append(f"      {one.source}; again: --clause {one.id} --seed {one.seed}")
    if lines:
        lines.append("")
    lines.append(f"{'profile':<10}{'pass':>6}{'FAIL':>6}{'n/a':>6}")
    for profile in (*dict.fromkeys(one.profile for one in results), "all"):
        counts = summary([one for one in results if profile in (one.profile, "all")])
        lines.append(f"{profile:<10}" + "".join(f"{count:>6}" for count in counts.values()))
    return "\n".join(lines) + "\n"


def as_junit(results: Sequence[Result], name: str) -> str:
    """Return the report as CI systems read it: a test case for each clause."""
    counts = summary(results)
    suite = ElementTree.Element(
        "testsuite",
        name=name,
        tests=str(len(results)),
        failures=str(counts[Verdict.FAIL]),
        skipped=str(counts[Verdict.NOT_APPLICABLE]),
        errors="0",
        time=f"{sum(one.seconds for one in results):.3f}",
    )
    for one in results:
        case = ElementTree.SubElement(suite, "testcase", classname=one.profile, name=one.id, time=f"{one.seconds:.3f}")
        if one.verdict is Verdict.FAIL:
            node = ElementTree.SubElement(case, "failure", message=one.detail)
            node.text = f"{one.question}\n{one.source}\n--clause {one.id} --seed {one.seed}"
        elif one.verdict is Verdict.NOT_APPLICABLE:
            ElementTree.SubElement(case, "skipped", message=one.detail)
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3em .8em .3em 0; border-bottom: 1px solid #8884; }
code { font-size: .92em; } .detail { color: #888; } .pass { color: #2a8a3a; } .fail { color: #c22; font-weight: 600; }
.not_applicable { color: #888; } .bar { display: flex; height: .7em; border-radius: .35em; overflow: hidden; }
.bar span { display: block; } label { margin-right: 1em; }
body:not(.show-pass) tr.is-pass, body:not(.show-fail) tr.is-fail,
body:not(.show-not_applicable) tr.is-not_applicable { display: none; }
"""


def as_html(results: Sequence[Result], title: str) -> str:
    """Return a page to read: a bar, and a row for each clause, which can be chosen by verdict. Nothing is loaded."""
    counts = summary(results)
    colours = {"pass": "#2a8a3a", "fail": "#c22", "not_applicable": "#8886"}
    bar = "".join(
        f'<span style="flex:{count};background:{colours[verdict]}"></span>' for verdict, count in counts.items()
    )
    choices = "".join(
        f"<label><input type=checkbox checked onchange=\"document.body.classList.toggle('show-{verdict}')\"> "
        f"{verdict.replace('_', ' ')}: {count}</label>"
        for verdict, count in counts.items()
    )
    rows = "".join(
        f'<tr class="is-{one.verdict}"><td class="{one.verdict}">{_WORDS[one.verdict]}</td>'
        f"<td><code>{html.escape(one.id)}</code></td><td>{html.escape(one.question)}"
        + (f'<br><span class="detail">{html.escape(one.detail)}</span>' if one.detail else "")
        + f"</td><td>{html.escape(one.source)}</td><td>{one.profile}</td><td>{one.seed}</td>"
        f"<td>{one.seconds:.2f} s</td></tr>\n"
        for one in results
    )
    shown = " ".join(f"show-{verdict}" for verdict in counts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<style>{_STYLE}</style>\n<body class="{shown}"><h1>{html.escape(title)}</h1>\n'
        f'<div class="bar">{bar}</div>\n<p>{choices}</p>\n<table>'
        "<tr><th>verdict<th>clause<th>question<th>source<th>profile<th>seed<th>time</tr>\n"
        f"{rows}</table></body></html>\n"
    )
