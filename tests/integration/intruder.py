"""A device of a class of ours that does what its guest asks for: what somebody could do who has taken a worker over.

A request is a Python expression; the answer is its value as JSON, or the name of the error and its errno. One that
ended the worker comes again to the next: that answers that it did.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
ROOM = 1 << 12
FILLED = 0xEE  # what a guest of the tests has in the writable part
TRIED = 1
SOCKET = 0o14


def call(number: int, *arguments: Any) -> int:
    """Make a system call; OSError when it fails."""
    result = int(LIBC.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def executable_page() -> int:
    """Try to make memory executable that exists already."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(NOTHING))
    if LIBC.mprotect(ctypes.c_void_p(address), 4096, 5):
        raise OSError(ctypes.get_errno(), "mprotect")
    return 0


def replaced_channel() -> int:
    """Try to put a socket of ours in the place of the one over which we may send messages."""
    for fd in range(3, 64):
        try:
            is_stranger = fd not in (PEERS[0].fileno(), PEERS[1].fileno()) and os.fstat(fd).st_mode >> 12 == SOCKET
        except OSError:
            continue
        if is_stranger:
            os.close(fd)  # the log's may be: its number is no use
            fcntl.fcntl(PEERS[0].fileno(), fcntl.F_DUPFD_CLOEXEC, fd)
    return 0


def everything_harmless() -> str:
    """Call what a well-behaved back-end may call."""
    thread = threading.Thread(target=lambda: time.sleep(0.001))
    thread.start()
    thread.join()
    time.sleep(0.001)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    ready = select.select([], [writer], [], 0)[1] and select.poll().poll(0) == []
    os.close(reader)
    os.close(writer)
    large = bytearray(1 << 20)
    large.extend(bytes(1 << 22))
    with SOURCE:
        SOURCE.seek(0)
    PEERS[0].send(b"x")
    got = PEERS[1].recv(1)
    numbers = (
        os.getppid(),
        os.getuid(),
        os.geteuid(),
        os.getgid(),
        os.getegid(),
        os.getpid(),
        threading.get_native_id(),
    )
    _ = (os.times(), os.uname(), resource.getrusage(resource.RUSAGE_SELF), os.sched_getaffinity(0))
    os.sched_yield()
    time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)
    return (
        f"{bool(ready)} {len(large)} {got!r} {len(numbers)} {len(os.urandom(3))} {sys.platform} {len(signal.__name__)}"
    )


USED = (fcntl, subprocess)  # by expressions
SOURCE = open(__file__, "rb", buffering=0)  # noqa: SIM115 - while it is imported it may
PEERS = socket.socketpair()
NOTHING = mmap.mmap(-1, 4096)


class Intruder:
    """One queue of requests: a text to be evaluated."""

    device_id = 42

    def process(self, queue: int, requests: list[Any]) -> None:
        """Do what each one says."""
        for request in requests:
            if request.writable[0][0] == TRIED:
                request.write(json.dumps({"error": "died", "errno": None}).encode())
                continue
            request.writable[0][0] = TRIED
            try:
                answer: Any = {"value": eval(request.read().decode())}
            except OSError as error:
                answer = {"error": type(error).__name__, "errno": error.errno}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}", "errno": None}
            request.write(json.dumps(answer).encode()[:ROOM])
