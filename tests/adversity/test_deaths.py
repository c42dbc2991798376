"""Every kind of death: the worker is replaced, the ring that killed it is found out, and nobody else notices."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs
import pytest

from tests.adversity.backends import GATE
from tests.frames import ETHERNET, make_frame
from tests.helpers import process_state, wait_until
from tests.integration.traffic import Traffic
from tests.net_driver import Guest
from vhostmp.deaths import RestartLimit
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.shm import layout
from vhostmp.supervisor import Pool

POISONED: Final = f"python:{Path(__file__).with_name('backends.py')}:Poisoned"
GATED: Final = f"python:{Path(__file__).with_name('backends.py')}:Gate"
TX: Final = 1
#: A killed worker may repeat what it had given back to the receive ring and not yet to the transmit ring: one burst.
BURST: Final = 64
#: Long for a worker, though the machine be busy; short for a test.
WATCHDOG: Final = 1.0
PTRACE_SEIZE: Final = 0x4206
PTRACE_DETACH: Final = 17


@attrs.frozen
class Scene:
    """A poisoned device and its neighbour in worker 0, a stranger's in worker 1, both of these with traffic."""

    pool: Pool
    device: NetDevice
    guest: Guest
    neighbour: Traffic
    stranger: Traffic
    err: int

    def poison(self, act: str) -> None:
        """Send a frame that has the worker do something."""
        pair = self.guest.pairs[0]
        assert pair.send(ETHERNET + f"do {act}".encode() + bytes(40))
        pair.kick()

    @property
    def done(self) -> int:
        """How many frames of the poisoned device were given back."""
        used: int = self.device.snapshot()["queues"][TX]["used_idx"]
        return used

    @property
    def broken(self) -> list[str | None]:
        """Why each ring of the poisoned device is broken."""
        return [queue["broken"] for queue in self.device.snapshot()["queues"]]


@contextmanager
def scene(
    watchdog: float = 10.0, limit: RestartLimit | None = None, backend: str = POISONED, *, sandbox: bool = True
) -> Generator[Scene]:
    """Set it, and check at the end that the two others have lost nothing and the stranger's worker is the same one."""
    err = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with Pool(workers=2, watchdog=watchdog, restart_limit=limit, sandbox=sandbox) as pool:
            stranger = NetDevice(pool, backend="loopback", name="stranger")
            neighbour = NetDevice(pool, backend="loopback", name="neighbour")
            device = NetDevice(pool, backend=backend, name="poisoned")
            stranger.attach_worker(0, 1)
            neighbour.attach_worker(0, 0)
            device.attach_worker(0, 0)
            pid = pool.worker(1).pid
            with (
                Guest(stranger) as far,
                Guest(neighbour) as near,
                Guest(device) as guest,
                Traffic(far.pairs[0]) as one,
                Traffic(near.pairs[0]) as other,
            ):
                device.set_vring_err(TX, err)
                one.progress(50)
                other.progress(50)
                yield Scene(pool, device, guest, other, one, err)
                one.progress(50)
                other.progress(50)
                first, second = one.finish(), other.finish()
            assert (first.missing, first.duplicated) == (0, 0), first
            assert second.missing == 0, second
            assert second.duplicated <= BURST * pool.restarts, second
            assert pool.worker(1).pid == pid
    finally:
        os.close(err)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["kill", "segv", "abort", "exit"])
def test_deadly_frame(act: str) -> None:
    """A ring that kills each worker that serves it is broken after five; swapped and started anew it is served."""
    with scene(sandbox=act != "kill") as stage:  # a worker may not kill itself
        stage.poison(act)
        wait_until(lambda: stage.broken == [None, "deaths"], what="a broken ring")
        wait_until(lambda: stage.pool.restarts == RestartLimit().deaths, what="the last replacement")
        stage.neighbour.progress(100)
        assert stage.pool.restarts == RestartLimit().deaths
        assert os.eventfd_read(stage.err) >= 1
        assert stage.device.snapshot()["queues"][TX]["deaths"] == RestartLimit().deaths
        stage.device.set_backend("null")
        stage.guest.start(TX, stage.device.stop_vring(TX))
        assert stage.broken == [None, None]
        pair = stage.guest.pairs[0]
        assert pair.send(make_frame(1, 60))
        pair.kick()
        wait_until(lambda: pair.reap() >= 0 and not pair.tx.in_flight, what="both frames")
        assert stage.pool.restarts == RestartLimit().deaths


