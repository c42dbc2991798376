"""The state in force of a device, and how another one takes its place.

The half of a device that knows nothing of verbs. A state is put in force by assignment while no ring runs, or where
workers could not tell the new one from the old; through the flush (flush.py) otherwise. After a flush that timed out,
what the older state named is kept until a later one has waited for the workers that may still use it: that of the next
verb, or one that the pool begins once they are out.

Locks: the pool's lock is held around every call.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any, Final

import attrs

from vhostmp import rings, steps, unfinished
from vhostmp.errors import SynchronizeTimeout, VhostError
from vhostmp.flush import FlushResult, flush, wait_for_items
from vhostmp.parts import DeviceState, Part, Setup, new_id
from vhostmp.shm import layout
from vhostmp.shm._epoch import published, synchronize
from vhostmp.snapshot import ring_numbers
from vhostmp.workers import _signal, leftover
from vhostmp.workers.deaths import note_death

if TYPE_CHECKING:
    from vhostmp.iotlb import DeviceIotlb
    from vhostmp.kept_device import Recorder
    from vhostmp.supervisor import Pool
    from vhostmp.workers.processes import WorkerProcess


log = logging.getLogger(__name__)

#: How long to look whether a worker has left a work item that a verb gave up waiting for: a busy one is between two
#: within that time.
LOOK_NS: Final = 2_000_000


#: Why the pool stops a ring: see layout.BROKEN_REASONS.
STOPPED: Final = {"memory": "its memory is gone", "deaths": "it has cost too many workers"}


class StateInForce:
    """Base of a device: its place in the control segment, and its state."""

    slot: int
    first_ring: int
    iotlb: DeviceIotlb | None

    def __init__(self, pool: Pool, name: str, num_queues: int, group_size: int) -> None:
        """Be nowhere yet: `_begin`, then the place, then the generation that the place was left with."""
        self.name: Final = name
        self.num_queues: Final = num_queues
        self.group_size: Final = group_size
        self._pool: Final = pool
        self._lock: Final[threading.RLock] = pool.lock
        self._generation = 0
        # After a flush that timed out: workers that may still use an older state, and what belongs to that.
        self._unsynchronized: set[int] = set()
        self._kept: set[Part] = set()
        self._kept_setups: list[Setup] = []
        self._is_leaving = False  # the front-end is gone, and its rings could not be stopped yet
        self._is_left = False  # they were, and somebody was still inside, under whom their slots are not emptied
        self._closed = False
        self._stopping: set[int] = set()  # rings that such a flush stopped: where they stand is not known yet
        self._carried: dict[int, int] = {}  # files of packets for groups that are held between two workers (steps.py)
        self.recorder: Recorder | None = None  # who writes what is in force, so that it outlives us (kept_device.py)
        self._frames_left = 0  # packets that back-ends had and nobody took up, since it was last set to 0

    def _begin(self, state: DeviceState) -> None:
        """Have a first state, with no ring started."""
        self._state = state

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be asked of it any more, though it keeps its place until its workers are out of it."""
        return self._closed

    @property
    def is_leaving(self) -> bool:
        """Whether the front-end is gone, and somebody may still be inside a state that it made."""
        return self._is_leaving or self._is_left

    @property
    def placement(self) -> tuple[int, ...]:
        """The worker that each group of rings is attached to."""
        return self._state.workers

    @property
    def modules(self) -> set[str]:
        """References of the classes that its back-ends are made from, where those are in Python."""
        return {part.options["reference"] for part in self._state.backends() if "reference" in part.options}

    @property
    def unsynchronized(self) -> frozenset[int]:
        """The workers that may still be inside an older state. Whatever they hold, they may be using."""
        return frozenset(self._unsynchronized)

    def worker_of(self, index: int) -> int:
        """Return the worker slot that serves a ring: the rings of a group have the same."""
        return self._state.worker_of(index)

    def resume(self, worker: WorkerProcess) -> Callable[[], None] | None:
        """Give a replacement worker its share of the state in force. Called by the pool, which holds the lock.

        Returns: what waits until the worker has it; None when there is nothing to give: no ring runs, or those that do
        are to be stopped since their front-end is gone. Whoever served those might hang in what the dead one died of.
        """
        if self._is_leaving or not self._state.live:
            return None
        return self._pool.prepare(self, self._state, self._generation, worker)

    def break_ring(self, index: int, reason: str) -> None:
        """Stop a ring whose worker is dead, and tell the front-end by the err eventfd. The pool's, which has the lock.

        `reason` is one of STOPPED.
        """
        value = layout.BROKEN_REASONS.index(reason)
        layout.RING.write(self._pool.buf, self._ring_offset(index), "broken", value)
        log.warning("device %s: queue %d stopped: %s", self.name, index, STOPPED[reason])
        part = self._state.rings[index].err
        if part is not None:
            _signal.signal(part.fds[0])

    def note_death(self, worker: int) -> None:
        """Say in the slots of a dead worker's rings that it died: who takes them up counts what that cost.

        A worker that has left a ring in due form is not told from a dead one by anything else. Called by the pool.
        """
        note_death(self._pool.buf, worker, range(self.first_ring, self.first_ring + self.num_queues))

    def _note_deaths(self, workers: Set[int], taken_up: Set[int] = frozenset()) -> None:
        """Note the deaths among `workers`, but for groups that somebody else may have taken up: it has counted them."""
        served = [self.first_ring + i for i in range(self.num_queues) if i // self.group_size not in taken_up]
        for worker in self._pool.dead(workers):
            note_death(self._pool.buf, worker, served)

    def _note_serving(self, old: DeviceState | None = None) -> None:
        """Say in the slots of started rings who serves them, where the state in force differs from `old` in that.

        Of a group that is held the slots go on saying who served it last: that worker may still be inside, and die.
        """
        state = self._state
        if old is not None and (old.workers, old.held) == (state.workers, state.held):
            return
        for index, ring in enumerate(state.rings):
            if ring.started and index // self.group_size not in state.held:
                layout.RING.write(self._pool.buf, self._ring_offset(index), "worker", 1 + state.worker_of(index))

    def kicks_of(self, worker: int) -> list[int]:
        """Return the kick eventfds of the whole, started rings of a worker. Called by the pool, with the lock."""
        whole = [index for index in self.started_on(worker) if not self._ring_word(index, "broken")]
        kicks = [self._state.rings[index].kick for index in whole]
        return [part.fds[0] for part in kicks if part is not None]

    def started_on(self, worker: int) -> list[int]:
        """Return the started rings that a worker serves. Called by the pool, which holds the lock."""
        return [i for i, ring in enumerate(self._state.rings) if ring.started and self._state.worker_of(i) == worker]

    def _commit(self, new: DeviceState) -> FlushResult:
        """Put a state in force, and end what an earlier verb left half done (steps.py), which no verb does but in need.

        A group that is held may be served once every worker has left the generation in which another one served it:
        `put` waits for that.
        """
        for group in self._state.held:
            new = steps.served(new, group, new.workers[group], self.next_start())
        return self.put(attrs.evolve(new, draining=None))

    @property
    def state(self) -> DeviceState:
        """The state in force. For steps.py."""
        return self._state

    def next_start(self) -> int:
        """Return a start id that no ring had before, of any device. For steps.py.

        A worker that slept while a place changed hands knows by this id alone that it is another ring.
        """
        return new_id()

    def unfinished(self, index: int) -> bool:
        """Whether a ring has a batch that was begun and not finished, and is whole otherwise. For unfinished.py.

        Workers ask the same of a ring that is disabled (journal_half_done, workers/_journal.pyx).
        """
        if self._ring_word(index, "broken"):
            return False
        if self._ring_word(index, "died") and self.is_reachable(index):
            return True  # what that has cost is to be counted; who does it finishes the rest
        if rings.is_packed(self._state.features):
            return bool(self._ring_word(index, "batch_n"))
        noted = self._ring_word(index, "batch_used_idx") != self._ring_word(index, "used_idx")
        return bool(self._ring_word(index, "used_valid")) and noted

    def is_reachable(self, index: int) -> bool:
        """Whether a worker finds a ring without asking the front-end. For unfinished.py."""
        ring, memory, features = self._state.rings[index], self._state.memory, self._state.features
        if self._state.iotlb is None or self.iotlb is None:
            return True
        for name, size, _ in rings.parts(features, ring.size):
            access = rings.access(features, name)
            uva = self.iotlb.address(getattr(ring, name), size, access)
            if uva is None or memory is None or not memory.table.contains_uva(uva, size):
                return False
        return True

    def revive(self, index: int) -> None:
        """Have the worker of a ring replaced, now, if it has died. For unfinished.py."""
        self._pool.revive(self._state.worker_of(index))

    def _wait_for_late(self, new: DeviceState) -> None:
        """Wait for who is still inside the generation before this one: the next would be installed in its place.

        Raises SynchronizeTimeout, with the parts of `new` closed.
        """
        late = [worker for worker in self._pool.workers if worker.index in self._unsynchronized]
        try:
            wait_for_items(self._pool.buf, late)
        except BaseException:
            for part in new.parts_without(self._state):
                part.close()
            raise

    def put(self, new: DeviceState, *, measure: bool = False) -> FlushResult:
        """Put a state in force, and close the parts that only the old one named. On failure those of the new one.

        For steps.py. The caller holds the lock.
        """
        old = self._state
        if self._unsynchronized:
            self._wait_for_late(new)
            self._note_deaths(self._unsynchronized)  # before somebody else takes up what they served
        result = FlushResult(self._generation, 0.0, 0.0)
        concerned = old.serving() | new.serving() | self._unsynchronized
        if not self._unsynchronized and old.differs_only_in_stopped_rings(new):
            concerned = set[int]()  # a ring that is not started yet: nothing for a worker to know
        try:
            if workers := [worker for worker in self._pool.workers if worker.index in concerned]:
                generation = self._generation + 1
                if self.recorder is not None:
                    self.recorder.coming(new)
                result = flush(
                    self._pool.buf, self, old, new, generation, workers, self._carried, measure=measure, kept=self._kept
                )
                self._generation += 1
        except BaseException:
            if published(self._pool.buf, self.slot) == self._generation:
                for part in new.parts_without(old):
                    part.close()
                raise
            # The new state is in force, but a worker may still use the old one: it is kept, not closed, until a later
            # flush has waited for that worker.
            self._generation += 1
            self._note_deaths(concerned, old.held)
            self._state = new
            self._note_serving(old)
            self._kept |= old.parts_without(new)
            self._unsynchronized = concerned
            self._stopping |= {
                i
                for i, (before, after) in enumerate(zip(old.rings, new.rings, strict=True))
                if before.started and not after.started
            }
            self._drop_carried(new)
            self._pool.settle_later(self)
            raise
        # Before a verb has rings served by others, or forgets who served them. Whoever had a group that was held has
        # left it before; if that one is dead, it was said then, and who serves the group now may have counted it.
        self._note_deaths(concerned, old.held)
        self._state = new
        self._note_serving(old)
        self._pool.alert()
        self._unsynchronized = set()
        self._drop_carried(new)
        for group, file in result.left.items():
            if group in new.held:
                self._carried[group] = file
            else:
                self._frames_left += len(leftover.from_file(file))
                os.close(file)
        for part in old.parts_without(new) | (self._kept - new.parts() if self._kept else set[Part]()):
            part.close()
        self._kept = set()
        for setup in self._kept_setups:
            setup.close()
        self._kept_setups = []
        return result

    def _settle(self) -> None:
        """Wait for what an earlier verb gave up waiting for; then it is known where the rings stand that it stopped."""
        if self._is_leaving:
            self.stop_all()
            return
        if self._unsynchronized or self._state.held or self._state.draining:
            self._commit(self._state)
        for index in sorted(self._stopping):
            unfinished.finish(self, index)
            self._after_stop(index)
        self._stopping = set()
        if self._is_left:
            self._forget_rings()

    def stop_all(self) -> None:
        """Stop all rings: the front-end is gone."""
        raise NotImplementedError

    def close(self) -> None:
        """End the device: stop everything, close the back-end, leave the pool. Idempotent.

        SynchronizeTimeout: a worker is still inside. The pool ends the rest once it is out, and until then gives nobody
        else the device's slots, from which that worker reads.
        """
        with self._lock:
            if self._closed and not (self.is_leaving and self._pool.is_closing):
                return
            try:
                self.stop_all()
            finally:
                self._closed = True
                if not self.is_leaving or self._pool.is_closing:
                    self._end()

    def _end(self) -> None:
        """Close what a closed device is made of, and leave the pool. Nobody is inside."""
        self._is_leaving = self._is_left = False
        try:
            self._close_parts()
        finally:
            self._pool.unregister(self)

    def _close_parts(self) -> None:
        """Close the back-end, and what else the device is made of."""
        raise NotImplementedError

    def _forget_rings(self) -> None:
        """Empty the rings' slots. Nobody is inside a state of that front-end."""
        self._is_leaving = self._is_left = False
        for index in range(self.num_queues):
            for name in ("started", "worker", "size", "enabled", "died"):
                layout.RING.write(self._pool.buf, self._ring_offset(index), name, 0)

    def try_to_settle(self) -> bool:
        """End what a verb gave up waiting for, unless somebody is still inside. Whether it is to be tried again.

        For the pool, which holds the lock. What times out here is left to the next verb: nobody else's verbs are to
        wait behind attempts that nobody asked for, but once, as for any move, where `come_together` has one to make up.
        A device that is closed has no verbs, and goes on being tried; it ends here: till then its slots are no other's.
        """
        late = [(worker.index, worker.pidfd) for worker in self._pool.workers if worker.index in self._unsynchronized]
        try:
            synchronize(self._pool.buf, late, LOOK_NS)
        except SynchronizeTimeout:
            return True
        try:
            self._settle()
            if self._closed:
                self._end()
            else:
                self.come_together()
        except VhostError as error:
            log.warning("device %s: cannot end an earlier change yet: %s", self.name, error)
            return self._closed
        log.info("device %s: an earlier change that timed out is complete", self.name)
        return False

    def _choose_workers(self, groups: int) -> tuple[int, ...]:
        """Choose a worker for each group of rings of a new device, whose back-end is open."""
        return self._pool.spread(groups)

    def _make_way(self, setup: Setup) -> None:
        """Do what has to be done before another back-end, which is open, is put in force. VhostError: it cannot be."""

    def come_together(self) -> None:
        """Have those that are to be served together with us be so, after a move that was cut short. VhostError."""

    def _set(self, index: int, **changes: Any) -> None:
        self._commit(self._state.with_ring(index, **changes))

    def _after_stop(self, index: int) -> None:
        """Note where a ring stands that no worker serves any more: only now do its indices stand still."""
        self._state = self._state.with_ring(index, base=self._base(index))
        self._ring_stopped(index)
        for name in ("started", "worker"):
            layout.RING.write(self._pool.buf, self._ring_offset(index), name, 0)

    def _ring_stopped(self, index: int) -> None:
        """Do what the device has to do once no worker serves a ring any more. Must not fail."""

    def _base(self, index: int) -> int:
        return rings.base(self._state.features, self._pool.buf, self._ring_offset(index))

    def _drop_carried(self, state: DeviceState) -> None:
        """Close the files of groups that are served again: their back-ends have the packets."""
        for group in [group for group in self._carried if group not in state.held]:
            os.close(self._carried.pop(group))

    def _serving(self) -> list[WorkerProcess]:
        return [worker for worker in self._pool.workers if worker.index in self._state.serving()]

    def _ring_offset(self, index: int) -> int:
        return layout.ring_offset(self.first_ring + index)

    def _ring_word(self, index: int, name: str) -> int:
        return layout.RING.read(self._pool.buf, self._ring_offset(index), name)

    def _packets(self) -> int:
        return sum(
            layout.RING.read(self._pool.buf, self._ring_offset(index), "packets") for index in range(self.num_queues)
        )

    def _ring_snapshot(self, index: int) -> dict[str, Any]:
        ring, offset = self._state.rings[index], self._ring_offset(index)
        worker = self._state.worker_of(index)
        return {
            "index": index,
            "size": ring.size,
            "packed": rings.is_packed(self._state.features),
            "started": ring.started,
            "enabled": ring.enabled,
            **ring_numbers(self._pool.buf, offset),
            "worker": worker,
            "worker_pid": next((w.pid for w in self._pool.workers if w.index == worker), None)
            if ring.started
            else None,
        }
