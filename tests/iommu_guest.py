"""A guest behind an IOMMU, in plain Python, and the front-end's part of it: what its addresses stand for, on demand.

The guest is as strict as an operating system can be: every buffer is mapped for its one use, for reading or for writing
only, and unmapped when it comes back; the device is told, and only then the buffer is free, its addresses for others.
Memory that is not mapped holds poison: it shows in a frame that a device reads from there, and when the buffer is used
again one sees whether a device has written there.

Rules:
- `Iommu` answers the device's questions in a thread of its own, as a front-end does, until `close`.
- The rings and the buffers are mapped page by page.
- Threads may share the buffers: each pair's traffic is a thread, and `StrictBuffers.move` another.
"""

from __future__ import annotations

import os
import random
import select
import threading
from types import TracebackType
from typing import Any, Final, Self

from tests.frames import POISON
from tests.net_driver import Buffers, Guest, Pair
from vhostmp.iotlb import DeviceIotlb
from vhostmp.net import NetDevice

F_ACCESS_PLATFORM: Final = 1 << 33
READ: Final = 1
WRITE: Final = 2
PAGE: Final = 4096
RINGS_IOVA: Final = 0x3000_0000_0000
BUFFERS_IOVA: Final = 0x4000_0000_0000


class Iommu:
    """What is mapped, and the thread that tells the device when it asks."""

    def __init__(self, iotlb: DeviceIotlb) -> None:
        """Map nothing, begin to answer."""
        self.iotlb: Final = iotlb
        self.maps: dict[int, tuple[int, int, int]] = {}  # by page of iova: start of the page's bytes, uva, access
        self.asked: list[tuple[int, int]] = []
        self.denied: list[tuple[int, int]] = []
        self.unknown = 0
        self.deaf = threading.Event()
        self.error: BaseException | None = None
        #: Questions wait for who holds it.
        self.lock: Final = threading.RLock()
        self._stop: Final = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: Final = threading.Thread(target=self._run, name="iommu")
        self._thread.start()

    def map(self, iova: int, size: int, uva: int, access: int) -> None:
        """Map whole pages."""
        assert iova % PAGE == size % PAGE == 0
        with self.lock:
            for at in range(0, size, PAGE):
                self.maps[iova + at] = (PAGE, uva + at, access)

    def unmap(self, iova: int, size: int) -> None:
        """Unmap; returns when the device uses it no more."""
        with self.lock:
            for at in range(0, size, PAGE):
                self.maps.pop(iova + at, None)
            # within the lock: the answer to a question asked before must not come after this
            self.iotlb.invalidate(iova, size)

    def tell(self, iova: int, access: int) -> bool:
        """Answer one question; whether there is an answer."""
        with self.lock:
            page = iova // PAGE * PAGE
            found = self.maps.get(page)
            if found is None:
                return False
            self.iotlb.update(page, found[0], found[1], found[2])
            return True

    def answer_all(self) -> None:
        """Answer what was left unanswered, and everything from now on."""
        self.deaf.clear()
        for iova, access in list(self.asked):
            self.tell(iova, access)

    def _run(self) -> None:
        try:
            poll = select.poll()
            poll.register(self.iotlb.fileno(), select.POLLIN)
            poll.register(self._stop, select.POLLIN)
            while all(fd != self._stop for fd, _ in poll.poll()):
                for miss in self.iotlb.misses():
                    if miss.denied:
                        self.denied.append((miss.iova, miss.access))
                        continue
                    self.asked.append((miss.iova, miss.access))
                    with self.lock:  # whoever makes us deaf under it hears no answer afterwards
                        if not self.deaf.is_set() and not self.tell(miss.iova, miss.access):
                            self.unknown += 1
        except BaseException as error:
            self.error = error

    def close(self) -> None:
        """Stop answering. Raises what the thread died of. Idempotent."""
        if self._thread.is_alive():
            os.eventfd_write(self._stop, 1)
            self._thread.join(30)
            os.close(self._stop)
        if self.error is not None:
            raise self.error


class Access(threading.local):
    """What buffers that this thread takes are mapped for."""

    bits = READ | WRITE


