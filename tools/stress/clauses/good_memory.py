"""Guest memory as a careful front-end shares it: plugged, unplugged, moved, and its writes logged for migration."""

from __future__ import annotations

import mmap
import time
from typing import Final

from vhostmp.tools.stress.arena import Arena
from vhostmp.tools.stress.clause import FORMATS, SETTLE, Context, clause
from vhostmp.tools.stress.consts import Feature, ProtocolFeature, Request, bits
from vhostmp.tools.stress.frontend import log_area, u64
from vhostmp.tools.stress.machine import BUFFERS_GPA, PAGE, Machine
from vhostmp.tools.stress.memory import Region
from vhostmp.tools.stress.verdict import Failure, NotApplicable

EXTRA_GPA: Final = 2 << 30
EXTRA_BYTES: Final = 64 << 10
POISON: Final = 0xA5
LOG_SOURCE: Final = "vhost-user, Migration"
RING_LOG: Final = 1 << 20
"""Where changes of the used rings are logged: their guest-physical address, as QEMU says it too."""
ADDR_F_LOG: Final = 1  # VHOST_VRING_F_LOG


@clause("good", "max-mem-slots", source="vhost-user, VHOST_USER_GET_MAX_MEM_SLOTS")
def max_slots(ctx: Context) -> None:
    """The back-end says for how many memory regions it has room: one at least."""
    ctx.need_protocol(ProtocolFeature.CONFIGURE_MEM_SLOTS)
    if not 1 <= ctx.link().get_u64(Request.GET_MAX_MEM_SLOTS) < 1 << 32:
        raise Failure(f"{ctx.facts.slots} memory slots are offered")


@clause("good", "mem-regions-come-and-go", source="vhost-user, VHOST_USER_ADD_MEM_REG and REM_MEM_REG", rings=FORMATS)
def come_and_go(ctx: Context) -> None:
    """Memory is plugged in while requests are under way, used, and unplugged when nothing is in it any more."""
    ctx.need_protocol(ProtocolFeature.CONFIGURE_MEM_SLOTS)
    machine = ctx.machine()
    for turn in range(20):
        machine.offer(8)
        machine.go()
        extra = machine.add_region(EXTRA_GPA + turn * EXTRA_BYTES, EXTRA_BYTES)
        machine.collect()
        machine.use(Arena(extra.gpa, extra.size), 8)
        machine.remove_region(extra)
    machine.traffic()


@clause("good", "mem-table-again", source="vhost-user, VHOST_USER_SET_MEM_TABLE", rings=FORMATS)
def table_again(ctx: Context) -> None:
    """The table is set again while requests are under way: the same memory, with and without a region that is new."""
    machine = ctx.machine()
    extra = machine.memory.add(EXTRA_GPA, EXTRA_BYTES)
    known = machine.memory.regions[:-1]
    for turn in range(20):
        machine.offer(8)
        machine.go()
        machine.set_mem_table([*known, extra] if turn % 2 else known)
        machine.collect()
    machine.traffic()


def moved(machine: Machine, old: Region) -> Region:
    """Return other memory with the same contents at the same place, which the device does not know of yet."""
    place = machine.memory.regions.index(old)
    new = machine.memory.add(old.gpa, old.size)
    new.buf[:] = old.buf
    machine.memory.regions.remove(new)
    machine.memory.regions[place] = new
    return new


@clause("good", "mem-table-moves", source="vhost-user, VHOST_USER_SET_MEM_TABLE", rings=FORMATS)
def table_moves(ctx: Context) -> None:
    """Other memory is put in place of the buffers: after the reply the old memory is touched no more."""
    machine = ctx.machine()
    for _ in range(8):
        machine.traffic(16)
        old = machine.memory.region_of(BUFFERS_GPA)
        moved(machine, old)
        machine.set_mem_table()
        old.buf[:] = bytes([POISON]) * old.size
        machine.traffic(40)
        touched = bytes(old.buf).count(POISON) != old.size
        old.close()
        if touched:
            raise Failure("memory that was replaced has been written to after the reply to SET_MEM_TABLE")


@clause("good", "mem-table-moves-rings", source="vhost-user, VHOST_USER_SET_MEM_TABLE; SET_VRING_ADDR", rings=FORMATS)
def rings_move(ctx: Context) -> None:
    """Rings are stopped, other memory is put in their place, and they go on at their bases."""
    machine = ctx.machine()
    for _ in range(8):
        machine.traffic(16)
        bases = machine.stop_all()
        old = machine.rings[0].region
        new = moved(machine, old)
        for ring in machine.rings:
            ring.region = new
            ring.driver.rebase(new.buf)
        machine.set_mem_table()
        old.close()
        machine.resume(bases)
    machine.traffic()


