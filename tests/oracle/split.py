"""The device side of a split virtqueue in plain Python: what the compiled ring must agree with.

Written from the virtio 1.3 specification (2.7 "Split Virtqueues") and our list of refusals, to be read beside the
specification: no caching, no batching, one byte string read at a time, no ordering (one thread drives both sides). It
has the Python interface of `vhostmp.workers._vring.Vring`, refuses for the same reasons and leaves the same bytes in
the ring.

What the specification leaves open, and what we do:
- A zero-length descriptor is tolerated: it counts as a link of the chain and its address is not looked at. A readable
  one after a writable buffer is out of order all the same; a writable one does not begin the writable part.
- A buffer may run over the border of two regions that touch in guest-physical space; it comes back in two segments. So
  may an indirect table, between two of its entries.
- A chain may be longer than the queue by way of an indirect table, up to SEGMENTS_MAX segments.
- The WRITE flag of a descriptor that refers to an indirect table is ignored, as 2.7.5.3.2 demands.
- The available index is looked at when fewer chains than wanted have been seen before.
- A descriptor that breaks several rules is refused for the first of: indirect, indirect_len, order, direction, length,
  address, segments, loop, next.
- A broken ring stays broken: each later `pop` raises again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, Protocol

import attrs

from vhostmp.errors import LocalError, QueueBroken

READABLE: Final = 1
WRITABLE: Final = 2
EITHER: Final = 3
F_INDIRECT_DESC: Final = 28
F_EVENT_IDX: Final = 29
NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4
NO_INTERRUPT: Final = 1
NO_NOTIFY: Final = 1
DESC_BYTES: Final = 16
QUEUE_MAX: Final = 32768
SEGMENTS_MAX: Final = 1024
LENGTH_MAX: Final = (1 << 32) - 1
ADDRESS_END: Final = 1 << 64
#: A limit of ours, not of the spec: descriptors of length 0 cost time and hold nothing.
LINKS_MAX = 2048
TABLE_MAX: Final = 65536  # entries of an indirect table: next is 16 bits
MASK: Final = 0xFFFF


class Memory(Protocol):
    """Guest memory as the oracle needs it."""

    def read(self, gpa: int, size: int, /) -> bytes:
        """Copy bytes out of one region."""
        ...

    def write(self, gpa: int, data: bytes, /) -> None:
        """Copy bytes into one region."""
        ...

    def run(self, gpa: int, /) -> int:
        """Bytes from `gpa` to its region's end, 0 outside."""
        ...


def read_descriptor(mem: Memory, gpa: int) -> bytes:
    """Copy a descriptor, which may begin in one region and end in the next. Refused where there is no memory."""
    if any(mem.run(gpa + at) == 0 for at in range(DESC_BYTES)):
        raise Refused("address", f"descriptor at {gpa:#x} is in no memory region")
    return b"".join(mem.read(gpa + at, 1) for at in range(DESC_BYTES))


@attrs.frozen
class Chain:
    """A chain that was taken: its head, what the device reads and what it writes, as (gpa, length in bytes)."""

    head: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]


