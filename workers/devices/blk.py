"""The block device's requests: each checked, then done with one system call on the guest's own memory.

Reads and writes are done in the work item. A flush is not: a thread does it (flusher.py), and the request, with those
behind it in its queue, is left over until it is done.

Source: virtio 1.3, 5.2.6. A request is a 16-byte header, then what is to be written or room for what is read, then one
byte for the status, in a chain that the driver cuts into descriptors as it likes. Sectors have 512 bytes.

Rules:
- The header is copied before it is looked at. Nothing of a request is done before all of it is checked.
- A request that is wrong ends in S_IOERR or S_UNSUPP and does nothing; where there is no room for a status there is
  nobody to tell. What the host's system calls refuse is S_IOERR too.
- Doing a request twice gives the same: a worker that was killed is replaced, and what it had not given back is done
  again; so is, by the new object, a request that waited for a flush when back-ends were swapped.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from vhostmp.workers.devices._fallocate import punch_hole, zero_range
from vhostmp.workers.devices.api import Device
from vhostmp.workers.devices.flusher import Flusher

log = logging.getLogger("vhostmp.backend")

SECTOR: Final = 512
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2
HEADER: Final = struct.Struct("<IIQ")  # type, reserved, sector
RANGE: Final = struct.Struct("<QII")  # sector, num_sectors, flags
F_UNMAP: Final = 1
ID_BYTES: Final = 20
#: Most ranges of one discard or write-zeroes, and most sectors of a range: what the configuration space says.
RANGES_MAX: Final = 16
RANGE_SECTORS_MAX: Final = 32768
#: Most data segments of a request (with header and status they fill a ring of 128 without indirect tables), and most
#: bytes of a segment: what the configuration space says. The product is all that one request can hold its worker for.
SEG_MAX: Final = 126
SIZE_MAX: Final = 1 << 20
#: After so many bytes of zeros written other rings and whoever waits for us get their turn.
ITEM_BYTES: Final = 32 << 20
ZEROS: Final = memoryview(bytes(1 << 20))
# linux/fs.h
BLKDISCARD: Final = 0x1277


class Failed(Exception):
    """A request ends with another status than S_OK."""

    def __init__(self, status: int) -> None:
        """Keep the status."""
        super().__init__(status)
        self.status = status


class Waits(Exception):
    """A request waits for a flush."""


class Blk(Device):
    """A file or block device as a disk."""

    device_id = 2
    sync: Callable[[int], object] = staticmethod(os.fdatasync)
    """What a flush calls, on a thread of its own."""

    def __init__(
        self,
        fd: int,
        note: int,
        *,
        sectors: int = 0,
        read_only: bool = True,
        write_through: bool = True,
        device_block: int = 0,
        discards: bool = False,
        serial: str = "",
    ) -> None:
        """Serve the open file `fd`; descriptors are borrowed.

        Args:
            fd: the file.
            note: where those who serve it note that a flush failed (flusher.py).
            sectors: how many the disk has.
            read_only: whether writing is refused.
            write_through: whether a write is done only once it is on stable storage.
            device_block: bytes of a block of the block device that `fd` is; 0: it is a file.
            discards: whether discard is offered.
            serial: what GET_ID returns, at most 20 bytes.
        """
        self.fd = fd
        self.sectors = sectors
        self.read_only = read_only
        self.write_flags = os.RWF_DSYNC if write_through else 0
        self.device_block = device_block
        self.discards = discards
        self.serial = serial.encode("ascii", "replace")[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self.complained = 0
        self.cost = 0
        self.queue = 0  # whose requests are being served
        self.again = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.flusher = Flusher(fd, note, self.again, self.sync)
        except BaseException:
            os.close(self.again)
            raise
        self.actions: dict[int, Callable[[Any, int, list[memoryview]], int]] = {
            T_IN: self._read,
            T_OUT: self._write,
            T_FLUSH: self._flush,
            T_GET_ID: self._get_id,
            T_DISCARD: self._discard,
            T_WRITE_ZEROES: self._write_zeroes,
        }

    def fileno(self) -> int:
        """Return what has the queues looked at again."""
        return self.again

    def close(self) -> None:
        """End; a flush that runs ends by itself."""
        self.flusher.close()
        os.close(self.again)

    def process(self, queue: int, requests: list[Any]) -> int:
        """Serve requests, up to one that waits for a flush; the last writable byte of each becomes its status."""
        self.cost = 0
        self.queue = queue
        if not requests[0].again:
            self.flusher.forget(queue)  # its request will not come again: the ring was reset, say
        for done, request in enumerate(requests):
            if self.cost >= ITEM_BYTES:
                os.eventfd_write(self.again, 1)
                return done
            if not request.writable:
                continue  # no room for a status: nothing can be said, so nothing is done
            last = request.writable[-1]
            room = [*request.writable[:-1], last[:-1]] if len(last) > 1 else request.writable[:-1]
            try:
                status, written = self._serve(request, room)
            except Waits:
                return done
            last[-1] = status
            # The length counts from the start of the buffers: the status only when there is no gap before it (2.7.8.2).
            request.written = written + 1 if written == request.writable_bytes - 1 else written
        return len(requests)

    def _serve(self, request: Any, room: list[memoryview]) -> tuple[int, int]:
        """Do one request. Returns status, and bytes written from the start of `room` on."""
        header = request.read(0, HEADER.size)
        if len(header) < HEADER.size:
            return S_IOERR, 0
        kind, _, sector = HEADER.unpack(header)
        action = self.actions.get(kind)
        if action is None:
            return S_UNSUPP, 0
        try:
            return S_OK, action(request, sector, room)
        except Failed as failed:
            return failed.status, 0
        except Waits:
            raise
        except OSError as error:
            self._complain(kind, sector, error.strerror or repr(error))
        except Exception as error:  # our own mistake, or no memory: the request has failed, and its driver is to know
            self._complain(kind, sector, repr(error))
        return S_IOERR, 0

    def _complain(self, kind: int, sector: int, why: str) -> None:
        self.complained += 1
        if self.complained & (self.complained - 1) == 0:
            log.error("request %d at sector %d: %s (%d failed so far)", kind, sector, why, self.complained)

    # --- what they do; each returns how many bytes it wrote into the room ---

    def _read(self, request: Any, sector: int, room: list[memoryview]) -> int:
        length = request.writable_bytes - 1
        offset = self._checked(sector, length)
        _transfer(os.preadv, self.fd, room, offset, length, 0)
        return int(length)

    def _write(self, request: Any, sector: int, room: list[memoryview]) -> int:
        del room
        length = request.readable_bytes - HEADER.size
        offset = self._checked(sector, length)
        self._check_writable()
        _transfer(os.pwritev, self.fd, _after(request.readable, HEADER.size), offset, length, self.write_flags)
        return 0

    def _flush(self, request: Any, sector: int, room: list[memoryview]) -> int:
        del sector, room
        if not self.read_only:
            self._sync(request)
        return 0

    def _get_id(self, request: Any, sector: int, room: list[memoryview]) -> int:
        del sector, room
        if request.writable_bytes - 1 < ID_BYTES:
            raise Failed(S_IOERR)
        return int(request.write(self.serial))

    def _discard(self, request: Any, sector: int, room: list[memoryview]) -> int:
        del sector, room
        for offset, length, _ in self._ranges(request, self.discards, flags=0):
            if self.device_block:
                self._discard_blocks(offset, offset + length)
            else:
                punch_hole(self.fd, offset, length)
        return 0

    def _discard_blocks(self, start: int, end: int) -> None:
        """Discard the whole blocks of the device within a range of bytes: what is left of it may stay as it is."""
        start, end = -(-start // self.device_block) * self.device_block, end // self.device_block * self.device_block
        if start < end:
            fcntl.ioctl(self.fd, BLKDISCARD, struct.pack("QQ", start, end - start))

    def _write_zeroes(self, request: Any, sector: int, room: list[memoryview]) -> int:
        del sector, room
        ranges = self._ranges(request, not self.read_only, flags=F_UNMAP)
        for offset, length, flags in ranges if not self._syncs(request) else ():
            try:
                (punch_hole if flags & F_UNMAP else zero_range)(self.fd, offset, length)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # EINVAL: a block device, unaligned for it
                    raise
                _write_zeros(self.fd, offset, length)
                self.cost += length
        if self.write_flags:
            self._sync(request)
        return 0

    def _syncs(self, request: Any) -> bool:
        """Whether a flush was begun for this very request."""
        return request.again and self.flusher.begun(self.queue)

    def _sync(self, request: Any) -> None:
        """Flush. Raises Waits until that is done, OSError when it failed."""
        if not self._syncs(request):
            self.flusher.begin(self.queue)
            raise Waits
        result = self.flusher.take(self.queue)
        if result is None:
            raise Waits
        if result:
            raise OSError(result, os.strerror(result))

    # --- checks ---

    def _checked(self, sector: int, length: int) -> int:
        """Return the offset in bytes of `length` bytes from `sector` on. Failed unless they are sectors of the disk."""
        if (
            length > SEG_MAX * SIZE_MAX
            or length % SECTOR
            or sector > self.sectors
            or length // SECTOR > self.sectors - sector
        ):
            raise Failed(S_IOERR)
        return sector * SECTOR

    def _check_writable(self) -> None:
        if self.read_only:
            raise Failed(S_IOERR)

    def _ranges(self, request: Any, offered: bool, flags: int) -> Sequence[tuple[int, int, int]]:
        """Return offset, length (bytes) and flags of each range of a request, all of them checked."""
        if not offered:
            raise Failed(S_UNSUPP)
        length = request.readable_bytes - HEADER.size
        if not length or length % RANGE.size or length > RANGES_MAX * RANGE.size:
            raise Failed(S_IOERR)
        ranges = list(RANGE.iter_unpack(request.read(HEADER.size)))
        if any(given & ~flags for _, _, given in ranges):
            raise Failed(S_UNSUPP)
        if any(count > RANGE_SECTORS_MAX for _, count, _ in ranges):
            raise Failed(S_IOERR)
        checked = [(self._checked(sector, count * SECTOR), count * SECTOR, given) for sector, count, given in ranges]
        return [one for one in checked if one[1]]


def _after(views: Sequence[memoryview], skip: int) -> list[memoryview]:
    """Return the views without their first `skip` bytes."""
    for number, view in enumerate(views):
        if skip < len(view):
            return [view[skip:], *views[number + 1 :]] if skip else list(views[number:])
        skip -= len(view)
    return []


def _transfer(call: Any, fd: int, views: list[memoryview], offset: int, length: int, flags: int) -> None:
    """Read or write all of `views`, `length` bytes, at `offset`; system calls may move less than they were asked to."""
    while length:
        done = call(fd, views, offset, flags)
        if not done:
            raise OSError(errno.EIO, "the file is shorter than it was")
        offset += done
        length -= done
        if length:
            views = _after(views, done)


def _write_zeros(fd: int, offset: int, length: int) -> None:
    while length:
        done = os.pwrite(fd, ZEROS[:length], offset)
        offset += done
        length -= done
