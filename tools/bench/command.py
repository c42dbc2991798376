"""`vhostmp bench`: packets a second, and what else counts, beside programs that do the same.

Exit status 0 when everything asked for was measured or skipped with a line that says why, 1 when nothing could be
measured, 2 for a mistake on the command line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NoReturn

import attrs

from vhostmp.errors import LocalError, VhostError
from vhostmp.tools import demo_plot
from vhostmp.tools.bench import cases, host, measures, placement
from vhostmp.tools.bench.cases import CASES, RING_FORMATS, Case
from vhostmp.tools.bench.figures import Figure, Measure
from vhostmp.tools.bench.programs import MEGABYTES, TESTPMD
from vhostmp.tools.bench.report import PLOT, Report
from vhostmp.tools.bench.rounds import Result, evaluate
from vhostmp.tools.bench.runner import peer_costs, run_case
from vhostmp.tools.bench.sides import Plan, obstacle

ROUNDS: Final = 5
QUICK_ROUNDS: Final = 2
QUICK_WINDOWS: Final = 2
#: What --quick may take: no round is begun that does not fit in, and later than the last nothing goes on.
QUICK_SECONDS: Final = 40.0
QUICK_LAST_SECONDS: Final = 45.0
DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
#: testpmd at both ends, and room for it to start while the last one ends.
HUGE_MEGABYTES: Final = 2 * MEGABYTES

EPILOG: Final = f"""\
cases:    {" ".join(dict.fromkeys(case.name for case in CASES))}
measures: {" ".join(measure.name for measure in measures.MEASURES)}

A case has sizes: null means null-64, null-512 and null-1500; patterns such as '*-64' will do. Two processors are
needed; root and dpdk-testpmd (apt-get install dpdk-dev) for those cases that have DPDK, a tap or real-time priorities.

examples:
  vhostmp bench --quick                      a first look, in less than 50 s; needs nothing
  vhostmp bench --case loopback --ring packed
  vhostmp bench --json > bench.json          everything: half an hour, on a machine that does nothing else
"""


class OutOfTime(Exception):
    """The time of a first look is over."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Measure packets a second, latency and costs beside DPDK's vhost and bare loops."
    parser.epilog = EPILOG
    parser.add_argument(
        "--case", metavar="NAME", nargs="+", action="extend", help="measure only these cases or measures (default: all)"
    )
    parser.add_argument(
        "--ring",
        choices=RING_FORMATS,
        nargs="+",
        action="extend",
        help="formats of the virtqueues (default: both, where it matters)",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"a first look in less than 50 s: some cases, {QUICK_ROUNDS} rounds"
    )
    parser.add_argument("--rounds", metavar="N", type=int, help=f"rounds of each case (default: {ROUNDS})")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the ratios (needs matplotlib)")
    parser.add_argument(
        "--update", action="store_true", help=f"write the results to docs/{DOCUMENT.name} as well, in the checkout"
    )
    parser.add_argument(
        "--against-itself",
        action="store_true",
        help="the peer on both sides: the ratios must come out as 1 (proves the harness)",
    )


@attrs.frozen
class Work:
    """What is to be done."""

    cases: Sequence[Case]
    measures: Sequence[Measure]


def chosen(args: argparse.Namespace) -> Work:
    """Return what the arguments ask for. LocalError for what makes no sense."""
    if args.rounds is not None and args.rounds < 1:
        raise LocalError("--rounds: choose 1 or more")
    if args.update and (args.against_itself or args.quick):
        raise LocalError("--update wants real results: not with --quick or --against-itself")
    if args.plot or args.update:
        demo_plot.check(str(args.plot or DOCUMENT.with_name(PLOT)))
    if args.update and not DOCUMENT.exists():
        raise LocalError("--update needs a checkout: there is no docs/performance.md beside an installed vhostmp")
    names = args.case or ["*"]
    work = Work(
        (cases.quick if args.quick else cases.choose)(names, args.ring),
        [] if args.against_itself else measures.choose(names, quick=args.quick),
    )
    if not work.cases and not work.measures:
        raise LocalError(f"no case is called {' '.join(names)}{' in --quick' * args.quick}: see --help")
    return work


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


