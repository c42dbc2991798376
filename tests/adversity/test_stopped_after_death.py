"""A ring is stopped after its worker's death and before the replacement has taken it up."""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

import pytest

from tests.frames import make_frame
from tests.helpers import PATIENCE, wait_until
from tests.net_driver import F_VERSION_1, Guest, as_split
from tests.request_driver import RequestGuest
from vhostmp import unfinished
from vhostmp.device import Device
from vhostmp.net import NetDevice
from vhostmp.requests import PythonDevice
from vhostmp.shm import layout
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.packed import AVAIL, USED, WRAP, PackedDriver, pack_packed
from vhostmp.tools.stress.ring import F_RING_PACKED
from vhostmp.tools.stress.split import SplitDriver

#: An entry of the journal: its mark, how many descriptors, and its length in numbers (workers/_journal.pxd).
MARK: Final = 1
ONE_DESCRIPTOR: Final = 1 << 48
WORDS: Final = 4
RX, TX = 0, 1
SERVER: Final = Path(__file__).with_name("backends.py")


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker."""
    with Pool(workers=1) as one:
        yield one


def half_give_back(device: Device, driver: SplitDriver | PackedDriver, buf: memoryview, ring: int = TX) -> None:
    """Leave what a worker leaves that dies between the two used descriptors of a batch: the second one is written."""
    offset = layout.ring_offset(device.first_ring + ring)
    ids = list(driver.in_flight)[:2]
    start = layout.RING.read(buf, offset, "used_idx")
    assert start & WRAP, "the first round, for simplicity"
    for name, value in (("batch_start_idx", start), ("batch_avail_idx", start + 2), ("batch_used_idx", start + 2)):
        layout.RING.write(buf, offset, name, value)
    for place, buffer_id in enumerate(ids):
        layout.RING.write(buf, offset, "journal", MARK | ONE_DESCRIPTOR, WORDS * (place + 1))
        layout.RING.write(buf, offset, "journal", buffer_id, WORDS * (place + 1) + 2)
    layout.RING.write(buf, offset, "batch_n", len(ids))
    driver.write_descriptor((start & ~WRAP) + 1, pack_packed(0, 0, ids[1], AVAIL | USED))


def ring_word(device: Device, pool: Pool, name: str) -> int:
    """Read a word of the first ring's slot."""
    return layout.RING.read(pool.buf, layout.ring_offset(device.first_ring), name)


def suppress_event(fd: int) -> None:
    """Take what an eventfd counts, if anything."""
    with suppress(BlockingIOError):
        os.eventfd_read(fd)


def not_yet(worker: object) -> None:
    """Be a replacement worker that has not looked at the rings when it is told to."""
    del worker


