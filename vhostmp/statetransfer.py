"""One transfer of a device's state, over a pipe that the front-end brought (vu "Migrating back-end state").

Rules: nothing blocks; whoever stops reading or writing holds up nobody. What is loaded is hostile: it is bounded, taken
whole or not at all, and what is wrong with it is one log line and a non-zero answer to CHECK_DEVICE_STATE.

Theory of operation: the end of the data is the end of the file. Saving, we close our end when all is written. Loading,
the front-end closes its end before it asks how it went, so what has not ended by then never arrived.
"""

from __future__ import annotations

import logging
import os
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


class Transfer:
    """A transfer that is under way or has ended. All methods: the event loop's thread."""

    def __init__(
        self, loop: EventLoop, fd: int, device: str, *, save: bytes | None = None, load: Callable[[bytes], None] | None
    ) -> None:
        """Begin.

        Args:
            loop: where callbacks come from.
            fd: a pipe or socket, borrowed: it is duplicated, and made non-blocking.
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
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
                raise LocalError("the descriptor is neither a pipe nor a socket")
            self._fd = duplicate(fd)
            os.set_blocking(self._fd, False)
        except OSError as error:
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
        self.done = True

    def _write(self) -> None:
        try:
            while self._data:
                del self._data[: os.write(self._fd, self._data[:_CHUNK])]
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"cannot write: {error.strerror}")
            return
        self._end(None)

    def _read(self) -> None:
        assert self._load is not None
        try:
            while part := os.read(self._fd, _CHUNK):
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
