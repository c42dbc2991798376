"""The region in which a back-end notes what it has in flight, shared with the front-end (vu "Inflight I/O tracking").

A queue's part of it is a header and an entry for each descriptor; the specification has the layout and the order of
stores, one for each format of ring.

*Split.* Our devices give chains back in the order in which they took them. So what is in flight is, at any instant and
after any death, what lies in the available ring behind the used index, and a ring that is started takes just that up
again: no entry ever needs to be marked, and nothing is written while packets flow. The header says so to whoever reads
it: version 1, nobody in flight. That its `used_idx` is behind the ring's is what a back-end leaves that died within a
batch, and taking that last batch back clears entries that are clear. Another back-end's region is taken only when it
has nothing in flight: what a device that works out of order had not finished cannot be told from the rings alone.
Nothing here is mapped: a region is read once, when it comes, and its headers are written.

This is for the day on which all of us have died. While the control process lives, a worker's replacement goes by the
ring's own journal, which every ring has and which no front-end can write (workers/_journal.pxd).

*Packed.* There is no used index in guest memory, and used descriptors destroy what they are written over. So workers
map the region and write it while packets flow (workers/_inflight.pyx), and find there what any back-end left. Here a
region is made, all zeros, which is one that nobody has begun; and of one that comes only the size is looked at.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from typing import Final

from vhostmp.errors import LocalError
from vhostmp.shm.segment import is_memory

#: Region layout of a split ring: features, version, desc_num, last_batch_head, used_idx.
HEADER: Final = struct.Struct("=QHHHH")
ENTRY_BYTES: Final = 16
#: Bytes of header and entry of a packed ring (`queue_region`, `desc_state` in workers/_vring.pxd).
PACKED_HEADER_BYTES: Final = 32
PACKED_ENTRY_BYTES: Final = 32
ALIGNMENT: Final = 64
VERSION: Final = 1

assert HEADER.size == ENTRY_BYTES


def queue_bytes(queue_size: int, *, packed: bool = False) -> int:
    """Return the bytes of one queue's part: header and `queue_size` entries, to the next cache line."""
    header, entry = (PACKED_HEADER_BYTES, PACKED_ENTRY_BYTES) if packed else (HEADER.size, ENTRY_BYTES)
    return (header + queue_size * entry + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def create(num_queues: int, queue_size: int, *, packed: bool = False) -> tuple[int, int]:
    """Make a region in memory that cannot change its size. Returns: descriptor, the caller's, and bytes. OSError."""
    size = num_queues * queue_bytes(queue_size, packed=packed)
    fd = os.memfd_create("vhostmp-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        for index in range(0 if packed else num_queues):
            os.pwrite(fd, HEADER.pack(0, VERSION, queue_size, 0, 0), index * queue_bytes(queue_size))
    except BaseException:
        os.close(fd)
        raise
    return fd, size


def check_place(fd: int, offset: int, size: int, num_queues: int, queue_size: int, *, packed: bool = False) -> None:
    """Check that a region lies in its file, with room for its queues. LocalError when it does not; OSError."""
    needed = num_queues * queue_bytes(queue_size, packed=packed)
    if size < needed:
        raise LocalError(f"{size} bytes are too few for {num_queues} queues of {queue_size}: {needed}")
    # First: even to ask another file for its size may wait for whatever serves it.
    status = os.fstat(fd) if is_memory(fd) else None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise LocalError("the descriptor is not one of shared memory")
    if status.st_size < offset + size:
        raise LocalError(f"the file has {status.st_size:#x} bytes, offset + size is {offset + size:#x}")


def adopt(fd: int, offset: int, size: int, num_queues: int, queue_size: int) -> None:
    """Take a region of split rings that a front-end gives back, ours or another back-end's; `fd` is borrowed.

    A queue's part that nobody has begun (version 0) is begun. LocalError: it is too small for its queues, not in shared
    memory, not of version 1 and this queue size, or has something in flight; nothing is written then.
    """
    part = queue_bytes(queue_size)
    fresh: list[int] = []
    try:
        check_place(fd, offset, size, num_queues, queue_size)
        for index in range(num_queues):
            data = os.pread(fd, HEADER.size + queue_size * ENTRY_BYTES, offset + index * part)
            features, version, entries, _, _ = HEADER.unpack_from(data)
            if not version:
                fresh.append(index)
            elif (features, version, entries) != (0, VERSION, queue_size):
                raise LocalError(
                    f"queue {index} is of version {version} with features {features:#x} and {entries} entries"
                )
            elif busy := sum(map(bool, data[HEADER.size :: ENTRY_BYTES])):
                raise LocalError(f"queue {index} has {busy} chains in flight that another back-end took")
        for index in fresh:
            os.pwrite(fd, HEADER.pack(0, VERSION, queue_size, 0, 0), offset + index * part)
    except struct.error as error:
        raise LocalError("the file became shorter while it was read") from error
    except OSError as error:
        raise LocalError(f"the region cannot be used: {error.strerror}", error.errno or errno.EIO) from error
