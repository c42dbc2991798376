"""Back-ends in Python that hold their worker up inside a work item: `python:<this file>:G<n>`.

Gate n says that it was entered by a file, and waits for another one: in the folder that GATES names.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

FOLDER = Path(os.environ.get("GATES", "/nonexistent"))
LIMIT_SECONDS = 20.0


class Gate:
    """Waits once, in the first batch."""

    number = 0

    def transmit(self, queue: int, packets: list[memoryview]) -> None:
        """Say that we are here, and wait."""
        entered = FOLDER / f"entered{self.number}"
        if entered.exists():
            return
        entered.touch()
        limit = time.monotonic() + LIMIT_SECONDS
        while not (FOLDER / f"open{self.number}").exists() and time.monotonic() < limit:
            time.sleep(0.001)

    def receive(self, queue: int, budget: int) -> tuple[()]:
        """Have nothing."""
        return ()


class G1(Gate):
    """The first."""

    number = 1


class G2(Gate):
    """The second."""

    number = 2


class G3(Gate):
    """The third."""

    number = 3


class G4(Gate):
    """The fourth."""

    number = 4


class G5(Gate):
    """The fifth."""

    number = 5
