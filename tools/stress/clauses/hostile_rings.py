"""Descriptors and rings as an enemy writes them. The work ring is hit; it alone may suffer."""

from __future__ import annotations

from vhostmp.tools.stress.clause import Context, clause
from vhostmp.tools.stress.ring import NEXT
from vhostmp.tools.stress.split import pack_descriptor


@clause("hostile", "ring-next-loop", source="CVE-2019-9547; virtio 1.3, 2.7.5.2", rings=("split",))
def next_loop(ctx: Context) -> None:
    """A chain that runs in a circle."""
    machine = ctx.machine()
    ring = machine.work
    gpa = machine.put(bytes(64))
    ring.driver.add([(gpa, 64)])
    head = next(iter(ring.driver.in_flight))
    ring.driver.write_descriptor(head, pack_descriptor(gpa, 64, NEXT, head))
    ctx.harmless(machine, ring)
    ctx.recovers(machine, ring)
