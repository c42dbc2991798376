"""A virtual machine as a back-end sees it: a connection, guest memory, virtqueues with their eventfds, a driver.

What a request is depends on the class of the device: net.py, blk.py and rng.py fill it in. They share:

- `start` and `stop` a ring, alone or all of them, by the messages that a front-end sends, in QEMU's order;
- `kick` tells the device, `take` waits for what it used: by its interrupt, so that one that never comes is found;
- `probe` sends ordinary requests through each pair of rings and checks what comes back: is this device well?

Rules: the machine is careful. A clause that wants something else writes it itself, into the memory, the rings
(`ring.driver`) or the connection (`link`).
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import ClassVar, Final, Self

import attrs

from vhostmp.tools.stress.arena import Arena, Arenas
from vhostmp.tools.stress.consts import Feature, ProtocolFeature, Request, has
from vhostmp.tools.stress.frontend import U64_BYTES, mem_table, single_region, u64, vring, vring_addr
from vhostmp.tools.stress.iommu import SHIFT, Iommu, is_behind
from vhostmp.tools.stress.link import Link
from vhostmp.tools.stress.memory import Memory, Region
from vhostmp.tools.stress.packed import WRAP, PackedDriver, packed_layout
from vhostmp.tools.stress.ring import WRITE, DeviceError, Part, RingLayout, Segment, Used
from vhostmp.tools.stress.split import SplitDriver
from vhostmp.tools.stress.verdict import Failure

RINGS_GPA: Final = 1 << 20
BUFFERS_GPA: Final = 1 << 30
BUFFERS_BYTES: Final = 4 << 20
PAGE: Final = 4096
S_ACKNOWLEDGE: Final = 1  # virtio 1.3, 2.1
S_DRIVER: Final = 2
S_DRIVER_OK: Final = 4
S_FEATURES_OK: Final = 8
S_ALL: Final = S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK | S_DRIVER_OK
NOFD: Final = 1 << 8  # in the index of KICK, CALL and ERR: no descriptor comes with it


@attrs.frozen
class Setup:
    """What a machine is made with; None takes what the back-end offers."""

    features: int
    """Feature bits to acknowledge, of those offered."""
    num: int = 64
    """Entries of each ring."""
    rings: int = 2
    """How many rings are set up."""
    base: int = 0
    """Where split rings begin: the available index. Packed rings begin at this place of a round with wrap counter 1."""
    call: bool = True
    """Whether the device is given an eventfd to interrupt with."""
    buffers: int = BUFFERS_BYTES
    """Bytes of the memory that buffers lie in."""

    @property
    def packed(self) -> bool:
        """Whether rings are packed."""
        return has(self.features, Feature.RING_PACKED)


class Ring:
    """A virtqueue: its driver and its eventfds."""

    def __init__(
        self,
        index: int,
        region: Region,
        layout: RingLayout,
        setup: Setup,
        patience: float,
        iommu: Iommu | None = None,
    ) -> None:
        """Set it up in memory, empty; the device learns of it by Machine.start.

        `patience`: how long the device may take to use what it was given, seconds. `iommu`: answers while we wait.
        """
        self.iommu: Final = iommu
        self.patience: Final = patience
        self.index: Final = index
        self.region = region
        self.setup: Final = setup
        self.layout = layout
        self.kick_fd: Final = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd: Final = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.err_fd: Final = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.driver: SplitDriver | PackedDriver = self._driver(setup.base)
        self.running = False

    def _driver(self, base: int) -> SplitDriver | PackedDriver:
        kind = PackedDriver if self.setup.packed else SplitDriver
        first = base | WRAP if self.setup.packed else base
        return kind(self.region.buf, self.layout, gpa=self.region.gpa, features=self.setup.features, first_idx=first)

    @property
    def base(self) -> int:
        """Where the device is to begin, as SET_VRING_BASE has it, when the ring is empty."""
        place = self.driver.used_idx
        return place | place << 16 if self.setup.packed else place

    def renew(self, base: int = 0) -> None:
        """Begin with an empty ring at the same place. The device does not use it."""
        self.driver.close()
        self.driver = self._driver(base)

    def place(self, region: Region, layout: RingLayout) -> None:
        """Make it anew, empty, elsewhere. The device does not use it."""
        self.region, self.layout = region, layout
        self.renew()

    def notify(self) -> None:
        """Kick the device whether it wants that or not."""
        with contextlib.suppress(BlockingIOError):  # the counter is full: it has been kicked, and has not looked
            os.eventfd_write(self.kick_fd, 1)

    def kick(self) -> None:
        """Publish what was added, and notify the device if it wants that."""
        if self.driver.publish():
            self.notify()

    @property
    def broken(self) -> bool:
        """Whether the device signalled an error on this ring."""
        return bool(select.select([self.err_fd], [], [], 0)[0])

    def take(self, count: int = 1, patience: float | None = None) -> list[Used]:
        """Wait until `count` chains came back. Failure when they do not, or with no interrupt, or wrongly."""
        found: list[Used] = []
        until = time.monotonic() + (self.patience if patience is None else patience)
        try:
            while True:
                found += self.driver.reap()
                if len(found) >= count:
                    return found
                if self.driver.want_interrupts():
                    continue
                self._sleep(until, len(found), count)
        except DeviceError as error:
            raise Failure(f"ring {self.index}: {error}") from None

    def _sleep(self, until: float, got: int, count: int) -> None:
        left = max(until - time.monotonic(), 0)
        asks = self.iommu.waits if self.iommu else []
        ends = [self.call_fd, self.err_fd, *asks]
        ready = select.select(ends, [], [], left if self.setup.call else min(left, 0.002))[0]
        if self.iommu and set(asks) & set(ready):
            self.iommu.serve()
        elif self.call_fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.call_fd)
        elif self.err_fd in ready:
            raise Failure(f"ring {self.index}: the device signalled an error")
        elif time.monotonic() >= until:
            if self.driver.pending():
                raise DeviceError("used buffers, and no interrupt for them")
            raise Failure(f"ring {self.index}: {got} of {count} chains came back")

    def called(self, patience: float | None = None) -> bool:
        """Wait for an interrupt, and forget it. Whether there was one."""
        if not select.select([self.call_fd], [], [], self.patience if patience is None else patience)[0]:
            return False
        os.eventfd_read(self.call_fd)
        return True

    def quiet(self, seconds: float) -> bool:
        """Whether nothing is used for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.driver.pending():
                return False
            if self.iommu:
                self.iommu.serve()
            time.sleep(0.002)
        return not self.driver.pending()

    def close(self) -> None:
        """Close the eventfds and let go of the memory."""
        self.driver.close()
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)


