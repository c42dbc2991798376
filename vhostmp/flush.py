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
from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, Final, Protocol

import attrs

from vhostmp import killpoints
from vhostmp.errors import LocalError, SynchronizeTimeout, SysError, VhostError, WorkerDied
from vhostmp.parts import DeviceState, Part
from vhostmp.shm import layout
from vhostmp.shm._epoch import publish, synchronize
from vhostmp.shm.segment import is_memory
from vhostmp.workers.channel import FDS_MAX, Message, close_all
from vhostmp.workers.processes import WorkerProcess, answers_due, numbers_of

log = logging.getLogger(__name__)

#: How long a work item may last before a verb gives up waiting for its end, seconds.
SYNCHRONIZE_TIMEOUT: Final = 5.0
#: How long to wait for an idle worker to take up the new generation, for the figure that we report alone, seconds.
SWITCH_WAIT: Final = 0.005
#: How long between two looks at it, seconds: no spinning, it may need this very processor.
_SWITCH_LOOK: Final = 0.00005


NOTHING: Final[Mapping[int, int]] = MappingProxyType({})


@attrs.frozen
class FlushResult:
    """What a flush took. Times in microseconds.

    `left`: files, the caller's, of what old back-ends had not delivered, by group of rings: see `retire`.
    """

    generation: int
    grace_us: float
    pause_us: float
    left: Mapping[int, int] = NOTHING


class Placement(Protocol):
    """Where a device is: its slots in the control segment."""

    @property
    def name(self) -> str:
        """Name in log lines."""
        ...

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


def configuration(place: Placement, state: DeviceState, generation: int, worker: int) -> Message:
    """Return the configuration message of a state for one worker: the rings that it serves."""
    rings: list[dict[str, Any]] = []
    for index, ring in enumerate(state.rings):
        if not ring.started or state.worker_of(index) != worker:
            continue
        described: dict[str, Any] = {
            "index": index,
            "num": ring.size,
            "desc": ring.desc,
            "avail": ring.avail,
            "used": ring.used,
            "log": ring.log,
            "enabled": ring.enabled,
            "held": index // state.group_size in state.held,
            "start_id": ring.start_id,
            "busyloop_us": ring.busyloop_us,
            "region": None if state.inflight is None else state.inflight.place(index, ring.size),
        }
        for kind in ("kick", "call", "err"):
            part: Part | None = getattr(ring, kind)
            described[kind] = part.id if part is not None else 0
        rings.append(described)
    return {
        "op": "prepare",
        "device": place.slot,
        "name": place.name,
        "first_ring": place.first_ring,
        "n_rings": place.num_queues,
        "generation": generation,
        "features": state.features,
        "memory_id": state.memory.id if state.memory is not None and rings else 0,
        "backend_id": state.backend.id if rings else 0,
        "draining_id": state.draining.id if state.draining is not None and rings else 0,
        "logging": state.logging and bool(rings),
        "log_id": state.log.id if state.log is not None and state.logging and rings else 0,
        "log_fd": state.log_fd.id if state.log_fd is not None and state.logging and rings else 0,
        "backends": [],
        "carried": [],
        "iotlb_id": state.iotlb.id if state.iotlb is not None and rings else 0,
        "inflight_id": state.inflight.id if state.inflight is not None and rings else 0,
        "rings": rings,
    }


def questions(
    place: Placement,
    state: DeviceState,
    generation: int,
    worker: WorkerProcess,
    carried: Mapping[int, int],
    made: list[int],
) -> tuple[list[tuple[Message, list[int]]], set[Part]]:
    """Return the messages that prepare a worker for a state, and the parts that it will then hold.

    `carried`: see `flush`; `made`: gets descriptors that the caller closes once they are sent. OSError: too many.
    """
    message = configuration(place, state, generation, worker.index)
    needed, groups = state.holdings(worker.index)
    bare: list[tuple[int, int]] = []  # what the worker is to call a descriptor, and the descriptor
    maps: list[tuple[Message, list[int]]] = []
    fds: list[int] = []
    if message["rings"]:
        for ring in message["rings"]:
            index: int = ring["index"]
            parts = state.rings[index].parts()
            bare += [(part.id, part.fds[0]) for part in parts if part.id not in worker.parts]
        if state.memory is not None and state.memory.id not in worker.parts:
            bare += zip(state.memory.fd_ids, state.memory.fds, strict=True)
            maps = [({"op": "map", **state.memory.describe()}, state.memory.userfault_fds())]
        if state.log is not None and state.logging and state.log.id not in worker.parts:
            message["dirty_log"] = state.log.describe()
            fds += state.log.fds
        if state.log_fd is not None and state.logging and state.log_fd.id not in worker.parts:
            bare.append((state.log_fd.id, state.log_fd.fds[0]))
        if state.iotlb is not None and state.iotlb.id not in worker.parts:
            message["iotlb"] = state.iotlb.id
            fds += state.iotlb.fds
        if state.inflight is not None and state.inflight.id not in worker.parts:
            message["inflight"] = state.inflight.describe()
            fds += state.inflight.fds
        for backend in state.backends():
            lacking = sorted(groups - worker.groups.get(backend.id, set()))
            known = backend.id in worker.parts
            if lacking or not known:
                described, backend_fds = backend.describe(lacking, made, known=known)
                message["backends"].append(described)
                fds += backend_fds
        message["carried"] = sorted((groups - state.held) & carried.keys())
        fds += [carried[group] for group in message["carried"]]
    asked: list[tuple[Message, list[int]]] = []
    for start in range(0, len(bare), FDS_MAX):
        chunk = bare[start : start + FDS_MAX]
        asked.append(({"op": "fds", "ids": [part_id for part_id, _ in chunk]}, [fd for _, fd in chunk]))
    return [*asked, *maps, (message, fds)], needed


