"""`vhostmp serve` from the outside: real processes, a guest in Python at the socket, the commands, the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests import helpers
from tests.fuzz.test_hostile_messages import ROWS, SLOTS, made
from tests.helpers import told
from tests.integration.serving import PROGRAM, Served, ask, command, quieten, serving
from tests.integration.test_swap import whole
from tests.integration.traffic import Traffic
from tests.net_driver import Guest
from tests.peers.processes import Child
from tests.remote import RemoteDevice
from tests.rig import MEMORY_BYTES, RING_SIZE, UVA, Rig
from vhostmp import transport
from vhostmp.cli import EXIT_MISTAKE
from vhostmp.consts import Request
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import NEED_REPLY, Frontend, message, u64, vring
from vhostmp.watchdog import LOOK_MAX

pytestmark = pytest.mark.slow

MIRROR = f"python:{Path(__file__).with_name('backends.py')}:Mirror"
WINDOW = 200
ROOT = os.geteuid() == 0
#: Runs a command without root's powers.
UNPRIVILEGED = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"] if ROOT else []


@attrs.frozen
class Running:
    """A server with one device that loops back."""

    child: Served
    socket: Path
    control: Path

    def show(self) -> Any:
        """Return the state of the device."""
        return ask("show", self.control)["devices"][0]

    def descriptors(self) -> int:
        """Return how many descriptors the server has open while nobody asks it anything."""
        quieten(self.control)
        return self.child.descriptors()


MAC = "52:54:00:00:00:01"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    """Serve one loopback device; afterwards it ends in time with status 0 and nothing is left of it."""
    path, control = tmp_path / "net.sock", tmp_path / "net.ctl"
    # With an address: then there is a configuration space, and every message of the corpus is spoken.
    options = ("--socket-path", str(path), "--control-path", str(control), "--backend", "loopback", "--mac", MAC)
    with serving(tmp_path, *options) as child:
        helpers.wait_until(lambda: ask("show", control)["spare"], what="the spare: descriptors are counted below")
        family = helpers.descendants(child.pid)
        yield Running(child, path, control)
        assert child.terminate_in_time() == 0, child.output
        gone(child, family)
    assert not path.exists()
    assert not control.exists()


def gone(child: Served, family: set[int]) -> None:
    """Check that neither a process nor a segment of a server that has ended is left, and no traceback in its log."""
    helpers.wait_until(lambda: not any(helpers.process_alive(pid) for pid in family), what="the end of the workers")
    assert not [name for name in helpers.segment_names() if name.split(".")[2] in map(str, {child.pid, *family})]
    assert "Traceback" not in child.output


# --- traffic ---------------------------------------------------------------------------------------------------------


def test_a_guest_over_the_socket(server: Running) -> None:
    """A guest's frames come back through the socket's device; show sees rings, features, regions and counters."""
    device = RemoteDevice(server.socket)
    with Guest(device.as_net_device()) as guest:
        with Traffic(guest.pairs[0], window=WINDOW) as traffic:
            traffic.progress(1000)
            whole(traffic.finish())
        state = server.show()
        assert state["connected"]
        assert state["backend"] == "loopback"
        assert "VERSION_1" in state["acked_features"]
        assert len(state["regions"]) == len(["rings", "buffers"])
        receive, send = state["queues"]
        assert (receive["started"], receive["enabled"], receive["size"]) == (True, True, guest.num)
        assert send["packets"] == receive["packets"] == traffic.tally.sent
        assert send["worker_pid"] in helpers.descendants(server.child.pid)
        text = command("show", "--control-path", str(server.control)).stdout
        assert "running" in text
        assert str(send["worker_pid"]) in text


def test_swap_and_move_under_load(server: Running) -> None:
    """Back-ends are swapped by the command and memory by messages while frames flow; none is lost or repeated."""
    device = RemoteDevice(server.socket)
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        for spec in (MIRROR, "loopback", MIRROR, "loopback"):
            result = ask("swap", server.control, spec)
            assert result["backend"] == spec
            times = {"grace_us", "pause_us"}
            assert set(result) == {"device", "backend", "generation", "packets_crossed", "frames_left", *times}
            traffic.progress(200)
            traffic.pause()
            guest.renew_buffers()
            traffic.resume()
            traffic.progress(200)
        whole(traffic.finish())
    assert not server.child.lines("warning"), server.child.output


def test_stop_and_start_with_traffic_between(server: Running) -> None:
    """Rings stopped by GET_VRING_BASE go on where they stood when they are started again at that base."""
    device = RemoteDevice(server.socket)
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        for _ in range(5):
            traffic.progress(200)
            traffic.pause()
            for index, base in enumerate(guest.stop()):
                guest.start(index, base)
            traffic.resume()
        whole(traffic.finish())


def test_front_ends_come_and_go(server: Running) -> None:
    """Each front-end finds a fresh device with the same back-end, however the last one went; no descriptor stays."""
    before = 0
    for turn in range(4):
        device = RemoteDevice(server.socket)
        guest = Guest(device.as_net_device())
        with Traffic(guest.pairs[0], window=WINDOW) as traffic:
            traffic.progress(200)
            whole(traffic.finish())
        device.frontend.close()  # rings run, memory is mapped: as if it had crashed
        helpers.wait_until(lambda: not server.show()["connected"], what="the hang-up to be noticed")
        guest.close()
        state = server.show()
        assert (state["regions"], state["acked_features"], state["backend"]) == ([], [], "loopback")
        assert not any(ring["started"] or ring["enabled"] for ring in state["queues"])
        count = server.descriptors()
        assert turn == 0 or count == before
        before = count


def test_a_dead_worker_is_replaced(server: Running) -> None:
    """A worker killed under load is replaced, traffic goes on, and the front-end's connection does not notice."""
    device = RemoteDevice(server.socket)
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], returns=False, window=None) as traffic:
        traffic.progress_sent(500)
        pid = server.show()["queues"][1]["worker_pid"]
        os.kill(pid, signal.SIGKILL)
        helpers.wait_until(lambda: server.show()["queues"][1]["worker_pid"] not in (None, pid), what="a new worker")
        traffic.progress_sent(500)
        traffic.finish()
        assert ask("show", server.control)["workers"][0]["restarts"] == 1


