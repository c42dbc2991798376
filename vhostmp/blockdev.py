"""What the kernel says of a block device: its size, blocks, what it likes best, and whether it can discard.

Rules: all of it is asked of the open descriptor, but for discards, of which only sysfs speaks; where that is not to be
seen the device is taken for one that cannot.

Source: Linux, include/uapi/linux/fs.h, Documentation/ABI/stable/sysfs-block.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

import attrs

SYSFS: Final = Path("/sys/dev/block")
# linux/fs.h
BLKGETSIZE64: Final = 0x80081272
BLKROGET: Final = 0x125E
BLKSSZGET, BLKIOMIN, BLKIOOPT, BLKALIGNOFF, BLKPBSZGET = 0x1268, 0x1278, 0x1279, 0x127A, 0x127B


@attrs.frozen
class BlockDevice:
    """Limits of a block device, in bytes."""

    read_only: bool
    """It may be open for writing all the same: the writes fail then."""
    size: int
    logical: int
    """The smallest block that it reads or writes."""
    physical: int
    """The smallest block that it writes without reading it first."""
    min_io: int
    """What it likes requests to be a multiple of."""
    opt_io: int
    """What it likes requests to be; 0: it does not say."""
    alignment_offset: int
    """Where its first physical block begins."""
    discard_granularity: int
    """What a discard should be aligned to and a multiple of; 0: it cannot discard."""


def measure(fd: int) -> BlockDevice:
    """Ask for all that; `fd` is of a block device. OSError when the device does not answer."""
    logical = _ask(fd, BLKSSZGET)
    physical = max(logical, _ask(fd, BLKPBSZGET))
    (size,) = struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))
    return BlockDevice(
        bool(_ask(fd, BLKROGET)),
        size,
        logical,
        physical,
        min_io=max(physical, _ask(fd, BLKIOMIN)),
        opt_io=_ask(fd, BLKIOOPT),
        alignment_offset=max(0, _ask(fd, BLKALIGNOFF)),  # -1: misaligned for good
        discard_granularity=max(logical, _queue(fd, "discard_granularity")) if _queue(fd, "discard_max_bytes") else 0,
    )


def _ask(fd: int, request: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0])


def _queue(fd: int, name: str) -> int:
    """Return a number that sysfs has of the device's queue, a partition's being that of its disk; 0 without one."""
    number = os.fstat(fd).st_rdev
    device = SYSFS / f"{os.major(number)}:{os.minor(number)}"
    for folder in (device, device / ".."):
        try:
            return int((folder / "queue" / name).read_text())
        except (OSError, ValueError):
            continue
    return 0
