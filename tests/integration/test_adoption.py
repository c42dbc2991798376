"""`vhostmp serve` is killed with SIGKILL and started again: the guest's packets, and its front-end, do not notice.

The front-end is ours, on a real socket; what is killed is the control process, alone or together with others. Whatever
happens, nothing is lost, nothing comes twice, the front-end's socket stays open, and a clean end leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import signal
import socket
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import helpers
from tests.adversity.test_counted_deaths import BEGUN
from tests.frames import make_frame
from tests.helpers import told
from tests.integration.restarting import Restarting, Reviving
from tests.integration.serving import ask, command
from tests.integration.test_swap import whole
from tests.integration.traffic import Traffic
from tests.net_driver import F_VERSION_1, Guest
from tests.remote import RemoteDevice
from vhostmp import control_api
from vhostmp.cli import EXIT_MISTAKE
from vhostmp.consts import ProtocolFeature, Request
from vhostmp.errors import LocalError
from vhostmp.killpoints import VARIABLE
from vhostmp.shm import layout
from vhostmp.shm.memory import MemoryRegion
from vhostmp.tools.stress.frontend import REPLY_ACK, Frontend, inflight, memfd, message

pytestmark = pytest.mark.slow

WINDOW = 200
MIRROR = f"python:{Path(__file__).with_name('backends.py')}:Mirror"
SLOTS = REPLY_ACK | ProtocolFeature.CONFIGURE_MEM_SLOTS.mask
#: Every place of the road of a message (kept_transport.py), and of a flush (flush.py).
MESSAGE_PLACES = ("peeked", "stored", "noted", "taken", "inbox", "handled", "staged", "committed", "emptied", "replied")
FLUSH_PLACES = ("coming", "prepared", "published", "synchronized", "retired")
TURNS_MAX = 1000
SPLIT_ENTRY = 2  # where the first one of a journal is, in words
ADOPTION_PLACES = ("processes", "settled", "connected")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Restarting]:
    """Serve one loopback device with two workers; a clean end leaves nothing."""
    with Restarting(tmp_path, "--backend", "loopback", "--workers", "2") as running:
        yield running
        running.end()


def workers(server: Restarting) -> list[int]:
    """Return the pids of the workers."""
    return [worker["pid"] for worker in server.show()["workers"]]


def test_traffic_goes_on(server: Restarting) -> None:
    """Frames flow while there is no control process; the next one has the same workers, and every verb works on."""
    device = RemoteDevice(server.socket)
    before = workers(server)
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        traffic.progress(500)
        server.kill()
        traffic.progress(500)
        server.start()
        shown = server.show()
        assert shown["adopted"]["from_pid"] == server.lives[0].pid
        assert shown["devices"][0]["connected"]
        text = command("show", "--control-path", str(server.control)).stdout
        assert f"from process {server.lives[0].pid}, adoption 1 of" in text
        assert workers(server) == before
        traffic.progress(500)
        assert ask("swap", server.control, MIRROR)["backend"] == MIRROR
        traffic.progress(200)
        assert ask("swap", server.control, "loopback")["backend"] == "loopback"
        traffic.pause()
        guest.renew_buffers()
        for index, base in enumerate(guest.stop()):
            guest.start(index, base)
        traffic.resume()
        traffic.progress(500)
        assert command("workers", "--control-path", str(server.control), "attach", "0", "1").returncode == 0
        traffic.progress(500)
        whole(traffic.finish())


def test_ten_deaths_in_a_row(server: Restarting, rng: random.Random) -> None:
    """Killed at ten random moments, one soon after the other, under traffic: no frame is lost, no descriptor leaks."""
    device = RemoteDevice(server.socket)
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        counts: list[int] = []
        for _ in range(10):
            traffic.progress(100)
            traffic.progress_sent(rng.randint(1, 5000))
            server.again()
            counts.append(server.descriptors())
        traffic.progress(200)
        whole(traffic.finish())
    assert len(set(counts)) == 1, counts
    held = server.held()
    server.again()
    helpers.wait_until(lambda: server.held() <= held, what="what was dropped to go")


def places(rng: random.Random) -> Iterator[str]:
    """Each place in turn, at one of the next times that it is reached; a flush is in every few messages only."""
    for place in MESSAGE_PLACES:
        yield f"{place}:{rng.randint(1, 12)}"
        yield f"{place}:{rng.randint(1, 40)}"
    for place in FLUSH_PLACES:
        yield f"{place}:1"  # the flush of the adoption itself
        for _ in range(3):
            yield f"{place}:{rng.randint(2, 12)}"
    for place in ADOPTION_PLACES:
        yield f"{place}:1"


@pytest.fixture
def memory() -> Iterator[int]:
    """Return a megabyte of memory that no ring is in."""
    with memfd(1 << 20) as fd:
        yield fd


def test_a_death_at_every_step(server: Restarting, rng: random.Random, memory: int) -> None:
    """Killed at each step of a message, of a flush and of an adoption, the next one ends what it began, once.

    Each verb's answer comes and says success; frames are neither lost nor repeated; where rings stand is right.
    """
    device = RemoteDevice(server.socket, SLOTS)
    extra = MemoryRegion(gpa=1 << 40, size=1 << 20, uva=1 << 45, fd=memory)
    with Reviving(server, places(rng)) as reviving:
        with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
            traffic.progress(100)
            os.kill(server.child.pid, signal.SIGKILL)
            for turn in itertools.count():
                traffic.pause()
                guest.drop_idle_buffers(b"gone")
                guest.renew_buffers()
                device.add_mem_region(extra)
                device.set_vring_enable(0, True)
                device.remove_mem_region(extra)
                for index, base in enumerate(guest.stop()):
                    guest.start(index, base)
                traffic.resume()
                traffic.progress(20)
                if reviving.is_exhausted:
                    break
                assert turn < TURNS_MAX
            whole(traffic.finish())
        assert reviving.deaths > len(list(places(rng)))
        reviving.rest()
        server.end()


@pytest.mark.parametrize("place", ["stored", "noted", "taken", "staged", "committed"])
def test_a_message_that_counts(server: Restarting, memory: int, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Wherever the death comes, a region is there after one ADD_MEM_REG with its descriptor, and gone after one REM.

    Of the descriptors that came with it none is left then, here or in the holder.
    """
    device = RemoteDevice(server.socket, SLOTS)
    extra = MemoryRegion(gpa=1 << 40, size=1 << 20, uva=1 << 45, fd=memory)
    with Guest(device.as_net_device()), ThreadPoolExecutor(1) as front_end:

        def amid_a_death(verb: Callable[[MemoryRegion], None]) -> None:
            monkeypatch.setenv(VARIABLE, f"{place}:1")
            server.again()
            monkeypatch.delenv(VARIABLE)
            answer = front_end.submit(verb, extra)
            helpers.wait_until(lambda: not server.child.running)
            server.start()
            answer.result(helpers.PATIENCE)

        def is_there() -> bool:
            return extra.gpa in [region["gpa"] for region in server.show()["devices"][0]["regions"]]

        amid_a_death(device.add_mem_region)
        assert is_there()
        device.remove_mem_region(extra)
        assert not is_there()
        count = server.descriptors(), server.held()
        device.add_mem_region(extra)
        amid_a_death(device.remove_mem_region)
        assert not is_there()
        helpers.wait_until(lambda: (server.descriptors(), server.held()) == count, what="what was dropped to go")
        device.set_vring_enable(0, True)  # no further answer comes in place of this one's


