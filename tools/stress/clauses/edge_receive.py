"""Frames that are received into, or sent from, buffers of rare sizes and shapes."""

from __future__ import annotations

import itertools
from typing import Final

import attrs

from vhostmp.tools.stress.clause import FORMATS, SETTLE, Context, clause
from vhostmp.tools.stress.consts import Feature
from vhostmp.tools.stress.net import NetMachine
from vhostmp.tools.stress.ring import Segment
from vhostmp.tools.stress.verdict import Failure

NET: Final = ("net",)
MERGE: Final = "virtio 1.3, 5.1.6.3.1 and 5.1.6.4: mergeable receive buffers"
HEADER: Final = 12
MERGED_MOST: Final = 50
"""Buffers for a frame: what a driver has for the largest one, of 1526 bytes each, and some more."""
LARGEST: Final = 65550  # virtio 1.3, 5.1.6.3.1: frame and header, with offloads


def echoing(ctx: Context, num: int = 256, *, merge: bool = True) -> NetMachine:
    """Return a machine whose frames come back, with mergeable buffers or without. NotApplicable when they do not."""
    ctx.need_echo()
    if merge:
        ctx.need(Feature.NET_MRG_RXBUF)
    without = [] if merge else [Feature.NET_MRG_RXBUF]
    return ctx.net(attrs.evolve(ctx.setup(features=ctx.features(without=without), num=num), buffers=32 << 20))


@clause("edge", "receive-exact", source="virtio 1.3, 5.1.6.3.1", rings=FORMATS, devices=NET)
def exact(ctx: Context) -> None:
    """A receive buffer is as long as header and frame, and not a byte longer."""
    for merge in (False, True):
        if merge and not ctx.facts.features >> Feature.NET_MRG_RXBUF & 1:
            continue
        machine = echoing(ctx, merge=merge)
        for size in (60, 61, 127, 1500, 1514):
            machine.room = size + machine.header_size
            machine.post(count=4)
            frames = [machine.next_frame(size) for _ in range(4)]
            for frame in frames:
                machine.send(frame)
            machine.tx().kick()
            machine.finish(frames)
        machine.close()


@clause("edge", "receive-merged", source=MERGE, rings=FORMATS, devices=NET)
def merged(ctx: Context) -> None:
    """Frames arrive over many small buffers of one size, from 13 bytes on: num_buffers counts them."""
    for room in (HEADER + 1, 16, 31, 64, 100, 256, 1000):
        with echoing(ctx) as machine:
            machine.room = room
            for size in (60, 300, 1514):
                if size // room > MERGED_MOST:
                    continue
                machine.post()
                frame = machine.next_frame(size)
                machine.send(frame)
                machine.tx().kick()
                machine.finish([frame])


@clause("edge", "receive-merged-mixed", source=MERGE, rings=FORMATS, devices=NET)
def mixed(ctx: Context) -> None:
    """Receive buffers of all sizes one after the other."""
    machine = echoing(ctx)
    for _ in range(40):
        while machine.rx().driver.free:
            machine.room = ctx.rng.choice((HEADER + 21, 40, 61, 128, 700, 1526, 2048))
            machine.post(count=1)
        frame = machine.next_frame(ctx.rng.choice((60, 61, 400, 1514)))
        machine.send(frame)
        machine.tx().kick()
        machine.finish([frame])


@clause("edge", "receive-buffers-run-out", source=MERGE, rings=FORMATS, devices=NET)
def run_out(ctx: Context) -> None:
    """There are too few buffers for a frame, then there are more: it arrives whole or not at all."""
    for few in (1, 5, 10):
        with echoing(ctx) as machine:
            machine.room = 100
            machine.post(count=few)
            frame = machine.next_frame(1000)
            machine.send(frame)
            machine.tx().kick()
            if not machine.rx().quiet(SETTLE / 5):
                raise Failure("a part of a frame was received before there was room for the whole")
            machine.post(count=40)
            machine.give(machine.tx().take(1))
            machine.forget()
            machine.room = 2048
            machine.traffic()


@clause("edge", "receive-tables", source="virtio 1.3, 5.1.6.3.1; 2.7.5.3 and 2.8.7", rings=FORMATS, devices=NET)
def tables(ctx: Context) -> None:
    """Receive buffers are indirect tables of many parts."""
    ctx.need(Feature.INDIRECT_DESC)
    machine = echoing(ctx, num=64, merge=False)
    ring = machine.rx()
    for _ in range(10):
        while ring.driver.free:
            gpa = machine.arena.take(2048)
            cuts = [0, 4, HEADER, 13, 60, 1000, 2048]
            places = [(gpa + a, b - a) for a, b in itertools.pairwise(cuts)]
            machine.add(ring, writable=places, indirect=True)
        ring.kick()
        frames = [machine.next_frame(size) for size in (60, 1514, 200)]
        for frame in frames:
            machine.send(frame)
        machine.tx().kick()
        machine.finish(frames)


@clause("edge", "send-empty", source="virtio 1.3, 5.1.6.2: header, then the packet", rings=FORMATS, devices=NET)
def send_empty(ctx: Context) -> None:
    """A header with no frame behind it, and frames too short for any network, come back to the driver."""
    machine = ctx.net()
    for size in (0, 1, 13, 14, 17):
        machine.post()
        machine.send(bytes(size))
        machine.tx().kick()
        machine.give(machine.tx().take(1))
        machine.forget()
    machine.traffic()


@clause("edge", "send-largest", source="virtio 1.3, 5.1.6.3.1: 65,550 bytes at most", rings=FORMATS, devices=NET)
def send_largest(ctx: Context) -> None:
    """A frame of the largest size, in one descriptor and in many, is taken; whether it arrives is the network's."""
    machine = ctx.net(attrs.evolve(ctx.setup(num=256), buffers=32 << 20))
    for cuts in ((), (HEADER,), tuple(range(4096, LARGEST, 4096)), tuple(range(400, LARGEST, 1500))):
        machine.post()
        machine.send(machine.next_frame(LARGEST - HEADER), cuts=cuts)
        machine.tx().kick()
        machine.give(machine.tx().take(1))
        machine.forget()
    machine.traffic()


@clause("edge", "send-backwards", source="virtio 1.3, 2.7.4.2", rings=FORMATS, devices=NET)
def backwards(ctx: Context) -> None:
    """The parts of a frame lie in memory in the reverse of their order."""
    machine = ctx.net(ctx.setup(num=128))
    for size in (60, 333, 1514):
        frame = machine.next_frame(size)
        data = machine.packet(frame)
        step = 64
        base = machine.arena.take(len(data) + step)
        places: list[Segment] = []
        at = base + len(data)
        for start in range(0, len(data), step):
            part = data[start : start + step]
            at -= len(part)
            machine.memory.write(at, part)
            places.append((at, len(part)))
        if machine.echoes:
            machine.post()
        machine.tx().driver.add(places)
        machine.tx().kick()
        if machine.echoes and machine.receive()[0][14:] != frame[14:]:
            raise Failure(f"a frame of {size} bytes came back with other contents")
        machine.tx().take(1)
