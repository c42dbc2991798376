"""The guest's side of a packed virtqueue in plain Python, with the interface of split.py's SplitDriver.

Written from the virtio 1.3 specification (2.8 "Packed Virtqueues") and not from our device. It is a referee too. It
fails, with DeviceError, when the device

- returns an id that is not in flight, or one out of order although VIRTIO_F_IN_ORDER was negotiated,
- reports more bytes written than the chain's writable part holds.

Rules: those of split.py. A buffer's id is a number of its own, not its place in the ring: ids come back from a
queue in the order in which they were freed, so that the two soon differ.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from vhostmp.tools.stress.split import (
    DESC_BYTES,
    F_EVENT_IDX,
    F_IN_ORDER,
    INDIRECT,
    NEXT,
    WRITE,
    DeviceError,
    InFlight,
    RingLayout,
    Segment,
    Used,
    fence,
)

AVAIL: Final = 1 << 7  # VIRTQ_DESC_F_AVAIL, virtio 1.3, 2.8.1
USED: Final = 1 << 15  # VIRTQ_DESC_F_USED
ENABLE: Final = 0  # RING_EVENT_FLAGS_ENABLE, 2.8.10
DISABLE: Final = 1
DESC: Final = 2
WRAP: Final = 1 << 15
_DESC: Final = struct.Struct("<QIHH")


def pack_packed(addr: int, length: int, buffer_id: int, flags: int) -> bytes:
    """Return the 16 bytes of struct pvirtq_desc. Source: virtio 1.3, 2.8.13."""
    return _DESC.pack(addr, length, buffer_id, flags)


def packed_layout(start: int, num: int) -> RingLayout:
    """Lay a packed ring out from `start`: descriptors, driver's event suppression, device's (virtio 1.3, 2.8.10.1)."""
    desc = (start + 15) // 16 * 16
    return RingLayout(num, desc, desc + 16 * num, desc + 16 * num + 4, desc + 16 * num + 8)


class PackedDriver:
    """The driver side of one packed virtqueue."""

    def __init__(
        self, buf: memoryview, layout: RingLayout, *, gpa: int = 0, features: int = 0, first_idx: int = WRAP
    ) -> None:
        """Set the ring up, empty, at a position (offset and wrap counter; a fresh device is at 0 and 1)."""
        self.layout: Final = layout
        self.num: Final = layout.num
        self.gpa: Final = gpa
        self.features: Final = features
        # Descriptors counted from the start of a round with wrap counter 1: these only grow.
        self._next = (first_idx & ~WRAP) + (0 if first_idx & WRAP else self.num)
        self._published = self._next
        self._last_used = self._next
        self._ids: deque[int] = deque(range(self.num))
        self._heads: list[tuple[int, int]] = []  # (count, flags) of chains written and not yet published
        self.in_flight: dict[int, InFlight] = {}
        self.order: deque[int] = deque()
        self.added = 0
        self.reaped = 0
        buf[layout.desc : layout.end] = bytes(layout.end - layout.desc)
        if self._next:  # somebody was here before: every descriptor is used
            for offset in range(self.num):
                wrap = (self._next - 1 - offset) // self.num % 2 == 0
                start = layout.desc + DESC_BYTES * offset
                buf[start : start + DESC_BYTES] = pack_packed(0, 0, 0, AVAIL | USED if wrap else 0)
        self._views(buf)
        self.want_interrupts()

    def _views(self, buf: memoryview) -> None:
        self.buf = buf
        self._words = buf[self.layout.desc : self.layout.end].cast("H")
        self._driver_event = buf[self.layout.avail : self.layout.avail + 4].cast("H")
        self._device_event = buf[self.layout.used : self.layout.used + 4].cast("I")

    def rebase(self, buf: memoryview) -> None:
        """Go on in other memory, which holds a copy of all of it."""
        self.close()
        self._views(buf)

    def close(self) -> None:
        """Let go of the memory."""
        for view in (self._words, self._driver_event, self._device_event):
            view.release()

    @property
    def desc_gpa(self) -> int:
        """Guest-physical address of the descriptor ring."""
        return self.gpa + self.layout.desc

    @property
    def avail_gpa(self) -> int:
        """Guest-physical address of the driver's event suppression."""
        return self.gpa + self.layout.avail

    @property
    def used_gpa(self) -> int:
        """Guest-physical address of the device's event suppression."""
        return self.gpa + self.layout.used

    @property
    def event_idx(self) -> bool:
        """Whether VIRTIO_F_EVENT_IDX was negotiated."""
        return bool(self.features & F_EVENT_IDX)

    @property
    def free(self) -> range:
        """As many numbers as there are free descriptors."""
        return range(self.num - (self._next - self._last_used))

    @property
    def next_id(self) -> int:
        """The id of the chain added next."""
        return self._ids[0]

    def _wrap(self, count: int) -> bool:
        return count // self.num % 2 == 0

    def _position(self, count: int) -> int:
        return count % self.num | (WRAP if self._wrap(count) else 0)

    @property
    def avail_idx(self) -> int:
        """Position of the next descriptor to make available."""
        return self._position(self._next)

    @property
    def used_idx(self) -> int:
        """Position of the next descriptor to be used."""
        return self._position(self._last_used)

    def write_descriptor(self, index: int, raw: bytes) -> None:
        """Write descriptor `index` of the ring as it stands: hostile ones too."""
        start = self.layout.desc + DESC_BYTES * index
        self.buf[start : start + DESC_BYTES] = raw

    def add(
        self, readable: Sequence[Segment] = (), writable: Sequence[Segment] = (), *, table: int | None = None
    ) -> int:
        """Write a chain, its first descriptor not yet available. Returns its id.

        With `table`, a guest-physical address of 16 bytes a segment, the chain is an indirect one. IndexError when too
        few descriptors are free. Source: virtio 1.3, 2.8.21.1.
        """
        parts = [(addr, length, 0) for addr, length in readable] + [(addr, length, WRITE) for addr, length in writable]
        if table is not None:
            raw = self.pack_table(parts)
            self.buf[table - self.gpa : table - self.gpa + len(raw)] = raw
            return self.add_table(table, readable, writable)
        return self._write(parts, readable, writable)

    @staticmethod
    def pack_table(parts: Sequence[tuple[int, int, int]]) -> bytes:
        """Return an indirect table of (gpa, length, flags); the id in it means nothing. Source: virtio 1.3, 2.8.7."""
        return b"".join(pack_packed(addr, length, 0xDEAD, flags) for addr, length, flags in parts)

    def add_table(self, table: int, readable: Sequence[Segment] = (), writable: Sequence[Segment] = ()) -> int:
        """Write a chain that consists of an indirect table, written already. Returns its id."""
        part = (table, DESC_BYTES * (len(readable) + len(writable)), INDIRECT)
        return self._write([part], readable, writable)

    def _write(
        self, parts: Sequence[tuple[int, int, int]], readable: Sequence[Segment], writable: Sequence[Segment]
    ) -> int:
        if not parts:
            raise ValueError("a chain has at least one segment")
        if len(parts) > len(self.free) or not self._ids:
            raise IndexError(f"{len(parts)} descriptors wanted, {len(self.free)} free")
        buffer_id = self._ids.popleft()
        for place, (addr, length, flags) in enumerate(parts):
            count = self._next + place
            if place < len(parts) - 1:
                flags |= NEXT  # noqa: PLW2901
            flags |= AVAIL if self._wrap(count) else USED  # noqa: PLW2901
            start = self.layout.desc + DESC_BYTES * (count % self.num)
            self.buf[start : start + 14] = pack_packed(addr, length, buffer_id, 0)[:14]
            if place:
                self._words[count % self.num * 8 + 7] = flags
            else:
                self._heads.append((count, flags))
        self._next += len(parts)
        slots = list(range(len(parts)))
        self.in_flight[buffer_id] = InFlight(buffer_id, slots, list(readable), list(writable))
        self.order.append(buffer_id)
        self.added += 1
        return buffer_id

    def publish(self) -> bool:
        """Make everything added visible. Returns whether the device wants a notification (a kick).

        Source: virtio 1.3, 2.8.21.2 and 2.8.21.3. The first chain's flags are written last: all appear at once.
        """
        for count, flags in reversed(self._heads):
            self._words[count % self.num * 8 + 7] = flags
        self._heads = []
        old, self._published = self._published, self._next
        fence()
        if old == self._next:
            return False
        event = self._device_event[0]
        if event >> 16 != DESC or not self.event_idx:
            return event >> 16 != DISABLE
        return any(self._position(count) == event & 0xFFFF for count in range(old, self._next))

    def pending(self) -> int:
        """1 when there is a used descriptor to be reaped, else 0 (how many there are, nobody can tell)."""
        flags = self._words[self._last_used % self.num * 8 + 7]
        wrap = self._wrap(self._last_used)
        return int(bool(flags & AVAIL) == bool(flags & USED) == wrap and bool(self.in_flight))

    def reap(self, limit: int | None = None) -> list[Used]:
        """Take what the device has used, oldest first, and check it. Raises DeviceError. Source: virtio 1.3, 2.8.22."""
        found: list[Used] = []
        while self.pending() and (limit is None or len(found) < limit):
            start = self.layout.desc + DESC_BYTES * (self._last_used % self.num)
            _, length, buffer_id, flags = _DESC.unpack_from(self.buf, start)
            found.extend(self._account(buffer_id, length if flags & WRITE else 0))
        self.reaped += len(found)
        return found

    def _account(self, buffer_id: int, length: int) -> Iterable[Used]:
        """Take a used descriptor off the books: one chain, or under IN_ORDER all up to it (2.8.8)."""
        if buffer_id not in self.in_flight:
            raise DeviceError(f"id {buffer_id} was returned and is not in flight")
        skipped: list[Used] = []
        while self.features & F_IN_ORDER and self.order[0] != buffer_id:
            skipped.append(Used(self._free_chain(self.order[0]), None))
        chain = self._free_chain(buffer_id)
        if length > chain.writable_bytes:
            raise DeviceError(f"id {buffer_id}: {length} bytes written, there is room for {chain.writable_bytes}")
        return [*skipped, Used(chain, length)]

    def _free_chain(self, buffer_id: int) -> InFlight:
        chain = self.in_flight.pop(buffer_id)
        self.order.remove(buffer_id)
        self._ids.append(buffer_id)
        self._last_used += len(chain.slots)
        return chain

    def want_interrupts(self) -> bool:
        """Ask for an interrupt at the next used descriptor. Returns whether there is one already (then reap again)."""
        if self.event_idx:
            self._driver_event[0] = self._position(self._last_used)
        self._driver_event[1] = DESC if self.event_idx else ENABLE
        fence()
        return self.pending() > 0

    def refuse_interrupts(self) -> None:
        """Ask for none."""
        self._driver_event[1] = DISABLE

    def set_driver_event(self, position: int, flags: int) -> None:
        """Write any numbers as the driver's event suppression. Source: virtio 1.3, 2.8.10."""
        self._driver_event[0] = position
        self._driver_event[1] = flags

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
