"""`docs/features.md` claims nothing without a test: each row names one that exists, or says why there is no yes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
TEST: Final = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
#: Of a row: the feature, seven others, vhostmp, the test or the reason.
CELLS: Final = 10
ENTRIES: Final = {"yes", "part", "no", "-", "?"}


def rows() -> list[list[str]]:
    """Return the cells of every row of every table, heads left out."""
    lines = (ROOT / "docs" / "features.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if row[0] != "feature" and not row[0].startswith("---")]


@pytest.mark.parametrize("row", rows(), ids=lambda row: str(row[0]))
def test_row(row: list[str]) -> None:
    """A row is whole; a "yes" has a test that exists; anything else has a reason."""
    assert len(row) == CELLS, row
    assert set(row[1:9]) <= ENTRIES, row
    named = TEST.findall(row[9])
    for path, test in named:
        assert re.search(rf"^(async )?def {test}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path} has no {test}"
    if row[8] == "yes":
        assert named, "no test named"
    else:
        assert len(TEST.sub("", row[9])) > len("because"), "no reason given"


def test_there_are_rows() -> None:
    """The table was found."""
    assert len(rows()) > 40  # noqa: PLR2004
