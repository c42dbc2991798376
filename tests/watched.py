"""System calls of worker processes, watched from outside: a seccomp filter that has the kernel tell us of each.

A plugin of pytest, which does nothing unless WATCHED in the environment names a file: `pytest -p tests.watched ...`.
Each spawner is then started with such a filter; its workers inherit it. Each call of theirs waits until we have noted
it. So what a worker calls is seen as the kernel sees it, in every thread, with the arguments. What a filter of the
worker's own refuses is not seen: only what it allows comes here. The file gets JSON: by name of the process, by number
of the call, its different arguments, of those that PRECISE names.

Source: seccomp_unotify(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import stat
import struct
import sys
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Final

import pytest

from tests.helpers import wait_until
from vhostmp.workers.sandbox import kernel
from vhostmp.workers.sandbox.bpf import RET_K, USER_NOTIF
from vhostmp.workers.sandbox.calls import ALLOWED

# linux/seccomp.h
NEW_LISTENER: Final = 1 << 3
NOTIF_RECV, NOTIF_SEND = 0xC0502100, 0xC0182101
CONTINUE: Final = 1
NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")
RESPONSE: Final = struct.Struct("=QqiI")
SYS_PIDFD_GETFD: Final = 438
#: The arguments that a filter looks at, by number of the call.
PRECISE: Final = {call.number: [only.argument for only in call.only] for call in ALLOWED}

#: What the spawner's process runs first; the call after the filter waits until somebody has taken its listener.
WRAPPER: Final = """#!{python}
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
code = ctypes.create_string_buffer(struct.pack("=HBBI", {ret}, 0, 0, {action}))
program = ctypes.create_string_buffer(struct.pack("=H6xQ", 1, ctypes.addressof(code)))
told = os.open({told!r}, os.O_WRONLY | os.O_CLOEXEC)
os.write(told, struct.pack("=i", os.getpid()))
libc.syscall({seccomp}, 1, {listener}, program)
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""


class Watch:
    """Calls that processes have made after their own filter: by name of the process, the number with the arguments."""

    def __init__(self, directory: Path) -> None:
        """Begin to watch every spawner that is started by the interpreter `wrapper`."""
        self.calls: dict[str, dict[int, set[tuple[int, ...]]]] = {}
        self._groups: dict[int, int] = {}
        self._sealed: dict[int, str] = {}
        told = directory / "told"
        os.mkfifo(told)
        self._told: Final = os.open(told, os.O_RDWR | os.O_CLOEXEC)
        self.wrapper: Final = directory / "python"
        self.wrapper.write_text(
            WRAPPER.format(
                python=sys.executable,
                ret=RET_K,
                action=USER_NOTIF,
                told=str(told),
                seccomp=kernel.NUMBERS["seccomp"],
                listener=NEW_LISTENER,
            )
        )
        self.wrapper.chmod(self.wrapper.stat().st_mode | stat.S_IXUSR)
        threading.Thread(target=self._serve, name="watch", daemon=True).start()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._told, select.POLLIN)
        while True:
            for fd, event in poll.poll():
                if fd == self._told:
                    poll.register(_listener(struct.unpack("=i", os.read(fd, 4))[0]), select.POLLIN)
                elif event & select.POLLIN:
                    self._let_go_on(fd)
                else:  # nobody is left
                    poll.unregister(fd)
                    os.close(fd)

    def _let_go_on(self, listener: int) -> None:
        buffer = bytearray(NOTIFICATION.size)
        with contextlib.suppress(OSError):  # it was killed meanwhile
            fcntl.ioctl(listener, NOTIF_RECV, buffer)
            number, tid, _, call, _, _, *arguments = NOTIFICATION.unpack(buffer)
            with contextlib.suppress(OSError):
                self._note(tid, call, tuple(arguments))
            fcntl.ioctl(listener, NOTIF_SEND, RESPONSE.pack(number, 0, 0, CONTINUE))

    def _note(self, tid: int, number: int, arguments: tuple[int, ...]) -> None:
        if tid not in self._groups:
            lines = Path(f"/proc/{tid}/status").read_text().splitlines()
            self._groups[tid] = next(int(line.split()[1]) for line in lines if line.startswith("Tgid:"))
        group = self._groups[tid]
        if number == kernel.NUMBERS["seccomp"]:
            self._sealed[group] = Path(f"/proc/{group}/comm").read_text().strip().rstrip("0123456789")
        elif group in self._sealed:
            precise = tuple(arguments[place] & 0xFFFF_FFFF for place in PRECISE.get(number, ()))
            self.calls.setdefault(self._sealed[group], {}).setdefault(number, set()).add(precise)


def _listener(pid: int) -> int:
    """Wait for the filter of a wrapper and return a descriptor of its listener."""

    def found() -> int:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") == "anon_inode:seccomp notify":
                    return int(name)
        return 0

    number = wait_until(found, what="the spawner's filter")
    pidfd = os.pidfd_open(pid)
    try:
        fd = int(ctypes.CDLL(None).syscall(SYS_PIDFD_GETFD, pidfd, number, 0))
    finally:
        os.close(pidfd)
    assert fd >= 0
    return fd


@pytest.fixture(scope="session", autouse=True)
def watch() -> Generator[None]:
    """Watch all spawners of this run."""
    if not (path := os.environ.get("WATCHED")):
        yield
        return
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        watch = Watch(Path(directory))
        patch.setattr(sys, "executable", str(watch.wrapper))
        yield
        Path(path).write_text(
            json.dumps(
                {name: {n: sorted(seen) for n, seen in calls.items()} for name, calls in list(watch.calls.items())}
            )
        )
