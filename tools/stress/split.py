"""The guest's side of a split virtqueue in plain Python, and the header of a network device's packets.

Written from the virtio 1.3 specification (2.7 "Split Virtqueues", 5.1 "Network Device"). Beside what ring.py says, the
device is at fault when it reports more used elements than buffers were made available, or moves the used index
backwards.
"""

from __future__ import annotations

import random
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final

import attrs

from vhostmp.tools.stress.ring import (
    DESC_BYTES,
    NEXT,
    DeviceError,
    InFlight,
    Part,
    RingDriver,
    RingLayout,
    Segment,
    Used,
    fence,
)

NO_INTERRUPT: Final = 1  # VIRTQ_AVAIL_F_NO_INTERRUPT, 2.7.6
NO_NOTIFY: Final = 1  # VIRTQ_USED_F_NO_NOTIFY, 2.7.8
MASK: Final = 0xFFFF
_DESC: Final = struct.Struct("<QIHH")


def need_event(event: int, new: int, old: int) -> bool:
    """Whether going from `old` to `new` passed `event`. Source: vring_need_event, virtio 1.3, 2.7.10."""
    return (new - event - 1) & MASK < (new - old) & MASK


def pack_descriptor(addr: int, length: int, flags: int = 0, following: int = 0) -> bytes:
    """Return the 16 bytes of struct virtq_desc. Source: virtio 1.3, 2.7.5."""
    return _DESC.pack(addr, length, flags, following)


class SplitDriver(RingDriver):
    """The driver side of one split virtqueue."""

    def __init__(
        self, buf: memoryview, layout: RingLayout, *, gpa: int = 0, features: int = 0, first_idx: int = 0
    ) -> None:
        """Set the ring up, empty, with both indices at `first_idx` (0 on a fresh device). `buf` starts at `gpa`."""
        super().__init__(buf, layout, gpa, features)
        self.avail_idx = first_idx  # ours; the ring's copy is what has been published
        self.last_used = first_idx
        self.published_idx = first_idx
        self._slots: deque[int] = deque(range(self.num))
        self._avail[1] = first_idx
        self._used[1] = first_idx
        self.want_interrupts()

    def _spans(self) -> list[tuple[int, int]]:
        at, num = self.layout, self.num
        return [(at.desc, DESC_BYTES * num), (at.avail, 6 + 2 * num), (at.used, 6 + 8 * num)]

    def _look(self) -> None:
        layout = self.layout
        self._avail = self._view(layout.avail, layout.avail + 6 + 2 * self.num, "H")
        self._used = self._view(layout.used, layout.used + 4, "H")
        self._avail_event = self._view(layout.end - 2, layout.end, "H")

    @property
    def device_parts(self) -> list[Segment]:
        """The used ring, with avail_event. Source: virtio 1.3, 2.7.8."""
        return [(self.used_gpa, self.layout.end - self.layout.used)]

    @property
    def free(self) -> deque[int]:
        """The descriptors that are free, the next one first."""
        return self._slots

    def shuffle(self, rng: random.Random) -> None:
        """Have free descriptors be taken in another order."""
        rng.shuffle(self._slots)

    @staticmethod
    def pack_table(parts: Sequence[Part]) -> bytes:
        """Return an indirect table of (gpa, length, flags), chained in their order. Source: virtio 1.3, 2.7.5.3."""
        return _chained(parts, range(len(parts)))

    def _write(self, parts: Sequence[Part]) -> tuple[int, list[int]]:
        slots = [self._slots.popleft() for _ in parts]
        raw = _chained(parts, slots)
        for place, slot in enumerate(slots):
            self.write_descriptor(slot, raw[DESC_BYTES * place : DESC_BYTES * (place + 1)])
        self.offer(slots[0])
        return slots[0], slots

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
            used = self._account(head, length)
            self.last_used = (self.last_used + len(used)) & MASK
            found.extend(used)
        if len(found) > count:
            raise DeviceError(f"used element for head {head} lies beyond the used index")
        self.reaped += len(found)
        return found

    def _free(self, chain: InFlight) -> None:
        self._slots.extend(chain.slots)

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

    def want_interrupt_at(self, chains: int, width: int = 1) -> None:
        """Ask for an interrupt when `chains` more than one are used. Only with EVENT_IDX."""
        self.set_used_event(self.last_used + chains)

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


def _chained(parts: Sequence[Part], slots: Sequence[int]) -> bytes:
    last = len(parts) - 1
    return b"".join(
        pack_descriptor(addr, length, flags | (NEXT if place < last else 0), slots[place + 1] if place < last else 0)
        for place, (addr, length, flags) in enumerate(parts)
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
