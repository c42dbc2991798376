"""What a packed ring has in flight is known to the back-end that comes after a dead one, wherever that one died.

Ours is stepped through under ptrace, as in test_packed_attach.py; each image that ring and region go through is taken
up by a back-end with a slot of its own, as one that was started anew. Another back-end, one that gives chains back out
of order, is a model written from the document (vhost-user, "Inflight I/O tracking"); it dies at every store too.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import pytest

from tests.unit.workers.test_packed_attach import (
    NUM,
    SIZES,
    STEPPED,
    Scene,
    check_goes_on,
    check_serves,
    images_of_a_publication,
    scene,
    step_through,
)
from vhostmp.shm import layout
from vhostmp.tools.stress.packed import AVAIL, USED, WRAP, pack_packed

T = TypeVar("T", bound=Callable[..., None])

#: Region layout: features, version, desc_num, free_head, old_free_head, used_idx, old_used_idx, two wrap counters.
HEADER: Final = struct.Struct("=QHHHHHHBB10x")
#: Entry layout: inflight, next, last, num, counter, id, flags, len, addr.
ENTRY: Final = struct.Struct("=BxHHHQHHIQ")
VERSION, DESC_NUM, FREE_HEAD, OLD_FREE_HEAD, USED_IDX, OLD_USED_IDX, WRAP_COUNTER, OLD_WRAP_COUNTER = (
    8,
    10,
    12,
    14,
    16,
    18,
    20,
    21,
)
INFLIGHT, NEXT, LAST, COUNT, COUNTER, ID, FLAGS, LEN, ADDR = 0, 2, 4, 6, 8, 16, 18, 20, 24
F_NEXT, F_WRITE = 1, 2
BASE: Final = WRAP | 7  # what a front-end names that does not know


def reborn(one: Scene, base: int = BASE) -> Any:
    """Return the device side of a back-end that was started anew and was given the region."""
    one.slot[:] = bytes(len(one.slot))
    layout.RING.write(memoryview(one.slot), 0, "recover", 1)
    one.first_idx = base
    return one.attach(resume=False)


def fault(one: Scene) -> str:
    """Return why the region was not taken."""
    return layout.REGION_FAULTS[layout.RING.read(memoryview(one.slot), 0, "region_fault")]


def check_clean(one: Scene, position: int) -> None:
    """Check that the region has nothing in flight, that every entry is free, and where it says that the ring stands."""
    assert one.region is not None
    offset, wrap = position & ~WRAP, position >> 15
    assert HEADER.unpack_from(one.region) == (0, 1, NUM, 0, 0, offset, offset, wrap, wrap)
    for index in range(NUM):
        inflight, follower, *_ = ENTRY.unpack_from(one.region, HEADER.size + ENTRY.size * index)
        assert (inflight, follower) == (0, index + 1)


# --- our own ---


def stepped(test: T) -> T:
    """Mark a test that steps through a child."""
    for mark in STEPPED:
        test = mark(test)
    return test


@stepped
@pytest.mark.parametrize("driver_runs", [False, True], ids=["driver_sleeps", "driver_runs"])
@pytest.mark.slow
@pytest.mark.parametrize("first_idx", [WRAP, 5], ids=hex)
def test_death_at_every_store(first_idx: int, driver_runs: bool) -> None:
    """Each chain reaches the driver once, in order: all are taken anew until the batch is published."""
    outcomes: list[bool] = []
    for image in images_of_a_publication(first_idx, region=True):
        with scene(first_idx, region=True) as one:
            outcomes.append(check_goes_on(one, image, lambda: reborn(one), driver_runs=driver_runs))
            check_clean(one, one.rig.driver.used_idx)
            assert fault(one) == ""
    assert outcomes == sorted(outcomes)
    assert not outcomes[0]
    assert outcomes[-1]


@stepped
@pytest.mark.slow
def test_a_worker_first_and_then_all() -> None:
    """A replacement that takes over at any store leaves a region from which a back-end started anew goes on."""

    def take_over() -> Any:
        ring = one.attach(resume=True)
        check_clean(one, ring.used_idx)
        return ring

    for image in images_of_a_publication(5, region=True):
        with scene(5, region=True) as one:
            check_goes_on(one, image, take_over, driver_runs=False)
            check_clean(one, one.rig.driver.used_idx)
            check_serves(one, reborn(one))


@stepped
@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["worker", "back-end"])
def test_second_death(whole: bool) -> None:
    """Who dies while it takes up what a death has left leaves that to the next."""
    images = images_of_a_publication(5, region=True)
    begun = next(image for image in images if layout.RING.read(image[1], 0, "batch_n"))
    half_written = next(image for image in images if image[0] != images[0][0])
    with scene(5, region=True) as one:
        ring = one.attach(resume=True)
        one.restore(half_written if whole else begun)
        if whole:
            layout.RING.write(memoryview(one.slot), 0, "recover", 1)
            for name in ("used_valid", "batch_n"):
                layout.RING.write(memoryview(one.slot), 0, name, 0)
        again = step_through(one, ring.attach)
    assert len(again) > len(SIZES)
    for second in again:
        with scene(5, region=True) as one:
            check_goes_on(one, second, lambda: reborn(one), driver_runs=False)
        if not whole:
            with scene(5, region=True) as one:
                check_goes_on(one, second, lambda: one.attach(resume=True), driver_runs=False)


def test_what_is_noted() -> None:
    """Between giving back and publishing, each chain's descriptors are in the region, as they stood in the ring."""
    with scene(5, region=True) as one:
        ring = one.attach(resume=False)
        check_clean(one, 5)
        taken = ring.fetch(64, 2)
        before = one.rig.ring_bytes()[: 16 * NUM]
        check_clean(one, 5)
        ring.give_back([(head, 1) for head, _, _ in taken], ring.sizes())
        assert one.region is not None
        noted = sum(SIZES)
        assert HEADER.unpack_from(one.region) == (0, 1, NUM, noted, noted, 5, 5, 0, 0)
        entry = 0
        for counter, size in enumerate(SIZES):
            inflight, _, last, count, order, *_ = ENTRY.unpack_from(one.region, HEADER.size + ENTRY.size * entry)
            assert (inflight, last, count, order) == (1, entry + size - 1, size, counter)
            for index in range(entry, entry + size):
                *_, buffer_id, flags, length, addr = ENTRY.unpack_from(one.region, HEADER.size + ENTRY.size * index)
                start = (5 + index) % NUM * 16
                assert pack_packed(addr, length, buffer_id, flags) == before[start : start + 16]
            entry += size
        ring.publish()
        check_clean(one, WRAP | (5 + noted) % NUM)