@pytest.mark.slow
@pytest.mark.parametrize("act", ["loop", "sleep"])
def test_frame_that_hangs(act: str) -> None:
    """A worker that does not come out of a back-end is killed by the watchdog; as often as the limit says."""
    # The time that each hang took does not count: what is between two hangs is less than this on any machine.
    with scene(2 * WATCHDOG, RestartLimit(2, 1.8 * WATCHDOG)) as stage:
        stage.poison(act)
        wait_until(lambda: stage.broken == [None, "deaths"], what="a broken ring")
        wait_until(lambda: stage.pool.restarts == len(("first", "second")), what="the second replacement")
        assert stage.pool.snapshot()["workers"][0]["hangs"] == stage.pool.restarts


@pytest.mark.parametrize("act", ["memory", "fail"])
def test_frame_that_fails(act: str) -> None:
    """Neither a MemoryError nor another exception of a back-end costs a worker: the frame is dropped and counted."""
    with scene(sandbox=act != "memory") as stage:  # nor set limits
        stage.poison(act)
        wait_until(lambda: stage.device.snapshot()["queues"][TX]["drops"] == {"backend_error": 1}, what="the drop")
        assert stage.pool.restarts == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGTERM])
def test_killed_from_outside(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever kills workers from outside, more often than the limit, disturbs no ring that gets something done."""
    monkeypatch.setenv(GATE, str(tmp_path))
    entered, opened = tmp_path / "entered", tmp_path / "open"
    with scene(limit=RestartLimit(3, 1000.0), backend=GATED, sandbox=False) as stage:
        for count in range(1, 7):
            stage.poison("nothing")
            wait_until(entered.exists, what="the work item")
            os.kill(stage.pool.worker(0).pid, number)
            opened.touch()
            wait_until(lambda count=count: stage.pool.restarts == count, what="a replacement")  # type: ignore[misc]
            wait_until(lambda count=count: stage.done == count, what="the frame")  # type: ignore[misc]
            assert stage.broken == [None, None]
            opened.unlink()
            entered.unlink()
        assert stage.device.snapshot()["queues"][TX]["deaths"] == stage.pool.restarts


@pytest.mark.slow
def test_frames_that_are_deadly_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults of a worker's own count up whatever is done in between; a ring that is started anew has a new limit."""
    monkeypatch.setenv(GATE, str(tmp_path))
    limit = RestartLimit(3, 1000.0)
    with scene(limit=limit, sandbox=False) as stage:
        for count in range(1, limit.deaths):
            stage.poison("die in turn")
            wait_until(lambda count=count: stage.done == count, what="the frame")  # type: ignore[misc]
            wait_until(lambda count=count: stage.pool.restarts == count, what="a replacement")  # type: ignore[misc]
            assert stage.broken == [None, None]
        stage.poison("die in turn")
        wait_until(lambda: stage.broken == [None, "deaths"], what="a broken ring")
        stage.guest.start(TX, stage.device.stop_vring(TX))
        wait_until(lambda: stage.done == limit.deaths, what="the frame")
        stage.poison("die in turn")
        wait_until(lambda: stage.done == limit.deaths + 1, what="the next one")
        wait_until(lambda: stage.pool.restarts == limit.deaths + 1, what="the last replacement")
        assert stage.broken == [None, None]


@pytest.mark.slow
def test_stopped_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is stopped in a work item is killed and replaced; the item's ring is not to blame."""
    monkeypatch.setenv(GATE, str(tmp_path))
    with scene(WATCHDOG, RestartLimit(1, 10.0), GATED, sandbox=False) as stage:
        stage.poison("nothing")
        wait_until((tmp_path / "entered").exists, what="the work item")
        os.kill(stage.pool.worker(0).pid, signal.SIGSTOP)
        (tmp_path / "open").touch()
        wait_until(lambda: stage.pool.restarts == 1, what="the replacement")
        stage.neighbour.progress(20)
        assert stage.pool.snapshot()["workers"][0]["hangs"] == 1
        assert stage.broken == [None, None]


@pytest.mark.slow
def test_stopped_asleep() -> None:
    """A stopped worker with nothing to do is left alone; once a driver kicks and nobody answers it is replaced."""
    with Pool(workers=1, watchdog=WATCHDOG) as pool:
        device = NetDevice(pool, backend="null")
        with Guest(device) as guest:
            wait_until(lambda: layout.WORKER.read(pool.buf, layout.worker_offset(0), "asleep"), what="sleep")
            pid = pool.worker(0).pid
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: process_state(pid) == "T")
            time.sleep(3 * WATCHDOG)  # nothing is to happen
            assert pool.restarts == 0
            pair = guest.pairs[0]
            assert pair.send(make_frame(0, 60))
            pair.kick()
            wait_until(lambda: pair.reap() >= 0 and not pair.tx.in_flight, what="the frame")
            wait_until(lambda: pool.restarts == 1, what="the count of the one that has taken it")


