"""Devices in Python that the integration tests serve: `python:<this file>:CLASS`."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any, ClassVar

from tests.adversity.backends import GATE, GATE_SECONDS
from vhostmp.workers.devices.blk import Blk


class Echo:
    """Writes what it reads, in capitals; what does not fit is cut off."""

    device_id = 42
    features = 1 << 3
    config = b"echo"

    def process(self, queue: int, requests: list[Any]) -> None:
        """Answer each request."""
        for request in requests:
            request.write(request.read().upper())


class Other(Echo):
    """Offers something else."""

    config = b"other"


class Whisper(Echo):
    """Offers the same, does something else."""

    def process(self, queue: int, requests: list[Any]) -> None:
        """Answer each request."""
        for request in requests:
            request.write(request.read().lower())


class Pipe:
    """What queue 1 is given to read, queue 0 writes: requests wait until there is something."""

    num_queues = 2
    queues_together = 2

    def __init__(self) -> None:
        """Hold nothing."""
        self.waiting = b""

    def process(self, queue: int, requests: list[Any]) -> int:
        """Finish as many as there is something for."""
        for done, request in enumerate(requests):
            if queue == 1:
                self.waiting += request.read()
            elif not self.waiting:
                return done
            else:
                self.waiting = self.waiting[request.write(self.waiting) :]
        return len(requests)


class Never:
    """Finishes nothing."""

    def process(self, queue: int, requests: list[Any]) -> int:
        """Leave all of it over."""
        return 0


class Gated:
    """Stays in `process` when a request says "wait", until the test lets it go: files `entered` and `open`."""

    def process(self, queue: int, requests: list[Any]) -> None:
        """Answer each request, in its own time."""
        for request in requests:
            if request.read() == b"wait":
                directory = Path(os.environ[GATE])
                (directory / "entered").touch()
                limit = time.monotonic() + GATE_SECONDS
                while not (directory / "open").exists() and time.monotonic() < limit:
                    time.sleep(0.001)
            request.write(b"done")


class FaultyDisk(Blk):
    """A disk with a mistake in it."""

    def _read(self, request: Any, sector: int, room: list[memoryview]) -> int:
        raise MemoryError(sector)


class SlowDisk(Blk):
    """A disk whose flushes wait until the test lets them go: `entered` grows with each, they end when there is `open`.

    What `open` holds is the errno with which they fail, 0 for none.
    """

    @staticmethod
    def sync(fd: int) -> None:
        """Wait, flush, and fail when told to."""
        directory = Path(os.environ[GATE])
        with (directory / "entered").open("a") as entered:
            entered.write("!")
        limit = time.monotonic() + GATE_SECONDS
        while not (directory / "open").exists() and time.monotonic() < limit:
            time.sleep(0.001)
        if code := int((directory / "open").read_text()):
            raise OSError(code, os.strerror(code))
        os.fdatasync(fd)


class Clock:
    """Answers when its descriptor is readable, which somebody else sees to: requests left over are offered again."""

    def __init__(self) -> None:
        """Make the descriptor: readable at once."""
        self.event = os.eventfd(3, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self.calls = 0

    def fileno(self) -> int:
        """Return it."""
        return self.event

    def process(self, queue: int, requests: list[Any]) -> int:
        """Finish one request in three calls, and see to it that there is a next call."""
        self.calls += 1
        os.eventfd_write(self.event, 1)
        if self.calls % 3:
            return 0
        requests[0].write(b"tick")
        return 1


class Leaver:
    """Leaves over what it is told to, and answers of anything else whether it is said to have been left over."""

    def process(self, queue: int, requests: list[Any]) -> int:
        """Look at one request."""
        if requests[0].read() == b"leave":
            return 0
        requests[0].write(b"%d" % requests[0].again)
        return 1


class Cyclic:
    """Keeps a slice of each request in a cycle that nothing refers to, for the collector to find with the next one."""

    def process(self, queue: int, requests: list[Any]) -> None:
        """Answer whether the collector found anything."""
        for request in requests:
            request.write(b"%d" % (gc.collect() > 0))
            cycle = [request.writable[0][:1]]
            cycle.append(cycle)


class Nasty:
    """What raises wherever it is looked at: as a length, and when it is to be shown."""

    def __index__(self) -> int:
        """Raise."""
        raise MemoryError("no number")

    def __format__(self, spec: str) -> str:
        """Raise."""
        raise KeyboardInterrupt("no text")

    __repr__ = __str__ = __format__  # type: ignore[assignment]


class Clumsy:
    """Fails in each way that it can: the request says how."""

    ERRORS: ClassVar[dict[bytes, BaseException]] = {b"r": RuntimeError("as it happens"), b"x": SystemExit(3)}
    LENGTHS: ClassVar[dict[bytes, Any]] = {b"l": 9, b"n": -1, b"t": "ten", b"u": 1 << 64, b"N": Nasty()}
    RESULTS: ClassVar[dict[bytes, Any]] = {b"v": 2, b"w": "all", b"y": -1, b"M": Nasty()}

    def __init__(self) -> None:
        """Keep what should not be kept."""
        self.kept: list[Any] = []

    def process(self, queue: int, requests: list[Any]) -> Any:
        """Do what the first byte of the first request says."""
        request = requests[0]
        how = request.read(0, 1)
        if how in self.ERRORS:
            raise self.ERRORS[how]
        if how in self.LENGTHS:
            request.written = self.LENGTHS[how]
            return None
        if how in self.RESULTS:
            return self.RESULTS[how]
        match how:
            case b"k":
                self.kept.append(request.writable[0])
                self.kept.append(request.writable[0][1:])
                self.kept.append(request)
            case b"K":
                self.kept.append(request.writable[0][:4])
            case b"G":
                request.write(bytes(self.kept.pop()))
            case b"g":
                for view in (self.kept[0], self.kept[2].writable[0]):
                    try:
                        bytes(view)
                    except ValueError:
                        request.write(b"gone ")
                try:
                    request.readable[0][0:1] = b"!"
                except TypeError:
                    request.write(b"read-only ")
                with memoryview(request.readable[0].obj) as nothing:
                    request.write(b"%d" % len(nothing))
                self.kept.clear()
            case _:
                request.write(b"fine")
        return None
