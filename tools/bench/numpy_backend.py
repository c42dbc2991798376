"""A back-end in Python that looks at each frame's header with NumPy: what `vhostmp bench` holds a batch's cost by."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from vhostmp.tools.bench.python_backend import ETHERTYPE

if TYPE_CHECKING:
    import numpy as np

    from vhostmp.workers.backends._batch import Batch
else:
    with suppress(ImportError):  # who loads this as a back-end is told what is missing
        import numpy as np


class Batches:
    """Takes frames by batches and parses the type of all at once."""

    def __init__(self) -> None:
        """Count nothing yet."""
        self.known = self.others = 0

    def transmit_batch(self, queue: int, batch: Batch) -> None:
        """Look up each frame's type."""
        del queue
        types = batch.headers[:, 12].astype(np.uint16) << 8 | batch.headers[:, 13]
        known = int(np.count_nonzero(types == ETHERTYPE))
        self.known += known
        self.others += len(batch) - known

    def receive(self, queue: int, budget: int) -> Iterable[bytes]:
        """Have nothing."""
        return ()


class Bursts(Batches):
    """The same with a burst at a time."""

    batch_size = 64
