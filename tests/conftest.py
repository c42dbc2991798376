"""What holds for every test: nothing is left behind, and what is random can be repeated.

After each test there is no new shared-memory segment, no new process and no new descriptor of this process; else the
test fails, whatever it asserted. Things that end by themselves (a spawner that notices its parent's death) get a
short time for it. Fixtures of a wider scope are set up before the look at "before" and may keep what they have.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
from collections.abc import Generator, Iterator
from typing import Any, Final
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings

from tests import helpers
from vhostmp.workers import _signal
from vhostmp.workers.pool import WorkerPool

# A thread of a test that is always busy keeps the interpreter for a whole interval whenever another one wants it, and
# a verb wants it after each of its system calls: with the default of 5 ms a swap takes 100 ms and more, where the
# workers are fast enough to leave the busy thread no reason to wait.
sys.setswitchinterval(0.0002)
# Whoever runs the tests in the background of a shell has it ignored, and so would every process that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ[helpers.RUN_TAG] = str(os.getpid())
_signal.begin()  # what it opens it keeps as long as the process lives
if "libasan" in os.environ.get("LD_PRELOAD", ""):
    # In each thread that begins its runtime reads /proc and sets a signal stack, which a worker may not.
    _begin = WorkerPool._begin  # pyright: ignore[reportPrivateUsage]

    def _begin_without(pool: WorkerPool, *arguments: Any, **options: Any) -> None:
        _begin(pool, *arguments, **{**options, "sandboxed": False})

    mock.patch.object(WorkerPool, "_begin", _begin_without).start()

BESIDE_OTHERS: Final = "PYTEST_XDIST_WORKER" in os.environ
#: How long what ends by itself may take to be gone after a test, seconds.
GRACE_SECONDS = 20.0

# Deterministic unless a seed is asked for: the same examples each time, no data base of old failures.
settings.register_profile(
    "vhostmp",
    derandomize="SEED" not in os.environ,
    database=None,
    deadline=None,
    print_blob=True,
    max_examples=int(os.environ.get("EXAMPLES", "300")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.load_profile("vhostmp")


def pytest_report_header() -> str:
    """Print the seed at the top of the report."""
    return f"seed: SEED={helpers.seed()}, torture: SECONDS={helpers.TORTURE_SECONDS:g}"


def dead_segments() -> set[str]:
    """Return the names of the segments whose owners are dead."""
    return {name for name in helpers.segment_names() if not helpers.segment_owner_alive(name)}


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Fail a run that leaves a dead process's segment behind: tests that run beside each other cannot tell whose."""
    before = dead_segments()
    done = yield
    if not BESIDE_OTHERS and not session.config.option.collectonly:
        try:
            helpers.wait_until(lambda: not dead_segments() - before, GRACE_SECONDS)
        except AssertionError:
            left = " ".join(sorted(dead_segments() - before))
            pytest.exit(f"left behind by some test, in /dev/shm: {left}", pytest.ExitCode.TESTS_FAILED)
    return done


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Return a random generator whose seed is the run's seed and the test's name, and print it."""
    text = f"{helpers.seed()}/{request.node.nodeid}"
    print(f"rng seed: {text!r}")
    return random.Random(text)


def log_state() -> str:
    """Return what a test that does not put back what it changed takes away from those after it: what is logged."""
    log = logging.getLogger("vhostmp")
    return f"log: disabled up to {logging.root.manager.disable}, level {log.level}, {log.propagate=}, {log.handlers}"


class LeakCheck:
    """What a test found when it began; `leaks` says what has been added."""

    def __init__(self) -> None:
        """Look around."""
        self._processes, self._segments, self._descriptors = self._look()
        self._log = log_state()

    @staticmethod
    def _look() -> tuple[set[int], set[str], set[tuple[int, str]]]:
        """Return our processes, our segments and our descriptors.

        Processes: descendants, and orphans that were exec'd with our tag. Segments: those of this process, of its
        descendants and of the dead; other people's living ones are not ours to judge. Where tests run beside each
        other the dead may be another one's: the run looks for theirs at its end.
        """
        table = helpers.process_table()
        processes = helpers.descendants(os.getpid(), table) | helpers.tagged_processes(str(os.getpid()), table)
        owners = {str(pid) for pid in {*processes, os.getpid()}}
        segments = {
            name
            for name in helpers.segment_names()
            if name.split(".")[2] in owners or (not BESIDE_OTHERS and not helpers.segment_owner_alive(name))
        }
        return processes, segments, set(helpers.open_descriptors().items())

    def leaks(self) -> list[str]:
        """Return one line for each thing that was not there before."""
        processes, segments, descriptors = self._look()
        return [
            *(f"process {pid}: {helpers.command_line(pid)}" for pid in sorted(processes - self._processes)),
            *(f"segment /dev/shm/{name}" for name in sorted(segments - self._segments)),
            *(f"descriptor {fd}: {what}" for fd, what in sorted(descriptors - self._descriptors)),
            *([log_state()] if log_state() != self._log else []),
        ]

    def settle(self, seconds: float = GRACE_SECONDS) -> list[str]:
        """Return what is left once it is nothing or `seconds` have passed."""
        if not self.leaks():
            return []
        gc.collect()  # an exception's traceback may hold a closed-by-refcount object a little longer
        try:
            helpers.wait_until(lambda: not self.leaks(), seconds)
        except AssertionError:
            return self.leaks()
        return []


@pytest.fixture(autouse=True)
def leak_check(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a segment, a process or a descriptor behind."""
    check = LeakCheck()
    yield
    left = check.settle()
    if left:
        pytest.fail(f"{request.node.name} left behind:\n  " + "\n  ".join(left), pytrace=False)
