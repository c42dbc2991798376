"""The small back-end's network device: a pair of split or packed rings, what goes out comes in again.

A flaw is planted by name; FLAWS says what each does. Without one the device is right.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Final

import attrs

from tests.flawed.memory import GuestMemory, Refused
from tests.oracle.packed import PackedVring
from tests.oracle.split import NEXT, READABLE, WRITABLE, Chain, Descriptor, Vring
from vhostmp.errors import LocalError, QueueBroken

FLAWS: Final = {
    "unbounded_chain": "a chain is followed for ever",
    "double_fetch": "a descriptor is looked at again after it was checked",
    "no_barrier": "the old memory is used for a while after SET_MEM_TABLE was answered",
    "lost_first_kick": "a kick from before the ring was started is forgotten",
    "num_buffers": "num_buffers is 1, whatever a frame takes",
    "leaked_fd": "descriptors that come with a message that has none stay open",
    "unlogged_used": "the used ring is not logged",
    "used_length": "one byte more is reported than was written, now and then",
    "base": "GET_VRING_BASE answers one too little",
    "late_write": "a ring that was stopped goes on",
    "no_interrupt": "with event index, an interrupt is forgotten where indices wrap",
    "ring_size": "SET_VRING_NUM takes any number",
    "short_region": "a buffer's start is checked, its end is not",
    "wild_index": "a ring's number is not checked",
}
#: Between two looks, seconds: long enough for somebody else's turn on a machine that is busy.
PAUSE_SECONDS: Final = 0.0005
F_MRG_RXBUF: Final = 15
F_EVENT_IDX: Final = 29
F_INDIRECT_DESC: Final = 28
F_PROTOCOL: Final = 30
F_LOG_ALL: Final = 26
F_VERSION_1: Final = 32
F_RING_PACKED: Final = 34
FEATURES: Final = sum(
    1 << bit for bit in (F_MRG_RXBUF, F_LOG_ALL, F_INDIRECT_DESC, F_EVENT_IDX, F_PROTOCOL, F_VERSION_1, F_RING_PACKED)
)
HEADER: Final = 12
LEGACY_HEADER: Final = 10
SMALLEST: Final = 14
LARGEST: Final = 65550
BURST: Final = 64
RARE: Final = 5
LOG_RING: Final = 1  # VHOST_VRING_F_LOG
RINGS: Final = 2


@attrs.define
class Ring:
    """What the front-end said of a ring."""

    num: int = 0
    addresses: tuple[int, int, int, int, int] | None = None  # flags, desc, used, avail, log: the front-end's
    base: int = 0
    kick: int = -1
    call: int = -1
    err: int = -1
    enabled: bool = False
    started: bool = False
    late: bool = False
    vring: Vring | PackedVring | None = None


class Device:
    """Two rings: 0 receives, 1 transmits."""

    def __init__(self, flaw: str = "") -> None:
        """`flaw`: one of FLAWS, or none."""
        self.flaw: Final = flaw
        self.memory = GuestMemory(short=flaw == "short_region")
        self.features = 0
        self.rings = [Ring() for _ in range(RINGS)]

    def has(self, bit: int) -> bool:
        """Whether a feature was taken."""
        return bool(self.features >> bit & 1)

    def attach(self, index: int) -> None:
        """Set a started ring up from what was said of it, if it is enough. Refused when it is wrong."""
        ring = self.rings[index]
        if not (ring.started and ring.num and ring.addresses) or not self.memory.regions:
            return
        if ring.vring and not ring.late:
            return
        ring.late = False
        _, desc, used, avail, _ = ring.addresses
        at = [self.memory.gpa_of(uva) for uva in (desc, avail, used)]
        try:
            if self.has(F_RING_PACKED):
                ring.vring = PackedVring(
                    self.memory, ring.num, *at, features=self.features, last_avail_idx=ring.base & 0xFFFF
                )
            else:
                kind = EndlessVring if self.flaw == "unbounded_chain" else Vring
                ring.vring = kind(self.memory, ring.num, *at, features=self.features, last_avail_idx=ring.base)
        except LocalError as error:
            raise Refused(str(error)) from error

    def stop(self, index: int) -> int:
        """Stop a ring and return its base."""
        ring = self.rings[index]
        if ring.vring is not None:
            place = ring.vring.last_avail_idx
            ring.base = place | place << 16 if self.has(F_RING_PACKED) else place
        ring.started = False
        ring.late = self.flaw == "late_write"
        if not ring.late:
            ring.vring = None
        for fd in (ring.kick, ring.call):
            if fd >= 0:
                os.close(fd)
        ring.kick = ring.call = -1
        return max(ring.base - (self.flaw == "base"), 0)

    def detach(self) -> None:
        """Let the rings go that stand in memory which goes away; they stand where they stood."""
        for ring in self.rings:
            if ring.vring is not None:
                place = ring.vring.last_avail_idx
                ring.base = place | place << 16 if self.has(F_RING_PACKED) else place
                ring.vring = None

    def work(self) -> bool:
        """Send what there is to send. Returns whether there may be more."""
        rx, tx = self.rings
        if tx.vring is None or not tx.enabled:
            return False
        try:
            chains = tx.vring.fetch(1, READABLE)
        except QueueBroken:
            return self._break(tx)
        if not chains:
            return self._sleep(tx)
        frame = self._gather(chains[0])
        header = HEADER if self.has(F_VERSION_1) or self.has(F_MRG_RXBUF) else LEGACY_HEADER
        fits = SMALLEST <= len(frame) - header <= LARGEST
        if fits and rx.vring is not None and rx.enabled and not self._deliver(rx, frame[header:], header):
            tx.vring.unfetch(1)
            self._sleep(rx)
            return False
        self._use(tx, [(chains[0].head, 0)])
        return True

    def _gather(self, chain: Chain) -> bytes:
        data = b""
        segments = chain.readable
        if self.flaw == "double_fetch" and len(segments) == 1:
            segments = [self._look_again(chain.head)]
        for gpa, length in segments:
            data += self.memory.read(gpa, min(length, LARGEST + 64))
            if len(data) > LARGEST + HEADER:
                break
        return data

    def _look_again(self, head: int) -> tuple[int, int]:
        assert self.rings[1].addresses
        time.sleep(PAUSE_SECONDS)
        table = self.memory.gpa_of(self.rings[1].addresses[1])
        gpa, length = struct.unpack("<QI", self.memory.read(table + 16 * head, 12))
        return gpa, length

    def _deliver(self, rx: Ring, frame: bytes, header: int) -> bool:
        """Write a frame into receive buffers. Returns False when there are too few."""
        assert rx.vring is not None
        data = bytearray(header) + frame
        mergeable = self.has(F_MRG_RXBUF)
        chains: list[Chain] = []
        room = 0
        try:
            chains = rx.vring.fetch(BURST if mergeable else 1, WRITABLE)
        except QueueBroken:
            self._break(rx)
            return True
        needed = 0
        while room < len(data) and needed < len(chains):
            room += sum(length for _, length in chains[needed].writable)
            needed += 1
        rx.vring.unfetch(len(chains) - needed)
        if room < len(data):
            rx.vring.unfetch(needed)
            # Without mergeable buffers the frame can never fit; with them more may be posted yet.
            return bool(chains) and (not mergeable or len(chains) == BURST)
        if header == HEADER:
            count = 1 if self.flaw == "num_buffers" else needed
            data[10:12] = count.to_bytes(2, "little")
        used: list[tuple[int, int]] = []
        at = 0
        for chain in chains[:needed]:
            written = 0
            for gpa, length in chain.writable:
                part = bytes(data[at : at + length])
                if part:
                    self.memory.write(gpa, part)
                at += len(part)
                written += len(part)
            used.append((chain.head, written + (self.flaw == "used_length" and written % 11 == RARE)))
        self._use(rx, used)
        return True

    @contextlib.contextmanager
    def _ring_writes(self, ring: Ring) -> Generator[None, None, None]:
        """What is written to a ring is logged where the front-end wants that, and not as guest memory."""
        assert ring.addresses
        self.memory.logging, logging = False, self.memory.logging
        yield
        self.memory.logging = logging
        if ring.addresses[0] & LOG_RING and self.flaw != "unlogged_used":
            self.memory.mark(ring.addresses[4], 6 + 8 * ring.num)

    def _use(self, ring: Ring, used: Sequence[tuple[int, int]]) -> None:
        assert ring.vring is not None
        before = ring.vring.used_idx
        with self._ring_writes(ring):
            self._publish(ring, used, before)

    def _publish(self, ring: Ring, used: Sequence[tuple[int, int]], before: int) -> None:
        assert ring.vring is not None
        for head, length in used:
            ring.vring.push(head, length)
        wanted = ring.vring.publish()
        forgotten = self.flaw == "no_interrupt" and (ring.vring.used_idx & 0x7FFF) < (before & 0x7FFF)
        if wanted and ring.call >= 0 and not forgotten:
            signal(ring.call)

    def _sleep(self, ring: Ring) -> bool:
        """Ask for kicks; returns whether something is there already."""
        if ring.vring is None:
            return False
        with self._ring_writes(ring):
            return ring.vring.enable_notify()

    def _break(self, ring: Ring) -> bool:
        ring.enabled = False
        if ring.err >= 0:
            signal(ring.err)
        return False

    def close(self) -> None:
        """Let everything go."""
        for ring in self.rings:
            for fd in (ring.kick, ring.call, ring.err):
                if fd >= 0:
                    os.close(fd)
        self.memory.close()


class EndlessVring(Vring):
    """A ring whose chains are first followed to their end, however far that is."""

    def _walk(self, head: int) -> Iterator[Descriptor]:
        index = head
        while (descriptor := self._descriptor(self._desc, index)).flags & NEXT:
            index = descriptor.following % self._num
        return super()._walk(head)


def signal(fd: int) -> None:
    """Signal an eventfd that may be full."""
    os.set_blocking(fd, False)
    try:
        os.eventfd_write(fd, 1)
    except OSError:
        return  # it is full: signalled already
