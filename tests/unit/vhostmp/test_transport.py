"""Sockets: descriptors that are never lost, paths that are never somebody else's, errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import grp
import logging
import os
import random
import resource
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.rig import descriptor_count
from vhostmp import transport
from vhostmp.consts import Request
from vhostmp.errors import LocalError
from vhostmp.protocol.codec import BadMessage, Message
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import Frontend, message, u64, vring
from vhostmp.transport import Listener, Transport

Ends = tuple[Frontend, Transport]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A front-end and our end of its connection."""
    ours, theirs = transport.connected_pair()
    with Frontend(ours) as client, Transport(theirs) as server:
        yield client, server


# --- messages and descriptors ----------------------------------------------------------------------------------------


def test_nothing_there(ends: Ends) -> None:
    """Without a message receive() returns at once, on a socket in blocking mode too."""
    assert ends[1].receive() is None


@pytest.mark.parametrize("seed", range(5))
def test_bytes_in_any_pieces(ends: Ends, seed: int) -> None:
    """Messages and their descriptors arrive whole whatever pieces the bytes come in."""
    client, server = ends
    rng = random.Random(seed)
    with frontend.eventfds(1) as fds:
        for _ in range(50):
            rest = message(Request.SET_VRING_CALL, u64(0))
            rights = list(fds)
            received: Message | None = None
            while rest:
                assert received is None
                size = rng.randint(1, len(rest))
                client.send_raw(rest[:size], rights)
                rest, rights = rest[size:], []
                received = server.receive()
            assert received is not None
            assert len(received.fds) == 1
            server.release()


def test_fds_live_until_release(ends: Ends) -> None:
    """Received descriptors are open, close-on-exec and the same file, until release() closes them."""
    client, server = ends
    with frontend.eventfds(1) as fds:
        count = descriptor_count()
        client.send(Request.SET_VRING_CALL, u64(0), fds)
        received = server.receive()
        assert received is not None
        (fd,) = received.fds
        assert not os.get_inheritable(fd)
        os.eventfd_write(fd, 1)
        assert os.eventfd_read(fds[0]) == 1
        server.release()
        assert descriptor_count() == count


def test_fds_of_two_messages_stay_apart(ends: Ends) -> None:
    """Two messages in the socket at once each keep their own descriptors."""
    client, server = ends
    with frontend.eventfds(2) as fds:
        for index in range(2):
            os.eventfd_write(fds[index], index + 1)
            client.send(Request.SET_VRING_CALL, u64(index), [fds[index]])
        for index in range(2):
            received = server.receive()
            assert received is not None
            assert os.eventfd_read(received.fds[0]) == index + 1
            server.release()


@pytest.mark.parametrize("cut", [1, 11, 12, 15])
def test_close_inside_a_message(ends: Ends, cut: int) -> None:
    """A hang-up inside a message is an error that says so, and the descriptors that came are closed."""
    client, server = ends
    with frontend.eventfds(2) as fds:
        count = descriptor_count()
        client.send_raw(message(Request.SET_VRING_CALL, u64(0))[:cut], fds)
        assert server.receive() is None
        assert descriptor_count() == count + 2
        client.close()
        with pytest.raises(BadMessage, match="hang-up after"):
            server.receive()
        assert descriptor_count() == count - 1


def test_close_between_messages(ends: Ends) -> None:
    """A hang-up between messages is the end, not an error; again and again."""
    client, server = ends
    client.close()
    for _ in range(2):
        with pytest.raises(EOFError):
            server.receive()


def test_our_close_closes_what_was_received(ends: Ends) -> None:
    """Closing the transport inside a message closes the descriptors it holds; closing twice is harmless."""
    client, server = ends
    with frontend.eventfds(2) as fds:
        count = descriptor_count()
        client.send_raw(b"\x05", fds)
        assert server.receive() is None
        server.close()
        server.close()
        assert descriptor_count() == count - 1


