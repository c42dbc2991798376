"""Regions of what is in flight, as an enemy gives them (vhost-user, "Inflight I/O tracking")."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Final

from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.consts import ProtocolFeature, Request
from vhostmp.tools.stress.frontend import inflight
from vhostmp.tools.stress.link import Link, Outcome
from vhostmp.tools.stress.machine import Machine
from vhostmp.tools.stress.messages import (
    Maker,
    Row,
    connected,
    directory,
    eventfd,
    memfd,
    null_device,
    pipe,
    readonly,
    regular_file,
    table,
)
from vhostmp.tools.stress.verdict import Failure, NotApplicable

FEATURE = (ProtocolFeature.INFLIGHT_SHMFD,)
SOURCE = "vhost-user, SET_INFLIGHT_FD"
TOP = 1 << 64
SIZE = struct.Struct("=QQHH")


def _row(id_: str, question: str, source: str, *payloads: bytes, fds: tuple[Maker, ...] = (memfd,)) -> Row:
    return Row(
        f"inflight-{id_}", question, source, Request.SET_INFLIGHT_FD, payloads, fds, protocol=FEATURE, stopped=True
    )


_RIGHT = inflight(1 << 20, 0, 1, 64)
table(
    [
        _row("queues-65535", "A region for 65,535 rings.", "CVE-2021-3839", inflight(1 << 20, 0, 65535, 64)),
        _row("queues-one-more", "A region too small for its rings.", "CVE-2021-3839", inflight(64, 0, 2, 256)),
        _row("too-small", "Regions too small for one ring.", SOURCE, inflight(0, 0, 1, 64), inflight(8, 0, 1, 64)),
        _row("wraps", "A region whose offset and size wrap.", SOURCE, inflight(TOP - 4096, 8192, 1, 64)),
        _row("beyond-file", "A region behind the end of its file.", SOURCE, inflight(1 << 20, 1 << 20, 1, 64)),
        _row("huge", "A region of 2^62 bytes.", SOURCE, inflight(1 << 62, 0, 1, 64)),
        _row(
            "ring-of-65535",
            "A region for a ring of 65,535 entries.",
            "libvhost-user fbdfdbb992",
            inflight(64, 0, 1, 65535),
        ),
        _row("no-fd", "A region without a descriptor.", "CVE-2022-0669", _RIGHT, fds=()),
        *(
            _row(f"fd-{kind}", f"A region in a descriptor of the wrong kind: {kind}.", SOURCE, _RIGHT, fds=(maker,))
            for kind, maker in (
                ("pipe", pipe),
                ("null", null_device),
                ("socket", connected),
                ("eventfd", eventfd),
                ("directory", directory),
                ("file", regular_file),
                ("read-only", readonly),
            )
        ),
        Row(
            "inflight-eight-fds",
            "A region with eight descriptors.",
            "CVE-2022-0669",
            Request.SET_INFLIGHT_FD,
            [_RIGHT],
            [memfd] * 8,
            protocol=FEATURE,
            stopped=True,
            may=True,
        ),
    ]
)


def _get(link: Link, queues: int, num: int) -> tuple[bytes, int] | None:
    """Ask for a region; None when none is given."""
    try:
        reply, fds = link.ask_fds(Request.GET_INFLIGHT_FD, inflight(0, 0, queues, num))
    except (EOFError, ConnectionError):
        return None
    for fd in fds[1:]:
        os.close(fd)
    if not fds:
        return None
    if len(reply.payload) < SIZE.size:
        os.close(fds[0])
        raise Failure(f"the reply to GET_INFLIGHT_FD has {len(reply.payload)} bytes")
    return reply.payload, fds[0]


@clause("hostile", "inflight-get-garbage", source="CVE-2021-3839; CVE-2022-0669")
def get_garbage(ctx: Context) -> None:
    """GET_INFLIGHT_FD for no rings, for too many, of no entries and of too many."""
    ctx.need_protocol(*FEATURE)
    for queues, num in ((0, 64), (65535, 64), (1, 0), (1, 65535), (65535, 65535), (1, 3)):
        link = ctx.link(more=FEATURE)
        found = _get(link, queues, num)
        if found:
            os.close(found[1])
        link.close()


REGION_FDS_MAX: Final = 8
"""Of one region a back-end may have several: its own, its worker's, one for whoever goes on when it dies."""


