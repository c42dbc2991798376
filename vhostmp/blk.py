"""The block device: virtio 1.3, 5.2. Back-ends: `file:PATH[,readonly][,share]`, a file or a block device.

Rules: the file is opened, locked and measured here; workers get its descriptor. It is locked with an open file
description lock, which ends with the last descriptor: two writers of one image destroy it, so the second is refused
unless both said `share`. Only advisory locks are meant: a program that takes none is not kept away.

A block device that is written to is opened for us alone (O_EXCL), which keeps mounts away too.

What the disk can do is told to the guest when it starts, so a swap must not take any of it away. It may grow while
there is a front-end, which is then told so; it does not shrink. A swap to the image that is in use measures it again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import attrs

from vhostmp import blockdev
from vhostmp.consts import (
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
    feature_names,
    mask,
)
from vhostmp.errors import LocalError, SysError
from vhostmp.kept_device import KeptDevice
from vhostmp.requests import RequestDevice, RequestSetup, requests_of
from vhostmp.workers.devices._fallocate import punch_hole
from vhostmp.workers.devices.blk import RANGE_SECTORS_MAX, RANGES_MAX, SECTOR, SEG_MAX, SIZE_MAX
from vhostmp.workers.devices.flusher import new_note

if TYPE_CHECKING:
    from vhostmp.supervisor import Pool

REFERENCE: Final = "vhostmp.workers.devices.blk:Blk"

#: struct virtio_blk_config, 5.2.4, up to and with the limits of write-zeroes.
CONFIG: Final = struct.Struct("<QII4xIBBHIBxHIIIIIB3x")
WRITEBACK_OFFSET: Final = 32
BLOCK_SIZES: Final = (512, 1 << 20)


@attrs.define(eq=False)
class Disk(RequestSetup):
    """An open image."""

    reopened: ClassVar = frozenset((1,))
    """The note of its flushes, which is locked."""
    sectors: int = 0
    block_bytes: int = SECTOR
    physical_bytes: int = SECTOR
    min_io_bytes: int = SECTOR
    opt_io_bytes: int = 0
    alignment_offset: int = 0
    discard_bytes: int = 0
    """What a discard is best aligned to and a multiple of; 0: there are none."""
    read_only: bool = False
    is_device: bool = False
    write_back: bool = True
    """Whether writes may stay in the host's memory until the guest flushes: what it last wrote to `writeback`."""

    def features(self) -> int:
        """Return the feature bits that it can carry, but for MQ."""
        bits = [
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_CONFIG_WCE,
        ]
        if self.read_only:
            bits.append(VIRTIO_BLK_F_RO)
        else:
            bits.append(VIRTIO_BLK_F_WRITE_ZEROES)
        if self.discard_bytes:
            bits.append(VIRTIO_BLK_F_DISCARD)
        return mask(bits)

    def config(self, num_queues: int) -> bytes:
        """Return the configuration space."""
        none, ranges = (0, 0), (RANGE_SECTORS_MAX, RANGES_MAX)
        return CONFIG.pack(
            self.sectors,
            SIZE_MAX,
            SEG_MAX,
            self.block_bytes,
            (self.physical_bytes // self.block_bytes).bit_length() - 1,
            min(self.alignment_offset // self.block_bytes, 0xFF),
            min(self.min_io_bytes // self.block_bytes, 0xFFFF),
            self.opt_io_bytes // self.block_bytes,
            self.write_back,
            num_queues,
            *(ranges if self.discard_bytes else none),
            self.discard_bytes // SECTOR,
            *(none if self.read_only else ranges),
            self.discard_bytes != 0,  # write_zeroes_may_unmap
        )

    def for_guest(self, features: int) -> Mapping[str, Any]:
        """Return the arguments of the object that serves a guest with these features.

        A guest that can neither flush nor set the mode must find what it wrote on stable storage (5.2.6.2).
        """
        cached = (
            self.write_back if features >> VIRTIO_BLK_F_CONFIG_WCE & 1 else bool(features >> VIRTIO_BLK_F_FLUSH & 1)
        )
        return {
            "sectors": self.sectors,
            "read_only": self.read_only,
            "write_through": not cached,
            "device_block": self.block_bytes if self.is_device else 0,
            "discards": self.discard_bytes != 0,
            "serial": self.serial(),
        }

    def serial(self) -> str:
        """Return what the guest is told for a serial number: the file's name, 20 bytes of it."""
        return os.path.basename(self.spec.removeprefix("file:").split(",")[0])[:20]


class BlkDevice(RequestDevice):
    """A disk with `num_queues` queues that are all the same (5.2.2)."""

    device_class = "blk"
    #: Whether workers may have another mode than is on record.
    _is_outdated = False

    def __init__(
        self, pool: Pool, *, backend: str, num_queues: int = 1, name: str = "0", kept: KeptDevice | None = None
    ) -> None:
        """Open and lock the image, and register with the pool. LocalError or SysError in one line; nothing is left.

        `kept`: go on with the device that was found, whose lock is held by its descriptors.
        """
        disk = open_disk(backend) if kept is None else requests_of(kept)
        assert isinstance(disk, Disk)
        features = disk.features() | (1 << VIRTIO_BLK_F_MQ if num_queues > 1 else 0)
        super().__init__(pool, setup=disk, name=name, num_queues=num_queues, features=features, kept=kept)
        self.config = disk.config(num_queues)

    def settle_adopted(self, kept: KeptDevice) -> None:
        """As for every device; and have workers use the mode on record, which may be newer than their back-end."""
        super().settle_adopted(kept)
        self._is_outdated = self._state.live
        if not self.unsynchronized:
            self._renew_mode()

    def _settle(self) -> None:
        super()._settle()
        self._renew_mode()

    def _renew_mode(self) -> None:
        if self._is_outdated:
            self._renew_backend()
            self._is_outdated = False

    def write_config(self, offset: int, data: bytes) -> None:
        """Take what the driver writes: the byte `writeback` (5.2.5.1).

        After the return every write is done in the new mode. EPERM for anything else.
        """
        if (offset, len(data)) != (WRITEBACK_OFFSET, 1) or data[0] > 1:
            raise LocalError(f"only writeback, byte {WRITEBACK_OFFSET}, can be written, with 0 or 1", errno.EPERM)
        with self._lock:
            before, self._disk.write_back = self._disk.write_back, bool(data[0])
            backend = self._state.backend
            try:
                self._renew_backend()
            except BaseException:
                self._disk.write_back = before
                if self._state.backend is not backend:  # in force in spite of a timeout, and not what was answered
                    part = self._setup.part(self._state.features)
                    self._state = attrs.evolve(self._state, backend=part)
                raise
            self.config = self._disk.config(self.num_queues)

    def stop_all(self) -> None:
        """The front-end is gone: the next one finds the mode as it was at first, too."""
        with self._lock:
            self._disk.write_back = True
            self._is_outdated = False
            self.config = self._disk.config(self.num_queues)
            super().stop_all()

    @property
    def _disk(self) -> Disk:
        assert isinstance(self._setup, Disk)
        return self._setup

    def _open(self, spec: str) -> Disk:
        """Open another image, for which the guest need not know more than that its disk has grown."""
        disk, old = open_disk(spec, self._disk), self._disk
        disk.write_back = old.write_back
        try:
            self._check_like(disk, old)
        except BaseException:
            disk.close()
            raise
        return disk

    def _check_like(self, disk: Disk, old: Disk) -> None:
        if missing := old.features() & ~disk.features():
            names = " ".join(feature_names(missing, self.device_class))
            raise LocalError(f"{disk.spec} has no {names}, which {old.spec} has: use an image that is like it")
        if disk.read_only != old.read_only:
            raise LocalError(f"{disk.spec} is read-only and {old.spec} is not: use an image that is like it")
        known = attrs.evolve(old, sectors=disk.sectors)
        if self._owned and (disk.sectors < old.sectors or disk.config(1) != known.config(1)):
            raise LocalError(
                f"{disk.spec} has {disk.sectors} sectors and blocks of {disk.physical_bytes} bytes, the guest knows a "
                f"disk of {old.sectors} and {old.physical_bytes}: use one that is not smaller"
            )

    def _swapped(self) -> None:
        """Tell the guest when its disk has grown."""
        before, self.config = self.config, self._disk.config(self.num_queues)
        if self.config != before and self.on_config_change is not None:
            self.on_config_change()


def kept_disk(values: dict[str, Any], fds: list[int]) -> Disk:
    """Return an image that a control process before us opened: its fields but for `fds`, which are taken over."""
    disk = Disk(**values, fds=fds)
    disk.arguments = disk.for_guest
    return disk


def open_disk(spec: str, held: Disk | None = None) -> Disk:
    """Open, lock and measure the image that `file:PATH[,readonly][,share]` names.

    When `held` is that very image, opened in the same way, the new disk shares its lock, and what
    became of its flushes.

    Raises LocalError or SysError in one line that says what to do; nothing is left open then.
    """
    path = spec.removeprefix("file:")
    flags = {"readonly": False, "share": False}
    while (head := path.rpartition(","))[2] in flags:
        flags[head[2]] = True
        path = head[0]
    if not spec.startswith("file:") or not path:
        raise LocalError(f"no image {spec!r}: use file:PATH, file:PATH,readonly or file:PATH,share")
    read_only = flags["readonly"]
    # O_NONBLOCK: a FIFO would hold us up before we see what it is; it means nothing for files and block devices.
    mode = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        status = os.stat(path)
        if held is not None and not (held.spec == spec and os.path.samestat(status, os.fstat(held.fds[0]))):
            held = None
        if stat.S_ISBLK(status.st_mode) and not read_only and not flags["share"]:
            mode |= os.O_EXCL
        fd = os.dup(held.fds[0]) if held is not None else os.open(path, mode)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _in_use(spec) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and not read_only:
            raise _cannot_write(spec, error.errno) from error
        if error.errno == errno.ENOENT:
            raise SysError(f"{spec}: no file {path}: {_advice(path)}", error.errno) from error
        raise SysError.wrap(spec, error) from error
    disk = Disk(spec, REFERENCE, [fd], read_only=read_only)
    disk.arguments = disk.for_guest
    try:
        disk.fds.append(os.dup(held.fds[1]) if held is not None else new_note())
        _measure(disk, fd)
        _lock(disk, fd, shared=read_only or flags["share"])
    except OSError as error:
        disk.close()
        raise SysError.wrap(spec, error) from error
    except BaseException:
        disk.close()
        raise
    return disk


def _advice(path: str) -> str:
    """Say what may be meant by a path that is not there."""
    known, comma, option = path.rpartition(",")
    if comma and os.path.exists(known):
        return f"and {option!r} is no option: those are readonly and share"
    return f"make one, say with truncate -s 1G {path}, or give another path"


def _measure(disk: Disk, fd: int) -> None:
    """Find out what the file is and how large. Raises LocalError when it is no disk, OSError."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        device = blockdev.measure(fd)
        if device.read_only and not disk.read_only:
            raise _cannot_write(disk.spec, errno.EROFS)
        size = device.size
        disk.is_device = True
        disk.block_bytes, disk.physical_bytes = device.logical, device.physical
        disk.min_io_bytes, disk.opt_io_bytes = device.min_io, device.opt_io
        disk.alignment_offset = device.alignment_offset
        disk.discard_bytes = 0 if disk.read_only else device.discard_granularity
    elif stat.S_ISREG(status.st_mode):
        size = status.st_size
        if 0 < status.st_blksize <= BLOCK_SIZES[1] and not status.st_blksize & (status.st_blksize - 1):
            disk.physical_bytes = disk.min_io_bytes = max(status.st_blksize, SECTOR)
        disk.discard_bytes = disk.physical_bytes if not disk.read_only and _punches(fd, size) else 0
    else:
        raise LocalError(f"{disk.spec}: neither a file nor a block device")
    disk.sectors = size // SECTOR
    if not disk.sectors:
        raise LocalError(f"{disk.spec}: {size} bytes, less than one sector: make it larger, say with truncate -s 1G")


def _punches(fd: int, size: int) -> bool:
    """Whether the file system can punch holes: tried behind the file's end, where there is nothing."""
    try:
        punch_hole(fd, (size + 4095) // 4096 * 4096, 4096)
    except OSError:
        return False
    return True


def _lock(disk: Disk, fd: int, *, shared: bool) -> None:
    """Lock the whole file. Raises LocalError when another user of it has a lock that excludes ours, OSError."""
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise _in_use(disk.spec) from error


def _cannot_write(spec: str, code: int) -> SysError:
    return SysError(f"{spec}: cannot be written ({os.strerror(code)}): use {spec},readonly", code)


def _in_use(spec: str) -> LocalError:
    return LocalError(
        f"{spec}: in use, mounted, or by another program or another device of ours: end that, "
        "or give both of them ,readonly or ,share",
        errno.EBUSY,
    )