@pytest.mark.parametrize("restarted", [False, True], ids=["dead", "replaced"])
def test_half_written_batch(pool: Pool, restarted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun is finished before the front-end hears where the ring stands; each chain comes back once."""
    device = NetDevice(pool, backend="null")
    with Guest(device, features=F_VERSION_1 | F_RING_PACKED, num=16) as guest:
        pair = guest.pairs[0]
        for number in range(3):
            assert pair.send(make_frame(number, 60))
        with pool.lock:  # the supervisor thread waits
            worker = pool.workers[0]
            worker.kill()
            wait_until(lambda: not worker.alive, what="the worker's end")
            pair.tx.publish()
            half_give_back(device, guest.pairs[0].tx, pool.buf)
            if restarted:
                with monkeypatch.context() as patch:
                    patch.setattr(device, "resume", not_yet)
                    pool.revive(0)
            base = device.stop_vring(TX)
        assert pair.reap() >= len(("first", "second"))
        assert base == pair.tx.used_idx | pair.tx.used_idx << 16
        guest.start(TX, base)
        assert pair.send(make_frame(3, 60))
        pair.kick()
        wait_until(lambda: pair.reap() >= 0 and not pair.tx.in_flight, what="every chain")
        pair.tx.check_idle()
        assert pool.restarts == 1


@pytest.mark.parametrize("seen", ["dead", "given", "taken up"])
@pytest.mark.parametrize("kind", ["receive", "requests"])
def test_half_written_and_disabled(pool: Pool, kind: str, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that was begun on a ring that is disabled before it is taken up is finished all the same, once.

    By a stop, whatever the replacement has seen of the ring; and by the replacement itself. Nothing else happens on it.
    """
    if kind == "receive":
        network = NetDevice(pool, backend="null")
        device: Device = network
        net_guest = Guest(network, features=F_VERSION_1 | F_RING_PACKED, num=16, rx_limit=3)
        guest: Guest | RequestGuest = net_guest
        driver, call = net_guest.pairs[0].rx, net_guest.pairs[0].calls[RX]
        net_guest.pairs[0].post()
    else:
        device = PythonDevice(pool, backend=f"python:{SERVER}:Unfinished")
        guest = RequestGuest(device, features=F_VERSION_1 | F_RING_PACKED, num=16)
        driver, call = guest.rings[0], guest.calls[0]
        for _ in range(3):
            driver.add([], [(guest.free.popleft(), 8)])
    with closing(device), closing(guest):
        wait_until(lambda: ring_word(device, pool, "used_valid"), what="the ring to be taken up")
        with pool.lock:  # the supervisor thread waits
            worker = pool.workers[0]
            worker.kill()
            wait_until(lambda: not worker.alive, what="the worker's end")
            driver.publish()
            half_give_back(device, driver, pool.buf, RX)
            device.set_vring_enable(RX, False)
            suppress_event(call)
            if seen == "given":
                with monkeypatch.context() as patch:
                    patch.setattr(device, "resume", not_yet)
                    pool.revive(0)
            elif seen == "taken up":
                pool.revive(0)
                wait_until(lambda: not ring_word(device, pool, "batch_n"), what="the batch")
                assert select.select([call], [], [], PATIENCE)[0], "the driver was not told"
            before = time.monotonic()
            base = device.stop_vring(RX)
            assert time.monotonic() - before < unfinished.PATIENCE
        assert len(list(driver.reap())) == len(("first", "second"))
        assert base == driver.used_idx | driver.used_idx << 16
        assert len(driver.in_flight) == 1


def test_what_cannot_be_finished(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    """A ring that is broken is stopped at once all the same, where its slot says."""
    device = NetDevice(pool, backend="null")
    with Guest(device, features=F_VERSION_1 | F_RING_PACKED, num=16) as guest:
        for number in range(2):
            assert guest.pairs[0].send(make_frame(number, 60))
        with pool.lock:
            pool.workers[0].kill()
            wait_until(lambda: not pool.workers[0].alive, what="the worker's end")
            guest.pairs[0].tx.publish()
            half_give_back(device, guest.pairs[0].tx, pool.buf)
            offset = layout.ring_offset(device.first_ring + TX)
            layout.RING.write(pool.buf, offset, "broken", layout.CONSTANTS["BROKEN_MEMORY"])
            assert device.stop_vring(TX) == WRAP | WRAP << 16
        assert "lost" not in caplog.text


def half_publish(device: NetDevice, guest: Guest, buf: memoryview, *, shown: bool) -> None:
    """Leave what a worker leaves that dies between noting a split ring's batch of two and saying that it is published.

    `shown`: it has stored the ring's used index.
    """
    driver = as_split(guest.pairs[0].tx)
    offset = layout.ring_offset(device.first_ring + TX)
    start = layout.RING.read(buf, offset, "used_idx")
    for place, head in enumerate(list(driver.in_flight)[:2]):
        struct.pack_into("<II", driver.buf, driver.layout.used + 4 + 8 * ((start + place) % driver.num), head, 0)
    layout.RING.write(buf, offset, "batch_avail_idx", start + 2)
    layout.RING.write(buf, offset, "batch_used_idx", start + 2)
    if shown:
        struct.pack_into("<H", driver.buf, driver.layout.used + 2, start + 2)


@pytest.mark.parametrize("restarted", [False, True], ids=["dead", "replaced"])
@pytest.mark.parametrize("shown", [True, False], ids=["shown", "not_shown"])
def test_half_published_batch(pool: Pool, shown: bool, restarted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A front-end hears where a split ring stands as the driver sees it; else another back-end would use chains twice.

    And it hears that at once.
    """
    device = NetDevice(pool, backend="null")
    with Guest(device, features=F_VERSION_1, num=16) as guest:
        pair = guest.pairs[0]
        assert pair.send(make_frame(0, 60))
        pair.kick()
        wait_until(lambda: pair.reap() >= 0 and not pair.tx.in_flight, what="the first chain")
        for number in range(3):
            assert pair.send(make_frame(1 + number, 60))
        with pool.lock:
            worker = pool.workers[0]
            worker.kill()
            wait_until(lambda: not worker.alive, what="the worker's end")
            pair.tx.publish()
            half_publish(device, guest, pool.buf, shown=shown)
            if restarted:
                with monkeypatch.context() as patch:
                    patch.setattr(device, "resume", not_yet)
                    pool.revive(0)
            before = time.monotonic()
            base = device.stop_vring(TX)
            assert time.monotonic() - before < unfinished.PATIENCE
        assert base == as_split(pair.tx).used_idx
        assert base >= (3 if shown else 1)
        guest.start(TX, base)
        pair.kick()
        wait_until(lambda: pair.reap() >= 0 and not pair.tx.in_flight, what="every chain")
        pair.tx.check_idle()
