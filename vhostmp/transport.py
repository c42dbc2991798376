"""UNIX sockets and the file descriptors that travel over them.

Rules: the only control-side module that opens sockets. A received descriptor belongs to the `Transport` that received
it, from the system call on until the message is dealt with, and is closed then, whatever happened to the message: a
device verb that keeps one duplicates it. All received descriptors are close-on-exec from the start. Nothing blocks:
reads and writes of a connection are non-blocking whatever the mode of the socket, which its creator may share.

Errors of set-up (`listen`, `adopt`, `dial`) are LocalError with one line that says what to do.
"""

from __future__ import annotations

import array
import errno
import fcntl
import grp
import itertools
import logging
import os
import socket
import stat
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import attrs

from vhostmp.errors import LocalError
from vhostmp.protocol.codec import Decoder, Message
from vhostmp.protocol.messages import MAX_FDS

log = logging.getLogger(__name__)

UNIX_PATH_MAX: Final = 107
"""Longest path of a UNIX socket, in bytes (unix(7): sun_path has 108, the last one is a zero byte)."""

BACKLOG: Final = 8
"""Connections that may wait to be accepted."""

_FD_SIZE: Final = array.array("i").itemsize
_ANCILLARY_SIZE: Final = socket.CMSG_SPACE(MAX_FDS * _FD_SIZE)
_HANG_UP: Final = (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)


class Transport:
    """One connection to a front-end: messages in, bytes out. Owns the socket and every descriptor received from it."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected stream socket."""
        self._sock = sock
        self._decoder = Decoder()
        self._fds: list[int] = []
        self._output = bytearray()
        self._sent = 0
        # Where in the stream of what we send, in bytes from its beginning, descriptors belong; owned.
        self._rights: deque[tuple[int, tuple[int, ...]]] = deque()

    def fileno(self) -> int:
        """Return the socket's descriptor, for the event loop."""
        return self._sock.fileno()

    @property
    def pending(self) -> bool:
        """Whether output waits for the front-end to read; `flush` once the socket is writable."""
        return bool(self._output)

    def receive(self) -> Message | None:
        """Read the next message, as far as it has arrived.

        Returns: the message, or None when the rest of it has not arrived. Its descriptors stay open until `release`.

        Raises:
            BadMessage: the message is refused, its descriptors are closed; the connection is still usable unless the
                error is fatal.
            EOFError: the front-end has hung up between two messages.
        """
        try:
            while True:
                try:
                    message = self._receive_part()
                except BlockingIOError:
                    return None
                if message is not None:
                    return message
        except BaseException:
            self.release()
            raise

    def _receive_part(self) -> Message | None:
        """Read once. Raises: BlockingIOError, BadMessage, EOFError."""
        data, fds, fault = self._read()
        if not data:
            self._decoder.end()
            raise EOFError("the front-end has hung up")
        return self._decoder.feed(data, fds, fault)

    def _read(self, extra: int = 0, size: int | None = None) -> tuple[bytes, list[int], str | None]:
        """Return what is next, at the most what the decoder wants; its descriptors, which are ours; what is wrong.

        `extra`: further flags; `size`: another limit, bytes. Raises: BlockingIOError.
        """
        try:
            data, ancillary, flags, _address = self._sock.recvmsg(
                self._decoder.wanted if size is None else size,
                _ANCILLARY_SIZE,
                socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC | extra,
            )
        except OSError as error:
            if error.errno not in _HANG_UP:
                raise
            data, ancillary, flags = b"", [], 0
        fds = array.array("i")
        fault = None
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % _FD_SIZE])
            else:
                fault = f"ancillary data of level {level} type {kind} came with it"
        self._fds.extend(fds)
        if fault is None and flags & socket.MSG_CTRUNC:
            fault = f"more fds came with it than the {MAX_FDS} allowed, or than could be opened"
        return data, fds.tolist(), fault

    def release(self) -> None:
        """Close every received descriptor: the message they came with is dealt with. Never fails."""
        fds, self._fds = self._fds, []
        _close(fds)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, and descriptors with the first of them, now or as soon as the front-end reads.

        The descriptors are taken over: they are closed once they are sent, or with the connection.
        Raises: EOFError: it has hung up.
        """
        if fds:
            self._rights.append((self._sent + len(self._output), tuple(fds)))
        self._output += data
        self.flush()

    def finish(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take note that the message received last is dealt with, and send the reply, if any, as `send` does."""
        if data:
            self.send(data, fds)

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it. Raises: EOFError: the front-end has hung up."""
        while self._output:
            try:
                sent = self._send_part()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _HANG_UP:
                    raise
                raise EOFError("the front-end has hung up") from error
            del self._output[:sent]
            self._sent += sent

    def _send_part(self) -> int:
        """Send once, never past the place where the next descriptors belong. Returns: the number of bytes."""
        fds: tuple[int, ...] = ()
        if self._rights and self._rights[0][0] == self._sent:
            fds = self._rights[0][1]
        following = [start for start, _ in itertools.islice(self._rights, 2) if start > self._sent]
        part = memoryview(self._output)[: following[0] - self._sent if following else None]
        with part:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            sent = self._sock.sendmsg([part], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        if fds:
            self._rights.popleft()
            _close(fds)
        return sent

    def close(self) -> None:
        """Close the socket and every descriptor, received or to be sent; may be called twice."""
        self.release()
        for _, fds in self._rights:
            _close(fds)
        self._rights.clear()
        self._sock.close()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


class Listener:
    """A listening socket; where it was made by `listen`, closing it removes the path, if that is still its own."""

    def __init__(self, sock: socket.socket, path: str | None = None, number: int = 0) -> None:
        """Take over a listening socket; `path` is what `close` removes; `number` is its owner's to use."""
        sock.setblocking(False)
        self.number = number
        self._sock = sock
        self._path = path
        self._identity = identity(path) if path is not None else None

    def fileno(self) -> int:
        """Return the socket's descriptor, for the event loop."""
        return self._sock.fileno()

    def accept(self) -> socket.socket | None:
        """Take a waiting connection; None when it has gone or cannot be taken now (no descriptors left)."""
        try:
            return self._sock.accept()[0]
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                raise
            return None

    def forget(self) -> None:
        """Close the socket and leave its path: somebody else listens there with a duplicate."""
        self._path = None
        self._sock.close()

    def close(self) -> None:
        """Close the socket and remove its path, unless somebody else has put theirs there; may be called twice."""
        if self._path is not None and self._identity == identity(self._path):
            with suppress(OSError):
                os.unlink(self._path)
        self._path = None
        self._sock.close()


