"""The keeper: what becomes of records when something cannot be kept."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import pytest

from vhostmp.errors import LocalError, WorkerDied
from vhostmp.keeper import POOL, WHOLE, Keeper
from vhostmp.shm.records import Record


class FakeStore:
    """A store that keeps names, as long as there is room: one that cannot be made anew, as systemd's."""

    def __init__(self, room: int = 100) -> None:
        """Hold nothing yet."""
        self.room = room
        self.names: set[str] = set()
        self.is_left = False

    def put(self, fds: Mapping[str, int]) -> None:
        """Keep names, all or none."""
        if len(self.names | fds.keys()) > self.room:
            raise WorkerDied("there is no room")
        self.names |= fds.keys()

    def drop(self, names: Iterable[str]) -> None:
        """Keep some no longer."""
        self.names -= set(names)

    def settle(self, timeout: float, paths: Sequence[str]) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""

    def kill(self) -> None:
        """Do nothing."""

    def goodbye(self) -> None:
        """Drop everything."""
        self.names.clear()
        self.is_left = True

    def handover(self) -> dict[str, int]:
        """Return none."""
        return {}

    def detach(self) -> None:
        """Leave everything."""
        self.is_left = True


@pytest.fixture
def event() -> Iterator[int]:
    """A descriptor."""
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def test_what_words_speak_of_is_not_kept(event: int) -> None:
    """Where the descriptors of a message cannot be kept, and no other store can be made, nothing is: all or none.

    The words of the record say how many there are, and the next control process could not do the message without.
    """
    store = FakeStore(room=3)
    with contextlib.closing(Keeper(store)) as keeper:
        keeper.write("device.0", {}, {"connection.1": event})
        keeper.put({"inbox.1.0": event})
        assert store.names == {"record.device.0", "connection.1", "inbox.1.0"}
        assert not keeper.is_lost
        keeper.put({"inbox.2.0": event})
        assert keeper.is_lost
        assert (store.names, store.is_left) == (set(), True)
        keeper.put({"inbox.3.0": event})
        keeper.write("device.0", {}, {"connection.1": event})
        assert store.names == set(), "nothing is put into a store that was let go of"


def test_no_descriptor_for_a_duplicate(event: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where it is we who have no descriptor left to keep one by."""
    store = FakeStore()
    with contextlib.closing(Keeper(store)) as keeper:
        keeper.write("device.0", {}, {"connection.1": event})
        with monkeypatch.context() as patch:
            patch.setattr("vhostmp.keeper.fcntl.fcntl", refuse)
            keeper.put({"inbox.1.0": event})
        assert keeper.is_lost
        assert store.names == set()


def whole(keeper: Keeper) -> bool:
    """Whether the record of the pool says that a next control process can go on."""
    plain = Record(os.dup(keeper.record(POOL).fd))
    with contextlib.closing(plain):
        found = plain.read()
    assert found is not None
    assert found["pid"] == 1
    return bool(found[WHOLE])


def test_a_record_that_is_behind(event: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a record could not be written as things are, that of the pool says that nobody can go on by them.

    Where the store could be made anew, that is: the next start begins anew, and is not refused.
    """
    store = FakeStore()
    with contextlib.closing(Keeper(store, {}, FakeStore)) as keeper:
        keeper.write(POOL, {"pid": 1, WHOLE: True}, {})
        keeper.write("device.0", {}, {"connection.1": event})
        assert whole(keeper)
        with monkeypatch.context() as patch:
            patch.setattr("vhostmp.keeper.fcntl.fcntl", refuse)
            keeper.write("device.0", {}, {"connection.2": event})
            assert not whole(keeper)
            keeper.write(POOL, {"pid": 1, WHOLE: True}, {})
            assert not whole(keeper), "whatever it says of itself"
        keeper.write("device.0", {}, {"connection.3": event})
        assert whole(keeper)
        assert store.names == {"record.pool", "record.device.0", "connection.3"}, "nothing stays that nobody names"
        assert not keeper.is_lost


def test_a_record_that_was_not_put(event: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record whose first write failed before the store had it is put by the next one, and only then all is whole."""
    store = FakeStore()
    with contextlib.closing(Keeper(store, {}, FakeStore)) as keeper:
        keeper.write(POOL, {"pid": 1, WHOLE: True}, {})
        with monkeypatch.context() as patch:
            patch.setattr("vhostmp.keeper.fcntl.fcntl", refuse)
            keeper.record("device.0")  # its words are somebody's from now on
            assert not whole(keeper)
        record = keeper.record("device.0")
        keeper.write("device.0", {}, {"connection.1": event})
        assert whole(keeper)
        assert store.names == {"record.pool", "record.device.0", "connection.1"}
        assert keeper.record("device.0") is record


def test_whole_is_never_said_too_early(event: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a record is behind, not even for an instant does the pool's say that all are whole: we may die in it."""
    with contextlib.closing(Keeper(FakeStore(), {}, FakeStore)) as keeper:
        keeper.write(POOL, {"pid": 1, WHOLE: True}, {})
        keeper.write("device.0", {}, {})
        said: list[object] = []
        write = Record.write

        def listen(record: Record, plain: dict[str, object]) -> None:
            said.append(plain.get(WHOLE))
            write(record, plain)

        with monkeypatch.context() as patch:
            patch.setattr("vhostmp.keeper.fcntl.fcntl", refuse)
            keeper.write("device.0", {}, {"connection.1": event})
        with monkeypatch.context() as patch:
            patch.setattr(Record, "write", listen)
            keeper.write(POOL, {"pid": 1, WHOLE: True}, {})
        assert said == [False]
        keeper.write("device.0", {}, {"connection.1": event})
        assert whole(keeper)


def refuse(*arguments: object) -> int:
    """Have no descriptor left."""
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(arguments))


def test_what_was_not_kept_is_said() -> None:
    """A descriptor that a record names and nobody kept is one line, which says what to do."""
    with (
        contextlib.closing(Keeper(FakeStore())) as keeper,
        pytest.raises(LocalError, match=r"inbox\.1\.0 .* was not kept.*--adopt-timeout 0"),
    ):
        keeper.take("inbox.1.0")
