"""A control process that is killed at any step of a verb, and the one after it: adoption.py, kept_*.py, as a model.

What is in it. A front-end that has sent two messages, each in two parts, without waiting, and that takes replies. A
part is looked at as a whole, and comes off the socket in two pieces, as the kernel gives no more than one sendmsg()'s
bytes where descriptors are among them; with each piece it lowers SO_PEEK_OFF, in the same step. Each message adds a
region to the memory table, which is the kind of message that must not be done twice: adding it again is an error. A
control process that is made of single steps: what it stores in its record, in the inbox, in the control segment, what
it sends to its worker, what it writes to the outbox and from there to the socket. A worker, with a data thread that is
in and out of sections and a channel thread that does what it was asked, in order. The control process may be killed
between any two steps, and the one after it too, at any step of the adoption; so may the worker.

What lives on: the socket with what is in it and where the next look at it begins (SO_PEEK_OFF), the record, the inbox,
the outbox (a pipe), the control segment, the worker and its channel. All else is gone (`Memory`).

What must hold: no message is lost, none is done twice with effect, each is answered once and in order, and answered
as if nobody had died; a reply is never newer than what is on record; and when a front-end has the reply, no worker uses
what the message took away.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from tests.model.checker import Broken, Model, stands_for

MESSAGES: Final = 2
PARTS: Final = 2  # of a message
PIECES: Final = 2  # of a part
SIZE: Final = PARTS * PIECES  # of a message, pieces


class Table(NamedTuple):
    """A memory table: how many regions it has, and its number as a part."""

    regions: int
    part: int


class Record(NamedTuple):
    """What is on record: one write replaces it all (shm/records.py)."""

    done: int = 0
    generation: int = 0
    table: Table = Table(0, 0)
    coming: Table | None = None
    regions: int = 0  # when the last message was done
    last_part: int = 0


class Memory(NamedTuple):
    """What the control process itself knows, which dies with it. `goal`: what a flush is for."""

    done: int
    generation: int
    table: Table
    new: Table | None = None
    goal: str = ""
    regions: int = 0
    again: int = 0  # regions that the message at hand had added when a control process before us died of it
    ok: bool = True  # the reply to the message at hand
    last_part: int = 0
    late: bool = False
    waits: bool = False
    left: int = 0  # pieces in the inbox that are to be taken off the socket
    counted: int = 0  # how often we are in the word that says who waits


class Worker(NamedTuple):
    """The worker. Its channel is a queue: of questions, done in order, and of answers, read in order."""

    dead: bool = False
    inside: Table | None = None
    configs: frozenset[tuple[int, Table]] = frozenset()
    parts: frozenset[int] = frozenset()
    questions: tuple[tuple[Any, ...], ...] = ()
    answers: tuple[Any, ...] = ()


class State(NamedTuple):
    """Everything."""

    at: str
    memory: Memory | None
    taken: int  # pieces that are off the socket
    peeked: int  # SO_PEEK_OFF, in pieces
    inbox: tuple[int, int, int]  # number of the message, pieces, how many of them are being taken
    outbox: tuple[int, ...]  # replies in the pipe: the number of the message, negative: an error
    record: Record
    published: int
    worker: Worker
    replies: tuple[int, ...]  # what the front-end has
    waiters: int  # the word in the worker's slot that has it make a system call at the end of each section
    deaths: int
    worker_deaths: int


class Adopt(Model[State]):
    """The model; `bug` names one that is planted."""

    #: Bugs that can be planted, and what is then found.
    BUGS: Final = {
        "the reply before the record": "newer than what is on record",
        "taken off before it is noted": "stuck",
        "read off, not peeked": "stuck",
        "where to look is set back before what was noted is taken": "stuck",
        "what was peeked and not noted is not looked at again": "stuck",
        "the inbox is emptied before the record": "newer than what is on record",
        "a message that was done is done again": "wrong reply",
        "regions of the dead one's attempt are not known": "wrong reply",
        "the outbox is not thrown away": "wrong reply",
        "what is to come is not recorded": "in force than is on record",
        "forward without a look at the generation": "in force than is on record",
        "answers to the dead one are taken for ours": "in force than is on record",
        "what the dead one sent is never dropped": "kept for ever",
        "part numbers are given out twice": "two tables of one number",
        "the dead one still counts as waiting": "wakes somebody who is not there",
    }

    def __init__(self, bug: str = "", deaths: int = 2, worker_deaths: int = 1) -> None:
        """Be right, but for the bug."""
        assert not bug or bug in self.BUGS, bug
        self.bug = bug
        self.deaths = deaths
        self.worker_deaths = worker_deaths

    def first(self) -> State:
        """Return a device that runs, and a front-end that has sent its messages."""
        table = Table(0, 0)
        worker = Worker(configs=frozenset({(0, table)}), parts=frozenset({0}))
        return State("look", Memory(0, 0, table), 0, 0, (0, 0, 0), (), Record(), 0, worker, (), 0, 0, 0)

    # -- what must hold

    def check(self, state: State) -> str | None:
        """Look at what the worker touches, and at what was answered."""
        return self._check_replies(state) or self._check_worker(state) or self._check_rest(state)

    @staticmethod
    def _check_replies(state: State) -> str | None:
        if state.replies != tuple(range(1, len(state.replies) + 1)):
            return f"wrong reply: {state.replies}"
        if state.replies and state.record.done < state.replies[-1]:
            return "a reply is newer than what is on record"
        return None

    @staticmethod
    def _check_worker(state: State) -> str | None:
        worker, record = state.worker, state.record
        if worker.inside is not None and worker.inside.part not in worker.parts:
            return f"the worker uses table {worker.inside.part}, which it does not hold"
        if worker.inside is not None and worker.inside.regions < len(state.replies):
            return "the worker uses a table that a verb has replaced and that was answered"
        known = {record.table.regions, record.coming.regions if record.coming else -1}
        if any(table.regions not in known for generation, table in worker.configs if generation == state.published):
            return "something else is in force than is on record"
        if len({table.part for _, table in worker.configs}) < len({table for _, table in worker.configs}):
            return "two tables of one number"
        return None

    @staticmethod
    def _check_rest(state: State) -> str | None:
        if state.at != "look" or state.memory is None or state.worker.dead or state.inbox[1]:
            return None
        if rest := state.worker.parts - {state.memory.table.part}:
            return f"the worker has parts {sorted(rest)} that nobody needs: kept for ever"
        return "the worker wakes somebody who is not there, for ever" if state.waiters else None

    def ended(self, state: State) -> bool:
        """Every message is answered, and the worker uses the last table."""
        return (
            state.replies == tuple(range(1, MESSAGES + 1))
            and state.at == "look"
            and state.worker.inside == state.record.table
            and state.record.table.regions == MESSAGES
        )

    def show(self, state: State) -> str:
        """Return what matters of a state."""
        worker = "dead" if state.worker.dead else f"holds {sorted(state.worker.parts)}, uses {state.worker.inside}"
        return (
            f"{state.at}: socket -{state.taken}/{state.peeked} inbox {state.inbox} outbox {state.outbox} "
            f"{state.record} published {state.published} worker {worker} replies {state.replies}"
        )

    # -- the worker

    @stands_for("shm/epoch.h:vmp_section_enter", "workers/_loop.pyx:refresh")
    def enter(self, state: State) -> Iterator[tuple[str, State]]:
        """A work item begins."""
        worker = state.worker
        if not worker.dead and worker.inside is None:
            for generation, table in worker.configs:
                if generation == state.published:
                    yield "worker: begins a section", state._replace(worker=worker._replace(inside=table))

    @stands_for("shm/epoch.h:vmp_section_exit")
    def leave(self, state: State) -> Iterator[tuple[str, State]]:
        """It ends."""
        if state.worker.inside is not None:
            memory = state.memory._replace(waits=False) if state.memory is not None else None
            left = state._replace(worker=state.worker._replace(inside=None), memory=memory)
            yield "worker: ends its section", left

    @stands_for(
        "workers/main.py:Worker.serve_channel", "workers/main.py:Worker._prepare", "workers/main.py:Worker._retire"
    )
    def answer(self, state: State) -> Iterator[tuple[str, State]]:
        """The channel thread does what it was asked first, whoever asked."""
        worker = state.worker
        if worker.dead or not worker.questions:
            return
        question, *rest = worker.questions
        worker = worker._replace(questions=tuple(rest), answers=(*worker.answers, question[1]))
        if question[0] == "prepare":
            generation, table = question[2], question[3]
            # install(): the place of the generation two before
            others = frozenset(c for c in worker.configs if (c[0] - generation) % 2)
            worker = worker._replace(configs=others | {(generation, table)}, parts=worker.parts | {table.part})
        elif question[0] == "retire":
            generation, part = question[2], question[3]
            kept = frozenset(c for c in worker.configs if c[0] == generation)
            worker = worker._replace(configs=kept, parts=worker.parts - {part})
        elif question[0] == "drop":
            named = question[2]
            worker = worker._replace(parts=worker.parts & {named})
        yield f"worker: {question[0]}", state._replace(worker=worker)

    # -- death

    @stands_for(may_never=True)
    def control_is_killed(self, state: State) -> Iterator[tuple[str, State]]:
        """The control process is killed."""
        if state.memory is not None and state.deaths < self.deaths:
            yield "the control process is killed", state._replace(at="dead", memory=None, deaths=state.deaths + 1)

    @stands_for(may_never=True)
    def worker_is_killed(self, state: State) -> Iterator[tuple[str, State]]:
        """The worker is killed, and proved dead."""
        if not state.worker.dead and state.worker_deaths < self.worker_deaths:
            memory = state.memory._replace(waits=False) if state.memory is not None else None
            dead = state._replace(worker=Worker(dead=True), memory=memory, worker_deaths=state.worker_deaths + 1)
            yield "the worker is killed", dead

    @stands_for("vhostmp/replacer.py:replace", "vhostmp/in_force.py:resume")
    def replace(self, state: State) -> Iterator[tuple[str, State]]:
        """Between two messages, or in the middle of an adoption, a dead worker is replaced."""
        memory = state.memory
        if not state.worker.dead or memory is None:
            return
        if state.at == "look" and not state.inbox[1]:
            asked = (("prepare", "resume", memory.generation, memory.table),)
            yield "control: replaces the worker", state._replace(worker=Worker(questions=asked), at="resumed")
        if state.at == "token":
            yield "control: replaces the worker", state._replace(worker=Worker(), at="choose")

    @stands_for("vhostmp/supervisor.py:prepare")
    def resumed(self, state: State) -> Iterator[tuple[str, State]]:
        """The replacement has answered, or is dead."""
        if state.at == "resumed" and (after := self._answered(state, "resume")) is not None:
            yield "control: the replacement has answered", after._replace(at="look")

    # -- a message

    def _step(self, state: State, at: str, **memory: Any) -> State:
        assert state.memory is not None
        return state._replace(at=at, memory=state.memory._replace(**memory))

    @stands_for(
        "vhostmp/kept_transport.py:_receive_part", "vhostmp/kept_transport.py:_note", "vhostmp/kept_transport.py:_take"
    )
    def take(self, state: State) -> Iterator[tuple[str, State]]:
        """A part of a message: looked at, noted, read off the socket, noted."""
        number, size, taking = state.inbox
        memory = state.memory
        if memory is None:
            return
        after = "handle" if size + PIECES == SIZE else "look"
        begun = number if size else memory.done + 1
        if state.at == "look" and state.taken + state.peeked < MESSAGES * SIZE:
            assert not taking
            if self.bug == "read off, not peeked":
                yield "control: reads a part", state._replace(at="note", taken=state.taken + PIECES)
            else:
                yield "control: looks at a part", state._replace(at="note", peeked=state.peeked + PIECES)
        elif state.at == "note":
            if self.bug == "read off, not peeked":
                yield "control: notes it", state._replace(at=after, inbox=(begun, size + PIECES, 0))
            elif self.bug == "taken off before it is noted":
                off = state._replace(at="noted", taken=state.taken + PIECES, peeked=0)
                yield "control: takes it off the socket", off
            else:
                noted = self._step(state, "take", left=PIECES)
                yield "control: notes it", noted._replace(inbox=(begun, size + PIECES, PIECES))
        elif state.at == "noted":
            yield "control: notes it", state._replace(at=after, inbox=(begun, size + PIECES, 0))
        elif state.at == "take" and memory.left:
            yield "control: takes a piece off the socket", self._piece(state)
        elif state.at == "take":
            yield (
                "control: notes that",
                state._replace(at="handle" if size == SIZE else "look", inbox=(number, size, 0)),
            )

    def _piece(self, state: State) -> State:
        """recvmsg(): what it takes off the socket the kernel takes off SO_PEEK_OFF, unless that is 0."""
        assert state.memory is not None
        left = self._step(state, state.at, left=state.memory.left - 1)
        return left._replace(taken=state.taken + 1, peeked=max(0, state.peeked - 1))

    @stands_for("vhostmp/session.py:handle", "vhostmp/device.py:add_mem_region")
    def handle(self, state: State) -> Iterator[tuple[str, State]]:
        """The message is complete: a region is added, unless it is there; then that is an error, or was ours."""
        memory = state.memory
        if state.at != "handle" or memory is None:
            return
        number = state.inbox[0]
        if memory.table.regions >= number:
            ours = memory.again and self.bug != "regions of the dead one's attempt are not known"
            yield f"control: message {number}: it is there", self._step(state, "answer", ok=bool(ours))
            return
        new = Table(number, memory.last_part + 1)
        yield (
            f"control: message {number}",
            self._step(state, "coming", new=new, goal="answer", ok=True, last_part=new.part),
        )

    @stands_for("vhostmp/kept_transport.py:finish", "vhostmp/adoption.py:PortRecord.commit", "shm/records.py:write")
    def finish(self, state: State) -> Iterator[tuple[str, State]]:
        """The reply goes to the outbox; the record says that the message is done; the inbox is emptied; it is sent."""
        memory = state.memory
        if memory is None:
            return
        number = memory.done + 1
        early = self.bug == "the inbox is emptied before the record"
        if state.at == "answer":
            reply = number if memory.ok else -number
            after = "send early" if self.bug == "the reply before the record" else "record"
            yield "control: reply to the outbox", state._replace(at=after, outbox=(*state.outbox, reply))
        elif state.at == "send early":
            sent = state._replace(at="record", outbox=(), replies=state.replies + state.outbox)
            yield "control: sends what is in the outbox", sent
        elif state.at == "record" and early and state.inbox[1]:
            yield "control: empties the inbox", state._replace(inbox=(0, 0, 0))
        elif state.at == "record":
            record = Record(number, memory.generation, memory.table, None, memory.table.regions, memory.last_part)
            done = self._step(state, "done", done=number, regions=memory.table.regions, again=0)
            yield "control: records the message as done", done._replace(record=record)
        elif state.at == "done":
            yield "control: empties the inbox", state._replace(at="send", inbox=(0, 0, 0))
        elif state.at == "send":
            sent = state._replace(at="look", outbox=(), replies=state.replies + state.outbox)
            yield "control: sends what is in the outbox", sent

    # -- a flush

    def _ask(self, state: State, at: str, *question: Any) -> State:
        if state.worker.dead:
            return state._replace(at=at)
        worker = state.worker._replace(questions=(*state.worker.questions, question))
        return state._replace(at=at, worker=worker)

    @staticmethod
    def _wait(state: State) -> State:
        """vmp_wait_for_reader: where the worker is inside, count ourselves among those who wait for its end."""
        assert state.memory is not None
        inside = int(state.worker.inside is not None)
        memory = state.memory._replace(waits=bool(inside), counted=inside)
        return state._replace(memory=memory, waiters=state.waiters + inside)

    @staticmethod
    def _waited(state: State) -> State:
        assert state.memory is not None
        memory = state.memory._replace(counted=0)
        return state._replace(memory=memory, waiters=state.waiters - state.memory.counted)

    def _answered(self, state: State, to: str) -> State | None:
        """Take the oldest answer off; None: there is none yet."""
        worker = state.worker
        if worker.dead:
            return state
        if not worker.answers:
            return None
        del to  # an answer does not say to which question
        return state._replace(worker=worker._replace(answers=worker.answers[1:]))

    @stands_for(
        "vhostmp/kept_device.py:RecordedDevice.describe",
        "vhostmp/flush.py:flush",
        "vhostmp/flush.py:prepare",
        "shm/_epoch.pyx:publish",
        "shm/_epoch.pyx:synchronize",
        "vhostmp/flush.py:retire",
        "vhostmp/in_force.py:put",
    )
    def flush(self, state: State) -> Iterator[tuple[str, State]]:
        """Recorded as coming, prepared, published, waited for, retired."""
        memory = state.memory
        if memory is None or memory.new is None:
            return
        new, generation = memory.new, memory.generation + 1
        if state.at == "coming":
            if memory.late:
                yield "control: waits for who is late", self._wait(self._step(state, "late", late=False))
                return
            if self.bug == "what is to come is not recorded":
                yield "control: goes on", state._replace(at="prepare")
                return
            record = state.record._replace(
                generation=memory.generation,
                table=memory.table,
                coming=new,
                last_part=0 if self.bug == "part numbers are given out twice" else memory.last_part,
            )
            yield "control: records what is to come", state._replace(at="prepare", record=record)
        elif state.at == "late" and not memory.waits:
            yield "control: nobody is late", self._waited(state)._replace(at="coming")
        elif state.at == "prepare":
            yield "control: asks to prepare", self._ask(state, "prepared", "prepare", "prepare", generation, new)
        elif state.at == "prepared" and (after := self._answered(state, "prepare")) is not None:
            yield "control: it is prepared", after._replace(at="publish")
        elif state.at == "publish":
            published = self._wait(state._replace(at="synchronize", published=generation))
            yield f"control: publishes generation {generation}", published
        elif state.at == "synchronize" and not memory.waits:
            gone = memory.table.part if memory.table.part != new.part else -1
            asked = self._ask(self._waited(state), "retired", "retire", "retire", generation, gone)
            yield "control: asks to retire", asked
        elif state.at == "retired" and (after := self._answered(state, "retire")) is not None:
            over = self._step(after, memory.goal, table=new, new=None, generation=generation)
            yield "control: the flush is over", over

    # -- adoption

    @stands_for("vhostmp/adoption.py:begin", "vhostmp/adoption.py:check")
    def adopt(self, state: State) -> Iterator[tuple[str, State]]:
        """Another control process is started, reads the record, and asks the worker a question of its own."""
        if state.at != "dead":
            return
        r = state.record
        if self.bug != "the dead one still counts as waiting":
            state = state._replace(waiters=0)
        memory = Memory(r.done, r.generation, r.table, regions=r.regions, last_part=r.last_part)
        if self.bug == "answers to the dead one are taken for ours":
            yield "a control process is started", state._replace(at="choose", memory=memory)
            return
        token = state.deaths
        begun = state._replace(memory=memory)
        yield "a control process is started", self._ask(begun, "token", "token", token)

    @stands_for("workers/pool.py:take_over", "workers/processes.py:take_inventories")
    def token(self, state: State) -> Iterator[tuple[str, State]]:
        """Answers are passed over up to the one with the token."""
        worker = state.worker
        if state.at == "token" and worker.answers:
            answer, *rest = worker.answers
            mine = answer == state.deaths
            read = state._replace(worker=worker._replace(answers=tuple(rest)))
            yield "control: reads an answer", read._replace(at="choose") if mine else read

    @stands_for("vhostmp/kept_device.py:KeptDevice.restore", "vhostmp/kept_device.py:RecordedDevice.settle_adopted")
    def choose(self, state: State) -> Iterator[tuple[str, State | Broken]]:
        """Forward or back; then a flush of that same state."""
        memory, record = state.memory, state.record
        if state.at != "choose" or memory is None:
            return
        forward = record.coming is not None and state.published == record.generation + 1
        if self.bug == "forward without a look at the generation":
            forward = record.coming is not None
        elif not forward and state.published != record.generation:
            yield "control: looks which generation is in force", Broken("something else is in force than is on record")
            return
        table = record.coming if forward and record.coming is not None else record.table
        again = max(0, table.regions - record.regions)
        late = state.worker.inside is not None
        yield (
            f"control: {'forward' if forward else 'back'}",
            self._step(
                state, "coming", table=table, new=table, generation=state.published, again=again, goal="drop", late=late
            ),
        )

    @stands_for("vhostmp/adoption.py:drop_the_rest")
    def drop(self, state: State) -> Iterator[tuple[str, State]]:
        """The worker drops what the device does not name."""
        memory = state.memory
        if memory is None:
            return
        if state.at == "drop":
            if self.bug == "what the dead one sent is never dropped":
                yield "control: goes on", state._replace(at="find")
            else:
                yield "control: asks to drop the rest", self._ask(state, "dropped", "drop", "drop", memory.table.part)
        elif state.at == "dropped" and (after := self._answered(state, "drop")) is not None:
            yield "control: it is dropped", after._replace(at="find")

    @stands_for("vhostmp/kept_transport.py:KeptTransport.found")
    def find(self, state: State) -> Iterator[tuple[str, State]]:
        """The connection: what was being taken is, or is not; a message that was not done is; a reply is sent."""
        memory = state.memory
        if memory is None:
            return
        number, size, taking = state.inbox
        if state.at == "find" and taking:
            early = self.bug == "where to look is set back before what was noted is taken"
            seen = self._step(state, "set back" if early else "found", left=min(state.peeked, taking))
            yield "control: looks how much of what was noted is on the socket", seen
        elif state.at == "find":
            kept = self.bug == "what was peeked and not noted is not looked at again"
            yield "control: sets back where to look", state._replace(at="found", peeked=state.peeked if kept else 0)
        elif state.at == "set back":
            yield "control: sets back where to look", state._replace(at="found", peeked=0)
        elif state.at == "found" and memory.left:
            yield "control: takes a piece off the socket", self._piece(state)
        elif state.at == "found" and taking:
            yield "control: notes that", state._replace(inbox=(number, size, 0))
        elif state.at == "found":
            if size and (number > memory.done or self.bug == "a message that was done is done again"):
                outbox = state.outbox if self.bug == "the outbox is not thrown away" else ()
                after = "handle" if size == SIZE else "look"
                yield "control: its message was not done", state._replace(at=after, outbox=outbox)
            else:
                yield "control: no message is half done", state._replace(at="send", inbox=(0, 0, 0))
