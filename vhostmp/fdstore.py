"""Where a control process keeps descriptors so that its own death does not close them: the holder, or systemd.

One interface, `FdStore`. `keeper.open_keeper` finds out which one there is, and what it holds from a control process
before us: then we are to adopt that (adoption.py). A name is used once: it means the same file until it is dropped.

Which: systemd's store when the unit has one, which $FDSTORE says (systemd 254 and later set it; with an older one the
unit sets it beside FileDescriptorStoreMax=). Else a holder, a process of ours beside the control path (holder.py).
systemd_store.py has the one, this file the other.
Source: systemd, sd_notify(3), sd_listen_fds(3), "File Descriptor Store".
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from vhostmp import transport
from vhostmp.errors import LocalError, SysError, VhostError, WorkerDied
from vhostmp.holder import NAMES_MAX
from vhostmp.workers.channel import Channel, close_all, is_readable

log = logging.getLogger(__name__)

SUFFIX: Final = ".hold"
#: How long the holder may take to take or give something, seconds.
HOLDER_TIMEOUT: Final = 10.0
#: How long it may leave no room for a message: then it is replaced.
STALL_SECONDS: Final = 2.0
_CREDENTIALS: Final = struct.Struct("iII")
_BOOT: Final = "import json,sys; sys.path[:] = json.loads(sys.argv[1])['path']; from vhostmp.holder import main; main()"

_children: Final[list[subprocess.Popen[bytes]]] = []
"""Holders that we started: those that have ended are zombies until somebody asks."""


class FdStore(Protocol):
    """Keeps descriptors over our death. Errors of `put` and `drop` are WorkerDied: the store itself is gone."""

    def put(self, fds: Mapping[str, int]) -> None:
        """Keep duplicates of descriptors. Once this returns they are safe."""
        ...

    def drop(self, names: Iterable[str]) -> None:
        """Keep some no longer; harmless for a name that is not known."""
        ...

    def settle(self, timeout: float, paths: Sequence[str]) -> None:
        """Say how long to wait for the next control process, and which sockets to remove when none comes."""
        ...

    def sync(self) -> None:
        """Wait until what was dropped is closed."""
        ...

    def kill(self) -> None:
        """End the store itself, if that can be, so that another can take its place. Never fails."""
        ...

    def goodbye(self) -> None:
        """Keep nothing: we end in order. Never fails."""
        ...

    def handover(self) -> dict[str, int]:
        """Return descriptors, by name, that what is executed in our place must get from us; borrowed."""
        ...

    def detach(self) -> None:
        """Let go of the store and leave everything in it. Never fails."""
        ...


class HeldStore:
    """The holder, from the control process's side."""

    def __init__(self, path: str, channel: Channel, pid: int) -> None:
        """Take over the connection that makes us the control process of `path`; `pid` is the holder. OSError."""
        self.path: Final = path
        self._channel = channel
        channel.limit(STALL_SECONDS)
        self._pidfd: Final = os.pidfd_open(pid)

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when the holder is gone: it says nothing unasked."""
        return self._channel.fileno()

    def put(self, fds: Mapping[str, int]) -> None:
        """Keep duplicates of descriptors: in the holder's queue they are as safe as in its hands."""
        names = list(fds)
        for start in range(0, len(names), NAMES_MAX):
            chunk = names[start : start + NAMES_MAX]
            self._channel.send({"op": "put", "names": chunk}, [fds[name] for name in chunk])

    def drop(self, names: Iterable[str]) -> None:
        """Keep some no longer."""
        gone = sorted(names)
        for start in range(0, len(gone), NAMES_MAX):
            self._channel.send({"op": "drop", "names": gone[start : start + NAMES_MAX]})

    def settle(self, timeout: float, paths: Sequence[str]) -> None:
        """Say how long to wait for the next control process, and which sockets to remove when none comes."""
        known = [[path, *identity] for path in paths if (identity := transport.identity(path)) is not None]
        self._channel.send({"op": "set", "timeout": timeout, "paths": known})

    def handover(self) -> dict[str, int]:
        """Return none: the holder gives them to whoever comes."""
        return {}

    def goodbye(self) -> None:
        """Have the holder end."""
        with contextlib.suppress(VhostError):
            self._channel.send({"op": "bye"})
            self._channel.receive(HOLDER_TIMEOUT)  # until the end of the channel, which says that it has ended
        self.detach()

    def end(self) -> None:
        """Have the holder end what it holds as if nobody had come in time, and wait for that."""
        with contextlib.suppress(VhostError):
            self._channel.send({"op": "end"})
            self._channel.receive(HOLDER_TIMEOUT)
        self.detach()

    def sync(self) -> None:
        """Wait until what was dropped is closed."""
        self._channel.send({"op": "sync"})
        self._channel.receive(STALL_SECONDS)
        self._channel.limit(STALL_SECONDS)

    def kill(self) -> None:
        """Have the holder end at once, so that another one can take its place; it may be stopped, or full.

        Idempotent.
        """
        if self._channel.fileno() < 0:  # the number of our pidfd is somebody else's by now
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        is_readable(self._pidfd, HOLDER_TIMEOUT)
        self.detach()

    def detach(self) -> None:
        """Leave everything with the holder, which waits for the next control process. Idempotent."""
        if self._channel.fileno() >= 0:
            self._channel.close()
            os.close(self._pidfd)


