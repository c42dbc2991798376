"""A device that outlives its control process: what is written of it before it is so, and how the next one goes on.

Theory of operation. A record of a device has the state in force with its generation and, while a flush is under way,
the state that is to come (`next`), written before the generation is published. Which of the two is in force after a
death at any instruction the control segment says: one store publishes it (flush.py). So adoption goes *forward* when
the next generation is published, and *back* when it is not; then the next control process runs a flush of its own, of
the same state, as a further generation, with all workers taken for late. That waits for whoever is still inside an
older one, gives workers what they lack, and takes away what only the other state named. It is idempotent: who is
killed in the middle of it leaves what he found.

What a ring that the dead one was stopping stands at is read once that flush is over, as after a flush that timed out.

Rules: as in device.py, whose base this is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from vhostmp import unfinished
from vhostmp.errors import LocalError, SynchronizeTimeout
from vhostmp.in_force import StateInForce
from vhostmp.parts import DeviceState, Part, Setup
from vhostmp.plain import Described, Fds, Setups, Take, describe_setup, describe_state, restore_state
from vhostmp.shm import layout
from vhostmp.shm._epoch import published
from vhostmp.shm.records import Plain

if TYPE_CHECKING:
    from vhostmp.postcopy import DevicePostcopy
    from vhostmp.supervisor import Pool

log = logging.getLogger(__name__)

Regions = frozenset[tuple[int, int, int]]


class Recorder(Protocol):
    """Whoever writes the record of a device (adoption.py)."""

    def coming(self, new: DeviceState, /) -> None:
        """Write what is in force, and what is about to be published."""
        ...

    def in_force(self) -> None:
        """Write what is in force, after a verb that no front-end has sent."""
        ...


def in_force(plain: Plain, buf: memoryview) -> Plain:
    """Return the state that is in force of a device as it was recorded. LocalError: nobody knows."""
    state: Plain = plain["state"]
    generation = published(buf, plain["slot"])
    if plain["next"] is not None and generation == plain["generation"] + 1:
        state = plain["next"]
    elif generation != plain["generation"]:
        raise LocalError(
            f"device {plain['name']} is at generation {generation}, and {plain['generation']} was recorded"
        )
    return state


def say_who_serves(plain: Plain, buf: memoryview) -> None:
    """Say in the slots of a recorded device's rings who serves them, before it is asked who has died.

    Whoever published a move may not have come to say so. As StateInForce._note_serving. LocalError as in_force.
    """
    state = in_force(plain, buf)
    for index, ring in enumerate(state["rings"]):
        group = index // plain["group_size"]
        if ring["started"] and group not in state["held"]:
            offset = layout.ring_offset(plain["first_ring"] + index)
            layout.RING.write(buf, offset, "worker", 1 + state["workers"][group])


@attrs.define
class KeptDevice:
    """What was found of a device. `makers`: see Setups. `setup`, `iotlb` and `state`: restored by `restore`."""

    plain: Plain
    take: Take
    makers: Mapping[str, Callable[[dict[str, Any], list[int]], Setup]]
    generation: int = 0
    state: DeviceState = attrs.field(init=False)
    iotlb: Part | None = None
    stopping: set[int] = attrs.field(factory=set[int])
    is_half_done: bool = False

    @property
    def slot(self) -> int:
        """Its place in the control segment."""
        return int(self.plain["slot"])

    @property
    def first_ring(self) -> int:
        """Its first ring slot."""
        return int(self.plain["first_ring"])

    @property
    def offered(self) -> int:
        """The feature bits that its guest was offered."""
        return int(self.plain["offered"])

    @property
    def own(self) -> Plain:
        """What the class of device has written."""
        own: Plain = self.plain["own"]
        return own

    @property
    def setup(self) -> Setup:
        """The back-end in force."""
        assert self.state.backend.setup is not None
        return self.state.backend.setup

    def restore(self, buf: memoryview) -> None:
        """Find out which state is in force, and make it of what was found. LocalError: nobody knows."""
        plain, self.generation = self.plain, published(buf, self.slot)
        chosen = in_force(plain, buf)
        self.is_half_done = chosen is not plain["state"]
        if plain["iotlb"] is not None:
            number: int = plain["iotlb"]["id"]
            self.iotlb = Part(
                id=number, fds=(self.take(f"iotlb.{number}.0"), self.take(f"iotlb.{number}.1")), borrowed=True
            )
        self.state = restore_state(chosen, Setups(self.makers, self.take), {}, self.take, self.iotlb)
        self.stopping = set(plain["stopping"])
        if self.is_half_done:
            before = plain["state"]["rings"]
            self.stopping |= {
                index for index, ring in enumerate(self.state.rings) if before[index]["started"] and not ring.started
            }


class RecordedDevice(StateInForce):
    """The part of a device that can be described, and go on after a death of the control process."""

    device_class: str
    postcopy: DevicePostcopy | None
    was_paged = False
    """Whether its guest came in by post-copy when the control process before us died. So on record until it is gone."""
    _setup: Setup
    _offered: int
    _owned: bool

    def __init__(self, pool: Pool, name: str, num_queues: int, group_size: int) -> None:
        """Be nowhere yet."""
        super().__init__(pool, name, num_queues, group_size)
        self._said: Final = Described()

    def describe(self, fds: Fds, new: DeviceState | None = None) -> Plain:
        """Return the device as plain data, and add the descriptors that it names; `new` is about to be published."""
        self._said.turn()
        if self.iotlb is not None:
            fds.update({f"iotlb.{self.iotlb.part.id}.{place}": fd for place, fd in enumerate(self.iotlb.part.fds)})
        return {
            "class": self.device_class,
            "name": self.name,
            "slot": self.slot,
            "first_ring": self.first_ring,
            "num_queues": self.num_queues,
            "group_size": self.group_size,
            "offered": self._offered,
            "owned": self._owned,
            "generation": self._generation,
            "stopping": sorted(self._stopping),
            "iotlb": None if self.iotlb is None else {"id": self.iotlb.part.id},
            "paged": self.is_paged,
            "own": self._own_record(),
            "setup": describe_setup(self._setup, fds),
            "state": describe_state(self._state, fds, self._said),
            "next": None if new is None else describe_state(new, fds, self._said),
        }

    @property
    def is_paged(self) -> bool:
        """Whether its guest comes in by post-copy just now: that does not survive us."""
        return self.was_paged or (self.postcopy is not None and self.postcopy.snapshot() is not None)

    def _own_record(self) -> Plain:
        """Return what the class of device has beside its state."""
        return {}

    def _go_on(self, kept: KeptDevice) -> None:
        """Take over what was found; no worker is asked yet: see `settle_adopted`."""
        self._generation = kept.generation
        self._owned = bool(kept.plain["owned"])
        self._stopping = set(kept.stopping)
        self.was_paged = bool(kept.plain["paged"])
        if self.iotlb is not None:
            running = {index for index, ring in enumerate(self._state.rings) if ring.started}
            self.iotlb.go_on(self._state.iotlb is not None, running)

    def settle_adopted(self, kept: KeptDevice) -> None:
        """End what the dead one left half done: the first flush of the new control process. VhostError as any."""
        with self._lock:
            self._unsynchronized = {worker.index for worker in self._pool.workers}
            if self._state.draining is not None and (old := self._state.draining.setup) is not None:
                self._kept_setups.append(old)
            self._note_serving()  # the dead one may have published a move, and not come to say so
            new = self._state
            if self.was_paged:  # pages that have not come read as zeros, for workers that nobody pages
                stopped = tuple(attrs.evolve(ring, started=False) for ring in new.rings)
                new = attrs.evolve(new, rings=stopped, memory=None)
            try:
                self._commit(new)
            except SynchronizeTimeout as error:
                log.warning("device %s: adopted, but %s: the pool goes on waiting for that", self.name, error)
                self._is_leaving |= self.was_paged  # what is on record must not be put in force: its front-end goes
                self._pool.settle_later(self)  # who waited for somebody inside an older state has published nothing
                return
            finally:
                if self.was_paged:  # nobody will ask where its rings stand
                    self._stopping = set()
            for index in sorted(self._stopping):  # which stays on record until it is done
                if not self._state.rings[index].started:
                    unfinished.finish(self, index)
                    self._after_stop(index)
            self._stopping = set()
            if kept.is_half_done and kept.plain["setup"]["id"] != kept.setup.id:
                self._swapped()

    def _recorded(self) -> None:
        """Take note of the end of a verb that no front-end has sent."""
        if self.recorder is not None:
            self.recorder.in_force()

    def regions_known(self) -> Regions:
        """Return what tells its memory regions apart: gpa, size, uva."""
        memory = self._state.memory
        return frozenset((r.gpa, r.size, r.uva) for r in memory.table) if memory is not None else frozenset()

    def _swapped(self) -> None:
        """Do what a class of device has to do once a new back-end is in force. Must not fail."""