def test_a_region_that_nobody_began() -> None:
    """A new region is begun, and the ring stands where the front-end says."""
    with scene(5, region=True) as one:
        assert one.serve(reborn(one, base=5), 1) == len(SIZES)
        check_clean(one, WRAP | (5 + sum(SIZES)) % NUM)
        assert fault(one) == ""


def test_a_ring_that_was_stopped() -> None:
    """A ring that is started again without a new message about its region stands at its base; the region follows."""
    with scene(5, region=True) as one:
        one.serve(one.attach(resume=False), 1)
        one.slot[:] = bytes(len(one.slot))
        one.first_idx = 3
        one.attach(resume=False)
        check_clean(one, 3)


# --- another back-end ---


class Death(Exception):
    """The other back-end dies."""


class Other:
    """A back-end that gives chains back in any order, store by store as the document has it."""

    def __init__(self, one: Scene, stores: int) -> None:
        """Begin the region; die after so many stores."""
        assert one.region is not None
        self.one = one
        self.region = one.region
        self.stores = stores
        self.avail = self.used = one.first_idx
        self.counter = 40
        self.taken: dict[int, tuple[int, int]] = {}  # by buffer id: entry and descriptors
        HEADER.pack_into(self.region, 0, 0, 1, NUM, 0, 0, self.used & ~WRAP, self.used & ~WRAP, *[self.used >> 15] * 2)
        for index in range(NUM):
            ENTRY.pack_into(self.region, HEADER.size + ENTRY.size * index, 0, index + 1, 0, 0, 0, 0, 0, 0, 0)

    def _store(self, form: str, at: int, value: int) -> None:
        if not self.stores:
            raise Death
        self.stores -= 1
        struct.pack_into(form, self.region, at, value)

    def _set(self, at: int, value: int) -> None:
        self._store("=B" if at in (WRAP_COUNTER, OLD_WRAP_COUNTER) else "=H", at, value)

    def _entry(self, index: int, at: int, value: int) -> None:
        form = {INFLIGHT: "=B", COUNTER: "=Q", LEN: "=I", ADDR: "=Q"}.get(at, "=H")
        self._store(form, HEADER.size + ENTRY.size * index + at, value)

    def _get(self, at: int) -> int:
        return int(struct.unpack_from("=H", self.region, at)[0])

    def _of(self, index: int, at: int) -> int:
        return self._get(HEADER.size + ENTRY.size * index + at)

    def _ring(self) -> memoryview:
        driver = self.one.rig.driver
        return driver.buf[driver.layout.desc : driver.layout.desc + 16 * NUM]

    def take(self) -> int:
        """Take the next chain. Returns its buffer id."""
        head, size = self._get(OLD_FREE_HEAD), 0
        while True:
            addr, length, buffer_id, flags = struct.unpack_from("<QIHH", self._ring(), (self.avail & ~WRAP) * 16)
            last = not flags & F_NEXT
            if not size:
                self._entry(head, COUNT, 0)
                self._entry(head, COUNTER, self.counter)
                self.counter += 1
                self._entry(head, INFLIGHT, 1)
            entry = self._get(FREE_HEAD)
            if last:
                self._entry(head, LAST, entry)
            size += 1
            self._entry(head, COUNT, size)
            for at, value in ((ADDR, addr), (LEN, length), (FLAGS, flags), (ID, buffer_id)):
                self._entry(entry, at, value)
            self._set(FREE_HEAD, self._of(entry, NEXT))
            self.avail = forward(self.avail)
            if last:
                self._set(OLD_FREE_HEAD, self._get(FREE_HEAD))
                self.taken[buffer_id] = head, size
                return int(buffer_id)

    def give_back(self, ids: list[int]) -> None:
        """Give these chains back, as one batch: the first one's descriptor is written last."""
        for buffer_id in ids:
            head, _ = self.taken[buffer_id]
            self._entry(self._of(head, LAST), NEXT, self._get(FREE_HEAD))
            self._set(FREE_HEAD, head)
        writes: list[tuple[int, bytes]] = []
        position = self.used
        for buffer_id in ids:
            flags = F_WRITE | (AVAIL | USED if position & WRAP else 0)
            writes.append((position & ~WRAP, pack_packed(0xDEAD, 7, buffer_id, flags)))
            for _ in range(self.taken[buffer_id][1]):
                position = forward(position)
        old_wrap, self.used = self.used >> 15, position
        self._set_used(USED_IDX, WRAP_COUNTER, position, old_wrap)
        for index, raw in reversed(writes):
            if not self.stores:
                raise Death
            self.stores -= 1
            self._ring()[index * 16 : index * 16 + 16] = raw
        for buffer_id in ids:
            self._entry(self.taken.pop(buffer_id)[0], INFLIGHT, 0)
        self._set(OLD_FREE_HEAD, self._get(FREE_HEAD))
        self._set_used(OLD_USED_IDX, OLD_WRAP_COUNTER, position, old_wrap)

    def _set_used(self, index: int, wrap: int, position: int, old_wrap: int) -> None:
        """Store an index and, where it changes, its wrap counter: at once, or the document's back-end would lose it."""
        if position >> 15 != old_wrap:
            self.stores += 1
            self._set(wrap, position >> 15)
        self._set(index, position & ~WRAP)


