"""systemd's file descriptor store: a manager that behaves as its manuals say, and a server that is killed under it."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest

from tests import helpers
from tests.helpers import told
from tests.integration.serving import ask, command
from tests.integration.test_swap import whole
from tests.integration.traffic import Traffic
from tests.net_driver import Guest
from tests.peers.processes import Child
from tests.remote import RemoteDevice
from vhostmp import systemd_store
from vhostmp.cli import EXIT_MISTAKE
from vhostmp.errors import LocalError, WorkerDied
from vhostmp.keeper import end_what_waits
from vhostmp.systemd_store import HANDED, NAMES, PREFIX, ROOM_MAX, as_handed, from_handed, is_same_file
from vhostmp.workers.channel import close_all

pytestmark = pytest.mark.slow

ROOM: Final = 200
FIRST: Final = 3
#: Gives a program what systemd does: descriptors from 3 on, and who is meant.
BOOT: Final = """
import fcntl, json, os, sys
names, fds = zip(*json.loads(sys.argv[1])) if json.loads(sys.argv[1]) else ((), ())
high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 600) for fd in fds]
for place, fd in enumerate(high):
    os.dup2(fd, 3 + place)
    os.close(fd)
os.closerange(3 + len(high), 600)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(high)), LISTEN_FDNAMES=":".join(names))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Manager:
    """The side of systemd: one of each open file, kept until it is removed by name.

    As sd_notify(3), sd_listen_fds(3), systemd.service(5) and "The File Descriptor Store" of systemd.io have it: it
    listens to the main process alone (NotifyAccess=main), a name has up to 255 printable characters and no colon, what
    there is no room for is passed over without a word, a barrier comes by itself with one descriptor, and on a start
    what socket units have opened comes first, of what is stored the newest. What may be polled it would drop at a
    hang-up: it takes nothing of that kind.
    """

    def __init__(self, folder: Path) -> None:
        """Listen for messages."""
        self.address: Final = str(folder / "notify")
        self.stored: list[tuple[str, int]] = []
        self.states: list[str] = []
        self.passed_over = 0
        self.no_room = 0
        self.strangers = 0
        self.main = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock.bind(self.address)
        self._thread = threading.Thread(target=self._run, name="manager")
        self._thread.start()

    def _run(self) -> None:
        while True:
            data, control, _, _ = self._sock.recvmsg(4096, socket.CMSG_SPACE(16 * 4) + socket.CMSG_SPACE(3 * 4))
            if data == b"end":
                return
            fds = array.array("i")
            sender = 0
            for _, kind, payload in control:
                if kind == socket.SCM_RIGHTS:
                    fds.frombytes(payload)
                else:
                    sender = int.from_bytes(payload[:4], sys.byteorder)
            helpers.wait_until(lambda: self.main)
            if sender != self.main:
                self.strangers += 1
                close_all(fds)
                continue
            fields = dict(line.split("=", 1) for line in data.decode().split("\n"))
            assert len(name := fields.get("FDNAME", "")) < 256  # noqa: PLR2004
            assert name.isascii()
            assert not set(name) & set(":\n")
            self._take(fields, fds)

    def _take(self, fields: Mapping[str, str], fds: Sequence[int]) -> None:
        """Do what one message says."""
        match fields:
            case {"FDSTORE": "1", "FDNAME": name, "FDPOLL": "0"}:
                for fd in fds:
                    if len(self.stored) >= ROOM:
                        self.no_room += 1
                        os.close(fd)
                    elif any(is_same_file(fd, other) for _, other in self.stored):
                        self.passed_over += 1
                        os.close(fd)
                    else:
                        self.stored.insert(0, (name, fd))
            case {"FDSTOREREMOVE": "1", "FDNAME": name}:
                for known, fd in self.stored:
                    if known == name:
                        os.close(fd)
                self.stored = [pair for pair in self.stored if pair[0] != name]
            case {"BARRIER": "1"}:
                assert (len(fields), len(fds)) == (1, 1)
                os.close(fds[0])
            case _:
                self.states += fields

    def start(self, log: Path, *words: str) -> Child:
        """Start the unit's program, with what is stored."""
        passed = [("vhostmp.socket", self._sock.fileno()), *self.stored]  # as a socket unit of that name would be
        words_of_all = [sys.executable, "-c", BOOT, json.dumps(passed), "-m", "vhostmp", *words]
        self.states.clear()
        self.main = 0
        environment = {"NOTIFY_SOCKET": self.address, "FDSTORE": str(ROOM)}
        child = Child(words_of_all, log, env=environment, pass_fds=[fd for _, fd in passed])
        self.main = child.pid
        child.wait_for(lambda: "READY" in self.states, "READY=1")
        return child

    def end(self) -> None:
        """Drop everything."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"end", self.address)
        self._thread.join()
        for _, fd in self.stored:
            os.close(fd)
        self._sock.close()


def await_end(family: set[int]) -> None:
    """Wait until processes are gone."""
    helpers.wait_until(lambda: not any(map(helpers.process_alive, family)))


def ended(child: Child) -> None:
    """End a server in order."""
    child.terminate()
    status = child.wait()
    child.end()
    assert status == 0, child.output


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """Be systemd."""
    made = Manager(tmp_path)
    yield made
    made.end()


@pytest.mark.parametrize("kill_mode", ["process", "control-group"])
def test_restarted_by_systemd(manager: Manager, tmp_path: Path, kill_mode: str) -> None:
    """What systemd gives back is adopted; with the workers, or, where it has killed those too, with new ones."""
    words = ["serve", "--socket-path", str(tmp_path / "s"), "--control-path", str(tmp_path / "c")]
    words += ["--backend", "loopback"]
    child = manager.start(tmp_path / "serve.0.log", *words)
    device = RemoteDevice(tmp_path / "s")
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], returns=kill_mode == "process") as traffic:
        for life in range(1, 4):
            traffic.progress_sent(300)
            family = helpers.descendants(child.pid)
            workers = {worker["pid"] for worker in ask("show", tmp_path / "c")["workers"]}
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            if kill_mode != "process":
                for pid in family:
                    with contextlib.suppress(ProcessLookupError):  # the spawner's end ends it too
                        os.kill(pid, signal.SIGKILL)
                await_end(family)
            child.end()
            child = manager.start(tmp_path / f"serve.{life}.log", *words)
            shown = ask("show", tmp_path / "c")
            assert shown["adoptions"] == life
            assert shown["devices"][0]["connected"]
            assert ({worker["pid"] for worker in shown["workers"]} == workers) == (kill_mode == "process")
            traffic.progress_sent(300)
            traffic.pause()
            guest.drop_idle_buffers(b"gone")
            guest.renew_buffers()
            traffic.resume()
        assert (manager.passed_over, manager.strangers) == (0, 0)
        tally = traffic.finish()
        if kill_mode == "process":
            whole(tally)
    ended(child)
    assert manager.stored == []
    assert not list(tmp_path.glob("*.hold"))


def test_upgrade_under_systemd(manager: Manager, tmp_path: Path) -> None:
    """New code that is executed in place gets the store's files from the old one: systemd passes it none."""
    words = ["serve", "--socket-path", str(tmp_path / "s"), "--control-path", str(tmp_path / "c")]
    child = manager.start(tmp_path / "serve.log", *words, "--backend", "loopback")
    device = RemoteDevice(tmp_path / "s")
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=200) as traffic:
        traffic.progress(300)
        assert ask("upgrade", tmp_path / "c")["pid"] == child.pid
        traffic.progress(300)
        whole(traffic.finish())
    ended(child)
    assert manager.stored == []


