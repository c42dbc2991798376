"""A pool of worker processes and their spawner, as the control process sees them.

Starts, addresses and ends workers; knows nothing of devices (`vhostmp.supervisor` does, and replaces what dies). Not
thread-safe: the caller holds one lock around every call.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence, Set
from typing import Any, Final

from vhostmp.errors import LocalError, SysError, VhostError, WorkerDied
from vhostmp.shm import layout
from vhostmp.shm._epoch import end_section_of_dead
from vhostmp.shm.segment import Segment, sweep
from vhostmp.workers import sandbox
from vhostmp.workers.channel import Channel, Message, is_readable
from vhostmp.workers.deaths import note_death
from vhostmp.workers.logs import WorkerLogHandler
from vhostmp.workers.processes import (
    ANSWER_TIMEOUT,
    ROOM_TIMEOUT,
    STOP_TIMEOUT,
    PagerProcess,
    SpawnerProcess,
    Starting,
    WorkerProcess,
    answer_to,
    take_inventories,
)

log = logging.getLogger(__name__)

#: How many wait statuses are kept that may be asked for.
EXITS_MAX: Final = 256

_BOOT: Final = (
    "import json,sys; sys.path[:] = json.loads(sys.argv[1])['path']; from vhostmp.workers.spawner import main; main()"
)


#: What a pool consists of, as plain data, and the descriptors that it names: for `WorkerPool.adopt`.
Kept = tuple[dict[str, Any], dict[str, int]]
_KEPT_FDS: Final = ("channel", "nudge", "log", "pidfd")


class WorkerPool:
    """A control segment, a spawner, and workers by slot: `size` of them at first, up to WORKERS_MAX.

    `changed` is called whenever a process has come or gone; whoever wants all of it to outlive this process sets it,
    and `is_kept`, so that the spawner does not watch this process, before a spawner is started.
    """

    def __init__(
        self,
        size: int,
        changed: Callable[[WorkerPool], None] = lambda pool: None,
        *,
        is_kept: bool = False,
        sandboxed: bool = True,
        cpus: Sequence[int] = (),
    ) -> None:
        """Start them; `sandboxed`: with no rights beyond what they are given (workers/sandbox).

        `cpus`: processors for their data threads, worker n on the n-th, round and round; none: where the kernel wants.

        Raises LocalError on a bad size, SysError when a process cannot start; nothing is left then.
        """
        if not 1 <= size <= layout.CONSTANTS["WORKERS_MAX"]:
            raise LocalError(f"{size} workers: choose 1 to {layout.CONSTANTS['WORKERS_MAX']}")
        if sandboxed:
            sandbox.check()
        if names := sweep():
            log.info("removed what processes that are gone have left: %s", " ".join(names))
        segment = Segment.create(layout.SEGMENT_SIZE, header=True)
        self._begin(segment, changed, is_kept=is_kept, sandboxed=sandboxed, cpus=cpus)
        try:
            self.segment.ready()
            self.start_spawner()
            for index in range(size):
                self.workers[index] = self._fork(index)
            self.changed(self)
        except BaseException:
            self.close()
            raise

    def _begin(
        self,
        segment: Segment,
        changed: Callable[[WorkerPool], None],
        *,
        is_kept: bool,
        sandboxed: bool,
        modules: Sequence[str] = (),
        cpus: Sequence[int] = (),
    ) -> None:
        self.segment = segment
        self.cpus = tuple(cpus)
        self.sandboxed = sandboxed
        #: References of the modules that workers import before they give up their rights (vhostmp/renewal.py).
        self.modules: list[str] = list(modules)
        self._sockets: Sequence[tuple[str, int, int]] = ()
        self.workers: dict[int, WorkerProcess] = {}
        self._spare: WorkerProcess | None = None
        self._coming: Starting | None = None
        self._spare_modules: list[str] = []
        self._exits: dict[int, int] = {}
        self._spawner: SpawnerProcess | None = None
        self.changed = changed
        self._is_kept = is_kept
        self._old_spawner: SpawnerProcess | None = None
        self._renewed: set[int] = set()  # pids of workers that the new spawner started
        self.spare: int | None = None  # a worker for the time of the renewal
        self.wanted = 0  # how many workers there were when it began

    @classmethod
    def adopt(
        cls,
        plain: dict[str, Any],
        take: Callable[[str], int],
        changed: Callable[[WorkerPool], None],
        cpus: Sequence[int] = (),
    ) -> WorkerPool:
        """Go on with the processes that a control process before us started: what `describe` returned.

        `cpus` are for all of them, from `take_over` on; none: those that live stay where they are.

        `take` returns descriptors by name, ours from then on. Nobody is asked anything here: `take_over` does that.
        Raises: LocalError: the segment is of another version; nothing has been taken but it.
        """
        pool = cls.__new__(cls)
        segment = Segment.adopt(take("segment"), plain["segment"])
        pool._begin(
            segment,
            changed,
            is_kept=True,
            sandboxed=plain.get("sandboxed", False),
            modules=plain.get("modules", ()),
            cpus=cpus,
        )
        pool._spawner, pool._old_spawner = (_kept_spawner(plain[which], take) for which in ("spawner", "old_spawner"))
        pool._renewed, pool.spare, pool.wanted = set(plain["renewed"]), plain["spare"], plain["wanted"]
        for index, pid in plain["workers"]:
            channel, nudge, log_name, pidfd = _kept_names(pid)
            log_socket = socket.socket(fileno=take(log_name))
            log_fd = WorkerLogHandler.receiving(log_socket, f"vhostmp-log-{index}").fileno()
            worker = WorkerProcess(index, pid, take(pidfd), Channel.of(take(channel)), take(nudge), log_fd)
            pool.workers[index] = worker
        return pool

    def describe(self) -> Kept:
        """Return the processes as plain data, and the descriptors that it names."""
        fds = {"segment": self.segment.fd}
        for spawner in filter(None, (self._spawner, self._old_spawner)):
            channel, _, _, pidfd = _kept_names(spawner.pid)
            fds |= {channel: spawner.channel.fileno(), pidfd: spawner.pidfd}
        for worker in self.workers.values():
            held = (worker.channel.fileno(), worker.nudge_fd, worker.log_fd, worker.pidfd)
            fds |= dict(zip(_kept_names(worker.pid), held, strict=True))
        plain = {
            "segment": self.segment.name,
            "version": layout.CONSTANTS["SEGMENT_VERSION"],
            "spawner": self._spawner.pid if self._spawner is not None else None,
            "old_spawner": self._old_spawner.pid if self._old_spawner is not None else None,
            "renewed": sorted(self._renewed),
            "spare": self.spare,
            "wanted": self.wanted,
            "workers": [(worker.index, worker.pid) for worker in self.workers.values()],
            "sandboxed": self.sandboxed,
            "modules": self.modules,
        }
        return plain, fds

    def take_over(self, doomed: Set[int] = frozenset()) -> None:
        """Hear from every process that was adopted what it holds; replace those that are dead.

        Whoever asked before us may have died with questions open: their answers are passed over. SysError when no
        process can be started.

        `doomed`: workers that are killed, and replaced: they may wait for something that nobody will do any more.
        """
        self.segment.own()
        for index in range(layout.CONSTANTS["WORKERS_MAX"]):
            # Nobody waits for a section's end but us. Whoever died while it did would have each section end with a
            # wake-up, for ever.
            layout.WORKER.write(self.segment.buf, layout.worker_offset(index), "waiters", 0)
        for index in doomed & self.workers.keys():
            self.workers[index].kill()
        if self._spawner is not None:
            token = os.urandom(8).hex()
            try:
                self._spawner.channel.limit(ROOM_TIMEOUT)
                self._spawner.channel.send({"op": "reap", "token": token})
                answer_to(self._spawner.channel, token)
            except WorkerDied as error:
                log.warning("spawner (pid %d) has died: %s", self._spawner.pid, error)
                self.start_spawner()
        if self._spawner is None:
            self.start_spawner()
        living = take_inventories(self.workers.values())
        for index, worker in list(self.workers.items()):
            if index not in living:
                log.warning("worker %d (pid %d) died meanwhile: replaced", index, worker.pid)
                is_readable(worker.pidfd, STOP_TIMEOUT)
                note_death(self.segment.buf, index)
                self.replace(index)[1].close()
            else:
                self._place(worker)
        self.changed(self)

    def start_spawner(self) -> None:
        """Start a spawner, in place of one that died with all its workers."""
        self._drop_spare()
        self._drop_spawner()
        ours, theirs = Channel.pair()
        arguments = {
            "path": [path or os.getcwd() for path in sys.path],
            "channel": theirs.fileno(),
            "segment": self.segment.fd,
            "name": self.segment.name,
            "control_pid": 0 if self._is_kept else os.getpid(),
            "sandbox": self.sandboxed,
            "log_level": logging.getLogger("vhostmp").getEffectiveLevel(),
        }
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(arguments)],
                pass_fds=(theirs.fileno(), self.segment.fd),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._spawner = SpawnerProcess(child.pid, os.pidfd_open(child.pid), ours, child)
        except OSError as error:
            ours.close()
            raise SysError.wrap("cannot start the spawner", error) from error
        finally:
            theirs.close()
        self.bequeath(self._sockets)
        self.changed(self)

    def bequeath(self, sockets: Sequence[tuple[str, int, int]]) -> None:
        """Have the spawner unlink these sockets, should this process die: path, device and inode of each.

        Where somebody keeps its channel open for the next control process: should they all be gone.
        """
        self._sockets = sockets
        if self._spawner is not None and sockets:
            with contextlib.suppress(WorkerDied):  # the next spawner is told
                self._spawner.channel.send({"op": "bequeath", "sockets": list(sockets)})

    # --- another spawner takes over (vhostmp/upgrade.py) ---

    @property
    def is_renewing(self) -> bool:
        """Whether there is an older spawner beside the one that starts workers."""
        return self._old_spawner is not None

    @property
    def old_workers(self) -> list[int]:
        """The workers that a spawner before this one started, by slot."""
        if self._old_spawner is None:
            return []
        return sorted(index for index, worker in self.workers.items() if worker.pid not in self._renewed)

    @property
    def renewed_workers(self) -> list[int]:
        """The workers that the new spawner started, by slot."""
        return sorted(index for index, worker in self.workers.items() if worker.pid in self._renewed)

    def begin_renewal(self) -> None:
        """Start a new spawner beside the one whose workers run. SysError; the old one stays then."""
        if self._old_spawner is not None:
            return
        self._drop_spare()  # it is of the old one
        old, self._spawner = self._spawner, None
        try:
            self._old_spawner, self.wanted = old, len(self.workers)
            self.start_spawner()
        except BaseException:
            self._spawner, self._old_spawner = old, None
            raise

    def end_renewal(self) -> None:
        """Have the old spawner end, which has no workers any more."""
        old, self._old_spawner, self.spare = self._old_spawner, None, None
        self._renewed.clear()
        if old is not None:
            old.close()
        self.changed(self)

    def replace(self, index: int) -> tuple[WorkerProcess, WorkerProcess]:
        """Put a new worker in the slot of one whose data thread has ended. WorkerDied when the spawner is gone too.

        Returns: the new one; the old one, of which the pidfd is left, the caller's: the process may be there a little
        longer.
        """
        old = self.workers[index]
        old.kill()  # whatever its slot says
        end_section_of_dead(self.segment.buf, index)
        new = self._fork(index)
        old.hang_up()
        self.workers[index] = new
        base = layout.worker_offset(index)
        restarts = layout.WORKER.read(self.segment.buf, base, "restarts")
        layout.WORKER.write(self.segment.buf, base, "restarts", (restarts + 1) & 0xFFFF_FFFF)
        self.changed(self)
        return new, old

    def add(self, index: int | None = None) -> WorkerProcess:
        """Start a worker in the first free slot, or that one. ENOSPC when there is none, SysError when it cannot."""
        if index is None:
            index = next((i for i in range(layout.CONSTANTS["WORKERS_MAX"]) if i not in self.workers), None)
        if index is None:
            raise LocalError(f"there are {len(self.workers)} workers already", errno.ENOSPC)
        base = layout.worker_offset(index)
        for field in layout.WORKER.fields:
            if field.name not in ("seq", "waiters"):  # the section of whoever had the slot has ended: seq is even
                layout.WORKER.write(self.segment.buf, base, field.name, 0)
        self.workers[index] = worker = self._fork(index)
        self.changed(self)
        return worker

    def renew(self, index: int) -> WorkerProcess:
        """Put a new process in the place of a worker that serves nothing, which ends in good order. Errors as `add`."""
        self.remove(index)
        self.workers[index] = worker = self._fork(index)
        self.changed(self)
        return worker

    def remove(self, index: int) -> None:
        """End a worker that serves nothing, and free its slot."""
        worker = self.workers.pop(index)
        self._end([worker])
        end_section_of_dead(self.segment.buf, index)
        layout.WORKER.write(self.segment.buf, layout.worker_offset(index), "pid", 0)
        self.changed(self)

    def exits(self, pids: Set[int], *, ask: bool) -> dict[int, int]:
        """Return wait statuses, by pid, of processes that are known to have ended, each once, as far as they are known.

        They come with the answers of the spawner; with `ask`, it is asked where they have not.
        """
        if ask and not pids <= self._exits.keys():
            with contextlib.suppress(VhostError):
                self._ask_spawner({"op": "reap"})
        found = {pid: self._exits.pop(pid) for pid in pids if pid in self._exits}
        if len(self._exits) > EXITS_MAX:  # of those that nobody has asked for: workers that were freed, spares
            self._exits.clear()
        return found

    def kill(self, index: int) -> None:
        """SIGKILL a worker, as a crash would. It is replaced like any that dies."""
        self.workers[index].kill()

    def kill_spawner(self) -> None:
        """SIGKILL the spawner. The kernel kills the workers with it."""
        if self._spawner is not None:
            self._spawner.kill()

    def end_workers(self) -> None:
        """Have every worker end, in good order where it can; those that have not within STOP_TIMEOUT are killed."""
        self._drop_spare()
        self._end(list(self.workers.values()))
        self.workers.clear()

    @staticmethod
    def _end(workers: Sequence[WorkerProcess]) -> None:
        for worker in workers:
            with contextlib.suppress(VhostError):
                worker.ask({"op": "stop"})
        deadline = time.monotonic() + STOP_TIMEOUT
        for worker in workers:
            if not is_readable(worker.pidfd, max(0.0, deadline - time.monotonic())):
                log.warning("worker %d (pid %d) does not end: killed", worker.index, worker.pid)
                worker.kill()
                is_readable(worker.pidfd, STOP_TIMEOUT)  # its section is not over before it is dead
            worker.close()

    def close(self) -> None:
        """End every worker and the spawner, unlink the segment. Idempotent."""
        self.end_workers()
        if self._old_spawner is not None:
            self.end_renewal()
        self._drop_spawner()
        self.segment.close()

    @property
    def has_spare(self) -> bool:
        """Whether there is a spare, alive or not."""
        return self._spare is not None

    @property
    def spare_coming(self) -> int:
        """The descriptor that becomes readable when the spare that was asked for has come; -1: none was."""
        return self._spawner.channel.fileno() if self._coming is not None and self._spawner is not None else -1

    def ask_for_spare(self) -> None:
        """Ask for a process that takes the place of the next worker that dies. OSError, SysError or WorkerDied."""
        if self._spare is None and self._coming is None:
            self._spare_modules = list(self.modules)
            self._coming = self._ask_to_start(-1)

    def take_spare(self) -> None:
        """Wait for the spare that was asked for. SysError when it cannot start, WorkerDied without a spawner."""
        starting, self._coming = self._coming, None
        if starting is not None:
            self._spare = self._started(starting)

    def renounce_spare(self) -> None:
        """End the spare, if there is one: what it has imported may have changed."""
        self._drop_spare()

    def _drop_spare(self) -> None:
        with contextlib.suppress(VhostError):
            self.take_spare()
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.kill()
            is_readable(spare.pidfd, STOP_TIMEOUT)
            spare.close()

    def _fork(self, index: int) -> WorkerProcess:
        """Start worker `index`: the spare becomes it, or the spawner forks one."""
        base = layout.worker_offset(index)
        for name in ("life", "fault", "doing", "asleep"):  # what whoever had the slot before has left there
            layout.WORKER.write(self.segment.buf, base, name, 0)
        if self._spare_modules != self.modules:
            self._drop_spare()  # it has not imported what back-ends are made from by now
        with contextlib.suppress(SysError):
            self.take_spare()
        worker, self._spare = self._spare, None
        if worker is not None:
            try:
                worker.ask({"op": "be", "index": index})
                worker.index = index
            except WorkerDied:
                worker.close()
                worker = None
        if worker is None:
            worker = self._start(index)
        if self._old_spawner is not None:
            self._renewed.add(worker.pid)
        layout.WORKER.write(self.segment.buf, base, "pid", worker.pid)
        self._place(worker)
        return worker

    def cpu_of(self, index: int) -> int | None:
        """Return the processor of the data thread of worker `index`; None: any."""
        return self.cpus[index % len(self.cpus)] if self.cpus else None

    def _place(self, worker: WorkerProcess) -> None:
        """Give a worker's data thread its processor. One that has gone since we began is no reason not to serve."""
        cpu = self.cpu_of(worker.index)
        if cpu is None:
            return
        try:
            worker.ask({"op": "nothing"})
            worker.answer()  # its other threads are there then, and keep their own places
            os.sched_setaffinity(worker.pid, {cpu})  # of the main thread: that is the data thread
        except WorkerDied:
            pass  # whoever replaces it has a place
        except (VhostError, OSError) as error:
            log.warning("worker %d is not on processor %d: %s", worker.index, cpu, error)

    def _start(self, index: int) -> WorkerProcess:
        """Have the spawner fork worker `index`."""
        self.take_spare()
        return self._started(self._ask_to_start(index))

    def _ask_to_start(self, index: int) -> Starting:
        if self._spawner is None:
            raise WorkerDied("there is no spawner")
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            channel, their_channel = Channel.pair()
            ours.callback(channel.close)
            theirs.callback(their_channel.close)
            records, their_records = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.callback(records.close)
            theirs.callback(their_records.close)
            nudge = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            ours.callback(os.close, nudge)
            fds = [their_channel.fileno(), nudge, their_records.fileno()]
            self._spawner.channel.send({"op": "fork", "index": index, "modules": self.modules}, fds)
            return Starting(index, channel, records, nudge, ours.pop_all())

    def _started(self, starting: Starting) -> WorkerProcess:
        with starting.ours as ours:
            message, fds = self._spawner_answer()
            if "error" in message:
                raise SysError(str(message["error"]))
            ours.pop_all()
        log_fd = WorkerLogHandler.receiving(starting.records, "vhostmp-log").fileno()
        return WorkerProcess(starting.index, message["pid"], fds[0], starting.channel, starting.nudge, log_fd)

    def fork_pager(self) -> PagerProcess:
        """Start a pager. SysError when it cannot start, WorkerDied when the spawner is gone."""
        ours, theirs = Channel.pair()
        touches, pager_touches = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            message, fds = self._ask_spawner({"op": "fork", "pager": True}, [theirs.fileno(), pager_touches.fileno()])
            if "error" in message:
                raise SysError(str(message["error"]))
        except BaseException:
            ours.close()
            touches.close()
            raise
        finally:
            theirs.close()
            pager_touches.close()
        return PagerProcess(message["pid"], fds[0], ours, touches)

    def _ask_spawner(self, message: Message, fds: list[int] | None = None) -> tuple[Message, list[int]]:
        self.take_spare()
        if self._spawner is None:
            raise WorkerDied("there is no spawner")
        self._spawner.channel.send(message, fds or [])
        return self._spawner_answer()

    def _spawner_answer(self) -> tuple[Message, list[int]]:
        if self._spawner is None:
            raise WorkerDied("there is no spawner")
        answer, received = self._spawner.channel.receive(ANSWER_TIMEOUT)
        self._exits.update((int(pid), int(status)) for pid, status in answer.get("exits", {}).items())
        return answer, received

    def _drop_spawner(self) -> None:
        spawner, self._spawner = self._spawner, None
        if spawner is not None:
            spawner.close()


def _kept_spawner(pid: int | None, take: Callable[[str], int]) -> SpawnerProcess | None:
    if pid is None:
        return None
    channel, _, _, pidfd = _kept_names(pid)
    return SpawnerProcess(pid, take(pidfd), Channel.of(take(channel)))


def _kept_names(pid: int) -> list[str]:
    """Return the names of what is kept of a process. Those of `process.` end before all else (vhostmp/holder.py)."""
    return [f"process.{pid}.{what}" for what in _KEPT_FDS]
