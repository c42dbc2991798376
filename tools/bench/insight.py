"""What a server's workers say of themselves: its control segment, read as `vhostmp show` does but without asking it.

The control process shares a processor with the worker that is measured; under load it would answer late, and take time
from what is measured. Nothing is written, and only counters are read, each of which has one writer.
"""

from __future__ import annotations

import os
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import attrs

from vhostmp.errors import LocalError, VhostError
from vhostmp.shm import layout
from vhostmp.shm.segment import PREFIX, SHM_DIRECTORY, Segment


@attrs.frozen
class Counts:
    """Sums over the first workers and rings of a server.

    `batches` is how often a driver was told of packets, or was not because it did not want that: once for all that a
    back-end had in its hands, which may be several updates of the used index.
    """

    busy_ns: int
    packets: int
    batches: int
    wakeups: int


class Insight:
    """The control segment of the server `pid`."""

    def __init__(self, pid: int, workers: int, rings: int) -> None:
        """Map it. LocalError when there is none, or one of another layout."""
        self._workers, self._rings = range(workers), range(rings)
        self._segment: Final = self._find(pid)
        self._view: Final = self._segment.buf

    @staticmethod
    def _find(pid: int) -> Segment:
        for path in sorted(SHM_DIRECTORY.glob(f"{PREFIX}.{os.getuid()}.{pid}.*")):
            with suppress(VhostError):
                return Segment.open(f"/{path.name}")
        raise LocalError(f"process {pid} has no control segment of this version")

    def counts(self) -> Counts:
        """Return the counters as they are."""

        def of_workers(name: str) -> int:
            return sum(layout.WORKER.read(self._view, layout.worker_offset(index), name) for index in self._workers)

        def of_rings(name: str) -> int:
            return sum(layout.RING.read(self._view, layout.ring_offset(index), name) for index in self._rings)

        batches = of_rings("calls") + of_rings("calls_suppressed")
        return Counts(of_workers("busy_ns"), of_rings("packets"), batches, of_workers("wakeups"))

    def close(self) -> None:
        """Give it back."""
        self._segment.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back."""
        self.close()
