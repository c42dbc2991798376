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
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence, Set
from typing import Any, Final

import attrs

from vhostmp.errors import LocalError, SysError, VhostError, WorkerDied
from vhostmp.shm import layout
from vhostmp.shm._epoch import end_section_of_dead
from vhostmp.shm._relay import Relay
from vhostmp.shm.segment import Segment, sweep
from vhostmp.workers import sandbox
from vhostmp.workers.channel import Channel, Message, close_all
from vhostmp.workers.logs import WorkerLogHandler

log = logging.getLogger(__name__)

#: How long a worker may take to answer, seconds: preparing maps memory and imports back-ends.
ANSWER_TIMEOUT: Final = 20.0
#: The same while it waits for a page in post-copy, which may be with the interpreter's lock: vhostmp/flush.py has why.
PAGE_TIMEOUT: Final = 5.0
STOP_TIMEOUT: Final = 1.0
#: How long a pager may take to answer, seconds: it maps a file at the most, and may be in its front-end's hands.
PAGER_TIMEOUT: Final = 5.0

_BOOT: Final = (
    "import json,sys; sys.path[:] = json.loads(sys.argv[1])['path']; from vhostmp.workers.spawner import main; main()"
)


@attrs.define(eq=False)
class WorkerProcess:
    """One worker. `parts` are the ids of the parts that it holds, `groups` the rings of its back-ends, by id."""

    index: int
    pid: int
    pidfd: int
    channel: Channel
    nudge_fd: int
    log_fd: int = -1
    parts: set[int] = attrs.field(factory=set[int])
    groups: dict[int, set[int]] = attrs.field(factory=dict[int, set[int]])
    relays: set[Relay] = attrs.field(factory=set[Relay])

    @property
    def waits_for_page(self) -> bool:
        """Whether it waits for a page of guest memory that a front-end in post-copy has not brought yet."""
        return any(relay.waits(self.index) for relay in self.relays)

    @property
    def alive(self) -> bool:
        """Whether the process still runs. False is for good."""
        return not is_readable(self.pidfd)

    def kill(self) -> None:
        """SIGKILL the process. The pidfd makes sure that it is no other one."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def nudge(self) -> None:
        """Have the worker look at the published generations."""
        os.eventfd_write(self.nudge_fd, 1)

    def ask(self, message: Message, fds: list[int] | None = None) -> None:
        """Send a question; `answer` collects the answer. WorkerDied when the worker is gone."""
        try:
            self.channel.send(message, fds or [])
        except WorkerDied as error:
            self.kill()  # alive or not: what it has been told is not known
            raise WorkerDied(f"worker {self.index} (pid {self.pid}): {error}") from error

    def answer(self) -> Message:
        """Return the answer to the oldest question. LocalError when it is a refusal, WorkerDied when none comes."""
        message, fds = self.answer_with_fds()
        close_all(fds)
        return message

    def answer_with_fds(self) -> tuple[Message, list[int]]:
        """`answer`, with the descriptors that came along: the caller's now."""
        if self.relays and not is_readable(self.channel.fileno(), PAGE_TIMEOUT) and self.waits_for_page:
            log.warning("worker %d (pid %d) waits for a page in post-copy: killed", self.index, self.pid)
            self.kill()
        try:
            message, fds = self.channel.receive(ANSWER_TIMEOUT)
        except WorkerDied as error:
            # One that does not answer is as good as dead: a late answer would be taken for that to another question.
            self.kill()
            raise WorkerDied(f"worker {self.index} (pid {self.pid}): {error}") from error
        if "error" in message:
            close_all(fds)
            number = message.get("errno")
            raise LocalError(str(message["error"]), number if isinstance(number, int) and number else None)
        return message, fds

    def take_inventory(self) -> bool:
        """Hear what it holds, which somebody sent who has died. Whether it lives, and answers; else it is killed."""
        token = os.urandom(8).hex()
        try:
            self.channel.send({"op": "inventory", "token": token})
            answer = _answer_to(self.channel, token)
            self.parts = set(answer["parts"])
            known = zip(answer["parts"], answer["groups"], strict=True)
            self.groups = {part_id: set(groups) for part_id, groups in known if groups}
        except (VhostError, KeyError, TypeError, ValueError):
            self.kill()
            return False
        return self.alive

    def close(self) -> None:
        """Close our descriptors of it."""
        self.channel.close()
        os.close(self.nudge_fd)
        os.close(self.pidfd)