def identity(path: str) -> tuple[int, int] | None:
    """Tell one file from another by device and inode; None when there is none."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def check_path(path: str) -> None:
    """Judge a socket path before use. Raises: LocalError: empty, too long, or its directory is missing."""
    size = len(os.fsencode(path))
    if not size:
        raise LocalError("the socket path is empty: give a path")
    if size > UNIX_PATH_MAX:
        raise LocalError(
            f"the socket path has {size} bytes and a UNIX socket takes {UNIX_PATH_MAX}: choose a shorter one: {path}",
            errno.ENAMETOOLONG,
        )
    parent = Path(path).parent
    try:
        is_folder = stat.S_ISDIR(parent.stat().st_mode)
    except PermissionError:
        return  # the system call that uses it says more
    except OSError:
        is_folder = False
    if not is_folder:
        raise LocalError(f"no directory {parent} for socket {path}: create it or choose another path", errno.ENOENT)


@attrs.frozen
class Access:
    """Who may connect to a socket: the permission bits of its path, and the group it is given to (None: our own)."""

    mode: int = 0o600
    gid: int | None = None


#: Its owner, and nobody else.
PRIVATE: Final = Access()


def listen(path: str, access: Access = PRIVATE, *, kind: int = socket.SOCK_STREAM) -> Listener:
    """Create a listening socket of a type at `path`, at most 107 bytes.

    A socket left there by a program that has ended is removed first; one that answers is left alone. At no moment may
    anybody connect whom `access` does not let: it begins as its owner's alone, whatever the umask.

    Raises: LocalError: says what is wrong and what to do; nothing is left behind.
    """
    check_path(path)
    sock = _socket(kind)
    bound = False
    try:
        os.fchmod(sock.fileno(), 0o600)  # before bind(), which takes the path's permissions from there, less the umask
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            remove_stale(path)
            sock.bind(path)
        bound = True
        grant(path, access)  # not yet listening: nobody can have connected
        sock.listen(BACKLOG)
        return Listener(sock, path)
    except OSError as error:
        sock.close()
        if bound:
            with suppress(OSError):
                os.unlink(path)
        raise _path_error("create", path, error) from error
    except BaseException:
        sock.close()
        if bound:
            with suppress(OSError):
                os.unlink(path)
        raise


def grant(path: str, access: Access) -> None:
    """Give the socket at `path` its mode and group: that very file, should somebody put another one in its place."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        if access.gid is not None:
            _give(path, fd, access.gid)
        if stat.S_IMODE(status.st_mode) != access.mode:
            os.chmod(f"/proc/self/fd/{fd}", access.mode)
    finally:
        os.close(fd)


def _give(path: str, fd: int, gid: int) -> None:
    """Give a socket to a group. Raises: LocalError: we may not, and what to do; OSError."""
    try:
        os.chown(f"/proc/self/fd/{fd}", -1, gid)
    except PermissionError as error:
        try:
            group = grp.getgrgid(gid).gr_name
        except KeyError:
            group = str(gid)
        raise LocalError(
            f"cannot give socket {path} to group {group}: this process is not in it: usermod -aG {group} USER, or "
            f"setpriv --groups {group}",
            error.errno,
        ) from error


