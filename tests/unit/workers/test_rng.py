"""The thread that reads a source of random bytes: it waits for what has nothing, and for what fails."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

import pytest

from tests.helpers import PATIENCE, wait_until
from vhostmp.workers.channel import is_readable
from vhostmp.workers.devices import rng
from vhostmp.workers.devices.rng import READ_BYTES, Reader


@pytest.fixture
def done() -> Iterator[int]:
    """An eventfd."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_nothing_is_read_that_nobody_asked_for(done: int) -> None:
    """A demand is one read of its size, up to a bound; what it brought is there for the next one."""
    sizes: list[int] = []

    def read(fd: int, size: int) -> bytes:
        sizes.append(size)
        return bytes([len(sizes)]) * size

    reader = Reader(done, done, read)
    for number, size in enumerate((1, 100, 1 << 20), 1):
        assert reader.take(size) == b""
        assert is_readable(done, PATIENCE)
        os.eventfd_read(done)
        assert reader.take(size) == bytes([number]) * min(size, READ_BYTES)
    reader.close()
    assert sizes == [1, 100, READ_BYTES]


def test_sources_that_have_nothing_or_fail(
    done: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A source that cannot be polled, is at its end or fails is read again after a while; a failure is told."""
    monkeypatch.setattr(rng, "EMPTY_SECONDS", 0.001)
    monkeypatch.setattr(rng, "FAILED_SECONDS", 0.002)
    outcomes: list[Exception | bytes] = [BlockingIOError(), BlockingIOError(), OSError(19, "No such device"), b"", b"x"]

    def read(fd: int, size: int) -> bytes:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    waits: list[float | None] = []

    class Noting(Reader):
        def _ends(self, seconds: float | None, *sources: int) -> bool:
            waits.append(seconds)
            return super()._ends(seconds, *sources)

    with open("/dev/zero", "rb") as source, caplog.at_level(logging.ERROR):  # which always says that it is readable
        reader = Noting(source.fileno(), done, read)
        assert reader.take(8) == b""
        assert is_readable(done, PATIENCE)
        assert reader.take(8) == b"x"
        reader.close()
    assert waits == [None, 0.001, 0.002, 0.002]
    assert [record.getMessage() for record in caplog.records] == [
        "source of random bytes: No such device (1 times so far)",
        "source of random bytes: is at its end (2 times so far)",
    ]


@pytest.mark.parametrize("asked", [False, True])
def test_close_ends_a_wait(done: int, asked: bool) -> None:
    """A reader that waits for a silent source ends at once when it is closed, and leaves nothing open."""
    before = len(os.listdir("/proc/self/fd"))
    silent, other = os.pipe2(os.O_NONBLOCK)
    reader = Reader(silent, done)
    if asked:
        assert reader.take(8) == b""
    reader.close()
    os.close(silent)
    os.close(other)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before, what="the descriptors")


def test_a_thread_that_does_not_start(done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for a thread a demand is refused, and the next one tries again."""

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    reader = Reader(done, done, lambda _, size: bytes(size))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            reader.take(8)
    assert reader.take(8) == b""
    assert is_readable(done, PATIENCE)
    assert reader.take(8) == bytes(8)
    reader.close()
