"""The end of a data thread is told by the kernel, before its process is gone; what it died of stands in its slot."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Final

import pytest

from tests.helpers import PATIENCE, wait_until
from vhostmp.errors import LocalError
from vhostmp.shm import _life, layout
from vhostmp.shm.segment import Segment

SLOT: Final = 3


@pytest.fixture
def control() -> Iterator[Segment]:
    """Return a control segment."""
    with Segment.create(layout.SEGMENT_SIZE, header=True) as segment:
        yield segment


@contextmanager
def worker(control: Segment, then: Callable[[], object]) -> Generator[int]:
    """Fork a process that begins in the slot, waits for a byte and does `then`; yields the descriptor for the byte."""
    theirs, ours = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            _life.prepare()
            _life.begin(control.buf, SLOT)
            os.read(theirs, 1)
            then()
        os._exit(1)
    os.close(theirs)
    layout.WORKER.write(control.buf, layout.worker_offset(SLOT), "pid", pid)
    try:
        wait_until(lambda: word(control, "life"), what="the beginning")
        yield ours
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ours)


def word(control: Segment, name: str) -> int:
    """Read a word of the slot."""
    return layout.WORKER.read(control.buf, layout.worker_offset(SLOT), name)


def fault() -> None:
    """Read what is at address 8."""
    ctypes.string_at(8, 1)


def bus_error() -> None:
    """Read a page that is no more."""
    import mmap  # noqa: PLC0415 - in the child

    fd = os.memfd_create("gone")
    os.ftruncate(fd, 4096)
    memory = mmap.mmap(fd, 4096)
    os.ftruncate(fd, 0)
    memory[0]  # type: ignore[unused-ignore]


@pytest.mark.parametrize(
    ("then", "found"),
    [
        (lambda: os._exit(0), 0),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 0),
        (fault, signal.SIGSEGV),
        (bus_error, signal.SIGBUS),
        (os.abort, signal.SIGABRT),
    ],
    ids=["exit", "kill", "segv", "bus", "abort"],
)
def test_end_is_seen(control: Segment, then: Callable[[], object], found: int) -> None:
    """However the thread ends its word is marked, and a fault of its own is named."""
    with worker(control, then) as go:
        assert not _life.has_ended(control.buf, SLOT)
        os.write(go, b"x")
        wait_until(lambda: _life.has_ended(control.buf, SLOT), what="the mark")
        assert word(control, "fault") == found


def test_what_others_send_is_no_fault(control: Segment) -> None:
    """A SIGBUS that somebody sends kills, and is not taken for a page that is gone."""
    with worker(control, lambda: os.read(0, 0)):
        os.kill(word(control, "pid"), signal.SIGBUS)
        wait_until(lambda: _life.has_ended(control.buf, SLOT), what="the mark")
        assert word(control, "fault") == 0


def test_fault_of_another_thread(control: Segment) -> None:
    """A fault that is not the data thread's says so: its ring is not to blame."""

    def elsewhere() -> None:
        thread = threading.Thread(target=fault)
        thread.start()
        thread.join()

    with worker(control, elsewhere) as go:
        os.write(go, b"x")
        wait_until(lambda: _life.has_ended(control.buf, SLOT), what="the mark")
        assert word(control, "fault") == _life.OTHER_THREAD | signal.SIGSEGV


def test_watch_tells_of_each_end(control: Segment) -> None:
    """The watch tells of one worker after the other in the same slot, once each, and stops when told."""
    watch = _life.LifeWatch(control.buf)
    told: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def listen() -> None:
        while watch.wait():
            told.put(True)
        told.put(False)

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        for _ in range(3):
            with worker(control, lambda: os._exit(0)) as go:
                os.write(go, b"x")
                assert told.get(timeout=PATIENCE)
                assert told.empty()
            layout.WORKER.write(control.buf, layout.worker_offset(SLOT), "life", 0)
    finally:
        watch.stop()
        thread.join(PATIENCE)
        watch.close()
    assert not thread.is_alive()
    assert not told.get_nowait()


@pytest.mark.parametrize("index", [-1, layout.CONSTANTS["WORKERS_MAX"]])
def test_slots_that_are_none(control: Segment, index: int) -> None:
    """A slot outside the segment is refused."""
    for call in (_life.begin, _life.has_ended):
        with pytest.raises(LocalError, match="worker slot"):
            call(control.buf, index)
