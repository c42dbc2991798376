"""Packets as an enemy sends them, and receive buffers as an enemy posts them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.consts import Feature, ProtocolFeature, Request
from vhostmp.tools.stress.frontend import message
from vhostmp.tools.stress.hostile import HOLE, prepared
from vhostmp.tools.stress.net import NetMachine, make_frame
from vhostmp.tools.stress.ring import WRITE, Part
from vhostmp.tools.stress.split import NetHeader
from vhostmp.tools.stress.verdict import Failure

NET = ("net",)
SHORTEST = 14  # an Ethernet header
HEADER = NetHeader.SIZE
GROWTH = 32 << 20
OFFLOADS = (Feature.NET_CSUM, Feature.NET_HOST_TSO4, Feature.NET_HOST_TSO6, Feature.NET_HOST_UFO, Feature.NET_HOST_ECN)


def _net(ctx: Context, features: int | None = None, *, used: bool = True) -> NetMachine:
    setup = ctx.setup(features=ctx.features() if features is None else features)
    machine = prepared(ctx, setup) if used else ctx.machine(setup)
    assert isinstance(machine, NetMachine)
    return machine


def _sent(ctx: Context, machine: NetMachine, packets: Iterable[Sequence[bytes]]) -> None:
    """Send packets, each in these pieces: they may be dropped; they come back as used with nothing written."""
    for pieces in packets:
        machine.work.driver.add_parts([(machine.put(piece), len(piece), 0) for piece in pieces])
    ctx.harmless(machine, machine.work)
    ctx.recovers(machine)


@clause("hostile", "net-shorter-than-header", source="CVE-2022-2132; CVE-2020-14378", rings=FORMATS, devices=NET)
def shorter_than_header(ctx: Context) -> None:
    """Packets of 1 to 11 bytes, less than their header."""
    _sent(ctx, _net(ctx), [[bytes(size)] for size in range(1, HEADER)])


@clause("hostile", "net-header-alone", source="CVE-2024-41090; virtio 1.3, 5.1.6.2", rings=FORMATS, devices=NET)
def header_alone(ctx: Context) -> None:
    """Packets that are a header and no frame."""
    machine = _net(ctx)
    _sent(ctx, machine, [[bytes(HEADER)], [bytes(4), bytes(8)], [bytes(1)] * HEADER])


@clause("hostile", "net-header-in-pieces", source="CVE-2022-2132", rings=FORMATS, devices=NET)
def header_in_pieces(ctx: Context) -> None:
    """Headers of twelve descriptors of a byte, with and without a frame behind."""
    frame = make_frame(1)
    _sent(ctx, _net(ctx), [[bytes(1)] * HEADER + [frame], [bytes(1)] * (HEADER - 1), [bytes(1)] * (HEADER + 1)])


@clause("hostile", "net-frame-short", source="CVE-2024-41090; CVE-2024-41091", rings=FORMATS, devices=NET)
def frame_short(ctx: Context) -> None:
    """Frames of 1 to 13 bytes, less than an Ethernet header, in one piece and in two."""
    packets: list[list[bytes]] = [[bytes(HEADER + size)] for size in range(1, SHORTEST)]
    packets += [[bytes(HEADER), bytes(size)] for size in range(1, SHORTEST)]
    _sent(ctx, _net(ctx), packets)


@clause("hostile", "net-frame-huge", source="CVE-2014-0077; virtio 1.3, 5.1.6.2", rings=FORMATS, devices=NET)
def frame_huge(ctx: Context) -> None:
    """Frames of more than 64 KiB, in one descriptor and in sixty."""
    machine = _net(ctx)
    for size in (65551, 70_000, 262_144, 1 << 20):
        _sent(ctx, machine, [[bytes(HEADER) + make_frame(1, size)]])
    _sent(ctx, machine, [[bytes(HEADER), *([bytes(16384)] * 60)]])


@clause("hostile", "net-header-garbage", source="CVE-2024-43817; CVE-2024-43897", rings=FORMATS, devices=NET)
def header_garbage(ctx: Context) -> None:
    """Headers of ones, and of random bytes."""
    machine = _net(ctx, ctx.features(*OFFLOADS))
    packets = [[b"\xff" * HEADER + make_frame(1)]]
    packets += [[ctx.rng.randbytes(HEADER) + make_frame(number)] for number in range(30)]
    _sent(ctx, machine, packets)


def _headers(ctx: Context, *headers: NetHeader, size: int = 60) -> None:
    """Send a frame behind each header, with all the offloads that there are, and with none."""
    for more in (OFFLOADS, ()):
        machine = _net(ctx, ctx.features(*more))
        _sent(ctx, machine, [[header.pack() + make_frame(1, size)] for header in headers])
        machine.link.close()


@clause("hostile", "net-csum-outside", source="CVE-2024-11614; DPDK 285e6b8b18", devices=NET)
def csum_outside(ctx: Context) -> None:
    """Checksums to be put behind the end of the packet."""
    needs = NetHeader.NEEDS_CSUM
    _headers(
        ctx,
        *(
            NetHeader(flags=needs, csum_start=start, csum_offset=offset)
            for start, offset in ((0xFFF0, 0), (0xFFFF, 0xFFFF), (59, 0), (58, 1), (60, 0), (0, 0xFFFF), (34, 0xFFF0))
        ),
    )


@clause("hostile", "net-gso-size-zero", source="CVE-2024-43897; CVE-2024-43817", devices=NET)
def gso_zero(ctx: Context) -> None:
    """Segmentation into segments of no bytes, and of one."""
    _headers(
        ctx,
        *(NetHeader(1, kind, 54, size, 34, 16) for kind in (1, 3, 4, 5, 0x81) for size in (0, 1)),
        size=4000,
    )


@clause("hostile", "net-gso-unknown", source="CVE-2024-43817; virtio 1.3, 5.1.6.2", devices=NET)
def gso_unknown(ctx: Context) -> None:
    """Kinds of segmentation that there are not."""
    _headers(ctx, *(NetHeader(0, kind, 54, 1000, 34, 16) for kind in (2, 6, 0x7F, 0x80, 0xFF)), size=4000)


@clause("hostile", "net-hdr-len-outside", source="CVE-2024-43897; virtio 1.3, 5.1.6.2", devices=NET)
def hdr_len_outside(ctx: Context) -> None:
    """Headers said to be longer than the packet, or of no bytes, and segments longer than it."""
    _headers(
        ctx,
        *(NetHeader(1, 1, length, size, 34, 16) for length in (0, 1, 0xFFFF) for size in (1, 1448, 0xFFFF)),
        size=4000,
    )


@clause("hostile", "net-short-frames-flood", source="CVE-2026-46321: a page lost with each", devices=NET, seconds=40)
def short_frames_flood(ctx: Context) -> None:
    """Twenty thousand frames too short to be sent: nothing grows."""
    machine = _net(ctx)
    before = ctx.process.resident() if ctx.process else 0
    gpa = machine.put(bytes(64))
    ring = machine.work
    for number in range(400):
        for size in range(50):
            ring.driver.add_parts([(gpa, HEADER + size % SHORTEST, 0)])
        ring.kick()
        if ring.quiet(ring.patience):
            raise Failure("short frames do not come back")
        while ring.driver.in_flight and not ring.quiet(0.02):
            ring.driver.reap()
        if len(ring.driver.free) < 50 or number % 100 == 99:  # noqa: PLR2004
            ctx.recovers(machine)
            gpa = machine.put(bytes(64))
    if ctx.process and ctx.process.resident() > before + GROWTH:
        raise Failure("memory grows with every short frame")


# ---- receive buffers


def _received(ctx: Context, machine: NetMachine, chains: Iterable[Sequence[Part]], sizes: Sequence[int]) -> None:
    """Post buffers of these parts, and have frames of these sizes sent to them."""
    ctx.need_echo()
    rx = machine.rx()
    for parts in chains:
        rx.driver.add_parts(parts)
    rx.driver.publish()
    for size in sizes:
        machine.send(machine.next_frame(size))
    before_given = machine.given()
    machine.tx().driver.publish()
    machine.tx().notify()
    ctx.harmless(machine, rx, writable=before_given)
    ctx.recovers(machine)


def _rooms(machine: NetMachine, *lengths: int) -> list[Part]:
    return [(machine.arena.take(length), length, WRITE) for length in lengths]


@clause("hostile", "rx-smaller-than-header", source="CVE-2026-74356", rings=FORMATS, devices=NET)
def rx_smaller_than_header(ctx: Context) -> None:
    """Receive buffers of fewer bytes than a header."""
    for size in (1, 8, 11, 12, 13):
        machine = _net(ctx, used=False)
        _received(ctx, machine, [_rooms(machine, size) for _ in range(32)], [60] * 4)
        machine.link.close()


@clause("hostile", "rx-bytes", source="CVE-2026-74356; CVE-2022-2132's series", rings=FORMATS, devices=NET)
def rx_bytes(ctx: Context) -> None:
    """Receive buffers of chains of single bytes, too short for any frame."""
    machine = _net(ctx, used=False)
    _received(ctx, machine, [_rooms(machine, *[1] * 20) for _ in range(3)], [60] * 4)


@clause("hostile", "rx-without-merging", source="CVE-2014-0077; CVE-2015-7295", rings=FORMATS, devices=NET)
def rx_without_merging(ctx: Context) -> None:
    """Frames longer than each receive buffer, and buffers may not be merged: dropped or cut, nothing overflows."""
    machine = _net(ctx, ctx.features(without=(Feature.NET_MRG_RXBUF,)), used=False)
    for sizes in ((1514,) * 8, (9000,) * 4, (65535,)):
        _received(ctx, machine, [_rooms(machine, 200) for _ in range(8)], sizes)
        machine.reset()


@clause("hostile", "rx-merging-too-long", source="CVE-2026-74356; CVE-2014-0055", rings=FORMATS, devices=NET)
def rx_merging_too_long(ctx: Context) -> None:
    """Frames that need more receive buffers than there are: kept, or dropped; the buffers are not lost."""
    ctx.need(Feature.NET_MRG_RXBUF)
    machine = _net(ctx, used=False)
    for count in (1, 2, 3):
        _received(ctx, machine, [_rooms(machine, 128) for _ in range(count)], (1514, 1514))
        machine.reset()


def _one_bad(ctx: Context, bad: Part) -> None:
    """Post good receive buffers with a bad one among them."""
    for place in (0, 1, 5):
        machine = _net(ctx, used=False)
        chains = [_rooms(machine, 512) for _ in range(8)]
        chains[place] = [bad]
        _received(ctx, machine, chains, (1514, 60, 1514))
        machine.link.close()


@clause("hostile", "rx-in-hole", source="CVE-2021-3748; CVE-2014-0055", rings=FORMATS, devices=NET)
def rx_in_hole(ctx: Context) -> None:
    """A receive buffer where there is no memory, first, second, or in the middle of a frame."""
    _one_bad(ctx, (HOLE, 512, WRITE))


@clause("hostile", "rx-past-region", source="CVE-2018-1059; CVE-2023-41051", rings=FORMATS, devices=NET)
def rx_past_region(ctx: Context) -> None:
    """A receive buffer that ends behind a region."""
    machine = _net(ctx, used=False)
    end = machine.memory.regions[1].end
    machine.link.close()
    _one_bad(ctx, (end - 64, 65536, WRITE))


@clause("hostile", "rx-len-max", source="CVE-2016-7422; CVE-2014-0055", rings=FORMATS, devices=NET)
def rx_len_max(ctx: Context) -> None:
    """A receive buffer of 2^32 - 1 bytes, and one of none."""
    machine = _net(ctx, used=False)
    start = machine.memory.regions[1].gpa
    machine.link.close()
    _one_bad(ctx, (start, 0xFFFFFFFF, WRITE))
    _one_bad(ctx, (start, 0, WRITE))


@clause("hostile", "rx-readable", source="virtio 1.3, 5.1.6.3", rings=FORMATS, devices=NET)
def rx_readable(ctx: Context) -> None:
    """A receive buffer that the device may only read."""
    machine = _net(ctx, used=False)
    start = machine.memory.regions[1].gpa
    machine.link.close()
    _one_bad(ctx, (start, 512, 0))


@clause("hostile", "rx-none", source="CVE-2015-7295; CVE-2019-3900", rings=FORMATS, devices=NET, seconds=30)
def rx_none(ctx: Context) -> None:
    """Frames, and no receive buffers at all: the device drops or keeps them, and stops when it is told."""
    machine = _net(ctx, used=False)
    for _ in range(machine.setup.num):
        machine.send(machine.next_frame())
    ctx.harmless(machine, machine.work)
    ctx.recovers(machine)


@clause("hostile", "net-rarp-flood", source="SEND_RARP flood; vhost-user, SEND_RARP", devices=NET)
def rarp_flood(ctx: Context) -> None:
    """Ten thousand announcements: bounded, and nobody waits for them."""
    ctx.need_protocol(ProtocolFeature.RARP)
    link = ctx.link(more=(ProtocolFeature.RARP,))
    before = ctx.process.resident() if ctx.process else 0
    machine = ctx.machine(link=link)
    one = message(Request.SEND_RARP, b"\x02\x00\x00\x00\x00\x01\x00\x00")
    for _ in range(100):
        link.send_raw(one * 100)
    if not link.drain():
        raise Failure("hung up at announcements")
    if ctx.process and ctx.process.resident() > before + GROWTH:
        raise Failure("memory grows with every announcement")
    machine.reset()
    machine.probe()
