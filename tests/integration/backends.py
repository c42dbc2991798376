"""Back-ends in Python that the integration tests swap in: `python:<this file>:CLASS`."""

from __future__ import annotations

import time
from collections import deque
from typing import Any


class Mirror:
    """Gives each guest back what it sent, in order."""

    def __init__(self) -> None:
        """Hold nothing."""
        self.queues: dict[int, deque[bytes]] = {}

    def transmit(self, queue: int, packets: list[memoryview]) -> None:
        """Keep copies."""
        self.queues.setdefault(queue, deque()).extend(bytes(packet) for packet in packets)

    def receive(self, queue: int, budget: int) -> list[bytes]:
        """Return the oldest."""
        kept = self.queues.get(queue, deque())
        return [kept.popleft() for _ in range(min(budget, len(kept)))]


class Slow(Mirror):
    """Looks at the guest's memory again after a while: what it sees then must still be the guest's memory."""

    DWELL_SECONDS = 0.003

    def transmit(self, queue: int, packets: list[memoryview]) -> None:
        """Wait, then keep copies."""
        time.sleep(self.DWELL_SECONDS)
        super().transmit(queue, packets)


class Nameless(type):
    """A class that fails where its name is looked at, to complain of something else."""

    def __getattribute__(cls, name: str) -> Any:
        """Return anything else."""
        if name == "__qualname__":
            raise KeyboardInterrupt("no name")
        return super().__getattribute__(name)


class Clumsy(Mirror, metaclass=Nameless):
    """Fails now and then, in each way that it can."""

    def __init__(self) -> None:
        """Count the calls."""
        super().__init__()
        self.calls = 0

    def transmit(self, queue: int, packets: list[memoryview]) -> None:
        """Keep copies, and a slice too many; raise now and then."""
        self.kept = packets[0][:1]
        if self.calls % 2:
            raise SystemExit(3)
        super().transmit(queue, packets)

    def receive(self, queue: int, budget: int) -> list[bytes]:
        """Raise, return nonsense, or behave."""
        self.calls += 1
        if self.calls % 3 == 0:
            raise RuntimeError("as it happens")
        if self.calls % 3 == 1:
            return [1, None]  # type: ignore[list-item]
        return super().receive(queue, budget)
