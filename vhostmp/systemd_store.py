"""systemd's file descriptor store, as a store of ours (fdstore.py).

systemd keeps one of each *open file*: a second descriptor of the same one is dropped, and we have many (a front-end
sends the same memory again and again). So files are stored once each, `vhostmp.<n>`, found out with kcmp(2), and a
record among them says which names mean which file. systemd takes messages from a queue: only when it has closed the
descriptor of a BARRIER has it taken what came before, and a message of a process that is gone may be passed over, so
each `put` waits.

Source: systemd, sd_notify(3) (FDSTORE, FDNAME, FDPOLL, FDSTOREREMOVE, BARRIER), sd_listen_fds(3).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import re
import select
import socket
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from vhostmp import transport
from vhostmp.errors import LocalError, WorkerDied
from vhostmp.holder import FIRST, PIDFD, end_held
from vhostmp.shm.records import Record
from vhostmp.systemd import NOTIFY_SOCKET
from vhostmp.workers.channel import close_all

FDSTORE: Final = "FDSTORE"
LISTEN: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
#: In the environment of new code that is executed in our place, which systemd passes nothing: files by name.
HANDED: Final = "VHOSTMP_FDSTORE"
PREFIX: Final = "vhostmp."
NAMES: Final = "vhostmp.names"
#: A name of ours: a socket unit may be called vhostmp.socket, and so is then what systemd passes for it.
_OURS: Final = re.compile(r"vhostmp\.(names|[0-9]+)")
#: How many files there may be at the most. systemd says the names of all in one string of the environment, of which the
#: kernel takes 128 KiB (execve(2)): with more of ours the service could not be started again.
ROOM_MAX: Final = 6000
BARRIER_SECONDS: Final = 10.0
_LISTEN_FDS_START: Final = 3
_F_DUPFD_QUERY: Final = 1027
_SYS_KCMP: Final = {"x86_64": 312}.get(platform.machine(), 272)
_libc = ctypes.CDLL(None, use_errno=True)


def is_same_file(one: int, other: int) -> bool:
    """Whether two descriptors are of one open file, as systemd judges it. OSError: the kernel does not say.

    Source: kcmp(2), KCMP_FILE; fcntl(2), F_DUPFD_QUERY of Linux 6.10, for where kcmp() is forbidden.
    """
    pid = os.getpid()
    compared = int(_libc.syscall(_SYS_KCMP, pid, pid, 0, one, other))
    if compared >= 0:
        return compared == 0
    refusal = ctypes.get_errno()
    try:
        return bool(fcntl.fcntl(one, _F_DUPFD_QUERY, other))
    except OSError as error:
        raise OSError(refusal, os.strerror(refusal)) from error


class SystemdStore:
    """The store of the unit that we run in."""

    def __init__(self, address: str, room: int, files: Mapping[str, int]) -> None:
        """Begin with the files that it holds, by name, which are taken over.

        Args:
            address: of the socket for messages to systemd.
            room: how many it takes at the most; ROOM_MAX if that is less.
            files: what it holds, `NAMES` among them unless it is empty.

        Raises: LocalError: the record of names is of another version, or files cannot be told from each other.
        """
        try:
            is_same_file(0, 0)
        except OSError as error:
            raise LocalError(
                f"kcmp(2) is refused ({error.strerror}), without which systemd's store is of no use: "
                "leave FileDescriptorStoreMax= out of the unit",
                error.errno,
            ) from error
        self._address: Final = address
        self._room: Final = min(room, ROOM_MAX)
        self._files = {name: fd for name, fd in files.items() if name != NAMES}
        self._record = Record(files.get(NAMES, -1))
        self._names: dict[str, str] = (self._record.read() or {}).get("names", {})
        self._count = max((int(name.removeprefix(PREFIX)) for name in self._files), default=0)
        if NAMES not in files:
            _send(self._address, [("FDSTORE=1", NAMES, self._record.fd)])
        self._sweep()

    def found(self) -> dict[str, int]:
        """Return the caller's duplicates of everything that it holds, by the names that it was put under."""
        return {
            name: fcntl.fcntl(self._files[file], fcntl.F_DUPFD_CLOEXEC, 3)
            for name, file in self._names.items()
            if file in self._files
        }

    def put(self, fds: Mapping[str, int]) -> None:
        """Keep duplicates of descriptors. WorkerDied: there is no room, or systemd does not answer.

        systemd itself says nothing when there is no room, and passes over what it is sent then.
        """
        new: list[tuple[str, str, int]] = []
        names = dict(self._names)
        try:
            for name, fd in fds.items():
                file = next((known for known, other in self._files.items() if is_same_file(fd, other)), None)
                if file is None:
                    self._count += 1
                    file = f"{PREFIX}{self._count}"
                    self._files[file] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
                    new.append(("FDSTORE=1", file, self._files[file]))
                names[name] = file
            needed = len(self._files) + 1
            if needed > self._room:
                what = "FileDescriptorStoreMax" if self._room < ROOM_MAX else "what systemd can pass on"
                raise WorkerDied(f"{what}={self._room} is too small: {needed} are needed")
            _send(self._address, new)
        except (WorkerDied, OSError):  # what systemd may have of them nonetheless, the next start sweeps
            close_all([self._files.pop(file) for _, file, _ in new])
            raise
        self._write(names)

    def drop(self, names: Iterable[str]) -> None:
        """Keep some no longer."""
        gone = set(names)
        self._write({name: file for name, file in self._names.items() if name not in gone})
        self._sweep()

    def settle(self, timeout: float, paths: Sequence[str]) -> None:
        """Nothing to say: how long it waits, and what follows, is the unit's."""

    def sync(self) -> None:
        """Nothing to wait for: each message was."""

    def kill(self) -> None:
        """Nothing that we could end."""

    def goodbye(self) -> None:
        """Have everything dropped. Never fails."""
        with contextlib.suppress(WorkerDied):
            _send(self._address, [("FDSTOREREMOVE=1", name, -1) for name in (*self._files, NAMES)])
        self.detach()

    def detach(self) -> None:
        """Leave everything in it. Never fails."""
        close_all(self._files.values())
        self._files.clear()
        self._record.close()

    def handover(self) -> dict[str, int]:
        """Return its files by name, ours: what is executed in our place gets them from us, not from systemd."""
        return {**self._files, NAMES: self._record.fd}

    def _write(self, names: dict[str, str]) -> None:
        self._names = names
        self._record.write({"names": names})

    def _sweep(self) -> None:
        """Have files dropped that no name means any more."""
        gone = self._files.keys() - set(self._names.values())
        if gone:
            with contextlib.suppress(WorkerDied):  # it has more than we need, which does no harm
                _send(self._address, [("FDSTOREREMOVE=1", name, -1) for name in gone])
            close_all([self._files.pop(name) for name in gone])


