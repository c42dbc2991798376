"""A guest with a virtio-net device, in plain Python: memory, queue pairs, frames, on top of tools/stress/split.py.

It drives a NetDevice through its verbs and eventfds, as a hypervisor that embeds vhostmp would. Guest memory is two
kinds of regions: one with the rings at gpa 0, and one with packet buffers that can be exchanged under load
(`renew_buffers`): new buffers come from the new region, and when the last of the old ones has come back the old
region leaves the table. `move` puts everything into new memory, as a live migration does, with the rings stopped.

Rules:
- One thread drives a pair (`send`, `receive`, `post`, `kick`); the verbs may be called from another.
- A pair never polls for ever: `wait` sleeps on the interrupt eventfds, after it asked for interrupts, and fails when
  none comes although the device has something. A lost notification is therefore an error, not a delay.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import attrs

from tests.helpers import PATIENCE
from vhostmp.net import NetDevice
from vhostmp.shm.memory import GuestMemory
from vhostmp.tools.stress.packed import WRAP, PackedDriver, packed_layout
from vhostmp.tools.stress.ring import F_RING_PACKED, DeviceError, InFlight, RingLayout, Used
from vhostmp.tools.stress.split import NetHeader, SplitDriver

F_MRG_RXBUF: Final = 1 << 15
F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
#: What a guest acks unless told otherwise.
FEATURES: Final = F_VERSION_1 | F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX
HEADER: Final = NetHeader.SIZE
LEGACY_HEADER: Final = 10  # of a driver with neither VERSION_1 nor MRG_RXBUF: no num_buffers (virtio 1.3, 5.1.6.1)
SEND_ROOM: Final = 2048
BUFFERS_GPA: Final = 1 << 30
TABLE_BYTES: Final = 16 * 16  # an indirect table of up to 16 entries stands before each buffer


class Buffers:
    """A region of guest memory, cut into buffers of `room` bytes, each with place for an indirect table before it."""

    def __init__(self, gpa: int, count: int, room: int) -> None:
        """Allocate them."""
        self.stride: Final = TABLE_BYTES + room
        self.memory: Final = GuestMemory.create(count * self.stride, gpa=gpa)
        self.free: deque[int] = deque(range(count))
        self.count: Final = count

    @property
    def idle(self) -> bool:
        """Whether every buffer is free."""
        return len(self.free) == self.count

    def take(self) -> int:
        """Return the gpa of a free buffer. IndexError when there is none."""
        return self.memory.gpa + self.free.popleft() * self.stride + TABLE_BYTES

    def give(self, gpa: int) -> None:
        """Free a buffer."""
        self.free.append((gpa - self.memory.gpa) // self.stride)

    def holds(self, gpa: int) -> bool:
        """Whether an address is in this region."""
        return self.memory.gpa <= gpa < self.memory.gpa + self.memory.size

    def write(self, gpa: int, data: bytes) -> None:
        """Write at an address."""
        start = gpa - self.memory.gpa
        self.memory.buf[start : start + len(data)] = data

    def read(self, gpa: int, size: int) -> bytes:
        """Read at an address."""
        start = gpa - self.memory.gpa
        return bytes(self.memory.buf[start : start + size])


@attrs.frozen
class Shape:
    """How frames are laid out: a descriptor for the header alone, pieces of the frame, an indirect table."""

    split_header: bool = False
    pieces: int = 1
    indirect: bool = False


class Guest:
    """A guest with `pairs` queue pairs on one NetDevice."""

    def __init__(
        self,
        device: NetDevice,
        *,
        pairs: int = 1,
        num: int = 256,
        features: int = FEATURES,
        room: int = 2048,
        rx_limit: int | None = None,
    ) -> None:
        """Allocate memory, set every ring up, start and enable it.

        `room`: bytes of a receive buffer, `rx_limit`: receive buffers posted at once. What is sent may have 2048 bytes.
        """
        self.device: Final = device
        self.features: Final = features
        self.num: Final = num
        self.room: Final = room
        self._next_gpa = BUFFERS_GPA
        self._pair_count = pairs
        layouts: list[RingLayout] = []
        start = 0
        for _ in range(2 * pairs):
            layouts.append(self.lay_out(start))
            start = layouts[-1].end + 4096 & ~4095
        self.layouts: Final = layouts
        self.rings = GuestMemory.create(start)
        self.buffers = self._new_buffers()
        self.old_buffers: list[Buffers] = []
        self.pairs: Final = [self._new_pair(index, rx_limit or num) for index in range(pairs)]
        device.set_owner()
        device.set_features(features)
        self.set_mem_table()
        for index in range(2 * pairs):
            self.start(index, WRAP | WRAP << 16 if features & F_RING_PACKED else 0)

    def lay_out(self, start: int) -> RingLayout:
        """Return where the parts of a ring are to lie, from the beginning of a page on."""
        return (packed_layout if self.features & F_RING_PACKED else RingLayout.at)(start, self.num)

    def _new_pair(self, index: int, rx_limit: int) -> Pair:
        return Pair(self, index, rx_limit)

    @property
    def ring_base(self) -> int:
        """What the device is told to find the memory of the rings at."""
        return self.rings.uva

    def _new_buffers(self) -> Buffers:
        gpa, self._next_gpa = self._next_gpa, self._next_gpa + (1 << 30)
        return Buffers(gpa, 2 * self._pair_count * self.num, max(self.room, SEND_ROOM))

    def set_mem_table(self) -> None:
        """Tell the device what memory there is now."""
        memories = [self.rings, self.buffers.memory, *(old.memory for old in self.old_buffers)]
        self.device.set_mem_table([memory.region for memory in memories])

    def addresses(self, index: int) -> dict[str, int]:
        """Return what the device is told of where a ring lies."""
        at, layout = self.ring_base, self.layouts[index]
        return {"desc": at + layout.desc, "avail": at + layout.avail, "used": at + layout.used}

    def start(self, index: int, base: int) -> None:
        """Set a ring up where it stands now, start and enable it."""
        layout, pair = self.layouts[index], self.pairs[index // 2]
        self.device.set_vring_num(index, layout.num)
        self.device.set_vring_addr(index, **self.addresses(index))
        self.device.set_vring_base(index, base)
        self.device.set_vring_call(index, pair.calls[index % 2])
        self.device.set_vring_kick(index, pair.kicks[index % 2])
        self.device.start_vring(index)
        self.device.set_vring_enable(index, True)

    def renew_buffers(self) -> None:
        """Take new packet buffers from a new region from now on; the old region stays until `drop_idle_buffers`."""
        self.old_buffers.append(self.buffers)
        self.buffers = self._new_buffers()
        self.set_mem_table()

    def drop_idle_buffers(self, poison: bytes) -> int:
        """Take old regions whose buffers are all free out of the table, and poison them. Returns how many."""
        idle = [old for old in self.old_buffers if old.idle]
        self.old_buffers = [old for old in self.old_buffers if not old.idle]
        if idle:
            self.set_mem_table()
        for old in idle:
            old.memory.buf[:] = (poison * (old.memory.size // len(poison) + 1))[: old.memory.size]
            old.memory.close()
        return len(idle)

    def resize(self, index: int, num: int) -> None:
        """Reset both rings of a pair, lay them out anew where they were, with fewer entries, and start them."""
        pair, packed = self.pairs[index], self.features & F_RING_PACKED
        for ring in (2 * index + 1, 2 * index):
            self.device.stop_vring(ring)
        pair.discard()
        for ring in (2 * index, 2 * index + 1):
            start = self.layouts[ring].desc
            self.layouts[ring] = packed_layout(start, num) if packed else RingLayout.at(start, num)
        pair.renew(num)
        for ring in (2 * index, 2 * index + 1):
            self.start(ring, WRAP | WRAP << 16 if packed else 0)

    def move(self, poison: bytes) -> None:
        """Put all memory elsewhere under the same guest addresses: stop, copy, new table, start.

        The drivers are paused.
        """
        bases = self.stop()
        old = [self.rings, self.buffers.memory, *(other.memory for other in self.old_buffers)]
        new = [GuestMemory.create(memory.size, gpa=memory.gpa) for memory in old]
        for source, target in zip(old, new, strict=True):
            target.buf[:] = source.buf
        self.rings, self.buffers.memory = new[0], new[1]  # type: ignore[misc]
        for buffers, memory in zip(self.old_buffers, new[2:], strict=True):
            buffers.memory = memory  # type: ignore[misc]
        for pair in self.pairs:
            pair.rebase(self.rings.buf)
        self.set_mem_table()
        for memory in old:
            memory.buf[:] = (poison * (memory.size // len(poison) + 1))[: memory.size]
            memory.close()
        for index, base in enumerate(bases):
            self.start(index, base)

    def stop(self) -> list[int]:
        """Stop every ring and return its base. Transmit rings first: their packets may be on the way to the others."""
        order = [*range(1, len(self.layouts), 2), *range(0, len(self.layouts), 2)]
        bases = {index: self.device.stop_vring(index) for index in order}
        return [bases[index] for index in sorted(bases)]

    def buffers_of(self, gpa: int) -> Buffers:
        """Return the region that a buffer is of."""
        return next(buffers for buffers in (self.buffers, *self.old_buffers) if buffers.holds(gpa))

    def close(self) -> None:
        """Give everything back. The device is closed by whoever made it, before or after."""
        for pair in self.pairs:
            pair.close()
        for memory in (self.rings, self.buffers.memory, *(old.memory for old in self.old_buffers)):
            memory.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the device's rings and close."""
        with suppress(Exception):
            self.device.stop_all()
        self.close()


