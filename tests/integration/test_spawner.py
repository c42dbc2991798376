"""Processes come and go: dead workers are replaced and traffic resumes; nothing outlives the control process.

The control process is this one, with busy threads, as a hypervisor's are, or one that is started to be killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from tests.helpers import PATIENCE, command_line, descendants, process_alive, process_state, wait_until
from tests.integration.test_swap import MIRROR, whole
from tests.integration.traffic import Traffic
from tests.net_driver import Guest
from vhostmp.errors import LocalError, VhostError
from vhostmp.in_force import StateInForce
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool
from vhostmp.workers.processes import WorkerProcess

ROOT: Final = Path(__file__).resolve().parents[2]
DEATHS: Final = 100


@contextmanager
def busy_threads() -> Generator[None]:
    """Run threads as a hypervisor does: one computes without the GIL, as a vCPU, one takes locks and allocates."""
    stop = threading.Event()
    lock = threading.Lock()
    page = bytes(1 << 20)

    def compute() -> None:
        while not stop.is_set():
            zlib.crc32(page)

    def bustle() -> None:
        while not stop.wait(0.0005):
            with lock:
                _ = [bytes(size) for size in range(50)]

    threads = [threading.Thread(target=compute), threading.Thread(target=bustle)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def replaced(pool: Pool, index: int, pid: int) -> bool:
    """Whether a worker slot has another process than `pid`, alive."""
    with pool.lock:
        worker = pool.workers[index]
        return worker.pid != pid and worker.alive


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_hundred_deaths(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are killed 100 times beside busy threads: each is replaced, traffic goes on, nothing is lost for good.

    What was in a worker's hands when it died may be repeated on the way to the guest, never lost (both rings are the
    guest's: what is not published is taken again).
    """
    monkeypatch.setattr("vhostmp.deaths.EARLY_DEATHS_MAX", DEATHS)
    with Pool(workers=2) as pool, ExitStack() as stack:
        device = NetDevice(pool, backend="loopback", queue_pairs=2)
        guest = stack.enter_context(Guest(device, pairs=2))
        stack.enter_context(busy_threads())
        traffic = [stack.enter_context(Traffic(pair)) for pair in guest.pairs]
        pids: set[int] = set()
        for _ in range(DEATHS):
            index = rng.randrange(2)
            pid = pool.workers[index].pid
            pids.add(pid)
            pool.kill_worker(index)
            wait_until(lambda index=index, pid=pid: replaced(pool, index, pid), what="a replacement")  # type: ignore[misc]
            for one in traffic:
                one.progress(5)
        for one in traffic:
            tally = one.finish()
            assert tally.missing == 0, tally
            assert tally.duplicated <= 64 * DEATHS, tally
            print(tally)
        wait_until(lambda: pool.restarts == DEATHS, what=f"{DEATHS} restarts, {pool.restarts} so far")
        assert len(pids) == DEATHS
        assert not any(process_alive(pid) for pid in pids)
        assert not any(queue["broken"] for queue in device.snapshot()["queues"])


def test_death_while_idle() -> None:
    """A worker that dies with nothing to do is replaced too, and a device that comes later is served by it."""
    with Pool(workers=1) as pool:
        pid = pool.workers[0].pid
        pool.kill_worker(0)
        wait_until(lambda: replaced(pool, 0, pid))
        with Guest(NetDevice(pool, backend="loopback")) as guest, Traffic(guest.pairs[0]) as traffic:
            traffic.progress(100)
            whole(traffic.finish())


def test_death_of_the_spawner() -> None:
    """When the spawner is killed its workers die with it; another one takes over, and traffic goes on."""
    with Pool(workers=2) as pool:
        device = NetDevice(pool, backend="loopback", queue_pairs=2)
        with Guest(device, pairs=2) as guest, ExitStack() as stack:
            traffic = [stack.enter_context(Traffic(pair)) for pair in guest.pairs]
            for one in traffic:
                one.progress(100)
            workers = {worker.pid for worker in pool.workers}
            pool.kill_spawner()
            wait_until(lambda: not any(process_alive(pid) for pid in workers), what="the workers to die")
            wait_until(lambda: all(worker.alive for worker in pool.workers), what="other workers")
            for one in traffic:
                one.progress(100)
                assert one.finish().missing == 0


