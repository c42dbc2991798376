"""Torture of the read-copy-update domain across processes.

Readers in processes of their own dereference what the published generation stands for, in shared memory, and check it
word by word. The updater publishes the next one, waits with synchronize() and poisons the one before. A reader that
ever sees poison, or an element more than one grace period old, has shown synchronize() to be wrong. The self-tests
break the update side and the read side on purpose: each must be caught, else the torture proves nothing.

SECONDS=30 pytest tests/torture runs it for longer.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Protocol, cast

import attrs
import pytest

from tests import native
from tests.helpers import PATIENCE, TORTURE_SECONDS, process_state, wait_until
from tests.torture.processes import Child
from vhostmp.errors import SynchronizeTimeout
from vhostmp.shm import _epoch, layout
from vhostmp.shm.segment import Segment

ELEMENTS: Final = 4  # as in _reader.pyx
WORDS: Final = 8
POISON: Final = 0xDEAD_BEEF_DEAD_BEEF
STOP_WORD: Final = 0
RESULT_WORD: Final = 16  # each reader has 16 words: sections, poisoned, age 0, 1, 2 and more
FIRST_WORD: Final = 256
TIMEOUT_NS: Final = int(PATIENCE * 1e9)
#: How long the torture goes on at the most, seconds: two processes have to meet in an instant, on a machine that may be
#: busy with something else. Where they have processors to themselves what is looked for is found within milliseconds.
LONGEST: Final = TORTURE_SECONDS + 120
FEWEST: Final = 100  # generations and sections: with fewer the torture has not happened
AS_IT_IS, LOADS_TOO_EARLY, NO_FENCE, READS_TOO_LATE, PASSES, KEEPS_OVER_PASS = range(6)  # modes of the compiled reader


class Reader(Protocol):
    """The compiled module, see _reader.pyx."""

    @property
    def run(self) -> Callable[[memoryview, int, memoryview, int, int, int, int, int], None]:
        """Read until the stop word."""
        ...

    @property
    def sleep(self) -> Callable[[memoryview, int], None]:
        """Sleep as long as the section of a slot lasts, until somebody wakes us."""
        ...

    @property
    def update(self) -> Callable[[memoryview, int, memoryview, int, int, int, bool], int]:
        """Update some turns."""
        ...


Synchronize = Callable[[memoryview, Sequence[tuple[int, int]], int], int]


@pytest.fixture(scope="module")
def reader() -> Reader:
    """Return the compiled reader loop."""
    return cast("Reader", native.load(Path(__file__).with_name("_reader.pyx")))


@pytest.fixture
def control() -> Iterator[Segment]:
    """Return a control segment."""
    with Segment.create(layout.SEGMENT_SIZE, header=True) as segment:
        yield segment


@attrs.frozen
class Counts:
    """What the readers counted: sections, sections that saw poison, and sections by age of what they held."""

    sections: int
    poisoned: int
    age_0: int
    age_1: int
    age_2: int


class Torture:
    """Readers in processes, the updater here."""

    def __init__(self, control: Segment, data: Segment, synchronize: Synchronize) -> None:
        """Publish generation 0 in device slot 0; nobody reads yet."""
        self.control = control
        self.buf = data.buf
        self.words = data.buf.cast("Q")
        self.synchronize = synchronize
        self.children: list[Child] = []
        self.generation = 0
        self.grace_ns: list[int] = []
        self.fill(0, 0)

    def add(self, stack: ExitStack, run: Callable[[int], None]) -> None:
        """Start a reader process that calls `run` with its slot number."""
        slot = len(self.children)
        self.children.append(stack.enter_context(Child(lambda: run(slot))))
        layout.WORKER.write(self.control.buf, layout.worker_offset(slot), "pid", self.children[-1].pid)

    def element(self, generation: int) -> slice:
        """Return where the element of a generation stands, in words."""
        start = FIRST_WORD + WORDS * (generation % ELEMENTS)
        return slice(start, start + WORDS)

    def fill(self, generation: int, value: int) -> None:
        """Write every word of an element."""
        self.words[self.element(generation)] = memoryview(struct.pack("=Q", value) * WORDS).cast("Q")

    def update(self) -> None:
        """One turn of the updater: prepare, publish, synchronize, retire."""
        self.fill(self.generation + 1, self.generation + 1)
        self.generation += 1
        _epoch.publish(self.control.buf, 0, self.generation)
        readers = [(slot, child.pidfd) for slot, child in enumerate(self.children)]
        self.grace_ns.append(self.synchronize(self.control.buf, readers, TIMEOUT_NS))
        self.fill(self.generation - 1, POISON)

    def counts(self) -> Counts:
        """Add up what the readers have counted so far."""
        slots = range(1, 1 + len(self.children))
        return Counts(*(sum(self.words[RESULT_WORD * slot + place] for slot in slots) for place in range(5)))

    def compiled_reader(self, reader: Reader, slot: int, mode: int) -> None:
        """Child: read in a tight compiled loop, each element three times a section."""
        reader.run(self.control.buf, slot, self.buf, FIRST_WORD, RESULT_WORD * (1 + slot), STOP_WORD, mode, 3)

    def python_reader(self, slot: int) -> None:
        """Child: read as the compiled reader does, through ReaderSlot: slowly, with long sections."""
        section = _epoch.ReaderSlot(self.control.buf, slot)
        results = RESULT_WORD * (1 + slot)
        while not self.words[STOP_WORD]:
            section.enter()
            generation = section.published(0)
            expected = struct.pack("=Q", generation) * WORDS
            start = 8 * self.element(generation).start
            bad = any(bytes(self.buf[start : start + 8 * WORDS]) != expected for _ in range(20))
            age = _epoch.published(self.control.buf, 0) - generation
            section.exit()
            self.words[results] += 1
            self.words[results + 1] += bad
            self.words[results + 2 + min(age, 2)] += 1

    def run(self, until: Callable[[Counts], bool]) -> Counts:
        """Update until the condition holds, at the latest when time is up, and let the readers end."""
        first = [RESULT_WORD * (1 + slot) for slot in range(len(self.children))]
        wait_until(lambda: all(self.words[word] for word in first), what="every reader to read once")
        limit = time.monotonic() + LONGEST
        while not until(self.counts()) and time.monotonic() < limit:
            for _ in range(16):
                self.update()
        self.words[STOP_WORD] = 1
        for child in self.children:
            assert child.wait() == 0
        grace = sorted(self.grace_ns)
        print(f"generations {self.generation}, {self.counts()}")
        print(f"grace period us: median {grace[len(grace) // 2] / 1e3:.1f}, maximum {grace[-1] / 1e3:.1f}")
        return self.counts()


def torture(
    control: Segment,
    reader: Reader,
    until: Callable[[Counts], bool],
    *,
    synchronize: Synchronize = _epoch.synchronize,
    modes: Sequence[int] = (AS_IT_IS, AS_IT_IS),
) -> Counts:
    """Run compiled readers of the given modes and a Python one against the updater until the condition holds."""
    with Segment.create(1 << 16) as data, ExitStack() as stack:
        run = Torture(control, data, synchronize)
        stack.callback(run.words.release)
        for mode in modes:
            run.add(stack, lambda slot, mode=mode: run.compiled_reader(reader, slot, mode))  # type: ignore[misc]
        run.add(stack, run.python_reader)
        return run.run(until)


def after(seconds: float, enough: Callable[[Counts], bool]) -> Callable[[Counts], bool]:
    """Return a condition that holds once that much time has passed since the first look, with enough seen."""
    begun: list[float] = []

    def is_over(found: Counts) -> bool:
        begun.append(time.monotonic())
        return begun[-1] - begun[0] > seconds and enough(found)

    return is_over


def is_torture(found: Counts) -> bool:
    """Whether readers have been inside a section while a generation was published."""
    return found.sections > FEWEST and found.age_1 > 0


@pytest.mark.parametrize("mode", [AS_IT_IS, PASSES], ids=["as_it_is", "passes"])
def test_no_use_after_retire(control: Segment, reader: Reader, mode: int) -> None:
    """Under full load no reader sees what has been retired, and none sees anything older than one grace period."""
    counts = torture(control, reader, after(TORTURE_SECONDS, is_torture), modes=(mode, mode))
    assert (counts.poisoned, counts.age_2) == (0, 0)
    assert is_torture(counts), "no reader was inside a section while a generation was published: no torture"


def test_synchronize_that_does_not_wait_is_caught(control: Segment, reader: Reader) -> None:
    """The torture finds a synchronize() that returns at once."""
    counts = torture(control, reader, lambda found: found.poisoned > 0, synchronize=lambda _buf, _readers, _ns: 0)
    assert counts.poisoned > 0


@pytest.mark.parametrize(
    "mode",
    [LOADS_TOO_EARLY, READS_TOO_LATE, KEEPS_OVER_PASS],
    ids=["loads_too_early", "reads_too_late", "keeps_over_pass"],
)
def test_broken_read_side_is_caught(control: Segment, reader: Reader, mode: int) -> None:
    """The torture finds readers that load the generation before they enter, or use it still after they left."""
    counts = torture(control, reader, lambda found: found.poisoned > 0, modes=(mode, mode))
    assert counts.poisoned > 0


def test_publish_after_synchronize_is_caught(control: Segment, reader: Reader) -> None:
    """The torture finds an updater that waits for a grace period first and publishes then."""
    with pytest.MonkeyPatch.context() as patch:
        publish = _epoch.publish
        published: list[tuple[memoryview, int, int]] = []

        def later(buf: memoryview, device: int, generation: int) -> None:
            published.append((buf, device, generation))

        patch.setattr(_epoch, "publish", later)

        def synchronize(buf: memoryview, readers: Sequence[tuple[int, int]], timeout_ns: int) -> int:
            grace_ns = _epoch.synchronize(buf, readers, timeout_ns)
            publish(*published.pop())
            return grace_ns

        counts = torture(control, reader, lambda found: found.poisoned > 0, synchronize=synchronize)
    assert counts.poisoned > 0


def litmus(control: Segment, reader: Reader, mode: int, fenced: bool, until: Callable[[Counts], bool]) -> Counts:
    """One compiled reader against the compiled updater, each as tight as can be."""
    with Segment.create(1 << 16) as data, ExitStack() as stack:
        run = Torture(control, data, _epoch.synchronize)
        stack.callback(run.words.release)
        run.add(stack, lambda slot: run.compiled_reader(reader, slot, mode))
        limit = time.monotonic() + LONGEST
        while not until(run.counts()) and time.monotonic() < limit:
            run.generation = reader.update(control.buf, 1, data.buf, FIRST_WORD, run.generation, 1000, fenced)
        run.words[STOP_WORD] = 1
        assert run.children[0].wait() == 0
        print(f"generations {run.generation}, {run.counts()}")
        return run.counts()


def is_litmus(found: Counts) -> bool:
    """Whether there were sections."""
    return found.sections > FEWEST


two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a store is late for another core only")  # noqa: PLR2004


def test_fences(control: Segment, reader: Reader) -> None:
    """With the fences in place a reader and an updater as tight as can be never miss each other."""
    counts = litmus(control, reader, AS_IT_IS, True, after(TORTURE_SECONDS, is_litmus))
    assert (counts.poisoned, counts.age_2) == (0, 0)
    assert is_litmus(counts)


@two_cores
@pytest.mark.parametrize(("mode", "fenced"), [(NO_FENCE, True), (AS_IT_IS, False)], ids=["reader", "updater"])
def test_missing_fence_is_caught(control: Segment, reader: Reader, mode: int, fenced: bool) -> None:
    """Without the fence on either side they do: the reader's store or the updater's is still on its way."""
    assert litmus(control, reader, mode, fenced, lambda found: found.poisoned > 0).poisoned > 0


def inside(control: Segment, ready: int) -> None:
    """Child: enter a section of slot 0, say so, and stay there."""
    slot = _epoch.ReaderSlot(control.buf, 0)
    layout.WORKER.write(control.buf, layout.worker_offset(0), "pid", os.getpid())
    slot.enter()
    os.write(ready, b"!")
    while True:
        time.sleep(PATIENCE)


@pytest.fixture
def stuck(control: Segment) -> Iterator[Child]:
    """Return a process that is inside a section of slot 0."""
    read, write = os.pipe()
    try:
        with Child(lambda: inside(control, write)) as child:
            assert os.read(read, 1) == b"!"
            yield child
    finally:
        os.close(read)
        os.close(write)


def sequence(control: Segment, slot: int = 0) -> int:
    """Return a slot's sequence number."""
    return layout.WORKER.read(control.buf, layout.worker_offset(slot), "seq")