class Run:
    """A run: what has been found so far."""

    def __init__(self, plan: Plan, *, quick: bool) -> None:
        """Begin."""
        self.plan: Final = plan
        self.quick: Final = quick
        self.results: list[Result] = []
        self.figures: list[Figure] = []
        self.skipped: list[str] = []
        self.distances: list[float] = []
        self._dpdk = "" if shutil.which(TESTPMD) else f"no {TESTPMD}: as root, apt-get install dpdk-dev, or make peers"

    def everything(self, work: Work) -> None:
        """Measure all of it."""
        with ExitStack() as stack:
            if not self._dpdk and any(case.needs_dpdk for case in work.cases):
                try:
                    stack.enter_context(host.huge_pages(HUGE_MEGABYTES))
                except VhostError as error:
                    self._dpdk = str(error)
            for case in work.cases:
                self.case(case)
            for measure in work.measures:
                self.measure(measure)

    def case(self, case: Case) -> None:
        """Measure a case, or note why not."""
        name = f"{case.title} {case.ring_format}"
        try:
            reason = obstacle(case, dpdk=self._dpdk)
            if reason:
                raise LocalError(reason)
            rounds = run_case(case, self.plan, say)
            if not rounds:
                raise LocalError("no time left for it")
        except VhostError as error:
            self.skipped.append(f"{name}: {error}")
            return
        windows = [window for done in rounds for window in (*done.ours, *done.peer)]
        self.distances += [window.before_ns for window in windows if window.before_ns > 0]
        result = evaluate(case, rounds, disturbed=self.quick)
        if result is None:
            self.skipped.append(
                f"{name}: in no round both sides had the cores to themselves; try again on a quiet machine"
            )
            return
        self.results.append(self.beside_peer(result) if case.cost_goal else result)
        say(
            f"{name}: {result.mpps.text()} against {result.peer_mpps.text()} Mpps, ratio {result.ratio.text()},"
            f" {result.placement}; {result.dropped} of {len(windows)} windows dropped"
        )

    def beside_peer(self, result: Result) -> Result:
        """Return a result with what a packet costs DPDK, or note why that is not known."""
        case = result.case
        reason = f"no window in which DPDK counted had the cores {result.placement}"
        try:
            result = result.beside(peer_costs(case, self.plan, result.placement))
        except VhostError as error:
            reason = str(error)
        if result.peer_ns_per_packet is None:
            self.skipped.append(f"{case.title} {case.ring_format}: processor time against DPDK's: {reason}")
        return result

    def measure(self, measure: Measure) -> None:
        """Take a measure, or note why not."""
        try:
            if self.plan.seconds_left < measure.seconds:
                raise LocalError("no time left for it")
            say(f"{measure.name}: {measure.text}")
            self.figures += measure.take(self.plan)
        except VhostError as error:
            self.skipped.append(f"{measure.name}: {error}")


@contextmanager
def limited(seconds: float) -> Generator[None]:
    """Raise OutOfTime in the block when it takes longer; 0.0: no limit."""

    def over(number: int, frame: object) -> NoReturn:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def run(args: argparse.Namespace) -> int:
    """Run the benchmarks; returns the exit status. Raises: VhostError."""
    work = chosen(args)
    began = time.monotonic()
    fifo = placement.can_use_fifo()
    facts = host.facts(fifo=fifo)
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    plan = Plan(placement.Cores.choose(), fifo, rounds, against_itself=args.against_itself)
    if args.quick:
        plan = attrs.evolve(plan, windows=QUICK_WINDOWS, tries=1, deadline=began + QUICK_SECONDS)
    found = Run(plan, quick=args.quick)
    try:
        with limited(QUICK_LAST_SECONDS if args.quick else 0.0):
            found.everything(work)
    except OutOfTime:
        found.skipped.append("what was to come after that: no time left")
    facts |= {"core to core": host.distance_text(found.distances)}
    report = Report(found.results, found.figures, found.skipped, facts, rounds)
    print(json.dumps(report.to_json(), indent=1) if args.json else report.text())
    for line in found.skipped:
        say(f"skipped: {line}")
    if args.plot:
        report.plot(args.plot)
    if args.update and (found.results or found.figures):
        report.update(DOCUMENT)
    return 0 if found.results or found.figures else 1
