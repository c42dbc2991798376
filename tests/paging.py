"""The front-end's side of post-copy: memory whose contents are elsewhere, brought page by page when asked for.

`Elsewhere` takes the contents of guest memory away (the file is punched, so that every page of it is missing for
everybody), reads faults from the userfaultfd that the back-end gave, puts pages into the file, whole at once (by a
userfaultfd of its own), and wakes who waits, as QEMU does. Written from userfaultfd(2) and the vhost-user document, not
from our back-end.

Rules: between `Elsewhere(...)` and `bring_all` nobody in this process touches the memory: that would make a page of
zeroes.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import attrs

from tests.helpers import wait_until
from vhostmp.shm._userfault import new_userfaultfd, register_missing
from vhostmp.shm.memory import MemoryRegion
from vhostmp.workers.devices._fallocate import punch_hole

PAGE: Final = 4096
"""Bytes of a page of POSIX shared memory; what a file's is, its block size says."""
_MESSAGE: Final = struct.Struct("=BBHIQQQ")  # struct uffd_msg: event, reserved, then flags and address of the fault
_PAGEFAULT: Final = 0x12
_UFFDIO_WAKE: Final = 0x8010AA02
_UFFDIO_COPY: Final = 0xC028AA03
_COPY: Final = struct.Struct("=QQQQq")  # struct uffdio_copy: to, from, bytes, mode, bytes copied
_RANGE: Final = struct.Struct("=QQ")


@attrs.frozen
class Place:
    """A page: which region it is of, and where in the region it begins, bytes."""

    region: int
    offset: int


class Elsewhere:
    """The contents of guest memory, and a thread that brings them."""

    def __init__(self, regions: Sequence[MemoryRegion]) -> None:
        """Take the contents away."""
        self.asked: Counter[Place] = Counter()
        """Which pages the back-end has asked for, and how often."""
        self.strays: list[int] = []
        """Addresses of faults that are in no region."""
        self._regions: Final = list(regions)
        self._page_bytes: Final = [os.fstat(region.fd).st_blksize for region in regions]
        self._pages: dict[Place, bytes] = {}
        self._maps: Final[list[mmap.mmap]] = []
        self._at: Final[list[int]] = []
        self._ours: Final = new_userfaultfd()
        for number, (region, page) in enumerate(zip(regions, self._page_bytes, strict=True)):
            mapped = mmap.mmap(region.fd, region.mmap_offset + region.size)
            self._maps.append(mapped)
            self._at.append(ctypes.addressof(ctypes.c_char.from_buffer(mapped)))
            for offset in range(0, region.size, page):
                at = region.mmap_offset + offset
                self._pages[Place(number, offset)] = mapped[at : at + page]
            register_missing(self._ours, self._at[-1], len(mapped))
            punch_hole(region.fd, region.mmap_offset, region.size)
        self._bases: Sequence[int] = []
        self._userfaultfd = -1
        self._lock: Final = threading.Lock()
        self._withheld: set[Place] = set()
        self._held: set[Place] = set()
        self._wake: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None

    @property
    def bases(self) -> Sequence[int]:
        """At which addresses the back-end said that faults will be seen."""
        return self._bases

    def serve(self, userfaultfd: int, bases: Sequence[int]) -> None:
        """Begin to bring what is asked for; `userfaultfd` is taken over."""
        self._userfaultfd, self._bases = userfaultfd, list(bases)
        self._thread = threading.Thread(target=self._run, name="front-end", daemon=True)
        self._thread.start()

    def withhold(self, *places: Place) -> None:
        """Answer no fault in these pages from now on."""
        with self._lock:
            self._withheld = set(places)

    def release(self) -> None:
        """Answer what was asked for meanwhile, and go on."""
        with self._lock:
            self._withheld = set()
            for place in self._held:
                self._bring(place)
            self._held.clear()

    def wait_for_faults(self, count: int) -> None:
        """Wait until the back-end has asked for so many pages."""
        wait_until(lambda: len(self.asked) >= count, what=f"the back-end to ask for {count} pages")

    def wait_until_withheld(self) -> None:
        """Wait until the back-end has asked for a page that it does not get."""
        wait_until(lambda: self._held, what="the back-end to ask for a page")

    def bring_all(self, region: int | None = None) -> None:
        """Bring everything, or a region, that is not there yet, asked for or not."""
        with self._lock:
            for place in [place for place in self._pages if region in (None, place.region)]:
                self._bring(place)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._userfaultfd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake in ready:
                return
            try:
                event, _, _, _, _, address, _ = _MESSAGE.unpack(os.read(self._userfaultfd, _MESSAGE.size))
            except BlockingIOError:
                continue
            assert event == _PAGEFAULT
            place = self._place(address)
            if place is None:
                self.strays.append(address)
                continue
            with self._lock:
                self.asked[place] += 1
                if place in self._withheld:
                    self._held.add(place)
                else:
                    self._bring(place)

    def _place(self, address: int) -> Place | None:
        for number, (base, region) in enumerate(zip(self._bases, self._regions, strict=True)):
            if base <= address < base + region.size:
                page = self._page_bytes[number]
                return Place(number, (address - base) // page * page)
        return None

    def _bring(self, place: Place) -> None:
        """Put a page into its file unless it is there, and wake who waits for it."""
        page = self._page_bytes[place.region]
        data = self._pages.pop(place, None)
        if data is not None:
            source = ctypes.create_string_buffer(data, page)
            to = self._at[place.region] + self._regions[place.region].mmap_offset + place.offset
            with suppress(FileExistsError):  # the guest has written there meanwhile
                fcntl.ioctl(self._ours, _UFFDIO_COPY, _COPY.pack(to, ctypes.addressof(source), page, 0, 0))
        if self._userfaultfd >= 0:
            fcntl.ioctl(self._userfaultfd, _UFFDIO_WAKE, _RANGE.pack(self._bases[place.region] + place.offset, page))

    def stop(self) -> None:
        """Answer nothing any more, and let go of the userfaultfd: die. Idempotent."""
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._thread = None
        if self._userfaultfd >= 0:
            os.close(self._userfaultfd)
            self._userfaultfd = -1

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of everything."""
        self.stop()
        for fd in (self._ours, self._wake):
            os.close(fd)
        for mapped in self._maps:
            mapped.close()
