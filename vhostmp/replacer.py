"""What has workers replaced that die, or hang: a thread that is told of each worker's end, and what it does then.

One thread per pool is told of each worker's end, by the kernel as it happens (shm/_life.pyx) or else by its pidfd; it
sleeps until then. The dead worker's read-side section is ended, a spare process takes its slot (or one that the
spawner forks; it is restarted if it died too), and each device gives that one its share of the state in force. The
rings resume where the control segment says that they stood; but a ring that kills one worker after the other is marked
broken (deaths.py). The process may take longer to be gone, and only then says of what it died: that is logged when it
is known.

Locks: the pool's, around everything here but `alert`, `wake` and what says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Final

import attrs

from vhostmp import deaths
from vhostmp.deaths import Deaths, RestartLimit
from vhostmp.errors import SysError, VhostError
from vhostmp.flush import answered, ask, retire
from vhostmp.parts import DeviceState
from vhostmp.shm import layout
from vhostmp.shm._life import OTHER_THREAD, LifeWatch, has_ended
from vhostmp.watchdog import Watchdog
from vhostmp.workers.channel import close_all, is_readable
from vhostmp.workers.pool import WorkerPool
from vhostmp.workers.processes import WorkerProcess

if TYPE_CHECKING:
    from vhostmp.device import Device
    from vhostmp.in_force import StateInForce

log = logging.getLogger(__name__)

#: How often to look whether a worker has come out of a work item that a verb gave up waiting for, seconds.
SETTLE_SECONDS: Final = 0.05
#: How long after a replacement a spare is made for the next, seconds: what was replaced may need the processor.
SPARE_DELAY: Final = 0.02
#: How long the spawner may take to say of itself what a worker died of, seconds, before it is asked.
BURY_SECONDS: Final = 0.2
#: How many questions workers are sent, at most, before the answers are read: both fit in what a channel holds.
ASKED_MAX: Final = 16


@attrs.define
class _Dying:
    """A process whose slot has another one already, told of once it is known what it died of. `gone`: since when."""

    old: WorkerProcess
    new_pid: int
    gone: float = 0.0


class Replacer:
    """Replaces the workers of a pool. `stop`, then the end of the workers, then `close`."""

    def __init__(
        self,
        lock: threading.RLock,
        pool: WorkerPool,
        devices: Mapping[int, Device],
        *,
        watchdog: float,
        limit: RestartLimit,
        settle: Callable[[], bool],
    ) -> None:
        """Watch the workers of `pool` from now on, which serve `devices`.

        `watchdog` is in seconds, 0 for none. `settle` is called whenever something has happened, and again after a
        while when it says that there is more to come.
        """
        self.lock: Final = lock
        self.restarts = 0
        self._pool: Final = pool
        self._buf: Final = pool.segment.buf
        self._devices: Final = devices
        self._settle: Final = settle
        self._settled = True
        self._deaths: Final = Deaths(limit)
        for index in pool.workers:
            self._begun(index)
        self._noted: set[int] = set()  # pids of workers whose death has been entered
        self._suspects: dict[int, range] = {}  # rings whose device a worker was being given when it died, by pid
        self._dying: list[_Dying] = []
        self._ended = False
        self._wake: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._life: Final = LifeWatch(self._buf)
        self._watchdog: Final = (
            Watchdog(self._buf, watchdog, lambda: list(pool.workers.values()), self._kicks) if watchdog else None
        )
        self._threads: Final = [
            threading.Thread(target=self._watch, name="vhostmp-supervisor", daemon=True),
            threading.Thread(target=self._mind, name="vhostmp-lifewatch", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Replace nobody any more. Without the lock. Idempotent."""
        self._ended = True
        self.wake()
        self._life.stop()
        for thread in self._threads:
            thread.join()
        self._life.close()
        if self._watchdog is not None:
            self._watchdog.stop()

    def close(self) -> None:
        """Let go of descriptors. Once, after `stop`."""
        for dying in self._dying:
            dying.old.close()
        os.close(self._wake)

    def wake(self) -> None:
        """Have the thread look at everything once more. From any thread."""
        os.eventfd_write(self._wake, 1)

    def alert(self) -> None:
        """Take note that a device has another state in force. From any thread."""
        if self._watchdog is not None:
            self._watchdog.alert()

    def forgive(self, ring: int) -> None:
        """Forget what a ring slot has cost in workers: it is started anew."""
        self._deaths.forgive(ring)

    def is_new(self, index: int) -> None:
        """Take note of a worker that is no other's replacement."""
        self._deaths.new(index)
        self._begun(index)
        self.wake()

    @property
    def dying(self) -> int:
        """How many processes are not gone yet whose place others have taken."""
        return len(self._dying)

    def prepare(
        self, device: StateInForce, state: DeviceState, generation: int, worker: WorkerProcess
    ) -> Callable[[], None]:
        """Give one worker a state that is in force already. Returns what waits until it has it."""
        asked = ask(device, state, generation, [worker])

        def wait() -> None:
            refusal = answered(asked, state, new_backend=False)
            if refusal is not None:
                close_all(retire(device, generation - 1, state, None, [worker], older=True).values())
                log.error("device %s: worker %d cannot resume: %s", device.name, worker.index, refusal)
            elif self.is_dead(worker.index):  # it is replaced again
                self._suspects[worker.pid] = range(device.first_ring, device.first_ring + device.num_queues)
            worker.nudge()

        return wait

    def _workers(self) -> list[WorkerProcess]:
        return [worker for _, worker in sorted(self._pool.workers.items())]

    def _begun(self, index: int) -> None:
        items = layout.WORKER.read(self._buf, layout.worker_offset(index), "items")
        self._deaths.started(index, time.monotonic(), items)

    def _watch(self) -> None:
        """Replace workers that die, until the pool closes. The supervisor thread."""
        due: dict[int, float] = {}  # dead workers that are not replaced yet, and when each is to be
        spare_due = 0.0
        while True:
            with self.lock:
                if self._ended:
                    return
                fds = [worker.pidfd for worker in self._workers() if worker.index not in due]
                fds += [dying.old.pidfd for dying in self._dying if not dying.gone]
                fds += [fd for fd in [self._pool.spare_coming] if fd >= 0]
                times = [*due.values(), *(dying.gone + BURY_SECONDS for dying in self._dying if dying.gone)]
                if not self._pool.has_spare and self._pool.spare_coming < 0:
                    times.append(spare_due)
            self._wait(fds, min(times, default=None))
            with self.lock:
                if self._ended:
                    return
                now = time.monotonic()
                for worker in self._workers():
                    if worker.index not in due and self.is_dead(worker.index):
                        due[worker.index] = now + self._note(worker)
                ready = [index for index, when in due.items() if when <= now]
                for index in ready:
                    del due[index]
                for index in self.replace(ready):
                    due[index] = time.monotonic() + deaths.RESTART_DELAY
                if ready:
                    spare_due = time.monotonic() + SPARE_DELAY
                elif not self._see_to_a_spare(time.monotonic() >= spare_due):
                    spare_due = time.monotonic() + deaths.RESTART_DELAY
            self._bury()
            self._settled = self._settle()

    def _see_to_a_spare(self, due: bool) -> bool:
        """Ask for a spare when it is due, take the one that has come. False: it cannot be had now."""
        try:
            if self._pool.spare_coming >= 0 and is_readable(self._pool.spare_coming):
                self._pool.take_spare()
            elif due:
                self._pool.ask_for_spare()
        except (VhostError, OSError) as error:
            log.debug("no spare worker: %s", error)
            return False
        return True

    def _mind(self) -> None:
        """Have the supervisor thread know of each worker's end at once, and verbs too. A thread that takes no lock."""
        while self._life.wait():
            for worker in list(self._pool.workers.values()):
                if has_ended(self._buf, worker.index):
                    worker.channel.cut()  # a verb may wait for its answer
            os.eventfd_write(self._wake, 1)

    def _wait(self, fds: list[int], until: float | None) -> None:
        """Sleep until there may be something to do, at the latest `until`."""
        poll = select.poll()
        for fd in (self._wake, *fds):
            poll.register(fd, select.POLLIN)
        limits = [] if self._settled else [SETTLE_SECONDS]
        limits += [max(0.0, until - time.monotonic())] if until is not None else []
        ready = {fd for fd, _ in poll.poll(min(limits) * 1000 if limits else None)}
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)

    def is_dead(self, index: int) -> bool:
        """Whether there is such a worker, and it has died. A worker may have been freed while we looked away."""
        worker = self._pool.workers.get(index)
        return worker is not None and (has_ended(self._buf, index) or not worker.alive)

    def _kicks(self, index: int) -> list[int] | None:
        """List the kick eventfds of the rings that a worker serves; None while a verb changes them."""
        if not self.lock.acquire(blocking=False):
            return None
        try:
            return [fd for device in self._devices.values() for fd in device.kicks_of(index)]
        finally:
            self.lock.release()

    def _note(self, worker: WorkerProcess) -> float:
        """Enter a worker's death, and mark rings broken that are to blame. Returns seconds to wait before another one.

        Once for each: what its slot says of it is the next one's soon.
        """
        if worker.pid in self._noted:
            return 0.0
        self._noted.add(worker.pid)
        now = time.monotonic()
        offset = layout.worker_offset(worker.index)
        doing, fault, items = (layout.WORKER.read(self._buf, offset, name) for name in ("doing", "fault", "items"))
        hang = self._watchdog.took(worker.pid) if self._watchdog is not None else None
        suspects = self._suspects.pop(worker.pid, range(0))
        if doing and fault == signal.SIGBUS:
            self._break(doing - 1, "memory")
        elif doing and fault < OTHER_THREAD:
            suspects = range(doing - 1, doing)
        if hang is None or not hang.innocent:
            spent = 0.0 if hang is None else hang.seconds
            for ring in suspects:
                self._blame(ring, worker.index, now, own_doing=bool(fault), spent=spent)
        return self._deaths.delay(worker.index, now, items)

    def _blame(self, ring: int, worker: int, now: float, *, own_doing: bool, spent: float) -> None:
        """Enter a death in a work item of a ring slot; break it when it was one too many."""
        offset = layout.ring_offset(ring)
        if layout.RING.read(self._buf, offset, "worker") != 1 + worker:
            return
        layout.RING.write(self._buf, offset, "deaths", layout.RING.read(self._buf, offset, "deaths") + 1)
        progress = layout.RING.read(self._buf, offset, "batches")
        if self._deaths.blame(ring, now, progress, own_doing=own_doing, spent=spent):
            self._break(ring, "deaths")

    def replace(self, indices: Iterable[int]) -> list[int]:
        """Replace workers that are dead, all at once. Returns those that cannot be replaced now."""
        failed: list[int] = []
        waits: list[tuple[WorkerProcess, Callable[[], None]]] = []
        replaced = 0
        for index in indices:
            try:
                worker = self._start_another(index) if self.is_dead(index) else None
            except Exception:  # whatever it is, the next attempt may succeed, and other workers need us
                log.exception("worker %d cannot be replaced", index)
                worker = None
            if worker is None:
                failed += [index] if self.is_dead(index) else []
                continue
            replaced += 1
            for device in self._devices.values():
                with _killed_unless_resumed(worker):
                    wait = None if self._is_hopeless(device, index) else device.resume(worker)
                    if wait is not None:
                        waits.append((worker, wait))
                if len(waits) >= ASKED_MAX:
                    _call(waits)
        _call(waits)
        self.restarts += replaced
        return failed

    def _start_another(self, index: int) -> WorkerProcess | None:
        """Put another worker in a dead one's place; None when there can be none now."""
        dead = self._pool.workers[index]
        self._note(dead)
        for device in self._devices.values():
            device.note_death(index)
        for _ in range(2):
            try:
                worker, old = self._pool.replace(index)
                break
            except SysError as error:  # the spawner lives and cannot fork now: the other workers are to go on
                log.error("worker %d (pid %d) died and cannot be replaced yet: %s", index, dead.pid, error)
                return None
            except VhostError:
                # The spawner has died, and all workers with it: each is replaced in its turn.
                self._pool.start_spawner()
        else:
            log.error("worker %d (pid %d) died and cannot be replaced", index, dead.pid)
            return None
        self._begun(index)
        self._noted.discard(old.pid)
        self._dying.append(_Dying(old, worker.pid))
        return worker

    def _is_hopeless(self, device: Device, index: int) -> bool:
        """Whether all that a worker could serve of a device are rings that have cost too many workers."""
        broken = [
            layout.RING.read(self._buf, layout.ring_offset(device.first_ring + ring), "broken")
            for ring in device.started_on(index)
        ]
        return bool(broken) and all(reason == layout.CONSTANTS["BROKEN_DEATHS"] for reason in broken)

    def _bury(self) -> None:
        """Say of what those died that are replaced and gone, once it is known; the spawner tells with its next answer.

        It is asked only after a while: who has to wait for its answer replaces nobody meanwhile.
        """
        with self.lock:
            now = time.monotonic()
            for dying in self._dying:
                if not dying.gone and not dying.old.alive:
                    dying.gone = now
            gone = [dying for dying in self._dying if dying.gone]
            if not gone or self._ended:
                return
            late = any(now >= dying.gone + BURY_SECONDS for dying in gone)
            exits = self._pool.exits({dying.old.pid for dying in gone}, ask=late)
            for dying in gone:
                if late or dying.old.pid in exits:
                    self._dying.remove(dying)
                    dying.old.close()
                    log.warning(
                        "worker %d (pid %d) died%s: replaced by pid %d",
                        dying.old.index,
                        dying.old.pid,
                        deaths.how(exits.get(dying.old.pid)),
                        dying.new_pid,
                    )

    def _break(self, number: int, reason: str) -> None:
        """Mark a ring slot broken whose work has killed its worker; the worker's other rings go on.

        Where memory was taken away (truncated by the front-end) it is all rings of its group, which may have been
        served in one work item.
        """
        for device in self._devices.values():
            if number in range(device.first_ring, device.first_ring + device.num_queues):
                index = number - device.first_ring
                for ring in device.group_of(index) if reason == "memory" else [index]:
                    device.break_ring(ring, reason)


def _call(waits: list[tuple[WorkerProcess, Callable[[], None]]]) -> None:
    """Call and forget."""
    for worker, wait in waits:
        with _killed_unless_resumed(worker):
            wait()
    waits.clear()


@contextlib.contextmanager
def _killed_unless_resumed(worker: WorkerProcess) -> Generator[None]:
    """End a worker that could not be given its share, whatever it was: it would serve a part, and nobody the rest.

    The next one may get it; other workers get theirs.
    """
    try:
        yield
    except Exception:
        log.exception("worker %d (pid %d) cannot resume, and is replaced again", worker.index, worker.pid)
        worker.kill()
