"""Files of frames between two workers: what comes out is what went in, and no more than a port can have kept."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Generator
from contextlib import contextmanager

import pytest

from vhostmp.shm.segment import anonymous_file, is_memory
from vhostmp.workers import leftover


@contextmanager
def closing(fd: int) -> Generator[int]:
    """Close a descriptor at the end."""
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("frames", [[], [b"a"], [b"old", b"", b"new" * 20000]])
def test_there_and_back(frames: list[bytes]) -> None:
    """Frames come out as they went in, oldest first."""
    with closing(leftover.to_file(frames)) as fd:
        assert is_memory(fd)
        assert leftover.from_file(fd) == frames


@pytest.mark.parametrize(
    ("size", "count"), [(1, 2 * leftover.FRAMES_MAX), (1 << 20, 2 * leftover.BYTES_MAX >> 20)], ids=["many", "large"]
)
def test_a_back_end_with_too_much(size: int, count: int) -> None:
    """Of frames that are too many, or too large together, the oldest remain, whole."""
    with closing(leftover.to_file(bytes([turn % 256]) * size for turn in range(count))) as fd:
        frames = leftover.from_file(fd)
    assert 0 < len(frames) < count
    assert frames == [bytes([turn % 256]) * size for turn in range(len(frames))]


def test_a_file_of_any_size() -> None:
    """A file as long as a file can be, of which nothing is written, is no MemoryError; nor are frames without end."""
    with closing(anonymous_file(b"")) as fd:
        os.truncate(fd, 1 << 40)
        assert leftover.from_file(fd) == [b""] * leftover.FRAMES_MAX


def test_a_length_beyond_the_end() -> None:
    """A frame that says to be longer than the file ends with it."""
    with closing(anonymous_file(struct.pack("=I", 1 << 31) + b"all")) as fd:
        assert leftover.from_file(fd) == [b"all"]


def _file() -> int:
    return os.open("/proc/self/status", os.O_RDONLY)


def _pipe() -> int:
    reads, writes = os.pipe()
    os.close(writes)
    return reads


def _socket() -> int:
    return socket.socket(socket.AF_UNIX).detach()


@pytest.mark.parametrize("make", [_file, _pipe, _socket])
def test_no_file_in_memory(make: Callable[[], int]) -> None:
    """What a disk, a pipe or a peer has to bring is told from what is in memory, before it is read."""
    with closing(make()) as fd:
        assert not is_memory(fd)