# --- hostile front-ends ----------------------------------------------------------------------------------------------


class OverSocket(Rig):
    """A connection to a real server, set up as the tests of hostile messages want it."""

    def __init__(self, path: Path) -> None:  # pyright: ignore[reportMissingSuperCall] - there is no port at this end
        """Connect."""
        Frontend.__init__(self, Frontend.connect(path).sock)

    def settle(self) -> None:
        """Nothing: the server runs by itself."""

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def set_up(self, memory: int) -> None:
        """Negotiate, give memory, say where two rings lie."""
        assert self.do_unacked(Request.SET_OWNER)
        self.send(Request.SET_FEATURES, u64(1 << 32 | 1 << 30))
        self.send(Request.SET_PROTOCOL_FEATURES, u64(SLOTS))
        self.give_memory(memory)
        for index in range(2):
            self.set_ring(index)

    def do_unacked(self, request: int) -> bool:
        """Send a message that cannot be acknowledged yet."""
        self.send(request)
        return True


def test_hostile_messages(server: Running) -> None:
    """Every row of the corpus is refused by the real device too, logged by name, and nothing of it is kept."""
    with frontend.memfd(MEMORY_BYTES) as memory, OverSocket(server.socket) as rig:
        rig.set_up(memory)
        before, count = server.show(), server.descriptors()
        for row in ROWS:
            if row.fatal or row.has_reply:
                continue
            with made(row.fds, rig) as fds:
                rig.send_raw(message(row.request, row.payload, flags=row.flags | NEED_REPLY, size=row.size), fds)
                reply = rig.reply()
            assert (reply.request, reply.u64 != 0) == (row.request, True), row
        assert server.descriptors() == count
        assert server.show() == before
        assert rig.do(Request.SET_VRING_NUM, vring(0, RING_SIZE)) == 0


