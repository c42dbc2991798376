"""Behind an IOMMU, in real processes: a guest that maps and unmaps each buffer loses nothing, whatever else happens.

Also what a front-end or a guest may do to harm: questions that are not answered, entries that point anywhere, pages of
a ring that go away.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.dirty import ADDR_FLAG_LOG, LOG_ALL, DirtyLog, pages
from tests.frames import make_frame
from tests.helpers import wait_until
from tests.integration.traffic import Traffic
from tests.iommu_guest import PAGE, READ, RINGS_IOVA, WRITE, StrictBuffers, StrictGuest
from tests.net_driver import F_EVENT_IDX, F_INDIRECT_DESC, F_MRG_RXBUF, F_VERSION_1, Guest, Shape
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.shm._iotlb import ENTRIES_MAX
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import DESC_BYTES, F_RING_PACKED
from vhostmp.tools.stress.split import SplitDriver

PLAIN: Final = F_VERSION_1
ALL: Final = F_VERSION_1 | F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX
MIRROR: Final = f"python:{Path(__file__).with_name('backends.py')}:Mirror"
SIZES: Final = (60, 61, 590, 1514)
FRAMES: Final = 300
#: More questions or work items than these would mean that something repeats itself.
ASKED_MOST: Final = 10
ITEMS_MOST: Final = 100_000


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker."""
    with Pool(workers=1) as one:
        yield one


@pytest.fixture(params=[0, F_RING_PACKED], ids=["split", "packed"])
def guest(pool: Pool, request: pytest.FixtureRequest) -> Iterator[StrictGuest]:
    """Return a guest on a loopback device, with every feature."""
    device = NetDevice(pool, backend="loopback", iommu=True)
    with StrictGuest(device, features=ALL | request.param, num=64) as one:
        yield one


def counts(guest: Guest) -> dict[str, int]:
    """Return what `show` says of the IOTLB."""
    found: dict[str, int] = guest.device.snapshot()["iotlb"]
    return found


@pytest.mark.parametrize(
    "bits",
    [PLAIN, PLAIN | F_EVENT_IDX, ALL, PLAIN | F_RING_PACKED, ALL | F_RING_PACKED],
    ids=["plain", "event_idx", "all", "packed", "packed_all"],
)
def test_strict_guest(pool: Pool, bits: int) -> None:
    """Each buffer is mapped for one use, read or write only, and everything arrives; nothing is asked for in vain."""
    device = NetDevice(pool, backend="loopback", iommu=True)
    with StrictGuest(device, features=bits, num=64) as guest:
        with Traffic(guest.pairs[0], sizes=SIZES, window=50) as traffic:
            traffic.progress(FRAMES)
            traffic.finish().check_whole()
        assert guest.iommu.unknown == 0
        assert guest.iommu.denied == []
        found = counts(guest)
        assert found["misses"] >= 2 * FRAMES
        assert found["hits"] >= 2 * FRAMES
        assert found["unusable"] == 0
        assert found["entries"] <= FRAMES, "what was unmapped has gone"
        assert device.snapshot()["queues"][1]["drops"] == {}


def test_swaps_and_deaths_under_strict_traffic(pool: Pool, guest: StrictGuest) -> None:
    """Back-ends are swapped and the worker is killed while buffers come and go: nothing is lost or damaged."""
    guest.pairs[0].shape = Shape(split_header=True, pieces=2, indirect=True)
    with Traffic(guest.pairs[0], sizes=SIZES, window=20) as traffic:
        for _ in range(6):
            guest.device.set_backend("loopback")
            traffic.progress(30)
        for _ in range(3):
            before = pool.restarts
            pool.kill_worker(0)
            wait_until(lambda before=before: pool.restarts > before, what="a replacement")  # type: ignore[misc]
            traffic.progress(30)
        tally = traffic.finish()
    assert (tally.missing, tally.reordered) == (0, 0), tally
    assert guest.iommu.unknown == 0


def test_chain_in_pieces_on_several_pages(guest: StrictGuest) -> None:
    """A chain whose pieces are missing one by one is taken once all are there; nothing of it is dropped or repeated."""
    guest.pairs[0].shape = Shape(split_header=True, pieces=8)
    with Traffic(guest.pairs[0], sizes=(1514,), window=2) as traffic:
        traffic.progress(50)
        traffic.finish().check_whole()


