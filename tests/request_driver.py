"""A guest that sends requests, in plain Python, to a device of any class: memory, and queues by tools/stress/.

It drives a device through its verbs and eventfds, as a hypervisor that embeds vhostmp would.

Rules:
- A request is written into a buffer of its own, cut into descriptors as the test says; `finish` frees it.
- `wait` polls: what these tests are about is what comes back, not when.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

import attrs

from tests.helpers import wait_until
from vhostmp.device import Device
from vhostmp.shm.memory import DEFAULT_UVA_BASE, GuestMemory
from vhostmp.tools.stress.packed import WRAP, PackedDriver, packed_layout
from vhostmp.tools.stress.ring import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, RingLayout, Segment
from vhostmp.tools.stress.split import SplitDriver

RING: Final = 64
BUFFER_BYTES: Final = 1 << 17
FILL: Final = 0xEE  # what stands in the writable part beforehand
F_RING_PACKED: Final = 1 << 34
FEATURES: Final = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX


@attrs.frozen
class Answer:
    """What came back: the length that the device reports, and where and what the writable part is now."""

    length: int
    data: bytes
    gpa: int


@attrs.define
class Sent:
    """A request that the device has."""

    head: int
    start: int
    writable: list[Segment]


class RequestGuest:
    """A guest with every queue of one device running."""

    def __init__(self, device: Device, *, features: int = FEATURES, num: int = RING) -> None:
        """Take the device, give it memory, start and enable all its queues, of `num` entries."""
        packed = bool(features & F_RING_PACKED)
        driver = PackedDriver if packed else SplitDriver
        layouts: list[RingLayout] = []
        start = 0
        for _ in range(device.num_queues):
            layouts.append(packed_layout(start, num) if packed else RingLayout.at(start, num))
            start = layouts[-1].end + 4096 & ~4095
        self.memory: Final = GuestMemory.create(start + num * BUFFER_BYTES)
        self.free: deque[int] = deque(start + number * BUFFER_BYTES for number in range(num))
        self.rings: Final[list[Any]] = [driver(self.memory.buf, layout, features=features) for layout in layouts]
        self.kicks: Final = [os.eventfd(0, os.EFD_NONBLOCK) for _ in layouts]
        self.calls: Final = [os.eventfd(0, os.EFD_NONBLOCK) for _ in layouts]
        self.sent: Final[list[dict[int, Sent]]] = [{} for _ in layouts]
        self.answers: Final[list[dict[int, Answer]]] = [{} for _ in layouts]
        self.features: Final = features
        self.begin(device, WRAP | WRAP << 16 if packed else 0)

    def begin(self, device: Device, base: int) -> None:
        """Give a device its memory, start and enable all its queues at a base."""
        self.device = device
        device.set_owner()
        device.set_features(self.features)
        device.set_mem_table([self.memory.region])
        self.start(base)

    def start(self, base: int) -> None:
        """Start and enable all queues at a base."""
        for index in range(len(self.rings)):
            self.start_one(index, base)

    def start_one(self, index: int, base: int) -> None:
        """Start and enable a queue at a base."""
        device, ring, uva = self.device, self.rings[index], DEFAULT_UVA_BASE
        device.set_vring_num(index, ring.num)
        device.set_vring_addr(index, desc=uva + ring.desc_gpa, avail=uva + ring.avail_gpa, used=uva + ring.used_gpa)
        device.set_vring_base(index, base)
        device.set_vring_kick(index, self.kicks[index])
        device.set_vring_call(index, self.calls[index])
        device.start_vring(index)
        device.set_vring_enable(index, True)

    def send(self, readable: bytes | Sequence[bytes] = (), writable: Sequence[int] = (), *, queue: int = 0) -> int:
        """Make a request available and kick: pieces to be read, sizes of the pieces to be written. Returns its head."""
        pieces = [readable] if isinstance(readable, bytes) else readable
        start = at = self.free.popleft()
        read: list[Segment] = []
        for piece in pieces:
            self.memory.buf[at : at + len(piece)] = piece
            read.append((at, len(piece)))
            at += len(piece)
        write: list[Segment] = []
        for size in writable:
            self.memory.buf[at : at + size] = bytes([FILL]) * size
            write.append((at, size))
            at += size
        assert at <= start + BUFFER_BYTES, "the request does not fit its buffer"
        head: int = self.rings[queue].add(read, write)
        self.sent[queue][head] = Sent(head, start, write)
        if self.rings[queue].publish():
            os.eventfd_write(self.kicks[queue], 1)
        return head

    def look(self, queue: int = 0) -> None:
        """Take what has come back."""
        for used in self.rings[queue].reap():
            sent = self.sent[queue].pop(used.chain.head)
            assert used.length is not None
            gpa = sent.writable[0][0] if sent.writable else 0
            self.answers[queue][sent.head] = Answer(used.length, self.rings[queue].read(sent.writable), gpa)
            self.free.append(sent.start)

    def wait(self, head: int, queue: int = 0) -> Answer:
        """Wait for a request to come back."""

        def came() -> bool:
            self.look(queue)
            return head in self.answers[queue]

        wait_until(came, what=f"request {head} of queue {queue}")
        return self.answers[queue].pop(head)

    def ask(self, readable: bytes | Sequence[bytes] = (), writable: Sequence[int] = (), *, queue: int = 0) -> Answer:
        """Send a request and wait for it."""
        return self.wait(self.send(readable, writable, queue=queue), queue)

    def ask_at(self, readable: bytes, writable: list[Segment], *, table: int | None = None, queue: int = 0) -> None:
        """Send a request with room anywhere in guest memory, and wait for it."""
        start = self.free.popleft()
        self.memory.buf[start : start + len(readable)] = readable
        ring = self.rings[queue]
        head = ring.add([(start, len(readable))], writable, table=table)
        self.sent[queue][head] = Sent(head, start, [])
        if ring.publish():
            os.eventfd_write(self.kicks[queue], 1)
        self.wait(head, queue)

    def close(self) -> None:
        """Stop the device, let go of memory and descriptors."""
        self.device.stop_all()
        for ring in self.rings:
            ring.close()
        for fd in (*self.kicks, *self.calls):
            os.close(fd)
        self.memory.close()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def blk_header(kind: int, sector: int = 0) -> bytes:
    """Pack struct virtio_blk_req up to its data. Source: virtio 1.3, 5.2.6."""
    return struct.pack("<IIQ", kind, 0, sector)


def blk_range(sector: int, count: int, flags: int = 0) -> bytes:
    """Pack struct virtio_blk_discard_write_zeroes. Source: virtio 1.3, 5.2.6."""
    return struct.pack("<QII", sector, count, flags)
