"""A memory that does what C11 permits, for a few threads that each run a few operations.

Theory of operation. A thread is a list of operations in program order. An operation is *performed* at one moment, for
all to see. A thread may perform its operations in any order, but for these: what an acquire precedes comes after it;
what precedes a release comes before it; nothing crosses a full fence; operations on the same place keep their order;
and what is computed from a value comes after the load of it. So a store may be late (the store buffer of x86), a load
early, two stores may change places (ARM), and all of that may be the compiler's doing as well.

A read-modify-write is two operations, its load an acquire and its store a release, between which nobody else writes:
that is what ARM makes of it before version 8.1 (LDAXR, STLXR), and all that C11 promises of a sequentially consistent
one to relaxed accesses beside it. A later load may pass the store, unless a fence stands between.

What is stronger here than in C11: there is one memory, so two threads never see two stores in opposite orders (x86, ARM
since version 8 and RISC-V promise that; POWER does not). What is weaker than on a processor: a branch orders nothing.

A thread that *dies* performs nothing any more, at any moment. Since its operations were performed in any permitted
order, this is a kill at any instruction of whatever the compiler made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from tests.model.checker import Broken, Model, stands_for

Registers = Mapping[str, int]
Value = int | Callable[[Registers], int]
Condition = Callable[[Registers], bool]
NONE: Final = -1


@attrs.frozen
class Op:
    """One operation. `place` is the word it is about, or says which, from registers that `needs` names."""

    kind: str
    place: str | Callable[[Registers], str] = ""
    value: Value = 0
    into: str = ""
    acquire: bool = False
    release: bool = False
    full: bool = False
    needs: tuple[str, ...] = ()
    when: Condition | None = None
    until: Callable[[int, Registers], bool] | None = None
    unless_dead: str = ""
    why: str = ""
    tag: str = ""

    @property
    def ordered(self) -> bool:
        """Whether it asks for an order."""
        return self.acquire or self.release or self.full

    def weakened(self) -> Op:
        """Return it without."""
        return attrs.evolve(self, acquire=False, release=False, full=False)


def load_relaxed(place: str, into: str, **more: Any) -> Op:
    """vmp_load_relaxed_*."""
    return Op("load", place, into=into, **more)


def load_acquire(place: str, into: str, tag: str, **more: Any) -> Op:
    """vmp_load_acquire_*."""
    return Op("load", place, into=into, acquire=True, tag=tag, **more)


def store_relaxed(place: str, value: Value, **more: Any) -> Op:
    """vmp_store_relaxed_*, or a plain store."""
    return Op("store", place, value, **more)


def store_release(place: str, value: Value, tag: str, **more: Any) -> Op:
    """vmp_store_release_*."""
    return Op("store", place, value, release=True, tag=tag, **more)


def fence_full(tag: str) -> Op:
    """vmp_fence_full."""
    return Op("fence", full=True, tag=tag)


def modify_full(place: str, change: Callable[[int], int], into: str, release: str = "", fence: str = "") -> list[Op]:
    """vmp_exchange_full_*, vmp_fetch_add_full_*: `into` has what was there before. Tags of two of its parts."""
    return [
        Op("load", place, into=into, acquire=True),
        Op("modify", place, lambda r: change(r[into]), into=into, release=True, needs=(into,), tag=release),
        fence_full(fence),
    ]


def wait_until(place: str, until: Callable[[int, Registers], bool], tag: str, **more: Any) -> Op:
    """Look with vmp_load_acquire_* again and again, until the value is as `until` wants it.

    With `into`, that register has what the first look found, where that was not as wanted.
    """
    return Op("load", place, until=until, acquire=True, tag=tag, **more)


def expect(condition: Condition, why: str, *needs: str) -> Op:
    """Nothing that a machine does: the registers are to be as the condition says."""
    return Op("expect", when=condition, why=why, needs=needs)


@attrs.frozen
class Thread:
    """A thread: its operations, whether it may die, and the word that has to be set before it begins.

    `may_wait`: it need not come to its end: what it waits for may never be.
    """

    name: str
    ops: tuple[Op, ...]
    may_die: bool = False
    starts: str = ""
    may_wait: bool = False


@attrs.frozen
class Program:
    """Threads, the words they share with their first values, and the code that it is taken from."""

    name: str
    threads: tuple[Thread, ...]
    words: Mapping[str, int]
    functions: tuple[str, ...]
    deaths: int = 0
    #: Looked at when every thread has ended: the words, and each thread's registers. Returns what is wrong.
    finally_: Callable[[Mapping[str, int], Mapping[str, Registers]], str | None] | None = None
    #: Looked at whenever it is loaded: a word with this value must not be used any more.
    dead_value: int | None = None

    def without(self, tag: str) -> Program:
        """Return the program with the order of the operations of one tag taken away."""
        return attrs.evolve(
            self,
            threads=tuple(
                attrs.evolve(thread, ops=tuple(op.weakened() if op.tag == tag else op for op in thread.ops))
                for thread in self.threads
            ),
        )

    def tags(self) -> list[str]:
        """List the tags of its ordered operations."""
        return sorted({op.tag for thread in self.threads for op in thread.ops if op.ordered and op.tag})


# The state: the words, then for each thread (operations done, as a bit mask; registers; dead), then deaths so far.
ThreadState = tuple[int, tuple[int, ...], bool]
MachineState = tuple[tuple[int, ...], tuple[ThreadState, ...], int]


class Machine(Model[MachineState]):
    """A program on that memory, as a model."""

    def __init__(self, program: Program) -> None:
        """Work out what has to wait for what. A fence is nothing to be done: it only orders the rest."""
        self.program = program
        self._places = {name: i for i, name in enumerate(program.words)}
        self._names = [sorted({op.into for op in t.ops if op.into}) for t in program.threads]
        self._before = [self._order(thread.ops) for thread in program.threads]
        self._all = [(1 << len(thread.ops)) - 1 for thread in program.threads]
        self._number = {thread.name: i for i, thread in enumerate(program.threads)}

    @staticmethod
    def _order(ops: Sequence[Op]) -> list[int]:
        """Return for each operation a mask of those that come before it."""
        masks: list[int] = []
        for j, later in enumerate(ops):
            mask = 0
            for i, op in enumerate(ops[:j]):
                same = op.place == later.place and isinstance(op.place, str) and op.place != ""
                computed = op.into != "" and op.into in later.needs
                fenced = any(between.full for between in ops[i:j])
                if op.acquire or later.release or fenced or same or computed:
                    mask |= 1 << i
            masks.append(mask)
        return masks

    def first(self) -> MachineState:
        """Return the state before anything is done."""
        threads = tuple(
            (sum(1 << i for i, op in enumerate(thread.ops) if op.kind == "fence"), (NONE,) * len(names), False)
            for thread, names in zip(self.program.threads, self._names, strict=True)
        )
        return tuple(self.program.words.values()), threads, 0

    def ended(self, state: MachineState) -> bool:
        """Whether every thread that has begun is done or dead."""
        words, threads, _ = state
        for number, (done, _, dead) in enumerate(threads):
            thread = self.program.threads[number]
            waits_in_vain = thread.may_wait and not done and not self._proved(thread.ops[0], threads)
            if waits_in_vain or (thread.starts and not words[self._places[thread.starts]]):
                continue
            if not dead and done != self._all[number]:
                return False
        return True

    def _proved(self, op: Op, threads: tuple[ThreadState, ...]) -> bool:
        return op.unless_dead != "" and threads[self._number[op.unless_dead]][2]

    def check(self, state: MachineState) -> str | None:
        """Return what is wrong once every thread has ended."""
        if self.program.finally_ is None or not self.ended(state):
            return None
        registers = {
            thread.name: dict(zip(names, values[1], strict=True))
            for thread, names, values in zip(self.program.threads, self._names, state[1], strict=True)
        }
        return self.program.finally_(dict(zip(self.program.words, state[0], strict=True)), registers)

    def show(self, state: MachineState) -> str:
        """Return the words."""
        return " ".join(f"{name}={value}" for name, value in zip(self.program.words, state[0], strict=True))

    @stands_for()
    def perform(self, state: MachineState) -> Iterator[tuple[str, MachineState | Broken]]:
        """One thread performs one operation."""
        words, threads, deaths = state
        for number, thread in enumerate(self.program.threads):
            done, values, dead = threads[number]
            if dead or done == self._all[number] or (thread.starts and not words[self._places[thread.starts]]):
                continue
            registers = dict(zip(self._names[number], values, strict=True))
            for i, op in enumerate(thread.ops):
                if done >> i & 1 or self._before[number][i] & ~done:
                    continue
                for text, after in self._perform(op, registers, words, threads):
                    if isinstance(after, Broken):
                        yield f"{thread.name}: {text}", after
                        continue
                    new_words, changed = after
                    new = (
                        done if text.startswith("looks") else done | 1 << i,
                        tuple(changed[name] for name in self._names[number]) if changed is not registers else values,
                        False,
                    )
                    others = (*threads[:number], new, *threads[number + 1 :])
                    yield f"{thread.name}: {text}", (new_words, others, deaths)

    @stands_for(may_never=True)
    def die(self, state: MachineState) -> Iterator[tuple[str, MachineState]]:
        """A thread is killed."""
        words, threads, deaths = state
        if deaths >= self.program.deaths:
            return
        for number, thread in enumerate(self.program.threads):
            done, values, dead = threads[number]
            started = not thread.starts or words[self._places[thread.starts]]
            if thread.may_die and started and not dead and done != self._all[number]:
                new = (done, values, True)
                yield f"{thread.name} is killed", (words, (*threads[:number], new, *threads[number + 1 :]), deaths + 1)

    def _perform(
        self, op: Op, registers: dict[str, int], words: tuple[int, ...], threads: tuple[ThreadState, ...]
    ) -> Iterator[tuple[str, Any]]:
        if op.kind == "expect":
            assert op.when is not None
            yield (("as expected", (words, registers)) if op.when(registers) else ("not as expected", Broken(op.why)))
            return
        if op.when is not None and not op.when(registers):
            yield f"skips {op.kind} {op.place}", (words, registers)
            return
        name = op.place if isinstance(op.place, str) else op.place(registers)
        place = self._places[name]
        there = words[place]
        if op.kind == "load":
            proved = self._proved(op, threads)
            if op.until is not None:
                if not proved and not op.until(there, registers):
                    if op.into and registers[op.into] == NONE:
                        yield f"looks at {name}: {there}", (words, {**registers, op.into: there})
                    return
                yield f"has waited for {name}: {there}" + (" (dead)" if proved else ""), (words, registers)
                return
            text = f"loads {name}: {there}" + (f" [{op.tag}]" if op.tag else "")
            if there == self.program.dead_value:
                yield text, Broken(f"{name} is used after it was retired")
            yield text, (words, {**registers, op.into: there} if op.into else registers)
            return
        value = op.value(registers) if callable(op.value) else op.value
        if op.kind == "modify" and there != registers[op.into]:
            return  # somebody else has written there: the processor tries again, and fails for good in a model
        text = f"stores {name} = {value}" + (f" [{op.tag}]" if op.tag else "")
        yield text, ((*words[:place], value, *words[place + 1 :]), registers)
