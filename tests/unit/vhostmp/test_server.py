"""The server: where front-ends come from, who is let in, what happens when one goes; devices are fakes."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FEATURES, FakeDevice, FakePool, trouble
from tests.rig import descriptor_count
from vhostmp import server, transport
from vhostmp.consts import Request
from vhostmp.errors import LocalError, SynchronizeTimeout
from vhostmp.eventloop import EventLoop
from vhostmp.server import Server
from vhostmp.sources import Source, open_sources
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import Frontend, u64, vring


class Place:
    """A server whose loop runs in `settle`, in the test's own thread."""

    def __init__(self, running: Server, devices: list[FakeDevice]) -> None:
        """Keep what a test looks at."""
        self.server = running
        self.devices = devices

    def settle(self) -> None:
        """Serve until nothing is ready, or all is done."""
        while not self.server.loop.stopped and self.server.loop.turn(0):
            pass

    def show(self) -> Any:
        """Return what `vhostmp show` gets."""
        return self.server.command({"cmd": "show"})


@contextlib.contextmanager
def serving(*sources: Source, **options: Any) -> Generator[Place, None, None]:
    """Serve fakes on these sources; afterwards every device must have been closed."""
    devices: list[FakeDevice] = []

    def make(number: int) -> FakeDevice:
        devices.append(FakeDevice(name=str(number)))
        return devices[-1]

    with Server(FakePool(), make, sources, **options) as running:
        yield Place(running, devices)
    running.close()
    assert all(device.closed for device in devices)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A place for a socket."""
    return str(tmp_path / "s")


def alive(place: Place, client: Frontend) -> bool:
    """Whether a front-end is served."""
    client.send(Request.GET_FEATURES)
    place.settle()
    try:
        return client.reply().u64 == FEATURES | 1 << 30
    except EOFError:
        return False


def test_listening(path: str) -> None:
    """A front-end connects to the path; when it has gone the device is free and the next one is served."""
    with serving(*open_sources([path], [])) as place:
        for _ in range(3):
            with Frontend.connect(path) as client:
                client.send(Request.SET_OWNER)
                assert alive(place, client)
                assert place.show()["devices"][0]["connected"]
                assert place.devices[0].owned
            place.settle()
            assert not place.devices[0].owned
            assert not place.show()["devices"][0]["connected"]
            assert not place.server.loop.stopped
    assert not os.path.exists(path)


def test_descriptors_wait_for_the_rest_of_their_message(path: str) -> None:
    """Descriptors come with the first byte of a message; the server has looked several times before its last one."""
    with (
        serving(*open_sources([path], [])) as place,
        Frontend.connect(path) as client,
        frontend.eventfds(1) as fds,
    ):
        place.settle()
        client.send(Request.SET_OWNER)
        data = frontend.message(Request.SET_VRING_CALL, u64(0))
        for at in range(len(data)):
            client.send_raw(data[at : at + 1], fds if at == 0 else ())
            place.settle()
        call = place.devices[0].rings[0].call
        assert call is not None
        os.eventfd_write(call, 1)
        assert os.eventfd_read(fds[0]) == 1


def test_second_front_end_is_refused(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Two front-ends on one socket: the second is hung up on, the first does not notice."""
    with serving(*open_sources([path], [])) as place, Frontend.connect(path) as first:
        assert alive(place, first)
        with Frontend.connect(path) as second:
            place.settle()
            assert second.hung_up()
        assert alive(place, first)
    assert "refused a second front-end" in caplog.text


@pytest.mark.parametrize("overlap", [False, True])
def test_a_restarted_front_end_is_let_in(path: str, overlap: bool) -> None:
    """A front-end that connects when the one before has gone is served, even if its connection is noticed first."""
    with serving(*open_sources([path], [])) as place:
        old = Frontend.connect(path)
        assert alive(place, old)
        old.send(Request.SET_OWNER)
        place.settle()
        if not overlap:
            old.close()
        with Frontend.connect(path) as new:
            old.close()
            assert alive(place, new)
            assert not place.devices[0].owned


def test_several_devices(tmp_path: Path) -> None:
    """Each socket has its own device; trouble on one does not reach the other, even in the middle of a message."""
    paths = [str(tmp_path / name) for name in "ab"]
    with (
        serving(*open_sources(paths, [])) as place,
        Frontend.connect(paths[0]) as first,
        Frontend.connect(paths[1]) as second,
    ):
        first.send_raw(frontend.message(Request.SET_VRING_NUM, vring(0, 4))[:15])
        place.settle()
        second.send(Request.SET_OWNER)
        assert alive(place, second)
        assert [device.owned for device in place.devices] == [False, True]
        first.send_raw(b"\xff" * 100)
        place.settle()
        assert first.hung_up()
        assert alive(place, second)
        assert [device["device"] for device in place.show()["devices"]] == ["0", "1"]