def waiters(control: Segment, slot: int = 0) -> int:
    """Return how many synchronize() calls wait for a slot."""
    return layout.WORKER.read(control.buf, layout.worker_offset(slot), "waiters")


class Waiter(threading.Thread):
    """synchronize() in a thread."""

    def __init__(self, control: Segment, readers: Sequence[tuple[int, int]]) -> None:
        """Start waiting for `readers`, and see that it waits for slot 0."""
        super().__init__()
        self._control = control
        self._readers = readers
        self.error: Exception | None = None
        self.start()
        wait_until(lambda: waiters(control) > 0, what="synchronize() to wait")

    def run(self) -> None:
        """Wait."""
        try:
            _epoch.synchronize(self._control.buf, self._readers, TIMEOUT_NS)
        except SynchronizeTimeout as error:
            self.error = error

    def finish(self) -> None:
        """Wait until synchronize() has returned; raise what it raised."""
        self.join(2 * PATIENCE)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def test_dead_reader_does_not_block(control: Segment, stuck: Child) -> None:
    """A reader killed inside its section is proved dead by its pidfd; its slot can be cleared for the next one."""
    stuck.kill()
    started = time.monotonic()
    _epoch.synchronize(control.buf, [(0, stuck.pidfd)], TIMEOUT_NS)
    assert time.monotonic() - started < PATIENCE / 2
    assert sequence(control) % 2 == 1
    stuck.wait()
    _epoch.end_section_of_dead(control.buf, 0)
    assert sequence(control) % 2 == 0
    _epoch.synchronize(control.buf, [(0, -1)], 0)


