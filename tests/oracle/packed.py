"""The device side of a packed virtqueue in plain Python: what the compiled ring must agree with.

Written from the virtio 1.3 specification (2.8 "Packed Virtqueues") and our list of refusals. It has the interface of
`vhostmp.workers._vring.Vring` in Python, refuses for the same reasons and leaves the same bytes in the ring.

What the specification leaves open, and what we do:
- Zero-length descriptors, borders of regions and chains longer than the queue by way of a table: as in split rings.
- A chain that goes on where the driver has no descriptors any more (all others are ours) is refused as "loop".
- AVAIL and USED are looked at in the first descriptor of a chain only; of an indirect table's entries WRITE alone is,
  and not even that in a queue whose chains are read only.
- A table is a whole chain: a chain that goes on after one, or comes to one, is refused as "indirect".
- While all descriptors are ours, nothing is looked at.
- Used descriptors are written when they are published, the address in them is left as it was.
- An event offset outside the ring, and the reserved flags, ask for an interrupt.
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

from tests.oracle.split import (
    DESC_BYTES,
    EITHER,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    INDIRECT,
    LINKS_MAX,
    NEXT,
    QUEUE_MAX,
    READABLE,
    WRITE,
    Chain,
    Descriptor,
    Memory,
    Refused,
    add_buffer,
    read_descriptor,
    table_entries,
)
from vhostmp.errors import LocalError, QueueBroken

F_NOTIFY_ON_EMPTY: Final = 24
AVAIL: Final = 1 << 7
USED: Final = 1 << 15
ENABLE: Final = 0
DISABLE: Final = 1
DESC: Final = 2
OFFSET: Final = 0x7FFF


class PackedVring:
    """One packed virtqueue, device side."""

    def __init__(
        self,
        mem: Memory,
        num: int,
        desc_gpa: int,
        driver_gpa: int,
        device_gpa: int,
        *,
        features: int = 0,
        last_avail_idx: int = 0x8000,
    ) -> None:
        """Attach to a ring in guest memory that stands at a position (offset, and wrap counter in bit 15)."""
        if not 0 < num <= QUEUE_MAX:
            raise LocalError(f"queue size {num} is not from 1 to {QUEUE_MAX}")
        self._mem: Final = mem
        self._num: Final = num
        self._desc: Final = desc_gpa
        self._driver: Final = driver_gpa
        self._device: Final = device_gpa
        self._indirect_desc: Final = bool(features >> F_INDIRECT_DESC & 1)
        self._event_idx: Final = bool(features >> F_EVENT_IDX & 1)
        self._on_empty: Final = bool(features >> F_NOTIFY_ON_EMPTY & 1)
        # Descriptors counted from a start of round 0, for good: numbers that only grow, so that there is no wrap here.
        self._taken = self._start(last_avail_idx)
        self._given = self._taken
        self._published = self._taken
        self._seen = self._taken
        self._signalled: int | None = None
        self._staged: list[tuple[int, int, int]] = []  # descriptors counted, id, length
        self._sizes: dict[int, list[int]] = {}  # by id, of the chains that we have
        self._last: list[tuple[int, int]] = []  # ids and sizes of the chains fetched last
        self.broken: str | None = None

    def _start(self, position: int) -> int:
        return (position & OFFSET) + (0 if position >> 15 else self._num)

    def _position(self, count: int) -> int:
        round_, offset = divmod(count, self._num)
        return offset | (0 if round_ % 2 else 1 << 15)

    @property
    def last_avail_idx(self) -> int:
        """Position of the next descriptor to take."""
        return self._position(self._taken)

    @property
    def used_idx(self) -> int:
        """Position of the next used descriptor, those staged counted."""
        return self._position(self._given)

    def _wrap(self, count: int) -> bool:
        return count // self._num % 2 == 0

    def _is_available(self, count: int) -> bool:
        """Whether a chain begins at this descriptor. Source: virtio 1.3, 2.8.1."""
        if count - self._published >= self._num:
            return False
        flags = self._at(self._desc, count % self._num).flags
        wrap = self._wrap(count)
        return bool(flags & AVAIL) == wrap and bool(flags & USED) != wrap

    def _at(self, table: int, index: int) -> Descriptor:
        gpa = table + DESC_BYTES * index
        addr, length, buffer_id, flags = struct.unpack("<QIHH", read_descriptor(self._mem, gpa))
        return Descriptor(addr, length, flags, buffer_id)

    def pop(self) -> Chain | None:
        """Take the next available chain; None when there is none. QueueBroken when the driver broke a rule."""
        chains = self.fetch(1)
        return chains[0] if chains else None

    def fetch(self, most: int, direction: int = EITHER) -> list[Chain]:
        """Take up to `most` chains. Ends before a bad one, and raises QueueBroken when that is the first."""
        if self.broken:
            raise QueueBroken(f"queue is broken: {self.broken}")
        chains: list[Chain] = []
        self._last = []
        try:
            while len(chains) < most and self._is_available(self._taken):
                chains.append(self._take(direction))
        except Refused as refused:
            if not chains:
                self.broken = refused.reason
                raise QueueBroken(f"{refused.reason}: {refused}") from refused
        self._seen = max(self._seen, self._taken)
        return chains

    def _take(self, direction: int) -> Chain:
        """Take one chain. Source: virtio 1.3, 2.8.6 and 2.8.7."""
        chain = Chain(0, [], [])
        size = 0
        while True:
            descriptor = self._at(self._desc, (self._taken + size) % self._num)
            size += 1
            if descriptor.flags & INDIRECT:
                if not self._indirect_desc or descriptor.flags & NEXT or size > 1:
                    raise Refused("indirect", "table not negotiated, or part of a longer chain")
                self._add_table(chain, descriptor, direction)
                break
            add_buffer(self._mem, chain, descriptor, direction)
            if not descriptor.flags & NEXT:
                break
            if self._taken + size - self._published == self._num:
                raise Refused("loop", f"chain goes on after {size} descriptors, the driver has no more")
            if size > LINKS_MAX:
                raise Refused("segments", f"chain of more than {LINKS_MAX} descriptors")
        self._taken += size
        self._sizes.setdefault(descriptor.following, []).append(size)
        self._last.append((descriptor.following, size))
        return Chain(descriptor.following, chain.readable, chain.writable)

    def _add_table(self, chain: Chain, reference: Descriptor, direction: int) -> None:
        for index in range(table_entries(reference)):
            if index == LINKS_MAX:
                raise Refused("segments", f"table of more than {LINKS_MAX} entries")
            entry = self._at(reference.addr, index)
            add_buffer(self._mem, chain, attrs.evolve(entry, flags=0) if direction == READABLE else entry, direction)

    def unfetch(self, count: int) -> None:
        """Put the last `count` chains of the last fetch back."""
        for _ in range(count):
            head, size = self._last.pop()
            self._taken -= size
            self._sizes[head].pop()  # the driver may have changed it before it is taken again

    def push(self, head: int, length: int) -> None:
        """Stage a used descriptor for a chain that we have. LookupError when we have none with that id."""
        self._staged.append((self._given, head, length))
        self._given += self._sizes[head].pop(0)

    def publish(self) -> bool:
        """Write the used descriptors; return whether the driver wants an interrupt. Source: virtio 1.3, 2.8.10."""
        for count, head, length in self._staged:
            flags = (AVAIL | USED if self._wrap(count) else 0) | (WRITE if length else 0)
            self._mem.write(self._desc + DESC_BYTES * (count % self._num) + 8, struct.pack("<IHH", length, head, flags))
        self._staged = []
        self._published = self._given
        return self._wants() or (self._on_empty and self._taken == self._seen)

    def _wants(self) -> bool:
        old, self._signalled = self._signalled, self._given
        event, flags = struct.unpack("<HH", self._mem.read(self._driver, 4))
        if flags & 3 == DISABLE:
            return False
        if flags & 3 != DESC or not self._event_idx or old is None or event & OFFSET >= self._num:
            return True
        return any(self._position(count) == event for count in range(old, self._given))

    def enable_notify(self) -> bool:
        """Ask for a notification at the next descriptor made available; return whether there is one already."""
        self._seen = self._taken
        event = (self._position(self._seen), DESC) if self._event_idx else (0, ENABLE)
        self._mem.write(self._device, struct.pack("<HH", *event))
        return self._is_available(self._seen)

    def disable_notify(self) -> None:
        """Ask for none."""
        self._mem.write(self._device, struct.pack("<HH", 0, DISABLE))