def test_no_room_for_a_descriptor(ends: Ends) -> None:
    """Out of descriptors, the message is refused and those that did arrive are closed."""
    client, server = ends
    with frontend.eventfds(8) as fds:
        client.send(Request.SET_VRING_CALL, u64(0), fds)
        count = descriptor_count()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        holes = [os.dup(0) for _ in range(highest + 1 - count)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 4, hard))
        try:
            with pytest.raises(BadMessage, match="could be opened"):
                server.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in holes:
                os.close(fd)
        assert descriptor_count() == count


def test_send_never_blocks(ends: Ends) -> None:
    """What the peer does not read waits here, in order, and goes out when it reads."""
    client, server = ends
    data = os.urandom(1 << 20)
    server.send(data)
    assert server.pending
    received = b""
    while len(received) < len(data):
        received += client.sock.recv(1 << 16)
        server.flush()
    assert received == data
    assert not server.pending


def test_send_to_nobody(ends: Ends) -> None:
    """Sending to a peer that has gone is the end of the connection, no signal and no other error."""
    client, server = ends
    client.close()
    with pytest.raises(EOFError):
        server.send(b"x")


# --- places ----------------------------------------------------------------------------------------------------------


def test_listen_accept_and_remove(tmp_path: Path) -> None:
    """A listener accepts connections and takes its path with it."""
    path = tmp_path / "s"
    listener = transport.listen(str(path))
    assert listener.accept() is None
    client = transport.dial(str(path))
    accepted = listener.accept()
    assert accepted is not None
    assert not accepted.get_inheritable()
    for item in (client, accepted, listener, listener):
        item.close()
    assert not path.exists()


@pytest.mark.parametrize(
    ("access", "mode"),
    [(transport.PRIVATE, 0o600), (transport.Access(0o660), 0o660), (transport.Access(0o666, os.getgid()), 0o666)],
)
@pytest.mark.parametrize("umask", [0, 0o77, 0o777])
def test_mode_and_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access: transport.Access, mode: int, umask: int
) -> None:
    """Mode and group are what was asked for, whatever the umask; until then the path is its owner's alone."""
    path = tmp_path / "s"
    seen: list[int] = []
    real = transport.grant

    def looking(where: str, wanted: transport.Access) -> None:
        seen.append(stat.S_IMODE(os.stat(where).st_mode))
        real(where, wanted)

    monkeypatch.setattr(transport, "grant", looking)
    old = os.umask(umask)
    try:
        listener = transport.listen(str(path), access)
    finally:
        os.umask(old)
    assert [found & ~0o600 for found in seen] == [0]
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (mode, os.getgid())
    listener.close()


def test_another_file_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who puts a link in the place of the socket gets nothing: what it leads to keeps its permissions."""
    path, other = tmp_path / "s", tmp_path / "other"
    other.touch(0o600)
    real = transport.grant

    def exchanged(where: str, wanted: transport.Access) -> None:
        os.unlink(where)
        os.symlink(other, where)
        real(where, wanted)

    monkeypatch.setattr(transport, "grant", exchanged)
    with pytest.raises(LocalError):
        transport.listen(str(path), transport.Access(0o666))
    assert stat.filemode(other.stat().st_mode) == "-rw-------"


def test_group_that_may_not_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that this user may not give is one line that says how one may, and no socket is left."""

    def refuse(*_: object) -> NoReturn:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    group = grp.getgrgid(0).gr_name
    with pytest.raises(LocalError, match=f"s to group {group}: this process is not in it: usermod -aG {group} USER"):
        transport.listen(str(tmp_path / "s"), transport.Access(0o660, 0))
    with pytest.raises(LocalError, match="to group 54321: this process is not in it"):
        transport.listen(str(tmp_path / "s"), transport.Access(0o660, 54321))
    assert not (tmp_path / "s").exists()


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    """The socket of a program that has ended is replaced."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as old:
        old.bind(str(path))
    assert path.exists()
    transport.listen(str(path)).close()


def test_live_socket_is_refused(tmp_path: Path) -> None:
    """A socket that somebody listens on is left alone."""
    path = tmp_path / "s"
    first = transport.listen(str(path))
    with pytest.raises(LocalError, match="is in use by a running program: stop that one or choose another path"):
        transport.listen(str(path))
    transport.dial(str(path)).close()
    first.close()


def test_full_backlog_is_alive(tmp_path: Path) -> None:
    """A listener that is too busy to accept is alive."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as busy, socket.socket(socket.AF_UNIX) as one:
        busy.bind(str(path))
        busy.listen(0)
        one.connect(str(path))
        with pytest.raises(LocalError, match="in use"):
            transport.listen(str(path))


