"""One transfer of a device's state, over a pipe that the front-end brought (vu "Migrating back-end state").

Rules: nothing blocks; whoever stops reading or writing holds up nobody. What is loaded is hostile: it is bounded, taken
whole or not at all, and what is wrong with it is one log line and a non-zero answer to CHECK_DEVICE_STATE.

Theory of operation: the end of the data is the end of the file. Saving, we close our end when all is written. Loading,
the front-end closes its end before it asks how it went, so what has not ended by then never arrived.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Callable
from typing import Final

from vhostmp.errors import LocalError, SysError, VhostError
from vhostmp.eventloop import EventLoop
from vhostmp.parts import duplicate

log = logging.getLogger(__name__)

STATE_MAX: Final = 1 << 20
"""Largest state that is taken, bytes."""

_CHUNK: Final = 1 << 16
_PIPED: Final = 1 << 12  # what any pipe takes at once when it is empty


class Transfer:
    """A transfer that is under way or has ended. All methods: the event loop's thread."""

    def __init__(
        self, loop: EventLoop, fd: int, device: str, *, save: bytes | None = None, load: Callable[[bytes], None] | None
    ) -> None:
        """Begin.

        Args:
            loop: where callbacks come from.
            fd: a pipe or socket, borrowed: it is duplicated. Nothing relies on its O_NONBLOCK, which the front-end may
                change at any time.
            device: name in log lines.
            save: what to write; None to load.
            load: what to do with what was read; raises VhostError when it is wrong.

        Raises: LocalError, SysError: it is neither a pipe nor a socket.
        """
        self.done = False
        self.error: str | None = "the transfer has not ended"
        """Why it failed; None when it did not."""
        self._loop = loop
        self._device = device
        self._load = load
        self._data = bytearray(save or b"")
        self._fd = -1
        self._socket: socket.socket | None = None
        # A pipe is read and written through one of ours, since splice need not block; a socket has MSG_DONTWAIT.
        self._pipe: tuple[int, ...] = ()
        self._piped = 0
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
                raise LocalError("the descriptor is neither a pipe nor a socket")
            self._fd = duplicate(fd)
            if stat.S_ISSOCK(mode):
                self._socket = socket.socket(fileno=duplicate(fd))
            else:
                self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self.close()
            raise SysError.wrap("cannot use the descriptor", error) from error
        if save is None:
            loop.watch(self, self._read)
        else:
            loop.watch(self, self._write, write=True)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def check(self) -> str | None:
        """Return what went wrong, None when nothing did; what has arrived by now is all there is."""
        if not self.done:
            (self._write if self._load is None else self._read)()
        if not self.done:
            self._end(self.error)
        return self.error

    def close(self) -> None:
        """Give it up, if it has not ended; may be called twice."""
        if self._fd >= 0:
            self._loop.unwatch(self)
            os.close(self._fd)
            self._fd = -1
        if self._socket is not None:
            self._socket.close()
        for fd in self._pipe:
            os.close(fd)
        self._pipe = ()
        self.done = True

    def _receive(self) -> bytes:
        if self._socket is not None:
            return self._socket.recv(_CHUNK, socket.MSG_DONTWAIT)
        count = os.splice(self._fd, self._pipe[1], _CHUNK, flags=os.SPLICE_F_NONBLOCK)
        return os.read(self._pipe[0], count) if count else b""

    def _send(self) -> None:
        if self._socket is not None:
            del self._data[: self._socket.send(self._data[:_CHUNK], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)]
            return
        if not self._piped:
            self._piped = os.write(self._pipe[1], self._data[:_PIPED])
            del self._data[: self._piped]
        self._piped -= os.splice(self._pipe[0], self._fd, self._piped, flags=os.SPLICE_F_NONBLOCK)

    def _write(self) -> None:
        try:
            while self._data or self._piped:
                self._send()
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"cannot write: {error.strerror}")
            return
        self._end(None)

    def _read(self) -> None:
        assert self._load is not None
        try:
            while part := self._receive():
                self._data += part
                if len(self._data) > STATE_MAX:
                    self._end(f"more than {STATE_MAX} bytes")
                    return
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"cannot read: {error.strerror}")
            return
        try:
            self._load(bytes(self._data))
        except VhostError as error:
            self._end(str(error))
        else:
            self._end(None)

    def _end(self, error: str | None) -> None:
        self.error = error
        self._data.clear()
        self.close()
        if error is not None:
            log.warning("device %s: state not transferred: %s", self._device, error)
