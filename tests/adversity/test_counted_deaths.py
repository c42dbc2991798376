"""What a death has cost is counted whatever happens to the ring before the replacement has taken it up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final

import pytest

from tests.frames import make_frame
from tests.helpers import wait_until
from tests.net_driver import F_VERSION_1, Guest
from vhostmp import flush
from vhostmp.net import NetDevice
from vhostmp.shm import layout
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import F_RING_PACKED

TX: Final = 1
#: An entry of the journal that is marked, of a chain that was begun: it will be done again (workers/_journal.pxd).
BEGUN: Final = 1 | 1 << 8
CHAINS: Final = 3


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of two workers."""
    with Pool(workers=2) as two:
        yield two


@pytest.fixture(params=[0, F_RING_PACKED], ids=["split", "packed"])
def guest(pool: Pool, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """Return a guest whose packets go nowhere."""
    with (
        closing(NetDevice(pool, backend="null")) as device,
        Guest(device, features=F_VERSION_1 | request.param, num=16) as one,
    ):
        yield one


def queue(guest: Guest) -> Any:
    """Return what is shown of the transmit ring."""
    return guest.device.snapshot()["queues"][TX]


def begin(guest: Guest, buf: memoryview, count: int) -> None:
    """Leave what a worker leaves that dies with so many chains begun."""
    words = 4 if guest.features & F_RING_PACKED else 2
    for k in range(count):
        offset = layout.ring_offset(guest.device.first_ring + TX)
        layout.RING.write(buf, offset, "journal", BEGUN, words * (k + 1))


def taken_up(guest: Guest, buf: memoryview) -> bool:
    """Whether a worker stands ready at the transmit ring."""
    return bool(layout.RING.read(buf, layout.ring_offset(guest.device.first_ring + TX), "used_valid"))


@pytest.mark.parametrize("how", ["replaced", "moved", "stopped"])
def test_counted(pool: Pool, guest: Guest, how: str) -> None:
    """A worker's death is counted by its replacement, by the worker that the ring is moved to, or before it stops."""
    wait_until(lambda: taken_up(guest, pool.buf), what="a worker at the ring")
    with pool.lock:  # the supervisor thread waits
        index = guest.device.get_vring_worker(TX)
        worker = pool.worker(index)
        worker.kill()
        wait_until(lambda: not worker.alive, what="the worker's end")
        begin(guest, pool.buf, CHAINS)
        if how == "moved":
            guest.device.attach_vring_worker(TX, 1 - index)
        elif how == "stopped":
            guest.device.stop_vring(TX)
            assert queue(guest)["repeated"] == CHAINS
    wait_until(lambda: queue(guest)["repeated"] == CHAINS, what="the count")
    wait_until(lambda: pool.restarts == 1, what="the replacement")
    guest.device.set_backend("null")  # all have taken up what there is
    assert (queue(guest)["repeated"], queue(guest)["lost"]) == (CHAINS, 0)
    assert not noted_death(pool, guest)


def noted_death(pool: Pool, guest: Guest) -> bool:
    """Whether whoever takes the transmit ring up next is told to count a death."""
    return bool(layout.RING.read(pool.buf, layout.ring_offset(guest.device.first_ring + TX), "died"))


def test_not_noted_once_more(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A death that the worker has counted that a pair is moved to, before the move has come to its end, is not news.

    Though the dead one served another pair of the device, too, which nobody has taken up.
    """
    retire = flush.retire
    with (
        closing(NetDevice(pool, backend="null", queue_pairs=2)) as device,
        Guest(device, pairs=2, features=F_VERSION_1, num=16) as guest,
    ):
        device.attach_worker(1, device.get_vring_worker(TX))
        wait_until(lambda: taken_up(guest, pool.buf), what="a worker at the ring")

        def retire_late(*arguments: Any) -> Any:
            if device.state.held:  # the second step of the move: the pair is served already
                wait_until(lambda: not noted_death(pool, guest), what="the count")
            return retire(*arguments)

        monkeypatch.setattr(flush, "retire", retire_late)
        with pool.lock:
            index = device.get_vring_worker(TX)
            worker = pool.worker(index)
            worker.kill()
            wait_until(lambda: not worker.alive, what="the worker's end")
            begin(guest, pool.buf, CHAINS)
            device.attach_vring_worker(TX, 1 - index)
            assert queue(guest)["repeated"] == CHAINS
            assert not noted_death(pool, guest)


def test_a_new_life(pool: Pool, guest: Guest) -> None:
    """What is left of a death that nobody could count is not taken for one of a ring's next life."""
    wait_until(lambda: taken_up(guest, pool.buf), what="a worker at the ring")
    base = guest.device.stop_vring(TX)
    begin(guest, pool.buf, CHAINS)
    layout.RING.write(pool.buf, layout.ring_offset(guest.device.first_ring + TX), "died", 1)
    guest.start(TX, base)
    wait_until(lambda: taken_up(guest, pool.buf), what="a worker at the ring")
    assert (queue(guest)["repeated"], queue(guest)["lost"]) == (0, 0)


def test_a_burst_that_was_put_back(pool: Pool) -> None:
    """Frames that wait for receive buffers leave no note of the receive ring to who serves the transmit ring next."""
    with (
        closing(NetDevice(pool, backend="loopback")) as device,
        Guest(device, features=F_VERSION_1, num=16, rx_limit=0) as guest,
    ):
        offset = layout.ring_offset(device.first_ring + TX)
        assert guest.pairs[0].send(make_frame(0, 60))
        guest.pairs[0].kick()
        wait_until(lambda: layout.RING.read(pool.buf, offset, "avail_idx") == 1, what="a look at the frame")
        wait_until(lambda: not layout.RING.read(pool.buf, offset, "effect_valid"), what="the end of the note")


@pytest.mark.parametrize("features", [F_VERSION_1, F_VERSION_1 | F_RING_PACKED], ids=["split", "packed"])
def test_a_burst_that_was_published(pool: Pool, features: int) -> None:
    """Nor do frames that were delivered: of what is begun next it would be said that nothing can have come of it."""
    with (
        closing(NetDevice(pool, backend="loopback")) as device,
        Guest(device, features=features, num=16) as guest,
    ):
        offset = layout.ring_offset(device.first_ring + TX)
        pair = guest.pairs[0]
        pair.post()
        assert pair.send(make_frame(0, 60))
        pair.kick()
        wait_until(pair.receive, what="the frame")
        wait_until(lambda: not layout.RING.read(pool.buf, offset, "effect_valid"), what="the end of the note")