@pytest.mark.slow
def test_traced() -> None:
    """A worker that somebody debugs is left alone however long it stands still, and killed once nobody does."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    with scene(WATCHDOG) as stage:
        pid = stage.pool.worker(0).pid
        if ptrace(PTRACE_SEIZE, pid, None, None) != 0:
            pytest.skip(f"ptrace: {os.strerror(ctypes.get_errno())}")
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, 0)
        time.sleep(4 * WATCHDOG)  # nothing is to happen
        assert stage.pool.restarts == 0
        ptrace(PTRACE_DETACH, pid, None, signal.SIGSTOP)
        wait_until(lambda: stage.pool.restarts == 1, what="the replacement")


@pytest.mark.slow
def test_no_watchdog() -> None:
    """With 0 a worker may stand still for ever: nobody looks."""
    with Pool(workers=1, watchdog=0) as pool:
        assert not [thread for thread in threading.enumerate() if thread.name == "vhostmp-watchdog"]
        device = NetDevice(pool, backend="loopback")
        with Guest(device) as guest, Traffic(guest.pairs[0]) as traffic:
            traffic.progress(20)
            pid = pool.worker(0).pid
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: process_state(pid) == "T")
            os.kill(pid, signal.SIGCONT)
            traffic.progress(20)
            tally = traffic.finish()
        tally.check_whole()
        assert pool.restarts == 0


@pytest.mark.parametrize("seconds", [-1.0, 0.05, 3601.0, float("nan"), float("inf")])
def test_watchdogs_that_are_none(seconds: float) -> None:
    """A limit too short or too long is refused, and nothing is left."""
    with pytest.raises(LocalError, match="watchdog"):
        Pool(workers=1, watchdog=seconds)


@pytest.mark.slow
def test_backend_that_kills_each_replacement(tmp_path: Path) -> None:
    """A back-end that cannot be made any more breaks the rings of its device in that worker; the others go on."""
    deadly = tmp_path / "deadly"
    module = tmp_path / "late.py"
    module.write_text(
        "import os, pathlib\n"
        "class Late:\n"
        f"    def __init__(self):\n        pathlib.Path({str(deadly)!r}).exists() and os._exit(4)\n"
        "    def transmit(self, queue, packets): pass\n"
        "    def receive(self, queue, budget): return []\n"
    )
    with scene(backend=f"python:{module}:Late", sandbox=False) as stage:  # it looks for a file
        deadly.touch()
        stage.pool.kill_worker(0)
        wait_until(lambda: stage.broken == ["deaths", "deaths"], what="broken rings")
        stage.neighbour.progress(50)
        restarts = stage.pool.restarts
        stage.neighbour.progress(50)
        assert stage.pool.restarts == restarts
