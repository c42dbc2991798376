"""The holder and its store: what is put there outlives who put it, goes to one process at a time, and ends in time."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import termios
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import helpers
from vhostmp import transport
from vhostmp.errors import LocalError, VhostError
from vhostmp.fdstore import HeldStore, find_holder, hold_path, start_holder
from vhostmp.workers.channel import close_all

pytestmark = pytest.mark.slow

TIMEOUT = 30.0


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Return a control path."""
    return str(tmp_path / "c")


@pytest.fixture
def store(path: str) -> Iterator[HeldStore]:
    """Start a holder; it has ended afterwards, and taken its socket along."""
    made = start_holder(path)
    made.settle(TIMEOUT, [])
    yield made
    made.detach()
    with contextlib.suppress(LocalError):
        if (found := find_holder(path)) is not None:
            close_all(found[1].values())
            found[0].goodbye()
    helpers.wait_until(lambda: not os.path.exists(hold_path(path)))


def test_what_is_put_is_found(store: HeldStore, path: str) -> None:
    """Everything that was put and not dropped comes to the next one, more than one message holds included."""
    pipes = [os.pipe() for _ in range(150)]
    store.put({f"{index}.{end}": fd for index, pair in enumerate(pipes) for end, fd in enumerate(pair)})
    store.drop(["3.0", "3.1", "never there"])
    for index, (read, write) in enumerate(pipes):
        os.write(write, struct.pack("I", index))
        os.close(read)
        os.close(write)
    store.detach()
    found = find_holder(path)
    assert found is not None
    assert found[1].keys() == {f"{index}.{end}" for index in range(150) for end in (0, 1)} - {"3.0", "3.1"}
    for index in (0, 149):
        assert os.read(found[1][f"{index}.0"], 4) == struct.pack("I", index)
    close_all(found[1].values())
    found[0].detach()


def test_one_at_a_time(store: HeldStore, path: str) -> None:
    """While one is connected another is refused in one line; one that only looks gets copies and changes nothing."""
    fd = os.eventfd(7)
    store.put({"a": fd})
    with pytest.raises(LocalError, match="in use by a running program") as refused:
        find_holder(path)
    assert refused.value.errno == errno.EADDRINUSE
    looked = find_holder(path, look=True)
    assert looked is not None
    assert os.eventfd_read(looked[1]["a"]) == 7  # noqa: PLR2004 - what it was made with
    close_all(looked[1].values())
    looked[0].detach()
    store.put({"b": fd})
    os.close(fd)


