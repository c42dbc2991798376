"""Dirty logs as an enemy gives them. Each bit of a log is a page of guest memory; nothing is written beside a log."""

from __future__ import annotations

import os

from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.consts import Feature, ProtocolFeature, Request
from vhostmp.tools.stress.frontend import log_area, message, u64
from vhostmp.tools.stress.link import Link, Outcome
from vhostmp.tools.stress.machine import PAGE, Machine
from vhostmp.tools.stress.messages import (
    Maker,
    connected,
    directory,
    empty_memfd,
    eventfd,
    memfd,
    null_device,
    pipe,
    readonly,
    regular_file,
)
from vhostmp.tools.stress.ring import WRITE
from vhostmp.tools.stress.verdict import Failure

TOP = 1 << 64
LOG_BYTES = 1 << 15
"""Enough for a log of the memory below 1 GiB: a bit a page."""
FILE_BYTES = 1 << 20
ADDR_LOG = 1
FEW = 8


def _link(ctx: Context) -> Link:
    ctx.need_protocol(ProtocolFeature.LOG_SHMFD)
    ctx.need(Feature.LOG_ALL)
    return ctx.link(more=(ProtocolFeature.LOG_SHMFD,))


def _give(link: Link, size: int, offset: int, fds: list[int]) -> Outcome:
    """Give a log. The message has a reply of its own where the log is shared memory."""
    try:
        link.send_raw(message(Request.SET_LOG_BASE, log_area(size, offset)), fds)
        reply = link.reply()
    except (EOFError, ConnectionError):
        return Outcome.CLOSED
    except TimeoutError:
        raise Failure("no reply to SET_LOG_BASE") from None
    if reply.request != Request.SET_LOG_BASE:
        raise Failure(f"SET_LOG_BASE was answered by {reply}")
    return Outcome.REFUSED if len(reply.payload) == len(u64(0)) and reply.u64 else Outcome.ACCEPTED


def _machine(ctx: Context, link: Link | None = None) -> Machine:
    return ctx.machine(ctx.setup(features=ctx.features(Feature.LOG_ALL)), link or _link(ctx))


def _bad(id_: str, question: str, source: str, size: int, offset: int = 0, fds: tuple[Maker, ...] = (memfd,)) -> None:
    def ask(ctx: Context) -> None:
        link = _link(ctx)
        if _give(link, size, offset, [maker(ctx) for maker in fds]) is Outcome.ACCEPTED:
            raise Failure(f"a log of {size:#x} bytes at {offset:#x} was accepted")

    ask.__doc__ = question
    clause("hostile", f"log-{id_}", source=source)(ask)


_SOURCE = "vhost-user, SET_LOG_BASE"
_bad("size-zero", "A log of no bytes.", _SOURCE, 0)
_bad("wraps", "A log whose size and offset wrap.", "CVE-2020-10722", TOP - 1, 0x1000)
_bad("offset-wraps", "A log at an offset near 2^64.", "CVE-2020-10722", 0x2000, TOP - 0x1000)
_bad("beyond-file", "A log that ends behind its file.", _SOURCE, FILE_BYTES, PAGE)
_bad("huge", "A log of 2^62 bytes.", "CVE-2020-10722", 1 << 62)
_bad("no-fd", "A log without a descriptor.", _SOURCE, LOG_BYTES, fds=())
_bad("two-fds", "A log with two descriptors.", "CVE-2019-14818", LOG_BYTES, fds=(memfd, memfd))
for _kind, _maker in (
    ("read-only", readonly),
    ("pipe", pipe),
    ("null", null_device),
    ("directory", directory),
    ("socket", connected),
    ("eventfd", eventfd),
    ("empty", empty_memfd),
    ("file", regular_file),
):
    _bad(f"fd-{_kind}", f"A log in a descriptor of the wrong kind: {_kind}.", _SOURCE, LOG_BYTES, fds=(_maker,))


def _all_logged(machine: Machine) -> None:
    """Have the rings' own writes logged too."""
    for ring in machine.rings:
        address = machine.addresses(ring, flags=ADDR_LOG, log=ring.driver.used_gpa)
        machine.link.try_(Request.SET_VRING_ADDR, address)


def _write(ctx: Context, machine: Machine, rounds: int = FEW) -> None:
    del ctx
    for _ in range(rounds):
        machine.probe()


def _written_beside(ctx: Context, size: int, offset: int) -> None:
    """Give a log in the middle of a file, write to memory, and check that the file has changed nowhere else."""
    link = _link(ctx)
    region = ctx.memory().add(0, FILE_BYTES)
    machine = ctx.machine(ctx.setup(features=ctx.features()), link)
    machine.probe()
    if _give(link, size, offset, [region.fd]) is not Outcome.ACCEPTED:
        link.close()
        return
    link.must(Request.SET_FEATURES, u64(ctx.features(Feature.LOG_ALL)))
    _all_logged(machine)
    _write(ctx, machine)
    machine.stop_all()
    link.close()
    data = bytes(region.buf)
    if any(data[:offset]) or any(data[offset + size :]):
        raise Failure(f"the device wrote beside a log of {size} bytes at {offset:#x}")


