"""`vhostmp stress`: finds what is wrong with a vhost-user back-end."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Final

from vhostmp.errors import LocalError
from vhostmp.tools.stress import load, report
from vhostmp.tools.stress.clause import FORMATS, PROFILES, Clause
from vhostmp.tools.stress.clauses import load_all
from vhostmp.tools.stress.examiner import asked
from vhostmp.tools.stress.result import Result
from vhostmp.tools.stress.runner import Plan, Runner, check
from vhostmp.tools.stress.target import DEVICES, PATIENCE, Facts
from vhostmp.tools.stress.verdict import Verdict

RANDOM_SECONDS: Final = 5.0
BAR: Final = 30

DESCRIPTION: Final = """\
Drives a vhost-user back-end from outside, as a front-end and a driver that are careful (good), odd but right (edge)
or hostile, and says clause by clause what it gets wrong. After each clause a new connection must find it well.

The back-end must be one that you may break: a network back-end is sent frames, a disk (--device blk) is written to.
"""

EPILOG: Final = """\
examples:
  vhostmp serve --socket-path /tmp/s.sock --backend loopback --queue-pairs 3 &
  vhostmp stress --socket-path /tmp/s.sock --pid $!
  vhostmp stress --socket-path /tmp/s.sock --profile hostile --html report.html
  vhostmp stress --socket-path /tmp/s.sock --clause ring-next-loop.split --seed 7     the same again
  vhostmp stress --socket-path /tmp/s.sock --load --processes 2 --time 10             packets a second, percentiles;
                                                                                      a queue pair more than processes
  vhostmp stress --list                                                               all clauses, with their sources

Exit status: 0 when no clause fails, 1 when one does, 2 when the back-end cannot be reached or does not work at all.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    where = parser.add_argument_group("the back-end")
    where.add_argument(
        "--socket-path",
        metavar="PATH",
        type=Path,
        action="append",
        default=[],
        help="its UNIX socket; again for each further socket of the same back-end, see --jobs",
    )
    where.add_argument("--listen", action="store_true", help="listen on PATH: the back-end is one that connects")
    where.add_argument("--device", choices=DEVICES, default="net", help="its class of device (default: net)")
    where.add_argument(
        "--pid",
        metavar="PID",
        type=int,
        help="the process that listens there: descriptors and memory that leak are found, and deaths",
    )
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--profile",
        choices=(*PROFILES, "all"),
        action="append",
        help="good: what a careful driver does; edge: rare, but right; hostile: neither (default: all)",
    )
    what.add_argument(
        "--clause", metavar="ID", action="append", default=[], help="ask this clause alone; may be given again"
    )
    what.add_argument("--list", action="store_true", help="print the clauses with their questions and sources")
    how = parser.add_argument_group("how")
    how.add_argument("--seed", metavar="N", type=int, help="of all chance (default: another each time; it is printed)")
    how.add_argument(
        "--time",
        metavar="S",
        type=float,
        default=RANDOM_SECONDS,
        help=f"how long each clause that tries at random goes on, seconds (default: {RANDOM_SECONDS:g})",
    )
    how.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        help="clauses asked at a time, each through a socket of its own (default: as many as sockets); with more than "
        "one nobody can say whose doing a leak is: none is looked for",
    )
    how.add_argument(
        "--patience",
        metavar="S",
        type=float,
        default=PATIENCE,
        help=f"how long the back-end may take to listen and to answer, seconds (default: {PATIENCE:g})",
    )
    how.add_argument("--verbose", "-v", action="store_true", help="print every clause, not only those that fail")
    heavy = parser.add_argument_group("as load, instead of clauses (net, with a back-end that sends frames back)")
    heavy.add_argument(
        "--load", action="store_true", help="keep rings full for --time seconds; say packets a second and latency"
    )
    heavy.add_argument(
        "--processes",
        metavar="N",
        type=int,
        default=1,
        help="guests, each with a queue pair of its own, beside the first one of the back-end (default: 1)",
    )
    heavy.add_argument("--size", metavar="B", type=int, default=64, help="bytes of a frame, 60 to 1514 (default: 64)")
    heavy.add_argument("--ring", choices=FORMATS, default="split", help="format of the rings (default: split)")
    out = parser.add_argument_group("reports (FILE: - is standard output)")
    out.add_argument("--json", metavar="FILE", help="write the verdicts as JSON")
    out.add_argument("--junit", metavar="FILE", help="write them as JUnit's XML, for CI")
    out.add_argument("--html", metavar="FILE", help="write a page to read")


