"""The journal in a ring's slot: what stands in it between taking and publishing, and what a replacement makes of that.

Where workers really die is tried by tests/adversity/test_kill_points.py and, store by store, by test_packed_attach.py.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from tests import native
from tests.oracle.rig import PackedRig, Rig
from tests.oracle.split import WRITABLE
from tests.oracle.test_burst import BURST_SOURCE
from vhostmp.shm import layout
from vhostmp.tools.stress.packed import WRAP
from vhostmp.tools.stress.ring import F_RING_PACKED

NUM: Final = 16
#: Split: features, version, desc_num, last_batch_head, used_idx; then inflight, kind, head, next, counter.
SPLIT_HEADER: Final = struct.Struct("=QHHHH")
SPLIT_ENTRY: Final = struct.Struct("=BBHHHQ")
#: Packed: features, version, desc_num, two free heads, used_idx, old_used_idx, two wrap counters; then inflight, kind,
#: next, last, num, counter, id, flags, len, addr.
PACKED_HEADER: Final = struct.Struct("=QHHHHHHBB10x")
PACKED_ENTRY: Final = struct.Struct("=BBHHHQHHIQ")
REPEATED, LOST, HELD = 1, 2, 3
ENTRIES: Final = layout.JOURNAL_ENTRIES


class Served:
    """A ring, its slot, and the chains that its driver has made available."""

    def __init__(self, rig: Rig | PackedRig, *, packed: bool) -> None:
        """Make three chains available."""
        self.rig: Final = rig
        self.packed: Final = packed
        self.slot: Final = mmap.mmap(-1, layout.RING.size)
        self.heads: Final = [rig.driver.add([], [(rig.data, 64)]) for _ in range(3)]
        rig.driver.publish()

    def attach(self, *, resume: bool) -> Any:
        """Return a device side, as the one before it left the slot."""
        rig = self.rig
        return native.load(BURST_SOURCE).BurstRing(
            rig.mem,
            NUM,
            rig.driver.desc_gpa,
            rig.driver.avail_gpa,
            rig.driver.used_gpa,
            features=F_RING_PACKED if self.packed else 0,
            last_avail_idx=WRAP if self.packed else 0,
            slot=self.slot,
            resume=resume,
        )

    def give_back(self, ring: Any) -> None:
        """Take and give back all there is, without publishing."""
        taken = ring.fetch(64, WRITABLE)
        ring.give_back([(head, 9) for head, _, _ in taken], ring.sizes())

    def read(self, name: str) -> int:
        """Read a word of the slot."""
        return layout.RING.read(memoryview(self.slot), 0, name)

    def write(self, **words: int) -> None:
        """Write words of the slot."""
        for name, value in words.items():
            layout.RING.write(memoryview(self.slot), 0, name, value)

    def mark(self, *kinds: int) -> None:
        """Mark the first entries as begun, with these kinds."""
        words = 4 if self.packed else 2
        for k, kind in enumerate(kinds):
            layout.RING.write(memoryview(self.slot), 0, "journal", 1 | kind << 8, words * (k + 1))

    @property
    def journal(self) -> bytes:
        """The journal's bytes."""
        field = layout.RING.field("journal")
        return self.slot[field.offset : field.offset + 8 * field.count]

    def entry(self, k: int) -> tuple[int, ...]:
        """Return entry k."""
        header, form = (PACKED_HEADER, PACKED_ENTRY) if self.packed else (SPLIT_HEADER, SPLIT_ENTRY)
        return form.unpack_from(self.journal, header.size + k * form.size)