def as_split(driver: SplitDriver | PackedDriver) -> SplitDriver:
    """Return a driver that a test knows to be of a split ring, for what only that has."""
    assert isinstance(driver, SplitDriver)
    return driver


class Pair:
    """One queue pair: sends and receives frames."""

    def __init__(self, guest: Guest, index: int, rx_limit: int) -> None:
        """Set both rings up, empty."""
        self.guest: Final = guest
        self.index: Final = index
        self.rx_limit = rx_limit
        self.rx = self._driver(2 * index)
        self.tx = self._driver(2 * index + 1)
        self.kicks: Final = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        self.calls: Final = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        self.header = NetHeader()
        self.header_size: Final = HEADER if guest.features & (F_VERSION_1 | F_MRG_RXBUF) else LEGACY_HEADER
        self.shape = Shape()
        self.most_buffers = 0  # of one received packet
        self._partial: list[bytes] = []
        self._expected = 0

    def _driver(self, index: int) -> SplitDriver | PackedDriver:
        driver = PackedDriver if self.guest.features & F_RING_PACKED else SplitDriver
        return driver(self.guest.rings.buf, self.guest.layouts[index], features=self.guest.features)

    def rebase(self, buf: memoryview) -> None:
        """Go on with rings that were copied elsewhere."""
        self.rx.rebase(buf)
        self.tx.rebase(buf)

    def discard(self) -> None:
        """Take all buffers back that the device had. Its rings are stopped."""
        for chain in (*self.rx.in_flight.values(), *self.tx.in_flight.values()):
            self._free(chain)

    def renew(self, num: int) -> None:
        """Begin with new rings of `num` entries."""
        self.rx.close()
        self.tx.close()
        self.rx_limit = num
        self.rx, self.tx = self._driver(2 * self.index), self._driver(2 * self.index + 1)

    def post(self) -> int:
        """Make receive buffers available, up to the limit. Returns how many; `kick` tells the device."""
        count = min(self.rx_limit - len(self.rx.in_flight), len(self.rx.free), len(self.guest.buffers.free))
        for _ in range(count):
            self.rx.add([], [(self.guest.buffers.take(), self.guest.room)])
        return count

    def send(self, frame: bytes) -> bool:
        """Make a frame available. Returns False when there is no room; `kick` tells the device."""
        shape, buffers = self.shape, self.guest.buffers
        parts = 1 if shape.indirect else shape.pieces + shape.split_header
        if len(self.tx.free) < parts or not buffers.free:
            return False
        gpa = buffers.take()
        header = self.header_size
        buffers.write(gpa, self.header.pack()[:header] + frame)
        step = -(-len(frame) // shape.pieces)
        segments = [(gpa + header + at, min(step, len(frame) - at)) for at in range(0, len(frame), step)]
        if shape.split_header:
            segments.insert(0, (gpa, header))
        else:
            segments[0] = (gpa, header + segments[0][1])
        if shape.indirect:
            table = gpa - TABLE_BYTES
            buffers.write(table, self.tx.pack_table([(addr, size, 0) for addr, size in segments]))
            self.tx.add_table(table, segments)
        else:
            self.tx.add(segments)
        return True

    def kick(self) -> None:
        """Publish what was added to both rings; notify the device where it wants that."""
        for driver, fd in ((self.rx, self.kicks[0]), (self.tx, self.kicks[1])):
            if driver.publish():
                os.eventfd_write(fd, 1)

    def reap(self) -> int:
        """Take back what was sent. Returns how many."""
        used = self.tx.reap()
        for one in used:
            if one.length:
                raise DeviceError(f"device says it wrote {one.length} bytes to a transmit chain")
            self._free(one.chain)
        return len(used)

    def receive(self) -> list[bytes]:
        """Take the frames that have arrived, without their headers. DeviceError when headers and lengths disagree."""
        return [frame for frame, _ in self.receive_with_headers()]

    def receive_with_headers(self) -> list[tuple[bytes, NetHeader]]:
        """Take the frames that have arrived, with their headers. DeviceError when headers and lengths disagree."""
        return [packet for used in self.rx.reap() if (packet := self._collect(used)) is not None]

    def _collect(self, used: Used) -> tuple[bytes, NetHeader] | None:
        gpa = used.chain.writable[0][0]
        length = used.length
        if length is None:
            raise DeviceError("device does not say how much it wrote to a receive buffer")
        data = self.guest.buffers_of(gpa).read(gpa, length)
        self._free(used.chain)
        if not self._partial:
            if length < self.header_size:
                raise DeviceError(f"received {length} bytes, less than a header")
            self._expected = NetHeader.unpack(data).num_buffers if self.header_size == HEADER else 1
            if self._expected == 0 or (self._expected > 1 and not self.guest.features & F_MRG_RXBUF):
                raise DeviceError(f"num_buffers is {self._expected}")
        self._partial.append(data)
        if len(self._partial) < self._expected:
            if length != self.guest.room:
                raise DeviceError(f"{length} bytes in a buffer of {self.guest.room} that is not a packet's last")
            return None
        packet, self.most_buffers = b"".join(self._partial), max(self.most_buffers, len(self._partial))
        self._partial = []
        header = packet[: self.header_size].ljust(HEADER, b"\0")
        return packet[self.header_size :], NetHeader.unpack(header)

    def _free(self, chain: InFlight) -> None:
        gpa = (chain.writable or chain.readable)[0][0]
        buffers = self.guest.buffers_of(gpa)
        buffers.give(gpa)

    def wait(self, also: Sequence[int] = (), timeout: float = PATIENCE) -> None:
        """Sleep until the device has something or a descriptor of `also` is readable.

        Asks for interrupts first. Raises DeviceError when there is something and no interrupt came for it,
        AssertionError when nothing happens at all.
        """
        if self.rx.want_interrupts() or self.tx.want_interrupts():
            return
        poll = select.poll()
        for fd in (*self.calls, *also):
            poll.register(fd, select.POLLIN)
        if not poll.poll(timeout * 1000):
            if self.rx.pending() or self.tx.pending():
                raise DeviceError(f"{self.rx.pending()} + {self.tx.pending()} used elements and no interrupt")
            raise AssertionError(f"nothing from the device in {timeout:g} s: {self.describe()}")
        for fd in self.calls:
            with suppress(BlockingIOError):
                os.eventfd_read(fd)

    def describe(self) -> str:
        """Say where both rings stand, for error messages."""
        return ", ".join(
            f"{name}: avail {driver.avail_idx} used {driver.used_idx} in flight {len(driver.in_flight)}"
            for name, driver in (("rx", self.rx), ("tx", self.tx))
        )

    def close(self) -> None:
        """Close the eventfds and let go of the memory."""
        self.rx.close()
        self.tx.close()
        for fd in (*self.kicks, *self.calls):
            os.close(fd)
