"""The control socket: one line in, one line out, whoever talks."""

from __future__ import annotations

import errno
import json
import logging
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.helpers import PATIENCE
from vhostmp import control_api, transport
from vhostmp.control_api import CLIENTS_MAX, REQUEST_BYTES_MAX, ControlServer, Request
from vhostmp.errors import LocalError
from vhostmp.eventloop import EventLoop

LARGE = "x" * 300_000
LARGE_REPLY = json.dumps({"ok": True, "result": LARGE}).encode() + b"\n"


def handler(request: Request) -> object:
    """Echo, or fail as told."""
    match request:
        case {"cmd": "fail"}:
            raise LocalError("no such thing: choose another", errno.ENODEV)
        case {"cmd": "crash"}:
            raise ZeroDivisionError
        case {"cmd": "large"}:
            return LARGE
        case _:
            return {"echo": dict(request)}


@attrs.frozen
class Place:
    """A served control socket."""

    loop: EventLoop
    path: str
    server: ControlServer

    def settle(self) -> None:
        """Serve until nothing is ready."""
        while self.loop.turn(0):
            pass

    def client(self) -> socket.socket:
        """Connect."""
        sock = transport.dial(self.path)
        sock.settimeout(PATIENCE)
        return sock


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A server whose loop runs in `settle`."""
    path = str(tmp_path / "ctl")
    with EventLoop() as loop:
        server = ControlServer(loop, path, handler)
        yield Place(loop, path, server)
        server.close()
        server.close()
    assert not Path(path).exists()


@pytest.fixture
def running(place: Place) -> Iterator[Place]:
    """A server whose loop runs in a thread."""
    thread = threading.Thread(target=place.loop.run)
    thread.start()
    yield place
    place.loop.stop()
    thread.join()


def ask(place: Place, sock: socket.socket, data: bytes) -> list[Any]:
    """Send bytes and return the replies there are."""
    sock.sendall(data)
    place.settle()
    return [json.loads(line) for line in sock.recv(1 << 20).splitlines()]


def test_socket_is_private(place: Place) -> None:
    """Only the owner may talk to it."""
    assert stat.filemode(Path(place.path).stat().st_mode) == "srw-------"


def test_lines_get_lines(place: Place) -> None:
    """Several requests in one write, and one in several writes, are answered in order."""
    with place.client() as sock:
        first, second = ask(place, sock, b'{"cmd": "a"}\n{"cmd": "b"}\n{"cmd"')
        assert first == {"ok": True, "result": {"echo": {"cmd": "a"}}}
        assert second["result"] == {"echo": {"cmd": "b"}}
        (third,) = ask(place, sock, b': "c"}\n')
        assert third["result"] == {"echo": {"cmd": "c"}}


def test_errors_are_answers(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """A refusal is answered with its text and errno, our own mistake too, and the client may go on."""
    with place.client() as sock:
        assert ask(place, sock, b'{"cmd": "fail"}\n') == [
            {"ok": False, "error": "no such thing: choose another", "errno": errno.ENODEV}
        ]
        with caplog.at_level(logging.CRITICAL):
            (reply,) = ask(place, sock, b'{"cmd": "crash"}\n')
        assert not reply["ok"]
        assert "ZeroDivisionError" in reply["error"]
        assert ask(place, sock, b"{}\n")[0]["ok"]


@pytest.mark.parametrize(
    "line", [b"hello\n", b"[1]\n", b'"x"\n', b"\xff\xfe\n", b"\n", b"[" * 60000 + b"\n", b"x" * (REQUEST_BYTES_MAX + 1)]
)
def test_nonsense_is_answered_and_hung_up(place: Place, line: bytes) -> None:
    """What is no request gets an error, then the end of the connection; the next client is served."""
    with place.client() as sock:
        sock.settimeout(PATIENCE)
        sock.sendall(line)
        place.settle()
        with sock.makefile("rb") as stream:
            assert not json.loads(stream.readline())["ok"]
            assert stream.read() == b""
    with place.client() as sock:
        assert ask(place, sock, b"{}\n")[0]["ok"]


def test_a_client_that_does_not_read(place: Place) -> None:
    """A client that reads nothing is not read from; it costs no wake-ups, and others are served meanwhile."""
    with place.client() as lazy, place.client() as other:
        lazy.sendall(b'{"cmd": "large"}\n' * 20)
        place.settle()
        assert not place.loop.turn(0)
        assert ask(place, other, b"{}\n")[0]["ok"]
        received = b""
        while len(received) < len(LARGE_REPLY) * 20:
            received += lazy.recv(1 << 20)
            place.settle()
        assert received == LARGE_REPLY * 20


def test_clients_that_leave(place: Place) -> None:
    """Clients may go at any time: before a request, in the middle of one, before the answer."""
    for data in (b"", b'{"cmd"', b'{"cmd": "large"}\n'):
        with place.client() as sock:
            sock.sendall(data)
        place.settle()
    with place.client() as sock:
        assert ask(place, sock, b"{}\n")[0]["ok"]


def test_too_many_clients(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Clients beyond the limit are hung up on; when others leave there is room again."""
    socks: list[socket.socket] = []
    for _ in range(CLIENTS_MAX + 1):
        socks.append(place.client())
        place.settle()
    assert socks[-1].recv(1) == b""
    assert "refused a connection" in caplog.text
    for sock in socks:
        sock.close()
    place.settle()
    with place.client() as sock:
        assert ask(place, sock, b"{}\n")[0]["ok"]


def test_call(running: Place) -> None:
    """The client side returns the result, or raises the error with its errno."""
    assert control_api.call(running.path, {"cmd": "x", "n": 1}) == {"echo": {"cmd": "x", "n": 1}}
    with pytest.raises(LocalError, match="no such thing: choose another") as caught:
        control_api.call(running.path, {"cmd": "fail"})
    assert caught.value.errno == errno.ENODEV
    assert control_api.call(running.path, {"cmd": "large"}) == LARGE


def test_call_nobody(tmp_path: Path) -> None:
    """Without a server there is one line that says what to do."""
    with pytest.raises(LocalError, match="there is no such socket: start the program"):
        control_api.call(str(tmp_path / "ctl"), {"cmd": "show"})


def test_call_somebody_else(tmp_path: Path) -> None:
    """What answers otherwise, or not at all, is said to be no vhostmp server."""
    listener = transport.listen(str(tmp_path / "s"))

    def hang_up() -> None:
        sock = listener.accept()
        while sock is None:
            sock = listener.accept()
        sock.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    with pytest.raises(LocalError, match=r"does not answer like a vhostmp server|no answer from"):
        control_api.call(str(tmp_path / "s"), {"cmd": "show"})
    thread.join()
    listener.close()


def test_live_control_socket_is_refused(running: Place) -> None:
    """A second server does not take over the first one's control socket."""
    with EventLoop() as loop, pytest.raises(LocalError, match="in use"):
        ControlServer(loop, running.path, handler)
    assert control_api.call(running.path, {})
