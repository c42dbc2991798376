"""The verbs of a device, its workers and their deaths, as a model: flush.py, in_force.py, steps.py, supervisor.py.

What is in it. One device with two rings, served by workers that hold *things* (a back-end or a memory table, by number)
and one configuration each for two generations (`_loop.pyx`, `install`). One control process, which does one thing at a
time, since everything there happens under the pool's lock: a verb that swaps the thing, a verb that moves a ring to
another worker, the replacement of a worker that died, or the end of what a verb gave up. A verb is taken apart at every
point at which workers may do something in between. A worker's data thread begins a section, takes up what is published,
uses it, and ends the section, at any time; its channel thread does what it was asked, at any time. It dies at any
time: first it is *dying* (killed, but still at work on another core), then dead, which is what a pidfd proves.

What must hold (design 3 and 5):

* a thing is used only by who holds it, and by nobody once the verb has returned that took it out of force;
* a ring is served by one worker at a time; who serves it again after another takes it up where that one left it;
* from everywhere there is a way to an end: every verb returns, every dead worker is replaced, every ring is served.

What is not: the order in which single words become visible (order.py), what is in the rings (journal.py), and that the
control process may die too (adopt.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from tests.model.checker import Model, stands_for
from tests.model.swap_state import (
    DEAD,
    DONE,
    DYING,
    NOBODY,
    NONE,
    NOTHING,
    REFUSED,
    RUNS,
    START,
    Config,
    Force,
    State,
    Worker,
    canonical,
    renumbered,
)


class Swap(Model[State]):
    """The model; `bug` names one that is planted."""

    #: Bugs that can be planted, and what is then found.
    BUGS: Final = {
        "the barrier does not wait for an odd reader": "does not hold",
        "a dying worker's section counts as ended": "does not hold",
        "a worker is replaced before it is proved dead": "at once",
        "retired before synchronize": "does not hold",
        "a ring moves in one generation": "where another has served it",
        "a ring moves without a new start": "where another has served it",
        "a timeout closes the old thing": "has returned",
        "a verb does not wait for who is late": "where another has served it",
        "a refusal leaves what was prepared": "kept for ever",
        "published before it is prepared": "stuck",
        "the dead are not replaced": "stuck",
        "a replacement looks before it is prepared": "stuck",
    }

    def __init__(self, bug: str = "", *, timeouts: bool = True, refusals: bool = True, moves: bool = True) -> None:
        """Be right, but for the bug."""
        assert not bug or bug in self.BUGS, bug
        self.bug = bug
        self.timeouts = timeouts
        self.refusals = refusals
        self.moves = moves

    def first(self) -> State:
        """Return the device with both rings started, one on each worker."""
        force = Force(0, (0, 1), NOBODY, (START, START))
        state = State("idle", (), force, None, 0, 0, NOBODY, NOBODY, NOBODY, NOBODY, (), 0)
        workers = tuple(
            Worker(applied=(c := self._config(force, 0, w)), slots=(c, NONE), things=frozenset({0})) for w in range(2)
        )
        return state._replace(workers=workers)

    # -- what must hold

    def check(self, state: State) -> str | None:
        """Look at what everybody who is inside a section may touch at this moment."""
        serving: dict[int, int] = {}
        for number, worker in enumerate(state.workers):
            if worker.life == DEAD or not worker.inside:
                continue
            config = worker.applied
            for ring, start in enumerate(config.starts):
                if not start:
                    continue
                if config.thing not in worker.things:
                    return f"worker {number} uses thing {config.thing}, which it does not hold"
                if config.thing in state.closed:
                    return f"worker {number} uses thing {config.thing} after the verb that took it away has returned"
                if ring in serving:
                    return f"ring {ring} is served by workers {serving[ring]} and {number} at once"
                if worker.stale[ring]:
                    return f"worker {number} goes on with ring {ring} where it once was, where another has served it"
                serving[ring] = number
        if state.at == "idle" and not state.unsynchronized:
            for number, worker in enumerate(state.workers):
                needed = {state.force.thing} if number in state.force.workers else NOBODY
                if worker.life == RUNS and not worker.things <= needed:
                    return f"worker {number} has things that nobody needs: {sorted(worker.things)}: kept for ever"
        return None

    def ended(self, state: State) -> bool:
        """All is quiet: every worker runs and every ring is served by the one that it is attached to."""
        if state.at != "idle" or state.unsynchronized or state.force.held:
            return False
        for number, worker in enumerate(state.workers):
            if worker.life != RUNS:
                return False
            served = self._config(state.force, state.published, number).starts
            if any(served) and worker.applied != self._config(state.force, state.published, number):
                return False
        return True

    def show(self, state: State) -> str:
        """Return what matters of a state."""
        workers = "  ".join(
            f"w{n}: {('', 'dying ', 'dead ')[w.life]}{'inside' if w.inside else 'out'} "
            f"generation {w.applied.generation} thing {w.applied.thing} rings {self._rings(w.applied)} "
            f"holds {sorted(w.things)}"
            for n, w in enumerate(state.workers)
        )
        return f"published {state.published}, closed {sorted(state.closed)};  {workers}"

    def canonical(self, state: State) -> State:
        """Return the state that stands for all like it. Without renumbering where there is a trace to be read."""
        if not self.bug and state.at == "idle":
            state = renumbered(state)
        return canonical(state)

    @staticmethod
    def _rings(config: Config) -> str:
        return "".join(str(ring) for ring, start in enumerate(config.starts) if start) or "-"

    @staticmethod
    def _config(force: Force, generation: int, worker: int) -> Config:
        """flush.py, configuration()."""
        starts = tuple(
            force.starts[ring] if owner == worker and ring not in force.held else 0
            for ring, owner in enumerate(force.workers)
        )
        return Config(generation, force.thing if worker in force.workers else -1, starts)

    @staticmethod
    def _with(state: State, number: int, worker: Worker, **more: object) -> State:
        workers = (*state.workers[:number], worker, *state.workers[number + 1 :])
        return state._replace(workers=workers, **more)  # type: ignore[arg-type]

    # -- the data thread of a worker

    @stands_for("shm/epoch.h:vmp_section_enter", "workers/_loop.pyx:refresh", "workers/_loop.pyx:apply")
    def enter(self, state: State) -> Iterator[tuple[str, State]]:
        """A work item begins: it takes up what is published, and serves its rings."""
        for number, worker in enumerate(state.workers):
            early = self.bug == "a replacement looks before it is prepared"
            if worker.life == DEAD or worker.inside or not (worker.knows or early):
                continue
            applied, stale = worker.applied, worker.stale
            if applied.generation != state.published:
                found = worker.slots[state.published & 1]
                applied = found if found.generation == state.published else NONE._replace(generation=state.published)
                # Another start: vring_attach reads where the ring stands from its slot in the control segment.
                stale = tuple(
                    old and start == was
                    for old, start, was in zip(stale, applied.starts, worker.applied.starts, strict=True)
                )
            after = self._with(state, number, worker._replace(inside=True, applied=applied, stale=stale))
            for ring, start in enumerate(applied.starts):
                if start:
                    after = self._served(after, ring, number)
            yield f"worker {number} begins a section, in generation {state.published}", after

    def _served(self, state: State, ring: int, by: int) -> State:
        workers = tuple(
            worker
            if number == by or not worker.applied.starts[ring]
            else worker._replace(stale=tuple(old or i == ring for i, old in enumerate(worker.stale)))
            for number, worker in enumerate(state.workers)
        )
        return state._replace(workers=workers)

    @stands_for("shm/epoch.h:vmp_section_exit", "workers/_loop.pyx:run_item", "workers/_loop.pyx:look_everywhere")
    def leave(self, state: State) -> Iterator[tuple[str, State]]:
        """The work item ends."""
        for number, worker in enumerate(state.workers):
            if worker.life != DEAD and worker.inside:
                left = self._with(state, number, worker._replace(inside=False))
                yield f"worker {number} ends its section", left._replace(waits=state.waits - {number})

    # -- the channel thread of a worker

    @stands_for("workers/main.py:Worker._prepare", "workers/_loop.pyx:install")
    def do_prepare(self, state: State) -> Iterator[tuple[str, State]]:
        """A worker makes what it lacks and installs the configuration, or refuses.

        Where several are asked the first does it first: what one does in its channel thread is nothing to another.
        """
        for number, worker in enumerate(state.workers):
            if worker.life == DEAD or not worker.asked or worker.asked[0] != "prepare":
                continue
            config: Config = worker.asked[1]
            slots = list(worker.slots)
            slots[config.generation & 1] = config
            things = worker.things | {config.thing} if config.thing >= 0 else worker.things
            done = worker._replace(asked=(), answer=DONE, things=things, slots=(slots[0], slots[1]), knows=True)
            yield f"worker {number} prepares generation {config.generation}", self._with(state, number, done)
            new = config.thing not in worker.things and config.thing >= 0
            if self.refusals and new and state.at == "prepare":
                refused = worker._replace(asked=(), answer=REFUSED)
                yield f"worker {number} refuses generation {config.generation}", self._with(state, number, refused)
            return

    @stands_for("workers/main.py:Worker._retire", "workers/_loop.pyx:forget")
    def do_retire(self, state: State) -> Iterator[tuple[str, State]]:
        """A worker drops configurations and things."""
        for number, worker in enumerate(state.workers):
            if worker.life == DEAD or not worker.asked or worker.asked[0] != "retire":
                continue
            _, generation, older, drop = worker.asked
            a, b = (
                slot if slot.generation == generation or (older and slot.generation < generation) else NONE
                for slot in worker.slots
            )
            done = worker._replace(asked=(), answer=DONE, slots=(a, b), things=worker.things - drop)
            yield f"worker {number} retires all but generation {generation}", self._with(state, number, done)
            return

    # -- death

    @stands_for(may_never=True)
    def is_killed(self, state: State) -> Iterator[tuple[str, State]]:
        """Somebody sends a signal that kills."""
        for number, worker in enumerate(state.workers):
            if worker.life == RUNS:
                yield f"worker {number} is killed", self._with(state, number, worker._replace(life=DYING))

    @stands_for()
    def ends(self, state: State) -> Iterator[tuple[str, State]]:
        """It has come to its end: its pidfd becomes readable."""
        for number, worker in enumerate(state.workers):
            if worker.life == DYING:
                dead = self._with(state, number, Worker(life=DEAD))
                yield f"worker {number} is dead", dead._replace(waits=state.waits - {number})

    # -- the control process: verbs

    @stands_for(
        "vhostmp/device.py:set_backend",
        "vhostmp/device.py:set_mem_table",
        "vhostmp/device.py:attach_worker",
        may_never=True,
    )
    def begin(self, state: State) -> Iterator[tuple[str, State]]:
        """A verb begins. What an earlier one left half done comes first: see settle."""
        if state.at != "idle" or state.unsynchronized or state.force.held:
            return
        thing = state.last_thing + 1
        swap = state._replace(verb=("swap",), last_thing=thing)
        yield f"verb: swap to thing {thing}", self._put(swap, state.force._replace(thing=thing))
        for ring in range(2) if self.moves else ():
            before = state.force.workers[ring]
            move = state._replace(verb=("move", ring, 1 - before, before))
            yield f"verb: move ring {ring} to worker {1 - before}", self._put(move, self._held(move))

    def _held(self, state: State) -> Force:
        """steps.py, held(). With the bug, served() at once."""
        _, ring, worker, _ = state.verb
        owners = tuple(worker if r == ring else owner for r, owner in enumerate(state.force.workers))
        moved = state.force._replace(workers=owners, held=state.force.held | {ring})
        return self._serve(moved, ring, worker) if self.bug == "a ring moves in one generation" else moved

    def _serve(self, force: Force, ring: int, worker: int) -> Force:
        """steps.py, served()."""
        new = 0 if self.bug == "a ring moves without a new start" else 1
        return Force(
            force.thing,
            tuple(worker if r == ring else owner for r, owner in enumerate(force.workers)),
            force.held - {ring},
            tuple(start + new if r == ring else start for r, start in enumerate(force.starts)),
        )

    @stands_for("vhostmp/in_force.py:try_to_settle", "vhostmp/in_force.py:_settle", "vhostmp/in_force.py:_commit")
    def settle(self, state: State) -> Iterator[tuple[str, State]]:
        """What a verb gave up waiting for is ended: by the next verb, or by the pool."""
        if state.at == "idle" and (state.unsynchronized or state.force.held):
            force = state.force
            for ring in force.held:
                force = self._serve(force, ring, force.workers[ring])
            yield "an earlier change is ended", self._put(state._replace(verb=("settle",)), force)

    def _put(self, state: State, new: Force) -> State:
        """in_force.py, put(): wait for who is late, then flush."""
        state = state._replace(new=new)
        if state.unsynchronized and self.bug != "a verb does not wait for who is late":
            return self._wait(state, "late", state.unsynchronized)
        return self._prepare(state)

    def _wait(self, state: State, at: str, whom: frozenset[int]) -> State:
        """synchronize(): whoever is inside now has to come out. The others have been outside since the publication."""
        inside = {number for number in whom if state.workers[number].inside and not self._gone(state.workers[number])}
        if self.bug == "the barrier does not wait for an odd reader":
            inside.clear()
        return state._replace(at=at, waits=frozenset(inside))

    def _gone(self, worker: Worker) -> bool:
        early = worker.life == DYING and self.bug == "a dying worker's section counts as ended"
        return worker.life == DEAD or early

    @staticmethod
    def _concerned(state: State) -> frozenset[int]:
        assert state.new is not None
        return frozenset(state.force.workers) | frozenset(state.new.workers) | state.unsynchronized

    def _prepare(self, state: State) -> State:
        """flush.py, prepare(): ask."""
        new = state.new
        assert new is not None
        for number in self._concerned(state):
            if (worker := state.workers[number]).life != DEAD:
                asked = ("prepare", self._config(new, state.generation + 1, number))
                state = self._with(state, number, worker._replace(asked=asked, answer=NOTHING))
        if self.bug == "published before it is prepared":
            return self._publish(state)
        return state._replace(at="prepare")

    def _answers(self, state: State) -> list[int] | None:
        """Return the answers of the workers concerned, None: not all are there. The dead give none."""
        workers = [state.workers[number] for number in self._concerned(state)]
        if any(worker.life != DEAD and worker.asked for worker in workers):
            return None
        return [worker.answer for worker in workers if worker.life != DEAD]

    @staticmethod
    def _read(state: State) -> State:
        """Take the answers off."""
        return state._replace(workers=tuple([worker._replace(answer=NOTHING) for worker in state.workers]))

    @stands_for("vhostmp/flush.py:prepare", "workers/processes.py:answer_with_fds", "shm/_epoch.pyx:publish")
    def prepared(self, state: State) -> Iterator[tuple[str, State]]:
        """All have answered: publish. A refusal ends the verb, and what was prepared is dropped."""
        if state.at != "prepare" or (answers := self._answers(state)) is None:
            return
        read = self._read(state)
        assert state.new is not None
        died = any(state.workers[number].life == DEAD for number in self._concerned(state))
        if REFUSED not in answers:
            yield f"control: all are prepared; publishes generation {state.generation + 1}", self._publish(read)
        if REFUSED in answers or (died and state.verb == ("swap",)):
            # A worker that dies of a new back-end is a refusal too; whether it did of that, nobody knows.
            yield "control: refused; workers drop it", self._retire(read, "undo", state.generation, True)

    def _publish(self, state: State) -> State:
        published = self._wait(state._replace(published=state.generation + 1), "synchronize", self._concerned(state))
        if self.bug == "retired before synchronize":
            return self._retire(published, "synchronize", published.published, False)
        return published

    def _retire(self, state: State, at: str, generation: int, older: bool) -> State:
        """flush.py, retire(): ask. `older`: the new state is dropped, not the old one."""
        assert state.new is not None
        keep, drop = (state.force, state.new) if older else (state.new, state.force)
        named = {drop.thing} | (NOBODY if older else state.kept)
        for number in self._concerned(state):
            worker = state.workers[number]
            if worker.life != DEAD:
                needed = {keep.thing} if number in keep.workers else NOBODY
                gone = frozenset(worker.things & named) - needed
                if older and self.bug == "a refusal leaves what was prepared":
                    gone = NOBODY
                asked = ("retire", generation, older, gone)
                state = self._with(state, number, worker._replace(asked=asked, answer=NOTHING))
        return state._replace(at=at)

    @stands_for("shm/_epoch.pyx:synchronize", "vhostmp/flush.py:wait_for_items", "vhostmp/flush.py:retire")
    def synchronized(self, state: State) -> Iterator[tuple[str, State]]:
        """Everybody who was inside has left, or is proved dead: the grace period is over."""
        if state.at == "late" and not state.waits:
            yield "control: nobody is late any more; asks workers to prepare", self._prepare(state)
        if state.at == "synchronize" and not state.waits and self._answers(state) is not None:
            after = self._retire(state, "retire", state.published, False)
            yield "control: the grace period is over; asks workers to retire", after

    @stands_for("vhostmp/in_force.py:put", may_never=True)
    def gives_up(self, state: State) -> Iterator[tuple[str, State]]:
        """It takes too long: the new state is in force, but a worker may still use the old one."""
        if not self.timeouts or not state.waits or state.at not in ("late", "synchronize"):
            return
        assert state.new is not None
        if state.at == "late":
            after = state._replace(at="idle", verb=(), new=None, waits=NOBODY)
            yield "control: still late, the verb fails", after
            return
        old = frozenset({state.force.thing}) - {state.new.thing}
        after = state._replace(
            at="idle",
            verb=(),
            force=state.new,
            new=None,
            generation=state.generation + 1,
            unsynchronized=self._concerned(state),
            kept=state.kept | old,
            closed=state.closed | (old if self.bug == "a timeout closes the old thing" else NOBODY),
            waits=NOBODY,
        )
        yield "control: gives up waiting; the old thing is kept", after

    @stands_for("vhostmp/in_force.py:put", "vhostmp/steps.py:move", "vhostmp/steps.py:served")
    def returns(self, state: State) -> Iterator[tuple[str, State]]:
        """All have retired: the barrier. Then the second half of a move, or the verb returns."""
        if state.at not in ("retire", "undo") or self._answers(state) is None:
            return
        read = self._read(state)._replace(at="idle", verb=(), new=None)
        assert state.new is not None
        if state.at == "undo":
            after = read._replace(closed=state.closed | ({state.new.thing} - {state.force.thing}))
            if state.verb[0] == "move" and state.force.held:
                _, ring, _, before = state.verb
                after = self._put(after._replace(verb=("back",)), self._serve(state.force, ring, before))
            yield "control: the verb fails", after
            return
        after = read._replace(
            force=state.new,
            generation=state.generation + 1,
            unsynchronized=NOBODY,
            kept=NOBODY,
            closed=state.closed | ((state.kept | {state.force.thing}) - {state.new.thing}),
        )
        if state.verb[0] == "move" and state.new.held:
            _, ring, worker, _ = state.verb
            second = after._replace(verb=state.verb)
            yield "control: the first half is done", self._put(second, self._serve(after.force, ring, worker))
        else:
            yield "control: the verb returns", after

    # -- the control process: deaths

    @stands_for(
        "vhostmp/replacer.py:replace",
        "workers/pool.py:replace",
        "shm/_epoch.pyx:end_section_of_dead",
        "workers/spawner.py:_fork",
    )
    def replace(self, state: State) -> Iterator[tuple[str, State]]:
        """A worker that is proved dead is replaced, and given its share of what is in force."""
        if state.at != "idle" or self.bug == "the dead are not replaced":
            return
        for number, worker in enumerate(state.workers):
            early = worker.life == DYING and self.bug == "a worker is replaced before it is proved dead"
            if worker.life != DEAD and not early:
                continue
            asked: tuple[Any, ...] = ()
            if number in state.force.workers:
                asked = ("prepare", self._config(state.force, state.generation, number))
            fresh = Worker(asked=asked, applied=NONE, knows=False)
            after = self._with(state, number, fresh, at=f"resume {number}")
            if early and len(state.workers) == 2:  # noqa: PLR2004
                after = after._replace(workers=(*after.workers, worker))  # two processes in one slot: both can be seen
            yield f"worker {number} is replaced", after

    @stands_for("vhostmp/in_force.py:resume", "vhostmp/supervisor.py:prepare")
    def resumed(self, state: State) -> Iterator[tuple[str, State]]:
        """The replacement has what it needs, or has died too."""
        if state.at.startswith("resume "):
            worker = state.workers[int(state.at.split()[1])]
            if worker.life == DEAD or not worker.asked:
                yield "control: the replacement has answered", self._read(state)._replace(at="idle")
