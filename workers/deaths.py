"""What the control process tells a ring's next worker: that the one before it died, and has not left in due form.

Nothing else tells one from the other: a ring that was left has nothing marked in its journal, but frames that waited in
a worker's memory come along when a ring is moved, and are lost when a worker dies.
"""

from __future__ import annotations

from collections.abc import Iterable

from vhostmp.shm import layout


def note_death(buf: memoryview, index: int, rings: Iterable[int] = range(layout.CONSTANTS["RINGS_MAX"])) -> None:
    """Note in the control segment that worker `index` has died: in the slots of those of `rings` that it served.

    Before anybody else serves them. Who takes one up counts what the death has cost (workers/_journal.pyx).
    """
    for ring in rings:
        offset = layout.ring_offset(ring)
        if layout.RING.read(buf, offset, "worker") == 1 + index:
            layout.RING.write(buf, offset, "died", 1)
