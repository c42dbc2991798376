"""The holder: a process that keeps descriptors for a control process that may be killed, and does nothing else.

`vhostmp serve --control-path P` starts one where there is no service manager that would do it (fdstore.py). It is in a
session of its own, so nothing that ends the control process ends it; it listens on `P.hold`, mode 0600, and talks to
processes of the same user alone. It knows names and descriptors, and nothing of what they are: a new version of the
code can talk to a holder of an old one. So this protocol must not change but by additions.

Messages (workers/channel.py). One connection at a time is that of the *control process*; while it lasts no other is
taken, which is how two control processes for one path are impossible:

- `{"op": "hello", "pid": n}` -> `{"names": [...], "more": bool, "holder": n}` with as many descriptors, until `more` is
  false; or `{"error": text, "pid": n}` when somebody else is the control process. With `"look": true` the sender wants
  the copies
  only, and becomes nothing; the control process of that moment stays what it is.
- `{"op": "put", "names": [...]}` with descriptors; `{"op": "drop", "names": [...]}`. Neither is answered: once the
  message is in the holder's queue, the death of who sent it changes nothing.
- `{"op": "set", "timeout": s, "paths": [[path, device, inode], ...]}`: it serves; how long to wait for the next control
  process, and sockets to remove when none comes. Who comes and ends without it does not make the time begin anew.
- `{"op": "sync"}` -> `{}`: everything before is done.
- `{"op": "bye"}`: a clean end: close everything, leave the paths to who said it, end.
- `{"op": "end"}`: end what is left now, as described below.

Gone is who has died, which a pidfd tells: whoever only loses its connection makes another holder, and ends this one.
When the control process is gone without a bye, and none has come after `timeout` seconds, the holder ends what is left:
it closes what is called `process.*`, so that the spawner and the workers see the end of their channels and end, waits
for them (`*.pidfd`), closes the rest (only now does a front-end see its socket close) and removes the paths.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from vhostmp.errors import VhostError
from vhostmp.workers.channel import Channel, Message, close_all, is_readable, unlink_dead_socket

FIRST: Final = "process."
PIDFD: Final = ".pidfd"
DEFAULT_TIMEOUT: Final = 60.0
#: How long processes may take to end once nobody holds their channels, seconds.
END_SECONDS: Final = 3.0
#: How long somebody who connects may take to say hello, seconds: an honest one has said it when he connects.
HELLO_SECONDS: Final = 1.0
#: How many names a message holds, and descriptors: fewer than channel.FDS_MAX.
NAMES_MAX: Final = 200
_CREDENTIALS: Final = struct.Struct("iII")


class Holder:
    """The holder's state."""

    def __init__(self, listener: socket.socket, control: Channel, pid: int) -> None:
        """Hold nothing yet; `control` is connected to process `pid`, which started us."""
        self._listener = listener
        self._control: Channel | None = control
        self._control_pid = pid
        self._control_pidfd = _pidfd(pid)
        if os.getppid() != pid:  # it has died already
            self._control_pidfd = -1
        self._held: dict[str, int] = {}
        self._timeout = DEFAULT_TIMEOUT
        self._paths: list[tuple[str, int, int]] = []
        self._deadline = time.monotonic() + DEFAULT_TIMEOUT
        self._is_served = True
        self._is_over = False

    def run(self) -> None:
        """Serve until a bye, or until nobody has come in time."""
        while True:
            poll = select.poll()
            poll.register(self._listener, select.POLLIN)
            if self._control is not None:
                poll.register(self._control.fileno(), select.POLLIN)
                left = None
            else:
                if self._control_pidfd >= 0:  # it lives, whatever has become of its channel: it will make another of us
                    poll.register(self._control_pidfd, select.POLLIN)
                left = None if self._control_pidfd >= 0 else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    self._end()
                    return
            ready = {fd for fd, _ in poll.poll(None if left is None else left * 1000)}
            if self._control is not None and self._control.fileno() in ready and not self._serve(self._control):
                return
            if self._control is None and self._control_pidfd in ready:
                self._is_gone()
            if self._listener.fileno() in ready:
                self._greet()
                if self._is_over:
                    return

    def _catch_up(self) -> bool:
        """Take all messages that the control process has sent: whoever comes is to see what was so when it came.

        It may have been killed since we looked, and have closed its end. Returns whether to go on.
        """
        while (control := self._control) is not None and is_readable(control.fileno()):
            if not self._serve(control):
                self._is_over = True
                return False
        return True

    def _serve(self, control: Channel) -> bool:
        """Take one message of the control process. Returns whether to go on."""
        try:
            message, fds = control.receive()
        except VhostError:
            control.close()
            self._control = None
            if self._control_pidfd < 0 or is_readable(self._control_pidfd):
                self._is_gone()
            return True
        match message:
            case {"op": "put", "names": list(names)} if len(names) == len(fds):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
                for name, fd in zip(map(str, names), fds, strict=True):  # pyright: ignore[reportUnknownArgumentType]
                    close_all([self._held.pop(name)] if name in self._held else [])
                    self._held[name] = fd
                return True
            case {"op": "drop", "names": list(names)}:  # pyright: ignore[reportUnknownVariableType]
                close_all([self._held.pop(name) for name in map(str, names) if name in self._held])  # pyright: ignore[reportUnknownArgumentType]
            case {"op": "set", "timeout": float(timeout) | int(timeout), "paths": list(paths)}:  # pyright: ignore[reportUnknownVariableType]
                self._timeout, self._is_served = float(timeout), True
                self._paths = [(str(path), int(device), int(inode)) for path, device, inode in paths]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            case {"op": "sync"}:
                with contextlib.suppress(VhostError):
                    control.send({})
            case {"op": "end"}:
                self._end()
                return False
            case {"op": "bye"}:
                return False
            case _:
                pass  # of a later version: it can do without
        close_all(fds)
        return True

    def _is_gone(self) -> None:
        """The control process has died: the time begins in which another one may come; not anew for one that failed."""
        close_all([self._control_pidfd] if self._control_pidfd >= 0 else [])
        self._control_pidfd = -1
        if self._is_served:
            self._deadline = time.monotonic() + self._timeout
        self._is_served = False

    def _greet(self) -> None:
        """Take a connection, and hear what it wants."""
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        with contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            if uid not in (0, os.geteuid()):
                return
            channel = Channel(sock)
            try:
                message, fds = channel.receive(HELLO_SECONDS)
                close_all(fds)
                if message.get("op") != "hello":
                    return
                if not self._catch_up():
                    return
                if not message.get("look"):
                    if self._control is None and self._control_pidfd >= 0 and is_readable(self._control_pidfd):
                        self._is_gone()
                    if self._control is not None or self._control_pidfd not in (-1, self._same(pid)):
                        channel.send({"error": f"process {self._control_pid} serves", "pid": self._control_pid})
                        return
                for answer, held in self._chunks():
                    channel.send(answer, held)
            except VhostError:
                return
            if not message.get("look"):
                close_all([self._control_pidfd] if self._control_pidfd >= 0 else [])
                self._control, self._control_pid, self._control_pidfd = channel, pid, _pidfd(pid)
                stack.pop_all()

    def _same(self, pid: int) -> int:
        """Return our pidfd if it is that of process `pid`, which has executed other code in its own place."""
        return self._control_pidfd if pid == self._control_pid else -1

    def _chunks(self) -> list[tuple[Message, list[int]]]:
        """Return everything, as messages."""
        names = list(self._held)
        chunks = [names[start : start + NAMES_MAX] for start in range(0, len(names), NAMES_MAX)] or [[]]
        return [
            (
                {"names": chunk, "more": chunk is not chunks[-1], "holder": os.getpid()},
                [self._held[name] for name in chunk],
            )
            for chunk in chunks
        ]

    def _end(self) -> None:
        """Nobody has come: end the processes, then everything else."""
        end_held(self._held)
        for path, device, inode in self._paths:
            unlink_dead_socket(path, device, inode)


