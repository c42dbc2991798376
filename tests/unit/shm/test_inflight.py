"""The region of what is in flight: what a front-end gets, and what of another back-end's is taken."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from vhostmp.errors import LocalError
from vhostmp.shm import inflight

QUEUES, SIZE = 2, 256
PART = 4160  # 16 bytes of header, 256 entries of 16, to the next multiple of 64


@pytest.fixture
def region() -> Iterator[int]:
    """A region of two queues."""
    fd, size = inflight.create(QUEUES, SIZE)
    assert size == QUEUES * PART
    yield fd
    os.close(fd)


def adopt(fd: int, *, offset: int = 0, size: int = QUEUES * PART) -> None:
    """Give a region back."""
    inflight.adopt(fd, offset, size, QUEUES, SIZE)


def test_a_new_region(region: int) -> None:
    """Each queue's part is begun (version 1), has nothing in flight, and the file cannot be made shorter or longer."""
    for index in range(QUEUES):
        data = os.pread(region, PART, index * PART)
        assert data == struct.pack("=QHHHH", 0, 1, SIZE, 0, 0).ljust(PART, b"\0")
    for size in (0, QUEUES * PART + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(region, size)
    adopt(region)


@pytest.mark.parametrize(
    ("at", "data", "why"),
    [
        (0, struct.pack("=QHHHH", 1, 1, SIZE, 0, 0), "queue 0 is of version 1 with features 0x1"),
        (PART, struct.pack("=QHHHH", 0, 2, SIZE, 0, 0), "queue 1 is of version 2"),
        (0, struct.pack("=QHHHH", 0, 1, 128, 0, 0), "and 128 entries"),
        (PART + 16 + 5 * 16, b"\1", "queue 1 has 1 chains in flight that another back-end took"),
        (16, b"\xff" * 255 * 16, "queue 0 has 255 chains"),
    ],
)
def test_what_is_not_taken(region: int, at: int, data: bytes, why: str) -> None:
    """Another layout, another queue size, and what another back-end has in flight, are refused; nothing is written."""
    os.pwrite(region, bytes(16), PART if at < PART else 0)  # a part that would be begun
    os.pwrite(region, data, at)
    before = os.pread(region, QUEUES * PART, 0)
    with pytest.raises(LocalError, match=why):
        adopt(region)
    assert os.pread(region, QUEUES * PART, 0) == before


def test_what_a_death_leaves_is_taken(region: int) -> None:
    """Positions of a last batch, counters and links of entries that are not in flight do not matter."""
    os.pwrite(region, struct.pack("=QHHHH", 0, 1, SIZE, 7, 99), 0)
    os.pwrite(region, struct.pack("=B5xHQ", 0, 65535, 12345), 16 + 7 * 16)
    adopt(region)


def test_a_part_that_nobody_began(region: int) -> None:
    """A part of version 0 is begun."""
    os.pwrite(region, bytes(PART), PART)
    adopt(region)
    assert os.pread(region, 16, PART) == struct.pack("=QHHHH", 0, 1, SIZE, 0, 0)


def test_places(region: int) -> None:
    """A region lies in its file, at any offset, with room for its queues."""
    with pytest.raises(LocalError, match="are too few for 2 queues of 256: 8320"):
        adopt(region, size=QUEUES * PART - 1)
    with pytest.raises(LocalError, match="the file has 0x2080 bytes, offset \\+ size is 0x2081"):
        adopt(region, offset=1)
    fd = os.memfd_create("large", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 3 * PART)
        adopt(fd, offset=PART)
        assert os.pread(fd, 10, PART)[8:] == b"\1\0"
        assert os.pread(fd, 10, 0) == bytes(10)
    finally:
        os.close(fd)


def test_what_might_block_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe, and a file that is not in memory, are refused before they are read, or asked for their size."""

    def waits(fd: int) -> os.stat_result:
        raise AssertionError("a file system in user space may take its time to answer this")

    read, write = os.pipe()
    with open("/proc/self/status", "rb") as file:  # a regular file, made up by whoever serves it
        for fd in (read, file.fileno()):
            with monkeypatch.context() as patch:
                patch.setattr(os, "fstat", waits)
                with pytest.raises(LocalError, match="not one of shared memory"):
                    adopt(fd)
    os.close(read)
    os.close(write)
