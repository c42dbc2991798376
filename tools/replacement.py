"""`python -m vhostmp.tools.replacement FILE.svg`: how long a replacement takes, as a table and a figure.

For docs/reliability.md. `vhostmp demo --chaos` (demo_chaos.py) is played for each format of ring, with and without
swaps and moves in between. A line of the figure says around how many kills in a hundred the pause, as the guest saw it,
was at most so long; the table is in Markdown. To be run with nothing else on the machine.

Exit status: 0 when nothing was lost, stuck or leaked; 1 otherwise, with the reasons on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from vhostmp.errors import LocalError, VhostError
from vhostmp.logs import writing_to
from vhostmp.tools import demo_chaos, demo_plot
from vhostmp.tools.guest import Layout

KILLS_DEFAULT: Final = 1000
HEADER: Final = (
    "| | kills | median | 99th percentile | longest | lost | repeated | stuck, leaked |\n"
    "|---|---|---|---|---|---|---|---|"
)
_STYLES: Final = {True: "--", False: "-"}
_COLORS: Final = {"split": "tab:blue", "packed": "tab:orange"}


@attrs.frozen
class Run:
    """One run and how it was made."""

    ring: str
    calm: bool
    report: demo_chaos.Report

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{'`--calm`' if self.calm else 'with swaps and moves'}, {self.ring}"

    def row(self) -> str:
        """Return its row of the table."""
        report, times = self.report, self.report.replacement_ms
        left = report.stuck_rings + report.leaked_descriptors + report.leaked_fds + report.leaked_segments
        cells = (f"{report.kills:,}", *(f"{times[name]:.1f} ms" for name in ("p50", "p99", "max")))
        return f"| {self.name} | {' | '.join(cells)} | {report.lost_tx} | {report.duplicated:,} | {left} |"


def shares(pauses_ms: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return pauses, ascending, and of how many in a hundred each one is the longest."""
    ordered = sorted(pauses_ms)
    return ordered, [100 * (place + 1) / len(ordered) for place in range(len(ordered))]


def draw(runs: Sequence[Run], path: str) -> None:
    """Draw the distributions into a file. LocalError when it cannot be written."""
    figure: Any = importlib.import_module("matplotlib.figure").Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        times, percent = shares(run.report.pauses_ms)
        name = f"{run.ring}, {'nothing else going on' if run.calm else 'with swaps and moves'}"
        axes.step(times, percent, where="post", label=name, color=_COLORS[run.ring], linestyle=_STYLES[run.calm])
    axes.axhline(99, color="0.7", linewidth=0.8)
    axes.axvline(20, color="0.7", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="milliseconds without a packet, at most", ylabel="around so many kills in a hundred", ylim=(0, 100))
    axes.legend(loc="lower right")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise LocalError(f"cannot write {path}: {error.strerror or error}") from error


def play(kills: int, seed: int) -> Iterator[Run]:
    """Play every run."""
    for calm in (True, False):
        for ring in ("split", "packed"):
            layout = Layout(packed=ring == "packed")
            yield Run(ring, calm, demo_chaos.perform(1, layout, kills, seed, lambda make: None, calm=calm))


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vhostmp.tools.replacement", description="Measure how long a killed worker's replacement takes."
    )
    parser.add_argument("path", metavar="FILE", help="the figure: .svg, .png or .pdf")
    parser.add_argument("--kills", metavar="N", type=int, default=KILLS_DEFAULT, help=f"default: {KILLS_DEFAULT}")
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="default: 1")
    args = parser.parse_args(argv)
    if args.kills < 1:
        parser.error("--kills: choose 1 or more")
    try:
        demo_plot.check(str(Path(args.path)))
        print(HEADER, flush=True)
        runs: list[Run] = []
        with writing_to(sys.stderr, "error"):  # each kill is logged, else
            for run in play(args.kills, args.seed):
                runs.append(run)
                print(run.row(), flush=True)
                for problem in run.report.problems:
                    print(f"replacement: {run.name}: {problem}", file=sys.stderr)
        draw(runs, args.path)
    except VhostError as error:
        print(f"replacement: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return int(any(run.report.problems for run in runs))


if __name__ == "__main__":
    sys.exit(main())