class Machine:
    """A machine with one device. Made by Context.machine; `link` has been through its handshake."""

    kind: ClassVar[str]
    work_index: ClassVar[int]
    """Ring whose requests the device handles unasked: the one for hostile chains."""

    def __init__(self, link: Link, setup: Setup) -> None:
        """Make memory and rings, and tell the device of the features and the memory."""
        self.link = link
        self.setup: Final = setup
        self.shape: Callable[[Sequence[Segment]], Sequence[Segment]] = list
        """How segments of requests are cut: into others that hold the same bytes in the same order."""
        self.tables: Arena | None = None
        """Where indirect tables are put; None: among the buffers."""
        self.spread = 1
        """How many descriptors a receive buffer takes at most."""
        self.memory: Final = Memory(SHIFT if is_behind(setup.features) else 0)
        self.iommu: Final = Iommu(self.memory) if is_behind(setup.features) else None
        self.rings: Final[list[Ring]] = []
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        setup = self.setup
        layouts: list[RingLayout] = []
        end = 0
        for _ in range(setup.rings):
            layouts.append(packed_layout(end, setup.num) if setup.packed else RingLayout.at(end, setup.num))
            end = -(-layouts[-1].end // PAGE) * PAGE
        rings = self.memory.add(RINGS_GPA, end)
        buffers = self.memory.add(BUFFERS_GPA, setup.buffers)
        self.arena = Arena(buffers.gpa, buffers.size)
        for index, layout in enumerate(layouts):
            self.rings.append(Ring(index, rings, layout, setup, self.link.patience, self.iommu))
        self._introduce()

    def _introduce(self) -> None:
        if self.iommu:
            self.iommu.open(self.link)
        self.set_status(S_ACKNOWLEDGE)
        self.set_status(S_ACKNOWLEDGE | S_DRIVER)
        self.link.must(Request.SET_FEATURES, u64(self.setup.features))
        self.link.features = self.setup.features
        self.set_status(S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK)
        self.set_mem_table()

    def set_status(self, status: int) -> None:
        """Tell the device its status, where that is negotiated (STATUS)."""
        if has(self.link.protocol, ProtocolFeature.STATUS):
            self.link.must(Request.SET_STATUS, u64(status))

    def rejoin(self, link: Link) -> None:
        """Go on over another connection, which has been through its handshake: rings that ran start where they are."""
        self.link.close()
        self.link = link
        self._introduce()
        for ring in self.rings:
            if ring.running:
                self.start(ring)
        self.set_status(S_ALL)

    @property
    def work(self) -> Ring:
        """The ring for hostile chains."""
        return self.rings[self.work_index]

    def set_mem_table(self, regions: Sequence[Region] | None = None) -> None:
        """Tell the device what memory there is: all, unless told."""
        told = self.memory.regions if regions is None else regions
        self.link.must(Request.SET_MEM_TABLE, mem_table(*(one.packed() for one in told)), [one.fd for one in told])

    def add_region(self, gpa: int, size: int, *, offset: int = 0) -> Region:
        """Plug memory in, by ADD_MEM_REG (CONFIGURE_MEM_SLOTS)."""
        new = self.memory.add(gpa, size, offset=offset)
        self.link.must(Request.ADD_MEM_REG, single_region(new.packed()), [new.fd])
        return new

    def remove_region(self, old: Region) -> None:
        """Unplug memory, by REM_MEM_REG, and free it."""
        self.link.must(Request.REM_MEM_REG, single_region(old.packed()))
        self.memory.remove(old)

    def addresses(self, ring: Ring, *, flags: int = 0, log: int = 0) -> bytes:
        """Return what SET_VRING_ADDR says of a ring."""
        driver, uva = ring.driver, self.memory.uva if self.iommu is None else _unchanged
        return vring_addr(
            ring.index,
            flags,
            desc=uva(driver.desc_gpa),
            avail=uva(driver.avail_gpa),
            used=uva(driver.used_gpa),
            log=log,
        )

    def start(self, ring: Ring, *, enable: bool = True, base: int | None = None, kick: bool = True) -> None:
        """Enable a ring, set it up where it stands or at a base that the device gave, start it by its kick eventfd.

        A device throws frames away that it finds in a transmit ring which is started and disabled (vhost-user, "Ring
        states"): so it is enabled first.
        """
        link, index = self.link, ring.index
        if enable:
            self.enable(ring)
        link.must(Request.SET_VRING_NUM, vring(index, ring.layout.num))
        link.must(Request.SET_VRING_BASE, vring(index, ring.base if base is None else base))
        link.must(Request.SET_VRING_ADDR, self.addresses(ring))
        link.must(Request.SET_VRING_ERR, u64(index), [ring.err_fd])
        if self.setup.call:
            link.must(Request.SET_VRING_CALL, u64(index), [ring.call_fd])
        elif kick:
            link.must(Request.SET_VRING_CALL, u64(index | NOFD))
        if kick:
            link.must(Request.SET_VRING_KICK, u64(index), [ring.kick_fd])
        else:  # by messages
            link.must(Request.SET_VRING_KICK, u64(index | NOFD))
            link.must(Request.VRING_KICK, vring(index, 0))
        ring.running = True

    def enable(self, ring: Ring, value: int = 1) -> None:
        """Enable a ring, or disable it with 0, if that is negotiated; without, rings are enabled from their start."""
        if has(self.setup.features, Feature.PROTOCOL_FEATURES):
            self.link.must(Request.SET_VRING_ENABLE, vring(ring.index, value))

    def start_all(self) -> Self:
        """Start every ring. Behind an IOMMU all memory is mapped."""
        for ring in self.rings:
            self.start(ring)
        if self.iommu:
            self.iommu.allow_all()
        self.set_status(S_ALL)
        return self

    def use(self, where: Arena, count: int = 1, *, indirect: bool = False) -> None:
        """Do requests whose buffers lie in an arena, but for those that frames are received in."""
        usual, self.arena = self.arena, where
        try:
            self.offer(count, indirect=indirect)
            self.arena = Arenas(usual, where)
            self.go()
            self.collect()
        finally:
            self.arena = usual

    def stop(self, ring: Ring) -> int:
        """Stop a ring, and return the base at which the device stopped."""
        reply = self.link.answer(Request.GET_VRING_BASE, vring(ring.index, 0))
        if len(reply.payload) != U64_BYTES or int.from_bytes(reply.payload[:4], "little") != ring.index:
            raise Failure(f"GET_VRING_BASE of ring {ring.index} was answered with {reply.payload.hex()}")
        ring.running = False
        return int.from_bytes(reply.payload[4:], "little")

    def stop_all(self) -> list[int]:
        """Stop every ring that runs; return their bases."""
        return [self.stop(ring) for ring in self.rings if ring.running]

    def resume(self, bases: Sequence[int]) -> None:
        """Start all rings, which were stopped, at the bases that `stop_all` returned."""
        for ring, base in zip(self.rings, bases, strict=True):
            self.start(ring, base=base)
            ring.notify()

    def restart(self, ring: Ring) -> None:
        """Stop a ring, drop what is in it, and start it as on the first day."""
        if ring.running:
            self.stop(ring)
        ring.renew()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(ring.err_fd)
        self.start(ring)

    def resize(self, ring: Ring, num: int) -> None:
        """Make an empty ring of `num` entries, no more than it was made with, where a stopped one stands."""
        start = ring.layout.desc
        ring.layout = packed_layout(start, num) if self.setup.packed else RingLayout.at(start, num)
        ring.renew()

    def add(
        self, ring: Ring, readable: Sequence[Segment] = (), writable: Sequence[Segment] = (), *, indirect: bool = False
    ) -> None:
        """Add a chain to a ring, its segments shaped; in a table of their own if they are to be indirect."""
        readable, writable = self.shape(readable), self.shape(writable)
        if not indirect:
            ring.driver.add(readable, writable)
            return
        parts = [(gpa, size, 0) for gpa, size in readable] + [(gpa, size, WRITE) for gpa, size in writable]
        raw = ring.driver.pack_table(parts)
        table = (self.tables or self.arena).take(len(raw))
        self.memory.write(table, raw)
        ring.driver.add_table(table, readable, writable)

    def reset(self) -> None:
        """Stop all rings, drop what is in them, and start all as on the first day, as after a driver's reset.

        Every buffer is free again.
        """
        self.stop_all()
        self.arena.clear()
        for ring in self.rings:
            self.restart(ring)
        if self.iommu:
            self.iommu.allow_all()

    def given(self) -> list[Segment]:
        """Return where the device may write now: its parts of the rings that run, and what is in flight in them."""
        spans: list[Segment] = []
        for ring in self.rings:
            if ring.running:
                spans += ring.driver.device_parts
                spans += (segment for chain in ring.driver.in_flight.values() for segment in chain.writable)
        return spans

    def good_parts(self) -> list[Part]:
        """Return the parts of an ordinary request for the work ring, in new buffers."""
        raise NotImplementedError

    def good_chain(self, *, indirect: bool = False) -> None:
        """Add an ordinary request to the work ring: `go` has it done, `collect` waits for it."""
        raise NotImplementedError

    @property
    def good_width(self) -> int:
        """How many descriptors an ordinary request has."""
        return 1

    def offer(self, count: int, *, indirect: bool = False) -> None:
        """Add `count` ordinary requests to the work ring."""
        for _ in range(count):
            self.good_chain(indirect=indirect)

    def go(self) -> None:
        """Have the device do what was offered: publish it, and kick if that is wanted."""
        self.work.kick()

    def forget(self) -> None:
        """Forget what was offered, when nothing but its buffers comes back."""

    def collect(self) -> None:
        """Wait for all that was offered, and check it."""
        ring = self.work
        self.give(ring.take(len(ring.driver.in_flight)))
        ring.driver.check_idle()

    def traffic(self, count: int = 32) -> None:
        """Do `count` ordinary requests through each pair of rings that runs, as many at a time as fit, and check them.

        Failure when something is wrong.
        """
        raise NotImplementedError

    def probe(self) -> None:
        """Send ordinary requests through running rings and check them. Failure when something is wrong."""
        raise NotImplementedError

    def put(self, data: bytes) -> int:
        """Write bytes into a new buffer, and return its address."""
        gpa = self.arena.take(len(data))
        self.memory.write(gpa, data)
        return gpa

    def give(self, used: Iterable[Used]) -> None:
        """Free the buffers of chains that came back: the first of each, which `put` or `arena.take` made."""
        for one in used:
            self.arena.give((one.chain.readable or one.chain.writable)[0][0])

    def close(self) -> None:
        """Hang up and free everything. Idempotent."""
        self.link.close()
        if self.iommu:
            self.iommu.hang_up()
        while self.rings:
            self.rings.pop().close()
        self.memory.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _unchanged(gpa: int) -> int:
    """A ring's address behind an IOMMU: it is an I/O virtual one, as all others (vhost-user, "Ring addresses")."""
    return gpa
