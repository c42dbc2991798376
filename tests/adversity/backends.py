"""Back-ends in Python that do what no back-end should: `python:<this file>:CLASS`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

#: The environment variable that names the directory in which a Gate and a test leave each other signs.
GATE: Final = "VHOSTMP_TEST_GATE"
#: A Gate that nobody opens opens by itself, seconds.
GATE_SECONDS: Final = 30.0


class Gate:
    """Stays in `transmit` until the test lets it go: files `entered`, `open` and `left` say how far it is."""

    def __init__(self) -> None:
        """Look where the signs are."""
        self.directory: Final = Path(os.environ[GATE])

    def transmit(self, queue: int, packets: list[memoryview]) -> None:
        """Wait for `open`."""
        del queue, packets
        (self.directory / "entered").touch()
        limit = time.monotonic() + GATE_SECONDS
        while not (self.directory / "open").exists() and time.monotonic() < limit:
            time.sleep(0.001)
        (self.directory / "left").touch()

    def receive(self, queue: int, budget: int) -> list[bytes]:
        """Return nothing."""
        del queue, budget
        return []


class Deadly(Gate):
    """Kills its worker while it is being made."""

    def __init__(self) -> None:
        """Kill: of all signals it may send itself none but that of abort()."""
        os.abort()
