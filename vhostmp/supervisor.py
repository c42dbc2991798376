"""The pool as its users see it: workers that are replaced when they die (replacer.py), and the devices that they serve.

Workers come and go while devices are served (`new_worker`, `free_worker`). A device's queue pairs are spread when it
registers, each to the worker that serves the fewest; from then on they stay where they are until somebody moves them
(`Device.attach_vring_worker`).

Locks: `lock` guards everything here and every device of the pool. The thread that replaces a worker takes it, so a verb
sees a dead worker at worst as one that does not answer, never as one that changes under it.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence, Set
from typing import TYPE_CHECKING, Any, Final, Self

from vhostmp import killpoints, patches, renewal
from vhostmp.deaths import RestartLimit
from vhostmp.errors import LocalError
from vhostmp.parts import DeviceState, new_id
from vhostmp.replacer import Replacer
from vhostmp.shm import layout
from vhostmp.snapshot import worker_numbers
from vhostmp.workers.pool import WorkerPool
from vhostmp.workers.processes import PagerProcess, WorkerProcess

if TYPE_CHECKING:
    from vhostmp.device import Device
    from vhostmp.in_force import StateInForce
    from vhostmp.keeper import Keeper
    from vhostmp.kept_device import KeptDevice

log = logging.getLogger(__name__)

#: How long a worker may stand still, seconds: what a slow disk or a back-end in Python may take is well below.
WATCHDOG_SECONDS: Final = 10.0
WATCHDOG_MIN: Final = 0.1
WATCHDOG_MAX: Final = 3600.0


class Pool:
    """Worker processes for any number of devices. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        workers: int = 1,
        *,
        sandbox: bool = True,
        cpus: Sequence[int] = (),
        watchdog: float = WATCHDOG_SECONDS,
        restart_limit: RestartLimit | None = None,
        changed: Callable[[WorkerPool], None] | None = None,
        found: tuple[dict[str, Any], Callable[[str], int]] | None = None,
        doomed: Set[int] = frozenset(),
        before_deaths: Callable[[memoryview], None] = lambda buf: None,
        keeper: Keeper | None = None,
    ) -> None:
        """Start `workers` worker processes (1 to 64). Raises LocalError or SysError; nothing is left then.

        `sandbox`: workers have no rights beyond what they are given (workers/sandbox/__init__.py). Without it a
        back-end in Python may open files and sockets whenever it likes, and so may whoever takes a worker over.

        `cpus`: processors for the workers' data threads, worker n on the n-th, round and round. Each must be one that
        this process may run on (LocalError); none: the kernel places them.

        A worker that stands still for `watchdog` seconds is killed and replaced; 0: none is. A ring that costs more
        workers than `restart_limit` allows (5 in 10 s) is marked broken.

        `changed`: called when a process has come or gone, by who has the processes outlive this one. `found`: what
        WorkerPool.adopt needs: go on with the processes that a control process before us started, but for the workers
        `doomed`, which are killed first; `before_deaths` is given the control segment before anybody is asked who
        lives. `keeper`: for descriptors that must outlive this process.
        """
        if not watchdog == 0 and not WATCHDOG_MIN <= watchdog <= WATCHDOG_MAX:
            raise LocalError(f"watchdog of {watchdog:g} s: choose {WATCHDOG_MIN:g} to {WATCHDOG_MAX:g}, or 0 for none")
        if strangers := set(cpus) - os.sched_getaffinity(0):
            allowed = " ".join(map(str, sorted(os.sched_getaffinity(0))))
            raise LocalError(f"processor {min(strangers)} is not one that this process may run on: {allowed}")
        self.lock: Final = threading.RLock()
        self._keeper = keeper
        self._imported = renewal.NOTHING
        if found is not None and changed is not None:
            self._pool = WorkerPool.adopt(*found, changed, cpus)
            before_deaths(self.buf)
            self._pool.take_over(doomed)
        elif changed is not None:
            self._pool = WorkerPool(workers, changed, is_kept=True, sandboxed=sandbox, cpus=cpus)
        else:
            self._pool = WorkerPool(workers, sandboxed=sandbox, cpus=cpus)
        self._devices: dict[int, Device] = {}
        self._rings_free: list[range] = [range(layout.CONSTANTS["RINGS_MAX"])]
        self._unsettled: set[StateInForce] = set()
        self._closing = False
        self._replacer: Final = Replacer(
            self.lock,
            self._pool,
            self._devices,
            watchdog=watchdog,
            limit=restart_limit or RestartLimit(),
            settle=self._settle,
        )

    @property
    def restarts(self) -> int:
        """How many workers have been replaced."""
        return self._replacer.restarts

    @property
    def buf(self) -> memoryview:
        """The control segment."""
        return self._pool.segment.buf

    @property
    def segment_name(self) -> str:
        """The control segment's name."""
        return self._pool.segment.name

    @property
    def workers(self) -> list[WorkerProcess]:
        """The workers, by slot."""
        return [worker for _, worker in sorted(self._pool.workers.items())]

    @property
    def sandboxed(self) -> bool:
        """Whether workers have given up what they do not need."""
        return self._pool.sandboxed

    @property
    def size(self) -> int:
        """How many workers there are."""
        return len(self._pool.workers)

    @property
    def has_spare(self) -> bool:
        """Whether a process is ready to take the place of the next worker that dies."""
        return self._pool.has_spare

    @property
    def dying(self) -> int:
        """How many processes are not gone yet whose place others have taken."""
        return self._replacer.dying

    def worker(self, index: int) -> WorkerProcess:
        """Return a worker. ENODEV when there is none of that id (its slot)."""
        try:
            return self._pool.workers[index]
        except KeyError:
            known = " ".join(str(worker.index) for worker in self.workers)
            raise LocalError(f"no worker {index} among {known or 'none'}", errno.ENODEV) from None

    def new_worker(self) -> int:
        """Start another worker process, which serves nothing yet, and return its id: the lowest slot that is free.

        ENOSPC when there are 64, SysError when the process cannot start.
        """
        with self.lock:
            self._check_open()
            worker = self._pool.add()
            self._replacer.is_new(worker.index)
            log.info("worker %d (pid %d) is new", worker.index, worker.pid)
            return worker.index

    def free_worker(self, index: int) -> None:
        """End a worker process. ENODEV when there is none of that id, EBUSY while a queue pair is attached to it.

        EBUSY for the last one too: a pool has at least one.
        """
        with self.lock:
            self._check_open()
            pid = self.worker(index).pid
            if pairs := self.loads()[index]:
                raise LocalError(
                    f"worker {index} is busy, queue pairs: {pairs}: attach them to another first", errno.EBUSY
                )
            if self.size == 1:
                raise LocalError(f"worker {index} is the only one: start another first", errno.EBUSY)
            self._pool.remove(index)
            self._replacer.wake()
            log.info("worker %d (pid %d) is freed", index, pid)

    @property
    def is_closing(self) -> bool:
        """Whether the workers end, or have ended."""
        return self._closing

    @property
    def devices(self) -> list[Device]:
        """The devices that are not closed."""
        return [device for device in self._devices.values() if not device.is_closed]

    def named(self, name: str) -> list[Device]:
        """List the devices of that name: one, where whoever makes them gives each its own."""
        return [device for device in self.devices if device.name == name]

    def loads(self) -> dict[int, int]:
        """Return how many queue pairs (or queues) are attached to each worker, running or not."""
        counts = dict.fromkeys((worker.index for worker in self.workers), 0)
        for device in self._devices.values():
            for index in device.placement:
                counts[index] += 1
        return counts

    def spread(self, groups: int) -> tuple[int, ...]:
        """Choose a worker for each of so many new queue pairs: the one with the fewest, the first of those."""
        with self.lock:
            self._check_open()
            counts = self.loads()
            chosen: list[int] = []
            for _ in range(groups):
                index = min(counts, key=lambda worker: (counts[worker], worker))
                counts[index] += 1
                chosen.append(index)
            return tuple(chosen)

    def kill_worker(self, index: int) -> None:
        """SIGKILL a worker, as a crash would; it is replaced. For tests and demonstrations."""
        with self.lock:
            self._pool.kill(index)

    def dead(self, indices: Iterable[int]) -> list[int]:
        """Return those of some workers that have died and are not replaced yet."""
        return [index for index in indices if self._replacer.is_dead(index)]

    def revive(self, index: int) -> None:
        """Replace a worker that has died, now: for a verb that needs it and keeps the supervisor thread from it."""
        with self.lock:
            self._replacer.replace([index])

    def hold(self, fd: int) -> str | None:
        """Keep a descriptor open over the death of this process; return its name. None: nothing is kept."""
        if self._keeper is None:
            return None
        name = f"held.{new_id()}"
        self._keeper.put({name: fd})
        return name

    def release(self, names: Sequence[str]) -> None:
        """Keep some no longer."""
        if self._keeper is not None and names:
            self._keeper.drop(names)

    @property
    def is_renewing(self) -> bool:
        """Whether there is an older spawner, whose workers are still to be renewed."""
        return self._pool.is_renewing

    def begin_renewal(self) -> None:
        """Start a new spawner, by which every worker is to be renewed. SysError: it cannot start."""
        with self.lock:
            self._check_open()
            self._pool.begin_renewal()

    def renew_one(self) -> None:
        """Have one worker's place taken by one of the new spawner, without a packet lost; then end the old spawner.

        Its rings move to a spare worker, and back. VhostError: what a move raises; it is to be tried again then.
        """
        with self.lock:
            self._check_open()
            if not self._pool.old_workers:
                self._end_renewal()
                return
            index = self._pool.old_workers[0]
            spare = self._pool.spare
            if spare is None:
                spare = self._pool.spare = self._new_spare(index)
            killpoints.reach("spare")
            self._move_all(index, spare)
            killpoints.reach("moved")
            self._pool.remove(index)
            killpoints.reach("removed")
            self._pool.add(index)
            self._replacer.is_new(index)
            killpoints.reach("added")
            self._move_all(spare, index)
            killpoints.reach("moved back")
            log.info("worker %d is renewed: pid %d", index, self.worker(index).pid)

    def _new_spare(self, index: int) -> int:
        """Return a worker that is not worker `index`: a new one, or where there is no slot for it, any other."""
        if self.size > self._pool.wanted and (renewed := self._pool.renewed_workers):
            return renewed[0]  # whoever made it was killed in that instant
        try:
            return self.new_worker()
        except LocalError:
            return next(worker.index for worker in self.workers if worker.index != index)

    def _end_renewal(self) -> None:
        """Every worker is the new spawner's: free the spare one, unless it took a place; end the old spawner."""
        spare = self._pool.spare
        if spare in self._pool.workers and not self.loads()[spare] and self.size > self._pool.wanted:
            self.free_worker(spare)
        self._pool.end_renewal()

    def _move_all(self, source: int, target: int) -> None:
        """Move every group of rings of one worker to another one."""
        for device in list(self._devices.values()):
            for group, index in enumerate(device.placement):
                if index == source:
                    device.attach_worker(group, target)

    def changed(self) -> None:
        """Have the processes written once more."""
        with self.lock:
            self._pool.changed(self._pool)

    def kill_spawner(self) -> None:
        """SIGKILL the spawner, and with it every worker; all are replaced. For tests and demonstrations."""
        with self.lock:
            self._pool.kill_spawner()

    def register(self, device: Device, kept: KeptDevice | None = None) -> tuple[int, int]:
        """Give a device its slot and its rings. Returns (device slot, first ring).

        ENOSPC when there is no room, EEXIST when its name is that of an end of a patch (patches.py). `kept`: its slots
        are those that it had, and stay as they are.
        """
        with self.lock:
            self._check_open()
            if kept is not None:
                self._reserve(range(kept.first_ring, kept.first_ring + device.num_queues))
                self._devices[kept.slot] = device
                return kept.slot, kept.first_ring
            patches.check_name(self, device)
            slot = next((i for i in range(layout.CONSTANTS["DEVICES_MAX"]) if i not in self._devices), None)
            free = next((r for r in self._rings_free if len(r) >= device.num_queues), None)
            if slot is None or free is None:
                raise LocalError("no room for another device in this pool", errno.ENOSPC)
            self._rings_free.remove(free)
            if len(free) > device.num_queues:
                self._rings_free.append(range(free.start + device.num_queues, free.stop))
            offset = layout.device_offset(slot)
            layout.DEVICE.write(self.buf, offset, "rings", device.num_queues)
            layout.DEVICE.write(self.buf, offset, "first_ring", free.start)
            for ring in range(free.start, free.start + device.num_queues):
                self._replacer.forgive(ring)
                start = layout.ring_offset(ring)
                self.buf[start : start + layout.RING.size] = bytes(layout.RING.size)
            self._devices[slot] = device
            return slot, free.start

    def _reserve(self, rings: range) -> None:
        """Take certain ring slots from those that are free. LocalError: they are not."""
        for free in self._rings_free:
            if free.start <= rings.start and rings.stop <= free.stop:
                self._rings_free.remove(free)
                self._rings_free += [r for r in (range(free.start, rings.start), range(rings.stop, free.stop)) if r]
                return
        raise LocalError("two devices are on record for the same rings")

    def forgive(self, ring: int) -> None:
        """Forget what a ring slot has cost in workers: it is started anew. The caller holds the lock."""
        self._replacer.forgive(ring)

    def alert(self) -> None:
        """Take note that a device has another state in force. Called by devices, which hold the lock."""
        self._replacer.alert()

    def settle_later(self, device: StateInForce) -> None:
        """Have `device.try_to_settle` called until it has nothing left to try: a verb gave up waiting for a worker."""
        with self.lock:
            self._unsettled.add(device)
        self._replacer.wake()

    def unregister(self, device: StateInForce) -> None:
        """Take a device's slot and rings back. Its rings are stopped."""
        with self.lock:
            self._unsettled.discard(device)
            del self._devices[device.slot]
            layout.DEVICE.write(self.buf, layout.device_offset(device.slot), "rings", 0)
            freed = range(device.first_ring, device.first_ring + device.num_queues)
            merged: list[range] = []
            for block in sorted([*self._rings_free, freed], key=lambda block: block.start):
                if merged and merged[-1].stop == block.start:
                    merged[-1] = range(merged[-1].start, block.stop)
                else:
                    merged.append(block)
            self._rings_free = merged

    def check_python(self, reference: str) -> None:
        """Have workers import a back-end written in Python, so that a mistake in its name is found before it is used.

        LocalError when there is no such class; also when the import kills the worker.
        """
        self._ask_of_class({"op": "check", "reference": reference}, reference)

    def describe_device(self, reference: str) -> dict[str, Any]:
        """Have workers import a device written in Python and return what its class says of itself.

        LocalError when there is no such class, or it is wrong; also when the import kills the worker.
        """
        answer = self._ask_of_class({"op": "describe", "reference": reference}, reference)
        described: dict[str, Any] = answer["described"]
        return described

    def _ask_of_class(self, question: dict[str, Any], reference: str) -> dict[str, Any]:
        with self.lock:
            self._check_open()
            if not self.sandboxed:
                return renewal.ask(self.workers[0], question, reference)
            if (answer := self._imported.answer(self._pool, question)) is not None:
                return answer
            known, self._imported = self._imported, renewal.NOTHING  # unless every worker is renewed
            try:
                self._imported = renewal.renew_for(self._pool, self._devices.values(), question, known)
                return self._imported.answers[reference][1]
            finally:
                for index in self._pool.workers:
                    self._replacer.is_new(index)

    def bequeath(self, sockets: Sequence[tuple[str, int, int]]) -> None:
        """Have these sockets removed, should this process die: path, device and inode of each."""
        with self.lock:
            self._pool.bequeath(sockets)

    def new_pager(self) -> PagerProcess:
        """Start a pager (workers/pager.py), which the caller closes. SysError, or WorkerDied without a spawner."""
        with self.lock:
            self._check_open()
            return self._pool.fork_pager()

    def prepare(
        self, device: StateInForce, state: DeviceState, generation: int, worker: WorkerProcess
    ) -> Callable[[], None]:
        """Give one worker a state that is in force already. Returns what waits until it has it."""
        return self._replacer.prepare(device, state, generation, worker)

    def snapshot(self) -> dict[str, Any]:
        """Return what `vhostmp show` prints of the workers."""
        with self.lock:
            loads = self.loads()
            found = [
                {
                    "pid": one.pid,
                    "pairs": loads[one.index],
                    "cpu": self._pool.cpu_of(one.index),
                    **worker_numbers(self.buf, one.index, one.pid),
                }
                for one in self.workers
            ]
            return {
                "workers": found,
                "spare": self.has_spare,
                "renewing": self.is_renewing,
                "sandboxed": self.sandboxed,
            }

    def close(self) -> None:
        """End every process, close every device, remove the segment. Idempotent. A second or two, whatever hangs.

        Workers end first, so that no device waits for one that is stuck.
        """
        with self.lock:
            if self._closing:
                return
            self._closing = True
        self._replacer.stop()
        with self.lock:
            self._pool.end_workers()
            for device in list(self._devices.values()):
                device.close()
            self._pool.close()
        self._replacer.close()

    def __enter__(self) -> Self:
        """Return itself: the pool is closed when the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _check_open(self) -> None:
        if self._closing:
            raise LocalError("the pool is closed", errno.ESHUTDOWN)

    def _settle(self) -> bool:
        """End what verbs gave up waiting for, as far as workers have come out of their work items. Whether all is."""
        with self.lock:
            for device in list(self._unsettled):
                try:
                    again = not self._closing and device.try_to_settle()
                except Exception:
                    log.exception("device %s: internal error while an earlier change was ended", device.name)
                    again = False
                if not again:
                    self._unsettled.discard(device)
            return not self._unsettled
