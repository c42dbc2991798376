"""Back-ends in Python that take batches: `python:<this file>:CLASS`."""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vhostmp.workers.backends._batch import Batch

#: Where a Waiting back-end and a test leave each other signs.
FOLDER = Path(os.environ.get("GATES", "/nonexistent"))
LIMIT_SECONDS = 60.0
ETHERNET = bytes.fromhex("525400000002525400000001") + b"\x88\xb5"
#: Of each frame: its length, the CRC of its view, its headers, whether the arrays and the view can be written to.
REPORT = struct.Struct("<II64s?")


class Reporter:
    """Answers each frame with a frame that says what was shown of it."""

    def __init__(self) -> None:
        """Hold nothing."""
        self.answers: deque[bytes] = deque()

    def transmit_batch(self, queue: int, batch: Batch) -> None:
        """Look at everything there is to see."""
        assert len(batch) == len(batch.headers) == len(batch.lengths) > 0
        assert batch.headers.shape == (len(batch), 64)
        assert batch.headers.dtype == np.uint8
        assert batch.lengths.dtype == np.uint32
        assert [len(view) for view in batch] == list(batch.lengths)
        for k in range(len(batch)):
            view = batch[k]
            assert bytes(batch[k - len(batch)]) == bytes(view)
            writable = bool(batch.headers.flags.writeable or batch.lengths.flags.writeable or not view.readonly)
            report = REPORT.pack(int(batch.lengths[k]), zlib.crc32(view), batch.headers[k].tobytes(), writable)
            self.answers.append(ETHERNET + report)
        for outside in (len(batch), -len(batch) - 1):
            try:
                batch[outside]
            except IndexError:
                continue
            raise AssertionError(f"frame {outside} of {len(batch)}")

    def receive(self, queue: int, budget: int) -> list[bytes]:
        """Return the oldest reports."""
        return [self.answers.popleft() for _ in range(min(budget, len(self.answers)))]


class Sizes(Reporter):
    """Answers each batch with its size and the CRC of all its frames."""

    def transmit_batch(self, queue: int, batch: Batch) -> None:
        """Look at all of it."""
        assert len(batch) == len(batch.headers) == len(batch.lengths)
        frames = b"".join(batch)
        assert b"".join(row.tobytes() for row in batch.headers) == b"".join(bytes(view[:64]) for view in batch)
        self.answers.append(ETHERNET + REPORT.pack(len(batch), zlib.crc32(frames), b"", False))


class Bursts(Sizes):
    """The same with fewer at a time."""

    batch_size = 64


class Hundreds(Sizes):
    """The same with a number that is no number of bursts."""

    batch_size = 100


class Waiting(Reporter):
    """Stays in its first batch, before it looks at that, until the test lets it go: `entered` and `open` are files."""

    def transmit_batch(self, queue: int, batch: Batch) -> None:
        """Wait for `open`."""
        (FOLDER / "entered").touch()
        limit = time.monotonic() + LIMIT_SECONDS
        while not (FOLDER / "open").exists() and time.monotonic() < limit:
            time.sleep(0.001)
        super().transmit_batch(queue, batch)


class Keeper(Reporter):
    """Keeps the batch, and a view out of it, and looks at both again when the next batch comes."""

    kept: Any = None

    def transmit_batch(self, queue: int, batch: Batch) -> None:
        """Answer what has become of what was kept."""
        if self.kept is not None:
            view, iterator = self.kept
            try:
                bytes(view)
            except ValueError:
                self.answers.append(ETHERNET + b"released".ljust(50))
            else:
                self.answers.append(ETHERNET + b"still there".ljust(50))
            del iterator
        self.kept = batch[0], iter(batch)


class Clinging(Reporter):
    """Keeps an export of a view, which nobody can release then."""

    def __init__(self) -> None:
        """Keep a list of them."""
        super().__init__()
        self.kept: list[Any] = []

    def transmit_batch(self, queue: int, batch: Batch) -> None:
        """Keep one, for good."""
        self.kept.append(struct.iter_unpack("B", batch[0]))


class Failing(Reporter):
    """Raises on every second batch."""

    calls = 0

    def transmit_batch(self, queue: int, batch: Batch) -> None:
        """Count, report or raise."""
        self.calls += 1
        if self.calls % 2:
            raise ValueError("not this one")
        super().transmit_batch(queue, batch)


class Fickle(Reporter):
    """Takes one batch, and no more batches after it, which the handlers of its queue pairs know nothing of."""

    def transmit_batch(self, queue: int, batch: Batch) -> None:
        """Report the first."""
        super().transmit_batch(queue, batch)
        self.transmit_batch = None  # type: ignore[method-assign,assignment]
