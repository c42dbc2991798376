"""What a careful network driver does."""

from __future__ import annotations

from vhostmp.tools.stress.clause import FORMATS, Context, clause

EVERY_SIZE = 64


@clause("good", "traffic", source="virtio 1.3, 5.1.6", rings=FORMATS, devices=("net",))
def traffic(ctx: Context) -> None:
    """Frames of every size from 60 bytes on are taken, and come back whole and in order where the back-end echoes."""
    machine = ctx.net()
    for first in range(60, 1514, EVERY_SIZE):
        machine.exchange(range(first, min(first + EVERY_SIZE // 2, 1515)))