def test_unanswered_question_stalls_its_ring_alone(pool: Pool, guest: StrictGuest) -> None:
    """A ring waits for an answer that does not come; another device of the same worker, and verbs, do not."""
    pair = guest.pairs[0]
    pair.post()
    pair.kick()
    guest.iommu.deaf.set()
    assert pair.send(make_frame(0, 60))
    pair.kick()
    wait_until(lambda: counts(guest)["unanswered"] > 0, what="a question")
    with Guest(NetDevice(pool, backend="loopback", name="other")) as other, Traffic(other.pairs[0]) as traffic:
        traffic.progress(200)
        traffic.finish().check_whole()
    guest.device.set_backend("null")
    guest.device.set_backend("loopback")
    assert not pair.receive()
    items = pool.snapshot()["workers"][0]["items"]
    asked = len(guest.iommu.asked)
    guest.iommu.answer_all()
    wait_until(lambda: pair.rx.pending() > 0, what="the frame")
    assert len(pair.receive()) == 1
    assert asked < ASKED_MOST, "a question was repeated"
    assert items < ITEMS_MOST, "the worker spins"


def test_pages_of_a_ring_go_and_come(guest: StrictGuest) -> None:
    """A ring whose pages are unmapped is not served, and goes on where it stood when they are mapped elsewhere."""
    pair = guest.pairs[0]
    with Traffic(pair, sizes=SIZES, window=20) as traffic:
        for _ in range(5):
            traffic.progress(30)
            traffic.pause()
            guest.iommu.iotlb.invalidate(RINGS_IOVA, guest.rings.size)
            traffic.resume()
        traffic.progress(30)
        traffic.finish().check_whole()
    # Unmapped for good: nothing is taken, nothing breaks, and stopping it does not wait.
    guest.iommu.deaf.set()
    guest.iommu.iotlb.invalidate(0, 0)
    pair.post()
    assert pair.send(make_frame(0, 60))
    pair.kick()
    wait_until(lambda: counts(guest)["unanswered"] > 0, what="a question")
    base = guest.device.stop_vring(1)
    assert base == (
        pair.tx.last_used & 0xFFFF if isinstance(pair.tx, SplitDriver) else pair.tx.used_idx | pair.tx.used_idx << 16
    )
    assert guest.device.snapshot()["queues"][1]["broken"] is None
    guest.iommu.answer_all()
    guest.start(1, base)
    wait_until(lambda: pair.tx.pending() > 0, what="the frame taken")


def test_answers_go_to_the_slot_of_a_worker() -> None:
    """A ring goes on when its question is answered, also where workers of lower slots have been freed."""
    with Pool(workers=2) as pool:
        device = NetDevice(pool, backend="loopback", iommu=True)
        device.attach_worker(0, 1)
        pool.free_worker(0)
        with StrictGuest(device, features=ALL, num=64) as guest, Traffic(guest.pairs[0], window=20) as traffic:
            traffic.progress(30)
            traffic.finish().check_whole()


