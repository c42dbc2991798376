"""What a worker logs of a back-end in Python that fails: a line for each exception, however often it is raised.

A back-end that fails on each frame fails a hundred thousand times a second, in every worker. What it raises is logged
with its traceback the first time, and afterwards once in AGAIN_SECONDS, with how often it came. How many packets that
has cost is counted beside (`backend_error` in `vhostmp show`).
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from typing import Any, Final

from vhostmp.workers.backends import python_api

log = logging.getLogger("vhostmp.backend")

AGAIN_SECONDS: Final = 60.0
#: So many exceptions are told apart: a back-end may make up classes of them as it goes.
KINDS_MAX: Final = 32


class Complaints:
    """Those of one object in one worker. Its methods raise nothing, whatever the object's class does."""

    def __init__(self, instance: Any, device: str) -> None:
        """Complain of `instance`, which serves the device of that name."""
        self._instance = instance
        self._device = device
        self._seen: dict[tuple[Any, ...], list[float]] = {}  # when it was logged last, and how often it came since

    def failed(self, what: str) -> None:
        """Log the exception that is being handled, which came of `what`, something of the object's."""
        # A class can make its name and its exceptions what it likes.
        with contextlib.suppress(BaseException):
            error = sys.exception()
            if (again := self._again(what, type(error), *_origin(error))) is not None:
                name, found = type(self._instance).__qualname__, type(error).__name__
                hint = python_api.sandbox_hint(self._instance, error)
                text = f"device {self._device}: {name}: {what}: {found}: {error}{hint}{again}"
                log.error("%s", text, exc_info=not again)

    def warn(self, what: str) -> None:
        """Log something else that is wrong with the object."""
        with contextlib.suppress(BaseException):
            if (again := self._again(what)) is not None:
                log.warning("device %s: %s %s%s", self._device, type(self._instance).__qualname__, what, again)

    def _again(self, *kind: Any) -> str | None:
        """Return what to say of how often it came meanwhile, nothing at first; None: it is not logged now."""
        now = time.monotonic()
        if kind not in self._seen and len(self._seen) >= KINDS_MAX:
            kind = ()
        seen = self._seen.get(kind)
        if seen is not None and now - seen[0] < AGAIN_SECONDS:
            seen[1] += 1
            return None
        self._seen[kind] = [now, 0]
        return "" if seen is None else f" ({seen[1] + 1:.0f} times in {now - seen[0]:.0f} s)"


def _origin(error: BaseException | None) -> tuple[str, int]:
    """Return where an exception was raised: file and line."""
    trace = error.__traceback__ if error is not None else None
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace is not None else ("", 0)
