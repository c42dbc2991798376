"""A back-end written in Python, for the peer tests: it counts each packet and gives it back to the guest.

Rules: it lives in a worker process; what it counted is read by the test from the file that the environment variable
VHOSTMP_PEER_COUNTS names, three native 64-bit numbers: packets from the guest, their bytes, packets given back.
Each worker has an instance of its own, so the file is right for one worker only.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path

COUNTS_VARIABLE = "VHOSTMP_PEER_COUNTS"
_COUNTS = struct.Struct("=QQQ")
_KEPT_FRAMES = 1024


class Counting:
    """Counts packets and returns them, the newest _KEPT_FRAMES of each queue pair."""

    def __init__(self) -> None:
        """Map the file of counts and go on from what it says."""
        with open(os.environ[COUNTS_VARIABLE], "r+b") as file:
            self._map = mmap.mmap(file.fileno(), _COUNTS.size)
        self._transmitted, self._bytes, self._returned = _COUNTS.unpack_from(self._map)
        self._frames: dict[int, deque[bytes]] = {}

    def transmit(self, queue: int, packets: list[memoryview]) -> None:
        """Count what the guest sends and keep a copy."""
        kept = self._frames.setdefault(queue, deque(maxlen=_KEPT_FRAMES))
        for packet in packets:
            self._transmitted += 1
            self._bytes += len(packet)
            kept.append(bytes(packet))
        self._write()

    def receive(self, queue: int, budget: int) -> Iterator[bytes]:
        """Give back at most `budget` packets of the queue pair."""
        kept = self._frames.get(queue, deque())
        for _ in range(min(budget, len(kept))):
            self._returned += 1
            yield kept.popleft()
        self._write()

    def close(self) -> None:
        """Leave the counts in the file."""
        self._write()
        self._map.close()

    def _write(self) -> None:
        """Bring the file up to date."""
        _COUNTS.pack_into(self._map, 0, self._transmitted, self._bytes, self._returned)


class Counts:
    """The file of counts, on the test's side."""

    def __init__(self, path: Path) -> None:
        """Make the file, all numbers zero."""
        self.path = path
        path.write_bytes(bytes(_COUNTS.size))

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to find the file."""
        return {COUNTS_VARIABLE: str(self.path)}

    def read(self) -> tuple[int, int, int]:
        """Return packets from the guest, their bytes, packets given back."""
        transmitted, size, returned = _COUNTS.unpack(self.path.read_bytes())
        return transmitted, size, returned


SPEC = f"python:{Path(__file__).resolve()}:{Counting.__name__}"
