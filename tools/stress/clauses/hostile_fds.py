"""Descriptors of the wrong kind for a ring's notifications, and notifications that cannot be given."""

from __future__ import annotations

import os
import socket
import time

from vhostmp.tools.stress.clause import SETTLE, Context, clause
from vhostmp.tools.stress.consts import ProtocolFeature, Request
from vhostmp.tools.stress.frontend import u64
from vhostmp.tools.stress.hostile import prepared
from vhostmp.tools.stress.link import Outcome
from vhostmp.tools.stress.machine import NOFD
from vhostmp.tools.stress.messages import (
    RINGS_BY_FD,
    Row,
    connected,
    directory,
    eventfd,
    memfd,
    null_device,
    pipe,
    regular_file,
    table,
    unconnected,
)
from vhostmp.tools.stress.verdict import Failure, NotApplicable

FULL = 0xFFFFFFFFFFFFFFFE
"""The largest count of an eventfd: the next write must wait (eventfd(2))."""
KINDS = (
    ("pipe", "a pipe that is hung up", pipe),
    ("file", "a regular file", regular_file),
    ("directory", "a directory", directory),
    ("null", "/dev/null", null_device),
    ("socket", "a socket that is hung up", connected),
    ("unconnected", "a socket that is not connected", unconnected),
    ("memfd", "shared memory", memfd),
)

table(
    Row(
        f"{request.name.removeprefix('SET_VRING_').lower()}-fd-{kind}",
        f"{request.name} with {text} where an eventfd belongs.",
        f"vhost-user, {request.name}",
        request,
        [lambda machine: u64(machine.work.index)],
        [maker],
        may=True,
    )
    for request in RINGS_BY_FD
    for kind, text, maker in KINDS
)
table(
    Row(
        f"{request.name.removeprefix('SET_VRING_').lower()}-fd-{kind}",
        f"{request.name} {text}.",
        f"vhost-user, {request.name}; CVE-2019-14818",
        request,
        [u64(flag)],
        fds,
        may=True,
    )
    for request in RINGS_BY_FD
    for kind, text, flag, fds in (
        ("and-none", "with the bit for no descriptor, and one", NOFD, [eventfd]),
        ("missing", "without a descriptor, and without the bit for none", 0, []),
        ("twice", "with two descriptors", 0, [eventfd, eventfd]),
    )
)


@clause("hostile", "kick-fd-connection", source="the control socket itself")
def kick_connection(ctx: Context) -> None:
    """The connection itself as a kick descriptor: refused, or a ring that is never kicked."""
    machine = ctx.machine()
    outcome = machine.link.try_(
        Request.SET_VRING_KICK, u64(machine.work.index), [ctx.fd(os.dup(machine.link.sock.fileno()))]
    )
    if outcome is not Outcome.CLOSED:
        time.sleep(0.05)
        machine.link.drain()


@clause("hostile", "kick-fd-closed-later", source="EPOLLHUP does not spin; CVE-2025-40024")
def kick_pipe_hangs_up(ctx: Context) -> None:
    """A pipe as a kick descriptor that is hung up later: no process spins on it."""
    machine = prepared(ctx)
    read, write = os.pipe()
    outcome = machine.link.try_(Request.SET_VRING_KICK, u64(machine.work.index), [ctx.fd(read)])
    os.write(write, bytes(8))
    os.close(write)
    if outcome is Outcome.CLOSED:
        return
    if ctx.process is None:
        raise NotApplicable("whether a process spins is seen with --pid alone")
    time.sleep(0.05)
    idle = _seconds_used(ctx)
    time.sleep(SETTLE)
    used = _seconds_used(ctx) - idle
    machine.link.close()
    time.sleep(0.05)
    before = _seconds_used(ctx)
    time.sleep(SETTLE)
    usual = _seconds_used(ctx) - before
    if used > usual + SETTLE / 2:
        raise Failure(f"{used:g} s of processor time in {SETTLE:g} s for a kick descriptor that is hung up")


def _seconds_used(ctx: Context) -> float:
    ticks = 0
    for pid in ctx.process.family() if ctx.process else []:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            words = file.read().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _call(ctx: Context, fd: int, *, empty: bool) -> None:
    """Use rings with a call descriptor that cannot be written to: chains come back all the same."""
    machine = ctx.machine(ctx.setup(call=False))
    machine.probe()
    outcome = machine.link.try_(Request.SET_VRING_CALL, u64(machine.work.index), [fd])
    if outcome is Outcome.CLOSED:
        return
    if outcome is not Outcome.REFUSED:
        for _ in range(3):
            machine.probe()
        machine.stop(machine.work)
    if empty and os.eventfd_read(fd) < FULL:
        raise Failure("an eventfd was emptied that is only for writing")


@clause("hostile", "call-fd-full", source="eventfd(2)")
def call_full(ctx: Context) -> None:
    """An eventfd that is full: the device has nothing to tell any more, and goes on."""
    fd = ctx.eventfd()
    os.eventfd_write(fd, FULL)
    _call(ctx, fd, empty=True)


@clause("hostile", "call-fd-full-blocking", source="a blocking write hangs a worker; eventfd(2)")
def call_full_blocking(ctx: Context) -> None:
    """An eventfd that is full, and in whose write a device would wait for ever."""
    fd = ctx.eventfd(flags=0)
    os.eventfd_write(fd, FULL)
    try:
        _call(ctx, fd, empty=False)
    finally:
        os.set_blocking(fd, False)
        os.eventfd_read(fd)


@clause("hostile", "call-fd-pipe-full", source="pipe(7)")
def call_pipe_full(ctx: Context) -> None:
    """A pipe that is full as a call descriptor: refused, or the device goes on."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    ctx.fd(read)
    ctx.fd(write)
    try:
        while True:
            os.write(write, bytes(65536))
    except BlockingIOError:
        pass
    os.set_blocking(write, True)
    try:
        _call(ctx, write, empty=False)
    finally:
        while len(os.read(read, 1 << 20)) == 1 << 20:
            pass


@clause("hostile", "kick-fd-changed-often", source="CVE-2013-4127; CVE-2025-40024")
def kick_changed(ctx: Context) -> None:
    """Kick, call and error descriptors exchanged five hundred times under a ring that runs: none stays open."""
    machine = prepared(ctx)
    before = sum(ctx.process.descriptors().values()) if ctx.process else 0
    index = machine.work.index
    for _ in range(500):
        for request in (Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            fd = os.eventfd(0)
            outcome = machine.link.try_(request, u64(index), [fd])
            os.close(fd)
            if outcome is Outcome.CLOSED:
                return
    if ctx.process and sum(ctx.process.descriptors().values()) > before + 4:
        raise Failure("old eventfds stay open")
    ctx.recovers(machine)


@clause("hostile", "backend-channel-unread", source="vhost-user, SET_BACKEND_REQ_FD; nonblocking send")
def channel_unread(ctx: Context) -> None:
    """A channel of the back-end's that is full and that nobody reads: nothing waits for it."""
    ctx.need_protocol(ProtocolFeature.BACKEND_REQ)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        try:
            while True:
                theirs.send(bytes(4096))
        except BlockingIOError:
            theirs.setblocking(True)
        link = ctx.link(more=(ProtocolFeature.BACKEND_REQ,))
        link.try_(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        if not link.drain():
            return
        machine = ctx.machine(link=link)
        machine.probe()
        machine.work.driver.add_parts([(1 << 50, 64, 0)])  # a device may want to tell of the error
        machine.work.kick()
        machine.work.quiet(0.05)
        ctx.recovers(machine)
