"""One device of any class: owner, features, memory table, queues, back-end; the kernel's verbs by name and meaning.

Each verb checks its arguments, makes a new state from the old one and puts it in force (`_commit`): by assignment while
no ring runs, through the flush (flush.py) while one does. A verb that raises has changed nothing. A verb's return is
the barrier: no worker uses what was replaced, ever, and its descriptors are closed.

What a class of device adds (which features, what its queues mean, which back-ends there are) is in its own module:
net.py; requests.py for those whose requests are served in Python.

Who may call: any thread; verbs of all devices of a pool exclude each other by the pool's lock. Two callers use them,
the vhost-user session and a hypervisor that embeds the library; neither has another way in.

Errors are LocalError with the errno of Linux's vhost ioctls (drivers/vhost/vhost.c) for the same mistake.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from vhostmp import rings, steps, unfinished
from vhostmp.consts import feature_names
from vhostmp.errors import LocalError, RingsLost, SysError, VhostError
from vhostmp.flush import wait_for_items
from vhostmp.iotlb import DeviceIotlb
from vhostmp.kept_device import KeptDevice
from vhostmp.parts import (
    LOG_ALL,
    BackendPart,
    DeviceState,
    MemoryPart,
    RingState,
    Setup,
    eventfd_part,
)
from vhostmp.postcopy import DevicePostcopy
from vhostmp.shared_files import SharedFiles
from vhostmp.shm import layout
from vhostmp.shm._epoch import published
from vhostmp.shm.memory import MemoryRegion, MemoryTable

if TYPE_CHECKING:
    from vhostmp.supervisor import Pool

log = logging.getLogger(__name__)

MAX_REGIONS: Final = 509  # as many as Linux has memory slots for a guest, less three
ADDR_FLAG_LOG: Final = 1
ACCESS_PLATFORM: Final = 1 << 33


@attrs.frozen
class SwapResult:
    """What a swap of the back-end took: times in microseconds, packets of all rings that moved meanwhile.

    `frames_left`: frames that the old back-end had for the guest and that were dropped, for want of receive buffers.
    """

    generation: int
    grace_us: float
    pause_us: float
    packets_crossed: int
    frames_left: int = 0


class Device(SharedFiles):
    """A device with `num_queues` rings, served by the workers of a pool. Base of the classes of devices."""

    max_regions: Final = MAX_REGIONS
    #: The configuration space; None: the front-end has its own, as QEMU for network devices.
    config: bytes | None = None
    #: Whom to tell when `config` has changed of itself, in the event loop's thread.
    on_config_change: Callable[[], None] | None = None

    def __init__(
        self,
        pool: Pool,
        *,
        num_queues: int,
        setup: Setup,
        name: str,
        offered: int,
        group_size: int = 1,
        kept: KeptDevice | None = None,
    ) -> None:
        """Register with the pool. `offered` are the feature bits for get_features; LOG_ALL is too.

        `setup` is the open back-end, taken over: closed if this fails. So many rings as `group_size` says, from a
        multiple of it on, are served by the same worker. `kept`: go on with that device, whose `setup` is given; its
        features count. LocalError when the pool has no room; nothing is left then.
        """
        super().__init__(pool, name, num_queues, group_size)
        self._setup = setup
        self._offered = kept.offered if kept else offered | LOG_ALL
        self._owned = False
        #: Why a ring could not be started last, until one can be or there is another back-end.
        self._refused: str | None = None
        #: What a guest behind an IOMMU may reach; None unless ACCESS_PLATFORM is offered.
        self.iotlb = None
        #: How its guest comes in by post-copy; None where userfaultfds cannot be made.
        self.postcopy = None
        try:
            rings, workers = (RingState(),) * num_queues, self._choose_workers(-(-num_queues // group_size))
            self._begin(kept.state if kept else DeviceState(self._setup.part(0), rings, workers, group_size))
            if offered & ACCESS_PLATFORM:
                self.iotlb = DeviceIotlb(pool, self, kept.iotlb if kept else None)
            self.postcopy = DevicePostcopy.make(pool, name, num_queues, lambda: len(self._table()) > 0)
            self.slot, self.first_ring = pool.register(self, kept)
        except BaseException:
            self._close_parts()
            raise
        self._generation = published(pool.buf, self.slot)
        if kept:
            self._go_on(kept)

    @property
    def queue_num(self) -> int:
        """How many queues there are in the units of vhost-user's GET_QUEUE_NUM, which depend on the class."""
        return self.num_queues

    def write_config(self, offset: int, data: bytes) -> None:
        """Write to the configuration space, inside of it. EPERM where it is read-only: here, everywhere."""
        raise LocalError(f"configuration bytes {offset} to {offset + len(data) - 1} are read-only", errno.EPERM)

    # -- owner and features ------------------------------------------------------------------------------------------

    def set_owner(self) -> None:
        """Take the device. EBUSY when it has an owner."""
        with self._lock:
            self._check_open()
            if self._owned:
                raise LocalError("the device has an owner already", errno.EBUSY)
            self._owned = True

    def reset_owner(self) -> None:
        """Stop all rings, drop memory, features and owner; the back-end stays."""
        with self._lock:
            self._check_owner()
            self.stop_all()

    def get_features(self) -> int:
        """Return the feature bits offered to the guest, those that the back-end carries."""
        return self._offered

    @property
    def acked_features(self) -> int:
        """The feature bits that the guest acked."""
        return self._state.features

    def set_features(self, bits: int) -> None:
        """Take the feature bits acked, with an owner or without. EOPNOTSUPP for one that is not offered.

        While a ring runs: EBUSY when any but LOG_ALL changes, EFAULT when that is set and there is no log. After it is
        cleared no worker writes to the log, ever.
        """
        with self._lock:
            self._check_open()
            if unknown := bits & ~self._offered:
                names = " ".join(feature_names(unknown, self.device_class))
                raise LocalError(f"features {names} are not offered", errno.EOPNOTSUPP)
            changed = bits ^ self._state.features
            if not changed:
                return
            if changed == LOG_ALL:
                if self._state.live and bits & LOG_ALL and self._state.log is None:
                    raise LocalError("writes cannot be logged: there is no log", errno.EFAULT)
                self._commit(attrs.evolve(self._state, features=bits))
                return
            if self._state.live:
                raise LocalError("features cannot change while a ring runs", errno.EBUSY)
            part = self._setup.part(bits)
            iotlb = self.iotlb.begin(bool(bits & ACCESS_PLATFORM)) if self.iotlb is not None else None
            self._commit(attrs.evolve(self._state, features=bits, backend=part, iotlb=iotlb))

    # -- memory ------------------------------------------------------------------------------------------------------

    def set_mem_table(self, regions: Sequence[MemoryRegion]) -> None:
        """Replace all of guest memory. After the return no worker uses the old table, ever.

        Descriptors are borrowed. E2BIG above `max_regions`, EFAULT for a region that is empty or wraps, EINVAL for
        regions that overlap or that no worker can map. A running ring that is not in the new memory is stopped, and
        RingsLost (EFAULT) is raised once the table is in force: then, and only then, something has changed in spite of
        an error.
        """
        with self._lock:
            self._check_owner()
            table = MemoryTable.build(regions, self.max_regions)
            pages = self.postcopy.pages(table.regions) if self.postcopy is not None else None
            try:
                part = MemoryPart.keep(table, pages)
            except OSError as error:
                raise SysError.wrap("cannot keep the memory table's descriptors", error) from error
            new = attrs.evolve(self._state, memory=part)
            lost = [i for i, ring in enumerate(new.rings) if ring.started and not self._ring_in(table, new, ring)]
            for index in lost:
                new = new.with_ring(index, started=False)
            self._commit(new)
            if lost:
                for index in lost:
                    self._after_stop(index)
                raise RingsLost(lost)

    def add_mem_region(self, region: MemoryRegion) -> None:
        """Add one region. EINVAL when it overlaps, E2BIG when there are too many."""
        with self._lock:
            self.set_mem_table([*self._regions(), region])

    def remove_mem_region(self, region: MemoryRegion) -> None:
        """Remove the region with the same gpa, size and uva (the rest is ignored). EINVAL when there is none."""
        with self._lock:
            known = self._regions()
            left = [r for r in known if (r.gpa, r.size, r.uva) != (region.gpa, region.size, region.uva)]
            if len(left) == len(known):
                raise LocalError(f"no memory region at gpa {region.gpa:#x} with {region.size:#x} bytes")
            self.set_mem_table(left)

    # -- rings -------------------------------------------------------------------------------------------------------

    def set_vring_num(self, index: int, num: int) -> None:
        """Set a ring's size. EBUSY while it runs; EINVAL unless a power of two up to 32,768, packed: any number."""
        with self._lock:
            self._check_ring(index, stopped=True)
            rings.check_size(self._state.features, num)
            self._set(index, size=num)
            layout.RING.write(self._pool.buf, self._ring_offset(index), "size", num)

    def set_vring_addr(self, index: int, *, desc: int, avail: int, used: int, flags: int = 0, log: int = 0) -> None:
        """Say where a ring lies, in front-end addresses. May come before the memory table.

        With ADDR_FLAG_LOG in `flags`, `log` is the used ring's guest-physical address, for the dirty log. EINVAL when
        misaligned (16, 2, 4 and 4 bytes), EOPNOTSUPP for unknown flags; EFAULT when the ring runs and does not lie
        there.
        """
        with self._lock:
            self._check_ring(index)
            if flags & ~ADDR_FLAG_LOG:
                raise LocalError(f"vring address flags {flags:#x} are unknown", errno.EOPNOTSUPP)
            for what, address, alignment in (
                ("desc", desc, 16),
                ("avail", avail, 2),
                ("used", used, 4),
                ("log", log, 4),
            ):
                if address % alignment:
                    raise LocalError(f"{what} address {address:#x} of ring {index} is not aligned to {alignment} bytes")
            logged = log if flags & ADDR_FLAG_LOG else None
            new = self._state.with_ring(index, desc=desc, avail=avail, used=used, log=logged)
            if new.rings[index].started and not self._ring_in(self._table(), new, new.rings[index]):
                raise LocalError(f"ring {index} is not in guest memory", errno.EFAULT)
            self._commit(new)

    def set_vring_base(self, index: int, base: int) -> None:
        """Set where the ring stands (rings.py). EBUSY while it runs, EINVAL above 65,535 unless packed."""
        with self._lock:
            self._check_ring(index, stopped=True)
            rings.check_base(self._state.features, base)
            self._set(index, base=base)

    def get_vring_base(self, index: int) -> int:
        """Return where the ring stands (rings.py). Does not stop it."""
        with self._lock:
            self._check_ring(index)
            return self._base(index) if self._state.rings[index].started else self._state.rings[index].base

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        """Set the eventfd (borrowed) by which the driver kicks; None: there is none. EINVAL when it is no eventfd."""
        self._set_eventfd(index, "kick", fd)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        """Set the eventfd (borrowed) that interrupts the driver. A running ring signals the new one once."""
        self._set_eventfd(index, "call", fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        """Set the eventfd (borrowed) that tells the front-end that the ring broke."""
        self._set_eventfd(index, "err", fd)

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """Enable or disable a ring. Disabled, a receive ring gets nothing and a transmit ring's packets are dropped."""
        with self._lock:
            self._check_ring(index)
            if self._state.rings[index].enabled != enable:
                self._set(index, enabled=enable)
                layout.RING.write(self._pool.buf, self._ring_offset(index), "enabled", int(enable))

    def set_vring_busyloop_timeout(self, index: int, us: int) -> None:
        """Set for how long, in microseconds, a worker polls the ring before it asks for kicks; 0: not at all."""
        with self._lock:
            self._check_ring(index)
            if not 0 <= us <= 0xFFFFFFFF:  # noqa: PLR2004 - 32 bits, as the ioctl's
                raise LocalError(f"busyloop timeout {us} does not fit in 32 bits")
            self._set(index, busyloop_us=us)

    def get_vring_busyloop_timeout(self, index: int) -> int:
        """Return for how many microseconds a ring is polled before its worker sleeps."""
        with self._lock:
            self._check_ring(index)
            return self._state.rings[index].busyloop_us

    def start_vring(self, index: int) -> None:
        """Start a ring at its base; it is served as soon as it is enabled too. No-op when it runs.

        EFAULT when its addresses were not set or are not in guest memory; EINVAL when its size was not set, or one of
        them does not go with the ring's format, as a base outside it.
        """
        with self._lock:
            self._check_ring(index)
            ring = self._state.rings[index]
            if ring.started:
                return
            if ring.desc is None:
                raise LocalError(f"ring {index} has no addresses yet", errno.EFAULT)
            if not ring.size:
                raise LocalError(f"ring {index} has no size yet")
            slot = rings.start(self._state.features, ring.size, ring.base)
            for name, _, alignment in rings.parts(self._state.features, ring.size):
                if getattr(ring, name) % alignment:
                    raise LocalError(f"{name} address of packed ring {index} is not aligned to {alignment} bytes")
            if not self._ring_in(self._table(), self._state, ring):
                raise LocalError(f"ring {index} is not in guest memory", errno.EFAULT)
            self._pool.forgive(self.first_ring + index)
            offset, write, buf = self._ring_offset(index), layout.RING.write, self._pool.buf
            start_id = self.next_start()
            region = self._state.inflight
            recover = ring.recover and region is not None and region.place(index, ring.size) is not None
            if ring.recover and not recover:
                log.warning(
                    "device %s: queue %d has more descriptors than its region of what is in flight: not used",
                    self.name,
                    index,
                )
            for name, value in (
                *slot.items(),
                ("broken", 0),
                ("recover", int(recover)),
                ("region_fault", 0),
                ("worker", 1 + self.worker_of(index)),
                ("started", 1),
            ):
                write(buf, offset, name, value)
            try:
                if self.iotlb is not None and not self._state.live:
                    self.iotlb.forget()
                self._commit(self._state.with_ring(index, started=True, start_id=start_id, recover=False))
            except BaseException as error:
                if not self._state.rings[index].started:  # else it is in force in spite of a timeout
                    self._after_stop(index)
                    self._refused = str(error)
                raise
            self._refused = None

    def stop_vring(self, index: int) -> int:
        """Stop a ring and return where it stands. After the return no worker writes to guest memory for it."""
        with self._lock:
            self._check_ring(index)
            if self._state.rings[index].started:
                self._commit(self._state.with_ring(index, started=False))
                unfinished.finish(self, index)
                self._after_stop(index)
            return self._state.rings[index].base

    # -- workers -----------------------------------------------------------------------------------------------------

    def new_worker(self) -> int:
        """Start another worker process in the pool and return its id. ENOSPC when there are 64."""
        with self._lock:
            self._check_owner()
            return self._pool.new_worker()

    def free_worker(self, worker: int) -> None:
        """End a worker process. ENODEV when there is none of that id, EBUSY while any device's queues are attached."""
        with self._lock:
            self._check_owner()
            self._pool.free_worker(worker)

    def attach_vring_worker(self, index: int, worker: int) -> None:
        """Have a worker serve a ring, and those of its group with it (its queue pair), from where they stand.

        ENODEV when there is no such worker. Under load nothing is lost, repeated or reordered. After the return the
        worker before does nothing for them any more.
        """
        with self._lock:
            self._check_ring(index)
            self.attach_worker(index // self.group_size, worker)

    def get_vring_worker(self, index: int) -> int:
        """Return the id of the worker that a ring is attached to, running or not."""
        with self._lock:
            self._check_ring(index)
            return self._state.worker_of(index)

    def attach_worker(self, group: int, worker: int) -> None:
        """attach_vring_worker for whoever administers the device: by group, with no need of an owner.

        A group is a queue pair of a network device, a queue of others. EINVAL when there is no such group.
        """
        with self._lock:
            self._check_open()
            if not 0 <= group < len(self._state.workers):
                what = "queue pair" if self.group_size > 1 else "queue"
                raise LocalError(f"no {what} {group}: the device has {len(self._state.workers)}")
            self._pool.worker(worker)
            self._settle()
            if worker == self._state.workers[group]:
                return
            try:
                steps.move(self, group, worker)
            finally:
                self._recorded()

    # -- back-end ----------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """The back-end's specification."""
        return self._setup.spec

    def set_backend(self, spec: str) -> SwapResult:
        """Swap the back-end, under load: no packet is lost, the guest notices nothing. The old one is closed.

        What waits in the queue of a tap or packet socket is delivered first, as far as the guest has receive buffers.

        Raises LocalError or SysError in one line that says what to do when the new one cannot be opened, cannot carry
        what the guest negotiated, or a worker cannot make it; the old one then goes on.
        """
        with self._lock:
            self._check_open()
            before = self._packets()
            self._settle()
            setup = self._open(spec)
            part: BackendPart | None = None
            self._frames_left = 0
            try:
                self._make_way(setup)
                part = setup.part(self._state.features)
                drained = [
                    group for group in self._drainable() if not self._ring_word(group * self.group_size, "broken")
                ]
                result = steps.replace_backend(
                    self,
                    part,
                    drained,
                    settle=lambda: wait_for_items(self._pool.buf, self._serving()),
                    waiting=lambda: any(self._ring_word(group * self.group_size, "waiting") for group in drained),
                )
            except BaseException:
                if self._state.backend is part:  # in force; a worker may still use the old one
                    self._kept_setups.append(self._setup)
                    self._setup = setup
                else:
                    setup.close()
                raise
            old, self._setup = self._setup, setup
            self._refused = None
            left = self._frames_left + (self._discard(old) if self._state.live else 0)
            old.close()
            self._swapped()
            taken_up = f"generation {result.generation}" if self._state.live else "no ring runs"
            log.info("device %s: back-end %s replaced by %s, %s", self.name, old.spec, spec, taken_up)
            if left:
                log.warning("device %s: %d frames from %s found no receive buffers: dropped", self.name, left, old.spec)
            self._recorded()
            crossed = self._packets() - before
            return SwapResult(result.generation, result.grace_us, result.pause_us, crossed, left)

    # -- life --------------------------------------------------------------------------------------------------------

    def stop_all(self) -> None:
        """The front-end is gone: stop all rings, unmap memory, close its descriptors, forget features and owner."""
        with self._lock:
            if self._closed and not self.is_leaving:
                return
            try:
                part = self._setup.part(0)
            except VhostError as error:
                log.error("device %s: %s", self.name, error)  # a tap that was deleted, say: the next swap mends it
                part = self._state.backend
            if self.postcopy is not None:
                self.postcopy.abandon()
            before = self._state
            try:
                rings = (RingState(),) * self.num_queues
                self._commit(DeviceState(part, rings, self._state.workers, self.group_size))
                self._forget_rings()
            except BaseException:
                # Somebody is still inside: the rings' slots are emptied, or the rings stopped, once they are out.
                self._is_left, self._is_leaving = self._state is not before, self._state is before
                self._pool.settle_later(self)
                raise
            finally:
                self.was_paged &= self._is_leaving
                if self.iotlb is not None:
                    self.iotlb.begin(False)
                if self.postcopy is not None:
                    self.postcopy.stop()
                self._owned = False
                self._stopping = set()

    def group_of(self, index: int) -> range:
        """Return the rings that are served together with one, itself among them."""
        return self._state.rings_of(index // self.group_size)

    def snapshot(self) -> dict[str, Any]:
        """Return everything that `vhostmp show` prints of the device."""
        with self._lock:
            return {
                "device": self.name,
                "class": self.device_class,
                "backend": self.backend,
                "refused": self._refused,
                "generation": self._generation,
                "features": feature_names(self._offered, self.device_class),
                "acked_features": feature_names(self._state.features, self.device_class),
                "logging": self._state.logging,
                "log_bytes": self._state.log.size if self._state.log is not None else None,
                "regions": [{"gpa": r.gpa, "size": r.size, "uva": r.uva} for r in self._regions()],
                "postcopy": None if self.postcopy is None else self.postcopy.snapshot(),
                "iotlb": None if self.iotlb is None else self.iotlb.snapshot(),
                "queues": [self._ring_snapshot(index) for index in range(self.num_queues)],
            }

    # -- inside ------------------------------------------------------------------------------------------------------

    def _close_parts(self) -> None:
        for part in (self._setup, self.iotlb, self.postcopy):
            if part is not None:
                part.close()

    def _open(self, spec: str) -> Setup:
        """Open a back-end; whatever can be found wrong with it is found now, whether a ring runs or not."""
        raise NotImplementedError

    def _renew_backend(self) -> None:
        """Have workers make the back-end anew, whose set-up has changed. After the return none uses the old one."""
        self._commit(attrs.evolve(self._state, backend=self._setup.part(self._state.features)))

    def _drainable(self) -> list[int]:
        """List the groups of rings whose queue in the back-end is emptied before the back-end is replaced."""
        return []

    def _discard(self, old: Setup) -> int:
        """Take what is left in the queues of a back-end that no worker uses any more. Returns how many packets."""
        del old
        return 0

    def _set_eventfd(self, index: int, kind: str, fd: int | None) -> None:
        with self._lock:
            self._check_ring(index)
            part = None if fd is None else eventfd_part(fd, f"{kind} descriptor of ring {index}")
            self._set(index, **{kind: part})

    def _check_open(self) -> None:
        if self._closed:
            raise LocalError(f"device {self.name} is closed", errno.ENODEV)
        if self._is_leaving:
            self._settle()

    def _check_owner(self) -> None:
        self._check_open()
        if not self._owned:
            raise LocalError("the device has no owner: set_owner comes first", errno.EPERM)

    def _check_ring(self, index: int, *, stopped: bool = False) -> None:
        self._check_owner()
        if not 0 <= index < self.num_queues:
            raise LocalError(f"ring {index}: the device has {self.num_queues}", errno.ENOBUFS)
        self._settle()
        if stopped and self._state.rings[index].started:
            raise LocalError(f"ring {index} runs: stop it first", errno.EBUSY)

    def _table(self) -> MemoryTable:
        return MemoryTable() if self._state.memory is None else self._state.memory.table

    def _regions(self) -> list[MemoryRegion]:
        return list(self._table())

    def _ring_stopped(self, index: int) -> None:
        if self.iotlb is not None:
            self.iotlb.forget_ring(index)

    @staticmethod
    def _ring_in(table: MemoryTable, state: DeviceState, ring: RingState) -> bool:
        """Whether a ring's three parts lie in memory; behind an IOMMU that shows when it is used."""
        if ring.desc is None or state.iotlb is not None:
            return ring.desc is not None
        parts = rings.parts(state.features, ring.size)
        return all(table.contains_uva(getattr(ring, name), size) for name, size, _ in parts)