def test_who_may_connect(path: str, store: HeldStore) -> None:
    """The socket is of mode 0600; who connects and says nothing, or nonsense, is hung up on and disturbs nobody."""
    assert stat.S_IMODE(os.stat(hold_path(path)).st_mode) == stat.S_IRUSR | stat.S_IWUSR
    for said in (b"", b"nonsense", b'{"op": "put", "names": ["x"]}'):
        with transport.dial(hold_path(path), kind=socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(helpers.PATIENCE)
            if said:
                sock.send(said)
            assert sock.recv(1) == b""
    fd = os.eventfd(0)
    store.put({"a": fd})
    os.close(fd)


def test_nobody_comes(store: HeldStore, path: str, tmp_path: Path) -> None:
    """At the end the channels of processes close first, then the rest, and the paths go, if still ours alone."""
    ours, theirs, heard = (str(tmp_path / name) for name in ("ours", "theirs", "heard"))
    listeners = [transport.listen(where) for where in (ours, theirs, heard)]
    store.settle(0.0, [ours, theirs, heard])
    listeners.pop(0).forget()
    os.rename(theirs, theirs + ".moved")
    Path(theirs).touch()
    first, second = socket.socketpair(), socket.socketpair()
    store.put({"process.1.channel": first[0].fileno(), "connection": second[0].fileno()})
    first[0].close()
    second[0].close()
    store.end()
    for _, end in (first, second):
        end.settimeout(helpers.PATIENCE)
        assert end.recv(1) == b""
        end.close()
    helpers.wait_until(lambda: not os.path.exists(hold_path(path)))
    assert not os.path.exists(ours)
    assert os.path.exists(theirs)
    assert os.path.exists(heard)
    for listener in listeners:
        listener.close()


def test_a_clean_end(store: HeldStore, path: str) -> None:
    """After a goodbye nothing is left; nobody is found there."""
    store.goodbye()
    assert find_holder(path) is None


def holders(path: str) -> list[int]:
    """List the holders of a control path."""
    return [pid for pid in helpers.process_table() if hold_path(path) in helpers.command_line(pid)]


def test_killed_again(path: str) -> None:
    """Whoever kills a holder a second time, as when no other one could be started, kills nobody else."""
    store = start_holder(path)
    store.kill()
    os.unlink(hold_path(path))
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        pidfds = [os.pidfd_open(other.pid) for _ in range(8)]  # one has the number that the holder's had
        store.kill()
        said, _ = other.communicate(b"alive")
        close_all(pidfds)
        assert said == b"alive"


def test_no_descriptor_for_a_holder(path: str) -> None:
    """Where descriptors end while a holder is started it is an error, whichever is lacking, and nothing is left."""
    before = set(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    refused = 0
    try:
        for room in range(len(before), len(before) + 50):
            resource.setrlimit(resource.RLIMIT_NOFILE, (room, limits[1]))
            try:
                start_holder(path).goodbye()
            except VhostError:
                refused += 1
            else:
                break
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert set(os.listdir("/proc/self/fd")) == before
            assert not os.path.exists(hold_path(path))
            assert not holders(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert refused


@contextlib.contextmanager
def busy(path: str) -> Generator[ThreadPoolExecutor]:
    """Have the holder get no further while the block runs, which may begin what waits for it."""
    pid = helpers.process_with(hold_path(path))
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as waiting:
        try:
            helpers.wait_until(lambda: helpers.process_state(pid) == "T")
            yield waiting
        finally:
            os.kill(pid, signal.SIGCONT)


def unread(fd: int) -> int:
    """Return how much of what was sent on a socket is still there, as the kernel counts."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.TIOCOUTQ, count)
    return count[0]


def has_dialled(path: str) -> bool:
    """Whether somebody waits to be taken by a holder."""
    wanted = hold_path(path)
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(line.endswith(wanted) for line in lines) > 1  # the one that listens


@pytest.mark.parametrize("look", [True, False], ids=["look", "adopt"])
def test_what_was_put_at_the_last_moment(store: HeldStore, path: str, look: bool) -> None:
    """Whoever comes is given everything that was put before, however much of it the holder had not got round to."""
    fd = os.eventfd(0)
    with busy(path) as waiting:
        for number in range(5):
            store.put({str(number): fd})
        if not look:
            store.detach()
        coming = waiting.submit(find_holder, path, look=look)
        helpers.wait_until(lambda: has_dialled(path), what="the other one")
    os.close(fd)
    found = coming.result()
    assert found is not None
    assert sorted(found[1]) == [str(number) for number in range(5)]
    close_all(found[1].values())
    found[0].detach()


def test_goodbye_at_the_last_moment(store: HeldStore, path: str) -> None:
    """Whoever comes when the control process has just said goodbye finds nobody, and the holder ends."""
    fd = os.eventfd(0)
    with busy(path) as waiting:
        store.put({"a": fd})
        before = unread(store.fileno())
        ending = waiting.submit(store.goodbye)
        helpers.wait_until(lambda: unread(store.fileno()) > before, what="the goodbye")
        coming = waiting.submit(find_holder, path, look=True)
        helpers.wait_until(lambda: has_dialled(path), what="the other one")
    os.close(fd)
    assert coming.result() is None
    ending.result()
    helpers.wait_until(lambda: not os.path.exists(hold_path(path)))
