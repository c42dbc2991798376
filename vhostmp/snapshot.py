"""What the control segment says of a ring, as `vhostmp show` prints it."""

from __future__ import annotations

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
)


def ring_numbers(buf: memoryview, offset: int) -> dict[str, Any]:
    """Return indices and counters of the ring whose slot is at `offset`.

    Drops that there were, by reason; which rule its driver broke, None when it is whole.
    """
    drops = {reason: layout.RING.read(buf, offset, "drops", i) for i, reason in enumerate(layout.DROP_REASONS)}
    return {
        **{name: layout.RING.read(buf, offset, name) for name in _NUMBERS},
        "drops": {reason: count for reason, count in drops.items() if count},
        "broken": layout.BROKEN_REASONS[layout.RING.read(buf, offset, "broken")] or None,
    }