def end_held(held: dict[str, int], drop: Callable[[Sequence[str]], None] = lambda names: None) -> None:
    """End what is held and close it: processes first, which see the end of their channels and are waited for.

    `drop` has whoever keeps copies of the channels of these names drop them.
    """
    pidfds = [fd for name, fd in held.items() if name.startswith(FIRST) and name.endswith(PIDFD)]
    first = [name for name in held if name.startswith(FIRST) and not name.endswith(PIDFD)]
    close_all([held.pop(name) for name in first])
    drop(first)
    deadline = time.monotonic() + END_SECONDS
    for pidfd in pidfds:
        if not is_readable(pidfd, max(0.0, deadline - time.monotonic())):
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    close_all(held.values())
    held.clear()


def _pidfd(pid: int) -> int:
    """Return a pidfd of a process; -1: it is gone."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def main() -> None:
    """Entry of the holder's process. Its arguments come as one JSON object from `fdstore`."""
    arguments = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("vhostmp-hold")
    listener = socket.socket(fileno=arguments["listener"])
    listener.setblocking(False)
    holder = Holder(listener, Channel.of(arguments["channel"]), arguments["control"])
    try:
        holder.run()
    finally:
        path, device, inode = arguments["at"]
        with contextlib.suppress(OSError):
            status = os.stat(path, follow_symlinks=False)
            if (status.st_dev, status.st_ino) == (device, inode):
                os.unlink(path)
