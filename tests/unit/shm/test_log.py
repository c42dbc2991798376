"""The compiled dirty log: which bit, what is outside, and the order of a write and its bit."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import native
from tests.helpers import PATIENCE
from vhostmp.errors import SysError
from vhostmp.shm._log import LogMap

PAGE: Final = 4096
FILE_BYTES: Final = 3 * PAGE
ROUNDS: Final = 300_000


@pytest.fixture
def file() -> Iterator[int]:
    """A memfd of three pages."""
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    os.truncate(fd, FILE_BYTES)
    yield fd
    os.close(fd)


def bits(fd: int, start: int = 0, size: int = FILE_BYTES) -> set[int]:
    """Return the numbers of the bits that are set in a part of the file."""
    data = int.from_bytes(os.pread(fd, size, start), "little")
    return {bit for bit in range(8 * size) if data >> bit & 1}


@pytest.mark.parametrize(
    ("gpa", "size", "pages"),
    [
        (0, 1, {0}),
        (4095, 1, {0}),
        (4095, 2, {0, 1}),
        (4096, 4096, {1}),
        (4097, 4096, {1, 2}),
        (7 * PAGE, PAGE, {7}),
        (8 * PAGE, 1, {8}),
        (9 * PAGE + 5, 20 * PAGE, set(range(9, 30))),
        (123, 0, set[int]()),
    ],
)
def test_which_bits(file: int, gpa: int, size: int, pages: set[int]) -> None:
    """The bit of page n is bit n % 8 of byte n // 8; every page touched is set, none beside."""
    log = LogMap(file, FILE_BYTES)
    assert log.mark(gpa, size) == (len(pages), 0)
    assert bits(file) == pages
    assert log.mark(gpa, size) == (0, 0), "they are set already"
    log.close()


@given(st.integers(0, 40 * PAGE), st.integers(0, 5 * PAGE), st.integers(0, 2000), st.integers(1, 4))
def test_offset_and_end(file: int, gpa: int, size: int, offset: int, length: int) -> None:
    """A log at any offset of its file is written inside its length alone; what lies beyond is counted."""
    os.pwrite(file, bytes(FILE_BYTES), 0)
    log = LogMap(file, length, PAGE + offset)
    found, outside = log.mark(gpa, size)
    log.close()
    touched = set(range(gpa // PAGE, (gpa + size - 1) // PAGE + 1)) if size else set[int]()
    inside = {page for page in touched if page < 8 * length}
    assert bits(file, PAGE + offset, length) == inside
    assert len(bits(file)) == len(inside) == found
    assert outside == len(touched) - len(inside)


def test_wrapping_range(file: int) -> None:
    """A range that wraps, or lies at the end of the address space, sets nothing and is counted."""
    log = LogMap(file, FILE_BYTES)
    assert log.mark((1 << 64) - 1, 2) == (0, 1)
    assert log.mark((1 << 64) - 1, 1) == (0, 1)
    assert log.mark((1 << 64) - PAGE, PAGE) == (0, 1)
    pages = (1 << 52) - 8 * FILE_BYTES
    assert log.mark(8 * FILE_BYTES * PAGE, (1 << 64) - 8 * FILE_BYTES * PAGE) == (0, pages)
    assert bits(file) == set()
    log.close()


def test_no_log() -> None:
    """Without a file everything is outside."""
    assert LogMap().mark(0, 2 * PAGE) == (0, 2)


def test_other_bits_stay(file: int) -> None:
    """What others set in the same byte stays."""
    with mmap.mmap(file, FILE_BYTES) as shared:
        shared[0] = 0b1010_0001
        log = LogMap(file, FILE_BYTES)
        assert log.mark(PAGE, PAGE) == (1, 0)
        assert bits(file) == {0, 1, 5, 7}
        log.close()


def test_cannot_be_mapped() -> None:
    """A descriptor that is no file is an error in one line."""
    fd = os.eventfd(0)
    try:
        with pytest.raises(SysError, match="cannot map a dirty log of 8 bytes at 0x0"):
            LogMap(fd, 8)
    finally:
        os.close(fd)


def race(*, ordered: bool) -> tuple[int, int]:
    """Let writer and front-end meet; return how many writes were lost and how often the bit was left as it was."""
    game = native.load(Path(__file__).with_name("_cleaner.pyx")).Race(ordered)
    cleaner = threading.Thread(target=game.clean)
    cleaner.start()
    game.write(ROUNDS, 1 if not ordered else ROUNDS)
    cleaner.join(PATIENCE)
    return game.lost, game.skipped


@pytest.mark.slow
def test_no_write_is_lost_to_a_cleaner() -> None:
    """Whether the bit is found set or clear, a write is in the front-end's copy or its bit is set afterwards."""
    lost, skipped = race(ordered=True)
    assert lost == 0
    assert skipped > 0, "the two never met"


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="takes two processors")  # noqa: PLR2004
def test_without_the_fence_writes_are_lost() -> None:
    """Where the look at the bit may come before the write, the test above sees writes lost: it is worth something."""
    assert race(ordered=False)[0] > 0