@pytest.mark.parametrize("place", FLUSH_PLACES)
def test_a_swap_that_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Killed in a swap, the next one serves the back-end that was published last, and frames flow all the time."""
    with Restarting(tmp_path, "--backend", "loopback", "--workers", "2") as server:
        device = RemoteDevice(server.socket)
        with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], returns=False) as traffic:
            traffic.progress_sent(100)
            monkeypatch.setenv(VARIABLE, f"{place}:2")  # the first one is in the flush of the adoption
            server.again()
            monkeypatch.delenv(VARIABLE)
            generation = server.show()["devices"][0]["generation"]
            with contextlib.suppress(LocalError):
                control_api.call(str(server.control), {"cmd": "swap", "backend": "null"})
            helpers.wait_until(lambda: not server.child.running)
            traffic.progress_sent(500)
            server.start()
            shown = server.show()["devices"][0]
            is_published = place in ("published", "synchronized", "retired")
            assert shown["backend"] == ("null" if is_published else "loopback")
            assert shown["generation"] == generation + is_published + 1  # that of the adoption
            traffic.progress_sent(500)
            traffic.finish()
        server.end()


@contextlib.contextmanager
def control_segment(server: Restarting) -> Generator[memoryview]:
    """Return the control segment, mapped."""
    name = next(name for name in helpers.segment_names() if name.split(".")[2] == str(server.lives[0].pid))
    with (
        Path("/dev/shm", name).open("r+b") as file,
        mmap.mmap(file.fileno(), 0) as mapped,
        memoryview(mapped) as buf,
    ):
        yield buf


def attached(server: Restarting) -> list[int]:
    """Return what the slots of the device's two rings say of who serves them: 1 + the worker."""
    with control_segment(server) as buf:
        return [layout.RING.read(buf, layout.ring_offset(ring), "worker") for ring in range(2)]


