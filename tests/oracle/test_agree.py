"""The compiled ring and the plain-Python one agree on everything, whatever the driver does.

Each test drives two rigs alike, one a device side, and compares after every step: the chain popped or the refusal and
its reason, both indices, the notification decisions, and every byte of the ring (descriptor table, available ring,
used ring, avail_event, flags).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Final, cast

import attrs
import pytest
from hypothesis import Phase, example, find, given, settings
from hypothesis import strategies as st

from tests.oracle.rig import BASE, SIZE, ChainLike, Rig
from vhostmp.errors import QueueBroken
from vhostmp.tools.stress.ring import F_EVENT_IDX, F_INDIRECT_DESC, INDIRECT, NEXT, WRITE
from vhostmp.tools.stress.split import pack_descriptor

END: Final = BASE + SIZE
TOP: Final = (1 << 64) - 4096
#: Beside the first region: one that touches it, one after a hole, both ends of the address space.
MORE: Final = ((END, 4096), (END + 8192, 4096), (TOP, 4096), (0, 4096))
TABLES: Final = (BASE + 0x8000, BASE + 0x8100, END - 64, END - 8, END + 4096 - 32, TOP, (1 << 64) - 32, BASE)
NUMS: Final = (1, 2, 4, 8, 16, 64, 256)


@attrs.frozen
class Step:
    """One thing done to both rigs."""

    what: str
    numbers: tuple[int, ...] = ()
    raw: bytes = b""


Popped = tuple[object, ...]


def pop(rig: Rig) -> Popped:
    """Pop, and give what came of it as something that can be compared."""
    try:
        chain: ChainLike | None = rig.ring.pop()
    except QueueBroken:
        return ("broken", rig.ring.broken)
    return ("empty",) if chain is None else (chain.head, chain.readable, chain.writable)


def _descriptor(rig: Rig, step: Step) -> object:
    rig.driver.write_descriptor(step.numbers[0] % rig.layout.num, step.raw)
    return None


def _pops(rig: Rig, step: Step) -> object:
    return [pop(rig) for _ in range(step.numbers[0])]


ACTIONS: Final[dict[str, Callable[[Rig, Step], object]]] = {
    "descriptor": _descriptor,
    "table": lambda rig, step: rig.write(step.numbers[0], step.raw),
    "offer": lambda rig, step: rig.offer(step.numbers),
    "avail_idx": lambda rig, step: rig.driver.set_avail_idx(rig.ring.last_avail_idx + step.numbers[0]),
    "avail_flags": lambda rig, step: rig.driver.set_avail_flags(step.numbers[0]),
    "used_event": lambda rig, step: rig.driver.set_used_event(rig.ring.used_idx + step.numbers[0]),
    "used_idx": lambda rig, step: rig.write(rig.driver.used_gpa + 2, step.raw),
    "pop": _pops,
    "push": lambda rig, step: rig.ring.push(*step.numbers),
    "publish": lambda rig, _: rig.ring.publish(),
    "enable": lambda rig, _: rig.ring.enable_notify(),
    "disable": lambda rig, _: rig.ring.disable_notify(),
}


def act(rig: Rig, step: Step) -> object:
    """Do a step to a rig, and give what came of it."""
    return ACTIONS[step.what](rig, step)


def state(rig: Rig) -> tuple[object, ...]:
    """Everything else that must be the same."""
    return rig.ring.last_avail_idx, rig.ring.used_idx, rig.ring.broken, rig.ring_bytes()


@contextmanager
def two_rigs(num: int, features: int = 0, first_idx: int = 0, size: int = SIZE) -> Generator[tuple[Rig, Rig]]:
    """Make both rigs alike."""
    more = MORE if size == SIZE else ()
    with (
        Rig("cython", num, features=features, first_idx=first_idx, size=size, more=more) as compiled,
        Rig("oracle", num, features=features, first_idx=first_idx, size=size, more=more) as oracle,
    ):
        yield compiled, oracle


def agree(num: int, features: int, first_idx: int, steps: list[Step]) -> list[object]:
    """Do the steps to both rigs, compare after each, and return what they answered."""
    answers: list[object] = []
    with two_rigs(num, features, first_idx) as (compiled, oracle):
        for place, step in enumerate(steps):
            expected, got = act(oracle, step), act(compiled, step)
            assert got == expected, f"step {place}, {step}: compiled {got}, oracle {expected}"
            assert state(compiled) == state(oracle), f"after step {place}, {step}"
            answers.append(got)
    return answers


# What the driver may do, weighted so that good chains, nearly good ones and nonsense all come up.

addresses = st.one_of(
    st.integers(BASE + 0x4000, BASE + 0x4100),
    st.sampled_from([BASE - 1, BASE, END - 1, END - 10, END, END + 4095, END + 4096, END + 8192, TOP - 1, TOP]),
    st.sampled_from([0, 4095, 4096, (1 << 64) - 1, (1 << 64) - 16, 1 << 63]),
    st.sampled_from(TABLES),
    st.integers(0, (1 << 64) - 1),
)
lengths = st.one_of(
    st.integers(0, 64),
    st.sampled_from(
        [16, 32, 48, 128, 4096, 4097, 8192, SIZE, SIZE + 1, 65536 * 16, 65537 * 16, 0xFFFFFFFF, 0x80000000]
    ),
    st.integers(0, 0xFFFFFFFF),
)
flags = st.one_of(
    st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | WRITE, INDIRECT | NEXT]),
    st.integers(0, 0xFFFF),
)
links = st.one_of(
    st.integers(0, 8), st.sampled_from([15, 16, 63, 64, 255, 256, 0x7FFF, 0xFFFF]), st.integers(0, 0xFFFF)
)


@st.composite
def good_descriptors(draw: st.DrawFn) -> bytes:
    """A descriptor that a decent driver could have written."""
    where = draw(st.integers(BASE + 0x4000, BASE + 0x5000))
    flag = draw(st.sampled_from([NEXT, NEXT, NEXT, NEXT | WRITE, NEXT | WRITE, WRITE, 0]))
    return pack_descriptor(
        where, draw(st.integers(0, 2000)), flag, draw(st.one_of(st.integers(0, 3), st.integers(0, 15)))
    )


@st.composite
def references(draw: st.DrawFn) -> bytes:
    """A descriptor that refers to an indirect table, mostly of a possible length."""
    length = draw(st.one_of(st.integers(1, 9).map(lambda n: 16 * n), st.sampled_from([0, 15, 17, 65537 * 16])))
    return pack_descriptor(draw(st.sampled_from(TABLES)), length, INDIRECT | draw(st.sampled_from([0, 0, WRITE])))


#: Chains of one descriptor: with these alone a ring lives long enough for its indices to be tampered with.
decent = st.builds(
    pack_descriptor, st.integers(BASE + 0x4000, BASE + 0x5000), st.integers(0, 2000), st.sampled_from([0, WRITE])
)
nonsense = st.builds(pack_descriptor, addresses, lengths, flags, links)
descriptors = st.one_of(*[good_descriptors()] * 6, references(), references(), nonsense)
tables = st.lists(descriptors, min_size=1, max_size=8).map(b"".join)
u16 = st.integers(0, 0xFFFF)
near = st.one_of(st.integers(-3, 12), u16)


def with_numbers(what: str, *numbers: st.SearchStrategy[int]) -> st.SearchStrategy[Step]:
    """Steps with so many numbers."""
    return st.tuples(*numbers).map(partial(Step, what))


def with_heads(heads: st.SearchStrategy[int], most: int) -> st.SearchStrategy[Step]:
    """Steps that make up to `most` heads available."""
    return st.lists(heads, min_size=1, max_size=most).map(tuple).map(partial(Step, "offer"))


def with_bytes(what: str, number: st.SearchStrategy[int], raw: st.SearchStrategy[bytes]) -> st.SearchStrategy[Step]:
    """Steps with a number and bytes."""
    return st.builds(Step, st.just(what), st.tuples(number), raw)


describe = with_bytes("descriptor", st.integers(0, 15), descriptors)
fill = with_bytes("table", st.sampled_from(TABLES[:4]), tables)
offer = with_heads(st.integers(0, 15), 4)
take = with_numbers("pop", st.integers(1, 4))
rare = st.one_of(
    with_heads(u16, 3),
    with_numbers("avail_idx", near),
    with_numbers("avail_flags", u16),
    with_numbers("used_event", near),
    with_bytes("used_idx", st.just(0), st.binary(min_size=2, max_size=2)),
)
common = st.one_of(
    *[describe, fill, offer, take] * 2,
    rare,
    with_numbers("push", u16, st.integers(0, 0xFFFFFFFF)),
    st.sampled_from([Step("publish"), Step("enable"), Step("disable")]),
)


@st.composite
def programs(draw: st.DrawFn) -> list[Step]:
    """A descriptor table, indirect tables, then whatever a driver may do, in any order."""
    rows = draw(st.lists(draw(st.sampled_from([descriptors, decent])), min_size=8, max_size=16))
    return [
        *(Step("descriptor", (i,), raw) for i, raw in enumerate(rows)),
        *draw(st.lists(fill, max_size=3)),
        draw(offer),
        draw(take),
        *draw(st.lists(common, max_size=30)),
    ]


features = st.sampled_from([0, F_INDIRECT_DESC, F_EVENT_IDX, F_INDIRECT_DESC | F_EVENT_IDX, F_INDIRECT_DESC])
starts = st.one_of(st.just(0), st.integers(0xFFF0, 0xFFFF), u16)


FOUR_OFFERED: Final = [Step("descriptor", (0,), pack_descriptor(BASE + 0x4000, 60)), Step("offer", (0, 0, 0, 0))]


@given(st.sampled_from(NUMS), features, starts, programs())
@example(8, 0, 0, [Step("avail_idx", (-1,)), Step("pop", (2,))])
@example(4, 0, 0, [*FOUR_OFFERED, Step("pop", (3,)), Step("avail_idx", (0,)), Step("pop", (1,))])
def test_agree_on_anything(num: int, features: int, first_idx: int, steps: list[Step]) -> None:
    """Whatever a driver does, hostile or good, step by step, both device sides do the same."""
    agree(num, features, first_idx, steps)


@given(st.sampled_from(NUMS), features, st.lists(descriptors, min_size=1, max_size=16), tables, st.integers(0, 15))
def test_agree_on_one_chain(num: int, features: int, rows: list[bytes], table: bytes, head: int) -> None:
    """A random descriptor table with random indirect tables gives the same chain, or the same refusal."""
    agree(
        num,
        features,
        0,
        [
            *(Step("descriptor", (i,), raw) for i, raw in enumerate(rows)),
            *(Step("table", (at,), table) for at in TABLES[:4]),
            Step("offer", (head % num,)),
            Step("pop", (2,)),
        ],
    )


@given(features, st.integers(0, 0xFFFF), st.lists(st.tuples(st.integers(1, 8), near), min_size=1, max_size=30))
def test_agree_on_interrupts(features: int, first_idx: int, batches: list[tuple[int, int]]) -> None:
    """Batches of any size against any used_event give the same interrupts."""
    steps = [
        step
        for count, event in batches
        for step in (Step("used_event", (event,)), *[Step("push", (0, 1))] * count, Step("publish"))
    ]
    agree(256, features, first_idx, steps)


REACHED: Final = ("avail_idx", "head", "next", "loop", "indirect", "indirect_len", "order", "address", "a chain")


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="it is not our code that is tried")
@pytest.mark.parametrize("outcome", REACHED)
def test_the_strategies_reach(outcome: str) -> None:
    """The random programs above are worth something: they reach each refusal, and good chains too."""

    def reaches(program: list[Step]) -> bool:
        with Rig("oracle", 4, features=F_INDIRECT_DESC, more=MORE) as rig:
            answers = [act(rig, step) for step in program]
        popped = [result for answer in answers if isinstance(answer, list) for result in cast("list[Popped]", answer)]
        return any(
            outcome == (result[1] if result[0] == "broken" else "a chain") for result in popped if result[0] != "empty"
        )

    find(programs(), reaches, settings=settings(max_examples=20_000, derandomize=True, phases=[Phase.generate]))


class Traffic:
    """A decent driver's random traffic on both rigs at once, with chains of every shape."""

    def __init__(self, rng: random.Random, compiled: Rig, oracle: Rig) -> None:
        """Drive both from one random generator."""
        self.rng = rng
        self.rigs = (compiled, oracle)
        self.taken: list[ChainLike] = []
        self.chains = 0

    def add(self) -> None:
        """Make a few chains available on both."""
        for _ in range(self.rng.randint(0, 24)):
            at = self.rigs[0].data + self.rng.randrange(256)
            parts = [(at + 8 * i, self.rng.randint(0, 1500)) for i in range(self.rng.randint(1, 5))]
            cut = self.rng.randint(0, len(parts))
            slot = next(iter(self.rigs[0].driver.free), 0)  # the head it is going to have
            direct = not self.rigs[0].features & F_INDIRECT_DESC or self.rng.random() < 0.5  # noqa: PLR2004 (a coin)
            if len(self.rigs[0].driver.free) < len(parts):
                break
            table = None if direct else self.rigs[0].data + 4096 + 128 * slot
            assert len({rig.driver.add(parts[:cut], parts[cut:], table=table) for rig in self.rigs}) == 1
        assert len({rig.driver.publish() for rig in self.rigs}) == 1

    def take(self) -> None:
        """Pop some on both."""
        for _ in range(self.rng.randint(0, 40)):
            compiled, oracle = (rig.ring.pop() for rig in self.rigs)
            if compiled is None or oracle is None:
                assert compiled is oracle
                return
            assert (compiled.head, compiled.readable, compiled.writable) == (
                oracle.head,
                oracle.readable,
                oracle.writable,
            )
            self.taken.append(compiled)
            self.chains += 1

    def give(self) -> None:
        """Give some back on both, in any order, then let the drivers reap."""
        self.rng.shuffle(self.taken)
        for _ in range(self.rng.randint(0, len(self.taken))):
            chain = self.taken.pop()
            length = self.rng.randint(0, sum(size for _, size in chain.writable))
            for rig in self.rigs:
                rig.ring.push(chain.head, length)
        assert len({rig.ring.publish() for rig in self.rigs}) == 1
        if self.rng.randrange(3):
            assert len({tuple((used.chain.head, used.length) for used in rig.driver.reap()) for rig in self.rigs}) == 1
        if self.rng.randrange(2):
            assert len({rig.driver.want_interrupts() for rig in self.rigs}) == 1
        else:
            for rig in self.rigs:
                rig.driver.refuse_interrupts()
        if self.rng.randrange(2):
            assert len({rig.ring.enable_notify() for rig in self.rigs}) == 1
        else:
            for rig in self.rigs:
                rig.ring.disable_notify()

    def compare(self) -> None:
        """Compare everything else."""
        assert state(self.rigs[0]) == state(self.rigs[1])