@attrs.frozen
class Asked:
    """A worker that was asked to prepare: with which messages, and what it will then hold."""

    worker: WorkerProcess
    messages: Sequence[tuple[Message, list[int]]]
    needed: Set[Part]


@attrs.frozen
class Question:
    """Workers that were asked to prepare; `refusal`: why one could not be. `due`: until when they may answer."""

    asked: Sequence[Asked]
    refusal: VhostError | None
    due: float


def ask(
    place: Placement,
    state: DeviceState,
    generation: int,
    workers: Sequence[WorkerProcess],
    carried: Mapping[int, int] = NOTHING,
) -> Question:
    """Begin step 1: ask the workers to prepare. `answered` waits for each of those asked, before anything else does."""
    asked: list[Asked] = []
    refusal: VhostError | None = None
    room_due = answers_due()
    for worker in workers:
        try:
            with contextlib.suppress(WorkerDied):
                asked.append(Asked(worker, *_ask(place, state, generation, worker, carried, room_due)))
        except OSError as error:
            refusal = SysError.wrap(f"cannot open what worker {worker.index} needs", error)
    return Question(asked, refusal, answers_due())


def answered(question: Question, state: DeviceState, *, new_backend: bool) -> VhostError | None:
    """End step 1: wait for the answers, and return what a worker refused with, if one did.

    A worker that dies meanwhile is no obstacle: its replacement is given the state in force. Unless it may have died of
    a back-end that is new to it: that is a refusal, where `new_backend` says that there may be one.
    """
    refusal = question.refusal
    for one in question.asked:
        worker, messages = one.worker, one.messages
        # If it refuses, it has some of them: dropping what it does not know is harmless.
        worker.parts |= {part.id for part in one.needed}
        for described in messages[-1][0]["backends"]:
            worker.groups.setdefault(described["id"], set()).update(described["groups"])
        for message, _ in messages:
            try:
                answer, fds = worker.answer_with_fds(question.due)
                if message["op"] == "map" and state.memory is not None:
                    state.memory.mapped(worker, answer, fds)
                else:
                    close_all(fds)
            except WorkerDied as error:
                if new_backend and message.get("backends") and not worker.waits_for_page:
                    # It may have died of the new back-end, or hang in it: that would kill each replacement too.
                    refusal = LocalError(f"{error}, while it prepared the new back-end", error.errno)
                break
            except VhostError as error:
                # The other answers are to be read all the same; what follows from the first refusal is no news.
                refusal = refusal or error
    return refusal


def prepare(
    place: Placement,
    old: DeviceState,
    state: DeviceState,
    generation: int,
    workers: Sequence[WorkerProcess],
    carried: Mapping[int, int] = NOTHING,
) -> None:
    """Step 1. Raises what a worker refused with; all workers have then dropped what `old` does not name."""
    refusal = answered(ask(place, state, generation, workers, carried), state, new_backend=True)
    if refusal is not None:
        close_all(retire(place, generation - 1, state, old, workers, older=True).values())
        raise refusal


def _ask(
    place: Placement,
    state: DeviceState,
    generation: int,
    worker: WorkerProcess,
    carried: Mapping[int, int],
    room_due: float,
) -> tuple[list[tuple[Message, list[int]]], set[Part]]:
    """Send a worker what prepares it. Returns the messages, which are to be answered, and the parts that go along.

    OSError, before anything is sent: there are too many descriptors.
    """
    made: list[int] = []
    try:
        messages, needed = questions(place, state, generation, worker, carried, made)
        for message, fds in messages:
            worker.ask(message, fds, room_due)
        return messages, needed
    finally:
        close_all(made)