@pytest.mark.parametrize("place", ["published:2", "retired:2", "published:3", "retired:3"])
def test_a_move_that_is_cut_short(server: Restarting, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Killed in a move, once anything of it is in force, the next one serves the pair on the new worker, and says so.

    What it says decides who is blamed for a death, and whether one is counted.
    """
    device = RemoteDevice(server.socket)
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        traffic.progress(100)
        assert attached(server) == [1, 1]
        monkeypatch.setenv(VARIABLE, place)  # the first flush is that of the adoption
        server.again()
        monkeypatch.delenv(VARIABLE)
        with contextlib.suppress(LocalError):
            control_api.call(str(server.control), {"cmd": "workers", "action": "attach", "pair": 0, "worker": 1})
        helpers.wait_until(lambda: not server.child.running)
        server.start()
        traffic.progress(100)
        assert [queue["worker"] for queue in server.show()["devices"][0]["queues"]] == [1, 1]
        assert attached(server) == [2, 2]
        whole(traffic.finish())


def test_processors_after_adoption(tmp_path: Path) -> None:
    """Workers that are taken over go where the next control process was told, and so do their replacements."""
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    with Restarting(tmp_path, "--backend", "null", "--cpus", str(first)) as server:
        (before,) = server.show()["workers"]
        assert (before["cpu"], os.sched_getaffinity(before["pid"])) == (first, {first})
        server.again("--cpus", str(last))
        (worker,) = server.show()["workers"]
        assert worker["pid"] == before["pid"]
        assert (worker["cpu"], os.sched_getaffinity(worker["pid"])) == (last, {last})
        os.kill(worker["pid"], signal.SIGKILL)

        def replaced() -> int:
            (now,) = server.show()["workers"]
            return int(now["pid"]) if now["pid"] != worker["pid"] else 0

        assert os.sched_getaffinity(helpers.wait_until(replaced, what="the replacement")) == {last}
        server.end()


@pytest.mark.parametrize(("place", "dies"), [("published:2", 0), ("published:3", 1)], ids=["held", "served"])
def test_who_serves_dies_with_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, dies: int) -> None:
    """Killed in a move, and whoever served the pair last dies too: what its death has cost is counted."""
    with Restarting(tmp_path, "--backend", "null", "--workers", "2") as server:
        with Guest(RemoteDevice(server.socket).as_net_device(), features=F_VERSION_1) as guest:
            assert guest.pairs[0].send(make_frame(0, 60))
            guest.pairs[0].kick()
            helpers.wait_until(lambda: guest.pairs[0].reap() == 1)
            monkeypatch.setenv(VARIABLE, place)  # the first flush is that of the adoption
            server.again()
            monkeypatch.delenv(VARIABLE)
            victim = workers(server)[dies]
            with contextlib.suppress(LocalError):
                control_api.call(str(server.control), {"cmd": "workers", "action": "attach", "pair": 0, "worker": 1})
            helpers.wait_until(lambda: not server.child.running)
            os.kill(victim, signal.SIGKILL)
            helpers.wait_until(lambda: helpers.process_state(victim) in ("", "Z"), what="its end")
            with control_segment(server) as buf:
                layout.RING.write(buf, layout.ring_offset(1), "journal", BEGUN, SPLIT_ENTRY)
            server.start()
            helpers.wait_until(
                lambda: server.show()["devices"][0]["queues"][1]["repeated"] == 1, what="the death to be counted"
            )
        server.end()


def test_who_waited_is_not_counted_for_ever(server: Restarting) -> None:
    """A control process that died while it waited for a work item's end does not have each one wake it ever after."""
    with control_segment(server) as buf:
        layout.WORKER.write(buf, layout.worker_offset(0), "waiters", 1)
        server.again()
        server.show()
        assert layout.WORKER.read(buf, layout.worker_offset(0), "waiters") == 0


def test_no_front_end_is_connected(server: Restarting) -> None:
    """A front-end that comes while there is no control process waits, and is served by the next one."""
    server.kill()
    with Frontend.connect(server.socket) as client:
        client.send(Request.GET_QUEUE_NUM)
        server.start()
        assert client.reply().u64 == 1
    server.again()
    with Frontend.connect(server.socket) as client:
        assert client.ask(Request.GET_QUEUE_NUM).u64 == 1


def test_the_front_end_goes_meanwhile(server: Restarting) -> None:
    """A front-end that hangs up while nobody serves is found to be gone; the device is free for the next one."""
    device = RemoteDevice(server.socket)
    with Guest(device.as_net_device()) as guest:
        with Traffic(guest.pairs[0], window=WINDOW) as traffic:
            traffic.progress(100)
            traffic.finish()
        server.kill()
        device.frontend.close()
        server.start()
        helpers.wait_until(lambda: not server.show()["devices"][0]["connected"])
        assert server.show()["devices"][0]["regions"] == []
    with Frontend.connect(server.socket) as client:
        assert client.ask(Request.GET_QUEUE_NUM).u64 == 1


@pytest.mark.parametrize("what", ["worker", "spawner"])
def test_more_than_the_control_process_dies(server: Restarting, what: str) -> None:
    """A worker, or the spawner with all workers, that dies with the control process is replaced: rings have waited."""
    device = RemoteDevice(server.socket)
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], returns=False) as traffic:
        traffic.progress_sent(200)
        serving = server.show()["devices"][0]["queues"][0]["worker_pid"]
        spawner = helpers.by_name(server.child.pid, "vhostmp-spawn")["vhostmp-spawn"]
        server.kill()
        os.kill(serving if what == "worker" else spawner, signal.SIGKILL)
        helpers.wait_until(lambda: not helpers.process_alive(serving))
        server.start()
        traffic.progress_sent(500)
        assert serving not in workers(server)
        traffic.finish()


