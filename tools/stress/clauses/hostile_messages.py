"""Messages with numbers that cannot be, as an enemy sends them."""

from __future__ import annotations

from vhostmp.tools.stress.clause import Context, clause
from vhostmp.tools.stress.consts import Feature, ProtocolFeature, Request
from vhostmp.tools.stress.frontend import config, u64, vring, vring_addr
from vhostmp.tools.stress.link import Outcome
from vhostmp.tools.stress.machine import NOFD, Machine
from vhostmp.tools.stress.messages import RINGS_BY_FD, Row, connected, eventfd, memfd, table
from vhostmp.tools.stress.verdict import Failure, NotApplicable

TOP = 0xFFFFFFFF
LAYOUT = 1 << Feature.VERSION_1 | 1 << Feature.NET_MRG_RXBUF
BAD_PARTS = (config(TOP, b"a"), config(0, bytes(257)), config(0, b"a", size=TOP), b"")
INDICES = (0x10000, 0x7FFFFFFF, TOP)
FD_INDICES = 1 << 8  # KICK, CALL and ERR have eight bits for a ring's index


def _vring_0(index: int) -> bytes:
    return vring(index, 0)


def _vring_1(index: int) -> bytes:
    return vring(index, 1)


_INDEXED = (
    (Request.SET_VRING_NUM, _vring_1),
    (Request.SET_VRING_BASE, _vring_0),
    (Request.SET_VRING_ADDR, vring_addr),
    (Request.GET_VRING_BASE, _vring_0),
    (Request.SET_VRING_ENABLE, _vring_1),
)

