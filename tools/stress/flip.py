"""A process that changes a field of guest memory as fast as it can, while the device reads it: a double fetch shows.

The process is forked: it shares the guest's memory, and nothing else is done in it.

Rules: `with Flipper(...)`: on leaving it is ended, and the field has its first value again. Values are written in one
piece where they are 2 or 4 bytes long (see ring.py, "Rules").
"""

from __future__ import annotations

import os
import signal
import time
from types import TracebackType
from typing import Final, Literal, Self

Width = Literal["B", "H", "I", "Q"]
BEGIN: Final = 0.1
"""How long the process may need to begin, seconds."""


class Flipper:
    """Writes two values to one place in turn."""

    def __init__(self, buf: memoryview, at: int, width: Width, first: int, second: int) -> None:
        """`at`: byte offset in `buf`, a multiple of the field's width."""
        size = memoryview(bytearray(8)).cast(width).itemsize
        self._piece: Final = buf[at : at + size].cast(width)
        self._values: Final = (first, second)
        self._pid = 0

    def __enter__(self) -> Self:
        """Begin; the field changes by now."""
        self._pid = os.fork()
        if not self._pid:
            self._flip()
        until = time.monotonic() + BEGIN
        while self._piece[0] == self._values[0] and time.monotonic() < until:
            pass
        return self

    def _flip(self) -> None:
        piece, (first, second) = self._piece, self._values
        parent = os.getppid()
        try:
            while os.getppid() == parent:
                for _ in range(20_000):
                    piece[0] = second
                    piece[0] = first
        finally:
            os._exit(0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._piece[0] = self._values[0]
        self._piece.release()