def test_the_holder_dies_too(tmp_path: Path) -> None:
    """With the holder gone as well nobody can come back: workers, spawner and segment end by themselves."""
    with Restarting(tmp_path, "--backend", "loopback") as server:
        device = RemoteDevice(server.socket)
        guest = Guest(device.as_net_device())
        with Traffic(guest.pairs[0], window=WINDOW) as traffic:
            traffic.progress(100)
            traffic.finish()
        family = helpers.descendants(server.child.pid)
        assert server.holder() in family
        server.child.kill()
        os.kill(server.holder(), signal.SIGKILL)
        helpers.wait_until(lambda: not any(helpers.process_alive(pid) for pid in family))
        helpers.wait_until(lambda: not [n for n in helpers.segment_names() if n.split(".")[2] == str(server.child.pid)])
        device.frontend.sock.settimeout(helpers.PATIENCE)
        assert device.frontend.sock.recv(1) == b""
        device.frontend.close()
        guest.close()
        server.start()
        assert server.show()["adopted"] is None
        server.end()


def test_the_holder_alone_dies(server: Restarting) -> None:
    """A holder that dies is replaced, with all that it held: a death of the control process after that is survived."""
    device = RemoteDevice(server.socket)
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        traffic.progress(100)
        old = server.holder()
        os.kill(old, signal.SIGKILL)
        helpers.wait_until(lambda: server.child.lines("there is a new one"))
        assert server.holder() != old
        assert helpers.process_state(old) == "", "a zombie"
        server.again()
        traffic.progress(200)
        whole(traffic.finish())


