"""Queue pairs are spread over workers and moved between them under load; workers come and go."""

from __future__ import annotations

import errno
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from tests import helpers
from tests.adversity.backends import GATE
from tests.frames import POISON
from tests.helpers import TORTURE_SECONDS, process_alive, told, wait_until
from tests.integration.serving import ask, command, serving
from tests.integration.traffic import Tally, Traffic
from tests.net_driver import F_VERSION_1, FEATURES, Guest
from tests.remote import RemoteDevice
from tests.taps import inject, needs_tap, quiet_tap
from vhostmp import flush, steps
from vhostmp.errors import LocalError, SynchronizeTimeout
from vhostmp.net import NetDevice
from vhostmp.shm import layout
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import F_RING_PACKED, DeviceError
from vhostmp.workers.processes import WorkerProcess

BACKENDS: Final = Path(__file__).with_name("backends.py")
MIRROR: Final = f"python:{BACKENDS}:Mirror"
SLOW: Final = f"python:{BACKENDS}:Slow"
STUCK: Final = f"python:{Path(__file__).parents[1] / 'adversity' / 'backends.py'}:Gate"
SIZES: Final = (60, 61, 590, 1514)
WINDOW: Final = 200
WORKERS_LEAST: Final = 2
WORKERS_MOST: Final = 5
#: Processor time of the control process, for a device of 256 rings: about half a second.
UP_SECONDS: Final = 2.5
MOVES: Final = int(200 * TORTURE_SECONDS)
#: A killed worker may repeat what it had given back to the receive ring and not yet to the transmit ring: one burst.
BURST: Final = 64
FRAME: Final = bytes.fromhex("525400000002525400000001") + b"\x88\xb5" + bytes(46)


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of two workers."""
    with Pool(workers=2) as two:
        yield two


def whole(tally: Tally) -> None:
    """Check that every frame came back once, in order."""
    assert tally.sent > 0
    assert (tally.missing, tally.duplicated, tally.reordered) == (0, 0, 0), tally


def errno_of(verb: Callable[..., object], *arguments: Any) -> int | None:
    """Return the errno with which a verb is refused."""
    with pytest.raises(LocalError, match=r"^[^\n]+$") as caught:
        verb(*arguments)
    return caught.value.errno


def pids(device: NetDevice) -> list[int | None]:
    """Return the pid of the worker that serves each ring."""
    return [queue["worker_pid"] for queue in device.snapshot()["queues"]]


@pytest.mark.slow
@pytest.mark.parametrize("ring", [0, F_RING_PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("backend", ["loopback", MIRROR], ids=["loopback", "python"])
def test_moves_under_load(pool: Pool, backend: str, ring: int) -> None:
    """A pair moved back and forth, hundreds of times at full load, loses, repeats and reorders nothing."""
    device = NetDevice(pool, backend=backend)
    with (
        Guest(device, features=FEATURES | ring) as guest,
        Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW) as traffic,
    ):
        for turn in range(MOVES):
            worker = (turn + 1) % 2
            device.attach_vring_worker(turn % 2, worker)
            assert [device.get_vring_worker(index) for index in (0, 1)] == [worker, worker]
            traffic.progress(20)
        assert pids(device) == [pool.worker(device.worker_of(0)).pid] * 2
        whole(traffic.finish())
    assert pool.restarts == 0
    assert [worker.parts for worker in pool.workers] == [set(), set()]


@pytest.mark.slow
def test_moves_past_a_sleeper(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that sleeps through its pair's time with another one does not go on with the indices of before."""
    device = NetDevice(pool, backend="loopback")
    nudge = WorkerProcess.nudge

    def asleep() -> bool:
        return layout.WORKER.read(pool.buf, layout.worker_offset(0), "asleep") == 1

    def nudge_others(worker: WorkerProcess) -> None:
        if worker.index:
            nudge(worker)

    with Guest(device) as guest, Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW) as traffic:
        slept = 0
        for _ in range(20):
            traffic.progress(20)
            traffic.pause()
            wait_until(asleep, what="worker 0 to sleep")
            before = pool.snapshot()["workers"][0]["wakeups"]
            with monkeypatch.context() as patch:
                patch.setattr(WorkerProcess, "nudge", nudge_others)
                device.attach_vring_worker(0, 1)
                traffic.resume()
                traffic.progress(20)
                traffic.pause()
                device.attach_vring_worker(0, 0)
            slept += pool.snapshot()["workers"][0]["wakeups"] == before
            pool.worker(0).nudge()
            traffic.resume()
        whole(traffic.finish())
    assert slept > 0