class Refused(Exception):
    """A rule was broken; `reason` is one of layout.BROKEN_REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        """Say which rule, and how."""
        super().__init__(message)
        self.reason = reason


@attrs.frozen
class Descriptor:
    """One struct virtq_desc, copied. Source: virtio 1.3, 2.7.5."""

    addr: int
    length: int
    flags: int
    following: int


def table_entries(descriptor: Descriptor) -> int:
    """Return how many entries the indirect table has that `descriptor` refers to. Source: virtio 1.3, 2.7.5.3."""
    entries, rest = divmod(descriptor.length, DESC_BYTES)
    if entries == 0 or rest or entries > TABLE_MAX:
        raise Refused("indirect_len", f"indirect table of {descriptor.length} bytes")
    if descriptor.addr + descriptor.length > ADDRESS_END:
        raise Refused("address", f"indirect table at {descriptor.addr:#x} wraps")
    return entries


def add_buffer(mem: Memory, chain: Chain, descriptor: Descriptor, direction: int) -> None:
    """Append a descriptor's bytes to the chain, cut at the borders of regions. Source: virtio 1.3, 2.7.4.2."""
    gpa, left = descriptor.addr, descriptor.length
    if chain.writable and not descriptor.flags & WRITE:
        raise Refused("order", "device-readable descriptor after a device-writable one")
    if not direction & (WRITABLE if descriptor.flags & WRITE else READABLE):
        raise Refused("direction", "device-writable descriptor in a transmit queue, or readable in a receive queue")
    total = left + sum(length for _, length in chain.readable + chain.writable)
    if total > LENGTH_MAX:
        raise Refused("length", f"chain of {total} bytes")
    if left and gpa + left > ADDRESS_END:
        raise Refused("address", f"buffer at {gpa:#x} wraps")
    while left:
        if len(chain.readable) + len(chain.writable) == SEGMENTS_MAX:
            raise Refused("segments", f"chain of more than {SEGMENTS_MAX} segments")
        run = min(mem.run(gpa), left)
        if run == 0:
            raise Refused("address", f"buffer at {gpa:#x} is in no memory region")
        (chain.writable if descriptor.flags & WRITE else chain.readable).append((gpa, run))
        gpa, left = gpa + run, left - run


