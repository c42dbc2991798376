"""Named POSIX shared-memory segments: create, open, hand over, sweep.

A segment has a header page (`layout.HEADER`) only when it is a control segment; guest memory is bare.

Rules:
- Names are `/vhostmp.<uid>.<pid>.<start>.<n>`: the owner is in the name, so that `sweep` can tell a segment whose owner
  died without opening it. A process is named by pid and start time, for pids come round again.
- Mode 0600, always created exclusively, always fully allocated (an early ENOSPC beats a SIGBUS later).
- The creator fills the header and stores state = READY last; an opener checks magic, version and size and waits for
  READY for a bounded time.
- Whoever creates unlinks (`close`), else the spawner after the control process's death, else the next sweep.
- The creator holds a shared lock (flock) on the open file, which lasts as long as anybody has a descriptor of it: the
  spawner, or who keeps it for a control process to come. So a sweep leaves alone what is held for somebody.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import re
import stat
import time
from pathlib import Path
from typing import Final

import posix_ipc

from vhostmp.errors import LocalError, SysError
from vhostmp.shm import layout

PREFIX: Final = "vhostmp"
SHM_DIRECTORY: Final = Path("/dev/shm")
HUGE_PAGE: Final = 2 << 20
_numbers = itertools.count()
_NAME: Final = re.compile(rf"{PREFIX}\.[0-9]{{1,20}}\.([0-9]{{1,20}})\.([0-9]{{1,20}})\.[0-9]{{1,20}}", re.ASCII)


def process_start(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot, 0 when there is no such process.

    Source: proc(5), /proc/pid/stat field 22.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The second field, the command, may hold blanks and brackets: count from the last bracket.
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] in ("Z", "X") else int(fields[19])


class Segment:
    """A named shared-memory segment, mapped. Use `create` or `open`."""

    def __init__(self, name: str, fd: int, size: int, owner: bool) -> None:
        """Map `size` bytes of `fd`, which the segment owns from now on (also when mapping fails)."""
        self.name: Final = name
        self.fd = fd
        self.size: Final = size
        self._owner = owner
        try:
            self._map = mmap.mmap(fd, size)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise SysError(f"cannot map segment {name}: {error}") from error
        self.buf = memoryview(self._map)

    @classmethod
    def create(cls, size: int, *, header: bool = False) -> Segment:
        """Create a segment of `size` bytes, zeroed, mode 0600, owned by this process.

        With `header` the first page is the header of a control segment, and the caller calls `ready` once the rest is
        filled. Raises SysError when /dev/shm is full (nothing is left behind).
        """
        name = f"/{PREFIX}.{os.getuid()}.{os.getpid()}.{process_start(os.getpid())}.{next(_numbers)}"
        try:
            shared = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
        except (posix_ipc.Error, OSError) as error:
            raise SysError(f"cannot create segment {name}: {error}") from error
        try:
            fcntl.flock(shared.fd, fcntl.LOCK_SH)
            os.posix_fallocate(shared.fd, 0, size)
        except OSError as error:
            os.close(shared.fd)
            posix_ipc.unlink_shared_memory(name)
            raise SysError.wrap(f"cannot allocate {size} bytes in {SHM_DIRECTORY}", error) from error
        try:
            segment = cls(name, shared.fd, size, owner=True)
        except SysError:
            posix_ipc.unlink_shared_memory(name)
            raise
        if header:
            write = layout.HEADER.write
            write(segment.buf, 0, "magic", layout.CONSTANTS["SEGMENT_MAGIC"])
            write(segment.buf, 0, "version", layout.CONSTANTS["SEGMENT_VERSION"])
            write(segment.buf, 0, "size", size)
            write(segment.buf, 0, "owner_pid", os.getpid())
            write(segment.buf, 0, "owner_start", process_start(os.getpid()))
        return segment

    @classmethod
    def nameless(cls, size: int, *, huge: bool = False) -> Segment:
        """Create a segment without a name, zeroed, which goes with its last descriptor and mapping.

        `size` is in bytes. `huge`: of huge pages, rounded up to whole ones, where the kernel has so many free; else of
        ordinary ones. Raises SysError when there is no memory.
        """
        if huge:
            with contextlib.suppress(OSError, SysError):
                return cls._nameless((size + HUGE_PAGE - 1) // HUGE_PAGE * HUGE_PAGE, os.MFD_HUGETLB)
        try:
            return cls._nameless(size, 0)
        except OSError as error:
            raise SysError.wrap(f"cannot allocate {size} bytes", error) from error

    @classmethod
    def _nameless(cls, size: int, flags: int) -> Segment:
        fd = os.memfd_create(PREFIX, os.MFD_CLOEXEC | flags)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError:
            os.close(fd)
            raise
        return cls("without a name", fd, size, owner=False)

    @classmethod
    def open(cls, name: str, *, timeout: float = 1.0) -> Segment:
        """Open a control segment by name and wait up to `timeout` seconds until it is READY.

        Raises LocalError when there is none, when it is of another version or when it is never made ready.
        """
        try:
            shared = posix_ipc.SharedMemory(name)
        except posix_ipc.ExistentialError as error:
            raise LocalError(f"no segment {name}", errno.ENOENT) from error
        except (posix_ipc.Error, OSError) as error:
            raise SysError(f"cannot open segment {name}: {error}") from error
        return cls.adopt(shared.fd, name, timeout=timeout)

    @classmethod
    def adopt(cls, fd: int, name: str, *, timeout: float = 1.0) -> Segment:
        """Map a control segment from its descriptor, which the segment owns from now on. Errors as `open`."""
        deadline = time.monotonic() + timeout
        while (size := os.fstat(fd).st_size) < layout.HEADER.size:
            if time.monotonic() > deadline:
                os.close(fd)
                raise LocalError(f"segment {name} has {size} bytes, no header")
            time.sleep(0.001)
        segment = cls(name, fd, size, owner=False)
        try:
            segment.check_header(deadline)
        except LocalError:
            segment.close()
            raise
        return segment

    def check_header(self, deadline: float) -> None:
        """Check magic, version and size; wait until READY or `deadline` (monotonic seconds). Raises LocalError."""
        while layout.HEADER.read(self.buf, 0, "state") != layout.CONSTANTS["SEGMENT_READY"]:
            if time.monotonic() > deadline:
                raise LocalError(f"segment {self.name} was never made ready")
            time.sleep(0.001)
        for name, wanted in (
            ("magic", layout.CONSTANTS["SEGMENT_MAGIC"]),
            ("version", layout.CONSTANTS["SEGMENT_VERSION"]),
            ("size", self.size),
        ):
            found = layout.HEADER.read(self.buf, 0, name)
            if found != wanted:
                raise LocalError(f"segment {self.name} has {name} {found:#x}, this program needs {wanted:#x}")

    def ready(self) -> None:
        """Mark a control segment READY: the creator's last act.

        An opener maps the segment by a system call after it saw the name, and checks magic and version after it saw
        READY; the store is a single aligned word.
        """
        layout.HEADER.write(self.buf, 0, "state", layout.CONSTANTS["SEGMENT_READY"])

    def own(self) -> None:
        """Become the owner, in place of one that died: the header says so, and `close` unlinks."""
        self._owner = True
        layout.HEADER.write(self.buf, 0, "owner_pid", os.getpid())
        layout.HEADER.write(self.buf, 0, "owner_start", process_start(os.getpid()))

    def keep_mapping_only(self) -> None:
        """Close every descriptor of the segment in this process, for good: its mapping is all that is left.

        For a process that may not do with it what a descriptor allows. `mmap` keeps a duplicate, which it would use to
        change the size alone; the segment is not to be closed after this, but to go with the process.
        """
        status = os.fstat(self.fd)
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # that of the listing
                found = os.fstat(int(name))
                if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
                    os.close(int(name))
        self.fd = -1

    def unlink(self) -> None:
        """Remove the name; mappings live on. Harmless when it is gone already."""
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(self.name)
        self._owner = False

    def close(self) -> None:
        """Unmap, close, and unlink when this process created it. Idempotent."""
        if self.fd < 0:
            return
        if self._owner:
            self.unlink()
        # Somebody may still look at it (a view in the traceback of an error): the mapping then goes when they let go.
        with contextlib.suppress(BufferError):
            self.buf.release()
            self._map.close()
        os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> Segment:
        """Return itself: the segment is closed when the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def sweep() -> list[str]:
    """Unlink this user's segments whose owner is dead and that nobody holds for another. Returns their names.

    Anybody may put files of any name and kind into /dev/shm: what is not ours, or cannot be judged, is left alone.
    """
    swept: list[str] = []
    for path in SHM_DIRECTORY.glob(f"{PREFIX}.{os.getuid()}.*"):
        if not (match := _NAME.fullmatch(path.name)):
            continue
        pid, start = int(match[1]), int(match[2])
        if process_start(pid) != start and not _is_held(path):
            with contextlib.suppress(posix_ipc.Error, OSError):
                posix_ipc.unlink_shared_memory(f"/{path.name}")
                swept.append(f"/{path.name}")
    return swept


def _is_held(path: Path) -> bool:
    """Whether anybody has a descriptor of a segment from its creator, or it is none of ours."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return True
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def anonymous_file(data: bytes) -> int:
    """Return a memory file without a name, the caller's, that holds `data`: to hand on by its descriptor. OSError."""
    fd = os.memfd_create(PREFIX, os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_memory(fd: int) -> bool:
    """Whether a file is in memory (memfd, tmpfs, huge pages): who reads another one may wait for whatever serves it.

    Only files of those can have seals. Source: fcntl(2), F_GET_SEALS.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True
