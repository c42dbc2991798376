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
from vhostmp.tools.stress.ring import Part, Segment, Used
from vhostmp.tools.stress.split import NetHeader
from vhostmp.tools.stress.verdict import Failure

LEGACY_HEADER: Final = 10  # of a driver with neither VERSION_1 nor MRG_RXBUF (virtio 1.3, 5.1.6.1)
ROOM: Final = 2048
POSTED: Final = 512
"""Receive buffers that a ring holds at most."""
BATCH: Final = 32
ADDRESSES: Final = 12  # both Ethernet addresses: a back-end that echoes may exchange them
MAGIC: Final = b"\x88\xb5vmps"  # ethertype for local experiments, and who it is
NUMBER: Final = ADDRESSES + len(MAGIC)
SMALLEST: Final = 60
SIZES: Final = (SMALLEST, 64, 200, 1000, 1514, 61, 300, SMALLEST)


def make_frame(sequence: int, size: int = SMALLEST) -> bytes:
    """Return a broadcast frame of `size` bytes (22 at least) whose contents follow from its number."""
    head = b"\xff" * 6 + b"\x02\x00\x00\x00\x00\x01" + MAGIC + struct.pack(">I", sequence)
    return head + random.Random(sequence).randbytes(size - len(head))


def number_of(frame: bytes) -> int:
    """Return the number of a frame that `make_frame` made; 0 when it is a stranger's."""
    if frame[ADDRESSES:NUMBER] != MAGIC or len(frame) < NUMBER + 4:
        return 0
    return int.from_bytes(frame[NUMBER : NUMBER + 4], "big")


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
        self._offered: list[bytes] = []
        self._forgotten = 0
        self._partial: dict[int, list[bytes]] = {}

    @property
    def header_size(self) -> int:
        """Bytes of struct virtio_net_hdr."""
        long = has(self.setup.features, Feature.VERSION_1) or has(self.setup.features, Feature.NET_MRG_RXBUF)
        return NetHeader.SIZE if long else LEGACY_HEADER

    @property
    def _legacy_cut(self) -> tuple[int, ...]:
        """Old drivers have the header in a descriptor of its own (virtio 1.3, 5.1.6.6)."""
        modern = has(self.setup.features, Feature.VERSION_1) or has(self.setup.features, Feature.ANY_LAYOUT)
        return () if modern else (self.header_size,)

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

    def send(
        self,
        frame: bytes,
        pair: int = 0,
        *,
        cuts: Sequence[int] = (),
        header: NetHeader | None = None,
        indirect: bool = False,
    ) -> None:
        """Add a frame to the transmit ring, in pieces cut at these places, counted from the header's first byte."""
        data = self.packet(frame, header)
        gpa = self.put(data)
        places = [0, *(cuts or self._legacy_cut), len(data)]
        segments: list[Segment] = [(gpa + a, b - a) for a, b in itertools.pairwise(places)]
        self.add(self.tx(pair), segments, indirect=indirect)

    def good_chain(self, *, indirect: bool = False) -> None:
        """Add a frame to the first transmit ring."""
        self._offered.append(self.next_frame())
        self.send(self._offered[-1], indirect=indirect)

    def go(self) -> None:
        """Have the frames sent that were offered."""
        if self.echoes:
            self.post()
        super().go()

    def collect(self) -> None:
        """Wait for the frames that were offered, and check those that come back."""
        frames, self._offered = self._offered, []
        self.finish(frames)
        self.work.driver.check_idle()

    def forget(self) -> None:
        """Forget frames that were offered and may have been lost, and what has been received."""
        self._offered = []
        self._forgotten = self._sequence
        self.discard()

    def discard(self, pair: int = 0) -> None:
        """Take what has been received, do not look at it, and give the buffers back."""
        self._partial[pair] = []
        self.give(self.rx(pair).driver.reap())
        self.post(pair)

    @property
    def good_width(self) -> int:
        """How many descriptors a frame has."""
        return 1 + len(self._legacy_cut)

    def good_parts(self) -> list[Part]:
        """Return a frame for the first transmit ring."""
        data = self.packet(self.next_frame())
        gpa = self.put(data)
        places = [0, *self._legacy_cut, len(data)]
        return [(gpa + a, b - a, 0) for a, b in itertools.pairwise(places)]

    def reset(self) -> None:
        """As Machine.reset; what was on its way is forgotten."""
        self._offered, self._partial = [], {}
        super().reset()

    def post(self, pair: int = 0, count: int | None = None) -> int:
        """Make receive buffers available: `count`, or as many as there is room for. Returns how many."""
        ring = self.rx(pair)
        cut = () if self.mergeable else self._legacy_cut
        if count is None:
            count = min(len(ring.driver.free) // max(len(cut) + 1, self.spread), POSTED - len(ring.driver.in_flight))
        for _ in range(count):
            gpa = self.arena.take(self.room)
            self.add(ring, writable=[(gpa + a, b - a) for a, b in itertools.pairwise([0, *cut, self.room])])
        ring.kick()
        return count

    def receive(self, pair: int = 0, count: int = 1, patience: float | None = None) -> list[bytes]:
        """Wait for `count` frames of ours and return them; strangers' and forgotten ones are dropped."""
        found: list[bytes] = []
        until = time.monotonic() + (self.link.patience if patience is None else patience)
        while len(found) < count:
            used = self.rx(pair).take(1, max(until - time.monotonic(), 0))
            frames = [self._collect(pair, one) for one in used]
            found += [frame for frame in frames if frame is not None and number_of(frame) > self._forgotten]
        return found

    def _collect(self, pair: int, used: Used) -> bytes | None:
        gpa, room = used.chain.writable[0][0], used.chain.writable_bytes
        if used.length is None:
            raise Failure(f"ring {2 * pair}: the device does not say how many bytes it wrote")
        data = self.memory.read(gpa, used.length)
        self.give([used])
        parts = self._partial.setdefault(pair, [])
        if not parts and len(data) < self.header_size:
            raise Failure(f"ring {2 * pair}: {len(data)} bytes arrived, less than a header")
        parts.append(data)
        count = NetHeader.unpack(parts[0]).num_buffers if self.mergeable else 1
        if count == 0:
            raise Failure(f"ring {2 * pair}: num_buffers is 0")
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

    def traffic(self, count: int = 32) -> None:
        """Send `count` frames of mixed sizes through every pair that runs."""
        for pair in self.pairs:
            if not (self.tx(pair).running and self.rx(pair).running):
                continue
            room = min(self.tx(pair).layout.num, self.rx(pair).layout.num) // self.good_width
            for first in range(0, count, min(room, BATCH)):
                self.exchange(
                    [SIZES[at % len(SIZES)] for at in range(first, min(count, first + min(room, BATCH)))], pair
                )

    def probe(self) -> None:
        """Send a frame of each of some sizes through every pair that runs."""
        self.traffic(len(SIZES))
