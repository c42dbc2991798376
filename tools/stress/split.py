"""The guest's side of a split virtqueue in plain Python, and of a network queue pair on top of it.

Written from the virtio 1.3 specification (2.7 "Split Virtqueues", 5.1 "Network Device") and not from our device, so
that the two can be wrong in different ways only. It is also a referee. When it reaps the used ring it fails, with
DeviceError, when the device

- reports more used elements than buffers were made available, or moves the used index backwards,
- returns a head that is not in flight (returned twice, or never made available),
- reports more bytes written than the chain's writable part holds,
- returns heads out of order although VIRTIO_F_IN_ORDER was negotiated.

Rules:
- Addresses are guest-physical; the buffer given is the memory from `gpa` on.
- Nothing here moves by itself: `add` makes a chain, `publish` makes all of them available, `reap` takes what is used.
- Two-byte accesses go through a memoryview of unsigned shorts, which CPython loads and stores as one access. The one
  store-load fence a driver needs is `fence`. Python has no fence: taking and releasing a lock is an atomic
  read-modify-write, which on x86 orders everything.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

NEXT: Final = 1  # VIRTQ_DESC_F_NEXT, virtio 1.3, 2.7.5
WRITE: Final = 2  # VIRTQ_DESC_F_WRITE
INDIRECT: Final = 4  # VIRTQ_DESC_F_INDIRECT
NO_INTERRUPT: Final = 1  # VIRTQ_AVAIL_F_NO_INTERRUPT, 2.7.6
NO_NOTIFY: Final = 1  # VIRTQ_USED_F_NO_NOTIFY, 2.7.8
F_INDIRECT_DESC: Final = 1 << 28  # VIRTIO_F_INDIRECT_DESC, 6
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
F_RING_PACKED: Final = 1 << 34
F_IN_ORDER: Final = 1 << 35
DESC_BYTES: Final = 16  # le64 addr, le32 len, le16 flags, le16 next
MASK: Final = 0xFFFF
_LOCK: Final = threading.Lock()
_DESC: Final = struct.Struct("<QIHH")

Segment = tuple[int, int]
"""(guest-physical address, length in bytes)"""


class DeviceError(AssertionError):
    """The device broke the rules of the used ring."""


def fence() -> None:
    """Order stores before it before loads after it (see the file's rules)."""
    with _LOCK:
        pass


def need_event(event: int, new: int, old: int) -> bool:
    """Whether going from `old` to `new` passed `event`. Source: vring_need_event, virtio 1.3, 2.7.10."""
    return (new - event - 1) & MASK < (new - old) & MASK


def pack_descriptor(addr: int, length: int, flags: int = 0, following: int = 0) -> bytes:
    """Return the 16 bytes of struct virtq_desc. Source: virtio 1.3, 2.7.5."""
    return _DESC.pack(addr, length, flags, following)


def _align(value: int, to: int) -> int:
    return (value + to - 1) // to * to


@attrs.frozen
class RingLayout:
    """Where the three parts of a ring of `num` entries stand, in bytes from the start of the memory."""

    num: int
    desc: int
    avail: int
    used: int
    end: int

    @classmethod
    def at(cls, start: int, num: int) -> RingLayout:
        """Lay a ring out from `start`, each part on the alignment of the table in virtio 1.3, 2.7."""
        desc = _align(start, 16)
        avail = _align(desc + 16 * num, 2)
        used = _align(avail + 6 + 2 * num, 4)  # flags, idx, ring, used_event
        return cls(num, desc, avail, used, used + 6 + 8 * num)  # flags, idx, ring of (id, len), avail_event


@attrs.define
class InFlight:
    """A chain that the device has: its descriptors and what it may write."""

    head: int
    slots: list[int]
    readable: list[Segment]
    writable: list[Segment]

    @property
    def writable_bytes(self) -> int:
        """How many bytes the device may write."""
        return sum(length for _, length in self.writable)


@attrs.frozen
class Used:
    """A chain that came back, and how many bytes the device says it wrote (None: skipped under IN_ORDER)."""

    chain: InFlight
    length: int | None


class SplitDriver:
    """The driver side of one split virtqueue."""

    def __init__(
        self, buf: memoryview, layout: RingLayout, *, gpa: int = 0, features: int = 0, first_idx: int = 0
    ) -> None:
        """Set the ring up, empty, with both indices at `first_idx` (0 on a fresh device). `buf` starts at `gpa`."""
        self.layout: Final = layout
        self.num: Final = layout.num
        self.gpa: Final = gpa
        self.features: Final = features
        self.avail_idx = first_idx  # ours; the ring's copy is what has been published
        self.last_used = first_idx
        self.free: deque[int] = deque(range(self.num))
        self.in_flight: dict[int, InFlight] = {}
        self.order: deque[int] = deque()
        self.published_idx = first_idx
        self.added = 0
        self.reaped = 0
        buf[layout.desc : layout.end] = bytes(layout.end - layout.desc)
        self._views(buf)
        self._avail[1] = first_idx
        self._used[1] = first_idx
        self.want_interrupts()

    def _views(self, buf: memoryview) -> None:
        self.buf = buf
        self._avail = buf[self.layout.avail : self.layout.avail + 6 + 2 * self.num].cast("H")
        self._used = buf[self.layout.used : self.layout.used + 4].cast("H")
        self._avail_event = buf[self.layout.end - 2 : self.layout.end].cast("H")

    def rebase(self, buf: memoryview) -> None:
        """Go on in other memory, which holds a copy of all of it."""
        self.close()
        self._views(buf)

    def close(self) -> None:
        """Let go of the memory."""
        for view in (self._avail, self._used, self._avail_event):
            view.release()

    @property
    def desc_gpa(self) -> int:
        """Guest-physical address of the descriptor table."""
        return self.gpa + self.layout.desc

    @property
    def avail_gpa(self) -> int:
        """Guest-physical address of the available ring."""
        return self.gpa + self.layout.avail

    @property
    def used_gpa(self) -> int:
        """Guest-physical address of the used ring."""
        return self.gpa + self.layout.used

    @property
    def event_idx(self) -> bool:
        """Whether VIRTIO_F_EVENT_IDX was negotiated."""
        return bool(self.features & F_EVENT_IDX)

    def write_descriptor(self, index: int, raw: bytes) -> None:
        """Write descriptor `index` of the table as it stands: hostile ones too."""
        start = self.layout.desc + DESC_BYTES * index
        self.buf[start : start + DESC_BYTES] = raw

    def add(
        self, readable: Sequence[Segment] = (), writable: Sequence[Segment] = (), *, table: int | None = None
    ) -> int:
        """Put a chain into the descriptor table and the available ring, not yet visible to the device.

        With `table`, a guest-physical address of 16 bytes a segment, the chain is an indirect one. Returns its head.
        Raises IndexError when too few descriptors are free. Source: virtio 1.3, 2.7.13.1.
        """
        parts = [(addr, length, 0) for addr, length in readable] + [(addr, length, WRITE) for addr, length in writable]
        if not parts:
            raise ValueError("a chain has at least one segment")
        if table is not None:
            parts = [(self._write_table(table, parts), DESC_BYTES * len(parts), INDIRECT)]
        if len(parts) > len(self.free):
            raise IndexError(f"{len(parts)} descriptors wanted, {len(self.free)} free")
        slots = [self.free.popleft() for _ in parts]
        for place, (slot, (addr, length, flags)) in enumerate(zip(slots, parts, strict=True)):
            last = place == len(parts) - 1
            following = 0 if last else slots[place + 1]
            self.write_descriptor(slot, pack_descriptor(addr, length, flags | (0 if last else NEXT), following))
        self._make_available(InFlight(slots[0], slots, list(readable), list(writable)))
        return slots[0]

    def add_table(self, table: int, readable: Sequence[Segment] = (), writable: Sequence[Segment] = ()) -> int:
        """Put a chain that consists of an indirect table, written already, into the rings. Returns its head."""
        slot = self.free.popleft()
        length = DESC_BYTES * (len(readable) + len(writable))
        self.write_descriptor(slot, pack_descriptor(table, length, INDIRECT))
        self._make_available(InFlight(slot, [slot], list(readable), list(writable)))
        return slot

    @staticmethod
    def pack_table(parts: Sequence[tuple[int, int, int]]) -> bytes:
        """Return an indirect table of (gpa, length, flags), chained in their order. Source: virtio 1.3, 2.7.5.3."""
        last = len(parts) - 1
        return b"".join(
            pack_descriptor(addr, length, flags | (NEXT if place < last else 0), place + 1 if place < last else 0)
            for place, (addr, length, flags) in enumerate(parts)
        )

    def _write_table(self, table: int, parts: list[tuple[int, int, int]]) -> int:
        raw = self.pack_table(parts)
        self.buf[table - self.gpa : table - self.gpa + len(raw)] = raw
        return table

    def _make_available(self, chain: InFlight) -> None:
        self.in_flight[chain.head] = chain
        self.order.append(chain.head)
        self.offer(chain.head)
        self.added += 1

    def offer(self, head: int) -> None:
        """Write `head` into the next entry of the available ring: any number, so that tests can be hostile."""
        self._avail[2 + self.avail_idx % self.num] = head
        self.avail_idx = (self.avail_idx + 1) & MASK

    def publish(self) -> bool:
        """Make everything added visible. Returns whether the device wants a notification (a kick).

        Source: virtio 1.3, 2.7.13.3 (index after entries) and 2.7.13.4 (what to look at, after a memory barrier).
        """
        old, new = self.published_idx, self.avail_idx
        self._avail[1] = new
        self.published_idx = new
        fence()
        if old == new:
            return False
        if self.event_idx:
            return need_event(self._avail_event[0], new, old)
        return not self._used[0] & NO_NOTIFY

    def pending(self) -> int:
        """How many used elements wait to be reaped."""
        return (self._used[1] - self.last_used) & MASK

    def reap(self, limit: int | None = None) -> list[Used]:
        """Take what the device has used, oldest first, and check it. Raises DeviceError. Source: virtio 1.3, 2.7.14."""
        count = self.pending()
        if count > len(self.in_flight):
            raise DeviceError(f"used index is {count} ahead, {len(self.in_flight)} chains are in flight")
        found: list[Used] = []
        until = count if limit is None else min(count, limit)
        head = -1
        while len(found) < until:
            at = self.layout.used + 4 + 8 * (self.last_used % self.num)
            head, length = struct.unpack_from("<II", self.buf, at)
            for used in self._account(head, length):
                self.last_used = (self.last_used + 1) & MASK
                found.append(used)
        if len(found) > count:
            raise DeviceError(f"used element for head {head} lies beyond the used index")
        self.reaped += len(found)
        return found

    def _account(self, head: int, length: int) -> Iterable[Used]:
        """Take a used element off the books: one chain, or under IN_ORDER all up to it. Source: virtio 1.3, 2.7.9."""
        if head not in self.in_flight:
            raise DeviceError(f"head {head} was returned and is not in flight")
        skipped: list[Used] = []
        while self.features & F_IN_ORDER and self.order[0] != head:
            skipped.append(Used(self._free_chain(self.order[0]), None))
        chain = self._free_chain(head)
        if length > chain.writable_bytes:
            raise DeviceError(f"head {head}: {length} bytes written, there is room for {chain.writable_bytes}")
        return [*skipped, Used(chain, length)]

    def _free_chain(self, head: int) -> InFlight:
        chain = self.in_flight.pop(head)
        if self.order[0] == head:
            self.order.popleft()
        else:
            self.order.remove(head)
        self.free.extend(chain.slots)
        return chain

    def want_interrupts(self) -> bool:
        """Ask for an interrupt at the next used element. Returns whether there is one already (then reap again).

        Source: virtio 1.3, 2.7.7 and 2.7.14.
        """
        if self.event_idx:
            self._avail[2 + self.num] = self.last_used
        else:
            self._avail[0] = 0
        fence()
        return self.pending() > 0

    def refuse_interrupts(self) -> None:
        """Ask for none, as far as the device can be told. Source: virtio 1.3, 2.7.7."""
        if self.event_idx:
            self._avail[2 + self.num] = (self.last_used - 1) & MASK  # the place furthest away
        else:
            self._avail[0] = NO_INTERRUPT

    def set_used_event(self, value: int) -> None:
        """Write any number as used_event. Source: virtio 1.3, 2.7.10."""
        self._avail[2 + self.num] = value & MASK

    def set_avail_flags(self, value: int) -> None:
        """Write any number as the available ring's flags. Source: virtio 1.3, 2.7.6."""
        self._avail[0] = value

    def set_avail_idx(self, value: int) -> None:
        """Write any number as the available index, behind the back of our own books."""
        self._avail[1] = value & MASK

    @property
    def used_idx(self) -> int:
        """The used index in the ring."""
        return self._used[1]

    @property
    def used_flags(self) -> int:
        """The used ring's flags."""
        return self._used[0]

    @property
    def avail_event(self) -> int:
        """The device's avail_event. Only meaningful with EVENT_IDX."""
        return self._avail_event[0]

    def read(self, segments: Iterable[Segment], limit: int | None = None) -> bytes:
        """Copy bytes out of a list of segments, at most `limit`."""
        data = b"".join(bytes(self.buf[addr - self.gpa : addr - self.gpa + length]) for addr, length in segments)
        return data if limit is None else data[:limit]

    def check_idle(self) -> None:
        """Raise DeviceError unless every chain ever added has come back, once."""
        if self.in_flight or self.added != self.reaped or len(self.free) != self.num:
            raise DeviceError(
                f"{self.added} chains went out, {self.reaped} came back, missing: {sorted(self.in_flight)}"
            )


@attrs.frozen
class NetHeader:
    """struct virtio_net_hdr_v1. Source: virtio 1.3, 5.1.6."""

    SIZE = 12
    NEEDS_CSUM = 1
    DATA_VALID = 2
    GSO_NONE = 0
    GSO_TCPV4 = 1
    GSO_UDP = 3
    GSO_TCPV6 = 4
    GSO_ECN = 0x80

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def pack(self) -> bytes:
        """Return its 12 bytes, little-endian."""
        return struct.pack(
            "<BBHHHHH",
            self.flags,
            self.gso_type,
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
            self.num_buffers,
        )

    @classmethod
    def unpack(cls, data: bytes) -> NetHeader:
        """Read it from the first 12 bytes of `data`; struct.error when there are fewer."""
        return cls(*struct.unpack_from("<BBHHHHH", data))