def retire(
    place: Placement,
    generation: int,
    dropped: DeviceState,
    in_force: DeviceState | None,
    workers: Sequence[WorkerProcess],
    kept: Set[Part] = frozenset(),
    *,
    older: bool = False,
) -> dict[int, int]:
    """Step 4: workers drop every configuration but `generation`, and what `dropped` names and `in_force` does not need.

    With `older`, configurations before `generation` stay: somebody may still be inside one. `kept` are parts of states
    before `dropped`, whose time ends as well.

    Returns files, the caller's, by group of rings: packets that a back-end had taken from somewhere for the group and
    not delivered, for lack of receive buffers. The same back-end in another worker can go on with them.
    """
    named = {part.id for part in dropped.parts() | kept}
    told: list[tuple[WorkerProcess, set[int]]] = []
    room_due = answers_due()
    for worker in workers:
        parts, groups = in_force.holdings(worker.index) if in_force is not None else (set[Part](), set[int]())
        drop = (worker.parts & named) - {part.id for part in parts}
        gone = {
            backend.id: worker.groups.get(backend.id, set()) - (set() if backend.id in drop else groups)
            for backend in dropped.backends()
        }
        message = {
            "op": "retire",
            "device": place.slot,
            "generation": generation,
            "older": older,
            "parts": sorted(drop),
            "groups": [{"id": part_id, "groups": sorted(lost)} for part_id, lost in gone.items() if lost],
        }
        with contextlib.suppress(WorkerDied):
            worker.ask(message, due=room_due)
            told.append((worker, set[int]().union(*gone.values())))
        worker.parts -= drop
        for part_id, lost in gone.items():
            if lost:
                worker.groups[part_id] -= lost
        for part_id in drop:
            worker.groups.pop(part_id, None)
    left: dict[int, int] = {}
    due = answers_due()
    for worker, lost in told:
        try:
            left |= _left_by(*worker.answer_with_fds(due), lost - left.keys())
        except WorkerDied:
            continue
        except (VhostError, ValueError) as error:
            log.error("worker %d cannot retire generation %d: %s", worker.index, generation, error)
    return left


def _left_by(answer: Message, fds: list[int], groups: Set[int]) -> dict[int, int]:
    """Return the files of an answer to "retire", by group: of `groups`, which the worker has just lost.

    ValueError, and all are closed: no worker of ours answers so, and what a guest has taken over may answer anything.
    """
    try:
        named = numbers_of(answer.get("left", []))
        if len(named) != len(fds):
            raise ValueError(f"{len(fds)} files of frames are not named one by one")
        if len(set(named)) != len(named) or not set(named) <= groups:
            raise ValueError("files of frames for queues that it did not have")
        if not all(is_memory(fd) for fd in fds):
            raise ValueError("frames are not in memory")
    except ValueError:
        close_all(fds)
        raise
    return dict(zip(named, fds, strict=True))


def flush(
    buf: memoryview,
    place: Placement,
    old: DeviceState,
    new: DeviceState,
    generation: int,
    workers: Sequence[WorkerProcess],
    carried: Mapping[int, int] = NOTHING,
    *,
    measure: bool = False,
    kept: Set[Part] = frozenset(),
) -> FlushResult:
    """Put `new` in force as `generation` on the `workers` concerned (those that serve a ring of `old` or of `new`).

    `carried`: files of `FlushResult.left` for groups that are served again, borrowed. `measure`: wait a moment for the
    figure `pause_us`, which is 0 otherwise.

    Raises: LocalError when a worker refuses: `old` is in force as before. SynchronizeTimeout when a worker stays inside
    a work item: `new` is in force, and what `old` named must be kept.
    """
    killpoints.reach("coming")
    prepare(place, old, new, generation, workers, carried)
    switches = [_switches(buf, worker) for worker in workers]
    killpoints.reach("prepared")
    publish(buf, place.slot, generation)
    killpoints.reach("published")
    for worker in workers:
        worker.nudge()
    grace_ns = wait_for_items(buf, workers)
    killpoints.reach("synchronized")
    left = retire(place, generation, old, new, workers, kept)
    killpoints.reach("retired")
    pause_us = _pause_us(buf, workers, switches) if measure else 0.0
    return FlushResult(generation, grace_ns / 1000, pause_us, left)


def wait_for_items(buf: memoryview, workers: Sequence[WorkerProcess]) -> int:
    """Step 3: wait until every work item that runs has ended. Returns nanoseconds; SynchronizeTimeout.

    A worker that waits for a page of a guest in post-copy is inside its work item for as long as that guest's front-end
    takes, which may be for ever, and the verbs of every device that it serves wait with it. After SYNCHRONIZE_TIMEOUT
    it is killed: its section ends with it, nothing was done with the page, and its successor, which goes on where it
    stood, asks for the page again. So no verb fails for it, and no front-end holds up another's for longer.
    """
    readers = [(worker.index, worker.pidfd) for worker in workers]
    timeout_ns = int(SYNCHRONIZE_TIMEOUT * 1e9)
    try:
        return synchronize(buf, readers, timeout_ns)
    except SynchronizeTimeout:
        waiting = [worker for worker in workers if worker.waits_for_page]
        if not waiting:
            raise
    for worker in waiting:
        log.warning("worker %d (pid %d) waits for a page in post-copy: killed", worker.index, worker.pid)
        worker.kill()
    return timeout_ns + synchronize(buf, readers, timeout_ns)


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
            time.sleep(_SWITCH_LOOK)
        else:
            longest = max(longest, layout.WORKER.read(buf, layout.worker_offset(worker.index), "switch_ns"))
    return longest / 1000
