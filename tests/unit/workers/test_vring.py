"""Every rule of the split ring, on the compiled ring and on the plain-Python one alike.

The driver is tools/stress/split.py; a hostile ring is refused with the reason named here, no index moves, the ring
stays broken, and nothing else happens: chains made available before the bad one come out first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pytest

from tests.oracle.rig import BASE, SIZE, ChainLike, MakeRig, Rig
from vhostmp.errors import LocalError, QueueBroken
from vhostmp.shm.layout import BROKEN_REASONS
from vhostmp.tools.stress.ring import F_INDIRECT_DESC, INDIRECT, NEXT, WRITE
from vhostmp.tools.stress.split import pack_descriptor

END: Final = BASE + SIZE  # first guest-physical address after the region
TABLE: Final = BASE + 0x8000  # where these tests put an indirect table
DATA: Final = BASE + 0x4000  # and buffers
SEGMENTS_MAX: Final = 1024
MAX_IDX: Final = 0xFFFF
Row = tuple[int, int, int, int]  # addr, len, flags, next
Segment = tuple[int, int]  # addr, len


def take(rig: Rig) -> ChainLike:
    """Pop a chain that must be there."""
    chain = rig.ring.pop()
    assert chain is not None
    return chain


def refused(rig: Rig, reason: str) -> None:
    """Check that the ring is refused for `reason`, stays refused, and that no index has moved."""
    assert reason in BROKEN_REASONS
    before = (rig.ring.last_avail_idx, rig.ring.used_idx, rig.ring_bytes())
    for _ in range(2):
        with pytest.raises(QueueBroken):
            rig.ring.pop()
        assert rig.ring.broken == reason
    assert (rig.ring.last_avail_idx, rig.ring.used_idx, rig.ring_bytes()) == before


def table(rows: Sequence[Row]) -> bytes:
    """Return descriptors one after the other."""
    return b"".join(pack_descriptor(*row) for row in rows)


def offer_rows(rig: Rig, rows: Sequence[Row], head: int = 0) -> None:
    """Write descriptors from number 0 on and make `head` available."""
    for index, row in enumerate(rows):
        rig.driver.write_descriptor(index, pack_descriptor(*row))
    rig.offer([head])


def offer_table(rig: Rig, rows: Sequence[Row], length: int | None = None, at: int = TABLE, flags: int = 0) -> None:
    """Write an indirect table and make a chain available that consists of it."""
    data = table(rows)
    rig.write(at, data)
    offer_rows(rig, [(at, len(data) if length is None else length, INDIRECT | flags, 0)])


# Good chains


def test_nothing_available(make: MakeRig) -> None:
    """An empty ring gives None, as often as one asks, and nothing moves."""
    rig = make()
    assert rig.ring.pop() is None
    assert rig.ring.pop() is None
    assert (rig.ring.last_avail_idx, rig.ring.used_idx, rig.ring.broken) == (0, 0, None)


def test_readable_then_writable(make: MakeRig) -> None:
    """A chain comes out as the driver built it: head, what to read, what to write."""
    rig = make()
    readable, writable = [(DATA, 12), (DATA + 100, 60)], [(DATA + 0x1000, 1500), (DATA + 0x2000, 1)]
    head = rig.driver.add(readable, writable)
    rig.driver.publish()
    chain = take(rig)
    assert (chain.head, chain.readable, chain.writable) == (head, readable, writable)
    assert rig.ring.pop() is None
    assert rig.ring.last_avail_idx == 1


def test_not_yet_published(make: MakeRig) -> None:
    """What is in the ring beyond the available index is not taken."""
    rig = make()
    rig.driver.add([(DATA, 1)])
    assert rig.ring.pop() is None


@pytest.mark.parametrize("num", [1, 2, 4, 256, 32768])
def test_whole_table_in_one_chain(make: MakeRig, num: int) -> None:
    """A chain may use every descriptor of the table, and come round again, for the smallest and the largest queue."""
    rig = make(num, size=1 << 21)
    count = min(num, SEGMENTS_MAX)
    for _ in range(3):
        segments = [(rig.data + i, 1) for i in range(count)]
        head = rig.driver.add(segments)
        rig.driver.publish()
        chain = take(rig)
        assert chain.readable == segments
        rig.ring.push(head, 0)
        rig.ring.publish()
        assert [used.chain.head for used in rig.driver.reap()] == [head]
    rig.driver.check_idle()


def test_many_chains_in_order(make: MakeRig) -> None:
    """Chains come out in the order in which they were made available, also round the ring's end."""
    rig = make(8)
    for start in range(20):
        heads = [rig.driver.add([(DATA + i, 1 + start)], [(DATA + 0x100, 4)]) for i in range(3)]
        rig.driver.publish()
        assert [take(rig).head for _ in heads] == heads
        for head in reversed(heads):
            rig.ring.push(head, 4)
        rig.ring.publish()
        assert [used.chain.head for used in rig.driver.reap()] == heads[::-1]
    rig.driver.check_idle()


