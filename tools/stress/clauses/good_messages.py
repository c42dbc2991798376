"""What a careful front-end says beside rings and memory: configuration, status, in-flight regions, channels, state."""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.consts import Feature, ProtocolFeature, Request
from vhostmp.tools.stress.frontend import HEADER, REPLY, VERSION, config, inflight, message, u64, vring
from vhostmp.tools.stress.link import Link
from vhostmp.tools.stress.machine import S_ACKNOWLEDGE, S_ALL, S_DRIVER, S_FEATURES_OK, Machine
from vhostmp.tools.stress.verdict import Failure, NotApplicable

CONFIG_HEAD: Final = 12
CONFIG_BYTES: Final = {"net": 8, "blk": 8, "rng": 0}
"""Bytes that every configuration space of the class has: a net device's address and status, a disk's capacity."""
BACKEND_VRING_CALL: Final = 4
INFLIGHT: Final = struct.Struct("=QQHH4x")
NO_FD: Final = 1 << 8
SAVE, LOAD = 0, 1
STATE_MOST: Final = 1 << 24


@clause("good", "queue-num", source="vhost-user, VHOST_USER_GET_QUEUE_NUM")
def queue_num(ctx: Context) -> None:
    """With MQ the back-end says how many queues it has: one at least."""
    ctx.need_protocol(ProtocolFeature.MQ)
    if not 1 <= ctx.link().get_u64(Request.GET_QUEUE_NUM) <= 1 << 15:
        raise Failure(f"{ctx.facts.queues} rings are served")


@clause("good", "config-get", source="vhost-user, VHOST_USER_GET_CONFIG: the reply echoes offset and size")
def config_get(ctx: Context) -> None:
    """The configuration space can be read, and is the same while the device runs."""
    ctx.need_protocol(ProtocolFeature.CONFIG)
    size = CONFIG_BYTES[ctx.target.device]
    if not size:
        raise NotApplicable("this class of device has no configuration space")
    machine = ctx.machine(start=False)
    first = read_config(machine.link, 0, size)
    machine.start_all().traffic(8)
    if read_config(machine.link, 0, size) != first:
        raise Failure("the configuration space has changed")


def read_config(link: Link, offset: int, size: int) -> bytes:
    """Return part of the configuration space."""
    got = link.answer(Request.GET_CONFIG, config(offset, bytes(size))).payload
    if len(got) != CONFIG_HEAD + size or struct.unpack_from("=II", got) != (offset, size):
        raise Failure(f"GET_CONFIG of {size} bytes at {offset} was answered with {got[:16].hex()}, {len(got)} bytes")
    return got[CONFIG_HEAD:]


@clause("good", "mtu", source="vhost-user, VHOST_USER_NET_SET_MTU; virtio 1.3, 5.1.4.1", devices=("net",))
def mtu(ctx: Context) -> None:
    """The front-end tells the MTU that the guest was told, at least 1280, before rings start."""
    ctx.need_protocol(ProtocolFeature.NET_MTU)
    ctx.need(Feature.NET_MTU)
    link = ctx.link(more=[ProtocolFeature.NET_MTU])
    machine = ctx.machine(ctx.setup(features=ctx.features(Feature.NET_MTU)), link, start=False)
    for value in (1280, 1500):
        link.must(Request.NET_SET_MTU, u64(value))
    machine.start_all().traffic()


@clause("good", "rarp", source="vhost-user, VHOST_USER_SEND_RARP", devices=("net",))
def rarp(ctx: Context) -> None:
    """After migration the front-end asks for the guest's address to be announced; traffic goes on."""
    ctx.need_protocol(ProtocolFeature.RARP)
    machine = ctx.machine(link=ctx.link(more=[ProtocolFeature.RARP]))
    for _ in range(3):
        machine.link.must(Request.SEND_RARP, bytes.fromhex("020000000001") + bytes(2))
        machine.traffic(8)


@clause("good", "status", source="vhost-user, VHOST_USER_SET_STATUS and GET_STATUS; virtio 1.3, 2.1", rings=FORMATS)
def status(ctx: Context) -> None:
    """The status that the driver sets is read back, bit by bit, up to DRIVER_OK."""
    ctx.need_protocol(ProtocolFeature.STATUS)
    link = ctx.link(more=[ProtocolFeature.STATUS])
    value = 0
    for value in (S_ACKNOWLEDGE, S_ACKNOWLEDGE | S_DRIVER):
        link.must(Request.SET_STATUS, u64(value))
        same_status(link, value)
    machine = ctx.machine(link=link, start=False)
    same_status(link, value | S_FEATURES_OK)
    machine.start_all().traffic()
    same_status(link, S_ALL)