def _send(address: str, messages: Sequence[tuple[str, str, int]]) -> None:
    """Send messages, each about a name, some with a descriptor, and wait until they are taken. WorkerDied."""
    if not messages:
        return
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        for what, name, fd in messages:
            text = f"{what}\nFDNAME={name}\nFDPOLL=0"
            transport.send_datagram(address, text.encode(), [fd] if fd >= 0 else [], wait=True)
        transport.send_datagram(address, b"BARRIER=1", [theirs], wait=True)
        os.close(theirs)
        theirs = -1
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        if not poll.poll(BARRIER_SECONDS * 1000):
            raise WorkerDied(f"systemd does not answer within {BARRIER_SECONDS:g} s")
    except OSError as error:
        raise WorkerDied(f"systemd cannot be reached: {error.strerror}") from error
    finally:
        close_all([ours, theirs] if theirs >= 0 else [ours])


def open_systemd_store() -> tuple[SystemdStore, dict[str, int]] | None:
    """Return the unit's store, and the caller's duplicates of what is in it; None: the unit has none.

    What the environment says of it is taken out of it: it is ours alone. LocalError: see SystemdStore.
    """
    address, room = os.environ.get(NOTIFY_SOCKET), os.environ.get(FDSTORE, "")
    handed = os.environ.pop(HANDED, None)
    if not address or not room.isdigit() or not int(room):
        return None
    files = from_handed(handed) if handed is not None else _listened()
    for fd in files.values():
        os.set_inheritable(fd, False)
    try:
        store = SystemdStore(address, int(room), files)
    except WorkerDied as error:
        raise LocalError(f"{error}: leave FileDescriptorStoreMax= out of the unit", errno.EIO) from error
    return store, store.found()


def as_handed(files: Mapping[str, int]) -> str:
    """Return files by name as HANDED says them, as short as can be: what is true of ROOM_MAX is true of this string."""
    return json.dumps({name.removeprefix(PREFIX): fd for name, fd in files.items()}, separators=(",", ":"))


def from_handed(text: str) -> dict[str, int]:
    """Return what `as_handed` was given; also as code before this one said it, with whole names."""
    return {f"{PREFIX}{name.removeprefix(PREFIX)}": fd for name, fd in json.loads(text).items()}


def end_unread() -> None:
    """End everything that systemd passed us of what we stored, where open_systemd_store cannot read it. Never fails.

    What the files were put under is in the record that was not read: what is a process, or a channel to one, is told by
    its kind.
    """
    address = os.environ.get(NOTIFY_SOCKET, "")
    held: dict[str, int] = {}
    for name, fd in _listened().items():
        with contextlib.suppress(OSError):  # closed by the attempt to read it
            held[f"{FIRST}{name}{PIDFD}" if _is_pidfd(fd) else f"{FIRST}{name}" if _is_channel(fd) else name] = fd

    def drop(names: Iterable[str]) -> None:
        with contextlib.suppress(WorkerDied):
            _send(address, [("FDSTOREREMOVE=1", name.removeprefix(FIRST), -1) for name in names])

    end_held(held, drop)
    drop(_listened())


def _is_pidfd(fd: int) -> bool:
    with open(f"/proc/self/fdinfo/{fd}") as info:
        return any(line.startswith("Pid:") for line in info)


def _is_channel(fd: int) -> bool:
    """Whether a descriptor is of a channel to a process (workers/channel.py): front-ends have streams."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.type == socket.SOCK_SEQPACKET


def _listened() -> dict[str, int]:
    """Return the descriptors that systemd passed us of those that we stored, by name."""
    pid, count, names = (os.environ.get(name, "") for name in LISTEN)
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    known = names.split(":")
    return {name: _LISTEN_FDS_START + place for place, name in enumerate(known) if _OURS.fullmatch(name)}