def test_connecting(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """In the client role the server keeps trying until somebody listens, and again after a hang-up."""
    rounds = range(2)
    with caplog.at_level(logging.INFO), serving(*open_sources([path], [], connect=True)) as place:
        for _ in range(2):
            with contextlib.closing(transport.listen(path)) as listener:
                sock: socket.socket | None = None
                while sock is None:
                    place.server.loop.turn(0.5)
                    sock = listener.accept()
                with Frontend(sock) as client:
                    assert alive(place, client)
            place.settle()
    assert "no front-end yet, will try again" in caplog.text
    assert caplog.text.count("front-end connected") == len(rounds)


def test_connecting_without_descriptors(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the client role a want of descriptors is told, and tried again, at the start and after a hang-up."""
    sources = open_sources([path], [], connect=True)
    with contextlib.closing(transport.listen(path)) as listener, contextlib.ExitStack() as stack:
        with monkeypatch.context() as patch:
            patch.setattr(transport, "_socket", _no_descriptors)
            place = stack.enter_context(serving(*sources))
            for _ in range(2):
                place.server.loop.turn(1)
        assert caplog.text.count("cannot connect to") == len(range(3))
        assert "raise this process's limit of open files" in caplog.text
        while (sock := listener.accept()) is None:
            place.server.loop.turn(0.5)
        with Frontend(sock) as client:
            assert alive(place, client)


@pytest.mark.parametrize("name", ["x" * 200, "no/such"])
def test_connecting_to_what_cannot_be(tmp_path: Path, name: str) -> None:
    """A path that is too long is an error at once; a directory that may yet come is not."""
    sources = open_sources([str(tmp_path / name)], [], connect=True)
    if name == "no/such":
        with serving(*sources):
            pass
    else:
        with pytest.raises(LocalError, match="choose a shorter one"), serving(*sources):
            pass


def test_inherited_connection() -> None:
    """A connected descriptor is served at once; its hang-up is the end."""
    ours, theirs = transport.connected_pair()
    with serving(*open_sources([], [theirs.detach()])) as place, Frontend(ours) as client:
        assert alive(place, client)
        assert not place.server.loop.stopped
        client.close()
        place.settle()
        assert place.server.loop.stopped
        place.server.run()


def test_two_inherited_connections() -> None:
    """With several connected descriptors the last one's hang-up is the end."""
    pairs = [transport.connected_pair() for _ in range(2)]
    with serving(*open_sources([], [theirs.detach() for _, theirs in pairs])) as place:
        for stopped, (ours, _) in enumerate(pairs):
            ours.close()
            place.settle()
            assert place.server.loop.stopped == bool(stopped)


def test_inherited_listener(path: str) -> None:
    """A listening descriptor is served like a path, which is left to its creator."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as original:
        original.bind(path)
        original.listen()
        with serving(*open_sources([], [os.dup(original.fileno())])) as place, Frontend.connect(path) as client:
            assert alive(place, client)
    assert os.path.exists(path)


def test_sources_are_undone_together(tmp_path: Path) -> None:
    """When one of several sockets cannot be opened, the others are closed and removed."""
    good, count = tmp_path / "good", descriptor_count()
    with pytest.raises(LocalError, match="no directory"):
        open_sources([str(good), str(tmp_path / "no" / "s")], [])
    assert not good.exists()
    assert descriptor_count() == count


@pytest.mark.parametrize("broken", ["device", "control"])
def test_a_server_that_cannot_start_leaves_nothing(tmp_path: Path, broken: str) -> None:
    """When a device or the control socket cannot be made, everything made before is closed and removed."""
    count = descriptor_count()
    made: list[FakeDevice] = []

    def make(number: int) -> FakeDevice:
        if broken == "device" and number:
            raise LocalError("no such tap")
        made.append(FakeDevice())
        return made[-1]

    control = str(tmp_path / ("missing/c" if broken == "control" else "c"))
    sources = open_sources([str(tmp_path / "a"), str(tmp_path / "b")], [])
    with pytest.raises(LocalError):
        Server(FakePool(), make, sources, control_path=control)
    assert list(tmp_path.iterdir()) == []
    assert all(device.closed for device in made)
    assert descriptor_count() == count


def test_stop_all_may_fail(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """A device that cannot stop (a stuck worker) is reported, and the server goes on."""
    with serving(*open_sources([path], [])) as place:
        place.devices[0].fail = trouble("stop_all", SynchronizeTimeout("worker 7 is stuck"))
        with Frontend.connect(path) as client:
            assert alive(place, client)
        place.settle()
        with Frontend.connect(path) as client:
            assert alive(place, client)
        place.devices[0].fail = lambda verb: None
    assert "cannot stop the rings: worker 7 is stuck" in caplog.text


def test_out_of_descriptors(path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without descriptors for a new connection the listener is left alone for a while, then served again."""
    monkeypatch.setattr(server, "_ACCEPT_PAUSE_SECONDS", 0.01)
    with serving(*open_sources([path], [])) as place, Frontend.connect(path) as client:
        with monkeypatch.context() as patch:
            patch.setattr(transport.Listener, "accept", _no_descriptors)
            place.settle()
        assert "cannot take a connection" in caplog.text
        client.send(Request.GET_FEATURES)
        while not place.show()["devices"][0]["connected"]:
            place.server.loop.turn(1)
        assert alive(place, client)


def _no_descriptors(*_: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_idle_server_has_no_timer(path: str) -> None:
    """A server that waits for a front-end, or has a silent one, sleeps without a time limit."""
    with serving(*open_sources([path], [])) as place:
        assert place.server.loop.time_limit() is None
        with Frontend.connect(path) as client:
            assert alive(place, client)
            assert place.server.loop.time_limit() is None


# --- commands --------------------------------------------------------------------------------------------------------


def test_show(path: str) -> None:
    """Show has the version, the workers, and each device with its socket and what is negotiated."""
    with serving(*open_sources([path], [])) as place, Frontend.connect(path) as client:
        client.send(Request.SET_PROTOCOL_FEATURES, u64(1 | 8))
        place.settle()
        state = place.show()
        assert state["pid"] == os.getpid()
        assert state["workers"][0]["pid"] == FakePool().snapshot()["workers"][0]["pid"]
        (device,) = state["devices"]
        assert (device["socket"], device["connected"], device["protocol_features"]) == (path, True, ["MQ", "REPLY_ACK"])


def test_swap(tmp_path: Path) -> None:
    """Swap replaces the back-end of the device that is named, or of the only one."""
    with serving(*open_sources([str(tmp_path / "a")], [])) as place:
        result: Any = place.server.command({"cmd": "swap", "backend": "loopback"})
        times = {"grace_us": 12.5, "pause_us": 3.25}
        assert result == {
            "device": "0",
            "backend": "loopback",
            "generation": 2,
            "packets_crossed": 7,
            "frames_left": 0,
            **times,
        }
        assert place.devices[0].backend == "loopback"
    with serving(*open_sources([str(tmp_path / "a"), str(tmp_path / "b")], [])) as place:
        place.server.command({"cmd": "swap", "backend": "loopback", "device": "1"})
        assert [device.backend for device in place.devices] == ["null", "loopback"]
        with pytest.raises(LocalError, match="several devices: say which with --device, one of 0 1"):
            place.server.command({"cmd": "swap", "backend": "loopback"})
        with pytest.raises(LocalError, match="no device 7: use --device with one of 0 1"):
            place.server.command({"cmd": "swap", "backend": "loopback", "device": "7"})


def test_workers(path: str) -> None:
    """Workers are listed, started and attached by commands, as the pool and the device have them."""
    with serving(*open_sources([path], [])) as place:
        state: Any = place.server.command({"cmd": "workers", "action": "list"})
        assert state == FakePool().snapshot()
        assert place.server.command({"cmd": "workers", "action": "new"}) == {"worker": 1}
        request = {"cmd": "workers", "action": "attach", "pair": 0, "worker": 0}
        moved = {"device": "0", "pair": 0, "worker": 0, "pid": 4711}
        assert place.server.command(request) == moved
        assert place.devices[0].calls[-1] == "attach_worker"


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({}, "unknown command None: use 'show', 'swap', 'workers' or 'upgrade'"),
        ({"cmd": "quit"}, "unknown command 'quit'"),
        ({"cmd": "swap"}, "swap needs a back-end"),
        ({"cmd": "swap", "backend": 7}, "swap needs a back-end"),
        ({"cmd": "swap", "backend": "bogus"}, "unknown back-end 'bogus'"),
        ({"cmd": "swap", "backend": "null", "device": [1]}, "no device"),
        ({"cmd": "workers"}, "workers takes an 'action'"),
        ({"cmd": "workers", "action": "free"}, "workers takes an 'action'"),
        ({"cmd": "workers", "action": "free", "worker": "0"}, "workers takes an 'action'"),
        ({"cmd": "workers", "action": "free", "worker": 0}, "worker 0 is the only one"),
        ({"cmd": "workers", "action": "attach", "pair": 0, "worker": 1}, "no worker 1"),
        ({"cmd": "workers", "action": "attach", "pair": 1, "worker": 0}, "no queue pair 1"),
        ({"cmd": "workers", "action": "attach", "pair": 0, "worker": 0, "device": "7"}, "no device 7"),
    ],
)
def test_bad_commands(path: str, request_: dict[str, Any], text: str) -> None:
    """A command that cannot be done says why, and changes nothing."""
    with serving(*open_sources([path], [])) as place:
        with pytest.raises(LocalError, match=text):
            place.server.command(request_)
        assert place.devices[0].backend == "null"


def test_borrowed_loop(path: str) -> None:
    """A loop that is given is used and left open."""
    with EventLoop() as loop:
        with serving(*open_sources([path], []), loop=loop) as place:
            assert place.server.loop is loop
        assert not loop.turn(0)
