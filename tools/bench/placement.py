"""Processors and priorities: who runs where, who may interrupt whom, and how far the two cores are apart.

Rules:
- Only processes and threads we started are moved, by their ids.
- Real-time priority lasts for a measurement and no longer: two pollers at SCHED_FIFO on two processors leave nothing
  for anybody else, this program included, which therefore runs above them. Order, highest first: this program, the
  probe, testpmd's command line, the pollers.
- Without the right to real-time priorities everything works, with more noise; the report says which it was.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import attrs

from vhostmp.errors import LocalError
from vhostmp.tools._probe import PingPong

POLLER: Final = 1
COMMANDS: Final = 2
PROBE: Final = 3
HARNESS: Final = 5
PROBE_ROUNDS: Final = 4000
PROBE_SECONDS: Final = 0.2
CORES_NEEDED: Final = 2


@attrs.frozen
class Cores:
    """The processors of a benchmark: one for the back-end, one for the front-end, and what there is beyond."""

    backend: int
    frontend: int
    more: tuple[int, ...] = ()

    @classmethod
    def choose(cls) -> Cores:
        """Take the first two that this process may use; LocalError when there is only one."""
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < CORES_NEEDED:
            raise LocalError(f"benchmarks need two processors, this process may use {len(cores)}")
        return cls(cores[0], cores[1], tuple(cores[2:]))

    def backends(self, workers: int) -> list[int]:
        """Return a processor for each worker, or as many as there are; the front-end's is none of them."""
        return [self.backend, *self.more[: workers - 1]]


def can_use_fifo() -> bool:
    """Whether this process may use real-time priorities."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(HARNESS))
    except PermissionError:
        return False
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return True


def set_fifo(tid: int, priority: int) -> None:
    """Give a thread a real-time priority, or take it away with 0. A thread that has ended is no error."""
    policy = os.SCHED_FIFO if priority else os.SCHED_OTHER
    with suppress(ProcessLookupError, PermissionError):
        os.sched_setscheduler(tid, policy, os.sched_param(priority))


@contextmanager
def measuring(pollers: Sequence[int], commands: Sequence[int]) -> Generator[None]:
    """Give the threads `pollers` and `commands`, and this one, their real-time priorities for the block."""
    everybody = [(0, HARNESS), *((tid, COMMANDS) for tid in commands), *((tid, POLLER) for tid in pollers)]
    try:
        for tid, priority in everybody:
            set_fifo(tid, priority)
        yield
    finally:
        for tid, _ in reversed(everybody):
            set_fifo(tid, 0)


def threads_of(pid: int) -> list[int]:
    """Return the thread ids of a process, none when it has ended."""
    with suppress(OSError):
        return sorted(int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir())
    return []


def processor_ticks(pid: int, tid: int) -> int:
    """Return the processor time of a thread in clock ticks, 0 when it has ended. Source: proc(5), fields 14, 15."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


def waited_ns(pid: int, tid: int) -> int:
    """Return how long a thread has waited, ready to run, for a processor. Source: proc(5), schedstat."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/task/{tid}/schedstat").read_text().split()[1])
    return 0


def children_of(pid: int) -> list[int]:
    """Return the processes that descend from `pid`."""
    found: list[int] = []
    for tid in threads_of(pid):
        with suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{tid}/children").read_text().split():
                found += [int(child), *children_of(int(child))]
    return found


def busiest_thread(pids: Sequence[int], before: dict[tuple[int, int], int]) -> tuple[int, int]:
    """Return (pid, tid) of the thread that has used most processor time since `before` (from `all_ticks`)."""
    now = all_ticks(pids)
    if not now:
        raise LocalError("the program that is measured has ended")
    return max(now, key=lambda thread: now[thread] - before.get(thread, 0))


def all_ticks(pids: Sequence[int]) -> dict[tuple[int, int], int]:
    """Return the processor time of all threads of some processes."""
    return {(pid, tid): processor_ticks(pid, tid) for pid in pids for tid in threads_of(pid)}


def distance_ns(cores: Cores, *, fifo: bool) -> float:
    """Bounce a cache line between the two cores; returns the round trip in nanoseconds, 0.0 when it did not come off.

    Both threads run above the pollers, for about a millisecond.
    """
    game = PingPong()

    def answer() -> None:
        os.sched_setaffinity(0, {cores.frontend})
        if fifo:
            set_fifo(0, PROBE)
        game.answer(PROBE_ROUNDS, PROBE_SECONDS)

    before = os.sched_getaffinity(0)
    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        os.sched_setaffinity(0, {cores.backend})
        return game.ask(PROBE_ROUNDS, PROBE_SECONDS)
    finally:
        os.sched_setaffinity(0, before)
        thread.join()
