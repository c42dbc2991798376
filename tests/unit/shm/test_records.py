"""Records: whole at every instant, whoever is killed while writing them."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from vhostmp.errors import LocalError, SysError
from vhostmp.shm import records
from vhostmp.shm.records import CAPACITY, SIZE, Record


@pytest.fixture
def record() -> Iterator[Record]:
    """Return an empty record."""
    made = Record()
    yield made
    made.close()


def again(record: Record) -> Record:
    """Map a record once more, as another process does."""
    return Record(os.dup(record.fd))


def test_what_was_written_last_is_read(record: Record) -> None:
    """Nothing at first, then the last thing written, however often; a second reader goes on writing."""
    other = again(record)
    assert other.read() is None
    for number in range(5):
        record.write({"number": number, "text": "x" * number})
        assert record.read() is None  # nothing newer than what it wrote itself
    assert other.read() == {"number": 4, "text": "xxxx"}
    other.write({"number": 5})
    third = again(record)
    assert third.read() == {"number": 5}
    third.close()
    other.close()


class Killed(BaseException):
    """Nobody catches that."""


class Dying:
    """Memory of a writer that is killed after so many stores; of several bytes, in the middle of them."""

    def __init__(self, memory: memoryview, left: list[int]) -> None:
        """Begin; `left` is how many stores are left."""
        self.memory, self.left = memory, left

    def __setitem__(self, place: Any, value: Any) -> None:
        """Store, or be killed."""
        if not self.left[0]:
            if not isinstance(place, int):
                half = len(value) // 2
                self.memory[place.start : place.start + half] = value[:half]
            raise Killed
        self.left[0] -= 1
        self.memory[place] = value

    def __getitem__(self, place: int) -> int:
        """Load."""
        return self.memory[place]

    def release(self) -> None:
        """Let go of it."""
        self.memory.release()


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_half_written(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that is killed at any store of a record leaves the one before; who comes next goes on."""
    old = {"number": before, "text": "old"} if before else None
    stores = 0
    for stores in itertools.count():
        with contextlib.closing(Record()) as record:
            for number in range(1, before + 1):
                record.write({"number": number, "text": "old"})
            left = [stores]
            for name in ("_buf", "_words"):
                monkeypatch.setattr(record, name, Dying(getattr(record, name), left))
            try:
                record.write({"number": 4, "text": "new"})
            except Killed:
                is_killed = True
            else:
                is_killed = False
            with contextlib.closing(again(record)) as other, contextlib.closing(again(record)) as third:
                assert other.read() == (old if is_killed else {"number": 4, "text": "new"}), stores
                other.write({"number": 5})
                assert third.read() == {"number": 5}
        if not is_killed:
            break
    assert stores > len(("data", "size", "checksum", "number"))


def test_spoilt(record: Record) -> None:
    """A record that is not what was written is passed over for the one before."""
    for number in (1, 2):
        record.write({"number": number, "text": "here"})
    data = mmap.mmap(record.fd, SIZE)
    place = data.find(b'2,"text":"here"')
    data[place + len('2,"text":"h')] = ord("w")
    data.close()
    other = again(record)
    assert other.read() == {"number": 1, "text": "here"}
    other.close()


def test_too_long(record: Record) -> None:
    """A record that has no room is refused; the one before stays."""
    record.write({"number": 1})
    with pytest.raises(SysError, match="too long"):
        record.write({"text": "x" * CAPACITY})
    other = again(record)
    assert other.read() == {"number": 1}
    other.close()


def test_another_version(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of another version, or something that is none, is refused in one line, and closed."""
    monkeypatch.setattr(records, "VERSION", 2)
    with pytest.raises(LocalError, match="has format 1, and this program reads format 2: use the program"):
        again(record)
    nothing = os.memfd_create("nothing")
    os.ftruncate(nothing, SIZE)
    other = os.dup(nothing)
    with pytest.raises(LocalError, match="has format 0"):
        Record(nothing)
    monkeypatch.undo()
    os.pwrite(other, records.VERSION.to_bytes(8, sys.byteorder), 8)  # where a record has it
    with pytest.raises(LocalError, match="record of the server before"):
        Record(other)
    short = os.memfd_create("short")
    with pytest.raises(SysError, match="cannot map"):
        Record(short)


def test_words_are_apart(record: Record) -> None:
    """The owner's words and the record do not touch each other."""
    record.words[:] = b"\xff" * len(record.words)
    record.write({"number": 1})
    other = again(record)
    assert other.read() == {"number": 1}
    assert bytes(other.words) == b"\xff" * len(record.words)
    other.close()