class Progress:
    """Says on standard error how far the run is: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        """Begin."""
        self.total: Final = total
        self.done = 0
        self.failed = 0
        self._tty = sys.stderr.isatty()

    def step(self, result: Result) -> None:
        """Count a result."""
        self.done += 1
        self.failed += result.verdict is Verdict.FAIL
        filled = BAR * self.done // self.total
        if self._tty:
            bar = "#" * filled + "." * (BAR - filled)
            print(
                f"\r[{bar}] {self.done}/{self.total}  {self.failed} failed  {result.id:<40.40}",
                end="",
                file=sys.stderr,
                flush=True,
            )
        elif self.done % 25 == 0 or self.done == self.total:
            print(
                f"vhostmp stress: {self.done}/{self.total} clauses, {self.failed} failed", file=sys.stderr, flush=True
            )

    def close(self) -> None:
        """End the line."""
        if self._tty and self.done:
            print(file=sys.stderr)


def _print_list(clauses: Sequence[Clause]) -> None:
    for one in clauses:
        print(f"{one.id:<40} {one.profile:<8} {one.question}\n{'':<40} {'':<8} {one.source}")
    counts = Counter(one.profile for one in clauses)
    print(f"{len(clauses)} clauses: {', '.join(f'{count} {profile}' for profile, count in counts.items())}")


def _plan(args: argparse.Namespace) -> Plan:
    load_all()
    profiles = list(PROFILES) if not args.profile or "all" in args.profile else args.profile
    try:
        clauses = asked(profiles, args.clause)
    except KeyError as unknown:
        raise LocalError(f"there is no clause {unknown}: 'vhostmp stress --list' names them") from None
    paths = tuple(args.socket_path)
    if not args.list and not paths:
        raise LocalError("no --socket-path: give the socket of the back-end")
    jobs = len(paths) if args.jobs is None else args.jobs
    if not args.list and not 1 <= jobs <= len(paths):
        raise LocalError(f"--jobs {jobs}: give --socket-path as often, a back-end serves one front-end on each")
    if len(set(paths)) != len(paths):
        raise LocalError("the same --socket-path is given twice")
    for option, seconds in (("--time", args.time), ("--patience", args.patience)):
        if not seconds > 0:
            raise LocalError(f"{option} {seconds:g} is not a positive number of seconds")
    seed = random.SystemRandom().randrange(1 << 31) if args.seed is None else args.seed
    return Plan(paths[:jobs], args.device, args.listen, args.pid, tuple(clauses), seed, args.time, args.patience)


def _load(args: argparse.Namespace) -> int:
    """Load the back-end, and report; returns the exit status. Raises: LocalError."""
    if len(args.socket_path) != 1 or args.device != "net" or args.listen:
        raise LocalError("--load needs one --socket-path, of a network back-end that listens there")
    if args.time <= 0:
        raise LocalError(f"--time {args.time:g} is not a positive number of seconds")
    if args.json:
        _check_writable(args.json)
    done = load.run(load.Load(args.socket_path[0], args.processes, args.size, args.time, args.ring == "packed"))
    if args.json:
        _write(args.json, json.dumps(done.as_json(), indent=1) + "\n")
    if args.json != "-":
        sys.stdout.write(done.as_table())
    return int(done.bad > 0)


def _check_writable(path: str) -> None:
    """Raise LocalError for a report that could not be written, before it has cost anything."""
    if path == "-":
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise LocalError(f"cannot write {path}: there is no such directory")
    if Path(path).is_dir() or not os.access(path if Path(path).exists() else folder, os.W_OK):
        raise LocalError(f"cannot write {path}: it is a directory, or may not be written")


def _write(path: str, text: str) -> None:
    try:
        if path == "-":
            sys.stdout.write(text)
        else:
            Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise LocalError(f"cannot write {path}: {error.strerror or error}") from error


def _began(facts: Facts) -> None:
    print(
        f"vhostmp stress: features {facts.features:#x}, protocol features {facts.protocol:#x}, {facts.queues} rings, "
        f"{facts.slots} memory slots, {'sends frames back' if facts.echoes else 'sends nothing back'}",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _ending_on_sigterm() -> Generator[None]:
    """Have SIGTERM end the block as Ctrl-C does: with everything that was started and made."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)  # the status that a shell gives to who was ended by it

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(args: argparse.Namespace) -> int:
    """Ask; returns the exit status. Raises: LocalError."""
    with _ending_on_sigterm():
        return _load(args) if args.load else _ask(args)


def _ask(args: argparse.Namespace) -> int:
    plan = _plan(args)
    if args.list:
        _print_list(plan.clauses)
        return 0
    for path in filter(None, (args.json, args.junit, args.html)):
        _check_writable(path)
    check(plan)
    print(f"vhostmp stress: {len(plan.clauses)} clauses, seed {plan.seed}", file=sys.stderr, flush=True)
    progress = Progress(len(plan.clauses))
    results: list[Result] = []
    try:
        for result in Runner(plan).run(_began):
            results.append(result)
            progress.step(result)
    finally:
        progress.close()
    order = {one.id: place for place, one in enumerate(plan.clauses)}
    results.sort(key=lambda one: order[one.id])
    title = f"vhostmp stress: {plan.device} at {', '.join(map(str, plan.paths))}, seed {plan.seed}"
    if args.json:
        _write(args.json, report.as_json(results))
    if args.junit:
        _write(args.junit, report.as_junit(results, "vhostmp stress"))
    if args.html:
        _write(args.html, report.as_html(results, title))
    if "-" not in (args.json, args.junit, args.html):
        sys.stdout.write(report.as_table(results, everything=args.verbose))
    return int(any(one.verdict is Verdict.FAIL for one in results))
