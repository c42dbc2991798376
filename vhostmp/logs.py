"""Log lines of the control process: to stderr, one line each, never too many of one kind.

Rules: a record is one line whatever its text holds, tracebacks included. What a front-end or a guest can cause at will
is limited here, at the output: of one kind of message (one format string, one logger) at most BURST lines pass in
WINDOW_SECONDS, of what back-ends in Python raise one; the first line of a later window says how many did not. Debugging
is not limited. Under systemd a line begins with `<N>`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, TextIO

from vhostmp import systemd

BURST: Final = 20
WINDOW_SECONDS: Final = 5.0
#: Loggers of which one line of a kind is enough: what fails in a back-end fails in each worker alike.
ONCE: Final = frozenset(("vhostmp.backend",))

HELD_BACK: Final = "vhostmp_held_back"
"""Attribute of a record that says how many of its kind were not written."""

LEVELS: Final = ("debug", "info", "warning", "error")

#: syslog priority for each level, see sd-daemon(3)
_PRIORITY: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.NOTSET, 7),
)


class OneLine(logging.Formatter):
    """Formats a record as `vhostmp: warning: text`, on one line."""

    def __init__(self, *, journal: bool = False) -> None:
        """Prefix with the level by name, or with `journal` by `<N>` for the journal."""
        super().__init__("%(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its newline."""
        text = " | ".join(line.strip() for line in super().format(record).splitlines() if line.strip())
        text += getattr(record, HELD_BACK, "")
        if self._journal:
            priority = next(number for level, number in _PRIORITY if record.levelno >= level)
            return f"<{priority}>vhostmp: {text}"
        return f"vhostmp: {record.levelname.lower()}: {text}"


class RateLimit(logging.Filter):
    """Lets BURST records of a kind pass in each window."""

    def __init__(self, burst: int = BURST, window_seconds: float = WINDOW_SECONDS) -> None:
        """Start with nothing seen."""
        super().__init__()
        self._burst = burst
        self._window = window_seconds
        self._seen: dict[tuple[str, str], list[float]] = {}  # start of the window, passed, held back

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether the record passes; one that ends a silence is told how many did not, for `OneLine`."""
        if record.levelno < logging.INFO:
            return True  # who wants to debug wants all of it
        now = time.monotonic()
        entry = self._seen.setdefault((record.name, str(record.msg)), [now, 0.0, 0.0])
        start, passed, held = entry
        if now - start >= self._window:
            entry[:] = now, 1.0, 0.0
            if held:
                setattr(record, HELD_BACK, f" (and {held:.0f} more like it in {now - start:.0f} s)")
            return True
        burst = 1 if record.name in ONCE else self._burst
        entry[1 if passed < burst else 2] += 1
        return passed < burst


@contextmanager
def writing_to(stream: TextIO, level: str = "info") -> Generator[None, None, None]:
    """While inside, write the package's log from `level` (one of LEVELS) up to `stream`."""
    try:
        journal = systemd.writes_to_journal(stream.fileno())
    except (OSError, ValueError):
        journal = False
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLine(journal=journal))
    handler.addFilter(RateLimit())
    root = logging.getLogger("vhostmp")
    before = root.level, logging.raiseExceptions
    # a log that nobody reads any more must not end the program, nor complain of itself
    logging.raiseExceptions = os.environ.get("VHOSTMP_DEBUG") == "1"
    root.setLevel(level.upper())
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        level_before, logging.raiseExceptions = before
        root.setLevel(level_before)
