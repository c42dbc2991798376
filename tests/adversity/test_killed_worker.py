"""A worker is killed at each step of a flush: the verb ends well, the replacement takes up what is in force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest

from tests.helpers import wait_until
from tests.integration.traffic import Traffic
from tests.net_driver import Guest
from vhostmp import flush
from vhostmp.net import NetDevice
from vhostmp.shm.memory import GuestMemory
from vhostmp.supervisor import Pool

#: What runs between the steps of flush.flush, in order.
STEPS: Final = ("prepare", "publish", "synchronize", "retire")
#: A killed worker may repeat what it had given back to the receive ring and not yet to the transmit ring: one burst.
BURST: Final = 64


def kill_around(monkeypatch: pytest.MonkeyPatch, pool: Pool, step: str, *, before: bool) -> list[int]:
    """Have the worker killed, once, right before or after a step of the next flush. Returns the pids killed."""
    killed: list[int] = []
    original: Callable[..., Any] = getattr(flush, step)

    def kill() -> None:
        if not killed:
            worker = pool.workers[0]
            killed.append(worker.pid)
            worker.kill()
            wait_until(lambda: not worker.alive, what="the worker's end")

    def wrapped(*args: Any) -> Any:
        if before:
            kill()
        result = original(*args)
        if not before:
            kill()
        return result

    monkeypatch.setattr(flush, step, wrapped)
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_in_swap(monkeypatch: pytest.MonkeyPatch, step: str, before: bool) -> None:
    """A swap whose worker dies at any step returns, is in force, and traffic goes on with nothing lost."""
    with Pool(workers=1) as pool:
        device = NetDevice(pool, backend="loopback")
        with Guest(device) as guest, Traffic(guest.pairs[0]) as traffic:
            traffic.progress(100)
            generation = device.snapshot()["generation"]
            killed = kill_around(monkeypatch, pool, step, before=before)
            result = device.set_backend("loopback")
            assert len(killed) == 1
            assert result.generation == generation + 1 == device.snapshot()["generation"]
            wait_until(lambda: pool.restarts == 1, what="the replacement")
            traffic.progress(100)
            tally = traffic.finish()
        assert tally.missing == 0, tally
        assert tally.duplicated <= BURST, tally


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_in_memory_move(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A memory table that is replaced while the worker dies is in force for its replacement."""
    with Pool(workers=1) as pool, GuestMemory.create(1 << 20, gpa=1 << 40) as spare:
        device = NetDevice(pool, backend="loopback")
        with Guest(device) as guest, Traffic(guest.pairs[0]) as traffic:
            traffic.progress(100)
            kill_around(monkeypatch, pool, step, before=True)
            device.add_mem_region(spare.region)
            wait_until(lambda: pool.restarts == 1, what="the replacement")
            traffic.progress(100)
            device.remove_mem_region(spare.region)
            traffic.progress(100)
            assert traffic.finish().missing == 0


@pytest.mark.slow
def test_spawner_killed() -> None:
    """The spawner's death takes its workers with it; all are back, under a new spawner, and traffic goes on."""
    with Pool(workers=2) as pool:
        device = NetDevice(pool, backend="loopback")
        with Guest(device) as guest, Traffic(guest.pairs[0]) as traffic:
            traffic.progress(100)
            pids = {worker.pid for worker in pool.workers}
            pool.kill_spawner()
            # Not by their number: the spare that takes one's place may be of the spawner that is dead.
            wait_until(lambda: pids.isdisjoint(worker.pid for worker in pool.workers), what="two replacements")
            traffic.progress(100)
            tally = traffic.finish()
            wait_until(lambda: pool.restarts >= len(pids), what="the count")
        assert tally.missing == 0, tally
