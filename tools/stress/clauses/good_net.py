"""What a careful network driver does."""

from __future__ import annotations

from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.consts import Feature
from vhostmp.tools.stress.split import NetHeader
from vhostmp.tools.stress.verdict import Failure

EVERY_SIZE = 64


@clause("good", "traffic", source="virtio 1.3, 5.1.6", rings=FORMATS, devices=("net",))
def traffic(ctx: Context) -> None:
    """Frames of every size from 60 bytes on are taken, and come back whole and in order where the back-end echoes."""
    machine = ctx.net()
    for first in range(60, 1514, EVERY_SIZE):
        machine.exchange(range(first, min(first + EVERY_SIZE // 2, 1515)))


@clause(
    "good", "num-buffers-one", source="virtio 1.3, 5.1.6.4.1: num_buffers MUST be 1", rings=FORMATS, devices=("net",)
)
def num_buffers_one(ctx: Context) -> None:
    """A frame that arrives without MRG_RXBUF says that it is in one buffer."""
    ctx.need_echo()
    ctx.need(Feature.VERSION_1)
    machine = ctx.net(ctx.setup(features=ctx.features(without=[Feature.NET_MRG_RXBUF])))
    machine.post()
    machine.send(machine.next_frame())
    machine.tx().kick()
    (used,) = machine.rx().take(1)
    header = NetHeader.unpack(machine.memory.read(used.chain.writable[0][0], NetHeader.SIZE))
    if header.num_buffers != 1:
        raise Failure(f"num_buffers is {header.num_buffers}")