table(
    [
        Row("vring-num-zero", "A ring of no entries.", "CVE-2017-17381; vhost-user, SET_VRING_NUM", 8, [vring(0, 0)]),
        Row(
            "vring-num-odd",
            "Split rings whose size is no power of two.",
            "virtio 1.3, 2.7; CVE-2026-50626",
            8,
            [vring(0, num) for num in (3, 63, 65, 32767)],
            stopped=True,
        ),
        Row(
            "vring-num-too-large",
            "Rings of more entries than a ring can have.",
            "virtio 1.3, 2.7: 32768 at most; CVE-2026-50626",
            8,
            [vring(0, num) for num in (32769, 65536, 0x10001, 1 << 31, TOP)],
            stopped=True,
        ),
        Row(
            "vring-base-too-large",
            "An index of more than 16 bits for a split ring.",
            "CVE-2020-10723; vhost-user, vring descriptor index for split virtqueues: bits 16-31 are reserved",
            Request.SET_VRING_BASE,
            [vring(0, base) for base in (0x10000, 0x12345678, TOP)],
            stopped=True,
            may=True,
        ),
        Row(
            "vring-enable-neither",
            "SET_VRING_ENABLE with a number that is neither 0 nor 1.",
            "vhost-user, SET_VRING_ENABLE",
            Request.SET_VRING_ENABLE,
            [vring(0, 2), vring(0, TOP)],
            may=True,
        ),
        Row(
            "vring-addr-flags",
            "Flags of SET_VRING_ADDR that nobody has given a meaning.",
            "vhost-user, vring address description",
            Request.SET_VRING_ADDR,
            [lambda machine: machine.addresses(machine.work, flags=0xFFFFFFFE)],
            may=True,
            stopped=True,
        ),
        Row(
            "features-not-offered",
            "SET_FEATURES with bits that were not offered.",
            "vhost-user, SET_FEATURES; QEMU vhost_user_set_features",
            Request.SET_FEATURES,
            [
                lambda machine: u64(machine.setup.features | 1 << 63),
                lambda machine: u64(machine.setup.features | 1 << 50),
            ],
            stopped=True,
        ),
        Row(
            "features-changed-while-running",
            "SET_FEATURES that changes the format of buffers under a ring that runs.",
            "CVE-2026-74702; vhost-user, SET_FEATURES",
            Request.SET_FEATURES,
            [
                lambda machine: u64(machine.setup.features ^ (1 << Feature.VERSION_1 | 1 << Feature.NET_MRG_RXBUF)),
                u64(0),
            ],
            may=True,
        ),
        Row(
            "protocol-features-not-offered",
            "SET_PROTOCOL_FEATURES with bits that were not offered.",
            "vhost-user, SET_PROTOCOL_FEATURES; rust-vmm handler.rs does not check",
            Request.SET_PROTOCOL_FEATURES,
            [lambda machine: u64(machine.link.protocol | 1 << 63)],
            stopped=True,
        ),
        Row("owner-twice", "SET_OWNER again.", "vhost-user, SET_OWNER", Request.SET_OWNER, [b""], may=True),
        Row("owner-reset", "RESET_OWNER under rings that run.", "vhost-user, RESET_OWNER", 4, [b""], may=True),
        Row(
            "mtu-out-of-range",
            "An MTU that no Ethernet has.",
            "virtio 1.3, 5.1.4.1: 68 to 65535; vhost-user, NET_SET_MTU",
            Request.NET_SET_MTU,
            [u64(mtu) for mtu in (0, 67, 65536, 1 << 63)],
            protocol=(ProtocolFeature.NET_MTU,),
            feature=Feature.NET_MTU,
            devices=("net",),
        ),
        Row(
            "request-unknown",
            "Requests that are none.",
            "vhost-user, front-end message types",
            255,
            [b"", bytes(8), bytes(256)],
        ),
        Row("request-huge", "A request of 2^32 - 1.", "vhost-user, front-end message types", TOP, [b"", bytes(64)]),
        Row("request-after-last", "The number after the last request.", "vhost-user", 45, [b"", bytes(8)]),
        Row(
            "request-none",
            "Request 0: libvhost-user ended the process at it.",
            "vhost-user, front-end message types; libvhost-user's exit(0)",
            0,
            [b"", bytes(8)],
        ),
        Row("request-unknown-with-fds", "An unknown request, with memory.", "CVE-2019-14818", 200, [b""], [memfd] * 4),
        Row(
            "vring-endian-not-offered",
            "SET_VRING_ENDIAN, and CROSS_ENDIAN was not negotiated.",
            "vhost-user, SET_VRING_ENDIAN",
            Request.SET_VRING_ENDIAN,
            [vring(0, 1), vring(TOP, TOP)],
            may=True,
        ),
        Row(
            "status-garbage",
            "Device status of all bits, and of bits that are none.",
            "vhost-user, SET_STATUS; virtio 1.3, 2.1",
            Request.SET_STATUS,
            [u64(0xFF), u64(0x30), u64((1 << 64) - 1)],
            protocol=(ProtocolFeature.STATUS,),
            may=True,
        ),
        Row(
            "inband-kick-index",
            "VRING_KICK of a ring that there is not, and without the feature.",
            "vhost-user, VRING_KICK",
            Request.VRING_KICK,
            [vring(index, 0) for index in INDICES],
        ),
        Row(
            "config-set-garbage",
            "SET_CONFIG with sizes that lie, past the end, and of what is read-only.",
            "vhost-user, SET_CONFIG",
            Request.SET_CONFIG,
            [
                config(TOP, b"a"),
                config(0, bytes(257)),
                config(0, b"a", size=TOP),
                config(256, b"a"),
                b"",
            ],
            protocol=(ProtocolFeature.CONFIG,),
        ),
        Row(
            "config-set-read-only",
            "SET_CONFIG of fields that drivers may not write.",
            "virtio 1.3, 5.1.4, 5.2.4; vhost-user, SET_CONFIG",
            Request.SET_CONFIG,
            [config(0, b"\xff" * 8), config(0, b"\xff" * 8, 2)],
            protocol=(ProtocolFeature.CONFIG,),
            may=True,
        ),
        Row(
            "config-get-garbage",
            "GET_CONFIG with sizes that lie, and past the end.",
            "vhost-user, GET_CONFIG",
            Request.GET_CONFIG,
            [*BAD_PARTS, config(TOP - 3, bytes(8))],
            protocol=(ProtocolFeature.CONFIG,),
            may=True,
        ),
        Row(
            "backend-channel-not-a-socket",
            "A channel of the back-end's that is no socket.",
            "vhost-user, SET_BACKEND_REQ_FD",
            Request.SET_BACKEND_REQ_FD,
            [b""],
            [memfd],
            protocol=(ProtocolFeature.BACKEND_REQ,),
            may=True,
        ),
        Row(
            "backend-channel-eventfd",
            "A channel of the back-end's that is an eventfd.",
            "vhost-user, SET_BACKEND_REQ_FD",
            Request.SET_BACKEND_REQ_FD,
            [b""],
            [eventfd],
            protocol=(ProtocolFeature.BACKEND_REQ,),
            may=True,
        ),
        Row(
            "backend-channel-hung-up",
            "Channels of the back-end's whose other end is closed, one after the other.",
            "vhost-user, SET_BACKEND_REQ_FD",
            Request.SET_BACKEND_REQ_FD,
            [b""] * 4,
            [connected],
            protocol=(ProtocolFeature.BACKEND_REQ,),
            may=True,
        ),
        Row(
            "backend-channel-missing",
            "SET_BACKEND_REQ_FD without a descriptor.",
            "vhost-user, SET_BACKEND_REQ_FD",
            Request.SET_BACKEND_REQ_FD,
            [b""],
            protocol=(ProtocolFeature.BACKEND_REQ,),
        ),
    ]
)

