"""What a process of a pool keeps of what it was forked with: what it was given, and nothing that nobody knows of."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.helpers import PATIENCE, command_line, process_table, wait_until
from vhostmp.supervisor import Pool


@pytest.fixture
def stray(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Return a pipe of which spawners inherit an end that they know nothing of."""
    reads, writes = os.pipe()
    popen = subprocess.Popen

    def with_another(command: Sequence[str], *, pass_fds: Sequence[int], **options: Any) -> Any:
        return popen(command, pass_fds=(*pass_fds, reads), **options)

    monkeypatch.setattr("vhostmp.workers.pool.subprocess.Popen", with_another)
    yield reads
    os.close(reads)
    os.close(writes)


def has(pid: int, fd: int) -> bool:
    """Whether a process has a file open that we have."""
    file = os.readlink(f"/proc/self/fd/{fd}")
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{name}") == file:
                return True
    return False


def test_of_the_spawner(stray: int) -> None:
    """Neither a worker, nor the spare, nor a pager has a file that only the spawner was left with."""
    with Pool(workers=2) as pool:
        wait_until(lambda: pool.has_spare, PATIENCE, "the spare")
        spawner = process_table()[pool.workers[0].pid]
        with contextlib.closing(pool.new_pager()):
            assert has(spawner, stray)
            children = [pid for pid, parent in process_table().items() if parent == spawner]
            assert len(children) == len([*pool.workers, "spare", "pager"])
            for pid in children:
                wait_until(lambda pid=pid: not has(pid, stray), what=command_line(pid))  # type: ignore[misc]