def forward(position: int) -> int:
    """Return the next position."""
    return position + 1 if (position & ~WRAP) + 1 < NUM else position & WRAP ^ WRAP


def die_after(one: Scene, stores: int) -> bool:
    """Have the other back-end serve the ring out of order until it dies. Returns whether it lived."""
    other = Other(one, stores)
    try:
        ids = [other.take() for _ in SIZES]
        other.give_back([ids[2], ids[1]])
        other.give_back([ids[0]])
        one.rig.driver.reap()
        one.add(2)
        one.add(1)
        one.rig.driver.publish()
        late = other.take()
        other.give_back([late, ids[3]])
    except Death:
        return False
    return True


def recovered(stores: int, first_idx: int) -> bool:
    """Take up what is left of the other back-end after so many stores; every chain comes back once."""
    with scene(first_idx, region=True) as one:
        lived = die_after(one, stores)
        ring = reborn(one)
        assert fault(one) == ""
        one.serve(ring, 1)
        one.rig.driver.reap()
        assert not one.rig.driver.in_flight
        check_serves(one, ring)
        check_clean(one, one.rig.driver.used_idx)
    return lived


@pytest.mark.parametrize("first_idx", [WRAP, 5], ids=hex)
def test_another_back_end_dies_at_every_store(first_idx: int) -> None:
    """What a back-end has in flight that gives back out of order is served, each chain once and to its own id."""
    stores = 0
    while not recovered(stores, first_idx):
        stores += 1
    assert stores > 100  # noqa: PLR2004 - each store of the run above


def test_in_the_order_of_the_counters() -> None:
    """What is resubmitted comes in the order in which it was taken, whatever entries it is in."""
    with scene(WRAP, region=True) as one:
        other = Other(one, 1 << 30)
        ids = [other.take() for _ in SIZES]
        other.give_back([ids[1]])
        one.rig.driver.reap()
        late = [one.add(1), one.add(2)]
        one.rig.driver.publish()
        assert [other.take(), other.take()] == late
        ring = reborn(one)
        assert [head for head, _, _ in ring.fetch(64, 2)] == [ids[0], ids[2], ids[3], *late]