@pytest.mark.slow
@pytest.mark.parametrize("feature_bits", [0, F_INDIRECT_DESC | F_EVENT_IDX], ids=["plain", "indirect_event_idx"])
@pytest.mark.parametrize(("num", "chains"), [(8, 5000), (256, 70000)])
def test_agree_over_the_wrap(rng: random.Random, num: int, chains: int, feature_bits: int) -> None:
    """Batches of random traffic agree through 65,536 (a whole round of the indices for 256 entries)."""
    with two_rigs(num, feature_bits, 0xFFFF - 2500, size=1 << 18) as rigs:
        traffic = Traffic(rng, *rigs)
        while traffic.chains < chains:
            traffic.add()
            traffic.take()
            traffic.give()
            traffic.compare()
        assert rigs[0].ring.last_avail_idx == (0xFFFF - 2500 + traffic.chains) & 0xFFFF


@pytest.mark.slow
def test_agree_on_the_largest_ring(rng: random.Random) -> None:
    """A ring of 32,768 entries, full of random descriptors, good and bad, agrees chain by chain."""
    num = 32768
    with two_rigs(num, F_INDIRECT_DESC | F_EVENT_IDX, 0x8001, size=1 << 21) as rigs:
        data = rigs[0].data
        rows = [
            pack_descriptor(
                data + i % 4096, i % 1600, rng.choice([0, 0, NEXT, NEXT | WRITE, WRITE]), rng.randrange(num)
            )
            for i in range(num)
        ]
        heads = [rng.randrange(num) for _ in range(num)]
        for rig in rigs:
            for i, raw in enumerate(rows):
                rig.driver.write_descriptor(i, raw)
            rig.offer(heads)
        results: list[tuple[object, ...]] = []
        while not results or results[-1][0] not in ("broken", "empty"):
            compiled, oracle = (pop(rig) for rig in rigs)
            assert compiled == oracle
            results.append(compiled)
        assert state(rigs[0]) == state(rigs[1])