@pytest.mark.slow
def test_one_step_is_caught(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above find a move that takes one generation, in which two workers may serve a ring at once."""

    def at_once(device: NetDevice, group: int, worker: int) -> None:
        device.put(steps.served(device.state, group, worker, device.next_start()))

    monkeypatch.setattr(steps, "move", at_once)
    device = NetDevice(pool, backend=SLOW)
    found = False
    with Guest(device) as guest, Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW) as traffic:
        try:
            for turn in range(200):
                device.attach_vring_worker(0, (turn + 1) % 2)
                traffic.progress(20, timeout=1)
            whole(traffic.finish())
        except (AssertionError, DeviceError):
            found = True
        assert found


@pytest.mark.slow
@pytest.mark.parametrize("ring", [0, F_RING_PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("victim", [0, 1], ids=["old_worker", "new_worker"])
@pytest.mark.parametrize("flush_number", [0, 1])
@pytest.mark.parametrize("step", ["prepare", "publish", "wait_for_items", "retire"])
def test_killed_in_a_move(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, step: str, flush_number: int, victim: int, ring: int
) -> None:
    """A worker that dies at any step of a move: the pair is served, by the one or the other, and nothing is lost."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, features=FEATURES | ring) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        traffic.progress(100)
        original: Callable[..., Any] = getattr(flush, step)
        calls = itertools.count()

        def wrapped(*args: Any) -> Any:
            if next(calls) == flush_number:
                worker = pool.worker(victim)
                worker.kill()
                wait_until(lambda: not worker.alive, what="the worker's end")
            return original(*args)

        monkeypatch.setattr(flush, step, wrapped)
        device.attach_vring_worker(0, 1)
        wait_until(lambda: pool.restarts == 1, what="the replacement")
        assert device.get_vring_worker(0) == 1
        traffic.progress(100)
        device.attach_vring_worker(0, 0)
        traffic.progress(100)
        tally = traffic.finish()
    assert tally.missing == 0, tally
    assert tally.duplicated <= BURST, tally


@pytest.mark.slow
def test_refused_halfway(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second step that a worker refuses, for want of memory say, leaves the pair with the worker that it had."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        traffic.progress(100)
        original = flush.prepare
        calls = itertools.count()

        def wrapped(*args: Any) -> None:
            if next(calls) == 1:
                raise LocalError("no memory", errno.ENOMEM)
            original(*args)

        monkeypatch.setattr(flush, "prepare", wrapped)
        assert errno_of(device.attach_vring_worker, 0, 1) == errno.ENOMEM
        assert device.get_vring_worker(0) == 0
        traffic.progress(100)
        whole(traffic.finish())


@pytest.mark.slow
def test_worker_that_does_not_let_go(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a back-end in Python does not return its pair cannot move, and the error names the worker.

    Once it returns the pair is served again, by the worker it was to go to, with no verb to see to that; nothing was
    published meanwhile that the worker, still inside its work item, could have stumbled over.
    """
    monkeypatch.setenv(GATE, str(tmp_path))
    monkeypatch.setattr(flush, "SYNCHRONIZE_TIMEOUT", 0.2)
    with Pool(workers=2, sandbox=False) as gated:  # its signs are files
        device = NetDevice(gated, backend=STUCK)
        with Guest(device) as guest, Traffic(guest.pairs[0], returns=False) as traffic:
            wait_until((tmp_path / "entered").exists, what="the worker to be stuck")
            with pytest.raises(SynchronizeTimeout, match=f"pid {gated.worker(0).pid}"):
                device.attach_vring_worker(0, 1)
            slot = layout.ring_offset(device.first_ring)
            assert layout.RING.read(gated.buf, slot, "worker") == 1, "if the stuck one dies, that is to be counted"
            (tmp_path / "open").touch()
            traffic.progress_sent(300)
            assert device.get_vring_worker(0) == 1
            assert layout.RING.read(gated.buf, slot, "worker") == 1 + 1
            assert pids(device)[1] == gated.worker(1).pid
            traffic.finish()
            assert gated.restarts == 0


@pytest.mark.slow
def test_everything_at_once(rng: random.Random) -> None:
    """Moves, new and freed workers, swaps, new memory, stops and deaths of none, in any order, under load."""
    with Pool(workers=2) as pool, ExitStack() as stack:
        device = NetDevice(pool, backend="loopback", queue_pairs=3)
        guest = stack.enter_context(Guest(device, pairs=3))
        traffic = [stack.enter_context(Traffic(pair, sizes=SIZES, window=WINDOW)) for pair in guest.pairs]

        def free() -> None:
            idle = [index for index, count in pool.loads().items() if not count]
            if idle and pool.size > WORKERS_LEAST:
                device.free_worker(rng.choice(idle))

        def new() -> None:
            if pool.size < WORKERS_MOST:
                device.new_worker()

        def move() -> None:
            device.attach_vring_worker(rng.randrange(6), rng.choice(pool.workers).index)

        actions: Sequence[Callable[[], object]] = (
            move,
            move,
            move,
            new,
            free,
            lambda: device.set_backend(rng.choice([MIRROR, "loopback"])),
            guest.set_mem_table,
            lambda: device.set_vring_busyloop_timeout(rng.randrange(6), rng.choice([0, 50])),
        )
        for _ in range(MOVES):
            rng.choice(actions)()
            if rng.randrange(4) == 0:
                for one in traffic:
                    one.progress(10)
        for one in traffic:
            whole(one.finish())
        assert pool.restarts == 0


@pytest.mark.slow
@pytest.mark.parametrize("ring", [0, F_RING_PACKED], ids=["split", "packed"])
def test_memory_moves_and_pairs_move(pool: Pool, ring: int) -> None:
    """All memory moves, poisoned behind us, while pairs move too: no worker keeps the old table."""
    device = NetDevice(pool, backend="loopback", queue_pairs=2)
    with Guest(device, pairs=2, features=FEATURES | ring) as guest, ExitStack() as stack:
        traffic = [stack.enter_context(Traffic(pair, sizes=SIZES, window=WINDOW)) for pair in guest.pairs]
        for turn in range(MOVES // 10):
            for one in traffic:
                one.pause()
            device.attach_worker(turn % 2, turn // 2 % 2)
            guest.move(POISON)
            device.attach_worker(turn % 2, (turn // 2 + 1) % 2)
            for one in traffic:
                one.resume()
            for one in traffic:
                one.progress(20)
        for one in traffic:
            whole(one.finish())
    assert pool.restarts == 0


def test_the_verbs_errors(pool: Pool) -> None:
    """Every mistake has the errno of the kernel's ioctl, and changes nothing."""
    device = NetDevice(pool, backend="loopback", queue_pairs=2)
    assert device.placement == (0, 1)
    for verb, arguments in (
        (device.new_worker, ()),
        (device.free_worker, (0,)),
        (device.attach_vring_worker, (0, 1)),
        (device.get_vring_worker, (0,)),
    ):
        assert errno_of(verb, *arguments) == errno.EPERM
    device.set_owner()
    assert errno_of(device.attach_vring_worker, 4, 0) == errno.ENOBUFS
    assert errno_of(device.get_vring_worker, -1) == errno.ENOBUFS
    for nobody in (2, -1, 64):
        assert errno_of(device.attach_vring_worker, 0, nobody) == errno.ENODEV
        assert errno_of(device.free_worker, nobody) == errno.ENODEV
    assert errno_of(device.attach_worker, 2, 0) == errno.EINVAL
    assert errno_of(device.free_worker, 1) == errno.EBUSY
    assert device.placement == (0, 1)
    device.attach_vring_worker(3, 0)
    assert device.placement == (0, 0)
    pid = pool.worker(1).pid
    device.free_worker(1)
    assert not process_alive(pid)
    assert errno_of(device.attach_vring_worker, 0, 1) == errno.ENODEV
    device.close()
    assert errno_of(pool.free_worker, 0) == errno.EBUSY
    assert pool.restarts == 0


def test_workers_come_and_go(pool: Pool) -> None:
    """A new worker gets the lowest free id; it serves, dies and is replaced as the first ones; a freed one is gone."""
    first = pool.new_worker()
    second = pool.new_worker()
    assert (first, second) == (2, 3)
    pool.free_worker(first)
    assert pool.new_worker() == first
    device = NetDevice(pool, backend="loopback")
    with Guest(device) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        device.attach_worker(0, second)
        pool.free_worker(0)
        traffic.progress(100)
        pid = pool.worker(second).pid
        pool.kill_worker(second)
        wait_until(lambda: pool.worker(second).pid != pid, what="the replacement")
        traffic.progress(100)
        assert traffic.finish().missing == 0
        assert [worker.index for worker in pool.workers] == [1, 2, 3]
    assert [worker["index"] for worker in pool.snapshot()["workers"]] == [1, 2, 3]
    assert [worker["pairs"] for worker in pool.snapshot()["workers"]] == [0, 0, 1]


def test_no_more_than_64() -> None:
    """The 65th worker is ENOSPC, and a place that was freed can be had again."""
    with Pool(workers=layout.CONSTANTS["WORKERS_MAX"]) as pool:
        assert errno_of(pool.new_worker) == errno.ENOSPC
        pool.free_worker(hole := 7)
        assert pool.new_worker() == hole


def test_pairs_are_spread() -> None:
    """Each new pair goes to the worker with the fewest, whatever devices come and go; a new worker is preferred."""
    with Pool(workers=3) as pool:
        first = NetDevice(pool, queue_pairs=2)
        second = NetDevice(pool, queue_pairs=3)
        assert (first.placement, second.placement) == ((0, 1), (2, 0, 1))
        first.close()
        third = NetDevice(pool)
        assert third.placement == (0,)
        new = pool.new_worker()
        fourth = NetDevice(pool, queue_pairs=3)
        assert fourth.placement == (new, 1, 2)
        assert pool.loads() == {0: 2, 1: 2, 2: 2, 3: 1}


@needs_tap
@pytest.mark.slow
def test_tap_queues_move_along(pool: Pool) -> None:
    """A pair that moves takes its tap queue along: what comes is delivered once, and the other worker sleeps."""
    with quiet_tap(queues=2) as name, ExitStack() as stack:
        device = NetDevice(pool, backend=f"tap:{name}", queue_pairs=2)
        stack.callback(device.close)
        guest = stack.enter_context(Guest(device, pairs=2, features=1 << 32))
        for pair in guest.pairs:
            pair.post()
            pair.kick()
        received = 0
        for turn in range(40):
            device.attach_worker(turn % 2, turn // 2 % 2)
            before = received
            inject(name, FRAME, 5)

            def arrived(before: int = before) -> bool:
                nonlocal received
                for pair in guest.pairs:
                    received += sum(frame[:14] == FRAME[:14] for frame in pair.receive())
                    pair.post()
                    pair.kick()
                return received >= before + 5

            wait_until(arrived, what="the frames")
            assert received == before + 5


@needs_tap
@pytest.mark.slow
def test_a_frame_that_waits_moves_along(pool: Pool) -> None:
    """A frame that a worker took from a tap and had no buffers for is delivered by the next worker, first."""
    with quiet_tap() as name, ExitStack() as stack:
        device = NetDevice(pool, backend=f"tap:{name}")
        stack.callback(device.close)
        guest = stack.enter_context(Guest(device, features=1 << 32 | 1 << 15, room=200))
        pair = guest.pairs[0]
        pair.rx_limit = 2  # too few for the first
        pair.post()
        pair.kick()
        numbers = range(4)
        for number in numbers:
            inject(name, FRAME[:14] + bytes([number]) * 1000)
        waiting = layout.ring_offset(device.first_ring)
        wait_until(lambda: layout.RING.read(pool.buf, waiting, "waiting") == 1, what="a frame that waits")
        device.attach_worker(0, 1)
        pool.free_worker(0)
        device.attach_worker(0, pool.new_worker())
        pair.rx_limit = 64
        seen: list[int] = []

        def all_seen() -> bool:
            pair.post()
            pair.kick()
            seen.extend(frame[14] for frame in pair.receive() if frame[:14] == FRAME[:14])
            return len(seen) >= len(numbers)

        wait_until(all_seen, what="the frames")
        assert seen == list(numbers)


@pytest.mark.slow
def test_128_pairs() -> None:
    """A device with 256 rings on four workers is up in about a second, each pair passes frames, and can be moved."""
    with Pool(workers=4) as pool:
        device = NetDevice(pool, backend="loopback", queue_pairs=128)
        began = time.process_time()
        with Guest(device, pairs=128, num=16) as guest:
            took = time.process_time() - began
            assert pool.loads() == dict.fromkeys(range(4), 32)
            for pair in guest.pairs:
                pair.post()
                pair.send(FRAME + pair.index.to_bytes(4, "little"))
                pair.kick()
            for pair in guest.pairs:
                frames = wait_until(pair.receive, what=f"pair {pair.index}")
                assert frames == [FRAME + pair.index.to_bytes(4, "little")]
            device.attach_worker(127, 0)
            assert pool.loads() == {0: 33, 1: 32, 2: 32, 3: 31}
            assert took < UP_SECONDS


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """`vhostmp workers` lists, starts, attaches and frees while eight pairs are served; mistakes are one line each."""
    socket, control = tmp_path / "net.sock", tmp_path / "net.ctl"
    options = ("--socket-path", str(socket), "--control-path", str(control), "--backend", "loopback")
    with serving(tmp_path, *options, "--queue-pairs", "8", "--workers", "2") as child, ExitStack() as stack:
        guest = stack.enter_context(Guest(RemoteDevice(socket).as_net_device(), pairs=8, num=64))
        traffic = [stack.enter_context(Traffic(pair, window=32)) for pair in guest.pairs]
        assert [worker["pairs"] for worker in ask("workers", control)["workers"]] == [4, 4]
        assert ask("workers", control, "new") == {"worker": 2}
        for pair in (0, 2, 4, 6):
            moved = ask("workers", control, "attach", str(pair), "2")
            assert (moved["pair"], moved["worker"]) == (pair, 2)
            assert moved["pid"] in helpers.descendants(child.pid)
        (device,) = ask("show", control)["devices"]
        assert [queue["worker"] for queue in device["queues"]] == [2, 2, 1, 1] * 4
        assert ask("workers", control, "free", "0") == {"worker": 0}
        assert [worker["index"] for worker in ask("workers", control, "list")["workers"]] == [1, 2]
        text = command("workers", "--control-path", str(control)).stdout
        assert [line.split()[0] for line in text.splitlines()] == ["worker", "1", "2"]
        for words, complaint in (
            (("free", "1"), "worker 1 is busy, queue pairs: 4: attach them"),
            (("free", "0"), "no worker 0 among 1 2"),
            (("attach", "0", "0"), "no worker 0"),
            (("attach", "8", "1"), "no queue pair 8: the device has 8"),
            (("attach", "--device", "x", "0", "1"), "no device x"),
        ):
            done = command("workers", "--control-path", str(control), *words)
            assert (done.returncode, done.stdout, len(told(done.stderr))) == (2, "", 1)
            assert complaint in done.stderr
        for one in traffic:
            one.progress(20)
        for one in traffic:
            whole(one.finish())


@pytest.mark.slow
def test_busy_polling_by_the_command(tmp_path: Path) -> None:
    """With --busy-poll a worker looks at idle rings for that long, asking for no kicks, and then sleeps."""
    socket, control = tmp_path / "net.sock", tmp_path / "net.ctl"
    options = ("--socket-path", str(socket), "--control-path", str(control), "--backend", "loopback")
    with (
        serving(tmp_path, *options, "--busy-poll", "20000"),
        Guest(RemoteDevice(socket).as_net_device(), features=F_VERSION_1) as guest,
    ):
        (pair,) = guest.pairs
        pair.post()
        pair.kick()
        polls: list[int] = []
        for _ in range(3):
            assert pair.send(FRAME)
            pair.kick()
            assert wait_until(pair.receive, what="the frame") == [FRAME]
            pair.reap()
            (worker,) = ask("workers", control)["workers"]
            polls.append(worker["polls"])
            wait_until(lambda: ask("workers", control)["workers"][0]["asleep"], what="the worker's sleep")
        assert polls == sorted(set(polls))
        assert polls[0] > 0
