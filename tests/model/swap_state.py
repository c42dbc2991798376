"""The states of swap.py, and which of them are the same."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

RUNS, DYING, DEAD = range(3)
NOTHING, DONE, REFUSED = range(3)
#: Numbers are relative: see canonical().
OLD: Final = -9
START: Final = 10


class Config(NamedTuple):
    """What a worker prepares for a generation: the thing, the rings that it serves, and which start of them."""

    generation: int
    thing: int
    starts: tuple[int, ...]  # of each ring: its start id, 0: not served by this worker


class Worker(NamedTuple):
    """A worker process. `inside` (a section) and `applied` are its data thread's, the rest its channel thread's."""

    life: int = RUNS
    inside: bool = False
    applied: Config = Config(OLD, -1, (0, 0))
    stale: tuple[bool, ...] = (False, False)  # somebody else served the ring since this worker took it up
    slots: tuple[Config, Config] = (Config(OLD, -1, (0, 0)), Config(OLD, -1, (0, 0)))
    things: frozenset[int] = frozenset()
    asked: tuple[Any, ...] = ()  # ("prepare", configuration) or ("retire", generation, older, things)
    answer: int = NOTHING
    knows: bool = True  # a configuration was installed: before, nothing of the device is looked at (`wdevice.slot`)


class Force(NamedTuple):
    """A DeviceState: the thing, the worker of each ring, the rings that nobody serves, the start id of each ring."""

    thing: int
    workers: tuple[int, ...]
    held: frozenset[int]
    starts: tuple[int, ...]


class State(NamedTuple):
    """Everything. `at` is where the control process stands, `verb` and `new` what it is about."""

    at: str
    verb: tuple[Any, ...]
    force: Force
    new: Force | None
    generation: int
    published: int
    waits: frozenset[int]  # workers whose section synchronize() waits for
    unsynchronized: frozenset[int]
    kept: frozenset[int]
    closed: frozenset[int]  # what verbs have returned that took it out of force: its owner may have closed it
    workers: tuple[Worker, ...]
    last_thing: int


NONE: Final = Config(OLD, -1, (0, 0))
NOBODY: Final[frozenset[int]] = frozenset()


def canonical(state: State) -> State:
    """Count from what is in force, so that the model does not end: any number of verbs and deaths.

    Generations count from the published one, starts from those in force, things from the oldest that somebody still
    has. What cannot make a difference any more is forgotten: of a configuration that is neither published nor being
    prepared only that it is older; of what a sleeping worker used in an older generation nothing; and that a thing
    is closed which nobody has.
    """
    base, starts = state.published, state.force.starts
    workers = state.workers
    relevant = {state.force.thing} | state.kept
    if state.new is not None:
        relevant.add(state.new.thing)
    for worker in workers:
        relevant |= worker.things
        if worker.asked and worker.asked[0] == "prepare":
            relevant.add(worker.asked[1].thing)
        if worker.applied.generation == base or worker.inside:
            relevant.add(worker.applied.thing)
    names = {thing: place for place, thing in enumerate(sorted(relevant - {-1}))}
    names[-1] = -1

    def config(c: Config) -> Config:
        return Config(c.generation - base, names[c.thing], _relative(c.starts, starts))

    def rename(things: frozenset[int]) -> frozenset[int]:
        return frozenset(names[thing] for thing in things if thing in names)

    def one(worker: Worker) -> Worker:
        a = worker.applied
        if a.generation == base:
            applied = config(a)
        elif worker.inside:
            applied = Config(OLD, names[a.thing], _relative(a.starts, starts))
        else:
            applied = Config(OLD, -1, _relative(a.starts, starts))
        slots = [NONE, NONE]
        for slot in worker.slots:
            if slot.generation >= base:
                slots[(slot.generation - base) & 1] = config(slot)
        asked = worker.asked
        if asked and asked[0] == "prepare":
            asked = ("prepare", config(asked[1]))
        elif asked:
            asked = ("retire", asked[1] - base, asked[2], rename(asked[3]))
        stale = tuple(old and start >= START for old, start in zip(worker.stale, applied.starts, strict=True))
        return worker._replace(
            applied=applied, slots=(slots[0], slots[1]), asked=asked, stale=stale, things=rename(worker.things)
        )

    def force(f: Force) -> Force:
        return f._replace(thing=names[f.thing], starts=_relative(f.starts, starts))

    return state._replace(
        force=force(state.force),
        new=None if state.new is None else force(state.new),
        generation=state.generation - base,
        published=0,
        kept=rename(state.kept),
        closed=rename(state.closed),
        workers=tuple([one(worker) for worker in workers]),
        last_thing=len(names) - 2,
    )


def renumbered(state: State) -> State:
    """Between two verbs, give rings and workers such numbers that ring 0 is on worker 0: no code looks at numbers.

    Not in a model with a bug: its trace is to be read.
    """
    force, owners = state.force, state.force.workers
    if owners == (1, 0):

        def turned(c: Config) -> Config:
            return c._replace(starts=c.starts[::-1])

        workers = tuple(
            worker._replace(
                applied=turned(worker.applied),
                stale=worker.stale[::-1],
                slots=(turned(worker.slots[0]), turned(worker.slots[1])),
            )
            for worker in state.workers
        )
        held = frozenset(1 - ring for ring in force.held)
        return state._replace(workers=workers, force=Force(force.thing, (0, 1), held, force.starts[::-1]))
    if owners == (1, 1):
        late = frozenset(1 - number for number in state.unsynchronized)
        return state._replace(workers=state.workers[::-1], force=force._replace(workers=(0, 0)), unsynchronized=late)
    return state


def _relative(starts: tuple[int, ...], force: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([0 if not s else 1 if s < now else START + s - now for s, now in zip(starts, force, strict=True)])
