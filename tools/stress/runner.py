"""Asks many clauses: a process for each socket, which takes the next clause when it is done with one.

The clauses run in processes of their own, so that one that hangs can be ended, and one that is ended by a signal (the
memory under it was truncated by its own doing) costs its verdict alone.

Rules: one thread here, so that a job can be forked. One that takes longer than its clause may is killed and replaced.
Sockets to listen on are opened here, and outlive the jobs. Ctrl-C and SIGTERM are for this process: it ends the others.

With several jobs nobody can say whose doing a descriptor, memory, or a process that ended is: then only the death of
the back-end's first process is looked for.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import attrs

from vhostmp.errors import LocalError
from vhostmp.tools.stress.clause import CLAUSES, Clause
from vhostmp.tools.stress.clauses import load_all
from vhostmp.tools.stress.examiner import Examiner
from vhostmp.tools.stress.result import Result
from vhostmp.tools.stress.target import PATIENCE, Facts, Listener, Target
from vhostmp.tools.stress.verdict import Failure, Verdict
from vhostmp.tools.stress.watch import Process

GRACE: Final = 40.0
"""What a clause may take beyond its own time: the oracle after it waits for answers too, seconds."""


@attrs.frozen
class Plan:
    """What is asked, of whom, and how."""

    paths: tuple[Path, ...]
    device: str
    listen: bool
    pid: int | None
    clauses: tuple[Clause, ...]
    seed: int
    seconds: float
    """How long each clause that tries at random goes on."""
    patience: float = PATIENCE
    """How long the back-end may take to answer, to connect or to use what it was given, seconds."""

    def seed_of(self, clause: Clause) -> int:
        """Return a clause's seed: the run's own when it is asked alone, so that a report's seed repeats it."""
        if len({one.id.partition(".")[0] for one in self.clauses}) == 1:
            return self.seed
        number = int.from_bytes(clause.id.encode(), "big") * 0x9E3779B97F4A7C15 + self.seed * 0xD1342543DE82EF95
        return (number ^ number >> 64 ^ number >> 131) & 0x7FFFFFFF

    def longest(self, clause: Clause) -> float:
        """Return how long a clause and the oracle after it may take, seconds."""
        return (clause.seconds + GRACE) * max(1.0, self.patience / PATIENCE) + self.seconds


