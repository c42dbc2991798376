"""The entropy device: fills the driver's buffers with random bytes. Source: virtio 1.3, 5.4."""

from __future__ import annotations

import os
from typing import Any, Final

from vhostmp.workers.devices.api import Device

#: At most so many bytes for one request: the driver takes what it gets, and a work item stays short.
REQUEST_BYTES: Final = 65536


class Rng(Device):
    """Random bytes from the kernel, or from a character device such as /dev/hwrng."""

    device_id = 4

    def __init__(self, source: int = -1) -> None:
        """Read from the descriptor `source`; -1: ask the kernel (getrandom)."""
        self.source = source

    def process(self, queue: int, requests: list[Any]) -> None:
        """Fill each request's first buffer, up to REQUEST_BYTES: one byte is all that 5.4.6.2 asks for."""
        for request in requests:
            if not request.writable:
                continue
            room = request.writable[0][:REQUEST_BYTES]
            if self.source < 0:
                room[:] = os.getrandom(len(room))
                request.written = len(room)
            else:
                request.written = os.readv(self.source, [room])