def test_same_head_twice(make: MakeRig) -> None:
    """The same head in two entries is two chains, taken one after the other; the ring lives."""
    rig = make()
    rig.driver.write_descriptor(3, pack_descriptor(DATA, 7))
    rig.offer([3, 3])
    assert [take(rig).readable for _ in range(2)] == [[(DATA, 7)], [(DATA, 7)]]


def test_indirect_table(make: MakeRig) -> None:
    """An indirect table is one chain, longer than the queue if need be, and gives back one descriptor."""
    rig = make(4, features=F_INDIRECT_DESC)
    readable, writable = [(DATA + 16 * i, 16) for i in range(10)], [(DATA + 0x800, 100), (DATA + 0x900, 200)]
    head = rig.driver.add(readable, writable, table=TABLE)
    rig.driver.publish()
    chain = take(rig)
    assert (chain.head, chain.readable, chain.writable) == (head, readable, writable)


def test_direct_then_indirect(make: MakeRig) -> None:
    """Direct descriptors followed by one indirect table are legal (virtio 1.3, 2.7.5.3.2)."""
    rig = make(features=F_INDIRECT_DESC)
    rig.write(TABLE, table([(DATA + 1, 2, NEXT, 1), (DATA + 3, 4, WRITE, 0)]))
    offer_rows(rig, [(DATA, 1, NEXT, 5), *[(0, 0, 0, 0)] * 4, (TABLE, 32, INDIRECT, 0)])
    chain = take(rig)
    assert (chain.readable, chain.writable) == ([(DATA, 1), (DATA + 1, 2)], [(DATA + 3, 4)])


def test_write_flag_on_indirect_is_ignored(make: MakeRig) -> None:
    """The device ignores WRITE on the descriptor that refers to a table (virtio 1.3, 2.7.5.3.2)."""
    rig = make(features=F_INDIRECT_DESC)
    offer_table(rig, [(DATA, 5, 0, 0)], flags=WRITE)
    assert take(rig).readable == [(DATA, 5)]


def test_indirect_table_in_any_order(make: MakeRig) -> None:
    """The entries of a table are followed by `next`, not by place, and unused ones do not matter."""
    rig = make(features=F_INDIRECT_DESC)
    bad = (0, 0xFFFFFFFF, INDIRECT, 0xFFFF)
    offer_table(rig, [(DATA, 1, NEXT, 3), bad, (DATA + 9, 3, 0, 0), (DATA + 4, 2, NEXT, 2), bad])
    assert take(rig).readable == [(DATA, 1), (DATA + 4, 2), (DATA + 9, 3)]


def test_indirect_table_over_two_regions(make: MakeRig) -> None:
    """A table may run from one region into the one that follows it."""
    rig = make(features=F_INDIRECT_DESC, more=[(END, 4096)])
    rows = [(DATA + i, 1, NEXT, i + 1) for i in range(7)] + [(DATA + 7, 1, 0, 0)]
    offer_table(rig, rows, at=END - 64)
    assert take(rig).readable == [(DATA + i, 1) for i in range(8)]


