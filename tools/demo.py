"""`vhostmp demo`: back-ends are swapped and guest memory is moved under full load, and every packet is counted.

No root, no QEMU, no set-up. A software guest for each worker sends numbered packets through a real worker process
as fast as both can, while the back-end is swapped between the compiled loopback and one written in Python, about a
hundred times a second, and the guest's packet memory is moved every quarter of a second. As the last act a worker is
killed and replaced. What is printed at the end is counted by the guests, byte by byte; nothing of it is assumed.

Exit status: 0 when nothing was lost, repeated, reordered or damaged before the kill, no worker died before it and
traffic went on after it; 1 otherwise, with the reasons on stderr.

With `--chaos` it is another piece (demo_chaos.py): workers are killed all the time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import attrs

from vhostmp.errors import LocalError, VhostError
from vhostmp.tools import demo_chaos, demo_plot, guest
from vhostmp.tools.demo_stage import BACKENDS, Quantiles, Stage

SWAPS_PER_SECOND: Final = 110
#: A move after so many swaps: an odd number, so that both back-ends see moves.
SWAPS_PER_MOVE: Final = 25
#: Traffic between two swaps, at least, seconds.
BREATH_SECONDS: Final = 0.001
#: Traffic after the killed worker was replaced, seconds.
AFTERMATH_SECONDS: Final = 0.3
SECONDS_DEFAULT: Final = 12.0
SECONDS_MIN: Final = 1.0
SECONDS_MAX: Final = 3600.0
KILLS_DEFAULT: Final = 200
KILLS_MAX: Final = 1_000_000
SEED_MAX: Final = (1 << 32) - 1
WORKERS_MAX: Final = 64
TTY_INTERVAL: Final = 0.1
LINE_INTERVAL: Final = 1.0


@attrs.frozen
class Report:
    """What a run came to. `problems` is empty when all went well."""

    packets: int
    lost: int
    duplicated: int
    reordered: int
    swaps: int
    memory_moves: int
    restarts: int
    pause_us: Quantiles
    grace_us: Quantiles
    kill_lost: int
    kill_duplicated: int
    seconds: float
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the object `--json` prints. A damaged packet is among the lost: its number never came back."""
        return {
            "packets": self.packets,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "reordered": self.reordered,
            "swaps": self.swaps,
            "memory_moves": self.memory_moves,
            "restarts": self.restarts,
            "pause_us": attrs.asdict(self.pause_us),
            "grace_us": attrs.asdict(self.grace_us),
            "kill": {"lost": self.kill_lost, "duplicated": self.kill_duplicated},
        }

    def to_table(self) -> str:
        """Return the table for people."""

        def times(name: str, value: Quantiles) -> tuple[str, str]:
            return name, f"median {value.p50:,.0f} us, 99 % {value.p99:,.0f} us, max {value.max:,.0f} us"

        rows = [
            ("packets", f"{self.packets:,}  ({self.packets / max(self.seconds, 1e-9) / 1e6:.2f} million a second)"),
            ("lost", f"{self.lost:,}"),
            ("duplicated", f"{self.duplicated:,}"),
            ("reordered", f"{self.reordered:,}"),
            ("swaps", f"{self.swaps:,}"),
            ("memory moves", f"{self.memory_moves:,}"),
            times("pause", self.pause_us),
            times("grace period", self.grace_us),
            ("restarts", f"{self.restarts:,}"),
            ("the kill", f"lost {self.kill_lost:,}, duplicated {self.kill_duplicated:,}"),
        ]
        return "\n".join(f"{name:<14}{text}" for name, text in rows)