def same_status(link: Link, expected: int) -> None:
    """Check what GET_STATUS says."""
    got = link.get_u64(Request.GET_STATUS)
    if got != expected:
        raise Failure(f"the status is {got:#x}, it was set to {expected:#x}")


@clause("good", "status-reset", source="vhost-user, VHOST_USER_SET_STATUS; virtio 1.3, 2.4: writing 0 resets")
def status_reset(ctx: Context) -> None:
    """The status is set to 0 between two drivers; the second one works as the first."""
    ctx.need_protocol(ProtocolFeature.STATUS)
    link = ctx.link(more=[ProtocolFeature.STATUS])
    for _ in range(3):
        machine = ctx.machine(link=link)
        machine.traffic(8)
        machine.stop_all()
        link.must(Request.SET_STATUS, u64(0))
        same_status(link, 0)


def region_of(ctx: Context, link: Link, num: int) -> tuple[bytes, int]:
    """Ask for an in-flight region for rings of `num` entries; return its description and its descriptor.

    NotApplicable when the back-end needs none.
    """
    least = 2 if ctx.target.device == "net" else 1
    reply, fds = link.ask_fds(Request.GET_INFLIGHT_FD, inflight(0, 0, least, num))
    for fd in fds:
        ctx.fd(fd)
    if len(reply.payload) not in (INFLIGHT.size, INFLIGHT.size - 4):
        raise Failure(f"GET_INFLIGHT_FD was answered with {len(reply.payload)} bytes")
    size, offset, _, _ = INFLIGHT.unpack(reply.payload.ljust(INFLIGHT.size, b"\0"))
    if not size:
        raise NotApplicable("the back-end needs no region for these rings")
    if len(fds) != 1 or os.fstat(fds[0]).st_size < offset + size:
        raise Failure(f"a region of {size} bytes at {offset}, with {len(fds)} descriptors or one that is too short")
    return reply.payload, fds[0]


@clause("good", "inflight", source="vhost-user, Inflight I/O tracking", rings=FORMATS)
def tracked(ctx: Context) -> None:
    """The front-end keeps an in-flight region, gives it back before rings start, and they work."""
    ctx.need_protocol(ProtocolFeature.INFLIGHT_SHMFD)
    machine = ctx.machine(link=ctx.link(more=[ProtocolFeature.INFLIGHT_SHMFD]), start=False)
    payload, fd = region_of(ctx, machine.link, machine.setup.num)
    machine.link.must(Request.SET_INFLIGHT_FD, payload, [fd])
    machine.start_all().traffic()


@clause("good", "inflight-resume", source="vhost-user, Inflight I/O tracking: reconnection", rings=FORMATS)
def tracked_over(ctx: Context) -> None:
    """The connection breaks with requests in the ring; with the region given to the next one each comes back once."""
    ctx.need_protocol(ProtocolFeature.INFLIGHT_SHMFD)
    machine = ctx.machine(link=ctx.link(more=[ProtocolFeature.INFLIGHT_SHMFD]), start=False)
    payload, fd = region_of(ctx, machine.link, machine.setup.num)
    machine.link.must(Request.SET_INFLIGHT_FD, payload, [fd])
    machine.start_all()
    ring = machine.work
    for _ in range(8):
        machine.offer(16)
        machine.go()
        machine.link.close()
        link = ctx.link(more=[ProtocolFeature.INFLIGHT_SHMFD])
        link.must(Request.SET_FEATURES, u64(machine.setup.features))  # they say which kind of region it is
        link.must(Request.SET_INFLIGHT_FD, payload, [fd])
        machine.rejoin(link)
        for each in machine.rings:
            each.notify()
        machine.give(ring.take(len(ring.driver.in_flight)))
        ring.driver.check_idle()
        machine.forget()


