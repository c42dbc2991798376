"""Records: whole at every instant, whoever is killed while writing them."""

from __future__ import annotations

import os
from collections.abc import Iterator

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


@pytest.mark.parametrize("spoilt", ["number", "size", "checksum", "data"])
def test_half_written(record: Record, spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that dies in the middle of the second record, wherever, leaves the first."""
    record.write({"number": 1})
    stores = {"number": 0, "size": 1, "checksum": 2, "data": 0}[spoilt]
    store, done = Record._store, [0]  # pyright: ignore[reportPrivateUsage]

    class Killed(BaseException):
        pass

    def dying(self: Record, offset: int, value: int) -> None:
        if done[0] > stores:
            raise Killed
        done[0] += 1
        store(self, offset, value)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "_store", dying)
        with pytest.raises(Killed):
            record.write({"number": 2})
    other = again(record)
    assert other.read() == {"number": 1}
    other.write({"number": 3})
    third = again(record)
    assert third.read() == {"number": 3}
    third.close()
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
    with pytest.raises(LocalError, match="has version 1, this program needs 2"):
        again(record)
    nothing = os.memfd_create("nothing")
    os.ftruncate(nothing, SIZE)
    with pytest.raises(LocalError, match="has version 0"):
        Record(nothing)
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