@clause("hostile", "log-small", source="log smaller than guest memory; CVE-2020-10722", rings=FORMATS)
def small(ctx: Context) -> None:
    """A log too short for the memory there is: refused, or what lies beyond its end is not logged, nor written."""
    for size in (8, 40, 4096):
        _written_beside(ctx, size, 0)


@clause("hostile", "log-with-offset", source="DPDK adds the offset twice since 2024", rings=FORMATS)
def with_offset(ctx: Context) -> None:
    """A log that begins at an offset of its file: bits are set there, and nowhere else."""
    _written_beside(ctx, LOG_BYTES, PAGE)
    _written_beside(ctx, LOG_BYTES, FILE_BYTES - LOG_BYTES)


@clause("hostile", "log-all-without-log", source="vhost-user, migration")
def without_log(ctx: Context) -> None:
    """LOG_ALL, and no log: refused, or requests are done as ever."""
    link = _link(ctx)
    machine = ctx.machine(link=link)
    machine.probe()
    outcome = link.try_(Request.SET_FEATURES, u64(ctx.features(Feature.LOG_ALL)))
    if outcome is not Outcome.CLOSED:
        machine.probe()


@clause("hostile", "log-toggled-busy", source="CVE-2025-38074; vhost-user, migration", rings=FORMATS)
def toggled(ctx: Context) -> None:
    """LOG_ALL set and cleared, and logs exchanged, while requests are done: the old log is left alone."""
    link = _link(ctx)
    machine = ctx.machine(link=link)
    machine.probe()
    plain, logged = u64(ctx.features()), u64(ctx.features(Feature.LOG_ALL))
    for _ in range(20):
        region = ctx.memory().add(0, FILE_BYTES)
        if _give(link, FILE_BYTES, 0, [region.fd]) is not Outcome.ACCEPTED:
            raise Failure("a log that is right was refused")
        link.must(Request.SET_FEATURES, logged)
        machine.good_chain()
        machine.work.kick()
        link.must(Request.SET_FEATURES, plain)
        region.buf[:] = bytes(FILE_BYTES)
        machine.reset()
        machine.probe()
        if any(region.buf):
            raise Failure("a log is written to after LOG_ALL was cleared")


@clause("hostile", "log-zero-length", source="CVE-2019-14835", rings=FORMATS)
def zero_length(ctx: Context) -> None:
    """Chains of descriptors of no bytes for the device to write, while everything is logged."""
    link = _link(ctx)
    machine = ctx.machine(link=link)
    machine.probe()
    if _give(link, FILE_BYTES, 0, [ctx.memfd(FILE_BYTES)]) is not Outcome.ACCEPTED:
        raise Failure("a log that is right was refused")
    link.must(Request.SET_FEATURES, u64(ctx.features(Feature.LOG_ALL)))
    ring = machine.rings[0]
    gpa = machine.arena.take(64)
    for count in (1, 8, machine.setup.num):
        while len(ring.driver.free) < count:
            machine.reset()
        ring.driver.add_parts([(gpa, 0, WRITE)] * count)
        ctx.harmless(machine, ring)
        ctx.recovers(machine)


@clause("hostile", "log-again-and-again", source="a second log amid a migration; CVE-2020-10726's series")
def again(ctx: Context) -> None:
    """A thousand logs, one after the other: none stays."""
    link = _link(ctx)
    before = sum(ctx.process.descriptors().values()) if ctx.process else 0
    for _ in range(50):
        fd = ctx.memfd(FILE_BYTES)
        for _ in range(20):
            if _give(link, LOG_BYTES, 0, [fd]) is Outcome.CLOSED:
                raise Failure("hung up at a log that is right")
    if ctx.process and sum(ctx.process.descriptors().values()) > before + FEW:
        raise Failure("old logs stay open")
    machine = _machine(ctx, link)
    machine.probe()


@clause("hostile", "log-truncated", source="SIGBUS; mmap(2)", may_kill=True)
def truncated(ctx: Context) -> None:
    """The file of a log is truncated while it is written: a process may die of it, but not the one that listens."""
    link = _link(ctx)
    region = ctx.memfd(FILE_BYTES)
    machine = ctx.machine(link=link)
    machine.probe()
    if _give(link, FILE_BYTES, 0, [region]) is not Outcome.ACCEPTED:
        return
    link.must(Request.SET_FEATURES, u64(ctx.features(Feature.LOG_ALL)))

    os.ftruncate(region, 0)
    machine.good_chain()
    machine.work.driver.publish()
    machine.work.notify()
    machine.work.quiet(0.2)
    link.close()