class Progress:
    """One line that is rewritten on a terminal; a line a second elsewhere. Goes to stderr."""

    def __init__(self, quiet: bool = False) -> None:
        """Write nothing where `quiet`."""
        self._tty = sys.stderr.isatty()
        self._quiet = quiet
        self._next = 0.0
        self._width = 0

    def __call__(self, stage: Stage, started: float, total: float, act: str = "", *, force: bool = False) -> None:
        """Show where `stage` is, if it is time to."""

        def text() -> str:
            counters = stage.counters()
            wrong = sum(counters[name] for name in ("lost", "duplicated", "reordered", "corrupted"))
            return (
                f"{time.monotonic() - started:5.1f}/{total:.0f} s  {counters['received']:>13,} packets  "
                f"{len(stage.swaps):>5,} swaps  {len(stage.moves_ns):>3} moves  {wrong} wrong  "
                f"{act or stage.backend.partition(':')[0]}"
            )

        self.line(text, force=force)

    def line(self, make: Callable[[], str], *, force: bool = False) -> None:
        """Show the line that `make` returns, if it is time to."""
        now = time.monotonic()
        if self._quiet or (now < self._next and not force):
            return
        self._next = now + (TTY_INTERVAL if self._tty else LINE_INTERVAL)
        text = make()
        if self._tty:
            sys.stderr.write(f"\r{text:<{self._width}}")
            self._width = len(text)
        else:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the line as it is and go on below it."""
        if self._tty and not self._quiet and self._width:
            sys.stderr.write("\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `vhostmp demo`."""
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=_between(SECONDS_MIN, SECONDS_MAX, float),
        help=f"how long to swap (default: {SECONDS_DEFAULT:g}, which makes about 1,300 swaps)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_between(1, WORKERS_MAX, int),
        help="worker processes, each with a queue pair and a guest of its own (default: 1; with --chaos 2)",
    )
    parser.add_argument(
        "--ring", choices=("split", "packed"), default="split", help="format of the virtqueues (default: split)"
    )
    parser.add_argument(
        "--chaos",
        action="store_true",
        help="kill workers at random moments, amid swaps and moves of memory",
    )
    parser.add_argument(
        "--kills",
        metavar="N",
        type=_between(1, KILLS_MAX, int),
        help=f"with --chaos: how many (default: {KILLS_DEFAULT})",
    )
    parser.add_argument(
        "--calm", action="store_true", help="with --chaos: kill and do nothing else: what a replacement takes by itself"
    )
    parser.add_argument(
        "--seed",
        metavar="S",
        type=_between(0, SEED_MAX, int),
        help="with --chaos: repeat an earlier run's choices",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table, and no progress")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="draw packets a millisecond with the swaps marked (needs matplotlib)"
    )


