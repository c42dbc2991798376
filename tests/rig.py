"""A connection to a port with a fake device, both ends in this process and in this thread: nothing is left to chance.

Rules: the server's side runs only in `settle`, which every read of the front-end's side begins with; it ends when
nothing is ready any more. So a test knows that all it sent has been dealt with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from tests.fakes import FEATURES, FakeDevice
from vhostmp import transport
from vhostmp.consts import Request
from vhostmp.eventloop import EventLoop
from vhostmp.server import Port
from vhostmp.sources import Source
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import Frontend

MEMORY_BYTES = 1 << 20
UVA = 0x7F00_0000_0000
RING_SIZE = 256


class Rig(Frontend):
    """The front-end's end, with the port and the device at hand."""

    def __init__(self, device: FakeDevice | None = None, *, busyloop_us: int = 0) -> None:
        """Connect a new port to a device."""
        self.device = FakeDevice() if device is None else device
        self.loop = EventLoop()
        self.finished = False
        ours, self.theirs = transport.connected_pair()
        super().__init__(ours)
        self.port = Port(self.loop, self.device, Source(self.theirs, "a test"), self._finish, busyloop_us)

    def _finish(self) -> None:
        self.finished = True

    def settle(self) -> None:
        """Let the port deal with everything that was sent."""
        while self.loop.turn(0):
            pass

    def _exactly(self, size: int) -> bytes:
        self.settle()
        return super()._exactly(size)

    def hung_up(self) -> bool:
        """Whether the port has closed the connection without sending anything first."""
        self.settle()
        return not self.port.connected and super().hung_up()

    def state(self) -> Mapping[str, object]:
        """Everything that a message could change in the device."""
        self.settle()
        return self.device.state()

    def close(self) -> None:
        """Take everything down."""
        super().close()
        self.port.close()
        self.device.close()
        self.loop.close()

    # --- the usual beginning of a conversation ---

    def negotiate(self, protocol_features: int = frontend.REPLY_ACK) -> None:
        """Set owner, features with bit 30, and protocol features."""
        self.send(Request.SET_OWNER)
        self.send(Request.SET_FEATURES, frontend.u64(FEATURES & ~(1 << 26) | frontend.PROTOCOL_FEATURES))
        self.send(Request.SET_PROTOCOL_FEATURES, frontend.u64(protocol_features))
        self.settle()
        assert self.device.owned

    def give_memory(self, fd: int) -> None:
        """Send a table of one region."""
        assert self.do(Request.SET_MEM_TABLE, frontend.mem_table(frontend.region(0, MEMORY_BYTES, UVA)), [fd]) == 0

    def set_ring(self, index: int) -> None:
        """Say how large a ring is and where it lies."""
        assert self.do(Request.SET_VRING_NUM, frontend.vring(index, RING_SIZE)) == 0
        assert self.do(Request.SET_VRING_BASE, frontend.vring(index, 0)) == 0
        start = UVA + index * 0x10000
        addr = frontend.vring_addr(index, desc=start, avail=start + 0x4000, used=start + 0x8000)
        assert self.do(Request.SET_VRING_ADDR, addr) == 0

    def start_ring(self, index: int, kick: int, call: int) -> None:
        """Send call and kick, enable."""
        assert self.do(Request.SET_VRING_CALL, frontend.u64(index), [call]) == 0
        assert self.do(Request.SET_VRING_KICK, frontend.u64(index), [kick]) == 0
        assert self.do(Request.SET_VRING_ENABLE, frontend.vring(index, 1)) == 0

    def start_all(self, memory: int, fds: Sequence[int]) -> None:
        """Bring both rings up."""
        self.negotiate()
        self.give_memory(memory)
        for index in range(2):
            self.set_ring(index)
            self.start_ring(index, fds[2 * index], fds[2 * index + 1])


def descriptor_count() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))
