"""Clauses: what a back-end is asked, each with a name, its source, and how it is asked.

A clause is a function of a Context. It returns when the back-end passes; it raises Failure when not, and NotApplicable
when the back-end does not offer what it is about. What else it raises (an EOFError: hung up; a DeviceError: a used ring
against the rules) is a Failure too. What it opens through the context is closed after it.

    @clause("hostile", "ring-next-loop", source="CVE-2019-9547; virtio 1.3, 2.7.5.2", rings=("split",))
    def next_loop(ctx: Context) -> None:
        '''A chain that runs in a circle.'''

Rules:
- One clause, one question; its docstring is the question, one line. Its name is for ever: it stands in others' reports.
- A clause holds for any back-end. What the specifications leave open (refuse, or hang up) passes either way.
- After each clause the runner asks whether the back-end is still well, on a new connection: see runner.py.
- Chance comes from `ctx.rng` alone, so that a seed repeats it.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Self

import attrs

from vhostmp.tools.stress.blk import BlkMachine
from vhostmp.tools.stress.consts import CALM, Feature, ProtocolFeature, Request, bits, has
from vhostmp.tools.stress.iommu import Iommu
from vhostmp.tools.stress.link import DEFAULT_PROTOCOL, REJECTED, Link, Outcome, name
from vhostmp.tools.stress.machine import Machine, Ring, Setup
from vhostmp.tools.stress.memory import Memory
from vhostmp.tools.stress.net import NetMachine
from vhostmp.tools.stress.target import Facts, Target
from vhostmp.tools.stress.verdict import Failure, NotApplicable
from vhostmp.tools.stress.watch import Process

PROFILES: Final = ("good", "edge", "hostile")
FORMATS: Final = ("split", "packed")
SETTLE: Final = 0.25
"""How long nothing must happen before it is said that nothing happens, seconds."""


class Context:
    """What a clause works with."""

    def __init__(
        self,
        target: Target,
        facts: Facts,
        seed: int = 0,
        *,
        packed: bool = False,
        seconds: float = 5.0,
        process: Process | None = None,
    ) -> None:
        """`packed`: use packed rings. `seconds`: how long a clause that tries at random may go on."""
        self.target: Final = target
        self.facts: Final = facts
        self.seed: Final = seed
        self.rng: Final = random.Random(seed)
        self.packed: Final = packed
        self.seconds: Final = seconds
        self.process: Final = process
        self.stack: Final = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close what was opened."""
        self.stack.close()

    # ---- what the back-end has

    def need(self, feature: int) -> None:
        """Go on only if a feature is offered."""
        if not has(self.facts.features, feature):
            raise NotApplicable(f"{Feature(feature).name} is not offered")

    def need_protocol(self, *features: int) -> None:
        """Go on only if protocol features are offered."""
        for feature in features:
            if not has(self.facts.protocol, feature):
                raise NotApplicable(f"{ProtocolFeature(feature).name} is not offered")

    def need_echo(self) -> None:
        """Go on only if frames come back."""
        if not self.facts.echoes:
            raise NotApplicable("the back-end does not send frames back")

    def features(self, *more: int, without: Sequence[int] = ()) -> int:
        """Return what a plain driver takes of what is offered, in this clause's format of rings."""
        wanted = CALM | bits(*more) | (bits(Feature.RING_PACKED) if self.packed else 0)
        return self.facts.features & wanted & ~bits(*without)

    # ---- connections and machines

    def connect(self) -> Link:
        """Return a connection on which nothing has been said."""
        link = self.target.connect()
        self.stack.callback(link.close)
        return link

    def link(self, protocol: int | None = None, more: Iterable[int] = ()) -> Link:
        """Return a connection that has been through its handshake, with these protocol features where offered."""
        link = self.connect()
        link.handshake((DEFAULT_PROTOCOL if protocol is None else protocol) | bits(*more))
        return link

    def setup(
        self,
        *,
        features: int | None = None,
        num: int = 64,
        rings: int | None = None,
        base: int = 0,
        call: bool = True,
    ) -> Setup:
        """Return how a machine is made: by default as a plain driver would, with the fewest rings there are."""
        least = 2 if self.target.device == "net" else 1
        return Setup(
            self.features() if features is None else features, num, least if rings is None else rings, base, call
        )

    def machine(self, setup: Setup | None = None, link: Link | None = None, *, start: bool = True) -> Machine:
        """Return a machine whose rings run, unless told."""
        machine = self.target.machine(link or self.link(), setup or self.setup(), echoes=self.facts.echoes)
        self.stack.callback(machine.close)
        return machine.start_all() if start else machine

    def net(self, setup: Setup | None = None, link: Link | None = None, *, start: bool = True) -> NetMachine:
        """Return a machine with a network card."""
        machine = self.machine(setup, link, start=start)
        assert isinstance(machine, NetMachine)
        return machine

    def blk(self, setup: Setup | None = None, link: Link | None = None, *, start: bool = True) -> BlkMachine:
        """Return a machine with a disk."""
        machine = self.machine(setup, link, start=start)
        assert isinstance(machine, BlkMachine)
        return machine

    def behind(self, *, rings: int | None = None, start: bool = True) -> tuple[Machine, Iommu]:
        """Return a machine behind an IOMMU, and that; its rings run, unless told."""
        self.need(Feature.ACCESS_PLATFORM)
        self.need_protocol(ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK)
        setup = self.setup(features=self.features(Feature.ACCESS_PLATFORM), rings=rings)
        machine = self.machine(setup, self.link(more=[ProtocolFeature.BACKEND_REQ]), start=start)
        assert machine.iommu
        return machine, machine.iommu

    # ---- descriptors of all kinds

    def fd(self, fd: int) -> int:
        """Close a descriptor after the clause; return it."""
        self.stack.callback(os.close, fd)
        return fd

    def eventfd(self, value: int = 0, flags: int = os.EFD_NONBLOCK) -> int:
        """Return an eventfd."""
        return self.fd(os.eventfd(value, flags | os.EFD_CLOEXEC))

    def memfd(self, size: int) -> int:
        """Return a memory file."""
        fd = self.fd(os.memfd_create("vhostmp-stress", os.MFD_CLOEXEC))
        os.ftruncate(fd, size)
        return fd

    def memory(self) -> Memory:
        """Return guest memory that is no machine's."""
        memory = Memory()
        self.stack.callback(memory.close)
        return memory

    # ---- questions that many clauses ask

    def rejects(self, link: Link, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Outcome:
        """Send a message that must be refused, or answered by hanging up. Failure when it is accepted.

        Where the back-end cannot refuse (no REPLY_ACK) it may ignore the message.
        """
        outcome = link.try_(request, payload, fds)
        if outcome not in REJECTED and not (outcome is Outcome.SILENT and not link.acks):
            raise Failure(f"{name(request)} was {outcome}: {payload[:32].hex()}")
        return outcome

    def harmless(
        self, machine: Machine, ring: Ring, *, writable: Iterable[tuple[int, int]] = (), books: bool = True
    ) -> None:
        """Publish what was put into a ring, good or bad, and check that it harms that ring alone.

        The device may use it, stop the ring or leave it. It may write to what it was given and to `writable` (gpa,
        length) only, must return nothing that it was not given (without `books` nobody can tell), must answer on its
        connection, and stop the ring when told.
        """
        before = machine.memory.snapshot()
        given = [*writable, *machine.given(), (ring.driver.avail_gpa, 4)]  # flags and index: `publish` writes them
        ring.driver.publish()
        ring.notify()
        ring.quiet(SETTLE)
        try:
            if books:
                ring.driver.reap()
        except AssertionError as error:
            raise Failure(f"ring {ring.index}: {error}") from None
        self.unwritten(machine, before, given)
        try:
            machine.link.get_u64(Request.GET_FEATURES)
        except Failure as why:
            raise Failure(f"after a bad ring: {why}") from None
        machine.stop(ring)
        after = machine.memory.snapshot()
        ring.notify()
        ring.quiet(SETTLE / 5)
        self.unwritten(machine, after, machine.given())

    def unwritten(self, machine: Machine, before: dict[int, bytes], allowed: Iterable[tuple[int, int]] = ()) -> None:
        """Check that memory is as it was in a snapshot, but for `allowed`."""
        bad = machine.memory.written(before, allowed)
        if bad:
            raise Failure(f"the device wrote to memory it was not given: {', '.join(map(hex, bad[:4]))}")

    def recovers(self, machine: Machine) -> None:
        """Check that all works again after the rings were set up anew, on the same connection: a driver's reset."""
        machine.reset()
        machine.probe()


Ask = Callable[[Context], None]


@attrs.frozen
class Clause:
    """A question to a back-end."""

    id: str
    profile: str
    source: str
    """Where it is written, or which published bug it is of."""
    ask: Ask
    devices: tuple[str, ...] = ("net", "blk", "rng")
    """Classes of devices that it can be asked of."""
    packed: bool = False
    """Whether it is asked with packed rings."""
    may_kill: bool = False
    """Whether a process of the back-end's may end for it, as long as the one that listens lives on."""
    seconds: float = 20.0
    """How long it may take."""

    @property
    def question(self) -> str:
        """What is asked: the first line of the docstring."""
        return (self.ask.__doc__ or self.id).strip().splitlines()[0]


CLAUSES: Final[dict[str, Clause]] = {}
"""All there are, by name, in the order in which they are asked."""


def register(new: Clause) -> None:
    """Add a clause. ValueError when its name is taken or its profile unknown."""
    if new.id in CLAUSES or new.profile not in PROFILES:
        raise ValueError(f"clause {new.id} of profile {new.profile}: the name is taken, or there is no such profile")
    CLAUSES[new.id] = new


def clause(
    profile: str,
    id_: str,
    *,
    source: str,
    rings: Sequence[str] = (),
    devices: Sequence[str] = ("net", "blk", "rng"),
    may_kill: bool = False,
    seconds: float = 20.0,
) -> Callable[[Ask], Ask]:
    """Make a function a clause; with `rings` one for each of these formats, named ID.FORMAT."""

    def decorate(ask: Ask) -> Ask:
        for form in rings or ("",):
            register(
                Clause(
                    f"{id_}.{form}" if form else id_,
                    profile,
                    source,
                    ask,
                    tuple(devices),
                    packed=form == "packed",
                    may_kill=may_kill,
                    seconds=seconds,
                )
            )
        return ask

    return decorate
