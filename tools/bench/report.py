"""What a run of the benchmarks leaves: JSON, tables, a plot, and the generated part of docs/performance.md.

Rule: of docs/performance.md only what stands between the two marks is written; the rest is prose, for people to write.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from vhostmp.errors import LocalError
from vhostmp.tools.bench.figures import Figure, number
from vhostmp.tools.bench.goals import Goal
from vhostmp.tools.bench.rounds import Result, Spread

BEGIN: Final = "<!-- results: written by `make bench` -->"
END: Final = "<!-- end of results -->"
PLOT: Final = "performance.svg"
_RATES: Final = (
    *("case", "frame, bytes", "ring", "front-end", "vhostmp, Mpps", "busy, ns a packet", "duty", "batch"),
    *("peer", "peer, Mpps", "ratio", "cores", "rounds"),
)
_FIGURES: Final = ("measure", "what", "vhostmp", "peer", "peer's", "ratio")
_GOALS: Final = ("goal", "of", "measured", "")
_BRIEF: Final = (0, 1, 2, 4, 5, 8, 9, 10, 11)
"""Of the rates' columns those that fit on a terminal."""


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _plain(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out columns for a terminal."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _optional(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _spread(spread: Spread) -> str:
    return spread.text(3 if spread.median < 1 else 2)


def _rate_cells(result: Result) -> list[str]:
    case = result.case
    cost = _optional(result.ns_per_packet, 1)
    if result.peer_ns_per_packet:
        cost += f" (DPDK {result.peer_ns_per_packet:.1f})"
    return [
        case.name,
        "+".join(map(str, case.segments)) or str(case.size),
        f"{case.ring} {case.ring_format}",
        case.front_name,
        _spread(result.mpps),
        cost,
        _optional(result.duty, 2),
        _optional(result.batch, 0),
        case.peer_name,
        _spread(result.peer_mpps),
        f"{result.ratio.median:.2f} [{result.ratio.low:.2f}-{result.ratio.high:.2f}]",
        f"{result.placement}, {result.distance_ns:.0f} ns",
        str(result.rounds),
    ]


def _figure_cells(figure: Figure) -> list[str]:
    ratio = _optional(figure.ratio, 2)
    if figure.spread is not None:
        ratio += f" [{figure.spread[0]:.2f}-{figure.spread[1]:.2f}]"
    return [
        figure.case,
        figure.what,
        f"{number(figure.value)} {figure.unit}",
        figure.peer or "-",
        "-" if figure.peer_value is None else f"{number(figure.peer_value)} {figure.unit}",
        ratio,
    ]


@attrs.frozen
class Report:
    """The results of a run, the cases that were skipped (a line each), the facts of the host."""

    results: Sequence[Result]
    figures: Sequence[Figure]
    skipped: Sequence[str]
    host: dict[str, str]
    rounds: int

    def goals(self) -> list[Goal]:
        """Return all goals of what was measured."""
        return [goal for result in self.results for goal in result.goals()] + [
            goal for figure in self.figures for goal in figure.goals()
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the object that --json prints."""
        return {
            "cases": [
                *(result.to_json() for result in self.results),
                *(figure.to_json() for figure in self.figures),
            ],
            "goals": [{**attrs.asdict(goal), "met": goal.met} for goal in self.goals()],
            "skipped": list(self.skipped),
            "host": self.host,
        }

    def text(self) -> str:
        """Return the results for a terminal."""
        parts: list[str] = []
        if self.results:
            rows = [_rate_cells(result) for result in self.results]
            parts.append(_plain([_RATES[at] for at in _BRIEF], [[row[at] for at in _BRIEF] for row in rows]))
        if self.figures:
            parts.append(_plain(_FIGURES, [_figure_cells(figure) for figure in self.figures]))
        if self.goals():
            parts.append(_plain(_GOALS, self._goal_rows()))
        return "\n\n".join(parts)

    def _goal_rows(self) -> list[list[str]]:
        return [
            [goal.text, goal.case, f"{number(goal.value)} {goal.unit}", "met" if goal.met else "MISSED"]
            for goal in self.goals()
        ]

    def markdown(self, plot: str = "") -> str:
        """Return the generated part of docs/performance.md; `plot` is the file of the picture, if there is one."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        parts = [
            BEGIN,
            f"Measured on {today}, {self.rounds} rounds; median [smallest-largest] over the rounds, the ratio taken"
            " inside each round.",
        ]
        if plot:
            parts.append(f"![The ratios of all cases]({plot})")
        if self.results:
            parts += ["### Packets a second", _markdown(_RATES, map(_rate_cells, self.results))]
        if self.figures:
            parts += ["### Other measures", _markdown(_FIGURES, map(_figure_cells, self.figures))]
        goals = self.goals()
        if goals:
            met = f"{sum(goal.met for goal in goals)} of {len(goals)} are met."
            parts += ["### Goals", met, _markdown(_GOALS, self._goal_rows())]
        if self.skipped:
            parts += ["### Not measured", "\n".join(f"- {line}" for line in self.skipped)]
        parts += ["### The machine", _markdown(("", ""), [(name, value) for name, value in self.host.items()]), END]
        return "\n\n".join(parts)

    def plot(self, path: Path) -> None:
        """Draw the ratios. LocalError where that cannot be."""
        from vhostmp.tools.bench import plot  # noqa: PLC0415 - matplotlib takes a second, and may be missing

        plot.draw(self.results, path)

    def update(self, path: Path) -> None:
        """Replace the generated part of the file `path`, and draw beside it. LocalError when it has no such part."""
        picture = ""
        try:
            text = path.read_text()
            before, found, rest = text.partition(BEGIN)
            _, end, after = rest.partition(END)
            if not found or not end:
                raise LocalError(f"{path} has no lines '{BEGIN}' and '{END}'")
            if self.results:
                self.plot(path.with_name(PLOT))
                picture = PLOT
            path.write_text(f"{before}{self.markdown(picture)}{after}")
        except OSError as error:
            raise LocalError(f"cannot update {path}: {error.strerror}") from error