@attrs.frozen(eq=False)
class PagerProcess:
    """A pager (pager.py): `touches` is the socket on which its threads are told what to touch."""

    pid: int
    pidfd: int
    channel: Channel
    touches: socket.socket

    def ask(self, message: Message, fds: Sequence[int] = ()) -> tuple[Message, list[int]]:
        """Send a question and return the answer, with descriptors that are the caller's.

        Raises: LocalError: a refusal. WorkerDied: no answer came within PAGER_TIMEOUT; it is killed.
        """
        try:
            self.channel.send(message, fds)
            answer, received = self.channel.receive(PAGER_TIMEOUT)
        except WorkerDied as error:
            self.kill()
            raise WorkerDied(f"pager (pid {self.pid}): {error}") from error
        if "error" in answer:
            close_all(received)
            raise LocalError(str(answer["error"]))
        return answer, received

    def kill(self) -> None:
        """SIGKILL the process: threads of it that wait for a page go with it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """End the process, and close our descriptors of it."""
        self.kill()
        self.channel.close()
        self.touches.close()
        os.close(self.pidfd)


@attrs.define(eq=False)
class SpawnerProcess:
    """The spawner. `child`: where we started it ourselves, for whom Popen wants to see its end."""

    pid: int
    pidfd: int
    channel: Channel
    child: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        """SIGKILL the process; the kernel kills its workers with it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def wait(self) -> None:
        """Wait for the end of a process whose channel is closed; one that does not end is killed."""
        if not is_readable(self.pidfd, STOP_TIMEOUT):
            self.kill()
            is_readable(self.pidfd, STOP_TIMEOUT)
        if self.child is not None:
            self.child.wait()
        else:
            with contextlib.suppress(ChildProcessError):  # it is ours if we are the same process with new code
                os.waitpid(self.pid, 0)

    def close(self) -> None:
        """End it once its workers have, and close our descriptors of it.

        Said in words, for somebody may keep the channel open in our stead; what does not listen is killed.
        """
        with contextlib.suppress(VhostError):
            self.channel.send({"op": "leave"})
        self.channel.close()
        self.wait()
        os.close(self.pidfd)


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
    ) -> None:
        """Start them; `sandboxed`: with no rights beyond what they are given (workers/sandbox).

        Raises LocalError on a bad size, SysError when a process cannot start; nothing is left then.
        """
        if not 1 <= size <= layout.CONSTANTS["WORKERS_MAX"]:
            raise LocalError(f"{size} workers: choose 1 to {layout.CONSTANTS['WORKERS_MAX']}")
        if sandboxed:
            sandbox.check()
        if names := sweep():
            log.info("removed what processes that are gone have left: %s", " ".join(names))
        segment = Segment.create(layout.SEGMENT_SIZE, header=True)
        self._begin(segment, changed, is_kept=is_kept, sandboxed=sandboxed)
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
    ) -> None:
        self.segment = segment
        self.sandboxed = sandboxed
        #: References of the modules that workers import before they give up their rights (vhostmp/renewal.py).
        self.modules: list[str] = list(modules)
        self._sockets: Sequence[tuple[str, int, int]] = ()
        self.workers: dict[int, WorkerProcess] = {}
        self._spawner: SpawnerProcess | None = None
        self.changed = changed
        self._is_kept = is_kept
        self._old_spawner: SpawnerProcess | None = None
        self._renewed: set[int] = set()  # pids of workers that the new spawner started
        self.spare: int | None = None  # a worker for the time of the renewal
        self.wanted = 0  # how many workers there were when it began

    @classmethod
    def adopt(
        cls, plain: dict[str, Any], take: Callable[[str], int], changed: Callable[[WorkerPool], None]
    ) -> WorkerPool:
        """Go on with the processes that a control process before us started: what `describe` returned.

        `take` returns descriptors by name, ours from then on. Nobody is asked anything here: `take_over` does that.
        Raises: LocalError: the segment is of another version; nothing has been taken but it.
        """
        pool = cls.__new__(cls)
        segment = Segment.adopt(take("segment"), plain["segment"])
        pool._begin(
            segment, changed, is_kept=True, sandboxed=plain.get("sandboxed", False), modules=plain.get("modules", ())
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
                self._spawner.channel.send({"op": "reap", "token": token})
                _answer_to(self._spawner.channel, token)
            except WorkerDied as error:
                log.warning("spawner (pid %d) has died: %s", self._spawner.pid, error)
                self.start_spawner()
        if self._spawner is None:
            self.start_spawner()
        for index, worker in list(self.workers.items()):
            if not worker.take_inventory():
                log.warning("worker %d (pid %d) died meanwhile: replaced", index, worker.pid)
                is_readable(worker.pidfd, STOP_TIMEOUT)
                self.replace(index)
        self.changed(self)

    def start_spawner(self) -> None:
        """Start a spawner, in place of one that died with all its workers."""
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

    def replace(self, index: int) -> WorkerProcess:
        """Put a new worker in the slot of one that died. WorkerDied when the spawner is gone too."""
        old = self.workers[index]
        end_section_of_dead(self.segment.buf, index)
        new = self._fork(index)
        old.close()
        self.workers[index] = new
        base = layout.worker_offset(index)
        restarts = layout.WORKER.read(self.segment.buf, base, "restarts")
        layout.WORKER.write(self.segment.buf, base, "restarts", restarts + 1)
        self.changed(self)
        return new

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

    def exits(self) -> dict[int, int]:
        """Return wait statuses of workers that ended since the last call, by pid."""
        try:
            return {int(pid): int(status) for pid, status in self._ask_spawner({"op": "reap"})[0]["exits"].items()}
        except VhostError:
            return {}

    def kill(self, index: int) -> None:
        """SIGKILL a worker, as a crash would. It is replaced like any that dies."""
        self.workers[index].kill()

    def kill_spawner(self) -> None:
        """SIGKILL the spawner. The kernel kills the workers with it."""
        if self._spawner is not None:
            self._spawner.kill()

    def end_workers(self) -> None:
        """Have every worker end, in good order where it can; those that have not within STOP_TIMEOUT are killed."""
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

    def _fork(self, index: int) -> WorkerProcess:
        ours, theirs = Channel.pair()
        log_ours, log_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        nudge = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            message, fds = self._ask_spawner(
                {"op": "fork", "index": index, "modules": self.modules}, [theirs.fileno(), nudge, log_theirs.fileno()]
            )
        except BaseException:
            ours.close()
            log_ours.close()
            os.close(nudge)
            raise
        finally:
            theirs.close()
            log_theirs.close()
        if "error" in message:
            ours.close()
            log_ours.close()
            os.close(nudge)
            raise SysError(str(message["error"]))
        log_fd = WorkerLogHandler.receiving(log_ours, f"vhostmp-log-{index}").fileno()
        worker = WorkerProcess(index, message["pid"], fds[0], ours, nudge, log_fd)
        if self._old_spawner is not None:
            self._renewed.add(worker.pid)
        layout.WORKER.write(self.segment.buf, layout.worker_offset(index), "pid", worker.pid)
        return worker

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
        if self._spawner is None:
            raise WorkerDied("there is no spawner")
        self._spawner.channel.send(message, fds or [])
        return self._spawner.channel.receive(ANSWER_TIMEOUT)

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


def _answer_to(channel: Channel, token: str) -> Message:
    """Return the answer that has `token`; those before it are to questions of somebody who has died. WorkerDied."""
    while True:
        answer, fds = channel.receive(ANSWER_TIMEOUT)
        close_all(fds)
        if answer.get("token") == token:
            return answer


def is_readable(fd: int, timeout: float = 0.0) -> bool:
    """Whether a descriptor becomes readable within `timeout` seconds: for a pidfd, whether the process has ended."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(event & select.POLLIN for _, event in poll.poll(timeout * 1000))
