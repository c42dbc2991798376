"""Two guests joined by a patch, one worker for both: it dies, or one of them does harm; the other is not to notice."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from tests.adversity import backends
from tests.adversity.backends import GATE
from tests.adversity.test_killed_worker import BURST, STEPS, kill_around
from tests.asleep import is_asleep, kick_in_order
from tests.dirty import LOG_ALL, DirtyLog
from tests.frames import make_frame
from tests.helpers import wait_until
from tests.integration.test_patch import PACKED, Patched, patched
from tests.integration.traffic import Traffic
from tests.net_driver import FEATURES, Guest
from tests.stuck import impatient, stuck_guest
from vhostmp.deaths import RestartLimit
from vhostmp.errors import SynchronizeTimeout
from vhostmp.net import NetDevice
from vhostmp.shm import layout
from vhostmp.shm._epoch import published
from vhostmp.shm.memory import GuestMemory
from vhostmp.supervisor import Pool

pytestmark = pytest.mark.slow

DEATHS: Final = 8
LOG_BYTES: Final = (1 << 31) // 4096 // 8 + 256


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker, which is killed as often as the test likes."""
    with Pool(workers=1, restart_limit=RestartLimit(deaths=0)) as one:
        yield one


def repeated(both: Patched) -> int:
    """Return how many packets of either end are said to have been done again."""
    return sum(queue["repeated"] for device in both.devices for queue in device.snapshot()["queues"])


def broken(device: NetDevice) -> list[str | None]:
    """Return why each ring of a device is broken, None for those that are not."""
    return [queue["broken"] for queue in device.snapshot()["queues"]]


@pytest.mark.parametrize("features", [(FEATURES, FEATURES), (PACKED, FEATURES), (PACKED, PACKED)], ids=str)
def test_killed_under_load(pool: Pool, features: tuple[int, int]) -> None:
    """The worker of both ends is killed again and again: nothing is lost either way, and what came twice is counted."""
    with ExitStack() as stack:
        both = patched(stack, pool, features)
        with both.cable(window=200) as cable:
            for death in range(DEATHS):
                cable.progress(100)
                pool.kill_worker(0)
                wait_until(lambda death=death: pool.restarts > death, what="the replacement")  # type: ignore[misc]
            cable.progress(100)
            tallies = cable.finish()
        assert [tally.missing for tally in tallies] == [0, 0], tallies
        assert sum(tally.duplicated for tally in tallies) <= repeated(both) <= 2 * BURST * DEATHS


@pytest.mark.parametrize("step", STEPS)
def test_killed_in_a_verb_of_either_end(monkeypatch: pytest.MonkeyPatch, pool: Pool, step: str) -> None:
    """A swap or a new memory table of one end whose worker dies at any step is in force, and both ends go on."""
    with ExitStack() as stack, GuestMemory.create(1 << 20, gpa=1 << 40) as spare:
        both = patched(stack, pool)
        with both.cable(window=200) as cable:
            cable.progress(100)
            verbs: Sequence[Callable[[], object]] = (
                lambda: both.devices[1].set_backend("patch:a"),
                lambda: both.devices[0].add_mem_region(spare.region),
                lambda: both.devices[1].set_vring_busyloop_timeout(0, 50),
            )
            for number, verb in enumerate(verbs):
                with monkeypatch.context() as patch:
                    killed = kill_around(patch, pool, step, before=True)
                    verb()
                assert len(killed) == 1
                wait_until(lambda number=number: pool.restarts == number + 1, what="the replacement")  # type: ignore[misc]
                cable.progress(100)
            tallies = cable.finish()
        assert [tally.missing for tally in tallies] == [0, 0], tallies
        assert both.state == ["joined to device b", "joined to device a"]