def test_a_holder_that_is_stopped(server: Restarting) -> None:
    """A holder that answers nothing holds up nobody for long: it is ended, and another one takes its place."""
    old = server.holder()
    os.kill(old, signal.SIGSTOP)
    assert ask("swap", server.control, MIRROR)["backend"] == MIRROR
    assert server.holder() != old
    server.again()
    assert server.show()["devices"][0]["backend"] == MIRROR


def test_half_a_message_leaves_nothing(server: Restarting, memory: int) -> None:
    """Front-ends that hang up in the middle of a message leave none of its descriptors, here or in the holder."""

    def count() -> int:
        return len(os.listdir(f"/proc/{server.holder()}/fd")) + server.child.descriptors()

    before = server.descriptors() + server.held()  # from now on they do not change by themselves
    for _ in range(5):
        with Frontend.connect(server.socket) as client:
            header = message(Request.SET_MEM_TABLE, b"", size=1000)
            client.send_raw(header, [memory] * 8)
            helpers.wait_until(lambda: count() > before + 8)
        helpers.wait_until(lambda: not server.show()["devices"][0]["connected"])
        helpers.wait_until(lambda: count() == before)


def test_nobody_comes_back(tmp_path: Path) -> None:
    """After --adopt-timeout the holder ends all in order: workers, then the front-end's socket; segment and paths."""
    with Restarting(tmp_path, "--backend", "loopback", adopt_timeout="1") as server:
        device = RemoteDevice(server.socket)
        guest = Guest(device.as_net_device())
        with Traffic(guest.pairs[0], window=WINDOW) as traffic:
            traffic.progress(100)
            family = helpers.descendants(server.child.pid)
            moving = workers(server)
            server.kill()
            traffic.progress(100)
            traffic.pause()
            device.frontend.sock.settimeout(helpers.PATIENCE)
            assert device.frontend.sock.recv(1) == b""
            assert not any(helpers.process_alive(pid) for pid in moving)
            traffic.abandon()
        helpers.wait_until(lambda: not any(helpers.process_alive(pid) for pid in family))
        assert not [name for name in helpers.segment_names() if name.split(".")[2] == str(server.child.pid)]
        assert {path.name for path in tmp_path.iterdir() if path.is_socket()} == set()
        device.frontend.close()
        guest.close()


def test_a_relative_path_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When nobody comes back the socket is removed too if its path was said from where the server was started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with Restarting(tmp_path, "--backend", "loopback", adopt_timeout="1", is_relative=True) as server:
        holder = server.holder()
        assert server.socket.is_socket()
        server.kill()
        helpers.wait_until(lambda: not helpers.process_alive(holder))
        assert {path.name for path in tmp_path.iterdir() if path.is_socket()} == set()