def test_hostile_messages_that_close(server: Running) -> None:
    """Every row that cannot be told closes its connection, and the next front-end is served; no descriptor stays."""
    count = server.descriptors()
    with frontend.memfd(MEMORY_BYTES) as memory:
        for row in ROWS:
            with OverSocket(server.socket) as rig:
                rig.set_up(memory)
                with made(row.fds, rig) as fds:
                    rig.send_raw(message(row.request, row.payload, flags=row.flags, size=row.size), fds)
                    assert Frontend.hung_up(rig), row
    helpers.wait_until(lambda: not server.show()["connected"])
    assert server.descriptors() == count
    # far more than a log takes: the rest is counted
    assert len(server.child.lines("connection closed")) < len(ROWS)


def test_rings_that_are_not_in_memory(server: Running) -> None:
    """Rings outside the memory table, or beyond its end, do not start; the table may come after the addresses."""
    with (
        frontend.memfd(MEMORY_BYTES) as memory,
        frontend.eventfds(1) as (kick,),
        OverSocket(server.socket) as rig,
    ):
        rig.send(Request.SET_OWNER)
        rig.send(Request.SET_FEATURES, u64(1 << 32 | 1 << 30))
        rig.send(Request.SET_PROTOCOL_FEATURES, u64(SLOTS))
        rig.set_ring(0)
        assert rig.do(Request.SET_VRING_KICK, u64(0), [kick]) != 0
        rig.give_memory(memory)
        end = UVA + MEMORY_BYTES
        for fields in (
            {"desc": end - 0x1000 + 16, "avail": UVA, "used": UVA + 0x8000},
            {"desc": UVA, "avail": end - 16, "used": UVA + 0x8000},
            {"desc": UVA, "avail": UVA + 0x4000, "used": end - 16},
            {"desc": 0, "avail": 0, "used": 0},
            {"desc": (1 << 64) - 0x1000, "avail": UVA, "used": UVA},
        ):
            assert rig.do(Request.SET_VRING_ADDR, frontend.vring_addr(0, **fields)) == 0
            assert rig.do(Request.SET_VRING_KICK, u64(0), [kick]) != 0, fields
            assert not server.show()["queues"][0]["started"]
        good = frontend.vring_addr(0, desc=end - 0x1000, avail=UVA, used=UVA + 0x8000)
        assert rig.do(Request.SET_VRING_ADDR, good) == 0
        assert rig.do(Request.SET_VRING_KICK, u64(0), [kick]) == 0
        assert server.show()["queues"][0]["started"]


# --- where front-ends come from --------------------------------------------------------------------------------------


def test_inherited_connection(tmp_path: Path) -> None:
    """--fd with a connected socket is served at once; when the front-end hangs up the program ends with status 0."""
    ours, theirs = transport.connected_pair()
    with theirs:
        running = serving(tmp_path, "--fd", str(theirs.fileno()), fds=[theirs.fileno()])
        child = running.__enter__()
    with Frontend(ours) as client, contextlib.ExitStack() as stack:
        stack.push(running.__exit__)
        assert client.ask(Request.GET_QUEUE_NUM).u64 == 1
        family = helpers.descendants(child.pid)
        client.close()
        helpers.wait_until(lambda: not child.running, what="the end after the hang-up")
        assert child.wait() == 0, child.output
        gone(child, family)


