"""Child processes for the torture tests: forked, watched by pidfd, always reaped."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from tests.helpers import PATIENCE, process_state, wait_until


class Child:
    """A forked process that runs one function. Use it as a context manager: it is dead and reaped afterwards."""

    def __init__(self, run: Callable[[], None]) -> None:
        """Fork; the child calls `run` and ends, with status 1 when it raised."""
        self.pid: Final = os.fork()
        if self.pid == 0:
            status = 1
            try:
                run()
                status = 0
            except BaseException:  # the child must never run on into pytest
                traceback.print_exc()
            finally:
                os._exit(status)
        self.pidfd: Final = os.pidfd_open(self.pid)
        self._status: int | None = None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        signal.pidfd_send_signal(self.pidfd, number)

    def stop(self) -> None:
        """SIGSTOP it and wait until it stands still."""
        self.kill(signal.SIGSTOP)
        wait_until(lambda: process_state(self.pid) == "T", what=f"{self.pid} to stop")

    def _poll(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end and return its exit status (negative: the signal). AssertionError when time is up."""
        wait_until(self._poll, timeout, f"the end of {self.pid}")
        assert self._status is not None
        return self._status

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill, reap and close."""
        if not self._poll():
            with suppress(ProcessLookupError):
                self.kill()
            self.wait()
        os.close(self.pidfd)
