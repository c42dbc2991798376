"""Named segments: made whole or not at all, opened only when ready, gone when their owner is."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest

from tests.helpers import open_descriptors, segment_names, wait_until
from vhostmp.errors import LocalError, SysError
from vhostmp.shm import layout, segment
from vhostmp.shm.segment import Segment, process_start, sweep

SIZE = 8192


@pytest.fixture
def made() -> Iterator[Segment]:
    """Return a control segment with a header, not ready yet."""
    with Segment.create(SIZE, header=True) as one:
        yield one


def path(name: str) -> Path:
    """Return where a segment stands in the file system."""
    return Path("/dev/shm") / name.removeprefix("/")


def test_create(made: Segment) -> None:
    """A new segment is zeroed beyond its header, mode 0600, fully allocated, and named after its owner."""
    status = path(made.name).stat()
    assert status.st_mode & 0o777 == 0o600  # noqa: PLR2004 (a mode)
    assert (status.st_size, status.st_blocks * 512) == (SIZE, SIZE)
    assert not any(made.buf[layout.HEADER.size :])
    _, uid, pid, start, _ = made.name.split(".")
    assert (int(uid), int(pid), int(start)) == (os.getuid(), os.getpid(), process_start(os.getpid()))


def test_names_differ() -> None:
    """Two segments of one process have two names."""
    with Segment.create(SIZE) as one, Segment.create(SIZE) as other:
        assert one.name != other.name


def test_close_unlinks_and_is_idempotent() -> None:
    """Closing removes name, mapping and descriptor; closing again does nothing."""
    before = open_descriptors()
    one = Segment.create(SIZE)
    one.close()
    one.close()
    assert not path(one.name).exists()
    assert open_descriptors() == before


def test_two_views_of_one_memory(made: Segment) -> None:
    """Who opens a segment by name sees what the creator wrote, and the other way round."""
    made.ready()
    with Segment.open(made.name) as other:
        made.buf[5000] = 7
        assert other.buf[5000] == made.buf[5000]
        other.buf[5001] = 8
        assert made.buf[5001] == other.buf[5001]


def test_opener_does_not_unlink(made: Segment) -> None:
    """Only the creator's close removes the name."""
    made.ready()
    Segment.open(made.name).close()
    assert path(made.name).exists()


def test_open_waits_until_ready(made: Segment) -> None:
    """An opener that comes too early waits for READY."""
    opened: list[Segment] = []
    opener = threading.Thread(target=lambda: opened.append(Segment.open(made.name, timeout=10)))
    opener.start()
    wait_until(lambda: len([what for what in open_descriptors().values() if made.name in what]) > 1, what="the opener")
    assert not opened
    made.ready()
    opener.join(10)
    opened.pop().close()


def test_never_ready(made: Segment) -> None:
    """An opener gives up on a segment that is never made ready, and keeps nothing open."""
    before = open_descriptors()
    with pytest.raises(LocalError, match="never made ready"):
        Segment.open(made.name, timeout=0.01)
    assert open_descriptors() == before


def test_no_such_segment() -> None:
    """A name that does not exist is ENOENT."""
    with pytest.raises(LocalError) as caught:
        Segment.open("/vhostmp.0.0.0.0")
    assert caught.value.errno == errno.ENOENT


def test_too_small_for_a_header() -> None:
    """A segment shorter than a header is refused, not read beyond its end."""
    before = open_descriptors()
    with Segment.create(64) as one, pytest.raises(LocalError, match="no header"):
        Segment.open(one.name, timeout=0.01)
    assert open_descriptors() == before


@pytest.mark.parametrize("field", ["magic", "version", "size"])
def test_another_version_is_refused(made: Segment, field: str) -> None:
    """A header that says anything else than we would have written is refused by the field's name."""
    made.ready()
    layout.HEADER.write(made.buf, 0, field, layout.HEADER.read(made.buf, 0, field) + 1)
    before = open_descriptors()
    with pytest.raises(LocalError, match=field):
        Segment.open(made.name)
    assert open_descriptors() == before


def test_no_room() -> None:
    """A segment larger than /dev/shm fails at once with ENOSPC, and leaves neither name nor descriptor."""
    free = os.statvfs("/dev/shm")
    before = (open_descriptors(), segment_names())
    with pytest.raises(SysError) as caught:
        Segment.create(free.f_blocks * free.f_frsize + (1 << 40))
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM)
    assert open_descriptors() == before[0]
    assert {name for name in segment_names() - before[1] if name.split(".")[2] == str(os.getpid())} == set()


