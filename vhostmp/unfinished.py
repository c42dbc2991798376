"""A ring that is stopped when its worker has died in the middle of giving chains back.

Of a packed ring used descriptors destroy what they are written over, so a batch that was begun has to be finished
(workers/_packed.pyx, J3 and J4). Of a split one nobody but the ring says whether the batch that the slot speaks of was
published (workers/_vring.pyx, J1 and J2); a base from before it would have another back-end use its chains again. That
is for the worker that has the ring next, and before anybody is told where it stands. A ring that is stopped is
nobody's. So it is started once more, for as long as it takes a worker to take it up; that is no more than if the stop
had come a moment later. One that is disabled stays so: its worker finishes it and does not serve it. The control
process does not do it itself: it touches no guest memory, which may have been made shorter.

Behind an IOMMU a worker has to find the ring in the IOTLB as it is: the front-end, which waits for the end of the stop,
answers no question. Where the ring is not there, for everything was invalidated just now, what was half given back is
lost.
"""

from __future__ import annotations

import logging
import time
from typing import Final, Protocol

from vhostmp.steps import Steppable

log = logging.getLogger(__name__)

#: How long a worker may take to take a ring up, seconds.
PATIENCE: Final = 1.0
_LOOK_SECONDS: Final = 0.0002


class Stopped(Steppable, Protocol):
    """What this needs of a device."""

    def unfinished(self, index: int) -> bool:
        """Whether a ring has a batch that was begun and not finished, and is whole otherwise."""
        ...

    def is_reachable(self, index: int) -> bool:
        """Whether a worker finds a ring without asking the front-end."""
        ...

    def revive(self, index: int) -> None:
        """Have the worker of a ring replaced, now, if it has died."""
        ...


def finish(device: Stopped, index: int) -> None:
    """Finish what was begun on a ring that was stopped just now; it is stopped again then. Raises what `put` raises."""
    deadline = time.monotonic() + PATIENCE
    while device.unfinished(index):
        if time.monotonic() > deadline or not device.is_reachable(index):
            log.error("device %s: queue %d was stopped with chains half given back: it is lost", device.name, index)
            return
        device.revive(index)
        device.put(device.state.with_ring(index, started=True, start_id=device.next_start()))
        attempt = time.monotonic() + PATIENCE / 4
        while device.unfinished(index) and time.monotonic() < attempt:
            time.sleep(_LOOK_SECONDS)
        device.put(device.state.with_ring(index, started=False))
