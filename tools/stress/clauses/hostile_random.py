"""Machine-made messages, descriptors, timings and bytes: shaped like right ones, with numbers that hurt."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator

import attrs

from vhostmp.tools.stress import messages
from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.consts import ProtocolFeature, Request, has
from vhostmp.tools.stress.explore import explore
from vhostmp.tools.stress.frontend import NEED_REPLY, VERSION, message, vring
from vhostmp.tools.stress.hostile import HOLE
from vhostmp.tools.stress.link import name
from vhostmp.tools.stress.machine import BUFFERS_GPA, RINGS_GPA, Machine
from vhostmp.tools.stress.messages import Maker
from vhostmp.tools.stress.ring import DESC_BYTES, INDIRECT, NEXT, WRITE, Part
from vhostmp.tools.stress.shrink import smaller_numbers
from vhostmp.tools.stress.split import SplitDriver

SOURCE = "the other hostile clauses, mutated"
NUMBERS = (0, 1, 2, 3, 7, 8, 63, 64, 65, 255, 256, 4095, 4096, 32768, 65535, 65536, 1 << 20, 1 << 30, (1 << 31) - 1)
LARGE = (1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)
MAKERS: dict[str, Maker] = {
    one.__name__: one
    for one in (
        messages.eventfd,
        messages.memfd,
        messages.empty_memfd,
        messages.pipe,
        messages.null_device,
        messages.connected,
        messages.regular_file,
    )
}
SKIPPED = (Request.POSTCOPY_ADVISE, Request.POSTCOPY_LISTEN, Request.POSTCOPY_END)


def _number(rng: random.Random, width: int) -> int:
    """Return a number that may hurt, of so many bytes."""
    if rng.random() < 0.1:  # noqa: PLR2004
        return rng.getrandbits(8 * width)
    return rng.choice(NUMBERS if rng.random() < 0.6 else LARGE) & ((1 << 8 * width) - 1)  # noqa: PLR2004


# ---- messages


@attrs.frozen
class Sent:
    """A message."""

    request: int
    words: tuple[int, ...]
    """Its payload, as numbers of four bytes."""
    fds: tuple[str, ...] = ()
    flags: int = VERSION
    lie: int = 0
    """How much longer its header says that it is, bytes."""

    def __str__(self) -> str:
        """Return it as it stands in a report."""
        words = " ".join(f"{word:#x}" for word in self.words)
        more = f" flags {self.flags:#x}" if self.flags & ~NEED_REPLY != VERSION else ""
        lie = f" size {4 * len(self.words) + self.lie}" if self.lie else ""
        return f"{name(self.request)}({words}){more}{lie}{' with ' + ', '.join(self.fds) if self.fds else ''}"

    def smaller(self) -> Iterator[Sent]:
        """Yield simpler ones."""
        if self.lie:
            yield attrs.evolve(self, lie=0)
        if self.fds:
            yield attrs.evolve(self, fds=self.fds[1:])
        for place, word in enumerate(self.words):
            for simpler in smaller_numbers(word):
                yield attrs.evolve(self, words=(*self.words[:place], simpler, *self.words[place + 1 :]))


_WORDS = {
    Request.SET_MEM_TABLE: 10,
    Request.SET_VRING_ADDR: 10,
    Request.ADD_MEM_REG: 10,
    Request.REM_MEM_REG: 10,
    Request.IOTLB_MSG: 8,
    Request.SET_LOG_BASE: 4,
    Request.SET_INFLIGHT_FD: 6,
    Request.GET_INFLIGHT_FD: 6,
    Request.GET_CONFIG: 5,
    Request.SET_CONFIG: 5,
}


def _message(rng: random.Random) -> Sent:
    request = rng.randrange(48) if rng.random() < 0.97 else _number(rng, 4)  # noqa: PLR2004
    if request in SKIPPED:
        request = Request.SET_VRING_ENABLE
    known = {int(key): count for key, count in _WORDS.items()}
    count = known.get(request, 2) if rng.random() < 0.9 else rng.randrange(20)  # noqa: PLR2004
    words = [_number(rng, 4) for _ in range(count)]
    if words and rng.random() < 0.7:  # noqa: PLR2004 - a ring that there is, a table of one region
        words[0] = rng.randrange(2)
    if count == 10:  # noqa: PLR2004 - the upper halves of addresses
        for place in range(3, count, 2):
            words[place] = rng.choice((0, 0, words[place]))
    fds = tuple(rng.choice(list(MAKERS)) for _ in range(rng.choice((0, 0, 1, 1, 2, 9))))
    flags = VERSION | rng.choice((0, 0, 0, NEED_REPLY)) if rng.random() < 0.97 else rng.getrandbits(4)  # noqa: PLR2004
    return Sent(request, tuple(words), fds, flags, rng.choice((0,) * 30 + (4, 4096, 1 << 31)))


def _run_messages(ctx: Context, case: list[Sent]) -> None:
    offered = [one for one in ProtocolFeature if has(ctx.facts.protocol, one)]
    safe = [one for one in offered if one not in (ProtocolFeature.INBAND_NOTIFICATIONS, ProtocolFeature.XEN_MMAP)]
    machine = ctx.machine(link=ctx.link(more=safe))
    machine.good_chain()
    machine.work.kick()
    for one in case:
        data = b"".join(word.to_bytes(4, "little") for word in one.words)
        fds = [MAKERS[kind](ctx) for kind in one.fds]
        try:
            machine.link.send_raw(message(one.request, data, flags=one.flags, size=len(data) + one.lie), fds)
        except (ConnectionError, TimeoutError):
            break
        machine.work.notify()
    machine.link.sock.settimeout(0.05)
    with contextlib.suppress(EOFError, ConnectionError, TimeoutError):
        while True:
            machine.link.reply()


@clause("hostile", "random-messages", source=SOURCE, seconds=300)
def random_messages(ctx: Context) -> None:
    """Random messages on a connection with rings that run: whatever they do to it, the next one is served well."""
    explore(ctx, lambda rng: [_message(rng) for _ in range(rng.randrange(1, 20))], _run_messages, Sent.smaller)


# ---- descriptors

_BASES = {
    "buffer": BUFFERS_GPA,
    "end": BUFFERS_GPA + (4 << 20) - 64,
    "ring": RINGS_GPA,
    "hole": HOLE,
    "zero": 0,
    "top": (1 << 64) - 64,
}


@attrs.frozen
class Piece:
    """A descriptor of a chain."""

    base: str
    offset: int
    length: int
    flags: int
    following: int | None = None
    """What stands in it as the next one, if not the next one."""

    def __str__(self) -> str:
        """Return it as it stands in a report."""
        following = "" if self.following is None else f"->{self.following}"
        return f"{self.base}+{self.offset:#x},{self.length:#x},flags {self.flags}{following}"

    @property
    def part(self) -> Part:
        """What the driver makes of it."""
        return (_BASES[self.base] + self.offset) & ((1 << 64) - 1), self.length, self.flags


@attrs.frozen
class Chain:
    """A chain, or a table."""

    pieces: tuple[Piece, ...]
    table: bool = False

    def __str__(self) -> str:
        """Return it as it stands in a report."""
        return f"{'table' if self.table else 'chain'}[{' | '.join(map(str, self.pieces))}]"

    def smaller(self) -> Iterator[Chain]:
        """Yield simpler ones."""
        if self.table:
            yield attrs.evolve(self, table=False)
        for place, one in enumerate(self.pieces):
            if len(self.pieces) > 1:
                yield attrs.evolve(self, pieces=(*self.pieces[:place], *self.pieces[place + 1 :]))
            simpler = [attrs.evolve(one, length=length) for length in smaller_numbers(one.length)]
            simpler += [attrs.evolve(one, offset=offset) for offset in smaller_numbers(one.offset)]
            if one.following is not None:
                simpler.append(attrs.evolve(one, following=None))
            for other in simpler:
                yield attrs.evolve(self, pieces=(*self.pieces[:place], other, *self.pieces[place + 1 :]))


def _piece(rng: random.Random) -> Piece:
    base = rng.choice(("buffer",) * 8 + tuple(_BASES))
    offset = rng.randrange(1 << 20) & ~15 if base == "buffer" else rng.randrange(128)
    length = rng.choice((12, 16, 64, 72, 512, 1514)) if rng.random() < 0.7 else _number(rng, 4)  # noqa: PLR2004
    flags = rng.choice((0, 0, WRITE, WRITE, INDIRECT, NEXT, NEXT | WRITE, INDIRECT | NEXT, 0x10))
    following = rng.choice((None,) * 12 + (0, 1, 63, 64, 0xFFFF))
    return Piece(base, offset, length, flags, following)


def _chain(rng: random.Random) -> Chain:
    return Chain(tuple(_piece(rng) for _ in range(rng.choice((1, 1, 2, 3, 3, 5, 20)))), rng.random() < 0.3)  # noqa: PLR2004


def _run_chains(ctx: Context, case: list[Chain]) -> None:
    machine = ctx.machine()
    machine.probe()
    ring, driver = machine.work, machine.work.driver
    given: list[tuple[int, int]] = []
    books = True
    for one in case:
        if len(driver.free) < len(one.pieces):
            break
        parts = [piece.part for piece in one.pieces]
        given += [(addr, length) for addr, length, flags in parts if flags & (WRITE | INDIRECT)]
        # What an indirect piece points to may say anything, of anything: then nobody can tell.
        books &= not any(
            piece.following is not None or piece.base == "ring" or piece.flags & ~WRITE for piece in one.pieces
        )
        if one.table:
            raw = driver.pack_table(parts)
            driver.add_parts([(machine.put(raw), len(raw), INDIRECT)])
            books = False
        else:
            head = driver.add_parts(parts)
            _follow(driver, head, one)
    before = machine.memory.snapshot()
    given += [*machine.given(), (driver.avail_gpa, 4)]
    driver.publish()
    ring.notify()
    ring.quiet(0.02)
    if books:
        driver.reap()
    if not any(piece.base == "ring" and piece.flags & (WRITE | INDIRECT) for one in case for piece in one.pieces):
        ctx.unwritten(machine, before, given)
    machine.stop(ring)
    ctx.recovers(machine)


def _follow(driver: object, head: int, chain: Chain) -> None:
    if not isinstance(driver, SplitDriver):
        return
    for slot, piece in zip(driver.in_flight[head].slots, chain.pieces, strict=True):
        if piece.following is not None:
            at = driver.layout.desc + DESC_BYTES * slot + 14
            driver.buf[at : at + 2] = piece.following.to_bytes(2, "little")


@clause("hostile", "random-descriptors", source=SOURCE, rings=FORMATS, seconds=300)
def random_descriptors(ctx: Context) -> None:
    """Random chains and tables: nothing is written outside of them, the ring stops when it is told, and works again."""
    explore(ctx, lambda rng: [_chain(rng) for _ in range(rng.randrange(1, 8))], _run_chains, Chain.smaller)


# ---- timings


@attrs.frozen
class Step:
    """Something that a driver or a front-end does."""

    what: str
    ring: int = 0
    count: int = 1

    def __str__(self) -> str:
        """Return it as it stands in a report."""
        return f"{self.what}({self.ring}, {self.count})"

    def smaller(self) -> Iterator[Step]:
        """Yield simpler ones."""
        for count in smaller_numbers(self.count):
            if count:
                yield attrs.evolve(self, count=count)


STEPS = ("requests", "kicks", "disable", "enable", "restart", "memory", "wait", "storm", "stop", "again")


def _run_steps(ctx: Context, case: list[Step]) -> None:
    machine = ctx.machine()
    storms: list[threading.Thread] = []
    try:
        for one in case:
            _step(machine, one, storms)
    finally:
        for storm in storms:
            storm.join()
    ctx.recovers(machine)


def _step(machine: Machine, step: Step, storms: list[threading.Thread]) -> None:
    ring = machine.rings[step.ring % len(machine.rings)]
    match step.what:
        case "requests":
            with contextlib.suppress(IndexError, MemoryError):
                for _ in range(step.count):
                    machine.good_chain()
            machine.work.kick()
        case "kicks":
            for _ in range(step.count):
                ring.notify()
        case "enable" | "disable":
            machine.link.must(Request.SET_VRING_ENABLE, vring(ring.index, int(step.what == "enable")))
        case "restart":
            machine.restart(ring)
        case "memory":
            for _ in range(step.count):
                machine.set_mem_table()
        case "stop" if ring.running:
            machine.stop(ring)
        case "again" if not ring.running:
            machine.start(ring)
        case "storm":
            storms.append(threading.Thread(target=_storm, args=(ring.kick_fd, step.count)))
            storms[-1].start()
        case _:
            time.sleep(step.count / 10_000)


def _storm(fd: int, count: int) -> None:
    for _ in range(50 * count):
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(fd, 1)


@clause("hostile", "random-timing", source=SOURCE + "; CVE-2013-4127; CVE-2026-93782", rings=FORMATS, seconds=300)
def random_timing(ctx: Context) -> None:
    """Kicks, enabling, disabling, stopping and memory tables in any order and at any time: then all works again."""

    def make(rng: random.Random) -> list[Step]:
        return [Step(rng.choice(STEPS), rng.randrange(2), rng.randrange(1, 20)) for _ in range(rng.randrange(1, 25))]

    explore(ctx, make, _run_steps, Step.smaller)


# ---- bytes


@attrs.frozen
class Bytes:
    """Bytes with descriptors."""

    data: bytes
    fds: int = 0

    def __str__(self) -> str:
        """Return it as it stands in a report."""
        return f"{self.data[:24].hex()}{'...' if len(self.data) > 24 else ''} ({len(self.data)} bytes, {self.fds} fds)"  # noqa: PLR2004

    def smaller(self) -> Iterator[Bytes]:
        """Yield simpler ones."""
        for size in smaller_numbers(len(self.data)):
            yield attrs.evolve(self, data=self.data[:size])
        for count in smaller_numbers(self.fds):
            yield attrs.evolve(self, fds=count)


def _run_bytes(ctx: Context, case: list[Bytes]) -> None:
    link = ctx.connect()
    fd = ctx.eventfd()
    for one in case:
        with contextlib.suppress(ConnectionError, TimeoutError):
            if one.data:
                link.send_raw(one.data, [fd] * one.fds)
    link.sock.settimeout(0.01)
    with contextlib.suppress(OSError):
        link.sock.recv(4096)


@clause("hostile", "random-bytes", source=SOURCE, seconds=300)
def random_bytes(ctx: Context) -> None:
    """Random bytes in the place of messages, with descriptors: the next connection is served well."""

    def make(rng: random.Random) -> list[Bytes]:
        return [
            Bytes(rng.randbytes(rng.choice((1, 11, 12, 13, 20, 200, 4096))), rng.choice((0, 0, 1, 8)))
            for _ in range(rng.randrange(1, 12))
        ]

    explore(ctx, make, _run_bytes, Bytes.smaller)
