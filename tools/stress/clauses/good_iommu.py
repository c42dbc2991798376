"""Devices behind an IOMMU, of a front-end that does as the document says (vhost-user, "IOMMU support")."""

from __future__ import annotations

from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.clauses.good_resume import stays_flat
from vhostmp.tools.stress.iommu import Iommu
from vhostmp.tools.stress.machine import Machine
from vhostmp.tools.stress.verdict import Failure

SOURCE = "vhost-user, IOMMU support"
ROUNDS = 400
SETTLED = 80
"""After so many requests without a question all pages are known: more than a ring has entries."""
OTHER = 2 << 30
POISON = 0xA5


@clause("good", "iommu-told", source=f"{SOURCE}; virtio 1.3, 6.5", rings=FORMATS)
def told(ctx: Context) -> None:
    """Rings and buffers at I/O virtual addresses, all of which the device was told of before it asked."""
    machine, _ = ctx.behind()
    machine.traffic()
    machine.reset()
    machine.traffic()


@clause("good", "iommu-on-demand", source=f"{SOURCE}: IOTLB_MSG, a miss", rings=FORMATS, seconds=60)
def on_demand(ctx: Context) -> None:
    """Nothing is told before it is asked for, and then page by page."""
    machine, iommu = ctx.behind(start=False)
    iommu.eager = False
    machine.start_all()
    _warm_up(machine, iommu)
    machine.probe()
    if not iommu.asked:
        raise Failure("nothing was asked, and all went well: addresses are not looked up")
    for iova, _ in iommu.asked:
        try:
            machine.memory.region_of(iova)
        except KeyError:
            raise Failure(f"the device asked for {iova:#x}, which nobody has told it") from None


def _warm_up(machine: Machine, iommu: Iommu) -> None:
    """Do requests until nothing is asked for any more; a network card may lose frames as long as something is."""
    settled = 0
    for _ in range(ROUNDS):
        known = len(iommu.asked)
        machine.good_chain()
        machine.go()
        machine.give(machine.work.take())
        machine.work.quiet(0.005)
        machine.forget()
        settled = settled + 1 if len(iommu.asked) == known else 0
        if settled > SETTLED:
            return


@clause("good", "iommu-reconnect-1000", source=f"{SOURCE}; one front-end after the other", seconds=120)
def reconnect(ctx: Context) -> None:
    """A thousand front-ends come with an IOMMU and a channel, and go: memory and descriptors stay as many."""
    stays_flat(ctx, lambda: ctx.behind()[0])


@clause("edge", "iommu-moved", source=f"{SOURCE}: IOTLB_MSG, INVALIDATE and UPDATE", rings=FORMATS, seconds=60)
def moved(ctx: Context) -> None:
    """Addresses come to stand for other memory, buffers' and rings', between requests: the old is used no more."""
    machine, iommu = ctx.behind(start=False)
    rings, buffers = machine.memory.regions[:2]
    others = {one.gpa: machine.memory.add(OTHER + one.gpa, one.size) for one in (rings, buffers)}
    machine.set_mem_table()
    machine.start_all()
    for turn in range(6):
        machine.traffic(8)
        here = (buffers, rings)[turn % 2]
        there = others[here.gpa]
        iommu.take_back(here.gpa, here.size)
        there.buf[:] = here.buf
        here.exchange(there)
        there.buf[:] = bytes([POISON]) * there.size
        for ring in machine.rings:
            if ring.region is here:
                ring.driver.rebase(here.buf)
        iommu.renew(here)
        machine.traffic(8)
        if bytes(there.buf) != bytes([POISON]) * there.size:
            raise Failure("the device wrote to memory for which no address stands any more")
