"""The relay of post-copy: which page the pager is asked for, who is woken, who is killed.

The worker's mapping is this process's own, its pidfd that of a child that does nothing; the pager is a socket.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Final

import pytest

from tests.helpers import wait_until
from vhostmp.errors import LocalError
from vhostmp.shm._relay import Relay
from vhostmp.shm._userfault import new_userfaultfd, register_missing

PAGE: Final = 4096
PAGES: Final = 160
TARGET: Final = 0x7000_0000_0000
WORKER: Final = 3
TABLE: Final = 17
REQUESTS_MAX: Final = 128
ONE: Final = 5
OTHER: Final = 6
"""Pages."""
_libc = ctypes.CDLL(None)

try:
    os.close(new_userfaultfd())
except Exception as error:
    pytest.skip(f"no userfaultfd: {error}", allow_module_level=True)


class Bench:
    """A relay with one worker, of whose memory a guest may use all but the first page and the last."""

    def __init__(self) -> None:
        """Map, register, start."""
        self.file = os.memfd_create("memory", os.MFD_CLOEXEC)
        os.ftruncate(self.file, PAGES * PAGE)
        self.map = mmap.mmap(self.file, PAGES * PAGE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.notice = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.pager, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pager.settimeout(10)
        self.relay = Relay(theirs.fileno(), self.notice)
        theirs.close()
        self.thread = threading.Thread(target=self.relay.run)
        self.thread.start()
        self.child = subprocess.Popen(["sleep", "60"])
        self.pidfd = os.pidfd_open(self.child.pid)
        self.seen = ctypes.create_string_buffer(PAGES)
        self.touching: list[threading.Thread] = []
        self.add()

    def add(self) -> None:
        """Hand over a userfaultfd."""
        uffd = new_userfaultfd()
        register_missing(uffd, self.start, PAGES * PAGE)
        ranges = [(self.start, PAGE, (PAGES - 1) * PAGE, TARGET)]
        self.relay.add(WORKER, self.child.pid, TABLE, uffd, self.pidfd, ranges)

    def touch(self, page: int) -> threading.Thread:
        """Read a page's first byte into `seen` in a thread, without the interpreter's lock."""
        to = ctypes.c_void_p(ctypes.addressof(self.seen) + page)
        at = ctypes.c_void_p(self.start + page * PAGE)
        thread = threading.Thread(target=_libc.memcpy, args=(to, at, ctypes.c_size_t(1)))
        thread.start()
        self.touching.append(thread)
        return thread

    def asked(self) -> int:
        """Return which page the pager is asked for."""
        return (int.from_bytes(self.pager.recv(8), "little") - TARGET) // PAGE

    def bring(self, page: int) -> None:
        """Put a page there that begins with its number, and say so."""
        os.pwrite(self.file, bytes([page]) * PAGE, page * PAGE)
        self.pager.send((TARGET + page * PAGE).to_bytes(8, "little"))

    def is_quiet(self) -> bool:
        """Whether the pager is asked for nothing."""
        return not select.select([self.pager], [], [], 0)[0]

    def killed(self) -> bool:
        """Wait for the worker's death by the relay."""
        return self.child.wait(10) == -signal.SIGKILL and self.relay.killed > 0

    def close(self) -> None:
        """End everything; who still waits goes on."""
        self.relay.close()
        self.thread.join(10)
        for thread in self.touching:
            thread.join(10)
        assert not any(thread.is_alive() for thread in (self.thread, *self.touching))
        self.child.kill()
        self.child.wait()
        self.pager.close()
        for fd in (self.file, self.notice, self.pidfd):
            os.close(fd)
        self.map.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Return a relay at work."""
    bench = Bench()
    yield bench
    bench.close()


def test_a_page_comes(bench: Bench) -> None:
    """A fault is asked for at the pager's address; the worker goes on with the page's contents once it has come."""
    thread = bench.touch(ONE)
    assert bench.asked() == ONE
    assert bench.relay.waits(WORKER)
    assert not bench.relay.waits(WORKER + 1)
    bench.bring(ONE)
    thread.join(10)
    assert bench.seen[ONE] == bytes([ONE])
    assert not bench.relay.waits(WORKER)
    assert (bench.relay.faults, bench.relay.pages, bench.relay.killed) == (1, 1, 0)


def test_asked_for_once(bench: Bench) -> None:
    """However many threads wait for a page, the pager is asked once; other pages are asked for meanwhile."""
    threads = [bench.touch(ONE) for _ in range(3)]
    wait_until(lambda: bench.relay.faults == len(threads), what="three faults")
    assert bench.asked() == ONE
    bench.touch(OTHER)
    assert bench.asked() == OTHER
    bench.bring(OTHER)
    bench.touching.pop().join(10)
    assert all(thread.is_alive() for thread in threads)
    bench.bring(ONE)
    for thread in threads:
        thread.join(10)
    assert bench.is_quiet()


def test_an_answer_that_nobody_waits_for(bench: Bench) -> None:
    """A pager that is in a front-end's hands may say what it likes: nothing comes of it."""
    for address in (0, TARGET, TARGET + ONE * PAGE + 1, (1 << 64) - 1):
        bench.pager.send(address.to_bytes(8, "little"))
    bench.touch(ONE)
    assert bench.asked() == ONE
    bench.bring(ONE)
    bench.touching[0].join(10)
    assert bench.relay.pages == 1


