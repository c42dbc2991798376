"""The compiled packed ring and the plain-Python one agree on everything, whatever the driver does.

As tests/oracle/test_agree.py: two rigs are driven alike, and after every step the answers, positions and every byte of
the ring (descriptors, both event suppressions) are the same.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final, cast

import attrs
import pytest
from hypothesis import Phase, example, find, given, settings
from hypothesis import strategies as st

from tests.oracle.rig import BASE, SIZE, PackedRig
from tests.oracle.test_agree import (
    MORE,
    TABLES,
    Popped,
    Step,
    addresses,
    flags,
    lengths,
    near,
    u16,
    with_bytes,
    with_numbers,
)
from vhostmp.errors import QueueBroken
from vhostmp.tools.stress.packed import AVAIL, DESC, USED, WRAP, pack_packed
from vhostmp.tools.stress.ring import F_EVENT_IDX, F_INDIRECT_DESC, INDIRECT, NEXT, WRITE

F_NOTIFY_ON_EMPTY: Final = 1 << 24
NUMS: Final = (1, 2, 3, 5, 8, 16, 100, 256)
#: Chains given back between two publications: what workers/_vring.pxd allows.
BURST: Final = 64


def pop(rig: PackedRig) -> Popped:
    """Pop, and give what came of it as something that can be compared."""
    try:
        chain = rig.ring.pop()
    except QueueBroken:
        return ("broken", rig.ring.broken)
    return ("empty",) if chain is None else (chain.head, chain.readable, chain.writable)


class Book:
    """One rig, and the ids of the chains that its device side has, oldest first."""

    def __init__(self, rig: PackedRig) -> None:
        """Begin with none."""
        self.rig: Final = rig
        self.taken: list[int] = []
        self.staged = 0

    def position(self, ahead: int) -> int:
        """The position so many descriptors after the next one to be taken."""
        num, at = self.rig.layout.num, self.rig.ring.last_avail_idx
        round_, offset = divmod((at & ~WRAP) + ahead, num)
        return offset | (at & WRAP ^ (WRAP if round_ % 2 else 0))

    def raw(self, step: Step) -> None:
        """Write a descriptor anywhere, flags and all."""
        self.rig.driver.write_descriptor(step.numbers[0] % self.rig.layout.num, step.raw)

    def available(self, step: Step) -> None:
        """Write descriptors from where the device stands on, available to it; `ahead` may be more than a round."""
        ahead, *_ = step.numbers
        for place in range(len(step.raw) // 16):
            raw = step.raw[16 * place : 16 * place + 16]
            bits = int.from_bytes(raw[14:], "little") & ~(AVAIL | USED)
            position = self.position(ahead + place)
            bits |= AVAIL if position & WRAP else USED
            self.rig.driver.write_descriptor(position & ~WRAP, raw[:14] + bits.to_bytes(2, "little"))

    def event(self, step: Step) -> None:
        """Write the driver's event suppression, its offset near where the device is going to be."""
        ahead, bits = step.numbers
        self.rig.driver.set_driver_event(self.position(ahead) if 0 <= ahead < WRAP else ahead & 0xFFFF, bits)

    def pops(self, step: Step) -> list[Popped]:
        """Take some chains."""
        answers = [pop(self.rig) for _ in range(step.numbers[0])]
        self.taken += [answer[0] for answer in answers if isinstance(answer[0], int)]
        return answers

    def push(self, step: Step) -> None:
        """Give back one of the chains taken, mostly the oldest."""
        if self.taken and self.staged < BURST:
            self.staged += 1
            self.rig.ring.push(self.taken.pop(step.numbers[0] % len(self.taken)), step.numbers[1])

    def publish(self, _: Step) -> bool:
        """Publish."""
        self.staged = 0
        return self.rig.ring.publish()


ACTIONS: Final[dict[str, Callable[[Book, Step], object]]] = {
    "raw": Book.raw,
    "available": Book.available,
    "event": Book.event,
    "outside": lambda book, step: book.rig.driver.set_driver_event(*step.numbers),
    "table": lambda book, step: book.rig.write(step.numbers[0], step.raw),
    "pop": Book.pops,
    "push": Book.push,
    "publish": Book.publish,
    "enable": lambda book, _: book.rig.ring.enable_notify(),
    "disable": lambda book, _: book.rig.ring.disable_notify(),
}


def act(book: Book, step: Step) -> object:
    """Do a step to a rig, and give what came of it."""
    return ACTIONS[step.what](book, step)


def state(rig: PackedRig) -> tuple[object, ...]:
    """Everything else that must be the same."""
    return rig.ring.last_avail_idx, rig.ring.used_idx, rig.ring.broken, rig.ring_bytes()


@contextmanager
def two_rigs(num: int, features: int, first_idx: int, size: int = SIZE) -> Generator[tuple[PackedRig, PackedRig]]:
    """Make both rigs alike."""
    more = MORE if size == SIZE else ()
    with (
        PackedRig("cython", num, features=features, first_idx=first_idx, size=size, more=more) as compiled,
        PackedRig("oracle", num, features=features, first_idx=first_idx, size=size, more=more) as oracle,
    ):
        yield compiled, oracle