@pytest.fixture
def lone_user(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Be a user whose segments nobody else sweeps: any pool that starts on this machine sweeps its own user's."""
    tmp_path_factory.getbasetemp()  # made, by the first one who asks, for the user that we are
    uid = os.getuid() + 1_000_000 + os.getpid()
    monkeypatch.setattr(os, "getuid", lambda: uid)
    return uid


def make_named(uid: int, pid: int, start: int) -> str:
    """Make a segment by name."""
    name = f"/vhostmp.{uid}.{pid}.{start}.0"
    posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=16).close_fd()
    return name


def test_sweep_takes_dead_owners_only(lone_user: int) -> None:
    """`sweep` removes what a killed process left, and nothing that belongs to a living one."""
    with subprocess.Popen(["sleep", "100"]) as owner:
        orphan = make_named(lone_user, owner.pid, process_start(owner.pid))
        assert sweep() == []
        owner.kill()
        owner.wait()
    with Segment.create(SIZE) as living:
        assert sweep() == [orphan]
        assert path(living.name).exists()
    assert not path(orphan).exists()


@pytest.mark.parametrize(
    "name",
    ["vhostmp.{uid}.x.1.1", "vhostmp.{uid}.1", "vhostmp.{uid}.1.1.1.1", "vhostmp.{uid}.-1.1.1", "vhostmpx.{uid}.1.1.1"],
)
def test_sweep_leaves_strangers_alone(lone_user: int, name: str) -> None:
    """Names that we would not have given are not ours to remove."""
    stranger = f"/{name.format(uid=lone_user)}"
    shared = posix_ipc.SharedMemory(stranger, posix_ipc.O_CREX, size=16)
    try:
        assert stranger not in sweep()
        assert path(stranger).exists()
    finally:
        shared.close_fd()
        shared.unlink()


def test_sweep_leaves_what_is_held(lone_user: int) -> None:
    """A segment of a dead process that somebody holds, for one to come, is left alone until they let go of it."""
    program = (
        f"import os, time; os.getuid = lambda: {lone_user}\n"
        "from vhostmp.shm.segment import Segment\n"
        f"segment = Segment.create({SIZE}); print(segment.name, segment.fd, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        name, fd = owner.stdout.readline().split()
        pidfd = os.pidfd_open(owner.pid)
        held = ctypes.CDLL(None).syscall(438, pidfd, int(fd), 0)  # pidfd_getfd: as if it had been sent to us
        os.close(pidfd)
        owner.kill()
        owner.wait()
    assert held >= 0
    assert sweep() == []
    os.close(held)
    assert sweep() == [name]


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "digits"])
def test_sweep_meets_what_others_left(lone_user: int, tmp_path: Path, kind: str) -> None:
    """What anybody may put into /dev/shm under such a name neither holds a sweep up nor makes it fail."""
    stranger = path(f"/vhostmp.{lone_user}.1.{'²' if kind == 'digits' else '1'}.0")
    match kind:
        case "pipe":
            os.mkfifo(stranger)
        case "folder":
            stranger.mkdir()
        case "link":
            stranger.symlink_to(tmp_path)
        case _:
            stranger.touch()
    try:
        assert sweep() == []
        assert os.path.lexists(stranger)
    finally:
        stranger.rmdir() if kind == "folder" else stranger.unlink()


def test_sweep_knows_a_pid_that_came_round(lone_user: int) -> None:
    """A segment whose pid lives but with another start time is a dead one's."""
    name = make_named(lone_user, os.getpid(), process_start(os.getpid()) + 1)
    assert sweep() == [name]


def test_process_start() -> None:
    """A living process has a start time, one that is dead or a corpse has 0."""
    assert process_start(os.getpid()) > 0
    child = os.fork()
    if child == 0:
        os._exit(0)
    wait_until(lambda: Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    assert process_start(child) == 0
    os.waitpid(child, 0)
    assert process_start(child) == 0


def test_unlink_twice(made: Segment) -> None:
    """The name may go before the segment is closed, by whoever was first."""
    made.unlink()
    made.unlink()
    made.buf[SIZE - 1] = 1
    assert segment.PREFIX == "vhostmp"


@pytest.mark.parametrize("huge", [False, True])
def test_nameless_segment(*, huge: bool) -> None:
    """A segment without a name is memory like any other, mapped elsewhere by its descriptor; nothing is left of it."""
    size, value = 5000, 7
    before = set(segment_names())
    with Segment.nameless(size, huge=huge) as made, Segment("copy", os.dup(made.fd), made.size, owner=False) as copy:
        assert made.size >= size
        made.buf[size - 1] = value
        assert copy.buf[size - 1] == value
        assert set(segment_names()) == before