def test_too_little_room(manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is too small is said so; what is served goes on."""
    monkeypatch.setattr(sys.modules[__name__], "ROOM", 5)
    words = ["serve", "--socket-path", str(tmp_path / "s"), "--control-path", str(tmp_path / "c")]
    child = manager.start(tmp_path / "serve.log", *words, "--backend", "loopback")
    assert "FileDescriptorStoreMax=5 is too small" in child.output
    device = RemoteDevice(tmp_path / "s")
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=200) as traffic:
        traffic.progress(300)
        whole(traffic.finish())
    done = command("upgrade", "--control-path", str(tmp_path / "c"))
    assert (done.returncode, len(told(done.stderr))) == (EXIT_MISTAKE, 1), done
    assert "nothing outlives this server" in done.stderr
    assert (manager.stored, manager.no_room) == ([], 0), "what is not all there is of no use"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    await_end(helpers.descendants(child.pid))
    child.end()
    child = manager.start(tmp_path / "serve.1.log", *words)  # which begins anew
    assert ask("show", tmp_path / "c")["adopted"] is None
    ended(child)


def test_room_for_the_names() -> None:
    """However large the store, no more is put there than the environment of the next start has room for."""
    record = len("LISTEN_FDNAMES=") + len(NAMES) + ROOM_MAX * len(f":{PREFIX}{10**11}")
    assert record < 128 << 10
    files = {NAMES: 99999, **{f"{PREFIX}{10**10 + number}": 10**5 - ROOM_MAX + number for number in range(ROOM_MAX)}}
    assert len(f"{HANDED}={as_handed(files)}") < 128 << 10, "nor more than there is when new code takes our place"
    assert from_handed(as_handed(files)) == files


def test_what_was_not_sent_is_not_stored(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """What systemd could not be sent counts as stored nowhere: once it can be, it is sent."""
    manager.main = os.getpid()
    event = os.eventfd(0)
    store = systemd_store.SystemdStore(manager.address, ROOM, {})
    try:
        with monkeypatch.context() as patch:
            patch.setattr("vhostmp.transport.send_datagram", no_answer)
            with pytest.raises(WorkerDied, match="cannot be reached"):
                store.put({"one": event})
        store.put({"other": event})
        assert [name.startswith(PREFIX) for name, fd in manager.stored if is_same_file(fd, event)] == [True]
    finally:
        store.goodbye()
        os.close(event)
    assert manager.stored == []


def no_answer(*arguments: object, **named: object) -> None:
    """Be a socket where nobody listens."""
    raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED), str((arguments, named)))


def test_files_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kcmp() is forbidden, as in some containers, another call tells files apart, or one line says what to do."""
    monkeypatch.setattr(systemd_store, "_SYS_KCMP", -1)
    ends = os.pipe()
    try:
        assert is_same_file(ends[0], ends[0])
        assert not is_same_file(*ends)
    except OSError:  # before Linux 6.10
        with pytest.raises(LocalError, match=r"kcmp.* is refused .*: leave FileDescriptorStoreMax= out of the unit"):
            systemd_store.SystemdStore(str(tmp_path / "notify"), ROOM, {})
    finally:
        close_all(ends)


def test_who_refused_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither call tells, the line has the error of kcmp(), which it names, not that of the other."""
    monkeypatch.setattr(systemd_store, "_SYS_KCMP", -1)
    monkeypatch.setattr(systemd_store, "_F_DUPFD_QUERY", -1)
    with pytest.raises(LocalError, match=os.strerror(errno.ENOSYS)) as raised:
        systemd_store.SystemdStore(str(tmp_path / "notify"), ROOM, {})
    assert raised.value.errno == errno.ENOSYS


def sound(manager: Manager) -> None:
    """Leave everything as it is."""
    del manager


def other_format(manager: Manager) -> None:
    """Have what the names mean be in a format of another version."""
    (names,) = (fd for name, fd in manager.stored if name == NAMES)
    with mmap.mmap(names, mmap.PAGESIZE) as record:
        record[8:16] = (99).to_bytes(8, sys.byteorder)


@pytest.mark.parametrize("damage", [sound, other_format])
def test_begin_anew(manager: Manager, tmp_path: Path, damage: Callable[[Manager], None]) -> None:
    """With --adopt-timeout 0 what systemd keeps is ended first, and it keeps nothing any more; readable or not."""
    words = ["serve", "--socket-path", str(tmp_path / "s"), "--control-path", str(tmp_path / "c")]
    child = manager.start(tmp_path / "serve.0.log", *words, "--backend", "loopback")
    device = RemoteDevice(tmp_path / "s")
    with Guest(device.as_net_device()) as guest:
        # But for the spare, which ends with whoever would give it a place.
        names = helpers.by_name(child.pid, "vhostmp-spare")
        family = set(names.values()) - {names["vhostmp-spare"]}
        with Traffic(guest.pairs[0], window=200) as traffic:
            traffic.progress(300)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            child.end()
            traffic.progress(300)
            assert all(map(helpers.process_alive, family))
            traffic.pause()
            damage(manager)
            child = manager.start(tmp_path / "serve.1.log", *words, "--adopt-timeout", "0")
            assert not any(map(helpers.process_alive, family))
            assert device.frontend.hung_up()
            traffic.abandon()
    assert ("format 99" in child.output) == (damage is other_format)
    assert ask("show", tmp_path / "c")["adopted"] is None
    assert manager.stored == []
    ended(child)


@pytest.mark.parametrize("is_stuck", [False, True])
def test_begin_anew_where_files_cannot_be_compared(
    manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stuck: bool
) -> None:
    """The same where kcmp() is refused: processes see the end of their channels first, and who does not end is killed.

    Only then does a front-end see its socket close.
    """
    manager.main = os.getpid()
    connection, front_end = socket.socketpair()
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    script = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.recv(1)" + "; s.recv(1)" * is_stuck
    script += "; sys.stdin.read()" * is_stuck
    with contextlib.ExitStack() as stack:
        words = [sys.executable, "-c", script, str(theirs.fileno())]
        process = stack.enter_context(subprocess.Popen(words, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE))
        stack.callback(process.kill)
        theirs.close()
        store = systemd_store.SystemdStore(manager.address, ROOM, {})
        pidfd = os.pidfd_open(process.pid)
        store.put(
            {"connection.1": connection.fileno(), "process.1.channel": channel.fileno(), "process.1.pidfd": pidfd}
        )
        store.detach()
        connection.close()
        channel.close()
        os.close(pidfd)
        passed = {name: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for name, fd in manager.stored}
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        monkeypatch.setenv("FDSTORE", str(ROOM))
        monkeypatch.setattr(systemd_store, "_listened", lambda: passed)
        monkeypatch.setattr(systemd_store, "is_same_file", refused)
        end_what_waits(str(tmp_path / "c"))
        assert process.wait(helpers.PATIENCE) == (-signal.SIGKILL if is_stuck else 0)
    assert front_end.recv(1) == b""
    front_end.close()
    assert manager.stored == []


def refused(one: int, other: int) -> bool:
    """Be a kernel that compares nothing."""
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str((one, other)))