def agree(num: int, features: int, first_idx: int, steps: list[Step]) -> list[object]:
    """Do the steps to both rigs, compare after each, and return what they answered."""
    answers: list[object] = []
    with two_rigs(num, features, first_idx) as rigs:
        compiled, oracle = map(Book, rigs)
        for place, step in enumerate(steps):
            expected, got = act(oracle, step), act(compiled, step)
            assert got == expected, f"step {place}, {step}: compiled {got}, oracle {expected}"
            assert state(compiled.rig) == state(oracle.rig), f"after step {place}, {step}"
            answers.append(got)
    return answers


@st.composite
def good_descriptors(draw: st.DrawFn) -> bytes:
    """A descriptor that a decent driver could have written."""
    where = draw(st.integers(BASE + 0x4000, BASE + 0x5000))
    flag = draw(st.sampled_from([NEXT, NEXT, NEXT | WRITE, WRITE, 0, 0]))
    return pack_packed(where, draw(st.integers(0, 2000)), draw(st.one_of(st.integers(0, 15), u16)), flag)


@st.composite
def references(draw: st.DrawFn) -> bytes:
    """A descriptor that refers to an indirect table, mostly of a possible length."""
    length = draw(st.one_of(st.integers(1, 9).map(lambda n: 16 * n), st.sampled_from([0, 15, 17, 65537 * 16])))
    return pack_packed(
        draw(st.sampled_from(TABLES)), length, draw(u16), INDIRECT | draw(st.sampled_from([0, 0, WRITE]))
    )


nonsense = st.builds(pack_packed, addresses, lengths, u16, flags)
descriptors = st.one_of(*[good_descriptors()] * 6, references(), references(), nonsense)
rows = st.lists(descriptors, min_size=1, max_size=8).map(b"".join)
decent = st.builds(
    pack_packed, st.integers(BASE + 0x4000, BASE + 0x5000), st.integers(0, 2000), u16, st.sampled_from([0, WRITE])
)
offer = with_bytes("available", st.just(0), st.one_of(rows, st.lists(decent, min_size=1, max_size=12).map(b"".join)))
fill = with_bytes("table", st.sampled_from(TABLES[:4]), rows)
take = with_numbers("pop", st.integers(1, 4))
give = with_numbers("push", st.sampled_from([0, 0, 0, 1, 5]), st.one_of(st.just(0), st.integers(0, 0xFFFFFFFF)))
rare = st.one_of(
    with_bytes("available", st.integers(-4, 300), rows),
    with_bytes("raw", st.integers(0, 300), descriptors),
    with_numbers("event", near, st.sampled_from([0, 1, DESC, DESC, DESC, 3, 0xFFFF])),
)
show = st.sampled_from([Step("publish"), Step("publish"), Step("enable"), Step("disable")])
programs = st.tuples(
    fill, offer, take, st.lists(st.one_of(offer, take, give, give, show, fill, rare), max_size=40)
).map(lambda parts: [*parts[:3], *parts[3]])
features = st.sampled_from(
    [0, F_INDIRECT_DESC, F_EVENT_IDX, F_INDIRECT_DESC | F_EVENT_IDX, F_INDIRECT_DESC, F_EVENT_IDX | F_NOTIFY_ON_EMPTY]
)


@given(st.sampled_from(NUMS), features, st.integers(0, 255), st.booleans(), programs)
@example(3, F_EVENT_IDX, 2, True, [Step("event", (0, DESC)), Step("available", (0,), bytes(16)), Step("pop", (2,))])
def test_agree_on_anything(num: int, features: int, offset: int, wrap: bool, steps: list[Step]) -> None:
    """Whatever a driver does, hostile or good, wherever the ring stands, both device sides do the same."""
    agree(num, features, offset % num | (WRAP if wrap else 0), steps)


@given(
    st.integers(1, 9),
    st.integers(0, 8),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 8), st.integers(-9, 20), st.sampled_from([0, 1, DESC, DESC, DESC, 3]))),
)
def test_agree_on_interrupts(num: int, offset: int, wrap: bool, batches: list[tuple[int, int, int]]) -> None:
    """Batches of any size against any event give the same interrupts, over any number of wraps."""
    one = pack_packed(BASE + 0x4000, 64, 7, 0)
    steps = [
        step
        for count, event, bits in batches
        for step in (
            Step("event", (event, bits)),
            Step("available", (0,), one * min(count, num)),
            Step("pop", (count,)),
            *[Step("push", (0, 0))] * count,
            Step("publish"),
        )
    ]
    agree(num, F_EVENT_IDX, offset % num | (WRAP if wrap else 0), steps)


@pytest.mark.parametrize("offset", [3, 4, 100, 0x7FFF])
def test_event_outside_the_ring(offset: int) -> None:
    """An event offset that is no place of the ring asks for an interrupt: a driver may wait for something."""
    one = pack_packed(BASE + 0x4000, 64, 7, 0)
    turn = [Step("available", (0,), one), Step("pop", (1,)), Step("push", (0, 0)), Step("publish")]
    for wrap in (0, WRAP):
        steps = [*turn, Step("outside", (offset | wrap, DESC)), *turn]
        assert agree(3, F_EVENT_IDX, WRAP, steps)[-1] is True