def _between(low: float, high: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return an argument type: a number within low..high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number in {low:g}..{high:g}")
        return value

    return parse


def run(args: argparse.Namespace) -> int:
    """Run the demo as the command line says; returns the exit status. Raises: VhostError for what cannot be started."""
    for option in ("kills", "seed") if not args.chaos else ("seconds", "plot"):
        if getattr(args, option) is not None:
            raise LocalError(f"--{option} goes with{'out' if args.chaos else ''} --chaos")
    if args.calm and not args.chaos:
        raise LocalError("--calm goes with --chaos")
    if args.plot:
        demo_plot.check(args.plot)
    progress = Progress(quiet=args.json)
    workers = args.workers or (2 if args.chaos else 1)
    seconds = args.seconds or SECONDS_DEFAULT
    layout = guest.Layout(pairs=workers, packed=args.ring == "packed")
    report: Report | demo_chaos.Report
    if args.chaos:
        seed = secrets.randbelow(SEED_MAX) if args.seed is None else args.seed
        print(f"seed {seed}", file=sys.stderr)
        try:
            report = demo_chaos.perform(
                workers, layout, args.kills or KILLS_DEFAULT, seed, progress.line, calm=args.calm
            )
        finally:
            progress.end()
    else:
        with Stage(workers=workers, layout=layout, seconds=seconds) as stage:
            try:
                report = perform(stage, seconds, progress)
            finally:
                progress.end()
            if args.plot:
                demo_plot.draw(stage, report.seconds, args.plot)
    print(json.dumps(report.to_json()) if args.json else report.to_table())
    for problem in report.problems:
        print(f"vhostmp: demo failed: {problem}", file=sys.stderr)
    return 1 if report.problems else 0


def perform(
    stage: Stage, seconds: float, progress: Progress | None = None, acts: Iterable[Callable[[], object]] | None = None
) -> Report:
    """Play the whole piece on `stage`: `acts` (swaps and moves) for `seconds` at most, then the kill.

    A worker that dies before its time ends the piece early. Does not raise VhostError: it is among the problems.
    """
    show = progress or Progress(quiet=True)
    started = time.monotonic()
    problems: list[str] = []
    early_restarts = 0
    try:
        for act in acts or swaps_and_moves(stage):
            act()
            show(stage, started, seconds)
            early_restarts = stage.pool.restarts
            if early_restarts or time.monotonic() > started + seconds:
                break
        if not early_restarts:
            show(stage, started, seconds, "killing a worker", force=True)
            stage.kill()
            time.sleep(AFTERMATH_SECONDS)
        stage.settle()
        show(stage, started, seconds, "done", force=True)
    except VhostError as error:
        problems.append(str(error))
        early_restarts = early_restarts if stage.kill_ns else stage.pool.restarts
        with contextlib.suppress(VhostError):
            stage.settle()
    counters = stage.counters()
    problems += judge(counters, stage, early_restarts)
    return Report(
        packets=counters["received"],
        lost=counters["lost"],
        duplicated=counters["duplicated"],
        reordered=counters["reordered"],
        swaps=len(stage.swaps),
        memory_moves=len(stage.moves_ns),
        restarts=stage.pool.restarts,
        pause_us=Quantiles.of([pause / 1e3 for pause in stage.pauses_ns()]),
        grace_us=Quantiles.of([swap.grace_us for swap in stage.swaps]),
        kill_lost=counters["kill_lost"],
        kill_duplicated=counters["kill_duplicated"],
        seconds=time.monotonic() - started,
        problems=tuple(problems),
    )


def swaps_and_moves(stage: Stage) -> Iterator[Callable[[], object]]:
    """Yield swaps at a steady rate, without end, and a move of memory now and then."""
    due = time.monotonic()
    for number in itertools.count(1):
        yield functools.partial(stage.swap, BACKENDS[number % len(BACKENDS)])
        if number % SWAPS_PER_MOVE == 0:
            # Not at once: a move is a millisecond of work for this process, a pause that would be put down to the swap.
            time.sleep(BREATH_SECONDS)
            yield stage.move
        # After a delay there is nothing to be made up for.
        due = max(due + 1 / SWAPS_PER_SECOND, time.monotonic() + BREATH_SECONDS)
        time.sleep(max(0.0, due - time.monotonic()))


def judge(counters: dict[str, int], stage: Stage, early_restarts: int) -> list[str]:
    """Return what was wrong, a line each."""
    wrong = [
        f"{counters[name]:,} packets {name}"
        for name in ("lost", "duplicated", "reordered", "corrupted")
        if counters[name]
    ]
    if counters["violations"]:
        wrong.append(f"{counters['violations']:,} used entries that no correct device writes")
    if stage.stray_writes:
        wrong.append(f"old guest memory was written to after {stage.stray_writes} memory moves")
    if early_restarts:
        wrong.append(f"workers died before the kill: {early_restarts}")
    swaps = len(stage.swaps) * len(stage.boards)
    if not wrong and counters["pauses"] != swaps:
        wrong.append(f"{counters['pauses']} pauses measured for {swaps} swaps")
    return wrong


def main() -> int:
    """Run the demo without the rest of the command line, for `python -m vhostmp.tools.demo`."""
    parser = argparse.ArgumentParser(prog="python -m vhostmp.tools.demo", description="swap back-ends under full load")
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except LocalError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
