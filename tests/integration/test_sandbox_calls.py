"""The table of system calls is what workers need, no less and no more: they are watched at everything that they do.

No less: the tests of everything that workers do pass under the filter. No more: each call of the table, with each value
of the arguments that it is held to, is made in one of the tests that run here under watch (tests/watched.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.taps import needs_tap
from vhostmp.workers.sandbox import calls, kernel

ROOT: Final = Path(__file__).parents[2]
#: Tests in which workers and pagers do, one after the other, all that they do.
WATCHED: Final = (
    "tests/adversity/test_sandbox.py::test_what_is_allowed",
    "tests/adversity/test_sandbox.py::test_abort_is_an_abort",
    "tests/integration/test_announce.py::test_python",
    "tests/integration/test_blk.py::test_random_requests",
    "tests/integration/test_blk.py::test_discard_gives_blocks_back",
    "tests/integration/test_blk_devices.py::test_random_requests",
    "tests/integration/test_blk_devices.py::test_flush_that_failed_is_not_forgotten",
    "tests/integration/test_requests.py::test_rng_fills_buffers",
    "tests/integration/test_requests.py::test_rng_source_that_has_nothing",
    "tests/integration/test_drain.py::test_a_frame_in_the_hand_is_counted",
    "tests/integration/test_drain.py::test_swap_empties_the_old_queue[tap-merged-null-split]",
    "tests/integration/test_drain.py::test_swap_empties_the_old_queue[packet-whole-loopback-packed]",
    "tests/integration/test_postcopy.py::test_frames_through_missing_memory",
    "tests/integration/test_network.py::test_a_copy_is_counted",
    "tests/integration/test_offloads.py::test_largest_from_the_guest",
    "tests/integration/test_swap.py::test_swap_under_load[plain]",
)
#: Calls that are needed and not seen here, with the reason.
NOT_SEEN: Final = {
    "epoll_pwait": "x86-64 has epoll_wait",
    "ppoll": "x86-64 has poll",
    "select": "the C library here asks by pselect6",
    "fstat": "the C library here asks by newfstatat",
    "restart_syscall": "the kernel makes it, after a stop",
    "rt_sigreturn": "nothing here comes back from a signal handler",
    "clock_gettime": "the vDSO can here",
    "brk": "the heap, when it grows: not in each run",
    "mremap": "the same of a large block",
}
#: The same for pagers: what they do is little, and the same each time.
NOT_SEEN_OF_PAGERS: Final = {
    **dict.fromkeys(("munmap", "mprotect"), "the heap, when it grows or shrinks"),
    **dict.fromkeys(("tgkill", "rt_sigaction", "getpid"), "abort()"),
    **dict.fromkeys(("exit", "rt_sigprocmask", "gettid"), "the end of a thread, as the control process dies"),
    "exit_group": "the same of the process: else it is killed",
    "futex": "the interpreter's lock, when two want it",
}
#: The same for values of arguments.
VALUES_NOT_SEEN: Final = {("fcntl", calls.F_GETFL), ("ioctl", calls.BLKZEROOUT)}


@pytest.mark.slow
@needs_tap
@pytest.mark.skipif(kernel.MACHINE != "x86_64", reason="what is not seen is known for x86-64")
@pytest.mark.timeout(600)
def test_every_call_is_needed(tmp_path: Path) -> None:
    """What is in the table is used: take a call away and a test fails; leave one in and this one does."""
    report = tmp_path / "calls.json"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.watched", "-p", "no:cacheprovider", *WATCHED],
        cwd=ROOT,
        env={**os.environ, "WATCHED": str(report), "PATIENCE": "60"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    seen: dict[str, dict[str, list[list[int]]]] = json.loads(report.read_text())
    unused: dict[str, list[object]] = {}
    for process, kinds, unseen in (
        ("vhostmp-w", {calls.WORKER, calls.PYTHON}, NOT_SEEN),
        ("vhostmp-pager", {calls.PAGER}, {**NOT_SEEN, **NOT_SEEN_OF_PAGERS}),
    ):
        for call in calls.ALLOWED:
            if not call.kinds & kinds or call.name in unseen:
                continue
            if str(call.number) not in seen[process]:
                unused.setdefault(process, []).append(call.name)
                continue
            for place, only in enumerate(call.only):
                values = {arguments[place] & only.mask for arguments in seen[process][str(call.number)]}
                wanted = set[int]() if only.negated else set(only.values) - {calls.OWN, calls.CHANNEL}
                unused.setdefault(process, []).extend(
                    (call.name, value) for value in wanted - values if (call.name, value) not in VALUES_NOT_SEEN
                )
    assert {process: names for process, names in unused.items() if names} == {}
