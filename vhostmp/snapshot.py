"""What the control segment says of a ring and of a worker, as `vhostmp show` prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from vhostmp.shm import layout

_NUMBERS: Final = (
    "avail_idx",
    "used_idx",
    "last_avail_idx",
    "kicks",
    "calls",
    "calls_suppressed",
    "packets",
    "bytes",
    "copied",
    "repeated",
    "lost",
    "log_pages",
    "log_outside",
    "deaths",
)


def ring_numbers(buf: memoryview, offset: int) -> dict[str, Any]:
    """Return indices and counters of the ring whose slot is at `offset`.

    Drops that there were, by reason; which rule its driver broke, None when it is whole.
    """
    drops = {reason: layout.RING.read(buf, offset, "drops", i) for i, reason in enumerate(layout.DROP_REASONS)}
    return {
        **{name: layout.RING.read(buf, offset, name) for name in _NUMBERS},
        "drops": {reason: count for reason, count in drops.items() if count},
        "broken": layout.reason(layout.BROKEN_REASONS, layout.RING.read(buf, offset, "broken")) or None,
    }


def worker_numbers(buf: memoryview, index: int, pid: int) -> dict[str, Any]:
    """Return the counters of a worker slot, and the memory of its process."""
    offset = layout.worker_offset(index)
    names = ("restarts", "hangs", "items", "wakeups", "polls", "busy_ns", "switches", "asleep")
    numbers = {name: layout.WORKER.read(buf, offset, name) for name in names}
    return {"index": index, "rss_bytes": _rss_bytes(pid), **numbers}


def process_status(pid: int) -> dict[str, str]:
    """Return the lines of a process's status file, by name; none when it is gone. Source: proc(5)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _rss_bytes(pid: int) -> int | None:
    """Return the resident memory of a process that is its own: without what it shares with guests."""
    kilobytes = process_status(pid).get("RssAnon")
    return None if kilobytes is None else int(kilobytes.split()[0]) * 1024
