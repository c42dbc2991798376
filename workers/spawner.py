"""The spawner: a process with one thread that forks every worker, and every pager.

It is started by exec, so it is single-threaded whatever its parent is: a hypervisor with busy vCPU threads can lose and
regain workers for days, and no worker inherits a lock that another thread held, or the parent's memory.

**The rule that nothing outlives the control process is here, and only here**: the spawner ends when the control
process does (its pidfd becomes readable, or the channel ends); each worker is killed by the kernel when the spawner
ends (PR_SET_PDEATHSIG). What the control process left because it was killed, its segment and its sockets, the spawner
unlinks as its last act. Where somebody keeps our channel open for the next control process (vhostmp/adoption.py), the
end of the channel alone counts: then nobody is left who might come.

It gives up every capability but the one to read files (workers/sandbox), so that no worker ever has one.

Messages (see channel.py): `{"op": "fork", "index": n, "modules": [...]}` with the worker's descriptors (channel, nudge
eventfd, log socket) -> `{"pid": p}` with the worker's pidfd, opened while the process cannot have been reaped yet; n is
-1 for a spare, which is told later;
`{"op": "fork", "pager": true}` with the pager's (channel, touches) -> the same;
`{"op": "reap"}` -> `{"exits": {pid: status}}`, which comes with the other answers too, and the `token` of the question,
if it had one;
`{"op": "bequeath", "sockets": [[path, device, inode]]}`, not answered: what to unlink at the end;
`{"op": "leave"}`, not answered: end once there is no worker any more, and leave all that to another spawner.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Final

import posix_ipc

from vhostmp.errors import SysError, WorkerDied
from vhostmp.workers import sandbox
from vhostmp.workers.channel import Channel, Message, close_all, unlink_dead_socket
from vhostmp.workers.process import die_with, set_name

#: Loaded before the first fork: every worker shares these pages, starts in milliseconds, and need not open them.
_LOADED: Final = (
    "vhostmp.workers.main",
    "vhostmp.workers.pager",
    "vhostmp.workers.devices.blk",
    "vhostmp.workers.devices.rng",
    "encodings.latin_1",
    "traceback",
)


class Spawner:
    """The spawner's state: the channel to the control process, and the workers that run."""

    def __init__(self, channel: Channel, segment_fd: int, segment_name: str, log_level: int, sandboxed: bool) -> None:
        """Serve `channel`; each worker gets the control segment `segment_fd`, called `segment_name`."""
        self._channel = channel
        self._segment_fd = segment_fd
        self._segment_name = segment_name
        self._log_level = log_level
        self._sandboxed = sandboxed
        self._workers: dict[int, int] = {}  # pid -> pidfd
        self._exits: dict[int, int] = {}
        self._sockets: list[tuple[str, int, int]] = []
        self._control = -1
        self._leaves = False

    def run(self, control_pid: int) -> None:
        """Serve until the control process ends. It is process `control_pid`, our parent; 0: until the channel ends."""
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        if control_pid:
            with contextlib.suppress(ProcessLookupError):
                control = os.pidfd_open(control_pid)
                if os.getppid() == control_pid:
                    poll.register(control, select.POLLIN)
                    self._control = control
                    self._serve(poll)
        else:
            self._serve(poll)
        self._end()

    def _serve(self, poll: select.poll) -> None:
        while not self._leaves or self._workers:
            ready = {fd for fd, _ in poll.poll()}
            if self._control in ready:
                return
            for pid in [pid for pid, pidfd in self._workers.items() if pidfd in ready]:
                poll.unregister(self._workers[pid])
                self._reap(pid)
            if self._channel.fileno() in ready:
                try:
                    message, fds = self._channel.receive()
                    self._answer(poll, message, fds)
                except WorkerDied:
                    return

    def _answer(self, poll: select.poll, message: Message, fds: list[int]) -> None:
        if message["op"] == "fork":
            try:
                pid, pidfd = self._fork(message, fds)
            except OSError as error:
                self._channel.send({"error": f"cannot start a process: {error.strerror}"})
                return
            finally:
                close_all(fds)
            self._workers[pid] = pidfd
            poll.register(pidfd, select.POLLIN)
            self._channel.send({"pid": pid, **self._told()}, [pidfd])
        elif message["op"] == "bequeath":
            self._sockets = message["sockets"]
        elif message["op"] == "reap":
            self._channel.send({**self._told(), "token": message.get("token")})
        elif message["op"] == "leave":
            self._leaves = True

    def _told(self) -> Message:
        """Return what the control process is to know of those that have ended."""
        exits, self._exits = self._exits, {}
        return {"exits": exits}

    def _fork(self, message: Message, fds: list[int]) -> tuple[int, int]:
        """Fork a worker, or a pager; return its pid and pidfd. In the child this does not return."""
        index = None if message.get("pager") else message["index"]
        spawner = os.getpid()
        pid = os.fork()
        if pid:
            try:
                return pid, os.pidfd_open(pid)
            except OSError:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
        status = 1
        try:
            die_with(spawner)
            set_name("vhostmp-pager" if index is None else "vhostmp-spare" if index < 0 else f"vhostmp-w{index}")
            self._channel.close()
            close_all([*self._workers.values(), self._control])
            from vhostmp.workers import main, pager  # noqa: PLC0415 - in the child, after the fork

            if index is None:
                os.close(self._segment_fd)  # whatever becomes of a pager, it has no way to the workers
                status = pager.run(fds, sandboxed=self._sandboxed)
            else:
                rights = main.Rights(self._sandboxed, message["modules"])
                status = main.run(index, self._segment_fd, self._segment_name, fds, self._log_level, rights)
        except SysError as error:
            print(f"vhostmp: worker {index}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)

    def _reap(self, pid: int) -> None:
        _, self._exits[pid] = os.waitpid(pid, 0)
        os.close(self._workers.pop(pid))

    def _end(self) -> None:
        for pid in self._workers:
            os.kill(pid, signal.SIGKILL)
        for pid in self._workers:
            os.waitpid(pid, 0)
        if self._leaves:
            return
        self._read_last_words()
        with contextlib.suppress(posix_ipc.Error):
            posix_ipc.unlink_shared_memory(self._segment_name)
        for path, device, inode in self._sockets:
            unlink_dead_socket(path, device, inode)

    def _read_last_words(self) -> None:
        """Take what the control process bequeathed while we were busy: it may be gone before we come to read it."""
        with contextlib.suppress(WorkerDied):  # no more is there
            while True:
                message, fds = self._channel.receive(0.0)
                close_all(fds)
                if message["op"] == "bequeath":
                    self._sockets = message["sockets"]


def main() -> None:
    """Entry of the spawner's process. Its arguments come as one JSON object from `workers.pool`."""
    arguments = json.loads(sys.argv[1])
    set_name("vhostmp-spawn")
    # The terminal's Ctrl-C and Ctrl-\ are for the control process; it ends us in its own time.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for module in _LOADED:
        importlib.import_module(module)
    gc.freeze()  # or else the first collection of each worker copies them all
    time.localtime()  # has the C library read which time zone it is
    if arguments["sandbox"]:
        sandbox.prepare()
        sandbox.shed_capabilities(sandbox.CAP_DAC_READ_SEARCH)

    channel = Channel(socket.socket(fileno=arguments["channel"]))
    names = ("segment", "name", "log_level", "sandbox")
    Spawner(channel, *(arguments[name] for name in names)).run(arguments["control_pid"])
