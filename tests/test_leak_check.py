"""The leak check of conftest.py finds what it is there to find, and nothing else."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack

import posix_ipc
import pytest

from tests import conftest
from tests.conftest import LeakCheck
from tests.helpers import deadline, process_alive, wait_until
from vhostmp.shm.segment import Segment


def open_descriptor(stack: ExitStack) -> str:
    """Leave a descriptor open."""
    fd = os.eventfd(0)
    stack.callback(os.close, fd)
    return f"descriptor {fd}: anon_inode:[eventfd]"


def other_file_in_place(stack: ExitStack) -> str:
    """Put another file in the place of one that was open, under the same number."""
    fd = os.open("/dev/zero", os.O_RDONLY)
    stack.callback(os.close, fd)
    return f"descriptor {fd}: /dev/zero"


def make_segment(stack: ExitStack) -> str:
    """Leave a segment."""
    return f"segment /dev/shm{stack.enter_context(Segment.create(4096)).name}"


def make_orphan_segment(stack: ExitStack) -> str:
    """Leave a segment whose owner is dead: another user's, so that no pool that starts meanwhile sweeps it away."""
    with subprocess.Popen(["true"]) as dead:
        pass
    name = f"/vhostmp.{os.getuid() + 1}.{dead.pid}.1.0"
    posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=16).close_fd()
    stack.callback(posix_ipc.unlink_shared_memory, name)
    return f"segment /dev/shm{name}"


def start_child(stack: ExitStack) -> str:
    """Leave a child process running."""
    child = stack.enter_context(subprocess.Popen(["sleep", "100"]))
    stack.callback(child.kill)
    return f"process {child.pid}: sleep 100"


def start_orphan(stack: ExitStack) -> str:
    """Leave a process whose parent, our child, has ended: it descends from us no more."""
    done = subprocess.run(["sh", "-c", "sleep 100 >&- 2>&- & echo $!"], capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    stack.callback(lambda: wait_until(lambda: not process_alive(pid)))
    stack.callback(os.kill, pid, 9)
    return f"process {pid}: sleep 100"


@pytest.mark.parametrize(
    "leave",
    [open_descriptor, other_file_in_place, make_segment, make_orphan_segment, start_child, start_orphan],
    ids=lambda leave: leave.__name__,
)
def test_what_is_left_is_found(leave: Callable[[ExitStack], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of thing left behind is named, and not any more once it is gone."""
    if leave is make_orphan_segment:  # which is looked for at the end of a run where tests run beside each other
        monkeypatch.setattr(conftest, "BESIDE_OTHERS", False)
    if leave is other_file_in_place:
        os.close(os.open("/dev/null", os.O_RDONLY))
    check = LeakCheck()
    with ExitStack() as stack:
        left = leave(stack)
        wait_until(lambda: left in check.leaks(), what=f"{left} to be found, not {check.leaks()}")
        assert left in check.settle(0.01)
    assert check.settle() == []


def test_nothing_is_found_when_nothing_is_left() -> None:
    """A check that was made and finds nothing gives an empty list at once."""
    assert LeakCheck().leaks() == []


def test_helpers_give_up() -> None:
    """`wait_until` and `deadline` end when time is up and say what for."""
    with pytest.raises(AssertionError, match="the moon"):
        wait_until(lambda: False, 0.01, "the moon")
    limit = time.monotonic() + 0.02
    with deadline(0.01, "the moon") as check:
        wait_until(lambda: time.monotonic() > limit)
        with pytest.raises(AssertionError, match="the moon"):
            check()