table(
    Row(
        f"index-{request.name.lower().replace('_', '-')}",
        f"{request.name} of rings that there are not.",
        "CVE-2011-2512; CVE-2018-1059's series",
        request,
        [make(index) for index in INDICES],
    )
    for request, make in _INDEXED
)


@clause("hostile", "index-first-outside", source="CVE-2026-43248: index == count; CVE-2021-45464")
def first_outside(ctx: Context) -> None:
    """Every message that names a ring, with the number after the last one."""
    index = ctx.facts.queues
    machine = ctx.machine()
    asks = [(request, make(index), False) for request, make in _INDEXED]
    if index < FD_INDICES:
        asks += [(request, u64(index), True) for request in RINGS_BY_FD]
        asks += [(request, u64(index | NOFD), False) for request in RINGS_BY_FD]
    for request, payload, has_fd in asks:
        fds = [ctx.eventfd()] if has_fd else []
        if ctx.rejects(machine.link, request, payload, fds) is Outcome.CLOSED:
            machine = ctx.machine()
        else:
            machine.probe()


@clause("hostile", "index-beyond-eight-bits", source="vhost-user, SET_VRING_KICK: bits 0-7; CVE-2020-10723")
def index_bits(ctx: Context) -> None:
    """KICK, CALL and ERR with reserved bits set: they do not become another ring's."""
    for request in RINGS_BY_FD:
        for bits in (1 << 9, 1 << 32, 1 << 63):
            machine = ctx.machine()
            machine.link.try_(request, u64(bits | 0xFF), [ctx.eventfd()])
            machine.link.close()


def _restarted(ctx: Context, machine: Machine, request: int, payload: bytes) -> None:
    """Send a message that concerns a ring that runs: refused or not, nothing is harmed."""
    before = machine.memory.snapshot()
    outcome = machine.link.try_(request, payload)
    if outcome is Outcome.CLOSED:
        return
    machine.work.notify()
    machine.work.quiet(0.05)
    ctx.unwritten(machine, before, machine.given())
    ctx.recovers(machine)


@clause("hostile", "vring-num-while-running", source="CVE-2026-5747; Firecracker; CVE-2026-74580")
def num_while_running(ctx: Context) -> None:
    """SET_VRING_NUM of rings that run: refused, or done without harm."""
    for num in (1, 32, 128, 1024, 32768):
        machine = ctx.machine()
        machine.probe()
        _restarted(ctx, machine, Request.SET_VRING_NUM, vring(machine.work.index, num))
        machine.link.close()