@contextmanager
def serving(*, packed: bool) -> Generator[Served]:
    """Make one and close it."""
    rig = PackedRig("cython", NUM, first_idx=WRAP) if packed else Rig("cython", NUM)
    with rig:
        yield Served(rig, packed=packed)


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def one(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Return a ring of each format."""
    with serving(packed=request.param) as served:
        yield served


def check_clean(one: Served) -> None:
    """Check that nothing is in flight, and that the journal stands where the ring does."""
    header: tuple[int, ...]
    used = one.read("used_idx")
    if one.packed:
        offset, wrap = used & ~WRAP, used >> 15
        assert PACKED_HEADER.unpack_from(one.journal) == (0, 1, ENTRIES, 0, 0, offset, offset, wrap, wrap)
    else:
        header = SPLIT_HEADER.unpack_from(one.journal)
        assert (*header[:3], header[4]) == (0, 1, ENTRIES, used)
    assert not any(one.entry(k)[0] for k in range(ENTRIES))


def test_what_is_entered_split() -> None:
    """Chains given back and not published are a batch, linked from the last one, in the order of their counters."""
    with serving(packed=False) as one:
        ring = one.attach(resume=False)
        one.give_back(ring)
        assert SPLIT_HEADER.unpack_from(one.journal) == (0, 1, ENTRIES, 2, 0)
        entries = [(1, 0, head, 0, (k - 1) & 0xFFFF, k) for k, head in enumerate(one.heads)]
        assert [one.entry(k) for k in range(3)] == entries
        ring.publish()
        check_clean(one)


def test_what_is_entered_packed() -> None:
    """Chains given back and not published are entered with what their used descriptors will say."""
    with serving(packed=True) as one:
        ring = one.attach(resume=False)
        one.give_back(ring)
        entries = [(1, 0, k + 1, k, 1, k, head, 0, 9, 0) for k, head in enumerate(one.heads)]
        assert [one.entry(k) for k in range(3)] == entries
        ring.publish()
        check_clean(one)


def test_death_is_counted(one: Served) -> None:
    """What was begun and not published, and what waited, is counted by its kind, once."""
    one.attach(resume=False)
    one.mark(REPEATED, REPEATED, LOST, LOST, LOST, HELD, 0)
    one.write(died=1, waiting=1)
    for _ in range(2):
        one.attach(resume=True)
        assert (one.read("repeated"), one.read("lost")) == (2, 4)
        assert (one.read("died"), one.read("waiting")) == (0, 0)
        check_clean(one)


def test_published_is_not_counted(one: Served) -> None:
    """Who died after the driver was shown a batch has lost nothing of it."""
    ring = one.attach(resume=False)
    one.give_back(ring)
    journal = one.journal
    one.write(batch_waiting=1 + 5)
    ring.publish()
    start = layout.RING.field("journal").offset
    one.slot[start : start + len(journal)] = journal  # as it was before its marks were cleared
    one.mark(REPEATED, LOST, LOST)
    one.write(died=1, waiting=1, batch_waiting=1 + 5)
    one.attach(resume=True)
    assert (one.read("repeated"), one.read("lost")) == (0, 5)
    check_clean(one)


def test_several_bursts_are_counted(one: Served) -> None:
    """What was begun of bursts that have no entries is counted, but that of a burst that the driver was shown."""
    bursts = 5 | 6 << 16 | 7 << 32 | 64 << 48
    ring = one.attach(resume=False)
    one.write(died=1, begun_bursts=bursts)
    for _ in range(2):
        ring = one.attach(resume=True)
        assert (one.read("repeated"), one.read("begun_bursts")) == (82, 0)
    one.give_back(ring)
    journal = one.journal
    ring.publish()
    start = layout.RING.field("journal").offset
    one.slot[start : start + len(journal)] = journal  # as it was before it said that nothing is under way
    one.write(died=1, begun_bursts=bursts)
    one.attach(resume=True)
    assert one.read("repeated") == 82 + 77
    check_clean(one)


def test_no_death_no_count(one: Served) -> None:
    """A ring that is moved to another worker, or started, has lost nothing; what waits comes along."""
    one.attach(resume=False)
    one.mark(REPEATED, LOST, HELD)
    one.write(waiting=3)
    one.attach(resume=True)
    assert (one.read("repeated"), one.read("lost"), one.read("waiting")) == (0, 0, 3)
    check_clean(one)


def test_more_than_a_burst() -> None:
    """Whoever gives back more chains than the journal has entries before he publishes writes nothing beyond them."""
    with serving(packed=False) as one:
        ring = one.attach(resume=False)
        for _ in range(ENTRIES):
            ring.give_back([(0, 0), (1, 0)])
        end = layout.RING.field("journal").offset + 16 * (ENTRIES + 1)
        assert one.entry(ENTRIES - 1)[0] == 1
        assert not any(one.slot[end:])
