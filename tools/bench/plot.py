"""Draws the ratios of a run: a bar a case, its spread, a line at 1, a mark where the goal is."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vhostmp.errors import LocalError
from vhostmp.tools.bench.rounds import Result

MET, MISSED = "#4878a8", "#c8553d"


def draw(results: Sequence[Result], path: Path) -> None:
    """Write the picture; the file's ending says which kind. LocalError without matplotlib, or where it cannot be."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")  # an extra, and slow to import
        kind: Any = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise LocalError("a plot needs matplotlib: pip install 'vhostmp[plot]'") from None
    shown = list(reversed(results))
    places = range(len(shown))
    figure = kind(figsize=(9, 1.2 + 0.28 * len(shown)), layout="constrained")
    axes = figure.subplots()
    medians = [result.ratio.median for result in shown]
    below = [result.ratio.median - result.ratio.low for result in shown]
    above = [result.ratio.high - result.ratio.median for result in shown]
    colours = [MISSED if result.case.goal and not result.goals()[0].met else MET for result in shown]
    axes.barh(places, medians, xerr=[below, above], color=colours, height=0.7, error_kw={"elinewidth": 1})
    for place, result in zip(places, shown, strict=True):
        if result.case.goal:
            axes.plot([result.case.goal] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.5)
    axes.axvline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set_yticks(places, [f"{result.case.title} {result.case.ring_format}" for result in shown], fontsize=8)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("packets a second, vhostmp / peer; whiskers: all rounds; black: the goal; red: missed")
    svg = path.suffix == ".svg"
    try:
        with matplotlib.rc_context({"svg.hashsalt": "vhostmp"}):  # the same numbers make the same file
            figure.savefig(path, metadata={"Date": None} if svg else None)
    except (OSError, ValueError) as error:
        raise LocalError(f"cannot write {path}: {error}") from error