@clause("good", "backend-channel", source="vhost-user, VHOST_USER_SET_BACKEND_REQ_FD", rings=FORMATS)
def channel(ctx: Context) -> None:
    """A channel for the back-end's own requests is given, and another one in its place."""
    ctx.need_protocol(ProtocolFeature.BACKEND_REQ)
    machine = ctx.machine(link=ctx.link(more=[ProtocolFeature.BACKEND_REQ]), start=False)
    for _ in range(2):
        give_channel(ctx, machine.link)
    machine.start_all().traffic()


def give_channel(ctx: Context, link: Link) -> socket.socket:
    """Give the back-end a channel, and return our end of it."""
    ours, theirs = socket.socketpair()
    ctx.stack.callback(ours.close)
    with theirs:
        link.must(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
    ours.settimeout(link.patience)
    return ours


@clause("good", "in-band", source="vhost-user, In-band notifications; VHOST_USER_VRING_KICK", rings=FORMATS)
def in_band(ctx: Context) -> None:
    """No eventfds at all: kicks are messages that start and wake rings, interrupts are messages on the channel."""
    needed = (ProtocolFeature.INBAND_NOTIFICATIONS, ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK)
    ctx.need_protocol(*needed)
    link = ctx.link(more=needed)
    calls = give_channel(ctx, link)
    machine = ctx.machine(ctx.setup(call=False, features=ctx.features(without=[Feature.EVENT_IDX])), link, start=False)
    for ring in machine.rings:
        machine.start(ring, kick=False)
    machine.set_status(S_ALL)
    for _ in range(20):
        machine.offer(4)
        machine.go()
        for ring in machine.rings:
            link.must(Request.VRING_KICK, vring(ring.index, 0))
        await_call(calls, machine)
        machine.collect()


def await_call(calls: socket.socket, machine: Machine) -> None:
    """Wait for an interrupt by message, and acknowledge those that ask for it."""
    try:
        request, flags, size = HEADER.unpack(calls.recv(HEADER.size, socket.MSG_WAITALL))
        index, _ = struct.unpack("=II", calls.recv(size, socket.MSG_WAITALL))
    except TimeoutError:
        raise Failure("no interrupt came on the channel") from None
    except struct.error:
        raise Failure("what came on the channel is no interrupt, or it was closed") from None
    if request != BACKEND_VRING_CALL or index >= len(machine.rings):
        raise Failure(f"request {request} for ring {index} came on the channel")
    if flags & ~3:
        calls.sendall(message(request, u64(0), flags=VERSION | REPLY))


def transfer(link: Link, direction: int) -> int:
    """Begin a transfer of the device's state; return our end of the pipe, or of what the back-end would rather use.

    The caller closes it.
    """
    read, write = os.pipe()
    ours, theirs = (read, write) if direction == SAVE else (write, read)
    try:
        reply, fds = link.ask_fds(Request.SET_DEVICE_STATE_FD, struct.pack("=II", direction, 0), [theirs])
        if len(fds) == 1 and not reply.u64:
            os.dup2(fds[0], ours, inheritable=False)
        for fd in fds:
            os.close(fd)
        if reply.u64 != (0 if len(fds) == 1 else NO_FD) or len(fds) > 1:
            raise Failure(f"SET_DEVICE_STATE_FD was answered with {reply.u64:#x} and {len(fds)} descriptors")
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return ours


@clause("good", "device-state", source="vhost-user, Migrating back-end state")
def device_state(ctx: Context) -> None:
    """The state of a stopped device is saved, loaded into one on another connection, which then works."""
    ctx.need_protocol(ProtocolFeature.DEVICE_STATE)
    machine = ctx.machine(link=ctx.link(more=[ProtocolFeature.DEVICE_STATE]))
    machine.traffic()
    machine.stop_all()
    with open(transfer(machine.link, SAVE), "rb") as pipe:
        state = pipe.read(STATE_MOST)
    if len(state) == STATE_MOST:
        raise Failure("the state does not end")
    if machine.link.get_u64(Request.CHECK_DEVICE_STATE):
        raise Failure("CHECK_DEVICE_STATE after saving says that it went wrong")
    machine.close()
    link = ctx.link(more=[ProtocolFeature.DEVICE_STATE])
    machine = ctx.machine(link=link, start=False)
    with open(transfer(link, LOAD), "wb") as pipe:
        pipe.write(state)
    if link.get_u64(Request.CHECK_DEVICE_STATE):
        raise Failure("CHECK_DEVICE_STATE after loading says that it went wrong")
    machine.start_all().traffic()