def test_the_front_ends_path_remains(tmp_path: Path) -> None:
    """With --connect the socket is the front-end's, which may listen no more for now: it is not ours to remove."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.settimeout(helpers.PATIENCE)
        with Restarting(tmp_path, "--connect", "--backend", "loopback", adopt_timeout="1") as server:
            sock, _ = listener.accept()
            with Frontend(sock) as client:
                assert client.ask(Request.GET_QUEUE_NUM).u64 == 1
                listener.close()
                holder = server.holder()
                server.kill()
                helpers.wait_until(lambda: not helpers.process_alive(holder))
            assert {path.name for path in tmp_path.iterdir() if path.is_socket()} == {"s"}


def test_two_at_once_cannot_be(server: Restarting) -> None:
    """A second server with the same control path says in one line that there is one; that one goes on."""
    done = command("serve", *server.options)
    assert (done.returncode, len(told(done.stderr))) == (EXIT_MISTAKE, 1), done
    assert f"is in use by a running program: stop that one or choose another path (process {server.child.pid})" in (
        done.stderr
    )
    assert server.show()["pid"] == server.child.pid


def test_other_options(server: Restarting) -> None:
    """What waits is not served with other options: one line says so, nothing is disturbed, and it still waits."""
    device = RemoteDevice(server.socket)
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        traffic.progress(100)
        server.kill()
        for other in (["--queue-pairs", "2"], ["--device", "rng"], ["--socket-path", str(server.folder / "t")]):
            options = [word for word in server.options if word not in ("--backend", "loopback")]
            done = command("serve", *options, *other)
            assert (done.returncode, len(told(done.stderr))) == (EXIT_MISTAKE, 1), done
            assert "use the same options as before" in done.stderr
        traffic.progress(100)
        server.start()
        traffic.progress(100)
        whole(traffic.finish())


def test_begin_anew(tmp_path: Path) -> None:
    """With --adopt-timeout 0 what waits is ended first, and nothing of this server outlives its own death."""
    with Restarting(tmp_path, "--backend", "loopback") as server:
        family = helpers.descendants(server.child.pid)
        server.kill()
        anew = Restarting(tmp_path, "--backend", "loopback", adopt_timeout="0")
        with anew:
            assert not any(helpers.process_alive(pid) for pid in family)
            assert anew.show()["adopted"] is None
            family = helpers.descendants(anew.child.pid)
            anew.kill()
            helpers.wait_until(lambda: not any(helpers.process_alive(pid) for pid in family))


@pytest.mark.parametrize("place", ["staged", "committed", "sent", "sent and read", "replied"])
def test_a_reply_with_a_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """GET_INFLIGHT_FD is answered once, with its descriptor, wherever the death comes, whenever that is read."""
    place, *is_read = place.split(" and ")
    count = {"staged": 5, "committed": 5, "sent": 1, "replied": 5}[place]
    monkeypatch.setenv("VHOSTMP_KILL_AT", f"{place}:{count}")
    with Restarting(tmp_path, "--backend", "loopback") as server:
        monkeypatch.delenv("VHOSTMP_KILL_AT")
        wanted = REPLY_ACK | ProtocolFeature.INFLIGHT_SHMFD.mask
        device = RemoteDevice(server.socket, wanted)  # three messages
        device.set_owner()
        device.frontend.send(Request.GET_INFLIGHT_FD, inflight(0, 0, 2, 256))
        helpers.wait_until(lambda: not server.child.running)
        if not is_read:
            server.start()
        data, fds, _flags, _address = socket.recv_fds(device.frontend.sock, 100, 8)
        if is_read:
            server.start()
        assert len(data) > len(b"header......")
        assert len(fds) == 1
        os.close(fds[0])
        device.set_vring_num(0, 256)  # no second answer comes in place of this one's
        device.frontend.close()
        server.end()


def test_other_classes(tmp_path: Path) -> None:
    """A disk and a source of random numbers are adopted too: back-end, lock and configuration."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    with Restarting(tmp_path, "--device", "blk", "--backend", f"file:{image}", "--queues", "2") as server:
        before = server.show()["devices"][0]
        server.again()
        assert server.show()["devices"][0] == {**before, "generation": before["generation"] + 1}
        done = command("serve", "--device", "blk", "--socket-path", str(tmp_path / "t"), "--backend", f"file:{image}")
        assert "in use" in done.stderr
        server.end()
    with Restarting(tmp_path, "--device", "rng", socket="r") as server:
        server.again()
        assert server.show()["devices"][0]["backend"] == "urandom"
        server.end()