@pytest.mark.parametrize("page", [0, PAGES - 1])
def test_fault_outside_of_the_regions(bench: Bench, page: int) -> None:
    """A worker that touches what no guest may use is killed, and nothing is asked for."""
    bench.touch(page)
    assert bench.killed()
    assert bench.is_quiet()


def test_too_many_pages(bench: Bench) -> None:
    """A worker that waits for more pages than all honest ones together could is killed."""
    for page in range(1, REQUESTS_MAX + 1):
        bench.touch(page)
    wait_until(lambda: bench.relay.faults == REQUESTS_MAX, what="the faults")
    assert bench.relay.killed == 0
    bench.touch(REQUESTS_MAX + 1)
    assert bench.killed()


@pytest.mark.parametrize("before", [True, False])
def test_abandon(bench: Bench, before: bool) -> None:
    """When no page will come a worker that waits is killed, whether it came to wait before or after."""
    if before:
        bench.touch(ONE)
        bench.asked()
    bench.relay.abandon()
    if not before:
        assert bench.child.poll() is None
        bench.touch(ONE)
    assert bench.killed()


def test_pager_gone(bench: Bench) -> None:
    """The end of the pager's socket is told, once; who waits keeps waiting, for there is nothing to go on with."""
    thread = bench.touch(ONE)
    bench.asked()
    bench.pager.close()
    wait_until(lambda: select.select([bench.notice], [], [], 0)[0], what="the notice")
    assert os.eventfd_read(bench.notice) == 1
    assert thread.is_alive()
    assert bench.child.poll() is None


def test_replaced(bench: Bench) -> None:
    """What another process in the slot hands over takes the place of what the dead one had; nothing is asked again."""
    thread = bench.touch(ONE)
    assert bench.asked() == ONE
    bench.relay.drop(TABLE)
    thread.join(10)
    assert bench.seen[ONE] == b"\0", "nobody told it of a page: it was released"
    os.ftruncate(bench.file, 0)
    os.ftruncate(bench.file, PAGES * PAGE)
    bench.add()
    thread = bench.touch(ONE)
    wait_until(lambda: bench.relay.faults > 1, what="the fault")
    assert bench.is_quiet()
    bench.bring(ONE)
    thread.join(10)
    assert bench.seen[ONE] == bytes([ONE])


def test_what_is_no_userfaultfd(bench: Bench) -> None:
    """Something else is refused, and closed."""
    for worker, fd in ((WORKER, os.eventfd(0)), (64, new_userfaultfd())):
        with pytest.raises(LocalError, match="not"):
            bench.relay.add(worker, 1, TABLE, fd, bench.pidfd, [])
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
