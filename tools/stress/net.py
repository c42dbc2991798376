"""A machine with a network card: frames out by ring 1, 3, ..., in by ring 0, 2, ... (virtio 1.3, 5.1.2)."""

from __future__ import annotations

import itertools
import random
import struct
import time
from collections.abc import Sequence
from typing import ClassVar, Final

from vhostmp.tools.stress.consts import Feature, has
from vhostmp.tools.stress.link import Link
from vhostmp.tools.stress.machine import Machine, Ring, Setup
from vhostmp.tools.stress.ring import Segment, Used
from vhostmp.tools.stress.split import NetHeader
from vhostmp.tools.stress.verdict import Failure

LEGACY_HEADER: Final = 10  # of a driver with neither VERSION_1 nor MRG_RXBUF (virtio 1.3, 5.1.6.1)
ROOM: Final = 2048
ADDRESSES: Final = 12  # both Ethernet addresses: a back-end that echoes may exchange them
MAGIC: Final = b"\x88\xb5vmps"  # ethertype for local experiments, and who it is
SMALLEST: Final = 60


def make_frame(sequence: int, size: int = SMALLEST) -> bytes:
    """Return a broadcast frame of `size` bytes (22 at least) whose contents follow from its number."""
    head = b"\xff" * 6 + b"\x02\x00\x00\x00\x00\x01" + MAGIC + struct.pack(">I", sequence)
    return head + random.Random(sequence).randbytes(size - len(head))


def is_ours(frame: bytes) -> bool:
    """Whether a frame is one that `make_frame` made, and no stranger's."""
    return frame[ADDRESSES : ADDRESSES + len(MAGIC)] == MAGIC


class NetMachine(Machine):
    """See the file's head."""

    kind: ClassVar[str] = "net"
    work_index: ClassVar[int] = 1

    def __init__(self, link: Link, setup: Setup, *, echoes: bool = False) -> None:
        """`echoes`: what is sent comes back on the same pair."""
        super().__init__(link, setup)
        self.echoes: Final = echoes
        self.room = ROOM
        self._sequence = 0
        self._partial: dict[int, list[bytes]] = {}

    @property
    def header_size(self) -> int:
        """Bytes of struct virtio_net_hdr."""
        long = has(self.setup.features, Feature.VERSION_1) or has(self.setup.features, Feature.NET_MRG_RXBUF)
        return NetHeader.SIZE if long else LEGACY_HEADER

    @property
    def mergeable(self) -> bool:
        """Whether a frame may arrive in several buffers."""
        return has(self.setup.features, Feature.NET_MRG_RXBUF)

    @property
    def pairs(self) -> range:
        """Numbers of the queue pairs."""
        return range(len(self.rings) // 2)

    def rx(self, pair: int = 0) -> Ring:
        """Return a pair's receive ring."""
        return self.rings[2 * pair]

    def tx(self, pair: int = 0) -> Ring:
        """Return a pair's transmit ring."""
        return self.rings[2 * pair + 1]

    def next_frame(self, size: int = SMALLEST) -> bytes:
        """Return a new frame."""
        self._sequence += 1
        return make_frame(self._sequence, size)

    def packet(self, frame: bytes, header: NetHeader | None = None) -> bytes:
        """Return a frame with its header before it."""
        return (header or NetHeader()).pack()[: self.header_size] + frame

    def send(self, frame: bytes, pair: int = 0, *, cuts: Sequence[int] = (), header: NetHeader | None = None) -> None:
        """Add a frame to the transmit ring, in pieces cut at these places, counted from the header's first byte."""
        data = self.packet(frame, header)
        gpa = self.put(data)
        places = [0, *cuts, len(data)]
        segments: list[Segment] = [(gpa + a, b - a) for a, b in itertools.pairwise(places)]
        self.tx(pair).driver.add(segments)

    def good_chain(self) -> None:
        """Add a frame to the first transmit ring."""
        self.send(self.next_frame())

    def post(self, pair: int = 0, count: int | None = None) -> int:
        """Make receive buffers available: all that there is room for, or `count`. Returns how many."""
        ring = self.rx(pair)
        many = len(ring.driver.free) if count is None else count
        for _ in range(many):
            ring.driver.add([], [(self.arena.take(self.room), self.room)])
        ring.kick()
        return many

    def receive(self, pair: int = 0, count: int = 1, patience: float | None = None) -> list[bytes]:
        """Wait for `count` frames of ours and return them; strangers' frames are dropped."""
        found: list[bytes] = []
        until = time.monotonic() + (self.link.patience if patience is None else patience)
        while len(found) < count:
            used = self.rx(pair).take(1, max(until - time.monotonic(), 0))
            found += [frame for one in used if (frame := self._collect(pair, one)) is not None and is_ours(frame)]
        return found

    def _collect(self, pair: int, used: Used) -> bytes | None:
        gpa, room = used.chain.writable[0]
        if used.length is None:
            raise Failure(f"ring {2 * pair}: the device does not say how many bytes it wrote")
        data = self.memory.read(gpa, used.length)
        self.give([used])
        parts = self._partial.setdefault(pair, [])
        if not parts and len(data) < self.header_size:
            raise Failure(f"ring {2 * pair}: {len(data)} bytes arrived, less than a header")
        parts.append(data)
        count = NetHeader.unpack(parts[0]).num_buffers if self.header_size == NetHeader.SIZE else 1
        if count == 0 or (count > 1 and not self.mergeable):
            raise Failure(f"ring {2 * pair}: num_buffers is {count}")
        if len(parts) < count:
            if used.length != room:
                raise Failure(f"ring {2 * pair}: a buffer of {room} has {used.length} bytes and is not a frame's last")
            return None
        self._partial[pair] = []
        return b"".join(parts)[self.header_size :]

    def exchange(self, sizes: Sequence[int], pair: int = 0) -> None:
        """Send frames of these sizes through a pair; where the back-end echoes, they come back whole and in order."""
        frames = [self.next_frame(size) for size in sizes]
        if self.echoes:
            self.post(pair)
        for frame in frames:
            self.send(frame, pair)
        self.tx(pair).kick()
        self.finish(frames, pair)

    def finish(self, frames: Sequence[bytes], pair: int = 0) -> None:
        """Wait for frames that were sent: for their buffers, and where the back-end echoes for them too."""
        if self.echoes:
            for sent, got in zip(frames, self.receive(pair, len(frames)), strict=False):
                if got[ADDRESSES:] != sent[ADDRESSES:]:
                    raise Failure(f"a frame of {len(sent)} bytes came back with other contents ({len(got)} bytes)")
        used = self.tx(pair).take(len(frames))
        if any(one.length for one in used):
            raise Failure(f"ring {2 * pair + 1}: the device says that it wrote to a frame it was given to send")
        self.give(used)

    def probe(self) -> None:
        """Send eight frames through every pair that runs."""
        for pair in self.pairs:
            if self.tx(pair).running and self.rx(pair).running:
                self.exchange([SMALLEST, 64, 200, 1000, 1514, 61, 300, SMALLEST], pair)