@pytest.mark.parametrize("what", ["rings", "buffers", "log"])
def test_memory_of_the_receiver_truncated(what: str) -> None:
    """Memory that one end cuts off while the other end's packets go there breaks its rings, not those of the other end.

    The other one goes on with whoever comes in its place, and a third device of the same worker does not notice.
    """
    with Pool(workers=1) as pool, ExitStack() as stack:
        both = patched(stack, pool)
        sender, evil = both.guests
        beside = stack.enter_context(Guest(NetDevice(pool, backend="loopback", name="c")))
        log = stack.enter_context(DirtyLog(LOG_BYTES))
        both.devices[1].set_log_base(log.fd, log.size, 0)
        both.devices[1].set_features(evil.features | LOG_ALL)
        evil.pairs[0].post()
        evil.pairs[0].kick()
        with Traffic(beside.pairs[0]) as traffic:
            traffic.progress(100)
            os.ftruncate({"rings": evil.rings.fd, "buffers": evil.buffers.memory.fd, "log": log.fd}[what], 0)
            assert sender.pairs[0].send(make_frame(0, 60))
            os.eventfd_write(sender.pairs[0].kicks[1], 1)
            sender.pairs[0].kick()
            wait_until(lambda: broken(both.devices[1]) == ["memory", "memory"], what=f"{broken(both.devices[1])}")
            wait_until(lambda: pool.restarts == 1, what="the replacement")
            traffic.progress(100)
            assert traffic.finish().missing == 0
        assert broken(both.devices[0]) == [None, None]
        wait_until(lambda: sender.pairs[0].reap() == 1, what="the frame, which nobody can have any more")
        assert both.devices[0].snapshot()["queues"][1]["drops"] == {"disabled": 1}
        assert pool.restarts == 1


VERBS: Final[dict[str, Callable[[NetDevice], object]]] = {
    "stop": lambda device: device.stop_vring(0),
    "disable": lambda device: device.set_vring_enable(0, False),
    "swap": lambda device: device.set_backend("null"),
    "close": lambda device: device.close(),
    "leave": lambda device: device.stop_all(),
}


@pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_barrier_counts_for_the_other_ends_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, features: int
) -> None:
    """An item of A's that begins after B's generation was published, and before anything else told the worker of it.

    The worker is inside another device's item when B's verb publishes, and A's is the next one in its queue: it comes
    before the worker looks at what it was nudged for. B's ring gets nothing any more, and A's frame goes nowhere.
    """
    monkeypatch.setenv(GATE, str(tmp_path))
    with Pool(workers=1, sandbox=False) as pool, ExitStack() as stack:
        both = patched(stack, pool, (FEATURES, features))
        held = stack.enter_context(Guest(NetDevice(pool, name="gate", backend=f"python:{backends.__file__}:Gate")))
        sender, receiver = (guest.pairs[0] for guest in both.guests)
        receiver.post()
        receiver.kick()
        wait_until(lambda: is_asleep(pool, [receiver.kicks[0]]), what="a worker asleep")
        for pair in (held.pairs[0], sender):
            assert pair.send(make_frame(0, 60))
            pair.tx.publish()
        kick_in_order(pool, [held.pairs[0].kicks[1], sender.kicks[1]])
        wait_until((tmp_path / "entered").exists, what="the item before")
        before = published(pool.buf, both.devices[1].slot)
        thread = threading.Thread(target=VERBS[verb], args=[both.devices[1]])
        thread.start()
        wait_until(lambda: published(pool.buf, both.devices[1].slot) > before, what="a new generation")
        (tmp_path / "open").touch()
        thread.join()
        assert receiver.rx.pending() == 0, "received after the barrier"
        if verb == "disable":
            wait_until(lambda: sender.reap() == 1, what="the frame")
            assert both.devices[0].snapshot()["queues"][1]["drops"] == {"disabled": 1}
        else:
            place = layout.worker_offset(0)
            items = layout.WORKER.read(pool.buf, place, "items")
            os.eventfd_write(sender.kicks[1], 1)
            wait_until(lambda: layout.WORKER.read(pool.buf, place, "items") > items, what="one more item")
            assert sender.reap() == 0
        assert receiver.rx.pending() == 0
        assert pool.restarts == 0


def test_a_move_that_times_out_brings_both_ends_together(tmp_path: Path) -> None:
    """A worker that is stuck when a patched pair is moved to it: the verb gives up, and later both ends are there."""
    with stuck_guest(tmp_path, workers=2) as stuck, ExitStack() as stack:
        pool, there = stuck.pool, stuck.device.placement
        both = patched(stack, pool)
        elsewhere = both.devices[0].placement
        assert elsewhere != there
        with both.cable(window=100) as cable:
            cable.progress(100)
            with impatient(index=there[0]), pytest.raises(SynchronizeTimeout):
                both.devices[0].attach_vring_worker(0, there[0])
            assert [device.placement for device in both.devices] == [there, elsewhere]
            assert both.state == ["waits: different workers serve its two ends"] * 2
            stuck.let_go()
            wait_until(lambda: both.devices[1].placement == there, what="the other end")
            assert both.state == ["joined to device b", "joined to device a"]
            cable.progress(100)
            cable.check_whole()
