"""Back-ends in Python whose every act can be seen from outside and outlives their worker: `python:<this file>:CLASS`.

Rules: what was acted upon is appended to the file `acts`, 8 bytes each; what may be taken is in the file `source`, two
numbers of 8 bytes: the next one, and the one at which it ends for now. Both are in the directory that SPY names.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.frames import make_frame, read_frame

if TYPE_CHECKING:
    from vhostmp.workers.backends._requests import Request

#: The environment variable that names the directory.
SPY: Final = "VHOSTMP_TEST_SPY"
NUMBER: Final = struct.Struct("<Q")
SOURCE: Final = struct.Struct("<QQ")


class Spy:
    """A network: frames that are sent are acts, frames that are received come from the source."""

    def __init__(self) -> None:
        """Open the files."""
        directory = Path(os.environ[SPY])
        self.acts: Final = os.open(directory / "acts", os.O_WRONLY | os.O_APPEND)
        self.source: Final = os.open(directory / "source", os.O_RDWR)

    def transmit(self, queue: int, packets: list[memoryview]) -> None:
        """Note them."""
        del queue
        os.write(self.acts, b"".join(NUMBER.pack(read_frame(bytes(frame))) for frame in packets))

    def receive(self, queue: int, budget: int) -> list[bytes]:
        """Take what there is."""
        del queue
        following, end = SOURCE.unpack(os.pread(self.source, SOURCE.size, 0))
        taken = range(following, min(end, following + budget))
        os.pwrite(self.source, NUMBER.pack(taken.stop), 0)
        return [make_frame(number, 60 if number % 2 else 600) for number in taken]

    def close(self) -> None:
        """Let go of the files."""
        os.close(self.acts)
        os.close(self.source)


class Server:
    """A device that gives each request back as it came; each one is an act."""

    device_id: Final = 42
    num_queues: Final = 2

    def __init__(self) -> None:
        """Open the file."""
        self.acts: Final = os.open(Path(os.environ[SPY]) / "acts", os.O_WRONLY | os.O_APPEND)

    def process(self, queue: int, requests: list[Request]) -> Any:
        """Note them, and answer."""
        del queue
        os.write(self.acts, b"".join(request.read() for request in requests))
        for request in requests:
            request.write(request.read())

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.acts)
