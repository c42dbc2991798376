"""fdatasync beside the data thread: it may take seconds, and nobody but who asked for it is to wait.

A flush covers all that was written before it was asked for, by whichever worker: all of them have the same open file.
What several have asked for while one flush ran is done by the next one.

A failure is for good. The kernel tells of lost writes once for each open file (errseq_t), and not again to whoever
flushes next; so it is noted in memory that the workers of a disk share, and every later flush fails with it. A lock
makes one of the two: no other worker's flush succeeds between the moment the kernel has told and the note. A worker
that is killed within these few instructions takes the failure with it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import queue
import struct
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Final

from vhostmp.shm.segment import anonymous_file

log = logging.getLogger("vhostmp.backend")

_NOTE: Final = struct.Struct("=I")  # errno of the first flush that failed, 0 before that


def new_note() -> int:
    """Return a file, the caller's, in which the workers of one disk note a failure. OSError."""
    return anonymous_file(_NOTE.pack(0))


class Flusher:
    """One worker's thread that flushes one file; it starts with the first flush that is asked for."""

    def __init__(self, fd: int, note: int, done: int, sync: Callable[[int], object] = os.fdatasync) -> None:
        """Flush `fd` by `sync`; the eventfd `done` is signalled when a flush has ended.

        `note` is of `new_note`, opened for this one alone: it is locked, and a lock is between open files. Descriptors
        are duplicated: the thread may outlive their owner. OSError when there are too many.
        """
        self._sync: Final = sync
        self._asked: Final[queue.SimpleQueue[list[int] | None]] = queue.SimpleQueue()
        self._flushes: Final[dict[int, list[int]]] = {}  # by who asked: empty until it is done, then its errno
        self._thread: threading.Thread | None = None
        with ExitStack() as stack:
            self._fd: Final = os.dup(fd)
            stack.callback(os.close, self._fd)
            self._done: Final = os.dup(done)
            stack.callback(os.close, self._done)
            self._note: Final = os.dup(note)
            stack.callback(os.close, self._note)
            self._descriptors: Final = stack.pop_all()

    def begin(self, who: int) -> None:
        """Ask for a flush of all that is written by now. One that `who` had asked for before is forgotten.

        RuntimeError when the thread cannot be started: nothing was asked for then.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="vhostmp-flush", daemon=True)
            thread.start()
            self._thread = thread
        flush = self._flushes[who] = list[int]()
        self._asked.put(flush)

    def forget(self, who: int) -> None:
        """Forget a flush that `who` has asked for and will not take, if there is one."""
        self._flushes.pop(who, None)

    def begun(self, who: int) -> bool:
        """Whether `who` has asked for a flush and not taken its outcome."""
        return who in self._flushes

    def take(self, who: int) -> int | None:
        """Return the outcome of the flush that `who` asked for: 0, or an errno; None while it is not done."""
        flush = self._flushes[who]
        if not flush:
            return None
        del self._flushes[who]
        return flush[0]

    def close(self) -> None:
        """End the thread once it is done with what it does now; does not wait for that."""
        if self._thread is None:
            self._descriptors.close()
        else:
            self._asked.put(None)

    def _run(self) -> None:
        try:
            while (first := self._asked.get()) is not None:
                flushes = [first]
                while not self._asked.empty():
                    if (more := self._asked.get()) is None:
                        return
                    flushes.append(more)
                result = self._flush()
                for flush in flushes:
                    flush.append(result)
                os.eventfd_write(self._done, 1)
        finally:
            self._descriptors.close()

    def _flush(self) -> int:
        """Flush once. Returns 0 or an errno."""
        try:
            with self._alone():
                (lost,) = _NOTE.unpack(os.pread(self._note, _NOTE.size, 0))
                if lost:
                    return int(lost)
                try:
                    self._sync(self._fd)
                except OSError as error:
                    os.pwrite(self._note, _NOTE.pack(error.errno or errno.EIO), 0)
                    log.error("flush: %s: writes are lost, no flush of this disk succeeds any more", error.strerror)
                    raise
        except OSError as error:
            return error.errno or errno.EIO
        except Exception:
            log.exception("flush")
            return errno.EIO
        return 0

    @contextmanager
    def _alone(self) -> Generator[None]:
        fcntl.flock(self._note, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._note, fcntl.LOCK_UN)
