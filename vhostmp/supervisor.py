"""The pool as its users see it: workers that are replaced when they die, and the devices that they serve.

One thread per pool watches the workers' pidfds; it sleeps until one dies. The dead worker's read-side section is ended,
the spawner (which is restarted if it died too) forks another into its slot, and each device gives that one its share of
the state in force. The rings resume where the control segment says that they stood.

Locks: `lock` guards everything here and every device of the pool. The watching thread takes it to replace a worker, so
a verb sees a dead worker at worst as one that does not answer, never as one that changes under it.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from vhostmp.errors import LocalError, VhostError, WorkerDied
from vhostmp.flush import prepare
from vhostmp.parts import DeviceState
from vhostmp.shm import layout
from vhostmp.workers.pool import WorkerPool, WorkerProcess

if TYPE_CHECKING:
    from vhostmp.device import Device

log = logging.getLogger(__name__)

#: What a worker dies of when it touches guest memory that its front-end took away.
MEMORY_SIGNALS: Final = (signal.SIGBUS, signal.SIGSEGV)
#: A worker that dies this soon after its start, this often in a row, is started again only after a while (seconds).
EARLY_DEATH: Final = 0.05
EARLY_DEATHS_MAX: Final = 5
RESTART_DELAY: Final = 1.0


class Pool:
    """Worker processes for any number of devices. Use it as a context manager, or call `close`."""

    def __init__(self, workers: int = 1) -> None:
        """Start `workers` worker processes (1 to 64). Raises LocalError or SysError; nothing is left then."""
        self.lock: Final = threading.RLock()
        self.size: Final = workers
        self.restarts = 0
        self._pool: Final = WorkerPool(workers)
        self._devices: dict[int, Device] = {}
        self._rings_free: list[range] = [range(layout.CONSTANTS["RINGS_MAX"])]
        self._started = [time.monotonic()] * workers
        self._early_deaths = [0] * workers
        self._failed = [False] * workers
        self._closing = False
        self._wake: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: Final = threading.Thread(target=self._watch, name="vhostmp-supervisor", daemon=True)
        self._thread.start()

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
        return self._pool.workers

    def kill_worker(self, index: int) -> None:
        """SIGKILL a worker, as a crash would; it is replaced. For tests and demonstrations."""
        with self.lock:
            self._pool.kill(index)

    def kill_spawner(self) -> None:
        """SIGKILL the spawner, and with it every worker; all are replaced. For tests and demonstrations."""
        with self.lock:
            self._pool.kill_spawner()

    def register(self, device: Device) -> tuple[int, int]:
        """Give a device its slot and its rings. Returns (device slot, first ring). ENOSPC when there is no room."""
        with self.lock:
            if self._closing:
                raise LocalError("the pool is closed", errno.ESHUTDOWN)
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
                start = layout.ring_offset(ring)
                self.buf[start : start + layout.RING.size] = bytes(layout.RING.size)
            self._devices[slot] = device
            return slot, free.start

    def unregister(self, device: Device) -> None:
        """Take a device's slot and rings back. Its rings are stopped."""
        with self.lock:
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
        """Have a worker import a back-end written in Python, so that a mistake in its name is found before it is used.

        LocalError when there is no such class; also when the import kills the worker, which is then replaced.
        """
        with self.lock:
            try:
                self.workers[0].ask({"op": "check", "reference": reference})
                self.workers[0].answer()
            except WorkerDied as error:
                raise LocalError(f"{error}, while it imported python back-end {reference!r}") from error

    def describe_device(self, reference: str) -> dict[str, Any]:
        """Have a worker import a device written in Python and return what its class says of itself.

        LocalError when there is no such class, or it is wrong; also when the import kills the worker.
        """
        with self.lock:
            try:
                self.workers[0].ask({"op": "describe", "reference": reference})
                described: dict[str, Any] = self.workers[0].answer()["described"]
            except WorkerDied as error:
                raise LocalError(f"{error}, while it imported device {reference!r}") from error
            return described

    def prepare(self, device: Device, state: DeviceState, generation: int, worker: WorkerProcess) -> None:
        """Give one worker a state that is in force already, and have it look."""
        try:
            prepare(device, None, state, generation, [worker])
        except WorkerDied:
            return  # it is replaced again
        except VhostError as error:
            log.error("device %s: worker %d cannot resume: %s", device.name, worker.index, error)
            return
        worker.nudge()

    def snapshot(self) -> dict[str, Any]:
        """Return what `vhostmp show` prints of the workers."""
        with self.lock:
            return {"workers": [self._worker_snapshot(worker) for worker in self.workers]}

    def close(self) -> None:
        """End every process, close every device, remove the segment. Idempotent. A second or two, whatever hangs.

        Workers end first, so that no device waits for one that is stuck.
        """
        with self.lock:
            if self._closing:
                return
            self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        with self.lock:
            self._pool.end_workers()
            for device in list(self._devices.values()):
                device.close()
            self._pool.close()
        os.close(self._wake)

    def __enter__(self) -> Self:
        """Return itself: the pool is closed when the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _worker_snapshot(self, worker: WorkerProcess) -> dict[str, Any]:
        offset = layout.worker_offset(worker.index)
        numbers = {
            name: layout.WORKER.read(self.buf, offset, name)
            for name in ("restarts", "items", "wakeups", "busy_ns", "switches")
        }
        return {"index": worker.index, "pid": worker.pid, "rss_bytes": _rss_bytes(worker.pid), **numbers}

    def _watch(self) -> None:
        """Replace workers that die, until the pool closes. The supervisor thread."""
        while True:
            with self.lock:
                if self._closing:
                    return
                pidfds = {worker.pidfd: worker.index for worker in self.workers}
            poll = select.poll()
            for fd in (self._wake, *pidfds):
                poll.register(fd, select.POLLIN)
            dead = [pidfds[fd] for fd, _ in poll.poll() if fd in pidfds]
            for index in dead:
                self._hold_back(index)
                with self.lock:
                    if not self._closing and not self.workers[index].alive:
                        try:
                            self._failed[index] = not self._replace(index)
                        except Exception:  # whatever it is, the next attempt may succeed, and other workers need us
                            log.exception("worker %d cannot be replaced", index)
                            self._failed[index] = True

    def _hold_back(self, index: int) -> None:
        """Wait before a worker is started that dies again and again as soon as it starts."""
        early = time.monotonic() - self._started[index] < EARLY_DEATH
        self._early_deaths[index] = self._early_deaths[index] + 1 if early else 0
        if self._failed[index] or self._early_deaths[index] >= EARLY_DEATHS_MAX:
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            poll.poll(RESTART_DELAY * 1000)

    def _replace(self, index: int) -> bool:
        """Replace a dead worker; whether that was possible."""
        pid = self.workers[index].pid
        doing = layout.WORKER.read(self.buf, layout.worker_offset(index), "doing")
        for _ in range(2):
            try:
                worker = self._pool.replace(index)
                break
            except VhostError:
                # The spawner has died, and all workers with it: each is replaced in its turn.
                self._pool.start_spawner()
        else:
            log.error("worker %d (pid %d) died and cannot be replaced", index, pid)
            return False
        self._started[index] = time.monotonic()
        status = self._pool.exits().get(pid)
        if doing and status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) in MEMORY_SIGNALS:
            self._break_ring(doing - 1)
        self.restarts += 1
        for device in self._devices.values():
            device.resume(worker)
        log.warning("worker %d (pid %d) died%s: replaced by pid %d", index, pid, _how(status), worker.pid)
        return True

    def _break_ring(self, number: int) -> None:
        """Mark a ring broken whose memory killed its worker (truncated by the front-end), and those of its group.

        They may have been served in one work item. The replacement leaves them alone; the worker's other rings go on.
        """
        for device in self._devices.values():
            if number in range(device.first_ring, device.first_ring + device.num_queues):
                for index in device.group_of(number - device.first_ring):
                    offset = layout.ring_offset(device.first_ring + index)
                    layout.RING.write(self.buf, offset, "broken", layout.CONSTANTS["BROKEN_MEMORY"])
                    device.report_broken(index)


def _how(status: int | None) -> str:
    if status is None:
        return ""
    if os.WIFSIGNALED(status):
        return f" of {signal.Signals(os.WTERMSIG(status)).name}"
    return f" with exit status {os.waitstatus_to_exitcode(status)}"


def _rss_bytes(pid: int) -> int | None:
    """Return the resident memory of a process that is its own: without what it shares with guests."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
