"""Bad messages as rows of tables: each becomes a clause.

What is asked, of each payload of a row, on a connection with rings that run: the message must be refused, or answered
by hanging up (or at least survived, for rows that `may` be accepted); what was refused has changed nothing, so requests
are done as before.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Sequence

import attrs

from vhostmp.tools.stress.clause import Clause, Context, register
from vhostmp.tools.stress.consts import Request
from vhostmp.tools.stress.link import Outcome
from vhostmp.tools.stress.machine import Machine

Payload = bytes | Callable[[Machine], bytes]
"""What a message carries, or how it is made for a machine."""
Maker = Callable[[Context], int]
"""Makes a descriptor that is closed with the context."""
MEMORY_BYTES = 1 << 20


def eventfd(ctx: Context) -> int:
    """Return an eventfd."""
    return ctx.eventfd()


def memfd(ctx: Context) -> int:
    """Return shared memory."""
    return ctx.memfd(MEMORY_BYTES)


def readonly(ctx: Context) -> int:
    """Return shared memory, opened for reading."""
    return ctx.fd(os.open(f"/proc/self/fd/{memfd(ctx)}", os.O_RDONLY | os.O_CLOEXEC))


def empty_memfd(ctx: Context) -> int:
    """Return a memory file of no bytes."""
    return ctx.memfd(0)


def pipe(ctx: Context) -> int:
    """Return the reading end of a pipe whose other end is closed."""
    read, write = os.pipe()
    os.close(write)
    return ctx.fd(read)


def regular_file(ctx: Context) -> int:
    """Return an empty file that has no name."""
    fd, path = tempfile.mkstemp()
    os.unlink(path)
    return ctx.fd(fd)


def directory(ctx: Context) -> int:
    """Return a directory."""
    return ctx.fd(os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def null_device(ctx: Context) -> int:
    """Return /dev/null."""
    return ctx.fd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))


def unconnected(ctx: Context) -> int:
    """Return a UNIX socket that is not connected."""
    return ctx.fd(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach())


def connected(ctx: Context) -> int:
    """Return an end of a socket pair whose other end is closed."""
    one, other = socket.socketpair()
    other.close()
    return ctx.fd(one.detach())


def spare(ctx: Context) -> int:
    """Return a duplicate of standard error."""
    return ctx.fd(os.dup(2))


@attrs.frozen
class Row:
    """A kind of bad message."""

    id: str
    question: str
    source: str
    request: int
    payloads: Sequence[Payload]
    fds: Sequence[Maker] = ()
    protocol: Sequence[int] = ()
    """Protocol features to be negotiated."""
    feature: int | None = None
    """A feature that must be offered, and is negotiated."""
    may: bool = False
    """Whether it may be accepted."""
    stopped: bool = False
    """Whether the rings do not run."""
    devices: Sequence[str] = ("net", "blk", "rng")


def prepare(ctx: Context, row: Row) -> Machine:
    """Return the machine on whose connection a row is asked."""
    ctx.need_protocol(*row.protocol)
    features = ctx.features()
    if row.feature is not None:
        ctx.need(row.feature)
        features = ctx.features(row.feature)
    machine = ctx.machine(ctx.setup(features=features), ctx.link(more=row.protocol), start=not row.stopped)
    if not row.stopped:
        machine.probe()
    return machine


def ask(ctx: Context, row: Row) -> None:
    """Send a row's messages."""
    machine = prepare(ctx, row)
    for payload in row.payloads:
        data = payload if isinstance(payload, bytes) else payload(machine)
        fds = [maker(ctx) for maker in row.fds]
        outcome = (
            machine.link.try_(row.request, data, fds) if row.may else ctx.rejects(machine.link, row.request, data, fds)
        )
        if outcome is not Outcome.REFUSED and not (outcome is Outcome.SILENT and not row.may):
            machine.link.close()
            machine = prepare(ctx, row)
        elif not row.stopped:
            machine.probe()
    if row.stopped:
        machine.start_all()
        machine.probe()


def table(rows: Iterable[Row]) -> None:
    """Make a clause of each row."""
    for row in rows:

        def asked(ctx: Context, row: Row = row) -> None:
            ask(ctx, row)

        asked.__doc__ = row.question
        register(Clause(row.id, "hostile", row.source, asked, tuple(row.devices)))


RINGS_BY_FD = (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)
"""Requests that bring an eventfd of a ring."""