def remove_stale(path: str, *, ours: bool = False) -> None:
    """Remove the socket of a program that has ended. Raises: LocalError: it is alive, or no socket; OSError.

    `ours`: this process listened there itself, before it executed other code, and has nothing to say of it.
    """
    try:
        if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
            raise LocalError(f"{path} exists and is not a socket: remove it or choose another path", errno.EEXIST)
        with _socket(socket.SOCK_STREAM) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        with suppress(FileNotFoundError):
            os.unlink(path)
        if not ours:
            log.info("removed socket %s of a program that is gone", path)
        return
    except FileNotFoundError:
        return
    except PermissionError:
        raise
    except OSError:
        pass  # a full backlog or another type of socket: there is somebody
    raise LocalError(
        f"socket {path} is in use by a running program: stop that one or choose another path", errno.EADDRINUSE
    )


def dial(path: str, *, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Connect to the listening socket at `path`, at once or not at all; returns a socket in blocking mode.

    Raises: LocalError: says why not and what to do.
    """
    check_path(path)
    try:
        sock = _socket(kind)
    except OSError as error:
        raise _path_error("connect to", path, error) from error
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise _path_error("connect to", path, error) from error
    sock.setblocking(True)
    return sock


def _path_error(what: str, path: str, error: OSError) -> LocalError:
    """Build the one line that says what to do."""
    advice = {
        errno.EACCES: "no permission: run as its owner or choose a path you may use",
        errno.EPERM: "no permission: run as its owner or choose a path you may use",
        errno.EROFS: "the file system is read-only: choose another path",
        errno.ENOENT: "there is no such socket: start the program that listens there or choose another path",
        errno.ECONNREFUSED: "nobody listens there: start the program that does or choose another path",
        errno.EADDRINUSE: "another program is starting there: stop one of them or choose another path",
        errno.EAGAIN: "too many connections wait there: try again",
        errno.EPROTOTYPE: "it is a socket of another kind, such as the one that ends in .hold: choose another path",
        errno.EMFILE: "raise this process's limit of open files (ulimit -n)",
    }
    code = error.errno or errno.EIO
    return LocalError(f"cannot {what} socket {path}: {advice.get(code) or os.strerror(code)}", code)


def adopt(fd: int) -> Listener | socket.socket:
    """Take over a UNIX stream socket inherited from the program that started us.

    Returns: a Listener when it listens (SO_ACCEPTCONN), else the connected socket.
    Raises: LocalError: not open, not such a socket, or not connected; it stays open and with the caller.
    """
    try:
        mode = os.fstat(fd).st_mode
    except (OSError, OverflowError) as error:
        raise LocalError(
            f"fd {fd} is not open: pass a listening or connected socket as fd {fd}", errno.EBADF
        ) from error
    if not stat.S_ISSOCK(mode):
        raise LocalError(f"fd {fd} is not a socket: pass a listening or connected UNIX stream socket", errno.ENOTSOCK)
    sock = socket.socket(fileno=fd)
    try:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise LocalError(f"fd {fd} is not a UNIX stream socket: pass one that is", errno.EPROTOTYPE)
        os.set_inheritable(fd, False)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return Listener(sock)
        try:
            sock.getpeername()
        except OSError as error:
            raise LocalError(
                f"fd {fd} neither listens nor is connected: pass a socket that does", errno.ENOTCONN
            ) from error
        return sock
    except BaseException:
        sock.detach()
        raise


def socket_of(fd: int) -> socket.socket:
    """Take over a descriptor that is known to be a socket: from a store of ours."""
    return socket.socket(fileno=fd)


def adopt_copy(fd: int) -> socket.socket:
    """Duplicate a descriptor that a front-end sent as its end of a connection.

    Raises: LocalError: it is not a connected UNIX stream socket.
    """
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    try:
        sock = adopt(copy)
    except BaseException:
        os.close(copy)
        raise
    if isinstance(sock, Listener):
        sock.close()
        raise LocalError("the descriptor is a listening socket, not a connected one", errno.ENOTCONN)
    return sock


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected stream sockets, close-on-exec (for tests and tools)."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def send_datagram(address: str, data: bytes, fds: Sequence[int] = (), *, wait: bool = False) -> None:
    """Send one datagram, with descriptors, to a UNIX socket; a leading `@` names an abstract one. Raises: OSError.

    With `wait` it may take as long as there is no room for it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        flags = 0 if wait else socket.MSG_DONTWAIT
        sock.sendmsg([data], rights, flags, "\0" + address[1:] if address.startswith("@") else address)


def _socket(kind: int) -> socket.socket:
    """Make a non-blocking socket: connect() would wait for room in the backlog of who does not accept."""
    return socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
