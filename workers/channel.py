"""One end of the channel between the control process and a worker, or the spawner.

A SOCK_SEQPACKET pair: each message is one JSON object, with descriptors by SCM_RIGHTS. The control process asks, the
other end answers each question once, in order. End-of-file is the death notice.

JSON, because what a worker says may be said by a worker that its guest has taken over: nothing that it sends is
executed, and a message that is not an object is an error.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import socket
from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

from vhostmp.errors import SysError, WorkerDied

MESSAGE_MAX: Final = 1 << 17
#: Linux takes at most 253 descriptors a message (SCM_MAX_FD).
FDS_MAX: Final = 253

Message = dict[str, Any]


class Channel:
    """A connected SOCK_SEQPACKET socket that carries messages. It owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket."""
        self._sock = sock
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MESSAGE_MAX)

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Make both ends."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    @classmethod
    def of(cls, fd: int) -> Channel:
        """Take over a descriptor of an end that somebody made with `pair`."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def limit(self, timeout: float) -> None:
        """Have `send` give up after so many seconds without room, until the next `receive` says otherwise."""
        self._sock.settimeout(timeout)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message with descriptors, which stay the caller's. WorkerDied when the other end is gone."""
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MESSAGE_MAX or len(fds) > FDS_MAX:
            raise SysError(f"message of {len(data)} bytes with {len(fds)} descriptors is too long for a channel")
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([data], control, socket.MSG_NOSIGNAL)
        except TimeoutError as error:
            raise WorkerDied("the other end of the channel takes no messages") from error
        except OSError as error:
            raise WorkerDied(f"channel: {error.strerror}") from error

    def receive(self, timeout: float | None = None) -> tuple[Message, list[int]]:
        """Receive a message and its descriptors, now the caller's.

        Waits up to `timeout` seconds, for ever when None. Raises WorkerDied at end-of-file, when the time is over, and
        when what came is not a message.
        """
        if timeout != self._sock.gettimeout():  # a system call, which a worker may not make
            self._sock.settimeout(timeout)
        try:
            data, control, flags, _ = self._sock.recvmsg(
                MESSAGE_MAX, socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError as error:
            raise WorkerDied(f"no answer within {timeout:g} s") from error
        except OSError as error:
            raise WorkerDied(f"channel: {error.strerror}") from error
        fds = array.array("i")
        for level, kind, payload in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        try:
            if not data:
                raise WorkerDied("channel closed")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise WorkerDied("message on the channel was cut off")
            message = json.loads(data)
            if not isinstance(message, dict):
                raise WorkerDied("message on the channel is not an object")
        except (ValueError, RecursionError) as error:
            close_all(fds)
            raise WorkerDied("message on the channel is not JSON") from error
        except WorkerDied:
            close_all(fds)
            raise
        return cast("Message", message), fds.tolist()

    def cut(self) -> None:
        """Have whoever sends or receives here, in any thread, get end-of-file. The other end is known to be gone."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close. Idempotent."""
        self._sock.close()


def is_readable(fd: int, timeout: float = 0.0) -> bool:
    """Whether a descriptor becomes readable within `timeout` seconds: for a pidfd, whether the process has ended."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(event & select.POLLIN for _, event in poll.poll(timeout * 1000))


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors, ignoring those that are closed already."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def unlink_dead_socket(path: str, device: int, inode: int) -> None:
    """Remove the stream socket of a process that has died: this very one, unless somebody listens on it all the same.

    An inode's number alone would not do: once nobody holds the file it comes round again, for a successor's.
    """
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe,
    ):
        status = os.stat(path, follow_symlinks=False)
        if (status.st_dev, status.st_ino) == (device, inode):
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
