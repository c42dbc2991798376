"""A thread that drives guests turn by turn, and can be paused, ended, or ended at once, from the test's thread."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from tests.helpers import PATIENCE


class Driven(ABC):
    """Takes turns until it is told to stop, then until what is under way has arrived. The guests are its meanwhile."""

    def __init__(self, name: str) -> None:
        """Prepare the thread; `_begin` starts it, once there is what turns need."""
        self.error: BaseException | None = None
        self._paused: Final = threading.Event()
        self._resume: Final = threading.Event()
        self._want_pause = False
        self._stop = False
        self._abandoned = False
        self._wake: Final = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread: Final = threading.Thread(target=self._run, name=name)

    def _begin(self) -> None:
        self._thread.start()

    @abstractmethod
    def _turn(self, *, sending: bool) -> bool:
        """Send, unless that is over, and receive what there is; whether anything moved."""

    @abstractmethod
    def _wait(self, also: Sequence[int]) -> None:
        """Sleep until a device has something, or a descriptor of `also` is readable."""

    @property
    @abstractmethod
    def _done(self) -> bool:
        """Whether everything sent has been taken, and has arrived where it should."""

    def _run(self) -> None:
        try:
            while not self._stop:
                if self._want_pause:
                    self._paused.set()
                    self._resume.wait()
                elif not self._turn(sending=True):
                    self._wait([self._wake])
            while not self._abandoned and not self._done:
                if not self._turn(sending=False):
                    self._wait([])
        except BaseException as error:
            self.error = error
        finally:
            self._paused.set()

    def check(self) -> None:
        """Raise what the thread died of."""
        if self.error is not None:
            raise self.error

    def pause(self) -> None:
        """Have the thread stand still between two turns: whatever is under way stays under way."""
        self._paused.clear()
        self._resume.clear()
        self._want_pause = True
        os.eventfd_write(self._wake, 1)
        assert self._paused.wait(3 * PATIENCE)
        self.check()

    def resume(self) -> None:
        """Have it go on."""
        os.eventfd_read(self._wake)
        self._want_pause = False
        self._paused.clear()
        self._resume.set()

    def abandon(self) -> None:
        """End the thread without waiting for what is under way."""
        self._abandoned = True
        self._end(3 * PATIENCE)

    def _end(self, timeout: float) -> None:
        self._stop = True
        os.eventfd_write(self._wake, 1)
        self._resume.set()
        self._thread.join(timeout)
        assert not self._thread.is_alive()

    def _finish(self) -> None:
        """Stop sending, and wait for what is under way."""
        self._end(6 * PATIENCE)
        self.check()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread, however the test went."""
        if self._thread.is_alive():
            self.abandon()
        os.close(self._wake)
