"""The watchdog: finds workers that stand still, and kills them, which is all it takes: whoever dies is replaced.

Theory of operation. A worker's data thread sleeps in epoll or is at work; it blocks nowhere else for long. So a worker
whose slot in the control segment does not say that it sleeps, and in whose slot nothing has changed for the time limit,
hangs: in a work item (an endless loop in a back-end's Python code, SIGSTOP) or between two. One that sleeps while a
driver's kick waits unread is nudged: it wakes up and goes to sleep again, unless it was stopped in its sleep. A worker
that sleeps and has nothing to do is never touched, stopped or not.

While every worker sleeps and no kick waits, so does the watchdog, until a kick is written; once a minute it looks all
the same, for one that was woken by something else. Otherwise it looks four times within the limit, at least every
second. Time is counted in looks, each at most two intervals long: when this process was stopped with its workers, or
the machine was suspended, nothing of that counts.

Left alone are a worker that is traced (gdb, strace), and one that waits for a page of a guest in post-copy, which is
not its fault; a verb that needs it has it killed (flush.py).

Contexts: a thread of its own; `alert` is called from any. It takes the pool's lock only where that is free: a verb that
waits for the very worker that hangs holds it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import attrs

from vhostmp.shm import layout
from vhostmp.snapshot import process_status

if TYPE_CHECKING:
    from vhostmp.workers.processes import WorkerProcess

log = logging.getLogger(__name__)

#: Looks within the time limit.
LOOKS: Final = 4
LOOK_MAX: Final = 1.0
#: The longest sleep, seconds.
IDLE_SECONDS: Final = 60.0
#: How long a worker may take to begin, seconds, however short the limit: longer than pool.ANSWER_TIMEOUT, which is for
#: what it may have to import.
BEGIN_SECONDS: Final = 25.0
#: What a worker at work changes in its slot: any of these.
_SIGNS: Final = ("seq", "items", "wakeups", "polls", "asleep")


@attrs.define
class _Seen:
    """What was seen of one worker process. Times in seconds."""

    pid: int
    signs: tuple[int, ...] = ()
    still: float = 0.0
    nudged: bool = False
    traced: bool = False
    killed: bool = False


@attrs.frozen
class Hang:
    """A worker that was killed for it: after how many seconds; `innocent` when its ring is not to blame."""

    seconds: float
    innocent: bool


class Watchdog:
    """Watches the workers of a pool; `stop` ends it."""

    def __init__(
        self,
        buf: memoryview,
        seconds: float,
        workers: Callable[[], Sequence[WorkerProcess]],
        kicks: Callable[[int], Sequence[int] | None],
    ) -> None:
        """Kill a worker that stands still for `seconds`.

        `buf` is the control segment. `workers` lists the workers, `kicks` the kick eventfds of what a worker slot
        serves, None when that cannot be told now; both are called from the watchdog's thread.
        """
        self._buf: Final = buf
        self._limit: Final = seconds
        self._interval: Final = min(seconds / LOOKS, LOOK_MAX)
        self._workers: Final = workers
        self._kicks: Final = kicks
        self._seen: dict[int, _Seen] = {}
        self._hangs: dict[int, Hang] = {}
        self._ended = False
        self._looked = time.monotonic()
        self._idle = False
        self._bell: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: Final = threading.Thread(target=self._run, name="vhostmp-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Once."""
        self._ended = True
        os.eventfd_write(self._bell, 1)
        self._thread.join()
        os.close(self._bell)

    def alert(self) -> None:
        """Look again at what there is to be watched: it may have changed. Cheap unless the watchdog sleeps."""
        if self._idle:
            os.eventfd_write(self._bell, 1)

    def took(self, pid: int) -> Hang | None:
        """Return why the watchdog killed a process, once; None when it did not."""
        return self._hangs.pop(pid, None)

    def _run(self) -> None:
        while not self._ended:
            try:
                self._sleep()
                self._look(self._elapsed(time.monotonic()))
            except Exception:  # the next look may succeed
                log.exception("internal error of the watchdog")

    def _elapsed(self, now: float) -> float:
        """Return the time since the look before that counts: beyond two intervals we were stopped, or suspended."""
        before, self._looked = self._looked, now
        return min(now - before, 2 * self._interval)

    def _sleep(self) -> None:
        """Let time pass: an interval, or longer as long as every worker sleeps and nothing waits for one."""
        workers = self._workers()
        self._idle = True  # from here on `alert` tells of kick descriptors that are not in the list
        kicks = [self._kicks(worker.index) for worker in workers]
        self._idle = None not in kicks and all(self._word(worker, "asleep") for worker in workers)
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        if self._idle:
            for fd in (fd for served in kicks if served is not None for fd in served):
                poll.register(fd, select.POLLIN)
        nudged = any(seen.nudged for seen in self._seen.values())
        woken = poll.poll((IDLE_SECONDS if self._idle and not nudged else self._interval) * 1000)
        self._idle = False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        if woken and not self._ended:  # not by the bell alone: what was kicked gets its time to answer
            poll = select.poll()
            poll.register(self._bell, select.POLLIN)
            poll.poll(self._interval * 1000)

    def _look(self, elapsed: float) -> None:
        """Look at every worker, `elapsed` seconds after the last time."""
        workers = list(self._workers())
        self._seen = {
            worker.index: seen
            if (seen := self._seen.get(worker.index)) is not None and seen.pid == worker.pid
            else _Seen(worker.pid)
            for worker in workers
        }
        for worker in workers:
            self._look_at(worker, self._seen[worker.index], elapsed)

    def _look_at(self, worker: WorkerProcess, seen: _Seen, elapsed: float) -> None:
        signs = tuple(self._word(worker, name) for name in _SIGNS)
        if signs != seen.signs:
            seen.signs, seen.still, seen.nudged = signs, 0.0, False
            return
        if seen.killed or not worker.alive:
            return
        if self._word(worker, "asleep") and not seen.nudged:
            if self._is_kicked(worker.index):
                seen.nudged = True
                seen.still = 0.0
                worker.nudge()
            return
        seen.still += elapsed
        limit = self._limit if self._word(worker, "life") else max(self._limit, BEGIN_SECONDS)
        if seen.still >= limit and not worker.waits_for_page:
            self._kill(worker, seen)

    def _kill(self, worker: WorkerProcess, seen: _Seen) -> None:
        status = process_status(worker.pid)
        if status.get("TracerPid", "0") != "0":
            if not seen.traced:
                seen.traced = True
                log.warning("worker %d (pid %d) hangs and is being traced: left alone", worker.index, worker.pid)
            return
        state = status.get("State", "?")[:1]
        doing = self._word(worker, "doing")
        log.error(
            "worker %d (pid %d) has not moved for %.3g s (%s, state %s): killed",
            worker.index,
            worker.pid,
            seen.still,
            f"ring slot {doing - 1}" if doing else "outside of rings",
            state,
        )
        # Stopped by somebody, or asleep in a device's driver: that is not the ring's doing.
        self._hangs[worker.pid] = Hang(seen.still, innocent=state not in "RS")
        offset = layout.worker_offset(worker.index)
        layout.WORKER.write(self._buf, offset, "hangs", layout.WORKER.read(self._buf, offset, "hangs") + 1)
        seen.killed = True
        worker.kill()

    def _is_kicked(self, index: int) -> bool:
        """Whether a kick waits for a worker that it has not read. A ring that is not served leaves its kicks unread."""
        kicks = self._kicks(index)
        if not kicks:
            return False
        poll = select.poll()
        for fd in kicks:
            poll.register(fd, select.POLLIN)
        return any(event & select.POLLIN for _, event in poll.poll(0))

    def _word(self, worker: WorkerProcess, name: str) -> int:
        return layout.WORKER.read(self._buf, layout.worker_offset(worker.index), name)