# --- what a front-end may write ---


def entry(index: int, at: int) -> int:
    """Return where a field of an entry is."""
    return HEADER.size + ENTRY.size * index + at


#: Entries 0, then 1 to 3, then 4, then 5 and 6 are the chains in flight; 7 and 8 are free.
HOSTILE: Final = {
    "features": (0, b"\1", "version"),
    "another version": (VERSION, b"\2", "version"),
    "fewer entries": (DESC_NUM, b"\1\0", "desc_num"),
    "more entries": (DESC_NUM, b"\xff\xff", "desc_num"),
    "used_idx": (USED_IDX, struct.pack("=H", NUM), "used_idx"),
    "old_used_idx": (OLD_USED_IDX, b"\xff\xff", "used_idx"),
    "wrap counter": (WRAP_COUNTER, b"\2", "used_idx"),
    "old wrap counter": (OLD_WRAP_COUNTER, b"\xff", "used_idx"),
    "free_head": (OLD_FREE_HEAD, struct.pack("=H", NUM + 1), "free_head"),
    "free list leads out": (entry(8, NEXT), b"\xff\xff", "free_list"),
    "free list in a circle": (entry(8, NEXT), b"\7\0", "free_list"),
    "mark": (entry(0, INFLIGHT), b"\2", "inflight"),
    "marks on all": (entry(2, INFLIGHT), b"\1", "counter"),
    "equal counters": (entry(1, COUNTER), bytes(8), "counter"),
    "no descriptors": (entry(0, COUNT), b"\0\0", "chain"),
    "too many descriptors": (entry(1, COUNT), b"\xff\xff", "chain"),
    "more than the ring has": (entry(5, COUNT), b"\5\0", "chain"),
    "chain leads out": (entry(1, NEXT), b"\xff\xff", "chain"),
    "chain into itself": (entry(1, NEXT), b"\1\0", "chain"),
    "chain into another": (entry(1, NEXT), b"\0\0", "chain"),
    "chain into free entries": (entry(5, NEXT), b"\7\0", "chain"),
    "another last entry": (entry(5, LAST), b"\5\0", "chain"),
    "last entry outside": (entry(0, LAST), b"\xff\xff", "chain"),
    "chain that goes on": (entry(0, FLAGS), b"\3\0", "chain"),
    "chain that ends early": (entry(1, FLAGS), b"\2\0", "chain"),
}


def noted(one: Scene) -> bytes:
    """Return a region with everything in flight."""
    ring = one.attach(resume=False)
    ring.give_back([(head, 1) for head, _, _ in ring.fetch(64, 2)], ring.sizes())
    assert one.region is not None
    return one.region[:]


@pytest.mark.parametrize(("at", "data", "why"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_region(at: int, data: bytes, why: str) -> None:
    """A region that contradicts itself is begun anew, and the ring stands where the front-end says."""
    with scene(5, region=True) as one:
        noted(one)
        assert one.region is not None
        one.region[at : at + len(data)] = data
        before = one.rig.ring_bytes()
        ring = reborn(one, base=5)
        assert fault(one) == why
        assert one.rig.ring_bytes() == before
        check_clean(one, 5)
        assert one.serve(ring, 1) == len(SIZES)


def changed(region: bytes, rng: random.Random) -> Iterator[bytes]:
    """Make regions of which a few bytes are others."""
    for _ in range(2000):
        data = bytearray(region)
        for _ in range(rng.randint(1, 6)):
            at = rng.choice([rng.randrange(len(data)), rng.randrange(24), entry(rng.randrange(NUM), rng.randrange(8))])
            data[at] = rng.choice([0, 1, 2, 3, 5, 8, 9, 10, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        yield bytes(data)


def test_any_region() -> None:
    """Whatever a region holds, the ring is taken up, nothing beside it is written, and the region is whole then."""
    faults: set[str] = set()
    with scene(5, region=True) as one:
        before = one.rig.regions[0].buf[one.rig.layout.desc + 16 * NUM :].tobytes()
        ring_bytes, data = one.rig.ring_bytes(), noted(one)
        assert one.region is not None
        for region in changed(data, random.Random(12)):
            one.rig.regions[0].buf[: len(ring_bytes)] = ring_bytes
            one.region[:] = region
            ring = reborn(one, base=5)
            faults.add(fault(one))
            check_clean(one, ring.used_idx)
            assert ring.used_idx & ~WRAP < NUM
            assert one.rig.regions[0].buf[one.rig.layout.desc + 16 * NUM :].tobytes() == before
    assert faults >= {*layout.REGION_FAULTS} - {"memory"}