def test_chain_into_what_is_ours() -> None:
    """A chain that goes on where the device still has a chain of the driver's is refused, though it would end there."""
    more = pack_packed(BASE + 0x4000, 64, 7, NEXT)
    steps = [
        Step("available", (0,), pack_packed(BASE + 0x4000, 64, 7, 0)),
        Step("pop", (1,)),
        Step("available", (0,), more * 3),
        Step("pop", (1,)),
    ]
    assert agree(4, 0, WRAP, steps)[-1] == [("broken", "loop")]


REACHED: Final = ("loop", "indirect", "indirect_len", "order", "address", "a chain")


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="it is not our code that is tried")
@pytest.mark.parametrize("outcome", REACHED)
def test_the_strategies_reach(outcome: str) -> None:
    """The random programs above are worth something: they reach each refusal, and good chains too."""

    def reaches(program: list[Step]) -> bool:
        with PackedRig("oracle", 2, features=F_INDIRECT_DESC, more=MORE) as rig:
            book = Book(rig)
            answers = [act(book, step) for step in program]
        popped = [result for answer in answers if isinstance(answer, list) for result in cast("list[Popped]", answer)]
        return any(
            outcome == (result[1] if result[0] == "broken" else "a chain") for result in popped if result[0] != "empty"
        )

    find(programs, reaches, settings=settings(max_examples=20_000, derandomize=True, phases=[Phase.generate]))


@attrs.define
class Traffic:
    """A decent driver's random traffic on both rigs at once, with chains of every shape."""

    rng: random.Random
    rigs: tuple[PackedRig, PackedRig]
    taken: list[tuple[int, int]] = attrs.field(factory=list[tuple[int, int]])  # id, bytes that may be written
    chains: int = 0

    def add(self) -> None:
        """Make a few chains available on both."""
        for _ in range(self.rng.randint(0, 24)):
            driver = self.rigs[0].driver
            at = self.rigs[0].data + self.rng.randrange(256)
            parts = [(at + 8 * i, self.rng.randint(0, 1500)) for i in range(self.rng.randint(1, 5))]
            cut = self.rng.randint(0, len(parts))
            direct = not self.rigs[0].features & F_INDIRECT_DESC or self.rng.randrange(2)
            if len(driver.free) < len(parts):
                break
            table = None if direct else self.rigs[0].data + 4096 + 128 * driver.next_id
            assert len({rig.driver.add(parts[:cut], parts[cut:], table=table) for rig in self.rigs}) == 1
        assert len({rig.driver.publish() for rig in self.rigs}) == 1

    def take(self) -> None:
        """Pop some on both."""
        for _ in range(self.rng.randint(0, 40)):
            compiled, oracle = (pop(rig) for rig in self.rigs)
            assert compiled == oracle
            if compiled[0] in ("empty", "broken"):
                assert compiled[0] == "empty"
                return
            writable = cast("list[tuple[int, int]]", compiled[2])
            self.taken.append((cast("int", compiled[0]), sum(size for _, size in writable)))
            self.chains += 1

    def give(self) -> None:
        """Give some back on both, now and then out of order, then let the drivers reap."""
        if not self.rng.randrange(4):
            self.rng.shuffle(self.taken)
        for _ in range(min(BURST, self.rng.randint(0, len(self.taken)))):
            head, room = self.taken.pop(0)
            length = self.rng.randint(0, room)
            for rig in self.rigs:
                rig.ring.push(head, length)
        assert len({rig.ring.publish() for rig in self.rigs}) == 1
        if self.rng.randrange(3):
            reaped = [[(used.chain.head, used.length) for used in rig.driver.reap()] for rig in self.rigs]
            assert reaped[0] == reaped[1]
        self.events()

    def events(self) -> None:
        """Change wishes on both sides."""
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


@pytest.mark.slow
@pytest.mark.parametrize("feature_bits", [0, F_INDIRECT_DESC | F_EVENT_IDX], ids=["plain", "indirect_event_idx"])
@pytest.mark.parametrize(
    ("num", "chains", "first_idx"), [(8, 3000, WRAP), (7, 3000, 6), (250, 12000, WRAP | 249), (32768, 20000, 32760)]
)
def test_agree_over_many_wraps(rng: random.Random, num: int, chains: int, first_idx: int, feature_bits: int) -> None:
    """Batches of random traffic agree over the wraps of rings of any size, also out of order; nothing is lost."""
    with two_rigs(num, feature_bits, first_idx, size=1 << 23) as rigs:
        traffic = Traffic(rng, rigs)
        while traffic.chains < chains:
            traffic.add()
            traffic.take()
            traffic.give()
            if num < WRAP or traffic.rng.randrange(50) == 0:
                assert state(rigs[0]) == state(rigs[1])
        while traffic.taken:
            traffic.give()
        for rig in rigs:
            while rig.driver.reap():
                pass
