"""A front-end's view of the dirty log: what has changed in guest memory, against what the device says it wrote.

Rules: nothing writes to guest memory between `begin` and `end` but the device. `settle` is how one knows that it is
done: a flush queues every ring once, and a worker that sleeps again afterwards has nothing left to do.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

from tests.helpers import wait_until
from tests.net_driver import Guest
from vhostmp.net import NetDevice
from vhostmp.shm import layout
from vhostmp.shm.memory import GuestMemory
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import DESC_BYTES, F_RING_PACKED, Segment

PAGE: Final = 4096
LOG_ALL: Final = 1 << 26
ADDR_FLAG_LOG: Final = 1
USED_ELEMENT: Final = 8
_SET: Final = re.compile(rb"[^\0]")


def pages(gpa: int, size: int) -> set[int]:
    """Return the numbers of the pages that `size` bytes at `gpa` touch."""
    return set(range(gpa // PAGE, (gpa + size - 1) // PAGE + 1)) if size else set()


def pages_of(segments: Iterable[Segment], size: int) -> set[int]:
    """Return the pages that the first `size` bytes of some segments touch."""
    found: set[int] = set()
    for gpa, length in segments:
        part = min(size, length)
        found |= pages(gpa, part)
        size -= part
    return found


class DirtyLog:
    """A log of `size` bytes at byte `offset` of a memfd."""

    def __init__(self, size: int, offset: int = 0) -> None:
        """Make it, all clear."""
        self.size: Final = size
        self.offset: Final = offset
        self.fd: Final = os.memfd_create("dirty", os.MFD_CLOEXEC)
        os.truncate(self.fd, offset + size)
        self.map: Final = mmap.mmap(self.fd, offset + size)

    @property
    def pages(self) -> set[int]:
        """The pages whose bits are set."""
        data = self.map[self.offset :]
        found: set[int] = set()
        for match in _SET.finditer(data):
            byte = data[match.start()]
            found |= {8 * match.start() + bit for bit in range(8) if byte >> bit & 1}
        return found

    def clear(self) -> None:
        """Clear all bits, while the device is idle."""
        self.map[self.offset :] = bytes(self.size)

    def close(self) -> None:
        """Unmap and close."""
        self.map.close()
        os.close(self.fd)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


class Watch:
    """Compares guest memory before and after."""

    def __init__(self, pool: Pool, device: NetDevice, guest: Guest, log: DirtyLog) -> None:
        """Watch all memory that the guest has now."""
        self.pool: Final = pool
        self.device: Final = device
        self.guest: Final = guest
        self.log: Final = log
        self._before: list[bytes] = []
        self._used_before: list[int] = []

    def switch_on(self, *, rings: bool = True) -> None:
        """Have everything logged; `rings`: the used rings too. The order is QEMU's."""
        self.device.set_log_base(self.log.fd, self.log.size, self.log.offset)
        self.device.set_features(self.guest.features | LOG_ALL)
        if rings:
            self.set_addresses(log=True)

    def set_addresses(self, *, log: bool) -> None:
        """Tell the device the rings' addresses again, with where their used rings are logged or without."""
        uva = self.guest.rings.uva
        for index, place in enumerate(self.guest.layouts):
            self.device.set_vring_addr(
                index,
                desc=uva + place.desc,
                avail=uva + place.avail,
                used=uva + place.used,
                flags=ADDR_FLAG_LOG if log else 0,
                log=self.guest.rings.gpa + place.used if log else 0,
            )

    def settle(self) -> None:
        """Wait until the device has done all that there is to do."""

        def number(field: str) -> int:
            return layout.WORKER.read(self.pool.buf, layout.worker_offset(0), field)

        switches = number("switches")
        self.device.set_vring_busyloop_timeout(0, 0)
        wait_until(lambda: number("switches") != switches, what="the worker to take up a generation")
        wait_until(lambda: number("asleep") == 1, what="the worker to sleep")

    def begin(self) -> None:
        """Remember everything."""
        self.log.clear()
        self._before = [bytes(memory.buf) for memory in self._memories()]
        self._used_before = [self._used_idx(index) for index in range(len(self.guest.layouts))]

    def changed(self) -> set[int]:
        """Return the pages that are not what they were."""
        found: set[int] = set()
        for memory, before in zip(self._memories(), self._before, strict=True):
            now = bytes(memory.buf)
            if now != before:
                first = memory.gpa // PAGE
                found |= {
                    first + at // PAGE
                    for at in range(0, len(now), PAGE)
                    if now[at : at + PAGE] != before[at : at + PAGE]
                }
        return found

    def ring_words(self) -> set[int]:
        """Return the pages of those words of the rings that the device may have written since `begin`."""
        found: set[int] = set()
        for index, place in enumerate(self.guest.layouts):
            used = self.guest.rings.gpa + place.used
            if self.guest.features & F_RING_PACKED:  # used descriptors, and the device's event suppression
                found |= pages(self.guest.rings.gpa + place.desc, DESC_BYTES * place.num) | pages(used, 4)
                continue
            found |= pages(used, 4) | pages(used + 4 + USED_ELEMENT * place.num, 2)
            for entry in range((self._used_idx(index) - self._used_before[index]) & 0xFFFF):
                at = (self._used_before[index] + entry) % place.num
                found |= pages(used + 4 + USED_ELEMENT * at, USED_ELEMENT)
        return found

    def _used_idx(self, index: int) -> int:
        pair = self.guest.pairs[index // 2]
        return (pair.tx if index % 2 else pair.rx).used_idx

    def _memories(self) -> list[GuestMemory]:
        return [self.guest.rings, self.guest.buffers.memory]