class Log:
    """A dirty log that covers a machine's memory. Bit n is page n (vhost-user, "Migration")."""

    def __init__(self, ctx: Context, machine: Machine) -> None:
        """Share it with the device."""
        self.size: Final = -(-max(one.end for one in machine.memory.regions) // PAGE // 8 // PAGE) * PAGE
        fd = ctx.memfd(self.size)
        self.map: Final = mmap.mmap(fd, self.size)
        ctx.stack.callback(self.map.close)
        machine.link.answer(Request.SET_LOG_BASE, log_area(self.size), [fd])
        self.machine: Final = machine

    def switch(self, *, on: bool) -> None:
        """Switch logging on or off, as QEMU does it: features, then every ring."""
        machine = self.machine
        features = machine.setup.features | (bits(Feature.LOG_ALL) if on else 0)
        machine.link.must(Request.SET_FEATURES, u64(features))
        for ring in machine.rings:
            log = machine.rings[0].region.gpa + ring.layout.used
            machine.link.must(Request.SET_VRING_ADDR, machine.addresses(ring, flags=ADDR_F_LOG * on, log=log))

    def take(self) -> set[int]:
        """Return the pages that are marked, and clear them."""
        data = self.map[:]
        self.map[:] = bytes(self.size)
        return {8 * at + bit for at, byte in enumerate(data) if byte for bit in range(8) if byte >> bit & 1}


def logging(ctx: Context) -> tuple[Machine, Log]:
    """Return a machine whose device logs nothing yet, and its log."""
    ctx.need(Feature.LOG_ALL)
    ctx.need_protocol(ProtocolFeature.LOG_SHMFD)
    machine = ctx.machine(link=ctx.link(more=[ProtocolFeature.LOG_SHMFD]))
    return machine, Log(ctx, machine)


def written(machine: Machine, count: int) -> set[int]:
    """Do `count` requests; return the pages of buffers that the device has changed. NotApplicable when it has none."""
    machine.offer(count)
    before = machine.memory.snapshot()
    machine.go()
    machine.collect()
    rings = machine.rings[0].region
    changed = {gpa // PAGE for gpa in machine.memory.written(before, [(rings.gpa, rings.size)])}
    if not changed:
        raise NotApplicable("the back-end writes to no buffer")
    return changed


@clause("good", "log-buffers", source=LOG_SOURCE, rings=FORMATS)
def log_buffers(ctx: Context) -> None:
    """While logging is on, every page of a buffer that the device writes to is marked by the time the rings stand."""
    machine, log = logging(ctx)
    log.switch(on=True)
    for _ in range(4):
        changed = written(machine, 16)
        bases = machine.stop_all()
        missing = changed - log.take()
        if missing:
            raise Failure(f"{len(missing)} of {len(changed)} pages that changed are not marked: {min(missing):#x}")
        machine.resume(bases)
        log.switch(on=True)


@clause("good", "log-used-ring", source=f"{LOG_SOURCE}; VHOST_VRING_F_LOG", rings=("split",))
def log_used(ctx: Context) -> None:
    """While logging is on, what the device writes to the used ring is marked at the address given for that."""
    machine, log = logging(ctx)
    log.switch(on=True)
    machine.traffic(8)
    ring = machine.work
    machine.stop_all()
    page = (machine.rings[0].region.gpa + ring.layout.used) // PAGE
    if page not in log.take():
        raise Failure(f"the used ring of ring {ring.index} has changed, and its page {page:#x} is not marked")


@clause("good", "log-off", source=LOG_SOURCE, rings=FORMATS)
def log_off(ctx: Context) -> None:
    """Before logging is switched on and after it was switched off nothing is marked."""
    machine, log = logging(ctx)
    for _ in range(3):
        machine.traffic(16)
        marked = log.take()
        if marked:
            raise Failure(f"logging is off, and {len(marked)} pages are marked: {min(marked):#x}")
        log.switch(on=True)
        machine.traffic(16)
        log.switch(on=False)
        time.sleep(SETTLE / 5)
        log.take()


@clause("good", "log-replaced", source=f"{LOG_SOURCE}: VHOST_USER_SET_LOG_BASE", rings=FORMATS)
def log_replaced(ctx: Context) -> None:
    """Another log is given while logging is on: after the reply the old one is marked no more."""
    machine, old = logging(ctx)
    old.switch(on=True)
    machine.traffic(8)
    new = Log(ctx, machine)
    old.take()
    changed = written(machine, 16)
    bases = machine.stop_all()
    if old.take():
        raise Failure("the old log is still marked")
    missing = changed - new.take()
    if missing:
        raise Failure(f"{len(missing)} of {len(changed)} pages that changed are not marked in the new log")
    machine.resume(bases)


@clause("good", "log-fd", source="vhost-user, VHOST_USER_SET_LOG_FD")
def log_fd(ctx: Context) -> None:
    """An eventfd for the log is taken; logging works as ever."""
    machine, log = logging(ctx)
    machine.link.must(Request.SET_LOG_FD, fds=[ctx.eventfd()])
    log.switch(on=True)
    machine.traffic(16)
    log.switch(on=False)


@clause("good", "mem-table-of-many", source="vhost-user, Memory regions description: up to 8 regions", rings=FORMATS)
def many_regions(ctx: Context) -> None:
    """Eight regions in one table, whose buffers are all used."""
    machine = ctx.machine(start=False)
    regions = [machine.memory.add(EXTRA_GPA + 2 * at * EXTRA_BYTES, EXTRA_BYTES) for at in range(6)]
    machine.set_mem_table()
    machine.start_all()
    for one in regions:
        machine.use(Arena(one.gpa, one.size), 8)