def test_inherited_listener(tmp_path: Path) -> None:
    """--fd with a listening socket serves one front-end after the other and leaves the path to its creator."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        with serving(tmp_path, f"--fd={listener.fileno()}", fds=[listener.fileno()]) as child:
            for _ in range(2):
                with Frontend.connect(path) as client:
                    assert client.ask(Request.GET_QUEUE_NUM).u64 == 1
            assert child.terminate_in_time() == 0
    assert path.exists()


def test_client_role(tmp_path: Path) -> None:
    """--connect finds a front-end that begins to listen later, and again after it was restarted."""
    path = tmp_path / "s"
    with serving(tmp_path, "--socket-path", str(path), "--connect") as child:
        for _ in range(2):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(str(path))
                listener.listen()
                listener.settimeout(helpers.PATIENCE)
                sock, _ = listener.accept()
                with Frontend(sock) as client:
                    assert client.ask(Request.GET_QUEUE_NUM).u64 == 1
            path.unlink()
        assert child.terminate_in_time() == 0


def test_two_devices(tmp_path: Path) -> None:
    """Two sockets are two devices with a back-end each; swap asks which one is meant."""
    paths, control = [tmp_path / "a", tmp_path / "b"], tmp_path / "ctl"
    words = [word for path in paths for word in ("--socket-path", str(path))]
    options = ["--backend", "null", "--backend", "loopback", "--workers", "2", "--queue-pairs", "2"]
    with serving(tmp_path, *words, *options, "--control-path", str(control)) as child:
        devices = ask("show", control)["devices"]
        assert [(device["device"], device["backend"]) for device in devices] == [("0", "null"), ("1", "loopback")]
        failed = command("swap", "--control-path", str(control), "null")
        assert failed.returncode == EXIT_MISTAKE
        assert failed.stderr == "vhostmp: there are several devices: say which with --device, one of 0 1\n"
        ask("swap", control, "--device", "1", "null")
        assert [device["backend"] for device in ask("show", control)["devices"]] == ["null", "null"]
        for path in paths:
            with Frontend.connect(path) as client:
                assert client.ask(Request.GET_QUEUE_NUM).u64 == len(["pair", "pair"])
                assert "MQ" in devices[0]["features"]
        assert child.terminate_in_time() == 0


def test_ring_reset_is_for_front_ends_that_pass_it_on(tmp_path: Path) -> None:
    """RING_RESET is offered where asked for only: a guest under QEMU that used it would lose its queue."""
    words = ["--socket-path", str(tmp_path / "s"), "--control-path", str(tmp_path / "c")]
    for options in ([], ["--ring-reset"]):
        with serving(tmp_path, *words, *options) as child:
            (device,) = ask("show", tmp_path / "c")["devices"]
            assert ("RING_RESET" in device["features"]) == bool(options)
            assert child.terminate_in_time() == 0


def test_service_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service manager hears of being ready and of ending, and the journal gets levels."""
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(helpers.PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        with serving(tmp_path, "--socket-path", str(tmp_path / "s")) as child:
            assert manager.recv(100) == b"READY=1"
            assert child.terminate_in_time() == 0
            assert manager.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it(tmp_path: Path, number: signal.Signals) -> None:
    """Each of the usual signals ends it cleanly, with a guest at the socket."""
    path = tmp_path / "s"
    with serving(tmp_path, "--socket-path", str(path), "--backend", "loopback") as child:
        family = helpers.descendants(child.pid)
        guest = Guest(RemoteDevice(path).as_net_device())
        with guest:
            os.kill(child.pid, number)
            helpers.wait_until(lambda: not child.running, what="the end")
            assert child.wait() == 0
        gone(child, family)
    assert not path.exists()


# --- mistakes and idleness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--backend", "bogus"], "no back-end 'bogus': use null, null:copy"),
        (["--backend", "tap:"], "'tap:' is not complete: write tap:NAME"),
        (["--backend", "python:mirror.py"], "is not complete: write python:MODULE:CLASS or python:FILE.py:CLASS"),
        (["--backend", "file:x"], "file:x: a file is the back-end of a disk: add --device blk"),
        (["--backend", "patch:1"], "patch:1: no other device: give --socket-path once for each"),
        (["--backend", "packet:nosuch0"], "no interface nosuch0"),
        (["--backend", "tap:a/b"], "an interface name has"),
        *([(["--backend", "tap:lo"], "an interface of that name exists and is not a tap: choose")] if ROOT else []),
        (["--offloads", "on"], "carries no offloads"),
        (["--control-path", "no/such/ctl"], "no directory no/such"),
        (["--watchdog", "0.01"], "watchdog of 0.01 s: choose 0.1 to 3600, or 0 for none"),
        (["--cpus", "8191"], "processor 8191 is not one that this process may run on: "),
        (["--restart-limit", "5"], "is no restart limit: write deaths and seconds as 5/10, or 0 for none"),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a running pool can find out is still one line, status 2, and nothing is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    done = command("serve", "--socket-path", "s", *words)
    assert (done.returncode, done.stdout) == (EXIT_MISTAKE, "")
    assert len(told(done.stderr)) == 1, done.stderr
    assert done.stderr.startswith("vhostmp: ")
    assert text in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_permission(tmp_path: Path) -> None:
    """Without the permission for a tap or for a place, one line says what to do, status 2."""
    private = tmp_path / "private"
    private.mkdir(mode=0)
    ours, theirs = transport.connected_pair()
    with ours, theirs:
        for words, text in (
            (
                ["--fd", str(theirs.fileno()), "--backend", "tap:vmptest0"],
                "no permission: run as root, or have root make",
            ),
            (["--socket-path", str(private / "s")], "no permission: run as its owner or choose a path you may use"),
        ):
            done = subprocess.run(
                [*UNPRIVILEGED, *PROGRAM, "serve", *words],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                pass_fds=[theirs.fileno()],
            )
            assert (done.returncode, len(told(done.stderr))) == (EXIT_MISTAKE, 1), done.stderr
            assert text in done.stderr


def test_socket_in_use(server: Running) -> None:
    """A second server on the same socket or control socket ends in one line; the first one is not disturbed."""
    other = server.socket.with_name("other")
    for words in (
        ["--socket-path", str(server.socket)],
        ["--socket-path", str(other), "--control-path", str(server.control)],
    ):
        done = command("serve", *words)
        assert done.returncode == EXIT_MISTAKE
        assert "is in use by a running program: stop that one or choose another path" in done.stderr
        assert len(told(done.stderr)) == 1
    assert not other.exists()
    assert not server.show()["connected"]


def test_bad_swap_changes_nothing(server: Running) -> None:
    """A swap that cannot be done is one line that says why; the old back-end goes on under load."""
    device = RemoteDevice(server.socket)
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        for spec, text in (("bogus", "no back-end"), ("python:/nonexistent.py:X", "nonexistent")):
            done = command("swap", "--control-path", str(server.control), spec)
            assert (done.returncode, done.stdout, len(told(done.stderr))) == (EXIT_MISTAKE, "", 1), done
            assert text in done.stderr
            traffic.progress(200)
        whole(traffic.finish())
    assert server.show()["backend"] == "loopback"


def test_killed_server_leaves_a_socket_that_is_replaced(tmp_path: Path) -> None:
    """After SIGKILL, of the spawner too, which would clean up, the paths are stale: the next server takes them over."""
    path, control = tmp_path / "s", tmp_path / "c"
    options = ("--socket-path", str(path), "--control-path", str(control), "--adopt-timeout", "0")
    with serving(tmp_path, *options) as child:
        family = helpers.descendants(child.pid)
        spawner = helpers.by_name(child.pid, "vhostmp-spawn")["vhostmp-spawn"]
        os.kill(spawner, signal.SIGSTOP)
        os.kill(child.pid, signal.SIGKILL)
        helpers.wait_until(lambda: not child.running)
        os.kill(spawner, signal.SIGKILL)
        helpers.wait_until(lambda: not any(helpers.process_alive(pid) for pid in family), what="the workers' end")
    assert path.exists()
    with serving(tmp_path, *options) as child, Frontend.connect(path) as client:
        assert client.ask(Request.GET_QUEUE_NUM).u64 == 1
        assert child.terminate_in_time() == 0


def switches(pid: int) -> int:
    """Return how often the threads of a process have been scheduled."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        total += sum(int(line.split()[1]) for line in status.read_text().splitlines() if "ctxt_switches" in line)
    return total


def test_idle_costs_nothing(server: Running) -> None:
    """Neither the control process nor a worker wakes up while nothing happens, a guest with running rings included."""
    device = RemoteDevice(server.socket)
    with Guest(device.as_net_device()) as guest:
        with Traffic(guest.pairs[0], window=WINDOW) as traffic:
            traffic.progress(200)
            whole(traffic.finish())
        pids = [server.child.pid, *helpers.descendants(server.child.pid)]
        helpers.wait_until(lambda: all(helpers.process_state(pid) == "S" for pid in pids))
        # The watchdog looks a few times before it knows that there is nothing to watch.
        assert helpers.comes_to_rest(lambda: {pid: switches(pid) for pid in pids}, 1.5 * LOOK_MAX)


def test_help_of_the_installed_program(tmp_path: Path) -> None:
    """`python -m vhostmp --help` works as a program of its own."""
    with Child([*PROGRAM, "--help"], tmp_path / "help.log") as child:
        child.expect("first steps:")