def _job(pipe: Connection, plan: Plan, path: Path, listener: Listener | None) -> None:
    """Body of a job: says what the back-end offers (Facts, or the text of what is wrong), then asks what it is told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    load_all()
    target = Target(path, plan.device, listener=listener, patience=plan.patience)
    try:
        process = Process.of(plan.pid) if plan.pid else None
        examiner = Examiner(target, process, plan.seconds, alone=len(plan.paths) == 1)
        pipe.send(examiner.facts)
        while True:
            word = pipe.recv()
            if word is None:
                return
            result = examiner.ask(CLAUSES[word], plan.seed_of(CLAUSES[word]))
            gone = result.verdict is Verdict.FAIL and examiner.gone()
            pipe.send((result, gone))
            if gone:
                return
    except (Failure, LocalError, EOFError, OSError) as error:
        with contextlib.suppress(OSError):  # nobody listens any more
            pipe.send(f"the back-end does not work: {error or type(error).__name__}")


@contextlib.contextmanager
def _undisturbed() -> Generator[None, None, None]:
    """Put Ctrl-C and SIGTERM off: what is made meanwhile is known to who has to end it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Job:
    """A process that asks the clauses of one socket."""

    def __init__(self, plan: Plan, path: Path, listener: Listener | None) -> None:
        """Start it."""
        context = multiprocessing.get_context("fork")
        self.path: Final = path
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_job, args=(theirs, plan, path, listener), daemon=True)
        self.process.start()
        theirs.close()
        self.plan: Final = plan
        self.clause: Clause | None = None
        self.until = time.monotonic() + GRACE * max(1.0, plan.patience / PATIENCE)

    def give(self, clause: Clause | None) -> None:
        """Have it ask a clause; None: have it end. One that is dead is found so when it is listened to."""
        self.clause = clause
        if clause:
            self.until = time.monotonic() + self.plan.longest(clause)
        with contextlib.suppress(OSError):
            self.pipe.send(clause.id if clause else None)

    def receive(self) -> Any:
        """Return what it says; None when it is dead."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Runner:
    """Runs a plan."""

    def __init__(self, plan: Plan) -> None:
        """Prepare."""
        self.plan: Final = plan
        self.facts: Facts | None = None
        self._left = deque(plan.clauses)
        self._jobs: list[Job] = []
        self._listeners: dict[Path, Listener] = {}

    def run(self, started: Callable[[Facts], None] | None = None) -> Iterator[Result]:
        """Yield results as they come. LocalError when the back-end does not work from the beginning."""
        try:
            if self.plan.listen:
                for path in self.plan.paths:
                    with _undisturbed():
                        self._listeners[path] = Listener(path)
            for path in self.plan.paths:
                self._start(path)
            while self._jobs:
                ready = wait([job.pipe for job in self._jobs], timeout=0.5)
                for job in list(self._jobs):
                    if job.pipe in ready:
                        yield from self._hear(job, started)
                    elif time.monotonic() > job.until:
                        yield from self._lost(job, "it did not end; the back-end, or this tool, waits for ever")
            yield from (Result.of(one, Verdict.NOT_APPLICABLE, "not asked: the back-end is gone") for one in self._left)
        finally:
            for job in self._jobs:
                job.end()
            self._jobs = []
            for listener in self._listeners.values():
                listener.close()
            self._listeners = {}

    def _start(self, path: Path) -> None:
        with _undisturbed():
            self._jobs.append(Job(self.plan, path, self._listeners.get(path)))

    def _hear(self, job: Job, started: Callable[[Facts], None] | None) -> Iterator[Result]:
        said = job.receive()
        if said is None:
            yield from self._lost(job, f"the asking process ended with status {self._status(job)}")
        elif isinstance(said, str):
            if self.facts is None:
                raise LocalError(said)
            yield from self._drop(job, said)
        elif isinstance(said, Facts):
            if self.facts is None and started:
                started(said)
            self.facts = said
            self._next(job)
        else:
            result, gone = said
            job.clause = None
            yield result
            if gone:
                self._remove(job)
            else:
                self._next(job)

    @staticmethod
    def _status(job: Job) -> int | None:
        job.process.join(1)
        return job.process.exitcode

    def _next(self, job: Job) -> None:
        if self._left:
            job.give(self._left.popleft())
        else:
            job.give(None)
            self._remove(job)

    def _lost(self, job: Job, why: str) -> Iterator[Result]:
        """A job that hangs or died: its clause has failed, another one goes on; unless it did not come so far."""
        if self.facts is None:
            raise LocalError(f"the back-end does not work: {why}")
        asked = job.clause
        yield from self._drop(job, why)
        if self._left and asked:
            self._start(job.path)

    def _drop(self, job: Job, why: str) -> Iterator[Result]:
        if job.clause:
            yield Result.of(job.clause, Verdict.FAIL, why, seed=self.plan.seed_of(job.clause))
        self._remove(job)

    def _remove(self, job: Job) -> None:
        self._jobs.remove(job)
        job.process.join(1)
        job.end()


def check(plan: Plan) -> None:
    """Raise LocalError for what is wrong with a plan before anything is started."""
    process = Process.of(plan.pid) if plan.pid else None
    if plan.listen:
        return
    for path in plan.paths:
        listener = Target(path, plan.device, patience=plan.patience).check()
        if process and not process.may_serve(listener):
            raise LocalError(f"process {process.pid} does not serve {path}, process {listener} does: give that --pid")