class Vring:
    """One split virtqueue, device side."""

    def __init__(
        self,
        mem: Memory,
        num: int,
        desc_gpa: int,
        avail_gpa: int,
        used_gpa: int,
        *,
        features: int = 0,
        last_avail_idx: int = 0,
    ) -> None:
        """Attach to a ring in guest memory; `features` are the negotiated virtio bits.

        Raises LocalError for a size that is no power of two up to 32768, and for a part outside one memory region.
        """
        if not 0 < num <= QUEUE_MAX or num & (num - 1):
            raise LocalError(f"queue size {num} is no power of two up to {QUEUE_MAX}")
        for name, gpa, size in (
            ("descriptor table", desc_gpa, DESC_BYTES * num),
            ("available ring", avail_gpa, 6 + 2 * num),
            ("used ring", used_gpa, 6 + 8 * num),
        ):
            if mem.run(gpa) < size:
                raise LocalError(f"{name} at {gpa:#x} is not in one memory region")
        self._mem: Final = mem
        self._num: Final = num
        self._desc: Final = desc_gpa
        self._avail: Final = avail_gpa
        self._used: Final = used_gpa
        self._indirect_desc: Final = bool(features >> F_INDIRECT_DESC & 1)
        self._event_idx: Final = bool(features >> F_EVENT_IDX & 1)
        self.last_avail_idx = last_avail_idx
        self.used_idx: int = self._u16(used_gpa + 2)  # next used element to write; never read again
        self.broken: str | None = None
        self._seen = last_avail_idx  # the available index when last looked at
        self._signalled: int | None = None  # used index at the last signal decision; None: signal in any case

    def _u16(self, gpa: int) -> int:
        return int.from_bytes(self._mem.read(gpa, 2), "little")

    def _put_u16(self, gpa: int, value: int) -> None:
        self._mem.write(gpa, value.to_bytes(2, "little"))

    def _descriptor(self, table: int, index: int) -> Descriptor:
        """Copy descriptor `index` of the table at guest-physical `table`."""
        gpa = table + DESC_BYTES * index
        return Descriptor(*struct.unpack("<QIHH", read_descriptor(self._mem, gpa)))

    def pop(self) -> Chain | None:
        """Take the next available chain; None when there is none. Source: virtio 1.3, 2.7.6, 2.7.14.

        Raises QueueBroken when the driver broke a rule; no index has moved and `broken` says why.
        """
        chains = self.fetch(1)
        return chains[0] if chains else None

    def fetch(self, most: int, direction: int = EITHER) -> list[Chain]:
        """Take up to `most` chains that have only readable or only writable buffers, or either.

        Ends before a bad chain, and raises QueueBroken when that is the first.
        """
        if self.broken:
            raise QueueBroken(f"queue is broken: {self.broken}")
        chains: list[Chain] = []
        try:
            for _ in range(self._available(most)):
                chains.append(self._take(direction))
        except Refused as refused:
            if not chains:
                self.broken = refused.reason
                raise QueueBroken(f"{refused.reason}: {refused}") from refused
        return chains

    def unfetch(self, count: int) -> None:
        """Put the last `count` chains back, to be taken again."""
        self.last_avail_idx = (self.last_avail_idx - count) & MASK

    def _available(self, most: int) -> int:
        """Return how many chains there are to take, up to `most`."""
        if (self._seen - self.last_avail_idx) & MASK <= most:
            self._seen = self._u16(self._avail + 2)
        ahead = (self._seen - self.last_avail_idx) & MASK
        if ahead > self._num:
            raise Refused("avail_idx", f"available index is {ahead} ahead, the queue has {self._num} entries")
        return min(ahead, most)

    def _take(self, direction: int) -> Chain:
        head = self._u16(self._avail + 4 + 2 * (self.last_avail_idx % self._num))
        if head >= self._num:
            raise Refused("head", f"head {head}, the queue has {self._num} entries")
        chain = Chain(head, [], [])
        for descriptor in self._walk(head):
            add_buffer(self._mem, chain, descriptor, direction)
        self.last_avail_idx = (self.last_avail_idx + 1) & MASK
        return chain

    def _walk(self, head: int) -> Iterator[Descriptor]:
        """Walk a chain, through at most one indirect table, and yield its buffers. Source: virtio 1.3, 2.7.5."""
        table, limit, index, links, inside = self._desc, self._num, head, 0, False
        while True:
            descriptor = self._descriptor(table, index)
            if descriptor.flags & INDIRECT:
                if inside or descriptor.flags & NEXT or not self._indirect_desc:
                    raise Refused("indirect", "indirect table not negotiated, inside another, or with a next one")
                table, limit, index, links, inside = descriptor.addr, table_entries(descriptor), 0, 0, True
                continue
            yield descriptor
            if not descriptor.flags & NEXT:
                return
            links += 1
            if links == limit:
                raise Refused("loop", f"chain of more than {limit} descriptors")
            if links == LINKS_MAX:
                raise Refused("segments", f"chain of more than {LINKS_MAX} descriptors, those of length 0 included")
            index = descriptor.following
            if index >= limit:
                raise Refused("next", f"next {index}, the table has {limit} entries")

    def push(self, head: int, length: int) -> None:
        """Write a used element the driver does not see yet: `length` bytes were written into the chain `head`."""
        self._mem.write(self._used + 4 + 8 * (self.used_idx % self._num), struct.pack("<II", head, length))
        self.used_idx = (self.used_idx + 1) & MASK

    def publish(self) -> bool:
        """Show the driver the used elements; return whether it wants an interrupt.

        With event index the first answer is always yes: nobody knows what the driver has been told.
        Source: virtio 1.3, 2.7.8, 2.7.8.2, 2.7.7.2 and 2.7.10.
        """
        new = self.used_idx
        self._put_u16(self._used + 2, new)
        if not self._event_idx:
            return not self._u16(self._avail) & NO_INTERRUPT
        old, self._signalled = self._signalled, new
        if old is None:
            return True
        used_event = self._u16(self._avail + 4 + 2 * self._num)
        return (new - used_event - 1) & MASK < (new - old) & MASK

    def enable_notify(self) -> bool:
        """Ask for a notification at the next available entry; return whether there is one already.

        Source: virtio 1.3, 2.7.8.2 and 2.7.10.
        """
        self._seen = self.last_avail_idx
        if self._event_idx:
            self._put_u16(self._used + 4 + 8 * self._num, self._seen)
        else:
            self._put_u16(self._used, 0)
        return self._u16(self._avail + 2) != self._seen

    def disable_notify(self) -> None:
        """Ask for none, as far as the driver can be told. With event index there is nothing to write."""
        if not self._event_idx:
            self._put_u16(self._used, NO_NOTIFY)
