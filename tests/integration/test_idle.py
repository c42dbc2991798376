"""What does nothing costs nothing: no process or thread of a served, idle device wakes up; a worker is small."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from tests.helpers import comes_to_rest, wait_until
from tests.net_driver import F_VERSION_1, Guest
from vhostmp.net import NetDevice
from vhostmp.shm import layout
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import F_RING_PACKED
from vhostmp.watchdog import LOOK_MAX

WORKER_MEMORY_MAX = 40 << 20


def wakeups(pid: int) -> dict[str, int]:
    """Return how often each thread of a process has been put on a processor after it had slept of its own accord."""
    found: dict[str, int] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                found[task.name] = int(line.split()[1])
    return found


def family(pool: Pool) -> list[int]:
    """Return the pids of a pool's workers and of their parent, the spawner."""
    workers = [worker.pid for worker in pool.workers]
    stat = Path(f"/proc/{workers[0]}/stat").read_text()
    return [*workers, int(stat.rpartition(")")[2].split()[1])]


def has_used(device: NetDevice, count: int) -> bool:
    """Whether the transmit ring has given back that many packets."""
    used: int = device.snapshot()["queues"][1]["used_idx"]
    return used == count


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["null", "loopback"])
def test_idle_device_wakes_nobody(backend: str) -> None:
    """Over a second without traffic no thread of the workers or the spawner runs, nor does our supervisor thread."""
    with Pool(workers=2) as pool:
        device = NetDevice(pool, backend=backend, queue_pairs=2)
        with Guest(device) as guest:
            pair = guest.pairs[0]
            pair.post()
            assert pair.send(bytes(12) + b"\x08\x00" + bytes(46))
            pair.kick()
            wait_until(lambda: device.snapshot()["queues"][1]["used_idx"] == 1, what="the packet")
            main = str(os.getpid())

            def look() -> list[dict[str, int]]:
                ours = {task: count for task, count in wakeups(os.getpid()).items() if task != main}
                return [ours, *(wakeups(pid) for pid in family(pool))]

            # The watchdog looks a few times before it knows that there is nothing to watch.
            assert comes_to_rest(look, 1.5 * LOOK_MAX)


def test_whatever_a_kick_carries() -> None:
    """Any value of the eventfd is one kick: with NOTIFICATION_DATA a front-end might write an index there."""
    values = (1, 1 << 16 | 1, 0xFFFF_0001, (1 << 64) - 2)
    with Pool(workers=1) as pool:
        device = NetDevice(pool, backend="null")
        with Guest(device) as guest:
            pair = guest.pairs[0]
            wait_until(lambda: layout.WORKER.read(pool.buf, layout.worker_offset(0), "asleep") == 1, what="sleep")
            for count, value in enumerate(values, 1):
                assert pair.send(bytes(12) + b"\x08\x00" + bytes(46))
                pair.tx.publish()
                os.eventfd_write(pair.kicks[1], value)
                wait_until(partial(has_used, device, count), what="the packet")


@pytest.mark.slow
def test_busy_polling_ends() -> None:
    """A ring with a busy-poll time sleeps once that time is over, and is woken by the next kick."""
    with Pool(workers=1) as pool:
        device = NetDevice(pool, backend="null")
        with Guest(device) as guest:
            device.set_vring_busyloop_timeout(1, 2000)
            assert [device.get_vring_busyloop_timeout(index) for index in (0, 1)] == [0, 2000]
            pair = guest.pairs[0]
            offset = layout.worker_offset(0)
            for count in (1, 2):
                assert pair.send(bytes(12) + b"\x08\x00" + bytes(46))
                pair.kick()
                wait_until(partial(has_used, device, count), what="the packet")
                wait_until(lambda: layout.WORKER.read(pool.buf, offset, "asleep") == 1, what="the worker's sleep")


@pytest.mark.slow
def test_polled_ring_needs_no_kick() -> None:
    """As long as a ring is polled the device wants no kicks and takes packets all the same; then its worker sleeps."""
    with Pool(workers=1) as pool:
        device = NetDevice(pool, backend="null")
        with Guest(device) as guest:
            device.set_vring_busyloop_timeout(1, 60_000_000)
            pair = guest.pairs[0]
            offset = layout.worker_offset(0)
            pair.kick()
            polls = layout.WORKER.read(pool.buf, offset, "polls")
            for count in range(1, 100):
                assert pair.send(bytes(12) + b"\x08\x00" + bytes(46))
                wanted = pair.tx.publish()
                assert not wanted or count == 1
                if wanted:
                    os.eventfd_write(pair.kicks[1], 1)
                wait_until(partial(has_used, device, count), what="the packet")
                pair.reap()
            assert layout.WORKER.read(pool.buf, offset, "polls") > polls
            assert layout.WORKER.read(pool.buf, offset, "asleep") == 0
            device.set_vring_busyloop_timeout(1, 0)
            wait_until(lambda: layout.WORKER.read(pool.buf, offset, "asleep") == 1, what="the worker's sleep")


@pytest.mark.slow
def test_worker_memory() -> None:
    """A worker's own memory, guest memory aside, is under 40 MB, with a back-end and rings attached."""
    with Pool(workers=1) as pool:
        device = NetDevice(pool, backend="loopback")
        with Guest(device):
            assert pool.snapshot()["workers"][0]["rss_bytes"] < WORKER_MEMORY_MAX


@pytest.mark.parametrize("features", [F_VERSION_1, F_VERSION_1 | F_RING_PACKED])
def test_polled_rings_want_no_kicks(features: int) -> None:
    """A ring that was asleep is kicked once; while it is polled after that its driver has nobody to kick."""
    with Pool(workers=1) as pool:
        device = NetDevice(pool)
        with Guest(device, features=features) as guest:
            (pair,) = guest.pairs
            device.set_vring_busyloop_timeout(1, 60_000_000)
            assert comes_to_rest(lambda: pool.snapshot()["workers"][0]["items"])
            before = device.snapshot()["queues"][1]["kicks"]
            for _ in range(50):
                assert pair.send(bytes(12) + b"\x08\x00" + bytes(46))
                pair.kick()
                wait_until(pair.reap, what="the packet")
            assert device.snapshot()["queues"][1]["kicks"] - before <= 1