def test_reader_dies_while_waited_for(control: Segment, stuck: Child) -> None:
    """synchronize() that already sleeps on a reader notices its death."""
    waiter = Waiter(control, [(0, stuck.pidfd)])
    stuck.kill()
    waiter.finish()
    assert waiters(control) == 0


def test_stuck_reader_is_named(control: Segment, stuck: Child) -> None:
    """A reader stopped inside its section is an error that names its pid; once it is gone the wait succeeds."""
    stuck.stop()
    layout.WORKER.write(control.buf, layout.worker_offset(0), "doing", 1 + 7)
    started = time.monotonic()
    with pytest.raises(SynchronizeTimeout, match=rf"pid {stuck.pid}\b.*ring 7\b"):
        _epoch.synchronize(control.buf, [(0, stuck.pidfd)], 50_000_000)
    assert 0.05 <= time.monotonic() - started < PATIENCE / 2  # noqa: PLR2004 (the 50 ms above)
    assert process_state(stuck.pid) == "T"
    assert waiters(control) == 0
    stuck.kill()
    _epoch.synchronize(control.buf, [(0, stuck.pidfd)], TIMEOUT_NS)


def test_waiter_is_woken(control: Segment, reader: Reader) -> None:
    """A reader that leaves wakes whoever sleeps on its slot, where the updater says that somebody does.

    The updater itself looks again every 2 ms; the other sleeper has nothing but the wake-up.
    """
    slot = _epoch.ReaderSlot(control.buf, 0)
    slot.enter()
    waiter = Waiter(control, [(0, -1)])
    with Child(lambda: reader.sleep(control.buf, 0)) as sleeper:
        wait_until(lambda: process_state(sleeper.pid) == "S", what="the other one to sleep")
        slot.exit()
        assert sleeper.wait() == 0
    waiter.finish()
    assert waiters(control) == 0


