"""The compiled ring as the data path drives it, in bursts of one direction, against the plain-Python one.

`pop` goes one chain at a time and takes either direction; the data path does neither, and has a short cut for chains of
one descriptor. So the same comparison is made on bursts, with chains put back in between, as a receive queue does.
A burst may be cut short by the device: what it took must be a prefix of what could be taken, and never nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Protocol, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import native
from tests.oracle.rig import BASE, SIZE, Rig
from tests.oracle.split import EITHER, READABLE, WRITABLE
from tests.oracle.split import Vring as OracleVring
from tests.oracle.test_agree import (
    MORE,
    Step,
    act,
    common,
    descriptors,
    features,
    fill,
    starts,
    with_heads,
    with_numbers,
)
from vhostmp.errors import QueueBroken
from vhostmp.shm._memory import MemoryMap
from vhostmp.tools.stress.ring import F_EVENT_IDX, F_INDIRECT_DESC, INDIRECT, NEXT, WRITE
from vhostmp.tools.stress.split import pack_descriptor

BURST_SOURCE: Final = Path(__file__).with_name("_burst.pyx")
Taken = list[tuple[int, list[tuple[int, int]], list[tuple[int, int]]]]
DIRECTIONS: Final = (READABLE, WRITABLE, EITHER)
BURST: Final = 64
SEGMENTS_MAX: Final = 1024
DATA: Final = BASE + 0x4000


class BurstRing(Protocol):
    """The compiled ring, see _burst.pyx."""

    last_avail_idx: int
    used_idx: int
    broken: str | None

    def fetch(self, most: int, direction: int) -> Taken:
        """Take chains."""
        ...

    def unfetch(self, n: int) -> None:
        """Put chains back."""
        ...

    def give_back(self, elements: Sequence[tuple[int, int]]) -> None:
        """Write used elements."""
        ...

    def publish(self) -> bool:
        """Show the driver."""
        ...


class Pair:
    """Two rigs alike: the compiled ring in bursts, and the oracle."""

    def __init__(self, num: int, *, features: int = 0, first_idx: int = 0, size: int = SIZE, most: int = BURST) -> None:
        """Make both, with the same memory."""
        more = MORE if size == SIZE else ()
        self.stack = ExitStack()
        self.rigs = [
            self.stack.enter_context(Rig(kind, num, features=features, first_idx=first_idx, size=size, more=more))
            for kind in ("cython", "oracle")
        ]
        compiled, oracle = self.rigs
        module = native.load(BURST_SOURCE)
        assert isinstance(compiled.mem, MemoryMap)
        places = (compiled.driver.desc_gpa, compiled.driver.avail_gpa, compiled.driver.used_gpa)
        ring = module.BurstRing(compiled.mem, num, *places, features=features, last_avail_idx=first_idx)
        self.burst = cast("BurstRing", ring)
        assert isinstance(oracle.ring, OracleVring)
        self.oracle = oracle.ring
        self.most = most

    def fetch(self, direction: int, most: int | None = None) -> Taken | None:
        """Take a burst on both and compare; None when the ring is broken."""
        wanted = self.most if most is None else most
        expected: Taken | None
        got: Taken | None
        try:
            expected = [(c.head, c.readable, c.writable) for c in self.oracle.fetch(wanted, direction)]
        except QueueBroken:
            expected = None
        try:
            got = self.burst.fetch(wanted, direction)
        except QueueBroken:
            got = None
        if got is None or expected is None:
            assert (got, self.burst.broken) == (expected, self.oracle.broken)
            return None
        assert got == expected[: len(got)]
        assert bool(got) == bool(expected)
        self.oracle.unfetch(len(expected) - len(got))
        self.compare()
        return got

    def unfetch(self, count: int) -> None:
        """Put chains back on both."""
        self.burst.unfetch(count)
        self.oracle.unfetch(count)

    def give_back(self, elements: Sequence[tuple[int, int]]) -> bool:
        """Give chains back on both, in one batch, and compare; whether the driver wants an interrupt."""
        self.burst.give_back(elements)
        for head, length in elements:
            self.oracle.push(head, length)
        wants = self.oracle.publish()
        assert self.burst.publish() == wants
        self.compare()
        return wants

    def compare(self) -> None:
        """Compare everything else."""
        compiled = (self.burst.last_avail_idx, self.burst.used_idx, self.burst.broken, self.rigs[0].ring_bytes())
        oracle = (self.oracle.last_avail_idx, self.oracle.used_idx, self.oracle.broken, self.rigs[1].ring_bytes())
        assert compiled == oracle

    def jump(self, step: Step) -> None:
        """Set the available index or used_event some way from where the device stands, on both."""
        for rig in self.rigs:
            if step.what == "avail_idx":
                rig.driver.set_avail_idx(self.oracle.last_avail_idx + step.numbers[0])
            else:
                rig.driver.set_used_event(self.oracle.used_idx + step.numbers[0])

    def offer(self, rows: Sequence[bytes], heads: Sequence[int]) -> None:
        """Write descriptors from number 0 on and make heads available, on both."""
        for rig in self.rigs:
            for index, raw in enumerate(rows):
                rig.driver.write_descriptor(index, raw)
            rig.offer(heads)

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory on both."""
        for rig in self.rigs:
            rig.write(gpa, data)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Return a stack that is unwound after the test."""
    with ExitStack() as unwound:
        yield unwound


def make(stack: ExitStack, num: int, *, features: int = 0, first_idx: int = 0, size: int = SIZE) -> Pair:
    """Make a pair that is closed after the test."""
    pair = Pair(num, features=features, first_idx=first_idx, size=size)
    stack.callback(pair.stack.close)
    return pair


def table(segments: Sequence[tuple[int, int]], flags: int) -> bytes:
    """Return an indirect table of segments of one direction."""
    last = len(segments) - 1
    return b"".join(
        pack_descriptor(addr, size, flags | (NEXT if i < last else 0), i + 1 if i < last else 0)
        for i, (addr, size) in enumerate(segments)
    )


@pytest.mark.parametrize("flags", [0, WRITE], ids=["readable", "writable"])
@pytest.mark.parametrize("sizes", [(256, 1024), (255, 1024), (1024, 256), (1024, 1024), (256, 1024, 1024), (600, 600)])
def test_burst_never_overflows(stack: ExitStack, sizes: tuple[int, ...], flags: int) -> None:
    """Long chains followed by as many short ones as a burst takes stay inside the burst; all come out, in order."""
    pair = make(stack, 128, features=F_INDIRECT_DESC, size=1 << 18)
    data = pair.rigs[0].data
    rows: list[bytes] = []
    for place, count in enumerate(sizes):
        at = data + 0x4000 * (1 + place)
        pair.write(at, table([(data + i, 1) for i in range(count)], flags))
        rows.append(pack_descriptor(at, 16 * count, INDIRECT))
    rows += [pack_descriptor(data + i, 60, flags) for i in range(100)]
    pair.offer(rows, range(len(rows)))
    taken: list[int] = []
    while batch := pair.fetch(WRITABLE if flags else READABLE):
        taken += [head for head, _, _ in batch]
    assert taken == list(range(len(rows)))


@pytest.mark.parametrize("direction", [READABLE, WRITABLE])
@pytest.mark.parametrize("indirect", [False, True])
def test_wrong_direction(stack: ExitStack, direction: int, indirect: bool) -> None:
    """A writable buffer in a transmit queue and a readable one in a receive queue break the ring."""
    pair = make(stack, 8, features=F_INDIRECT_DESC)
    right, wrong = (0, WRITE) if direction == READABLE else (WRITE, 0)
    raw = pack_descriptor(DATA, 60, wrong)
    pair.write(BASE + 0x8000, raw)
    rows = [pack_descriptor(DATA, 60, right), pack_descriptor(BASE + 0x8000, 16, INDIRECT) if indirect else raw]
    pair.offer(rows, [0, 0, 1, 0])
    assert pair.fetch(direction) == [(0, *(([(DATA, 60)], []) if direction == READABLE else ([], [(DATA, 60)])))] * 2
    assert pair.fetch(direction) is None
    assert pair.burst.broken == "direction"


def test_good_ones_before_the_bad(stack: ExitStack) -> None:
    """A burst ends before a bad chain; the next one meets it first, and breaks."""
    pair = make(stack, 16)
    rows = [pack_descriptor(DATA, 60), pack_descriptor(BASE - 1, 60)]
    pair.offer(rows, [0, 0, 0, 1, 0])
    assert len(pair.fetch(READABLE) or []) == len([0, 0, 0])
    assert pair.fetch(READABLE) is None
    assert pair.burst.broken == "address"


@pytest.mark.parametrize("flags", [0, WRITE], ids=["readable", "writable"])
@pytest.mark.parametrize("excess", [-1, 0, 1, 10, 4096])
@pytest.mark.parametrize("end", [BASE + SIZE, BASE + SIZE + 8192 + 4096], ids=["touched", "hole"])
def test_end_of_a_region(stack: ExitStack, end: int, excess: int, flags: int) -> None:
    """The short cut for chains of one descriptor keeps to the region that it remembers, to the byte."""
    pair = make(stack, 8)
    rows = [pack_descriptor(end - 100, 60, flags), pack_descriptor(end - 10, 10 + excess, flags)]
    pair.offer(rows, [0, 0, 1])
    direction = WRITABLE if flags else READABLE
    taken = pair.fetch(direction) or []
    while len(taken) < len([0, 0, 1]) and (more := pair.fetch(direction)):
        taken += more
    assert (pair.burst.broken == "address") == (excess > 0 and end != BASE + SIZE)


def test_put_back(stack: ExitStack) -> None:
    """Chains put back are taken again, the same ones, also over the wrap."""
    pair = make(stack, 8, first_idx=0xFFFD)
    pair.offer([pack_descriptor(DATA + i, 60 + i, WRITE) for i in range(8)], range(8))
    first = pair.fetch(WRITABLE)
    pair.unfetch(5)
    again = pair.fetch(WRITABLE)
    assert first is not None
    assert again == first[3:]


@given(
    st.sampled_from([1, 2, 8, 64, 256]),
    features,
    starts,
    st.lists(descriptors, min_size=8, max_size=16),
    st.lists(
        st.one_of(
            common,
            fill,
            with_numbers("fetch", st.integers(1, BURST), st.sampled_from(DIRECTIONS)),
            with_numbers("fetch", st.just(BURST), st.sampled_from(DIRECTIONS)),
            with_numbers("unfetch", st.integers(0, 8)),
            with_heads(st.integers(0, 15), BURST),
        ),
        max_size=30,
    ),
)
def test_agree_on_bursts(num: int, features: int, first_idx: int, rows: list[bytes], steps: list[Step]) -> None:
    """Whatever a driver does, bursts agree with the oracle, in each direction."""
    pair = Pair(num, features=features, first_idx=first_idx)
    fetched = 0
    with pair.stack:
        pair.offer(rows[:num], [])
        for step in steps:
            if step.what == "fetch":
                taken = pair.fetch(step.numbers[1], step.numbers[0])
                fetched = len(taken or [])
            elif step.what == "unfetch":
                pair.unfetch(min(fetched, step.numbers[0]))
                fetched = 0
            elif step.what in ("push", "publish"):
                pair.give_back([(step.numbers[0], step.numbers[1])] if step.what == "push" else [])
            elif step.what in ("avail_idx", "used_event"):
                pair.jump(step)
            elif step.what not in ("pop", "enable", "disable"):
                for rig in pair.rigs:
                    act(rig, step)
            pair.compare()


@pytest.mark.slow
@pytest.mark.parametrize("direction", [READABLE, WRITABLE], ids=["transmit", "receive"])
@pytest.mark.parametrize("bits", [0, F_EVENT_IDX | F_INDIRECT_DESC], ids=["plain", "indirect_event_idx"])
def test_traffic_in_bursts(stack: ExitStack, rng: random.Random, direction: int, bits: int) -> None:
    """Bursts of a decent driver's traffic agree through 65,536, put back now and then; the driver finds no fault."""
    pair = make(stack, 256, features=bits, first_idx=0xFFFF - 2000, size=1 << 18)
    chains = 0
    while chains < 20000:  # noqa: PLR2004 (well past the wrap)
        for _ in range(rng.randint(0, 100)):
            if len(pair.rigs[0].driver.free) < 3:  # noqa: PLR2004 (the longest chain below)
                break
            at = pair.rigs[0].data + rng.randrange(2048)
            parts = [(at + 32 * i, rng.randint(1, 1500)) for i in range(rng.choice([1, 1, 1, 2, 3]))]
            indirect = bits & F_INDIRECT_DESC and rng.randrange(2)
            where = pair.rigs[0].data + 4096 + 64 * pair.rigs[0].driver.free[0] if indirect else None
            readable, writable = (parts, parts[:0]) if direction == READABLE else (parts[:0], parts)
            assert len({rig.driver.add(readable, writable, table=where) for rig in pair.rigs}) == 1
        assert len({rig.driver.publish() for rig in pair.rigs}) == 1
        taken = pair.fetch(direction, rng.randint(1, BURST))
        assert taken is not None
        back = rng.randint(0, len(taken)) if rng.randrange(4) == 0 else 0
        pair.unfetch(back)
        kept = taken[: len(taken) - back]
        if rng.randrange(2):
            rng.shuffle(kept)
        pair.give_back([(head, rng.randint(0, sum(size for _, size in writable))) for head, _, writable in kept])
        chains += len(kept)
        assert len({tuple((used.chain.head, used.length) for used in rig.driver.reap()) for rig in pair.rigs}) == 1
        if rng.randrange(2):
            assert len({rig.driver.want_interrupts() for rig in pair.rigs}) == 1
