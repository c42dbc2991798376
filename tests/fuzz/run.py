"""Runs the fuzz targets: `make fuzz SECONDS=60`, or `python -m tests.fuzz.run --help`.

Each target is a process of its own (one.py), as many at once as there are jobs, for so many seconds each. What it finds
is kept in build/fuzz-found/TARGET and begun with the next time, beside the seeds in tests/fuzz/corpus. An input
that breaks a promise ends its target: the input is kept as crash-*, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import attrs

from tests.fuzz.build import ROOT, Build, BuildError
from tests.fuzz.targets import INPUT_BYTES_MAX, TARGETS, Target

FOUND: Final = ROOT / "build" / "fuzz-found"
PROGRESS_SECONDS: Final = 10.0
#: Seconds that one input may take, and MiB that a target may: more is a crash.
INPUT_SECONDS: Final = 20
RSS_MIB: Final = 1024
#: How much is told of what is wrong; the log has the rest.
WRONG_MAX: Final = 300
STATUS: Final = re.compile(r"^#(\d+)\s+\w+.*?cov: (\d+) ft: (\d+) corp: (\d+)/", re.MULTILINE)
EDGES: Final = re.compile(r"^(?:UN)?COVERED_FUNC: hits: \d+ edges: (\d+)/(\d+) \S+ (\S+?)\.c:", re.MULTILINE)
WRONG: Final = re.compile(r"^(?:== .*|SUMMARY: .*| *\w*Error: .*|==\d+==ERROR.*)$", re.MULTILINE)


@attrs.define
class Outcome:
    """What came of one target."""

    target: Target
    seconds: float = 0.0
    executions: int = 0
    features: int = 0
    inputs: int = 0
    edges: int = 0
    crashes: list[Path] = attrs.field(factory=list[Path])
    wrong: str = ""


class Runner:
    """Starts targets and looks at what they print."""

    def __init__(self, build: Build | None) -> None:
        """Use a build; None where no compiled target is run."""
        self.build = build

    def folder(self, target: Target) -> Path:
        """Return the folder of a target's finds; the inputs are in its folder `corpus`."""
        path = FOUND / target.name
        (path / "corpus").mkdir(parents=True, exist_ok=True)
        return path

    def inputs(self, target: Target) -> list[str]:
        """Return the folders of a target's inputs: where new ones go, and the seeds."""
        folder = self.folder(target)
        return [str(folder / "corpus"), str(target.unpack(folder / "seeds"))]

    def command(self, target: Target) -> tuple[list[str], dict[str, str], Path]:
        """Return how a target is started: words, environment, folder."""
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        where = ROOT
        if target.native:
            assert self.build is not None
            where = self.build.tree
            environment |= {
                "ENGINE": str(self.build.engine),
                "LD_PRELOAD": " ".join(str(path) for path in self.build.preload),
                # libFuzzer comes first, so that its counters are taken and not the sanitizer's empty ones; the
                # symbolizer is not in the path; Python keeps what it has till the end: that is no leak.
                "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:quarantine_size_mb=8"
                f":external_symbolizer_path={self.build.symbolizer}",
                "PYTHONMALLOC": "malloc",
            }
        again = self.folder(target) / "again"
        again.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.fuzz.one {target.name} "$@"\n')
        again.chmod(0o755)
        environment["SELF"] = str(again)
        return [sys.executable, "-m", "tests.fuzz.one", target.name], environment, where

    def start(self, target: Target, words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a target with words for libFuzzer; all that it prints goes to `log`."""
        command, environment, where = self.command(target)
        with log.open("wb") as out:
            return subprocess.Popen([*command, *words], env=environment, cwd=where, stdout=out, stderr=out)

    def fuzz(self, target: Target, seconds: int) -> Outcome:
        """Fuzz one target and tell how it went; a line now and then says how far it is."""
        folder = self.folder(target)
        log = folder / "log"
        words = [
            f"-max_total_time={seconds}",
            f"-max_len={INPUT_BYTES_MAX}",
            f"-timeout={INPUT_SECONDS}",
            f"-rss_limit_mb={RSS_MIB}",
            f"-artifact_prefix={folder}/",
            "-len_control=20",
            "-print_final_stats=1",
        ]
        for stale in folder.glob("*-*"):
            stale.unlink()
        start = time.monotonic()
        running = self.start(target, [*words, *self.inputs(target)], log)
        outcome = Outcome(target)
        try:
            while True:
                try:
                    status = running.wait(PROGRESS_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    self._look(outcome, log, start)
                    print(
                        f"  {target.name}: {outcome.executions:,} executions, {outcome.features:,} features", flush=True
                    )
        finally:
            running.kill()
            running.wait()
        self._look(outcome, log, start)
        if status:
            outcome.crashes = sorted(folder.glob("*-*"))
            found = [line.strip() for line in WRONG.findall(log.read_text(errors="replace"))]
            outcome.wrong = found[0][:WRONG_MAX] if found else f"exit status {status}, see {log}"
        return outcome

    @staticmethod
    def _look(outcome: Outcome, log: Path, start: float) -> None:
        outcome.seconds = time.monotonic() - start
        seen = STATUS.findall(log.read_text(errors="replace"))
        if seen:
            outcome.executions, outcome.edges, outcome.features, outcome.inputs = (int(word) for word in seen[-1])

    def coverage(self, target: Target) -> str:
        """Say what all inputs of a target reach of what it covers: lines of Python, else edges of what is compiled."""
        inputs = self.inputs(target)
        if target.lines:
            words = [sys.executable, "-m", "tests.fuzz.replay", "--lines", target.name, *inputs]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
            reached, every = (int(word) for word in done.stdout.split())
            return f"{reached} of {every} lines"
        log = self.folder(target) / "coverage"
        self.start(target, ["-runs=1", "-print_coverage=1", f"-max_len={INPUT_BYTES_MAX}", *inputs], log).wait()
        reached = every = 0
        for some, of_all, path in EDGES.findall(log.read_text(errors="replace")):
            if path.endswith(target.covers):
                reached += int(some)
                every += int(of_all)
        return f"{reached} of {every} edges"

    def merge(self, target: Target) -> int:
        """Make the seeds the smallest inputs found that together reach every edge. Returns how many bytes they have."""
        folder = self.folder(target)
        made = folder / "merged"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        words = ["-set_cover_merge=1", "-use_counters=0", f"-max_len={INPUT_BYTES_MAX}"]
        log = folder / "merge"
        if self.start(target, [*words, str(made), *self.inputs(target)], log).wait():
            raise BuildError(f"{target.name} was not merged: see {log}")
        return target.keep(path.read_bytes() for path in made.iterdir())


def report(outcomes: Sequence[Outcome]) -> None:
    """Print the table, and how to repeat what went wrong."""
    print(f"\n{'target':10}{'executions':>13}{'a second':>11}{'edges':>8}{'features':>10}{'inputs':>8}{'crashes':>9}")
    for each in outcomes:
        rate = each.executions / each.seconds if each.seconds else 0
        print(
            f"{each.target.name:10}{each.executions:13,}{rate:11,.0f}{each.edges:8,}{each.features:10,}{each.inputs:8,}"
            f"{len(each.crashes):9}"
        )
    for each in outcomes:
        if each.wrong:
            print(f"\n{each.target.name}: {each.wrong}")
            for path in each.crashes:
                print(
                    f"  input: {path}\n  again: {sys.executable} -m tests.fuzz.run --replay {each.target.name} {path}"
                )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description="Fuzz, guided by coverage.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at once (%(default)s)")
    parser.add_argument("--merge", action="store_true", help="make the seeds anew from what was found, and end")
    parser.add_argument("--coverage", action="store_true", help="tell what seeds and finds reach, and end")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"), help="run one input under the sanitizers")
    options = parser.parse_args(arguments)
    names = [options.replay[0]] if options.replay else options.targets or list(TARGETS)
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        parser.error(f"no target {' '.join(unknown)}: choose from {' '.join(TARGETS)}")
    options.targets = [TARGETS[name] for name in names]
    return options


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for."""
    options = parse(arguments)
    targets: list[Target] = options.targets
    build = None
    if any(target.native for target in targets):
        build = Build(checked=not options.coverage)
        if not build.complete:
            print("building (half a minute, once for each version of the sources)", flush=True)
        build.make(os.cpu_count() or 1)
    runner = Runner(build)
    if options.replay:
        command, environment, where = runner.command(targets[0])
        return subprocess.run(
            [*command, Path(options.replay[1]).resolve()], env=environment, cwd=where, check=False
        ).returncode
    if options.coverage:
        for target in targets:
            print(f"{target.name:10}{runner.coverage(target)}", flush=True)
        return 0
    if options.merge:
        for target in targets:
            print(f"{target.name}: {runner.merge(target):,} bytes of seeds", flush=True)
        return 0
    print(f"{len(targets)} targets, {options.seconds} s each, {options.jobs} at once", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(runner.fuzz, targets, [options.seconds] * len(targets)))
    report(outcomes)
    return 1 if any(outcome.wrong for outcome in outcomes) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BuildError as error:
        sys.exit(f"fuzz: {error}")