def hold_path(control_path: str) -> str:
    """Return where the holder of a control path listens."""
    return os.path.abspath(control_path) + SUFFIX


def find_holder(control_path: str, *, look: bool = False) -> tuple[HeldStore, dict[str, int]] | None:
    """Become the control process of a holder that waits for one; None when there is none.

    Returns: the store, and the caller's duplicates of all that it holds. With `look` we become nothing, and only the
    duplicates mean something.

    Raises: LocalError: another control process runs; says so in one line.
    """
    transport.check_path(control_path)
    path = hold_path(control_path)
    transport.check_path(path)
    try:
        sock = transport.dial(path, kind=socket.SOCK_SEQPACKET)
    except LocalError as error:
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            return None
        raise
    _, uid, _ = _CREDENTIALS.unpack(  # of who made the socket listen: a control process, maybe long dead
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    if uid not in (0, os.geteuid()):
        sock.close()
        raise LocalError(
            f"{path} is a socket of user {uid}: nothing is taken from there, choose another path", errno.EPERM
        )
    channel = Channel(sock)
    channel.limit(HOLDER_TIMEOUT)
    found: dict[str, int] = {}
    pid = 0
    try:
        channel.send({"op": "hello", "pid": os.getpid(), "look": look})
        more = True
        while more:
            answer, fds = channel.receive(HOLDER_TIMEOUT)
            if "error" in answer:
                close_all(fds)
                raise LocalError(
                    f"socket {control_path} is in use by a running program: stop that one or choose another path "
                    f"(process {answer.get('pid')})",
                    errno.EADDRINUSE,
                )
            found.update(zip(answer["names"], fds, strict=True))
            pid = int(answer["holder"])
            more = bool(answer["more"])
        return HeldStore(path, channel, pid), found
    except (WorkerDied, ProcessLookupError):  # it was about to end
        close_all(found.values())
        channel.close()
        return None
    except BaseException:
        close_all(found.values())
        channel.close()
        raise


def start_holder(control_path: str) -> HeldStore:
    """Start a holder. Raises: LocalError: its socket cannot be made; SysError: the process cannot start."""
    path = hold_path(control_path)
    with contextlib.ExitStack() as undo:
        try:
            listener = undo.enter_context(contextlib.closing(transport.listen(path, kind=socket.SOCK_SEQPACKET)))
            ours, theirs = Channel.pair()
            undo.callback(ours.close)
            with contextlib.closing(theirs):
                arguments = {
                    "path": [entry or os.getcwd() for entry in sys.path],
                    "at": [path, *(transport.identity(path) or (0, 0))],
                    "listener": listener.fileno(),
                    "channel": theirs.fileno(),
                    "control": os.getpid(),
                }
                child = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, json.dumps(arguments)],
                    pass_fds=(theirs.fileno(), listener.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            undo.callback(child.kill)
            _children[:] = [other for other in _children if other.poll() is None] + [child]
            store = HeldStore(path, ours, child.pid)
        except OSError as error:
            raise SysError.wrap("cannot start the holder of descriptors", error) from error
        undo.pop_all()
    listener.forget()
    return store
