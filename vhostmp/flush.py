"""The flush: put a new state of a device in force, wait a grace period, retire the old one.

The same four steps whatever has changed: back-end, memory table, ring addresses, a descriptor, an enable bit.

1. *prepare*: each worker concerned is sent the parts that it lacks, and the configuration. It maps, opens, checks, and
   acknowledges. A refusal ends the flush here: nothing has changed.
2. *publish*: one store-release of the new generation in the control segment.
3. *synchronize*: wait until every worker that was inside a work item has left it, or is dead.
4. *retire*: the workers drop the old configuration and the parts that only it named.

When `flush` returns, no worker uses the old state, ever: the return is the barrier.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

import attrs

from vhostmp.errors import LocalError, VhostError, WorkerDied
from vhostmp.parts import DeviceState, Part
from vhostmp.shm import layout
from vhostmp.shm._epoch import publish, synchronize
from vhostmp.workers.channel import FDS_MAX, Message
from vhostmp.workers.pool import WorkerProcess

log = logging.getLogger(__name__)

#: How long a work item may last before a verb gives up waiting for its end, seconds.
SYNCHRONIZE_TIMEOUT: Final = 5.0
#: How long to wait for an idle worker to take up the new generation, for the figure that we report alone, seconds.
SWITCH_WAIT: Final = 0.005


@attrs.frozen
class FlushResult:
    """What a flush took. Times in microseconds."""

    generation: int
    grace_us: float
    pause_us: float


class Placement(Protocol):
    """Where a device is: its slots in the control segment, and who serves its queues."""

    @property
    def slot(self) -> int:
        """Device slot."""
        ...

    @property
    def first_ring(self) -> int:
        """Its first ring slot."""
        ...

    @property
    def num_queues(self) -> int:
        """How many it has."""
        ...

    @property
    def group_size(self) -> int:
        """How many of its rings are served together, by one worker: two where they come in pairs."""
        ...

    def worker_of(self, index: int) -> int:
        """Return the worker slot that serves a ring."""
        ...


def configuration(place: Placement, state: DeviceState, generation: int, worker: int) -> Message:
    """Return the configuration message of a state for one worker: the rings that it serves."""
    rings: list[dict[str, Any]] = []
    for index, ring in enumerate(state.rings):
        if not ring.started or place.worker_of(index) != worker:
            continue
        described: dict[str, Any] = {
            "index": index,
            "num": ring.size,
            "desc": ring.desc,
            "avail": ring.avail,
            "used": ring.used,
            "log": ring.log,
            "enabled": ring.enabled,
            "start_id": ring.start_id,
            "busyloop_us": ring.busyloop_us,
        }
        for kind in ("kick", "call", "err"):
            part: Part | None = getattr(ring, kind)
            described[kind] = part.id if part is not None else 0
        rings.append(described)
    return {
        "op": "prepare",
        "device": place.slot,
        "first_ring": place.first_ring,
        "n_rings": place.num_queues,
        "generation": generation,
        "features": state.features,
        "memory_id": state.memory.id if state.memory is not None and rings else 0,
        "backend_id": state.backend.id if rings else 0,
        "logging": state.logging and bool(rings),
        "log_id": state.log.id if state.log is not None and state.logging and rings else 0,
        "log_fd": state.log_fd.id if state.log_fd is not None and state.logging and rings else 0,
        "rings": rings,
    }


def questions(
    place: Placement, state: DeviceState, generation: int, worker: WorkerProcess
) -> tuple[list[tuple[Message, list[int]]], set[Part]]:
    """Return the messages that prepare a worker for a state, and the parts that it will then hold."""
    message = configuration(place, state, generation, worker.index)
    needed: set[Part] = set()
    bare: list[tuple[int, int]] = []  # what the worker is to call a descriptor, and the descriptor
    fds: list[int] = []
    if message["rings"]:
        for ring in message["rings"]:
            index: int = ring["index"]
            parts = state.rings[index].parts()
            bare += [(part.id, part.fds[0]) for part in parts if part.id not in worker.parts]
            needed.update(parts)
        needed |= state.common_parts()
        if state.memory is not None and state.memory.id not in worker.parts:
            message["memory"] = state.memory.describe()
            bare += zip(state.memory.fd_ids, state.memory.fds, strict=True)
        if state.log is not None and state.logging and state.log.id not in worker.parts:
            message["dirty_log"] = state.log.describe()
            fds += state.log.fds
        if state.log_fd is not None and state.logging and state.log_fd.id not in worker.parts:
            bare.append((state.log_fd.id, state.log_fd.fds[0]))
        if state.backend.id not in worker.parts:
            served = (index for index in range(place.num_queues) if place.worker_of(index) == worker.index)
            groups = sorted({index // place.group_size for index in served})
            message["backend"], backend_fds = state.backend.describe(groups)
            fds += backend_fds
    asked: list[tuple[Message, list[int]]] = []
    for start in range(0, len(bare), FDS_MAX):
        chunk = bare[start : start + FDS_MAX]
        asked.append(({"op": "fds", "ids": [part_id for part_id, _ in chunk]}, [fd for _, fd in chunk]))
    asked.append((message, fds))
    return asked, needed


def prepare(
    place: Placement, old: DeviceState | None, state: DeviceState, generation: int, workers: Sequence[WorkerProcess]
) -> None:
    """Step 1. Raises what a worker refused with; all workers have then dropped what `old` does not name.

    A worker that dies meanwhile is no obstacle: its replacement is given the state in force. Unless it may have died of
    a new back-end: that is a refusal.
    """
    asked: list[tuple[WorkerProcess, int, set[Part]]] = []
    refusal: VhostError | None = None
    new_backend = old is not None and old.backend is not state.backend
    for worker in workers:
        messages, needed = questions(place, state, generation, worker)
        with contextlib.suppress(WorkerDied):
            for message, fds in messages:
                worker.ask(message, fds)
            asked.append((worker, len(messages), needed))
    for worker, count, needed in asked:
        worker.parts |= {part.id for part in needed}  # if it refuses, some of them: dropping an unknown one is harmless
        for _ in range(count):
            try:
                worker.answer()
            except WorkerDied as error:
                if new_backend:
                    # It may have died of the new back-end, or hang in it: that would kill each replacement too.
                    refusal = LocalError(f"{error}, while it prepared the new back-end", error.errno)
                break
            except VhostError as error:
                refusal = error  # and the other answers are to be read all the same
    if refusal is not None:
        kept = {part.id for part in old.parts()} if old is not None else set[int]()
        retire(place, generation - 1, dict.fromkeys((worker.index for worker in workers), kept), workers, state)
        raise refusal


def retire(
    place: Placement, generation: int, keep: dict[int, set[int]], workers: Sequence[WorkerProcess], state: DeviceState
) -> None:
    """Step 4: workers drop every configuration but `generation`, and the parts of `state` not in `keep` (by worker)."""
    named = {part.id for part in state.parts()}
    told: list[WorkerProcess] = []
    for worker in workers:
        drop = (worker.parts & named) - keep.get(worker.index, set())
        with contextlib.suppress(WorkerDied):
            worker.ask({"op": "retire", "device": place.slot, "generation": generation, "parts": sorted(drop)})
            told.append(worker)
        worker.parts -= drop
    for worker in told:
        try:
            worker.answer()
        except WorkerDied:
            continue
        except VhostError as error:
            log.error("worker %d cannot retire generation %d: %s", worker.index, generation, error)


def flush(
    buf: memoryview,
    place: Placement,
    old: DeviceState,
    new: DeviceState,
    generation: int,
    workers: Sequence[WorkerProcess],
) -> FlushResult:
    """Put `new` in force as `generation` on the `workers` concerned (those that serve a ring of `old` or of `new`).

    Raises: LocalError when a worker refuses: `old` is in force as before. SynchronizeTimeout when a worker stays inside
    a work item: `new` is in force, and what `old` named must be kept.
    """
    prepare(place, old, new, generation, workers)
    switches = [_switches(buf, worker) for worker in workers]
    publish(buf, place.slot, generation)
    for worker in workers:
        worker.nudge()
    grace_ns = synchronize(buf, [(worker.index, worker.pidfd) for worker in workers], int(SYNCHRONIZE_TIMEOUT * 1e9))
    keep: dict[int, set[int]] = {}
    for worker in workers:
        served = [index for index in range(place.num_queues) if place.worker_of(index) == worker.index]
        kept = {part.id for index in served if new.rings[index].started for part in new.rings[index].parts()}
        if any(new.rings[index].started for index in served):
            kept |= {part.id for part in new.common_parts()}
        keep[worker.index] = kept
    retire(place, generation, keep, workers, old)
    return FlushResult(generation, grace_ns / 1000, _pause_us(buf, workers, switches))


def _switches(buf: memoryview, worker: WorkerProcess) -> int:
    return layout.WORKER.read(buf, layout.worker_offset(worker.index), "switches")


def _pause_us(buf: memoryview, workers: Sequence[WorkerProcess], before: Sequence[int]) -> float:
    """Return the longest gap that the change left between two work items of a worker, microseconds."""
    deadline = time.monotonic() + SWITCH_WAIT
    longest = 0
    for worker, count in zip(workers, before, strict=True):
        while _switches(buf, worker) == count and worker.alive:
            if time.monotonic() > deadline:
                break
        else:
            longest = max(longest, layout.WORKER.read(buf, layout.worker_offset(worker.index), "switch_ns"))
    return longest / 1000
