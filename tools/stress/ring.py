"""What the driver's sides of a split and of a packed virtqueue have in common: the books, and the referee.

Written from the virtio 1.3 specification and not from our device, so that the two can be wrong in different ways only.
When a driver reaps what the device has used it fails, with DeviceError, when the device

- returns a chain that is not in flight (returned twice, or never made available),
- reports more bytes written than the chain's writable part holds,
- returns chains out of order although VIRTIO_F_IN_ORDER was negotiated.

Rules:
- Addresses are guest-physical; the buffer given is the memory from `gpa` on.
- Nothing here moves by itself: `add` makes a chain, `publish` makes all of them available, `reap` takes what is used.
- Two-byte accesses go through a memoryview of unsigned shorts, which CPython loads and stores as one access. The one
  store-load fence a driver needs is `fence`. Python has no fence: taking and releasing a lock is an atomic
  read-modify-write, which on x86 orders everything.
"""

from __future__ import annotations

import random
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence, Sized
from typing import Final, Literal

import attrs

NEXT: Final = 1  # VIRTQ_DESC_F_NEXT, virtio 1.3, 2.7.5
WRITE: Final = 2  # VIRTQ_DESC_F_WRITE
INDIRECT: Final = 4  # VIRTQ_DESC_F_INDIRECT
F_INDIRECT_DESC: Final = 1 << 28  # VIRTIO_F_INDIRECT_DESC, 6
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
F_RING_PACKED: Final = 1 << 34
F_IN_ORDER: Final = 1 << 35
DESC_BYTES: Final = 16  # of a descriptor, split or packed
_LOCK: Final = threading.Lock()

Segment = tuple[int, int]
"""(guest-physical address, length in bytes)"""

Part = tuple[int, int, int]
"""(guest-physical address, length in bytes, descriptor flags)"""


class DeviceError(AssertionError):
    """The device broke the rules of the ring."""


def fence() -> None:
    """Order stores before it before loads after it (see the file's rules)."""
    with _LOCK:
        pass


def align(value: int, to: int) -> int:
    """Round up."""
    return (value + to - 1) // to * to


@attrs.frozen
class RingLayout:
    """Where the three parts of a ring of `num` entries stand, in bytes from the start of the memory.

    Of a packed ring `avail` is the driver's event suppression and `used` the device's.
    """

    num: int
    desc: int
    avail: int
    used: int
    end: int

    @classmethod
    def at(cls, start: int, num: int) -> RingLayout:
        """Lay a split ring out from `start`, each part on the alignment of the table in virtio 1.3, 2.7."""
        desc = align(start, 16)
        avail = align(desc + DESC_BYTES * num, 2)
        used = align(avail + 6 + 2 * num, 4)  # flags, idx, ring, used_event
        return cls(num, desc, avail, used, used + 6 + 8 * num)  # flags, idx, ring of (id, len), avail_event


@attrs.define
class InFlight:
    """A chain that the device has: its descriptors and what it may write. `head` is a packed ring's buffer id."""

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


