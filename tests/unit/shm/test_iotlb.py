"""The IOTLB's table: what is entered is found, nothing else is, and nobody sees half an entry."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostmp.errors import LocalError
from vhostmp.shm._iotlb import ENTRIES_MAX, READ, WRITE, IotlbTable

U64_MAX = (1 << 64) - 1
PAGE = 4096
BOTH = READ | WRITE


@pytest.fixture
def table() -> Iterator[IotlbTable]:
    """Return an empty table."""
    table = IotlbTable()
    yield table
    table.close()


Step = tuple[bool, int, int, int]
steps = st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 12), st.integers(1, 3)), max_size=40)


@given(steps)
def test_against_a_model(program: list[Step]) -> None:
    """Updates and invalidations in any order leave what a list of entries, each removed whole, would."""
    table = IotlbTable()
    model: list[tuple[int, int, int, int]] = []
    for place, (enter, start, size, access) in enumerate(program):
        last = start + size - 1
        overlapping = [entry for entry in model if entry[0] <= last and entry[1] >= start]
        entry = (start, last, place * 1000, access)
        if enter:
            assert table.update(*entry) == bool(overlapping)
        else:
            assert table.invalidate(start, last) == len(overlapping)
        model = [other for other in model if other not in overlapping] + ([entry] if enter else [])
        assert len(table) == len(model)
    for iova in range(60):
        assert table.find(iova) == next((entry for entry in model if entry[0] <= iova <= entry[1]), None)
    table.close()


def test_same_again_changes_nothing(table: IotlbTable) -> None:
    """An entry that is there already is not written again: nobody has to look twice, nobody to wait."""
    assert not table.update(0, PAGE - 1, PAGE, READ)
    version = table.version
    assert not table.update(0, PAGE - 1, PAGE, READ)
    assert table.version == version
    assert table.update(0, PAGE - 1, PAGE, BOTH)
    assert table.version != version


def test_ends_of_the_address_space(table: IotlbTable) -> None:
    """The topmost byte can be entered, all of the address space too; what wraps is refused and changes nothing."""
    table.update(U64_MAX - PAGE + 1, U64_MAX, 0, READ)
    assert table.find(U64_MAX) == (U64_MAX - PAGE + 1, U64_MAX, 0, READ)
    assert table.update(0, U64_MAX, 0, BOTH)
    assert table.find(0) == table.find(U64_MAX) == (0, U64_MAX, 0, BOTH)
    for iova, last, uva, access in ((1, 0, 0, 1), (0, U64_MAX, 1, 1), (0, 1, U64_MAX, 1), (0, 1, 0, 0), (0, 1, 0, 4)):
        with pytest.raises(LocalError):
            table.update(iova, last, uva, access)
    with pytest.raises(LocalError):
        table.invalidate(1, 0)
    assert table.invalidate(0, U64_MAX) == 1
    assert (len(table), table.find(0)) == (0, None)


def test_oldest_makes_room(table: IotlbTable) -> None:
    """Beyond the bound the oldest entry is forgotten, wherever it stands."""
    order = [(number * 7919) % ENTRIES_MAX for number in range(ENTRIES_MAX)]
    for number in order:
        table.update(number * PAGE, number * PAGE + PAGE - 1, 0, READ)
    assert len(table) == ENTRIES_MAX
    gone = 3
    for number in order[:gone]:
        start = (ENTRIES_MAX + number) * PAGE
        assert not table.update(start, start + PAGE - 1, 0, READ)
        assert len(table) == ENTRIES_MAX
        assert table.find(number * PAGE) is None
        assert table.find(start) is not None
    assert table.evicted == gone
    assert table.find(order[gone] * PAGE) is not None


def test_no_entry_is_torn(table: IotlbTable) -> None:
    """A reader in another process sees whole entries only, while the writer moves, replaces and removes them."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = _read_until_removed(IotlbTable(table.fd))
        finally:
            os._exit(status)
    end = time.monotonic() + 1.0
    turn = 0
    while time.monotonic() < end:
        turn += 1
        start = turn % 16 * 64
        size = 1 + turn % 64
        table.update(start, start + size - 1, start + size << 20, 1 + size % 3)
        if turn % 5 == 0:
            table.invalidate(start, start)
    table.invalidate(0, U64_MAX)
    table.update(1 << 40, 1 << 40, 0, 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _read_until_removed(table: IotlbTable) -> int:
    """Return 0 when every entry found was one that was written, 2 when not; ends with the entry at 1 << 40."""
    while table.find(1 << 40) is None:
        for iova in range(0, 1024, 7):
            entry = table.find(iova)
            if entry is None:
                continue
            start, last, uva, access = entry
            size = last - start + 1
            if not start <= iova <= last or uva != start + size << 20 or access != 1 + size % 3:
                return 2
    return 0
