"""`python -m vhostmp.tools.stress_table NAME=FILE ...`: `vhostmp stress --json` of several back-ends as Markdown.

First a table of all clauses with a column for each back-end, then what was seen where a clause failed, with its seed.
The clauses of a format of rings share a row: "split" or "packed" says where it failed if not in both.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

FORMATS: Final = ("split", "packed")
WORDS: Final = {"pass": "pass", "fail": "**fail**", "not_applicable": "-"}
SHOWN: Final = 160
"""Characters of a detail that are shown."""

Clauses = Mapping[str, Mapping[str, Any]]


def base(clause: str) -> str:
    """Return a clause's name without its format."""
    first, _, last = clause.rpartition(".")
    return first if last in FORMATS else clause


def cell(clauses: Clauses, name: str) -> str:
    """Return what became of a clause, in all its formats."""
    verdicts = {key: clauses[key]["verdict"] for key in (name, *(f"{name}.{one}" for one in FORMATS)) if key in clauses}
    found = set(verdicts.values())
    if "fail" not in found:
        return WORDS["pass" if "pass" in found else "not_applicable"] if found else ""
    formats = [key.rpartition(".")[2] for key, verdict in verdicts.items() if verdict == "fail" and key != name]
    return WORDS["fail"] + (f" {formats[0]}" if len(formats) == 1 else "")


def table(columns: Mapping[str, Clauses]) -> list[str]:
    """Return the lines of the table of clauses."""
    names: dict[str, str] = {}
    for clauses in columns.values():
        for key, one in clauses.items():
            names.setdefault(base(key), one["profile"])
    lines = [f"| clause | profile | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for name, profile in sorted(names.items(), key=lambda item: (item[1], item[0])):
        cells = " | ".join(cell(clauses, name) for clauses in columns.values())
        lines.append(f"| `{name}` | {profile} | {cells} |")
    for verdict, word in (("pass", "pass"), ("fail", "fail"), ("not_applicable", "not applicable")):
        counts = (sum(one["verdict"] == verdict for one in clauses.values()) for clauses in columns.values())
        lines.append(f"| all: {word} | | {' | '.join(map(str, counts))} |")
    return lines


def failures(name: str, clauses: Clauses) -> list[str]:
    """Return the lines of what was seen of a back-end where a clause failed."""
    failed = [one for one in clauses.values() if one["verdict"] == "fail"]
    if not failed:
        return []
    lines = ["", f"### {name}", "", "| clause | seed | what was seen | source |", "|---|---|---|---|"]
    for one in failed:
        detail = one["detail"].replace("|", "/")
        detail = detail if len(detail) <= SHOWN else detail[:SHOWN] + " ..."
        lines.append(f"| `{one['id']}` | {one['seed']} | {detail} | {one['source'].replace('|', '/')} |")
    return lines


def main(words: Sequence[str]) -> int:
    """Print; 2 when the arguments are no NAME=FILE, or a file is no report."""
    columns: dict[str, Clauses] = {}
    for word in words:
        name, _, path = word.partition("=")
        try:
            columns[name] = {one["id"]: one for one in json.loads(Path(path).read_text(encoding="utf-8"))["clauses"]}
        except (OSError, ValueError, KeyError) as error:
            print(f"stress_table: {word}: give NAME=FILE, FILE from 'vhostmp stress --json': {error}", file=sys.stderr)
            return 2
    if not columns:
        print(__doc__, file=sys.stderr)
        return 2
    print("\n".join(table(columns)))
    for name, clauses in columns.items():
        print("\n".join(failures(name, clauses)), end="\n" if failures(name, clauses) else "")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