@pytest.mark.parametrize("before", range(1, 16))
def test_indirect_entry_over_two_regions(make: MakeRig, before: int) -> None:
    """A table has no alignment: one entry of it may begin in one region and end in the next."""
    rig = make(features=F_INDIRECT_DESC, more=[(END, 4096)])
    rows = [(DATA + i, 1, NEXT, i + 1) for i in range(3)] + [(DATA + 3, 1, 0, 0)]
    offer_table(rig, rows, at=END - 16 - before)
    assert take(rig).readable == [(DATA + i, 1) for i in range(4)]


def test_indirect_entry_over_the_end(make: MakeRig) -> None:
    """An entry that begins in memory and ends where there is none is refused."""
    rig = make(features=F_INDIRECT_DESC)
    offer_rows(rig, [(END - 9, 16, INDIRECT, 0)])
    refused(rig, "address")


def test_table_is_the_ring_itself(make: MakeRig) -> None:
    """A table that lies over the descriptor table is read like any memory."""
    rig = make(features=F_INDIRECT_DESC)
    rig.driver.write_descriptor(1, pack_descriptor(BASE, 32))
    offer_rows(rig, [(BASE + 16, 16, INDIRECT, 0)])
    assert take(rig).readable == [(BASE, 32)]


def test_table_of_65536_entries(make: MakeRig) -> None:
    """The longest table `next` can address works, from its first entry to its last."""
    rig = make(features=F_INDIRECT_DESC, size=1 << 21)
    at = BASE + (1 << 20)
    rig.write(at, pack_descriptor(DATA, 1, NEXT, 65535))
    rig.write(at + 65535 * 16, pack_descriptor(DATA + 1, 1))
    offer_rows(rig, [(at, 65536 * 16, INDIRECT, 0)])
    assert take(rig).readable == [(DATA, 1), (DATA + 1, 1)]


@pytest.mark.parametrize(
    ("rows", "readable", "writable"),
    [
        ([(DATA, 0, 0, 0)], [], []),
        ([(DATA, 0, WRITE, 0)], [], []),
        ([(DATA, 0, NEXT, 1), (DATA, 9, 0, 0)], [(DATA, 9)], []),
        ([(DATA, 9, NEXT, 1), (DATA, 0, 0, 0)], [(DATA, 9)], []),
        ([(DATA, 3, NEXT, 1), (DATA, 0, NEXT, 2), (DATA, 9, WRITE, 0)], [(DATA, 3)], [(DATA, 9)]),
        ([(DATA, 0, WRITE | NEXT, 1), (DATA, 9, 0, 0)], [(DATA, 9)], []),
        ([(0, 0, NEXT, 1), (1 << 63, 0, NEXT, 2), (DATA, 9, 0, 0)], [(DATA, 9)], []),
    ],
    ids=["only", "only_writable", "first", "last", "middle", "writable_first", "address_not_looked_at"],
)
def test_zero_length(make: MakeRig, rows: list[Row], readable: list[Segment], writable: list[Segment]) -> None:
    """A descriptor of no bytes is skipped wherever it stands, and its address is not looked at."""
    rig = make()
    offer_rows(rig, rows)
    chain = take(rig)
    assert (chain.readable, chain.writable, rig.ring.broken) == (readable, writable, None)


def test_zero_length_everywhere(make: MakeRig) -> None:
    """A whole table of empty descriptors ends: it is an empty chain."""
    rig = make(8)
    offer_rows(rig, [(DATA, 0, NEXT, i + 1) for i in range(7)] + [(DATA, 0, 0, 0)])
    chain = take(rig)
    assert (chain.readable, chain.writable) == ([], [])


@pytest.mark.parametrize("flags", [0, WRITE])
def test_buffer_ends_with_its_region(make: MakeRig, flags: int) -> None:
    """A buffer may touch the last byte of a region and begin at its first."""
    rig = make()
    offer_rows(rig, [(END - 10, 10, flags | NEXT, 1), (BASE, SIZE, flags, 0)])
    chain = take(rig)
    assert [*chain.readable, *chain.writable] == [(END - 10, 10), (BASE, SIZE)]


