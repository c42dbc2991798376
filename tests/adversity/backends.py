"""Back-ends in Python that do what no back-end should: `python:<this file>:CLASS`."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

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


class Poisoned(Gate):
    """Does what the first bytes of a frame's payload say; other frames it takes."""

    def __init__(self) -> None:
        """Need no signs."""

    def transmit(self, queue: int, packets: list[memoryview]) -> None:
        """Look at each frame."""
        del queue
        for frame in packets:
            words = bytes(frame[14:]).rstrip(b"\0").decode(errors="replace")
            if words.startswith("do "):
                ACTS[words[3:]]()


class Unfinished:
    """A device that finishes no request."""

    device_id: Final = 42
    num_queues: Final = 1

    def process(self, queue: int, requests: list[Any]) -> int:
        """Leave them all."""
        del queue, requests
        return 0


def _loop() -> None:
    while True:
        pass


def _overflow_memory() -> None:
    held: list[bytes] = []
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        while True:
            held.append(bytes(1 << 20))
    finally:
        infinite = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (infinite, infinite))


def _die_in_turn() -> None:
    died = Path(os.environ[GATE]) / "died"
    if died.exists():
        died.unlink()
        return
    died.touch()
    ctypes.string_at(8, 1)


def _fail() -> None:
    raise ValueError("on purpose")


#: What a frame may ask a Poisoned back-end for.
ACTS: Final[dict[str, Callable[[], object]]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segv": lambda: ctypes.string_at(8, 1),
    "abort": os.abort,
    "exit": lambda: os._exit(3),
    "die in turn": _die_in_turn,  # the first time, the third, and so on
    "loop": _loop,
    "sleep": lambda: time.sleep(3600),
    "memory": _overflow_memory,
    "fail": _fail,
}