def test_a_file_is_not_removed(tmp_path: Path) -> None:
    """What is not a socket is left alone."""
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(LocalError, match="exists and is not a socket: remove it or choose another path"):
        transport.listen(str(path))
    assert path.read_text() == "precious"


def test_somebody_elses_path_is_not_removed(tmp_path: Path) -> None:
    """A listener whose path was replaced by another one's does not remove that."""
    path = tmp_path / "s"
    first = transport.listen(str(path))
    path.unlink()
    second = transport.listen(str(path))
    first.close()
    assert path.exists()
    second.close()


def test_path_lengths(tmp_path: Path) -> None:
    """107 bytes are taken, 108 are refused by their number."""
    room = transport.UNIX_PATH_MAX - len(os.fsencode(tmp_path)) - 1
    transport.listen(str(tmp_path / ("x" * room))).close()
    with pytest.raises(LocalError, match="has 108 bytes and a UNIX socket takes 107: choose a shorter one"):
        transport.listen(str(tmp_path / ("x" * (room + 1))))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing/s", "no directory .*/missing for socket .*: create it or choose another path"),
        ("f/s", "no directory .*/f for"),
    ],
)
def test_missing_directory(tmp_path: Path, name: str, text: str) -> None:
    """A directory that is missing, or none, is named."""
    (tmp_path / "f").touch()
    with pytest.raises(LocalError, match=text):
        transport.listen(str(tmp_path / name))


def test_no_directory_of_its_own() -> None:
    """An empty path is refused."""
    with pytest.raises(LocalError, match="empty"):
        transport.listen("")


@pytest.mark.parametrize(("name", "text"), [("none", "there is no such socket"), ("stale", "nobody listens there")])
def test_dial_nobody(tmp_path: Path, name: str, text: str) -> None:
    """Connecting to nobody says which kind of nobody."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as old:
        old.bind(str(tmp_path / "stale"))
    with pytest.raises(LocalError, match=text):
        transport.dial(str(tmp_path / name))


def test_dial_another_kind(tmp_path: Path) -> None:
    """A socket of another type is said to be one, not that its protocol is wrong."""
    listener = transport.listen(str(tmp_path / "s"), kind=socket.SOCK_SEQPACKET)
    with pytest.raises(LocalError, match="it is a socket of another kind"):
        transport.dial(str(tmp_path / "s"))
    listener.close()


@pytest.mark.parametrize("ours", [True, False])
def test_what_is_said_of_a_stale_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture, ours: bool) -> None:
    """Its removal is told, unless it is this process's own from before an upgrade."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as old:
        old.bind(str(path))
    with caplog.at_level(logging.INFO):
        transport.remove_stale(str(path), ours=ours)
    assert ("of a program that is gone" in caplog.text) is not ours
    assert not path.exists()


# --- inherited descriptors -------------------------------------------------------------------------------------------