class RingDriver(ABC):
    """The driver side of one virtqueue of either format."""

    def __init__(self, buf: memoryview, layout: RingLayout, gpa: int, features: int) -> None:
        """Empty the ring's memory. `buf` starts at `gpa`."""
        self.layout: Final = layout
        self.num: Final = layout.num
        self.gpa: Final = gpa
        self.features: Final = features
        self.in_flight: dict[int, InFlight] = {}
        self.order: deque[int] = deque()
        self.added = 0
        self.reaped = 0
        self._views: list[memoryview] = []
        self.buf = buf
        for start, size in self._spans():
            buf[start : start + size] = bytes(size)
        self._look()

    # --- memory ---

    @abstractmethod
    def _spans(self) -> list[tuple[int, int]]:
        """Where the three parts are in `buf`, and how many bytes each has."""

    @abstractmethod
    def _look(self) -> None:
        """Make the views of `buf` that are used."""

    def _view(self, start: int, end: int, form: Literal["H", "I"]) -> memoryview:
        view = self.buf[start:end].cast(form)
        self._views.append(view)
        return view

    def rebase(self, buf: memoryview) -> None:
        """Go on in other memory, which holds a copy of all of it."""
        self.close()
        self.buf = buf
        self._look()

    def close(self) -> None:
        """Let go of the memory."""
        while self._views:
            self._views.pop().release()

    @property
    def desc_gpa(self) -> int:
        """Guest-physical address of the descriptors."""
        return self.gpa + self.layout.desc

    @property
    def avail_gpa(self) -> int:
        """Guest-physical address of the available ring, or of the driver's event suppression."""
        return self.gpa + self.layout.avail

    @property
    def used_gpa(self) -> int:
        """Guest-physical address of the used ring, or of the device's event suppression."""
        return self.gpa + self.layout.used

    @property
    @abstractmethod
    def device_parts(self) -> list[Segment]:
        """What of the ring the device may write."""

    @property
    def event_idx(self) -> bool:
        """Whether VIRTIO_F_EVENT_IDX was negotiated."""
        return bool(self.features & F_EVENT_IDX)

    def write_descriptor(self, index: int, raw: bytes) -> None:
        """Write descriptor `index` as it stands: hostile ones too."""
        start = self.layout.desc + DESC_BYTES * index
        self.buf[start : start + DESC_BYTES] = raw

    def read(self, segments: Iterable[Segment], limit: int | None = None) -> bytes:
        """Copy bytes out of a list of segments, at most `limit`."""
        data = b"".join(bytes(self.buf[addr - self.gpa : addr - self.gpa + length]) for addr, length in segments)
        return data if limit is None else data[:limit]

    # --- chains that go out ---

    def add(
        self, readable: Sequence[Segment] = (), writable: Sequence[Segment] = (), *, table: int | None = None
    ) -> int:
        """Write a chain, not yet visible to the device. Returns its head, or its id.

        With `table`, a guest-physical address of 16 bytes a segment, the chain is an indirect one. IndexError when too
        few descriptors are free. Source: virtio 1.3, 2.7.13.1 and 2.8.21.1.
        """
        parts = [(addr, length, 0) for addr, length in readable] + [(addr, length, WRITE) for addr, length in writable]
        if not parts:
            raise ValueError("a chain has at least one segment")
        if table is not None:
            raw = self.pack_table(parts)
            self.buf[table - self.gpa : table - self.gpa + len(raw)] = raw
            return self.add_table(table, readable, writable)
        return self._add(parts, readable, writable)

    def add_table(
        self, table: int, readable: Sequence[Segment] = (), writable: Sequence[Segment] = (), *, flags: int = 0
    ) -> int:
        """Write a chain that consists of an indirect table, which stands there already. Returns its head, or its id.

        `flags`: more flags of the descriptor that points to the table.
        """
        part = (table, DESC_BYTES * (len(readable) + len(writable)), INDIRECT | flags)
        return self._add([part], readable, writable)

    def add_parts(self, parts: Sequence[Part]) -> int:
        """Write a chain with flags as they stand, hostile ones too; NEXT is added to all but the last.

        Returns its head, or its id. What has WRITE and no INDIRECT counts as room that the device may write to.
        """
        return self._add(
            parts,
            [(addr, length) for addr, length, flags in parts if not flags & WRITE],
            [(addr, length) for addr, length, flags in parts if flags & WRITE and not flags & INDIRECT],
        )

    @staticmethod
    @abstractmethod
    def pack_table(parts: Sequence[Part]) -> bytes:
        """Return an indirect table. Source: virtio 1.3, 2.7.5.3 and 2.8.7."""

    def _add(self, parts: Sequence[Part], readable: Sequence[Segment], writable: Sequence[Segment]) -> int:
        if len(parts) > len(self.free):
            raise IndexError(f"{len(parts)} descriptors wanted, {len(self.free)} free")
        head, slots = self._write(parts)
        self.in_flight[head] = InFlight(head, slots, list(readable), list(writable))
        self.order.append(head)
        self.added += 1
        return head

    @property
    @abstractmethod
    def free(self) -> Sized:
        """As many numbers as there are free descriptors."""

    @abstractmethod
    def shuffle(self, rng: random.Random) -> None:
        """Have free descriptors, or ids, be taken in another order."""

    @abstractmethod
    def _write(self, parts: Sequence[Part]) -> tuple[int, list[int]]:
        """Write a chain that there is room for. Returns its head, or its id, and a number for each descriptor."""

    @abstractmethod
    def publish(self) -> bool:
        """Make everything added visible. Returns whether the device wants a notification (a kick)."""

    # --- chains that come back ---

    @abstractmethod
    def pending(self) -> int:
        """How many used chains are known to wait to be reaped."""

    @abstractmethod
    def reap(self, limit: int | None = None) -> list[Used]:
        """Take what the device has used, oldest first, and check it. Raises DeviceError."""

    def _account(self, head: int, length: int) -> Sequence[Used]:
        """Take a used chain off the books: one, or under IN_ORDER all up to it. Source: virtio 1.3, 2.7.9 and 2.8.8."""
        if head not in self.in_flight:
            raise DeviceError(f"chain {head} was returned and is not in flight")
        skipped: list[Used] = []
        while self.features & F_IN_ORDER and self.order[0] != head:
            skipped.append(Used(self._take_back(self.order[0]), None))
        chain = self._take_back(head)
        if length > chain.writable_bytes:
            raise DeviceError(f"chain {head}: {length} bytes written, there is room for {chain.writable_bytes}")
        return [*skipped, Used(chain, length)]

    def _take_back(self, head: int) -> InFlight:
        chain = self.in_flight.pop(head)
        if self.order[0] == head:
            self.order.popleft()
        else:
            self.order.remove(head)
        self._free(chain)
        return chain

    @abstractmethod
    def _free(self, chain: InFlight) -> None:
        """Have a chain's descriptors free."""

    @abstractmethod
    def want_interrupts(self) -> bool:
        """Ask for an interrupt at the next used chain. Returns whether there is one already (then reap again)."""

    @abstractmethod
    def refuse_interrupts(self) -> None:
        """Ask for none, as far as the device can be told."""

    def check_idle(self) -> None:
        """Raise DeviceError unless every chain ever added has come back, once."""
        if self.in_flight or self.added != self.reaped or len(self.free) != self.num:
            raise DeviceError(
                f"{self.added} chains went out, {self.reaped} came back, missing: {sorted(self.in_flight)}"
            )