def test_no_room_in_the_pool(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that finds no room leaves nothing of its IOTLB behind."""

    def full(self: Pool, device: object, kept: object) -> tuple[int, int]:
        raise LocalError("no room for another device in this pool", errno.ENOSPC)

    wait_until(lambda: pool.has_spare, what="the spare, whose descriptors would come meanwhile")
    before = set(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(Pool, "register", full)
        with pytest.raises(LocalError, match="no room"):
            NetDevice(pool, backend="loopback", iommu=True)
    assert set(os.listdir("/proc/self/fd")) == before


def test_started_before_there_is_memory(pool: Pool) -> None:
    """Rings that are started before the memory table comes are served once it has come."""
    device = NetDevice(pool, backend="loopback", iommu=True)
    with StrictGuest(device, features=ALL, num=64) as guest:
        bases = guest.stop()
        device.set_mem_table([])
        for index, base in enumerate(bases):
            guest.start(index, base)
        guest.set_mem_table()
        with Traffic(guest.pairs[0], window=20) as traffic:
            traffic.progress(30)
            traffic.finish().check_whole()


def test_begins_with_nothing(guest: StrictGuest) -> None:
    """What the guest unmaps while no ring runs the device may not hear of: it asks anew for all that it needs."""
    with Traffic(guest.pairs[0], window=20) as traffic:
        traffic.progress(30)
        traffic.pause()
        bases = guest.stop()
        guest.iommu.iotlb.update(0, PAGE, guest.rings.uva, READ)  # an answer that comes late
        with guest.iommu.lock:
            guest.iommu.deaf.set()
        guest.start(0, bases[0])
        wait_until(lambda: counts(guest)["unanswered"] > 0, what="a question")
        assert counts(guest)["entries"] == 0
        guest.iommu.deaf.clear()
        guest.start(1, bases[1])
        guest.iommu.answer_all()
        traffic.resume()
        traffic.progress(30)
        traffic.finish().check_whole()


@pytest.mark.parametrize("bits", [ALL, ALL | F_RING_PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("backend", ["loopback", MIRROR], ids=["loopback", "python"])
def test_what_is_written_is_logged(pool: Pool, backend: str, bits: int) -> None:
    """Pages behind I/O virtual addresses that the device writes are in the dirty log, rings included; no others are."""
    device = NetDevice(pool, backend=backend, iommu=True)
    with StrictGuest(device, features=bits, num=64) as guest:
        buffers = guest.buffers
        assert isinstance(buffers, StrictBuffers)
        with DirtyLog((buffers.memory.gpa + buffers.memory.size) // PAGE // 8 + 1) as log:
            device.set_log_base(log.fd, log.size, 0)
            device.set_features(device.acked_features | LOG_ALL)
            for index, layout in enumerate(guest.layouts):
                base = guest.ring_base
                desc, avail, used = base + layout.desc, base + layout.avail, base + layout.used
                device.set_vring_addr(index, desc=desc, avail=avail, used=used, flags=ADDR_FLAG_LOG, log=used)
            with Traffic(guest.pairs[0], sizes=SIZES, window=20) as traffic:
                traffic.progress(60)
                traffic.finish().check_whole()
            device.set_features(device.acked_features & ~LOG_ALL)
            logged = log.pages
        assert device.snapshot()["queues"][0]["log_outside"] == 0
        rings: set[int] = set()
        for layout in guest.layouts:
            if bits & F_RING_PACKED:  # used descriptors, and the device's event suppression
                rings |= pages(layout.desc, layout.num * DESC_BYTES)
            rings |= pages(layout.used, layout.end - layout.used)
        assert {page for page in logged if page < guest.rings.size // PAGE} == rings
        assert {page for page in logged if page >= guest.rings.size // PAGE} == buffers.received


def test_entry_outside_memory(guest: StrictGuest) -> None:
    """An entry for what is not guest memory cannot be used and is counted; once it is gone the right one is asked for.

    Nothing but the invalidation has the ring look again: the driver has kicked already.
    """
    pair = guest.pairs[0]
    pair.post()
    assert pair.send(make_frame(0, 60))
    pair.kick()
    wait_until(lambda: pair.rx.pending() > 0, what="a frame that shows that the rings are mapped")
    assert len(pair.receive()) == pair.reap() == 1
    guest.iommu.deaf.set()
    assert pair.send(make_frame(1, 60))
    iova = pair.tx.in_flight[next(iter(pair.tx.in_flight))].readable[0][0] // PAGE * PAGE
    iotlb = guest.iommu.iotlb
    for page in range(3):
        iotlb.update(iova + page * PAGE, PAGE, 0x1234_5000_0000 + page * PAGE, READ | WRITE)
    pair.kick()
    wait_until(lambda: counts(guest)["unusable"] > 0, what="the count")
    assert guest.device.snapshot()["queues"][1]["broken"] is None
    guest.iommu.deaf.clear()
    iotlb.invalidate(iova, 3 * PAGE)
    wait_until(lambda: pair.rx.pending() > 0, what="the frame")


def test_access_is_checked(guest: StrictGuest) -> None:
    """A buffer that may only be read is not written to: the front-end hears that once, and the ring waits."""
    pair = guest.pairs[0]
    gpa = guest.buffers.take()
    page = gpa // PAGE * PAGE
    guest.iommu.map(page, PAGE, guest.buffers.memory.uva + guest.buffers.memory.size - PAGE, READ)
    pair.rx.add([], [(gpa, 1024)])
    assert pair.send(make_frame(0, 60))
    pair.kick()
    wait_until(lambda: guest.iommu.denied == [(gpa, WRITE)], what="the denial")
    assert not pair.rx.pending()
    guest.iommu.unmap(page, PAGE)
    guest.iommu.map(page, PAGE, guest.buffers.memory.uva + guest.buffers.memory.size - PAGE, READ | WRITE)
    guest.iommu.tell(gpa, WRITE)
    wait_until(lambda: pair.rx.pending() > 0, what="the frame")
    assert len(guest.iommu.denied) == 1


def test_more_entries_than_there_is_room_for(guest: StrictGuest) -> None:
    """Old entries make room for new ones; what was forgotten is asked for again."""
    with Traffic(guest.pairs[0], sizes=SIZES, window=20) as traffic:
        for start in range(0, 5000, 1000):
            for number in range(start, start + 1000):
                guest.iommu.iotlb.update(0x7000_0000_0000 + number * PAGE, PAGE, guest.rings.uva, READ)
            assert counts(guest)["entries"] <= ENTRIES_MAX
            traffic.progress(20)
        traffic.finish().check_whole()
    assert counts(guest)["evicted"] >= ENTRIES_MAX
