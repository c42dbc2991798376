"""The thread that flushes a disk: who waits for what, and what becomes of a failure."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

import pytest

from tests.helpers import PATIENCE, wait_until
from vhostmp.workers.channel import is_readable
from vhostmp.workers.devices.blk import HEADER, ITEM_BYTES, T_FLUSH, T_WRITE_ZEROES, Blk
from vhostmp.workers.devices.flusher import Flusher, new_note


class Disk:
    """A file whose flushes the test lets go one by one, and makes fail."""

    def __init__(self) -> None:
        """Open what a flusher is given."""
        self.fd = os.memfd_create("disk")
        self.note = new_note()
        self.done = os.eventfd(0, os.EFD_NONBLOCK)
        self.entered = 0
        self.go = threading.Semaphore(0)
        self.error = 0

    def flusher(self) -> Flusher:
        """Return one worker's, which has an open file of its own for the note."""
        note = os.open(f"/proc/self/fd/{self.note}", os.O_RDWR)
        try:
            return Flusher(self.fd, note, self.done, self.sync)
        finally:
            os.close(note)

    def sync(self, fd: int) -> None:
        """Flush."""
        assert os.path.samestat(os.fstat(fd), os.fstat(self.fd))
        self.entered += 1
        assert self.go.acquire(timeout=PATIENCE)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def disk() -> Iterator[Disk]:
    """A disk."""
    made = Disk()
    yield made
    for fd in (made.fd, made.note, made.done):
        os.close(fd)


def outcome(flusher: Flusher, who: int) -> int:
    """Wait for what somebody asked for."""
    found: list[int] = []

    def done() -> bool:
        if (result := flusher.take(who)) is not None:
            found.append(result)
        return bool(found)

    wait_until(done, what="the flush")
    return found[0]


def no_thread(thread: threading.Thread) -> None:
    """Do what `start` does where there is no room for a thread."""
    raise RuntimeError("can't start new thread")


def test_a_flush_that_runs_does_not_cover_what_comes_later(disk: Disk) -> None:
    """Who asks while a flush runs gets the next one, with all others who do; each outcome is taken once."""
    flusher = disk.flusher()
    flusher.begin(0)
    wait_until(lambda: disk.entered, what="the first flush")
    for who in (1, 2, 3):
        flusher.begin(who)
    assert [flusher.take(who) for who in range(4)] == [None] * 4
    disk.go.release()
    assert outcome(flusher, 0) == 0
    assert is_readable(disk.done)
    wait_until(lambda: disk.entered == len("12"), what="the second flush")
    assert [flusher.take(who) for who in (1, 2, 3)] == [None] * 3
    disk.go.release()
    assert [outcome(flusher, who) for who in (1, 2, 3)] == [0] * 3
    assert disk.entered == len("12")
    assert not any(map(flusher.begun, range(4)))
    flusher.close()


def test_one_who_asks_again_gets_a_new_flush(disk: Disk) -> None:
    """What was asked for before is forgotten, done or not: its outcome is never taken for that of a later flush."""
    flusher = disk.flusher()
    flusher.begin(0)
    wait_until(lambda: disk.entered, what="the first flush")
    flusher.begin(0)
    disk.go.release()
    wait_until(lambda: disk.entered == len("12"), what="the second flush")
    assert flusher.take(0) is None
    disk.go.release()
    assert outcome(flusher, 0) == 0
    flusher.close()


def test_a_failure_is_for_good(disk: Disk) -> None:
    """After a flush that failed each one of the disk fails, in every worker, though the kernel has told one alone."""
    first, second = disk.flusher(), disk.flusher()
    first.begin(0)
    wait_until(lambda: disk.entered, what="the first flush")
    second.begin(0)  # the other worker's, while the first one runs: it must not succeed
    disk.error = errno.EIO
    disk.go.release()
    assert outcome(first, 0) == outcome(second, 0) == errno.EIO
    disk.error = 0
    for flusher in (first, second, disk.flusher()):
        flusher.begin(1)
        assert outcome(flusher, 1) == errno.EIO
        flusher.close()
    assert disk.entered == 1


def test_close_does_not_wait(disk: Disk) -> None:
    """A flusher that is closed leaves nothing behind once its flush has ended, and nobody waits for that."""
    before = len(os.listdir("/proc/self/fd"))
    flusher = disk.flusher()
    flusher.begin(0)
    wait_until(lambda: disk.entered, what="the flush")
    flusher.begin(1)
    flusher.close()
    assert len(os.listdir("/proc/self/fd")) > before
    disk.go.release()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before, what="the descriptors")
    disk.flusher().close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert disk.entered == 1


def test_a_thread_that_does_not_start(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for a thread the flush is refused, and the next one tries again."""
    flusher = disk.flusher()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            flusher.begin(0)
    assert not flusher.begun(0)
    disk.go.release()
    flusher.begin(0)
    assert outcome(flusher, 0) == 0
    flusher.close()


class Given:
    """A request as `Blk.process` gets it, with room for a status alone."""

    def __init__(self, kind: int, *, again: bool = False) -> None:
        """`again`: it was left over by the call before."""
        self.kind = kind
        self.again = again
        self.writable = [memoryview(bytearray(1))]
        self.writable_bytes = 1
        self.written = 0

    def read(self, start: int, size: int) -> bytes:
        """Return the header."""
        return HEADER.pack(self.kind, 0, 0)[start : start + size]


def test_a_flush_is_not_that_of_another_request(disk: Disk) -> None:
    """A flush whose request does not come again, since its ring was reset, is not taken for that of a later one."""
    blk = Blk(disk.fd, disk.note, sectors=1, read_only=False)
    blk.flusher.close()
    blk.flusher = disk.flusher()

    def costly(request: object, sector: int, room: list[memoryview]) -> int:
        blk.cost = ITEM_BYTES
        return 0

    blk.actions[T_WRITE_ZEROES] = costly
    assert blk.process(0, [Given(T_FLUSH)]) == 0
    disk.go.release()
    assert is_readable(disk.done, PATIENCE)
    assert blk.process(0, [Given(T_WRITE_ZEROES), Given(T_FLUSH)]) == 1
    assert blk.process(0, [Given(T_FLUSH, again=True)]) == 0, "it has not asked for one yet"
    disk.go.release()
    wait_until(lambda: blk.process(0, [Given(T_FLUSH, again=True)]) == 1, what="its own flush")
    assert disk.entered == len("12")
    blk.close()