@pytest.mark.parametrize("late", [False, True], ids=["asked", "answered"])
def test_a_replacement_that_cannot_resume(
    late: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever goes wrong while a replacement is given its rings, another one gets them, and later deaths are seen."""
    with Pool(workers=1) as pool:
        device = NetDevice(pool, backend="loopback")
        resume = StateInForce.resume
        failed: list[int] = []

        def fail() -> None:
            failed.append(1)
            raise RuntimeError("not this time")

        def resume_once(self: StateInForce, worker: WorkerProcess) -> Callable[[], None] | None:
            if failed:
                return resume(self, worker)
            if not late:
                fail()
            return fail

        with Guest(device) as guest, Traffic(guest.pairs[0]) as traffic:
            monkeypatch.setattr(StateInForce, "resume", resume_once)
            for _ in range(2):
                traffic.progress(100)
                pid = pool.workers[0].pid
                pool.kill_worker(0)
                wait_until(lambda pid=pid: replaced(pool, 0, pid), what="a replacement")  # type: ignore[misc]
                traffic.progress(100)
            assert traffic.finish().missing == 0
    assert failed == [1]
    assert "cannot resume, and is replaced again" in caplog.text


@pytest.mark.slow
def test_death_in_the_middle_of_a_verb(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs that meet a dying worker return or raise, never hang; the device is as the last good verb left it."""
    monkeypatch.setattr("vhostmp.deaths.EARLY_DEATHS_MAX", 100)  # else it is held back for a second each time
    with Pool(workers=1) as pool:
        device = NetDevice(pool, backend="loopback")
        with Guest(device) as guest, Traffic(guest.pairs[0]) as traffic:
            for _ in range(20):
                timer = threading.Timer(rng.random() * 0.002, pool._pool.kill, [0])  # pyright: ignore[reportPrivateUsage]
                timer.start()
                for _ in range(4):
                    try:
                        device.set_backend("loopback")
                        guest.set_mem_table()
                    except VhostError as error:
                        print(f"verb met a death: {error}")
                timer.join()
                traffic.progress(20)
            assert traffic.finish().missing == 0


@pytest.mark.slow
def test_stopped_worker_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb that meets a worker that stands still (SIGSTOP) fails and names it, or has it replaced; never success.

    A success would mean that the worker serves the new state, or that the old one is let go, and neither is so.
    """
    with Pool(workers=1) as pool:
        device = NetDevice(pool, backend="loopback")
        with Guest(device) as guest, Traffic(guest.pairs[0]) as traffic:
            traffic.progress(100)
            pid = pool.workers[0].pid
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: process_state(pid) == "T")
            try:
                with monkeypatch.context() as patch:
                    patch.setattr("vhostmp.flush.SYNCHRONIZE_TIMEOUT", 0.2)
                    patch.setattr("vhostmp.workers.processes.ANSWER_TIMEOUT", 0.5)
                    device.set_backend("loopback")
                assert not process_alive(pid), "the verb succeeded past a worker that stands still"
            except VhostError as error:
                assert str(pid) in str(error)  # noqa: PT017 (either outcome is right)
            finally:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            traffic.progress(100)
            device.set_backend(MIRROR)
            traffic.progress(100)
            assert traffic.finish().missing == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_nothing_outlives_the_control_process(number: int) -> None:
    """However the control process ends, under traffic and with busy threads, no process and no segment is left."""
    control = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.embedder", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    said: dict[str, list[Any]] = {"pids": [], "segments": []}
    try:
        assert control.stdout is not None
        said = json.loads(control.stdout.readline())
        assert len(said["pids"]) in (len(["spawner", "worker", "worker"]), len(["and", "perhaps", "a", "spare"]))
        segment = Path("/dev/shm") / said["segments"][0].removeprefix("/")
        assert segment.exists()
        control.send_signal(number)
        control.wait(PATIENCE)
        wait_until(
            lambda: not any(process_alive(pid) for pid in said["pids"]),
            what=f"the end of {[command_line(pid) for pid in said['pids']]}",
        )
        wait_until(lambda: not segment.exists(), what=f"{segment} to go")
    finally:
        control.kill()
        control.wait()
        control.communicate()
        for name in said["segments"][1:]:  # guest memory is the guest's: it is here that the guest cleans up
            (Path("/dev/shm") / str(name).removeprefix("/")).unlink(missing_ok=True)


def test_a_bad_number_of_workers() -> None:
    """0, negative and too many workers are refused, and nothing is left."""
    for workers in (0, -1, 65, 1 << 32):
        with pytest.raises(LocalError):
            Pool(workers=workers)


def test_close_is_idempotent_and_complete() -> None:
    """A pool that is closed twice, with a device running, leaves no process, and no verb works any more."""
    pool = Pool(workers=2)
    device = NetDevice(pool, backend="loopback")
    with Guest(device) as guest, Traffic(guest.pairs[0]) as traffic:
        traffic.progress(100)
        traffic.finish()
        pids = descendants(os.getpid())
        pool.close()
        pool.close()
        assert not any(process_alive(pid) for pid in pids)
        with pytest.raises(LocalError):
            device.set_backend("null")
        with pytest.raises(LocalError):
            NetDevice(pool)


def test_idle_device_costs_nothing() -> None:
    """With nothing to do workers neither wake up nor run items: a while of rest leaves their counters alone."""
    looks = 300
    with Pool(workers=1) as pool:
        device = NetDevice(pool, backend="loopback")
        with Guest(device) as guest, Traffic(guest.pairs[0]) as traffic:
            traffic.progress(100)
            traffic.finish()
            seen: list[dict[str, int]] = []

            def at_rest() -> bool:
                seen.append({name: pool.snapshot()["workers"][0][name] for name in ("items", "wakeups")})
                return len(seen) > looks and seen[-1] == seen[-looks]

            wait_until(at_rest, what=f"{looks} looks, a millisecond apart, at counters that stand still")


def affinity(pid: int) -> dict[str, set[int]]:
    """Return the processors of each thread of a process, by what the thread does: the main one moves packets."""
    tasks = Path(f"/proc/{pid}/task")
    names = {int(task.name): "data" if int(task.name) == pid else task.name for task in tasks.iterdir()}
    return {name: os.sched_getaffinity(tid) for tid, name in names.items()}


def test_processors() -> None:
    """With `cpus` data threads stay where they are put, those of replacements and new workers too; others are free."""
    allowed = os.sched_getaffinity(0)
    cpus = sorted(allowed)[:2]
    with Pool(workers=3, cpus=cpus) as pool:
        pool.new_worker()
        for victim in (0, 3):
            restarts = pool.restarts
            pool.kill_worker(victim)
            wait_until(lambda restarts=restarts: pool.restarts > restarts, what="the replacement")  # type: ignore[misc]
        wanted = [cpus[index % len(cpus)] for index in range(4)]
        assert [worker["cpu"] for worker in pool.snapshot()["workers"]] == wanted
        for process, cpu in zip(pool.workers, wanted, strict=True):
            threads = affinity(process.pid)
            assert threads.pop("data") == {cpu}
            assert set(map(frozenset, threads.values())) == {frozenset(allowed)}
    with Pool(workers=1) as pool:
        assert affinity(pool.workers[0].pid)["data"] == allowed
        assert pool.snapshot()["workers"][0]["cpu"] is None
    with pytest.raises(LocalError, match="processor 8191 is not one"):
        Pool(workers=1, cpus=[8191])