@pytest.mark.parametrize("flags", [0, WRITE])
def test_buffer_over_touching_regions(make: MakeRig, flags: int) -> None:
    """A buffer over the border of regions that touch comes out as one segment a region."""
    rig = make(more=[(END + 4096, 4096), (END, 4096)])
    offer_rows(rig, [(END - 10, 4096 + 30, flags, 0)])
    chain = take(rig)
    assert [*chain.readable, *chain.writable] == [(END - 10, 10), (END, 4096), (END + 4096, 20)]


def test_top_of_the_address_space(make: MakeRig) -> None:
    """A buffer may end with the last byte of guest-physical space."""
    rig = make(more=[((1 << 64) - 4096, 4096)])
    offer_rows(rig, [((1 << 64) - 16, 16, 0, 0)])
    assert take(rig).readable == [((1 << 64) - 16, 16)]


def test_largest_chain(make: MakeRig) -> None:
    """A chain of 1024 segments is taken whole."""
    rig = make(features=F_INDIRECT_DESC)
    segments = [(DATA + i, 1) for i in range(SEGMENTS_MAX)]
    rig.driver.add(segments[:24], segments[24:], table=TABLE)
    rig.driver.publish()
    chain = take(rig)
    assert (chain.readable, chain.writable) == (segments[:24], segments[24:])


# Hostile rings: (rows of the descriptor table, features, reason)