def test_sections_that_begin_later_are_not_waited_for(control: Segment) -> None:
    """A reader that leaves and enters again at once has left: the updater does not wait for the new section."""
    slot = _epoch.ReaderSlot(control.buf, 0)
    slot.enter()
    waiter = Waiter(control, [(0, -1)])
    slot.exit()
    slot.enter()
    waiter.finish()
    assert sequence(control) % 2 == 1
    slot.exit()


def test_each_reader_is_waited_for(control: Segment, stuck: Child) -> None:
    """One reader inside is enough to wait, wherever it stands in the list, whatever the others do."""
    others = [(slot, -1) for slot in range(1, 4)]
    for readers in ([(0, stuck.pidfd), *others], [*others, (0, stuck.pidfd)]):
        with pytest.raises(SynchronizeTimeout):
            _epoch.synchronize(control.buf, readers, 1_000_000)
    _epoch.synchronize(control.buf, others, 0)


def test_closed_pidfd_proves_nothing(control: Segment, stuck: Child) -> None:
    """A pidfd that is not open any more is no proof of death: the reader inside is still waited for."""
    closed = os.dup(stuck.pidfd)
    os.close(closed)
    with pytest.raises(SynchronizeTimeout):
        _epoch.synchronize(control.buf, [(0, closed)], 10_000_000)
