"""`python -m vhostmp.tools.bench`: packets a second beside DPDK's vhost and a bare write loop.

Exit status 0 when everything asked for was measured or skipped with a line that says why, 1 when nothing could be
measured, 2 for a mistake on the command line.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs

from vhostmp.errors import VhostError
from vhostmp.tools.bench import host, placement
from vhostmp.tools.bench.cases import CASES, RING_FORMATS, Case, Result, evaluate
from vhostmp.tools.bench.programs import MEGABYTES, TESTPMD
from vhostmp.tools.bench.report import Report
from vhostmp.tools.bench.runner import Plan, run_case

ROUNDS: Final = 5
QUICK_ROUNDS: Final = 2
QUICK_SIZE: Final = 64
DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
#: testpmd at both ends, and room for it to start while the last one ends.
HUGE_MEGABYTES: Final = 2 * MEGABYTES


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vhostmp.tools.bench",
        description="Measure packets a second against DPDK's vhost back-end and against a bare write loop on a tap.",
        epilog=f"cases: {' '.join(case.title for case in CASES)}",
    )
    parser.add_argument(
        "--case", metavar="NAME", nargs="+", default=["*"], help="measure only these; null and null-* mean all sizes"
    )
    parser.add_argument(
        "--ring", choices=RING_FORMATS, nargs="+", default=["split"], help="formats of the virtqueues (default: split)"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of the {QUICK_SIZE}-byte cases: a first look"
    )
    parser.add_argument("--rounds", metavar="N", type=int, help=f"rounds of each case (default: {ROUNDS})")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--update", action="store_true", help=f"write the results to docs/{DOCUMENT.name} as well")
    parser.add_argument(
        "--against-itself",
        action="store_true",
        help="DPDK, or the bare loop, on both sides: the ratios must come out as 1 (proves the harness)",
    )
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    args.cases = choose(args.case, args.ring, quick=args.quick)
    if args.rounds < 1:
        parser.error("--rounds: choose 1 or more")
    if not args.cases:
        parser.error(f"no case is called {' '.join(args.case)}; there are {' '.join(case.title for case in CASES)}")
    if args.update and (args.against_itself or args.quick):
        parser.error("--update wants real results: not with --quick or --against-itself")
    return args


def choose(names: Sequence[str], formats: Sequence[str] = RING_FORMATS[:1], *, quick: bool) -> list[Case]:
    """Return the cases that `names` (patterns of a name or of a name with its size) select, in each ring format."""
    return [
        attrs.evolve(case, packed=form == "packed")
        for case in CASES
        for form in formats
        if any(fnmatch.fnmatch(case.title, name) or case.name == name for name in names)
        and not (quick and case.size != QUICK_SIZE)
    ]


def obstacle(case: Case) -> str:
    """Return why a case cannot be measured here, "" when it can."""
    if shutil.which(TESTPMD) is None:
        return f"{case.title}: no {TESTPMD}; as root: apt-get install dpdk-dev, or make peers"
    if case.backend == "tap" and not Path("/dev/net/tun").exists():
        return f"{case.title}: no /dev/net/tun"
    return ""


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit status."""
    args = parse(argv)
    results: list[Result] = []
    skipped: list[str] = []
    distances: list[float] = []
    fifo = placement.can_use_fifo()
    facts = host.facts(fifo=fifo)
    try:
        plan = Plan(placement.Cores.choose(), fifo, args.rounds, against_itself=args.against_itself)
        with ExitStack() as stack:
            possible = [case for case in args.cases if not obstacle(case)]
            skipped += [obstacle(case) for case in args.cases if obstacle(case)]
            if possible:
                stack.enter_context(host.huge_pages(HUGE_MEGABYTES))
            for case in possible:
                measure(case, plan, results, skipped, distances)
    except VhostError as error:
        say(f"bench: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    facts |= {"core to core": host.distance_text(distances)}
    report = Report(results, skipped, facts, args.rounds)
    print(json.dumps(report.to_json(), indent=1) if args.json else report.table())
    for line in skipped:
        say(f"skipped: {line}")
    if args.update and results:
        report.update(DOCUMENT)
    return 0 if results else 1


def measure(case: Case, plan: Plan, results: list[Result], skipped: list[str], distances: list[float]) -> None:
    """Measure one case into `results`, or say in `skipped` why not."""
    try:
        rounds = run_case(case, plan, say)
    except VhostError as error:
        skipped.append(f"{case.title}: {error}")
        return
    windows = [window for done in rounds for window in (*done.ours, *done.peer)]
    distances += [window.before_ns for window in windows if window.before_ns > 0]
    result = evaluate(case, rounds)
    if result is None:
        skipped.append(
            f"{case.title}: in no round both sides had the cores to themselves; try again on a quiet machine"
        )
        return
    results.append(result)
    say(
        f"{case.title}: {result.mpps.text()} against {result.peer_mpps.text()} Mpps, ratio {result.ratio.text()},"
        f" {result.placement}; {result.dropped} of {len(windows)} windows dropped"
    )


if __name__ == "__main__":
    sys.exit(main())
