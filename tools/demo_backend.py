"""The back-end in Python that the demo swaps in: it gives each queue pair back what it sent, in order, losing nothing.

It keeps no packet beyond a `receive`, as long as the guest has a receive buffer for each packet under way. The software
guest sees to that; with any other one, what waits inside a back-end is lost with it when it is swapped.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Final

#: Where the demo's frames carry their flags, and the flag that asks for a dwell (tools/_frame.pxd).
FLAGS_AT: Final = 28
FLAG_HOLD: Final = 1


class PythonLoopback:
    """Loops packets, one worker's queue pairs."""

    #: How long a batch that asks for it is dwelt on, seconds. While it lasts the worker is inside a read-side section
    #: and holds views of guest memory: the very moment in which a memory table must not be pulled away.
    hold_seconds = 0.0005

    def __init__(self) -> None:
        """Start empty."""
        self._frames: defaultdict[int, list[bytes]] = defaultdict(list)

    def transmit(self, queue: int, packets: list[memoryview]) -> None:
        """Copy a batch. A batch that the guest marked is looked at late: first the dwell, then the copy."""
        first = packets[0]
        if len(first) > FLAGS_AT and first[FLAGS_AT] & FLAG_HOLD:
            time.sleep(self.hold_seconds)
        self._frames[queue].extend(map(bytes, packets))

    def receive(self, queue: int, budget: int) -> list[bytes]:
        """Return the oldest frames, at most `budget`."""
        frames = self._frames[queue]
        self._frames[queue] = frames[budget:]
        return frames[:budget]