HOSTILE: Final[dict[str, tuple[list[Row], int, str]]] = {
    "next_loops_to_itself": ([(DATA, 1, NEXT, 0)], 0, "loop"),
    "next_loops_a_b_a": ([(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)], 0, "loop"),
    "empty_descriptors_loop": ([(DATA, 0, NEXT, 1), (DATA, 0, NEXT, 0)], 0, "loop"),
    "next_is_num": ([(DATA, 1, NEXT, 8)], 0, "next"),
    "next_is_max": ([(DATA, 1, NEXT, MAX_IDX)], 0, "next"),
    "indirect_not_negotiated": ([(TABLE, 16, INDIRECT, 0)], 0, "indirect"),
    "indirect_with_next": ([(TABLE, 16, INDIRECT | NEXT, 1), (DATA, 1, 0, 0)], F_INDIRECT_DESC, "indirect"),
    "indirect_len_0": ([(TABLE, 0, INDIRECT, 0)], F_INDIRECT_DESC, "indirect_len"),
    "indirect_len_15": ([(TABLE, 15, INDIRECT, 0)], F_INDIRECT_DESC, "indirect_len"),
    "indirect_len_17": ([(TABLE, 17, INDIRECT, 0)], F_INDIRECT_DESC, "indirect_len"),
    "indirect_len_max": ([(TABLE, 0xFFFFFFFF, INDIRECT, 0)], F_INDIRECT_DESC, "indirect_len"),
    "indirect_65537_entries": ([(TABLE, 65537 * 16, INDIRECT, 0)], F_INDIRECT_DESC, "indirect_len"),
    "indirect_nowhere": ([(0xDEAD0000, 16, INDIRECT, 0)], F_INDIRECT_DESC, "address"),
    "indirect_behind_the_region": ([(END, 16, INDIRECT, 0)], F_INDIRECT_DESC, "address"),
    "indirect_first_entry_cut": ([(END - 8, 16, INDIRECT, 0)], F_INDIRECT_DESC, "address"),
    "indirect_wraps": ([((1 << 64) - 16, 32, INDIRECT, 0)], F_INDIRECT_DESC, "address"),
    "readable_after_writable": ([(DATA, 1, WRITE | NEXT, 1), (DATA, 1, 0, 0)], 0, "order"),
    "empty_readable_after_writable": ([(DATA, 1, WRITE | NEXT, 1), (DATA, 0, 0, 0)], 0, "order"),
    "address_0": ([(0, 1, 0, 0)], 0, "address"),
    "address_before_the_region": ([(BASE - 1, 1, 0, 0)], 0, "address"),
    "address_runs_into_the_region": ([(BASE - 1, 2, 0, 0)], 0, "address"),
    "address_behind_the_region": ([(END, 1, 0, 0)], 0, "address"),
    "one_past_the_end": ([(END - 1, 2, 0, 0)], 0, "address"),
    "end_of_region_64k": ([(END - 1, 0x10000, WRITE, 0)], 0, "address"),
    "length_max": ([(DATA, 0xFFFFFFFF, 0, 0)], 0, "address"),
    "wraps_2_64": ([((1 << 64) - 1, 2, 0, 0)], 0, "address"),
    "wraps_into_the_region": ([((1 << 64) - 1, 0xFFFFFFFF, WRITE, 0)], 0, "address"),
    "second_buffer_nowhere": ([(DATA, 1, NEXT, 1), (0xDEAD0000, 1, 0, 0)], 0, "address"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_chain(make: MakeRig, name: str) -> None:
    """Each chain of the table is refused for its reason."""
    rows, features, reason = HOSTILE[name]
    rig = make(8, features=features)
    offer_rows(rig, rows)
    refused(rig, reason)


HOSTILE_TABLES: Final[dict[str, tuple[list[Row], str]]] = {
    "nested": ([(TABLE, 16, INDIRECT, 0)], "indirect"),
    "nested_in_second": ([(DATA, 1, NEXT, 1), (TABLE, 16, INDIRECT, 0)], "indirect"),
    "nested_elsewhere": ([(TABLE + 64, 16, INDIRECT, 0)], "indirect"),
    "loop": ([(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)], "loop"),
    "loop_of_one": ([(DATA, 1, NEXT, 0)], "loop"),
    "empty_loop": ([(DATA, 0, NEXT, 1), (DATA, 0, NEXT, 0)], "loop"),
    "next_is_length": ([(DATA, 1, NEXT, 2), (DATA, 1, 0, 0)], "next"),
    "next_is_max": ([(DATA, 1, NEXT, MAX_IDX), (DATA, 1, 0, 0)], "next"),
    "order": ([(DATA, 1, WRITE | NEXT, 1), (DATA, 1, 0, 0)], "order"),
    "address": ([(DATA, 1, NEXT, 1), (END, 1, 0, 0)], "address"),
    "one_past": ([(END - 1, 2, 0, 0)], "address"),
}


@pytest.mark.parametrize("name", HOSTILE_TABLES)
def test_hostile_table(make: MakeRig, name: str) -> None:
    """Each indirect table is refused for its reason."""
    rows, reason = HOSTILE_TABLES[name]
    rig = make(8, features=F_INDIRECT_DESC)
    offer_table(rig, rows)
    refused(rig, reason)


def test_order_across_the_table(make: MakeRig) -> None:
    """A readable entry of the table after a direct writable descriptor is out of order."""
    rig = make(features=F_INDIRECT_DESC)
    rig.write(TABLE, table([(DATA, 1, 0, 0)]))
    offer_rows(rig, [(DATA, 1, WRITE | NEXT, 1), (TABLE, 16, INDIRECT, 0)])
    refused(rig, "order")


def test_table_runs_out_of_memory(make: MakeRig) -> None:
    """A table whose later entries lie beyond the region is refused when the chain gets there, not read."""
    rig = make(features=F_INDIRECT_DESC)
    rig.write(END - 16, pack_descriptor(DATA, 1, NEXT, 1))
    offer_rows(rig, [(END - 16, 32, INDIRECT, 0)])
    refused(rig, "address")


def test_hole_between_regions(make: MakeRig) -> None:
    """A buffer that starts and ends in regions with a hole between them is refused."""
    rig = make(more=[(END + 4096, 4096)])
    offer_rows(rig, [(END - 1, 4098, 0, 0)])
    refused(rig, "address")


def test_wrap_with_regions_at_both_ends(make: MakeRig) -> None:
    """A buffer that wraps is refused although there is memory at both ends of the address space."""
    rig = make(features=F_INDIRECT_DESC, more=[((1 << 64) - 4096, 4096), (0, 4096)])
    offer_rows(rig, [((1 << 64) - 8, 16, 0, 0)])
    refused(rig, "address")


def test_table_wraps_with_regions_at_both_ends(make: MakeRig) -> None:
    """So is an indirect table."""
    rig = make(features=F_INDIRECT_DESC, more=[((1 << 64) - 4096, 4096), (0, 4096)])
    rig.write((1 << 64) - 16, pack_descriptor(DATA, 1, NEXT, 1))
    rig.write(0, pack_descriptor(DATA, 1))
    offer_rows(rig, [((1 << 64) - 16, 32, INDIRECT, 0)])
    refused(rig, "address")


def test_too_many_segments(make: MakeRig) -> None:
    """A chain of 1025 segments is refused."""
    rig = make(features=F_INDIRECT_DESC)
    rig.driver.add([(DATA + i, 1) for i in range(SEGMENTS_MAX + 1)], table=TABLE)
    rig.driver.publish()
    refused(rig, "segments")


def test_borders_count_as_segments(make: MakeRig) -> None:
    """A buffer that is cut at a region's border counts twice."""
    rig = make(features=F_INDIRECT_DESC, more=[(END, 4096)])
    rig.driver.add([*((DATA + i, 1) for i in range(SEGMENTS_MAX - 1)), (END - 1, 2)], table=TABLE)
    rig.driver.publish()
    refused(rig, "segments")


@pytest.mark.parametrize(("excess", "reason"), [(0, None), (1, "length")])
def test_sum_of_lengths(make: MakeRig, excess: int, reason: str | None) -> None:
    """Lengths may add up to 2**32 - 1 bytes and no further, though each buffer is in memory."""
    size = 1 << 23
    rig = make(1024, size=size)
    count = (1 << 32) // size  # 512 buffers that are the whole region
    rows = [(BASE, size, NEXT, i + 1) for i in range(count - 1)]
    offer_rows(rig, [*rows, (BASE, size - 1 + excess, WRITE, 0)])
    if reason:
        refused(rig, reason)
    else:
        chain = take(rig)
        assert sum(length for _, length in [*chain.readable, *chain.writable]) == (1 << 32) - 1


@pytest.mark.parametrize("head", [8, 9, 0x7FFF, MAX_IDX])
def test_head_beyond_the_table(make: MakeRig, head: int) -> None:
    """A head that is no descriptor number is refused."""
    rig = make(8)
    rig.offer([head])
    refused(rig, "head")


@pytest.mark.parametrize("idx", [9, 100, 0x8000, MAX_IDX], ids=["one_too_far", "100", "half", "backwards"])
@pytest.mark.parametrize("start", [0, 5, 0xFFFB])
def test_available_index_jumps(make: MakeRig, idx: int, start: int) -> None:
    """An available index more than the queue's size ahead, or behind, is refused before anything is looked at."""
    rig = make(8, first_idx=start)
    rig.driver.set_avail_idx(start + idx)
    refused(rig, "avail_idx")


def test_whole_ring_ahead(make: MakeRig) -> None:
    """An available index exactly the queue's size ahead is a full ring."""
    rig = make(8)
    rig.offer([0] * 8)
    assert [take(rig).head for _ in range(8)] == [0] * 8
    assert rig.ring.pop() is None


def test_good_ones_before_the_bad(make: MakeRig) -> None:
    """Chains before a bad one come out; then the ring breaks at the bad one and shows where it stands."""
    rig = make(8)
    rig.driver.write_descriptor(1, pack_descriptor(DATA, 5))
    good = [1, 1]
    rig.offer([*good, 8, 1])
    assert [take(rig).head for _ in good] == good
    refused(rig, "head")
    assert rig.ring.last_avail_idx == len(good)


@pytest.mark.parametrize("num", [0, 3, 6, 32769, 65536, -8])
def test_queue_size(make: MakeRig, num: int) -> None:
    """A queue size that is no power of two up to 32768 is refused."""
    with pytest.raises(LocalError):
        make(8).attach_at(num)


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_ring_outside_memory(make: MakeRig, part: str) -> None:
    """A ring that is not wholly in one region is refused, whichever part it is; one that just fits is not."""
    rig = make(8)
    size = {"desc": 16 * 8, "avail": 6 + 2 * 8, "used": 6 + 8 * 8}[part]
    rig.attach_at(8, **{part: END - size})
    for bad in (END - size + 4, END, 0, BASE - 16, (1 << 64) - 16):
        with pytest.raises(LocalError):
            rig.attach_at(8, **{part: bad})
