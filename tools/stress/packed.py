"""The guest's side of a packed virtqueue in plain Python, with the interface of split.py's SplitDriver.

Written from the virtio 1.3 specification (2.8 "Packed Virtqueues") and not from our device. A buffer's id is a number
of its own, not its place in the ring: ids come back from a queue in the order in which they were freed, so that the
two soon differ.
"""

from __future__ import annotations

import random
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final

from vhostmp.tools.stress.ring import (
    DESC_BYTES,
    NEXT,
    WRITE,
    InFlight,
    Part,
    RingDriver,
    RingLayout,
    Segment,
    Used,
    align,
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
    desc = align(start, 16)
    end = desc + DESC_BYTES * num
    return RingLayout(num, desc, end, end + 4, end + 8)


class PackedDriver(RingDriver):
    """The driver side of one packed virtqueue."""

    def __init__(
        self, buf: memoryview, layout: RingLayout, *, gpa: int = 0, features: int = 0, first_idx: int = WRAP
    ) -> None:
        """Set the ring up, empty, at a position (offset and wrap counter; a fresh device is at 0 and 1)."""
        super().__init__(buf, layout, gpa, features)
        # Descriptors counted from the start of a round with wrap counter 1: these only grow.
        self._next = (first_idx & ~WRAP) + (0 if first_idx & WRAP else self.num)
        self._published = self._next
        self._last_used = self._next
        self._ids: deque[int] = deque(range(self.num))
        self._heads: list[tuple[int, int]] = []  # (count, flags) of chains written and not yet published
        if self._next:  # somebody was here before: every descriptor is used
            for offset in range(self.num):
                wrap = self._wrap(self._next - 1 - offset)
                self.write_descriptor(offset, pack_packed(0, 0, 0, AVAIL | USED if wrap else 0))
        self.want_interrupts()

    def _spans(self) -> list[tuple[int, int]]:
        return [(self.layout.desc, DESC_BYTES * self.num), (self.layout.avail, 4), (self.layout.used, 4)]

    def _look(self) -> None:
        layout = self.layout
        self._words = self._view(layout.desc, layout.desc + DESC_BYTES * self.num, "H")
        self._driver_event = self._view(layout.avail, layout.avail + 4, "H")
        self._device_event = self._view(layout.used, layout.used + 4, "I")

    @property
    def device_parts(self) -> list[Segment]:
        """The descriptors, and the device's event suppression. Source: virtio 1.3, 2.8.13 and 2.8.14."""
        return [(self.desc_gpa, DESC_BYTES * self.num), (self.used_gpa, self.layout.end - self.layout.used)]

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

    def shuffle(self, rng: random.Random) -> None:
        """Have free ids be taken in another order."""
        rng.shuffle(self._ids)

    @staticmethod
    def pack_table(parts: Sequence[Part]) -> bytes:
        """Return an indirect table of (gpa, length, flags); the id in it means nothing. Source: virtio 1.3, 2.8.7."""
        return b"".join(pack_packed(addr, length, 0xDEAD, flags) for addr, length, flags in parts)

    def _write(self, parts: Sequence[Part]) -> tuple[int, list[int]]:
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
        return buffer_id, list(range(len(parts)))

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

    def _free(self, chain: InFlight) -> None:
        self._ids.append(chain.head)
        self._last_used += len(chain.slots)

    def want_interrupts(self) -> bool:
        """Ask for an interrupt at the next used descriptor. Returns whether there is one already (then reap again)."""
        if self.event_idx:
            self._driver_event[0] = self._position(self._last_used)
        self._driver_event[1] = DESC if self.event_idx else ENABLE
        fence()
        return self.pending() > 0

    def want_interrupt_at(self, chains: int, width: int = 1) -> None:
        """Ask for an interrupt when `chains` more than one, of `width` descriptors, are used. Only with EVENT_IDX."""
        self.set_driver_event(self._position(self._last_used + chains * width), DESC)

    def refuse_interrupts(self) -> None:
        """Ask for none."""
        self._driver_event[1] = DISABLE

    def set_driver_event(self, position: int, flags: int) -> None:
        """Write any numbers as the driver's event suppression. Source: virtio 1.3, 2.8.10."""
        self._driver_event[0] = position
        self._driver_event[1] = flags