class StrictBuffers(Buffers):
    """Buffers that the guest knows by the addresses under which they are mapped now."""

    def __init__(self, gpa: int, count: int, room: int, iommu: Iommu) -> None:
        """Allocate them, each a number of pages."""
        super().__init__(gpa, count, (room + 2 * PAGE - 1) // PAGE * PAGE - 256)
        assert self.stride % PAGE == 0
        self.iommu: Final = iommu
        self.access: Final = Access()
        self.lock: Final = threading.RLock()
        self._poison: Final = (POISON * (self.stride // len(POISON) + 1))[: self.stride]
        self.memory.buf[:] = self._poison * count
        self._slots: dict[int, int] = {}
        self._free_iovas: list[int] = []
        self.received: set[int] = set()  # guest-physical pages that the device has said that it wrote to
        self._next_iova = BUFFERS_IOVA + gpa

    def take(self) -> int:
        """Map a free buffer. AssertionError when somebody has written to it."""
        with self.lock:
            slot = self.free.popleft()
            assert self._bytes(slot) == self._poison, f"the device has written to buffer {slot}, which is not mapped"
            if self._free_iovas:
                iova = self._free_iovas.pop()
            else:
                iova, self._next_iova = (
                    self._next_iova,
                    self._next_iova + self.stride + PAGE,
                )  # a page between: nobody's
            self._slots[iova // PAGE] = slot
            self.iommu.map(iova, self.stride, self.memory.uva + slot * self.stride, self.access.bits)
            return iova + 256

    def give(self, gpa: int) -> None:
        """Unmap a buffer, and poison it."""
        iova = gpa - 256
        with self.lock:
            self.iommu.unmap(iova, self.stride)
            self._free_iovas.append(iova)
            self._release(self._slots.pop(iova // PAGE))

    def move(self, rng: random.Random) -> bool:
        """Have a mapped buffer's addresses stand for other memory, with its content; poison the old. False: none is."""
        with self.lock, self.iommu.lock:
            if not self._slots or not self.free:
                return False
            page = rng.choice(list(self._slots))
            access = self.iommu.maps[page * PAGE][2]
            self.iommu.unmap(page * PAGE, self.stride)
            old, new = self._slots[page], self.free.popleft()
            self.memory.buf[new * self.stride : (new + 1) * self.stride] = self._bytes(old)
            self._slots[page] = new
            self.iommu.map(page * PAGE, self.stride, self.memory.uva + new * self.stride, access)
            self._release(old)
            return True

    def mapped(self, rng: random.Random) -> int:
        """Return one of the addresses that are mapped now, or 0."""
        with self.lock:
            return rng.choice(list(self._slots)) * PAGE if self._slots else 0

    def _bytes(self, slot: int) -> bytes:
        return bytes(self.memory.buf[slot * self.stride : (slot + 1) * self.stride])

    def _release(self, slot: int) -> None:
        self.memory.buf[slot * self.stride : (slot + 1) * self.stride] = self._poison
        self.free.append(slot)

    def holds(self, gpa: int) -> bool:
        """Whether an address is one of a mapped buffer."""
        return self._start(gpa) is not None

    def write(self, gpa: int, data: bytes) -> None:
        """Write at an address."""
        with self.lock:
            start = self._start(gpa)
            assert start is not None
            self.memory.buf[start : start + len(data)] = data

    def read(self, gpa: int, size: int) -> bytes:
        """Read at an address, for what the device says that it wrote there."""
        with self.lock:
            start = self._start(gpa)
            assert start is not None
            first = self.memory.gpa + start
            self.received |= set(range(first // PAGE, (first + size - 1) // PAGE + 1))
            return bytes(self.memory.buf[start : start + size])

    def _start(self, gpa: int) -> int | None:
        for back in range(self.stride // PAGE):
            slot = self._slots.get(gpa // PAGE - back)
            if slot is not None:
                return slot * self.stride + gpa - (gpa // PAGE - back) * PAGE
        return None


class StrictPair(Pair):
    """A pair that says what each buffer is mapped for."""

    def post(self) -> int:
        """Make receive buffers available, which the device may only write to."""
        assert isinstance(self.guest.buffers, StrictBuffers)
        self.guest.buffers.access.bits = WRITE
        return super().post()

    def send(self, frame: bytes) -> bool:
        """Make a frame available, which the device may only read."""
        assert isinstance(self.guest.buffers, StrictBuffers)
        self.guest.buffers.access.bits = READ
        return super().send(frame)


class StrictGuest(Guest):
    """A guest behind an IOMMU."""

    def __init__(self, device: NetDevice, **options: Any) -> None:
        """As Guest; the device offers ACCESS_PLATFORM."""
        assert device.iotlb is not None
        self.iommu: Final = Iommu(device.iotlb)
        try:
            options["features"] = options["features"] | F_ACCESS_PLATFORM
            super().__init__(device, **options)
        except BaseException:
            self.iommu.close()
            raise

    @property
    def ring_base(self) -> int:
        """An I/O virtual address."""
        return RINGS_IOVA

    def _new_buffers(self) -> Buffers:
        gpa, self._next_gpa = self._next_gpa, self._next_gpa + (1 << 30)
        return StrictBuffers(gpa, 2 * self._pair_count * self.num, self.room, self.iommu)

    def _new_pair(self, index: int, rx_limit: int) -> Pair:
        return StrictPair(self, index, rx_limit)

    def set_mem_table(self) -> None:
        """Tell the device of the memory; map the rings."""
        super().set_mem_table()
        size = (self.rings.size + PAGE - 1) // PAGE * PAGE
        self.iommu.map(RINGS_IOVA, size, self.rings.uva, READ | WRITE)

    def close(self) -> None:
        """Give everything back."""
        self.iommu.close()
        super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop answering, stop the device's rings and close."""
        self.iommu.close()
        super().__exit__(kind, error, trace)

    def __enter__(self) -> Self:
        """Return itself."""
        return self