@clause("hostile", "vring-base-while-running", source="CVE-2026-5747; vhost-user, SET_VRING_BASE")
def base_while_running(ctx: Context) -> None:
    """SET_VRING_BASE of rings that run: refused, or done without harm."""
    for base in (0, 1, 0x7FFF, 0xFFFF):
        machine = ctx.machine()
        machine.probe()
        _restarted(ctx, machine, Request.SET_VRING_BASE, vring(machine.work.index, base))
        machine.link.close()


@clause("hostile", "get-vring-base-twice", source="vhost-user, GET_VRING_BASE")
def base_twice(ctx: Context) -> None:
    """GET_VRING_BASE of a ring that is stopped says the same again, and again."""
    machine = ctx.machine()
    machine.probe()
    first = machine.stop(machine.work)
    for _ in range(3):
        again = machine.stop(machine.work)
        if again != first:
            raise Failure(f"the base of a stopped ring was {first:#x} and is {again:#x}")


@clause("hostile", "get-vring-base-not-started", source="vhost-user, GET_VRING_BASE")
def base_not_started(ctx: Context) -> None:
    """GET_VRING_BASE of rings that never started, and with a number that ought to be 0."""
    machine = ctx.machine(start=False)
    for number in (0, TOP):
        if machine.link.try_(Request.GET_VRING_BASE, vring(machine.work.index, number)) is Outcome.CLOSED:
            return
    machine.start_all()
    machine.probe()


@clause("hostile", "before-owner", source="vhost-user, SET_OWNER")
def before_owner(ctx: Context) -> None:
    """Messages about rings before anything was negotiated."""
    for request, payload in (
        (Request.SET_VRING_NUM, vring(0, 64)),
        (Request.SET_VRING_ADDR, vring_addr(0)),
        (Request.SET_VRING_ENABLE, vring(0, 1)),
        (Request.GET_VRING_BASE, vring(0, 0)),
        (Request.SET_FEATURES, u64(ctx.features())),
    ):
        link = ctx.connect()
        link.try_(request, payload)
        link.close()


@clause("hostile", "not-negotiated", source="vhost-user, protocol features")
def not_negotiated(ctx: Context) -> None:
    """Requests of protocol features that nobody negotiated, with payloads that make sense and with none."""
    for request in range(Request.SEND_RARP, Request.GET_SHMEM_CONFIG + 1):
        for payload in (b"", bytes(8), bytes(32), bytes(40)):
            link = ctx.link(0)
            link.send(request, payload)
            link.drain()
            link.close()


@clause("hostile", "device-state-garbage", source="vhost-user, SET_DEVICE_STATE_FD")
def device_state(ctx: Context) -> None:
    """A device's state to be loaded from a pipe that holds garbage, or to nowhere; and checked without a transfer."""
    ctx.need_protocol(ProtocolFeature.DEVICE_STATE)
    for payload, fds in ((vring(2, 0), [memfd(ctx)]), (vring(0, 1), [memfd(ctx)]), (vring(1, 0), []), (bytes(4), [])):
        link = ctx.link(more=(ProtocolFeature.DEVICE_STATE,))
        link.send(Request.SET_DEVICE_STATE_FD, payload, fds)
        try:
            reply = link.reply()
        except EOFError:
            continue
        if not reply.u64 & 0xFF:
            raise Failure(f"SET_DEVICE_STATE_FD {payload.hex()} was accepted")


@clause("hostile", "queues-all-at-once", source="DPDK 38e6400387: 257 rings of 256; vhost-user, GET_QUEUE_NUM")
def all_queues(ctx: Context) -> None:
    """A size and a base for every ring that is offered, and for the one after."""
    if ctx.facts.queues <= 1:
        raise NotApplicable("one ring is offered")
    link = ctx.link()
    for index in range(ctx.facts.queues):
        link.must(Request.SET_VRING_NUM, vring(index, 64))
    ctx.rejects(link, Request.SET_VRING_NUM, vring(ctx.facts.queues, 64))
