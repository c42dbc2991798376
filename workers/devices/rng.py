"""The entropy device: fills the driver's buffers with random bytes. Source: virtio 1.3, 5.4.

A character device may have nothing for a long time, so a thread reads it: a request waits for that, the data thread
does not. Nothing is read before it is asked for, and no more than that. There is no limit to the rate at which a guest
may ask: the kernel's generator does not run dry, and a character device that others need too wants a front-end that
limits its guest.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

from vhostmp.workers.devices.api import Device

log = logging.getLogger("vhostmp.backend")

#: At most so many bytes for one request: the driver takes what it gets, and a work item stays short.
REQUEST_BYTES: Final = 65536
#: At most so many bytes of one read of a character device: it may take a millisecond for each.
READ_BYTES: Final = 4096
#: How long to wait before a device is read again that cannot be polled and had nothing, or that failed, seconds.
EMPTY_SECONDS: Final = 0.02
FAILED_SECONDS: Final = 1.0


class Reader:
    """A thread that reads a descriptor on demand; it starts with the first demand."""

    def __init__(self, fd: int, done: int, read: Callable[[int, int], bytes] = os.read) -> None:
        """Read `fd`, which is O_NONBLOCK, and signal the eventfd `done` when there is something. Both are duplicated.

        OSError: there are too many descriptors.
        """
        self._read: Final = read
        self._asked: Final[queue.SimpleQueue[int]] = queue.SimpleQueue()
        self._found: Final[queue.SimpleQueue[bytes]] = queue.SimpleQueue()
        self._waiting = False
        self._thread: threading.Thread | None = None
        with ExitStack() as stack:  # of what the thread uses, which may outlive us
            self._fd: Final = os.dup(fd)
            stack.callback(os.close, self._fd)
            self._done: Final = os.dup(done)
            stack.callback(os.close, self._done)
            self._ended, self._end = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, self._ended)
            self._descriptors: Final = stack.pop_all()

    def take(self, size: int) -> bytes:
        """Return up to `size` bytes; none: they are being read, `done` tells when they are there.

        RuntimeError when the thread cannot be started; the next one tries again.
        """
        data = b""
        if self._waiting and not self._found.empty():
            data = self._found.get()
            self._waiting = False
        if not data and not self._waiting:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="vhostmp-rng", daemon=True)
                thread.start()
                self._thread = thread
            self._waiting = True
            self._asked.put(min(size, READ_BYTES))
        return data[:size]

    def close(self) -> None:
        """End the thread; does not wait for that."""
        os.close(self._end)
        if self._thread is None:
            self._descriptors.close()
        else:
            self._asked.put(0)

    def _run(self) -> None:
        with self._descriptors:
            while size := self._asked.get():
                if not (data := self._wait_for(size)):
                    return
                self._found.put(data)
                os.eventfd_write(self._done, 1)

    def _wait_for(self, size: int) -> bytes:
        """Return what the next successful read returns; none once there was `close`."""
        failed = 0
        readable = False
        while True:
            try:
                if data := self._read(self._fd, size):
                    return data
                why = "is at its end"
            except BlockingIOError:
                # One that says it is readable and has nothing cannot be polled.
                if self._ends(EMPTY_SECONDS) if readable else self._ends(None, self._fd):
                    return b""
                readable = not readable
                continue
            except OSError as error:
                why = error.strerror or repr(error)
            failed += 1
            if failed & (failed - 1) == 0:
                log.error("source of random bytes: %s (%d times so far)", why, failed)
            if self._ends(FAILED_SECONDS):
                return b""

    def _ends(self, seconds: float | None, *sources: int) -> bool:
        """Wait for the end, so long (None: without a limit) or until a source is readable. Whether it has come."""
        poll = select.poll()
        for fd in (self._ended, *sources):
            poll.register(fd, select.POLLIN)
        return any(fd == self._ended for fd, _ in poll.poll(None if seconds is None else seconds * 1000))


class Rng(Device):
    """Random bytes from the kernel, or from a character device such as /dev/hwrng."""

    device_id = 4

    def __init__(self, source: int = -1) -> None:
        """Read from the descriptor `source` (borrowed, O_NONBLOCK); -1: ask the kernel (getrandom)."""
        self.done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.reader = Reader(source, self.done) if source >= 0 else None
        except BaseException:
            os.close(self.done)
            raise

    def fileno(self) -> int:
        """Return what has the queue looked at again."""
        return self.done

    def close(self) -> None:
        """End; a read that runs ends by itself."""
        if self.reader is not None:
            self.reader.close()
        os.close(self.done)

    def process(self, queue: int, requests: list[Any]) -> int:
        """Fill each request's first buffer, up to REQUEST_BYTES: one byte is all that 5.4.6.2 asks for."""
        for finished, request in enumerate(requests):
            if not request.writable:
                continue
            room = request.writable[0][:REQUEST_BYTES]
            data = os.getrandom(len(room)) if self.reader is None else self.reader.take(len(room))
            if not data:
                return finished
            room[: len(data)] = data
            request.written = len(data)
        return len(requests)
