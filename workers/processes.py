"""The processes of a pool as the control process sees them: handles that ask, kill and close.

Not thread-safe, but where a method says so: the caller holds one lock around every call (workers/pool.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from vhostmp.errors import LocalError, VhostError, WorkerDied
from vhostmp.shm._relay import Relay
from vhostmp.workers.channel import Channel, Message, close_all, is_readable

log = logging.getLogger(__name__)

#: How long workers may take to answer, seconds: preparing maps memory and imports back-ends. All the workers of a step
#: of a verb, and all the questions to each, have that time together, and as much to take the questions: those that
#: guests have taken over hold up nobody for longer.
ANSWER_TIMEOUT: Final = 20.0
#: How long a worker may leave no room for a question, where others wait behind it, seconds.
ROOM_TIMEOUT: Final = 0.2
#: How long what has come already may take to be read when the time is over, seconds.
_MOMENT: Final = 0.001
#: The same while it waits for a page in post-copy, which may be with the interpreter's lock: vhostmp/flush.py has why.
PAGE_TIMEOUT: Final = 5.0
STOP_TIMEOUT: Final = 1.0
#: How long a pager may take to answer, seconds: it maps a file at the most, and may be in its front-end's hands.
PAGER_TIMEOUT: Final = 5.0


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
    #: Held while a descriptor is used that another thread may close.
    _guard: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    @property
    def waits_for_page(self) -> bool:
        """Whether it waits for a page of guest memory that a front-end in post-copy has not brought yet."""
        return any(relay.waits(self.index) for relay in self.relays)

    @property
    def alive(self) -> bool:
        """Whether the process still runs. False is for good."""
        return not is_readable(self.pidfd)

    def kill(self) -> None:
        """SIGKILL the process. The pidfd makes sure that it is no other one. From any thread, closed or not."""
        with self._guard, contextlib.suppress(ProcessLookupError):
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def nudge(self) -> None:
        """Have the worker look at the published generations. From any thread, closed or not."""
        with self._guard:
            if self.nudge_fd >= 0:
                with contextlib.suppress(BlockingIOError):  # full: it wakes up all the same
                    os.eventfd_write(self.nudge_fd, 1)

    def ask(self, message: Message, fds: list[int] | None = None, due: float | None = None) -> None:
        """Send a question; `answer` collects the answer. WorkerDied when the worker is gone, or there is no room.

        `due`: until when there may be; see `answers_due`.
        """
        try:
            self.channel.limit(_left(due))
            self.channel.send(message, fds or [])
        except WorkerDied as error:
            self.kill()  # alive or not: what it has been told is not known
            raise WorkerDied(f"worker {self.index} (pid {self.pid}): {error}") from error

    def answer(self, due: float | None = None) -> Message:
        """Return the answer to the oldest question. LocalError when it is a refusal, WorkerDied when none comes.

        `due`: until when it may come; see `answers_due`.
        """
        message, fds = self.answer_with_fds(due)
        close_all(fds)
        return message

    def answer_with_fds(self, due: float | None = None) -> tuple[Message, list[int]]:
        """`answer`, with the descriptors that came along: the caller's now."""
        if self.relays and not is_readable(self.channel.fileno(), PAGE_TIMEOUT) and self.waits_for_page:
            log.warning("worker %d (pid %d) waits for a page in post-copy: killed", self.index, self.pid)
            self.kill()
        try:
            message, fds = self.channel.receive(_left(due))
        except WorkerDied as error:
            # One that does not answer is as good as dead: a late answer would be taken for that to another question.
            self.kill()
            raise WorkerDied(f"worker {self.index} (pid {self.pid}): {error}") from error
        if "error" in message:
            close_all(fds)
            number = message.get("errno")
            raise LocalError(str(message["error"]), number if isinstance(number, int) and number else None)
        return message, fds

    def read_inventory(self, token: str) -> bool:
        """Read what has come from it. Whether it says what it holds, in answer to the question with `token`.

        Else it is the answer to a question of somebody who has died. Raises what a worker can do wrong; what we know
        of it is as before then.
        """
        answer, fds = self.channel.receive(_MOMENT)
        close_all(fds)
        if answer.get("token") != token:
            return False
        parts = numbers_of(answer["parts"])
        groups = [numbers_of(groups) for groups in answer["groups"]]
        known = zip(parts, groups, strict=True)
        self.groups = {part_id: set(numbers) for part_id, numbers in known if numbers}
        self.parts = set(parts)
        return True

    def hang_up(self) -> None:
        """Close all that leads to it but the pidfd."""
        self.channel.close()
        with self._guard:
            nudge, self.nudge_fd = self.nudge_fd, -1
        close_all([nudge] if nudge >= 0 else [])

    def close(self) -> None:
        """Close our descriptors of it. Idempotent."""
        self.hang_up()
        with self._guard:
            pidfd, self.pidfd = self.pidfd, -1
        close_all([pidfd] if pidfd >= 0 else [])


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


@attrs.frozen
class Starting:
    """A process that the spawner was asked for; `ours` closes our ends of what leads to it."""

    index: int
    channel: Channel
    records: socket.socket
    nudge: int
    ours: contextlib.ExitStack


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


def answers_due() -> float:
    """Return until when workers that are asked now may answer: they have ANSWER_TIMEOUT together (time.monotonic)."""
    return time.monotonic() + ANSWER_TIMEOUT


def _left(due: float | None) -> float:
    """Return how long somebody may still take. Never nothing: what came in time is read, whoever was read before."""
    return ANSWER_TIMEOUT if due is None else max(due - time.monotonic(), _MOMENT)


def numbers_of(said: list[int]) -> list[int]:
    """Return what somebody sent whom a guest may have taken over. ValueError: it is no list of integers."""
    if type(said) is not list or any(type(number) is not int for number in said):  # a bool would do for an id
        raise ValueError("no list of integers")
    return said


def answer_to(channel: Channel, token: str) -> Message:
    """Return the answer that has `token`; those before it are to questions of somebody who has died.

    WorkerDied when it does not come within ANSWER_TIMEOUT, whatever else does.
    """
    due = answers_due()
    while time.monotonic() < due:
        answer, fds = channel.receive(_left(due))
        close_all(fds)
        if answer.get("token") == token:
            return answer
    raise WorkerDied(f"no answer within {ANSWER_TIMEOUT:g} s")


def take_inventories(workers: Iterable[WorkerProcess]) -> set[int]:
    """Hear what each worker holds, which somebody sent who has died. Returns the slots of those that live, and answer.

    The others are killed: those that are dead, that answer nothing, or anything but that. One takes none of the time
    of the others, which is ANSWER_TIMEOUT for all.
    """
    token = os.urandom(8).hex()
    waiting: dict[int, WorkerProcess] = {}
    answered: set[WorkerProcess] = set()
    poll = select.poll()
    for worker in workers:
        try:
            worker.channel.limit(ROOM_TIMEOUT)
            worker.channel.send({"op": "inventory", "token": token})
        except VhostError:
            worker.kill()
        else:
            waiting[worker.channel.fileno()] = worker
            poll.register(worker.channel.fileno(), select.POLLIN)
    due = answers_due()
    while waiting and (left := due - time.monotonic()) > 0:
        for fd, _ in poll.poll(left * 1000):
            worker = waiting[fd]
            try:
                if not worker.read_inventory(token):
                    continue
                answered.add(worker)
            except (VhostError, KeyError, TypeError, ValueError):
                worker.kill()
            poll.unregister(fd)
            del waiting[fd]
    for worker in waiting.values():
        worker.kill()
    return {worker.index for worker in answered if worker.alive}