def test_adopt_a_listener(tmp_path: Path) -> None:
    """An inherited listening socket is told by SO_ACCEPTCONN; its path is its creator's to remove."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as original:
        original.bind(str(path))
        original.listen()
        adopted = transport.adopt(os.dup(original.fileno()))
        assert isinstance(adopted, Listener)
        with transport.dial(str(path)):
            accepted = adopted.accept()
            assert accepted is not None
            accepted.close()
        adopted.close()
    assert path.exists()


def test_adopt_a_connection() -> None:
    """An inherited connected socket is served as it is, and no child of ours inherits it."""
    one, other = transport.connected_pair()
    fd = other.detach()
    os.set_inheritable(fd, True)
    adopted = transport.adopt(fd)
    assert isinstance(adopted, socket.socket)
    assert not adopted.get_inheritable()
    one.close()
    adopted.close()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("closed", r"fd \d+ is not open"),
        ("huge", "is not open"),
        ("pipe", "is not a socket"),
        ("inet", "is not a UNIX stream socket"),
        ("datagram", "is not a UNIX stream socket"),
        ("fresh", "neither listens nor is connected"),
    ],
)
def test_adopt_what_is_no_good(kind: str, text: str) -> None:
    """Anything else is refused in one line, and left open as it was."""
    read, write = os.pipe()
    makers = {
        "inet": (socket.AF_INET, socket.SOCK_STREAM),
        "datagram": (socket.AF_UNIX, socket.SOCK_DGRAM),
        "fresh": (socket.AF_UNIX, socket.SOCK_STREAM),
    }
    fd = {"pipe": read, "closed": 1 << 19, "huge": 1 << 40}.get(kind) or socket.socket(*makers[kind]).detach()
    count = descriptor_count()
    with pytest.raises(LocalError, match=text):
        transport.adopt(fd)
    assert descriptor_count() == count
    os.close(write)
    os.close(read)
    if kind in makers:
        os.close(fd)


def test_vring_messages_have_no_fds(ends: Ends) -> None:
    """A message without descriptors arrives with none."""
    client, server = ends
    client.send(Request.SET_VRING_NUM, vring(0, 4))
    received = server.receive()
    assert received is not None
    assert received.fds == ()


# --- descriptors that go out ----------------------------------------------------------------------------------------


def _drain(peer: socket.socket) -> tuple[bytes, list[tuple[bytes, str]]]:
    """Read all there is; return it, and for each descriptor the first byte of its message and what it is open on."""
    found: list[tuple[bytes, str]] = []
    everything = b""
    peer.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            data, fds, _flags, _address = socket.recv_fds(peer, 4096, 8)
            for fd in fds:
                found.append((data.strip(b"\0")[:1], os.readlink(f"/proc/self/fd/{fd}")))
                os.close(fd)
            everything += data
    return everything, found


def test_descriptors_leave_with_their_message_and_are_closed() -> None:
    """Descriptors arrive with the first byte of what they were sent with, however long the socket was full before."""
    ours, theirs = transport.connected_pair()
    with Transport(ours) as connection, theirs:
        count = descriptor_count()
        connection.send(bytes(1 << 20))
        wanted: list[tuple[bytes, str]] = []
        for number in (b"1", b"2", b"3"):
            read, write = os.pipe()
            wanted.append((number, os.readlink(f"/proc/self/fd/{read}")))
            os.close(write)
            connection.send(number * 10, [read])
        connection.send(b"tail")
        assert connection.pending
        data = b""
        found: list[tuple[bytes, str]] = []
        while connection.pending:
            connection.flush()
            more, arrived = _drain(theirs)
            data += more
            found += arrived
        assert data == bytes(1 << 20) + b"1" * 10 + b"2" * 10 + b"3" * 10 + b"tail"
        assert found == wanted
        assert descriptor_count() == count


def test_descriptors_that_are_never_sent_are_closed() -> None:
    """A connection that ends while descriptors wait closes them."""
    ours, theirs = transport.connected_pair()
    with theirs, Transport(ours) as connection:
        count = descriptor_count()
        connection.send(bytes(1 << 20))
        read, write = os.pipe()
        os.close(write)
        connection.send(b"x", [read])
        assert descriptor_count() == count + 1
    assert descriptor_count() == count - 2
