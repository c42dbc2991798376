"""The table of measures: what is looked at besides packets a second. A new measure is a new row."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Final

from vhostmp.tools.bench.figures import Measure

MEASURES: Final[tuple[Measure, ...]] = ()


def choose(names: Sequence[str], *, quick: bool) -> list[Measure]:
    """Return the measures that `names` (patterns) select; of a first look those that take little time."""
    return [
        measure
        for measure in MEASURES
        if any(fnmatch.fnmatch(measure.name, name) for name in names) and (measure.quick or not quick)
    ]
