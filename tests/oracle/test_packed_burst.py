"""The compiled packed ring as the data path drives it, in bursts of one direction, against the plain-Python one.

A burst may be cut short by the device: what it took must be a prefix of what could be taken, and never nothing. What is
not given back is put back, as receive queues do, and taken again.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import native
from tests.oracle.packed import PackedVring
from tests.oracle.rig import BASE, PackedRig
from tests.oracle.split import READABLE, WRITABLE
from tests.oracle.test_agree import Step
from tests.oracle.test_burst import BURST_SOURCE, DIRECTIONS
from tests.oracle.test_packed import Book, decent, rows, two_rigs
from vhostmp.errors import QueueBroken
from vhostmp.tools.stress.packed import WRAP, pack_packed
from vhostmp.tools.stress.ring import F_EVENT_IDX, F_INDIRECT_DESC, INDIRECT, WRITE

DATA = BASE + 0x4000
TABLE = BASE + 0x8000


def compiled_burst(rig: PackedRig, first_idx: int) -> Any:
    """Return the compiled ring that takes bursts."""
    places = rig.driver.desc_gpa, rig.driver.avail_gpa, rig.driver.used_gpa
    ring = native.load(BURST_SOURCE).BurstRing
    return ring(rig.mem, rig.layout.num, *places, features=rig.features, last_avail_idx=first_idx)


#: A chain that is put back, and what its hostile driver makes of it before it is taken again: one descriptor fewer.
CHANGED = tuple(b"\0\x40\x01".ljust(14, b"\0") + bytes([more, 0]) for more in (1, 0))


@given(
    st.sampled_from([1, 3, 8, 100]),
    st.integers(0, 99),
    st.booleans(),
    st.lists(
        st.tuples(
            st.one_of(rows, st.lists(decent, min_size=1, max_size=70).map(b"".join)),
            st.integers(1, 64),
            st.sampled_from(DIRECTIONS),
            st.integers(0, 64),
        ),
        min_size=1,
        max_size=8,
    ),
)
@example(3, 0, False, [(CHANGED[0], 1, 1, 0), (CHANGED[1], 1, 1, 1)])
def test_agree_on_bursts(num: int, offset: int, wrap: bool, turns: list[tuple[bytes, int, int, int]]) -> None:
    """Whatever a driver does, bursts agree with the oracle in each direction; what is put back is taken again."""
    first_idx = offset % num | (WRAP if wrap else 0)
    with two_rigs(num, F_INDIRECT_DESC | F_EVENT_IDX, first_idx) as (rig, other):
        burst, oracle = compiled_burst(rig, first_idx), other.ring
        assert isinstance(oracle, PackedVring)
        for raw, most, direction, kept in turns:
            for one, ring in ((rig, burst), (other, oracle)):
                book = Book(one)
                book.rig.ring = ring  # type: ignore[misc] # where the next descriptor is, it knows
                book.available(Step("available", (0,), raw))
            try:
                expected = [(c.head, c.readable, c.writable) for c in oracle.fetch(most, direction)]
            except QueueBroken:
                expected = None
            try:
                got = burst.fetch(most, direction)
            except QueueBroken:
                got = None
            if got is None or expected is None:
                assert (got, burst.broken) == (expected, oracle.broken)
                return
            assert got == expected[: len(got)]
            assert bool(got) == bool(expected)
            oracle.unfetch(len(expected) - len(got))
            given = min(kept, len(got))
            sizes = burst.sizes()
            burst.unfetch(len(got) - given)
            oracle.unfetch(len(got) - given)
            burst.give_back([(head, 9) for head, _, _ in got[:given]], sizes)
            for head, _, _ in got[:given]:
                oracle.push(head, 9)
            assert burst.publish() == oracle.publish()
            assert (burst.last_avail_idx, burst.used_idx) == (oracle.last_avail_idx, oracle.used_idx)
            assert rig.ring_bytes() == other.ring_bytes()


def test_write_in_a_transmit_table_means_nothing() -> None:
    """DPDK's driver marks the header in its transmit tables as writable: the chain is read all the same."""
    for direction, outcome in ((READABLE, None), (WRITABLE, "order")):
        with PackedRig("cython", 8, features=F_INDIRECT_DESC) as rig:
            ring = compiled_burst(rig, WRAP)
            rig.write(TABLE, pack_packed(DATA, 12, 0, WRITE) + pack_packed(DATA + 64, 60, 0, 0))
            Book(rig).available(Step("available", (0,), pack_packed(TABLE, 32, 5, INDIRECT)))
            if outcome is None:
                assert ring.fetch(8, direction) == [(5, [(DATA, 12), (DATA + 64, 60)], [])]
            else:
                with pytest.raises(QueueBroken):
                    ring.fetch(8, direction)
                assert ring.broken == outcome