@clause("hostile", "inflight-get-again-and-again", source="CVE-2020-10726", seconds=60)
def get_again(ctx: Context) -> None:
    """GET_INFLIGHT_FD 10,000 times on one connection: the descriptors of one region at the most stay."""
    ctx.need_protocol(*FEATURE)
    link = ctx.link(more=FEATURE)
    before = sum(ctx.process.descriptors().values()) if ctx.process else 0
    memory = ctx.process.resident() if ctx.process else 0
    for _ in range(10_000):
        found = _get(link, 1, 64)
        if found is None:
            raise NotApplicable("no region is given")
        os.close(found[1])
    if ctx.process:
        if sum(ctx.process.descriptors().values()) > before + REGION_FDS_MAX:
            raise Failure("regions that were given stay open")
        if ctx.process.resident() > memory + (16 << 20):
            raise Failure("memory grows with every GET_INFLIGHT_FD")


Spoil = Callable[[bytearray], None]


def _spoiled(ctx: Context, spoil: Spoil) -> None:
    """Give a region back with what `spoil` makes of it: refused, or the rings work; nobody writes elsewhere."""
    ctx.need_protocol(*FEATURE)
    link = ctx.link(more=FEATURE)
    machine = ctx.machine(link=link, start=False)
    found = _get(link, len(machine.rings), machine.setup.num)
    if found is None:
        raise NotApplicable("no region is given")
    payload, fd = found
    size, offset, _, _ = SIZE.unpack_from(payload)
    with open(fd, "r+b", buffering=0) as file:
        data = bytearray(os.pread(fd, size, offset))
        spoil(data)
        os.pwrite(fd, data, offset)
        if link.try_(Request.SET_INFLIGHT_FD, payload, [file.fileno()]) is not Outcome.CLOSED:
            _start(ctx, machine)
    link.close()


def _start(ctx: Context, machine: Machine) -> None:
    """Start rings that may find no sense in their region: they may stand still, but harm nothing."""
    try:
        machine.start_all()
    except Failure:
        return
    before = machine.memory.snapshot()
    for ring in machine.rings:
        ring.notify()
    machine.work.quiet(0.05)
    ctx.unwritten(machine, before, machine.given())
    machine.link.drain()


def _u16(at: int, value: int) -> Spoil:
    def spoil(data: bytearray) -> None:
        struct.pack_into("=H", data, at, value)

    return spoil


@clause("hostile", "inflight-version", source="version 0 or 2", rings=FORMATS)
def version(ctx: Context) -> None:
    """A region of another version."""
    for value in (0, 2, 0xFFFF):
        _spoiled(ctx, _u16(8, value))


@clause("hostile", "inflight-desc-num", source="libvhost-user fbdfdbb992, b9d248dfac", rings=FORMATS)
def desc_num(ctx: Context) -> None:
    """A region that says it has another number of entries than the ring."""
    for value in (0, 1, 65, 0xFFFF):
        _spoiled(ctx, _u16(10, value))


@clause("hostile", "inflight-last-batch-head", source="libvhost-user bf21298c08; SPDK; VPP", rings=FORMATS)
def last_batch_head(ctx: Context) -> None:
    """A region whose last batch begins at an entry that there is not, while its used index is behind."""

    def spoil(data: bytearray) -> None:
        struct.pack_into("=HH", data, 12, 0xFFFF, 7)

    _spoiled(ctx, spoil)


@clause("hostile", "inflight-used-index", source="used_idx random", rings=FORMATS)
def used_index(ctx: Context) -> None:
    """A region with used indices of its own."""
    for value in (1, 0x7FFF, 0xFFFF):
        _spoiled(ctx, _u16(14, value))


@clause("hostile", "inflight-all-ones", source="libvhost-user b9d248dfac", rings=FORMATS)
def all_ones(ctx: Context) -> None:
    """A region of ones: everything is in flight, and its next one is number 65,535."""

    def spoil(data: bytearray) -> None:
        data[:] = b"\xff" * len(data)

    _spoiled(ctx, spoil)


@clause("hostile", "inflight-garbage", source="libvhost-user b9d248dfac", rings=FORMATS)
def garbage(ctx: Context) -> None:
    """Regions of random bytes under a header that is right."""

    def spoil(data: bytearray) -> None:
        data[16:] = ctx.rng.randbytes(len(data) - 16)

    for _ in range(8):
        _spoiled(ctx, spoil)
