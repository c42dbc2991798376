"""As spies.py, for back-ends that take batches: `python:<this file>:CLASS`. Apart, so that only they import NumPy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np  # noqa: F401  # pyright: ignore[reportUnusedImport] - who takes batches has to import it

from tests.adversity.spies import NUMBER, Spy
from tests.frames import read_frame

if TYPE_CHECKING:
    from vhostmp.workers.backends._batch import Batch


class BatchSpy(Spy):
    """A network that takes what it is sent in batches of up to 256."""

    def transmit_batch(self, queue: int, batch: Batch) -> None:
        """Note them."""
        del queue
        os.write(self.acts, b"".join(NUMBER.pack(read_frame(bytes(frame))) for frame in batch))
