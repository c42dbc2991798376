"""A device and a pool that behave like the real ones, without workers: for tests of what stands above them.

Rules: fakes, not mocks: the verbs judge their arguments and the state as the real ones do, keep what a device keeps
(duplicates of descriptors too, so that leaks show) and fail with the same errors with nothing changed. `state()` is all
that a message could have changed, for comparing before and after. What is done to it is in `calls`, in order.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from vhostmp import consts, rings
from vhostmp.errors import LocalError, RingsLost, VhostError
from vhostmp.iotlb import Miss
from vhostmp.parts import InflightPart, LogPart, Part, eventfd_part
from vhostmp.shm.memory import MemoryRegion, MemoryTable

FEATURES = consts.mask(
    (
        consts.VIRTIO_F_VERSION_1,
        consts.VIRTIO_NET_F_MRG_RXBUF,
        consts.VIRTIO_F_INDIRECT_DESC,
        consts.VIRTIO_F_EVENT_IDX,
        consts.VHOST_F_LOG_ALL,
    )
)
"""What a FakeDevice offers."""

POSTCOPY_BASE = 0x5555_0000_0000
"""Where a FakePostcopy maps guest-physical address 0."""

_DESCRIPTOR_BYTES = 16


@attrs.define
class FakeRing:
    """What a device remembers of one ring."""

    num: int = 0
    desc: int = 0
    avail: int = 0
    used: int = 0
    base: int = 0
    started: bool = False
    enabled: bool = False
    kick: int | None = None
    call: int | None = None
    err: int | None = None
    busyloop_us: int = 0


@attrs.frozen
class FakeSwap:
    """The report of a swap."""

    generation: int
    grace_us: float = 12.5
    pause_us: float = 3.25
    packets_crossed: int = 7
    frames_left: int = 0


class FakeDevice:
    """A network device with the verbs of the real one, and no worker behind it."""

    device_class = "net"
    max_regions = 64

    def __init__(self, queue_pairs: int = 1, backend: str = "null", name: str = "0") -> None:
        """Make a device without an owner."""
        self.name = name
        self.backend = backend
        self.rings = [FakeRing() for _ in range(2 * queue_pairs)]
        self.owned = False
        self.acked_features = 0
        self.table = MemoryTable()
        self.log: LogPart | None = None
        self.log_fd: Part | None = None
        self.inflight: InflightPart | None = None
        self.mac: bytes | None = None
        self.mtu: int | None = None
        self.generation = 1
        self.config = bytearray(range(1, 41))
        """Its first 8 bytes can be written."""
        self.private = b"good state"
        self.on_config_change: Callable[[], None] | None = None
        self.calls: list[str] = []
        self.closed = False
        self.fail: Callable[[str], None] = lambda verb: None
        """Called at the start of each verb; may raise, to be a device with trouble of its own."""

    # --- what a test looks at ---

    def state(self) -> Mapping[str, object]:
        """Return everything that a message can change, descriptors by what they are open on."""

        def where(fd: int | None) -> str | None:
            return None if fd is None else os.readlink(f"/proc/self/fd/{fd}")

        return {
            "owned": self.owned,
            "acked_features": self.acked_features,
            "regions": [(region.gpa, region.size, region.uva, region.mmap_offset) for region in self.table],
            "rings": [
                attrs.asdict(
                    attrs.evolve(ring, kick=None, call=None, err=None),
                )
                | {"fds": [where(ring.kick), where(ring.call), where(ring.err)]}
                for ring in self.rings
            ],
            "log": self.log and (where(self.log.fds[0]), self.log.size, self.log.offset),
            "log_fd": self.log_fd and where(self.log_fd.fds[0]),
            "inflight": self.inflight and (where(self.inflight.fds[0]), self.inflight.size, self.inflight.offset),
            "mac": self.mac,
            "mtu": self.mtu,
            "config": bytes(self.config),
            "private": self.private,
        }

    # --- the verbs ---

    @property
    def num_queues(self) -> int:
        """Number of rings."""
        return len(self.rings)

    @property
    def queue_num(self) -> int:
        """Number of queue pairs."""
        return len(self.rings) // 2

    def _enter(self, verb: str, *, owned: bool = True) -> None:
        self.calls.append(verb)
        self.fail(verb)
        if owned and not self.owned:
            raise LocalError("the device has no owner", errno.EPERM)

    def _ring(self, index: int) -> FakeRing:
        if not 0 <= index < len(self.rings):
            raise LocalError(f"ring {index} of {len(self.rings)}")
        return self.rings[index]

    def set_owner(self) -> None:
        """Begin a front-end's use."""
        self._enter("set_owner", owned=False)
        if self.owned:
            raise LocalError("the device has an owner", errno.EBUSY)
        self.owned = True

    def get_features(self) -> int:
        """Return the mask of features offered."""
        return FEATURES

    def set_features(self, bits: int, /) -> None:
        """Take the mask of features acked."""
        self._enter("set_features")
        if bits & ~FEATURES:
            raise LocalError(f"features {bits & ~FEATURES:#x} are not offered", errno.EOPNOTSUPP)
        running = any(ring.started for ring in self.rings)
        if running and (bits ^ self.acked_features) & ~(1 << consts.VHOST_F_LOG_ALL):
            raise LocalError("features cannot change while a ring runs", errno.EBUSY)
        self.acked_features = bits

    def _take_table(self, regions: Sequence[MemoryRegion]) -> None:
        table = MemoryTable.build(regions, self.max_regions)
        kept: list[MemoryRegion] = []
        for region in table:
            kept.append(attrs.evolve(region, fd=os.dup(region.fd)))
        self._drop_table()
        self.table = MemoryTable(tuple(kept))
        lost = [index for index, ring in enumerate(self.rings) if ring.started and not self._translates(ring)]
        for index in lost:
            self.rings[index].started = False
        if lost:
            raise RingsLost(lost)

    def _drop_table(self) -> None:
        for region in self.table:
            os.close(region.fd)
        self.table = MemoryTable()

    def _translates(self, ring: FakeRing) -> bool:
        return self.table.contains_uva(ring.desc, ring.num * _DESCRIPTOR_BYTES)

    def set_mem_table(self, regions: Sequence[MemoryRegion], /) -> None:
        """Replace all of guest memory."""
        self._enter("set_mem_table")
        self._take_table(regions)

    def add_mem_region(self, region: MemoryRegion, /) -> None:
        """Add a region."""
        self._enter("add_mem_region")
        self._take_table([*self.table, region])

    def remove_mem_region(self, region: MemoryRegion, /) -> None:
        """Remove the region with the same gpa, size and uva."""
        self._enter("remove_mem_region")
        wanted = (region.gpa, region.size, region.uva)
        left = [known for known in self.table if (known.gpa, known.size, known.uva) != wanted]
        if len(left) == len(self.table):
            raise LocalError(f"no memory region at gpa {region.gpa:#x} of {region.size:#x} bytes", errno.ENOENT)
        self._take_table(left)

    def set_vring_num(self, index: int, num: int, /) -> None:
        """Set the size of a ring."""
        self._enter("set_vring_num")
        ring = self._ring(index)
        if ring.started:
            raise LocalError("the ring runs", errno.EBUSY)
        rings.check_size(self.acked_features, num)
        ring.num = num

    def set_vring_addr(self, index: int, /, *, desc: int, avail: int, used: int, flags: int = 0, log: int = 0) -> None:
        """Say where a ring lies."""
        self._enter("set_vring_addr")
        ring = self._ring(index)
        new = attrs.evolve(ring, desc=desc, avail=avail, used=used)
        if ring.started and not self._translates(new):
            raise LocalError(f"ring {index} runs, and desc {desc:#x} is not in the memory table", errno.EFAULT)
        ring.desc, ring.avail, ring.used = desc, avail, used

    def set_vring_base(self, index: int, base: int, /) -> None:
        """Set the next available index."""
        self._enter("set_vring_base")
        ring = self._ring(index)
        if ring.started:
            raise LocalError("the ring runs", errno.EBUSY)
        rings.check_base(self.acked_features, base)
        ring.base = base

    def _set_fd(self, verb: str, index: int, fd: int | None) -> None:
        self._enter(verb)
        ring = self._ring(index)
        if fd is not None:
            try:
                what = os.readlink(f"/proc/self/fd/{fd}")
            except OSError as error:
                raise LocalError(f"fd {fd} is not open", errno.EBADF) from error
            if what != "anon_inode:[eventfd]":
                raise LocalError(f"fd is {what}, not an eventfd")
            fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        name = verb.removeprefix("set_vring_")
        old: int | None = getattr(ring, name)
        if old is not None:
            os.close(old)
        setattr(ring, name, fd)

    def set_vring_kick(self, index: int, fd: int | None, /) -> None:
        """Set the eventfd on which the guest kicks."""
        self._set_fd("set_vring_kick", index, fd)

    def set_vring_call(self, index: int, fd: int | None, /) -> None:
        """Set the eventfd that interrupts the guest."""
        self._set_fd("set_vring_call", index, fd)

    def set_vring_err(self, index: int, fd: int | None, /) -> None:
        """Set the eventfd that tells of a broken ring."""
        self._set_fd("set_vring_err", index, fd)

    def start_vring(self, index: int, /) -> None:
        """Start a ring."""
        self._enter("start_vring")
        ring = self._ring(index)
        if ring.started:
            return
        if not ring.num or not self._translates(ring):
            raise LocalError(f"ring {index}: desc {ring.desc:#x} is not in the memory table", errno.EFAULT)
        ring.started = True

    def stop_vring(self, index: int, /) -> int:
        """Stop a ring and return its next available index."""
        self._enter("stop_vring")
        ring = self._ring(index)
        ring.started = False
        return ring.base

    def set_vring_enable(self, index: int, enable: bool, /) -> None:
        """Enable or disable a ring."""
        self._enter("set_vring_enable")
        self._ring(index).enabled = enable

    def set_vring_busyloop_timeout(self, index: int, us: int, /) -> None:
        """Set the busy-poll time."""
        self._enter("set_vring_busyloop_timeout")
        self._ring(index).busyloop_us = us

    def set_log_base(self, fd: int, size: int, offset: int, /) -> None:
        """Say where writes are logged."""
        self._enter("set_log_base")
        kept = LogPart.keep(fd, size, offset)
        if self.log is not None:
            self.log.close()
        self.log = kept

    def set_log_fd(self, fd: int | None, /) -> None:
        """Set the eventfd that tells of logged pages."""
        self._enter("set_log_fd")
        kept = None if fd is None else eventfd_part(fd, "log descriptor")
        if self.log_fd is not None:
            self.log_fd.close()
        self.log_fd = kept

    def set_inflight(self, fd: int, offset: int, size: int, num_queues: int, queue_size: int, /) -> None:
        """Say where packed rings note what they have in flight."""
        self._enter("set_inflight")
        kept = InflightPart.keep(fd, offset, size, num_queues, queue_size)
        if self.inflight is not None:
            self.inflight.close()
        self.inflight = kept

    def send_rarp(self, mac: bytes, /) -> None:
        """Announce an address."""
        self._enter("send_rarp")
        self.mac = mac

    def set_mtu(self, mtu: int, /) -> None:
        """Take the MTU."""
        self._enter("set_mtu")
        self.mtu = mtu

    def save_state(self) -> bytes:
        """Return the state."""
        self._enter("save_state")
        return bytes(self.private)

    def load_state(self, data: bytes, /) -> None:
        """Take a state."""
        self._enter("load_state")
        if not data.startswith(b"good"):
            raise LocalError("not good")
        self.private = data

    def write_config(self, offset: int, data: bytes, /) -> None:
        """Write to the configuration space."""
        self._enter("write_config")
        end = offset + len(data)
        if bytes(self.config[max(offset, 8) : end]) != data[max(8 - offset, 0) :]:
            raise LocalError("read-only", errno.EPERM)
        self.config[offset:end] = data

    def set_backend(self, spec: str, /) -> FakeSwap:
        """Swap the back-end."""
        self._enter("set_backend", owned=False)
        if spec not in ("null", "loopback"):
            raise LocalError(f"unknown back-end {spec!r}: use null or loopback")
        self.backend = spec
        self.generation += 1
        return FakeSwap(self.generation)

    def attach_worker(self, group: int, worker: int, /) -> None:
        """Have a worker serve a queue pair."""
        self._enter("attach_worker", owned=False)
        if not 0 <= group < self.num_queues // 2:
            raise LocalError(f"no queue pair {group}")
        if worker != 0:
            raise LocalError(f"no worker {worker}", errno.ENODEV)

    def snapshot(self) -> Mapping[str, Any]:
        """Return what `vhostmp show --json` prints."""
        return {
            "device": self.name,
            "class": self.device_class,
            "backend": self.backend,
            "generation": self.generation,
            "features": consts.feature_names(FEATURES),
            "acked_features": consts.feature_names(self.acked_features),
            "regions": [{"gpa": region.gpa, "size": region.size, "uva": region.uva} for region in self.table],
            "queues": [
                {
                    "index": index,
                    "size": ring.num,
                    "started": ring.started,
                    "enabled": ring.enabled,
                    "avail_idx": ring.base,
                    "used_idx": ring.base,
                    "last_avail_idx": ring.base,
                    "kicks": 0,
                    "calls": 0,
                    "calls_suppressed": 0,
                    "packets": 0,
                    "bytes": 0,
                    "drops": {},
                    "worker": 0,
                    "worker_pid": None,
                    "broken": None,
                }
                for index, ring in enumerate(self.rings)
            ],
        }

    def stop_all(self) -> None:
        """Forget the front-end."""
        self.calls.append("stop_all")
        self._forget()
        self.fail("stop_all")

    def close(self) -> None:
        """End the device."""
        self._forget()
        self.closed = True

    def _forget(self) -> None:
        for ring in self.rings:
            for fd in (ring.kick, ring.call, ring.err):
                if fd is not None:
                    os.close(fd)
        self.rings = [FakeRing() for _ in self.rings]
        self._drop_table()
        for part in (self.log, self.log_fd, self.inflight):
            if part is not None:
                part.close()
        self.log = self.log_fd = self.inflight = None
        self.owned = False
        self.acked_features = 0
        self.mac = self.mtu = None


@attrs.define
class FakeIotlb:
    """An IOTLB that takes everything but address 13."""

    wake: int = attrs.field(factory=lambda: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    calls: list[tuple[int, ...]] = attrs.field(factory=list[tuple[int, ...]])
    missed: list[Miss] = attrs.field(factory=list[Miss])
    open: list[Miss] = attrs.field(factory=list[Miss])
    left: list[Miss] = attrs.field(factory=list[Miss])

    def fileno(self) -> int:
        """Return the eventfd."""
        return self.wake

    def update(self, iova: int, size: int, uva: int, access: int) -> None:
        """Take an entry."""
        if iova == 13:  # noqa: PLR2004 - the one that is refused
            raise LocalError("no")
        self.calls.append((iova, size, uva, access))

    def invalidate(self, iova: int, size: int) -> None:
        """Take one back."""
        self.calls.append((iova, size))

    def misses(self) -> list[Miss]:
        """Return what was missed."""
        if self.missed:
            os.eventfd_read(self.wake)
        told, self.missed = self.missed, []
        return told

    def unanswered(self) -> list[Miss]:
        """Return what is open."""
        return self.open

    def left_open(self) -> list[Miss]:
        """Return, once, what somebody before us left; it is open."""
        told, self.left = self.left, []
        self.open += told
        return told

    def miss(self, *misses: Miss) -> None:
        """Have something missed."""
        self.missed += misses
        os.eventfd_write(self.wake, 1)

    def close(self) -> None:
        """Close the eventfd."""
        os.close(self.wake)


class FakeDeviceBehindIommu(FakeDevice):
    """A fake device behind an IOMMU."""

    def __init__(self) -> None:
        """Make it."""
        super().__init__()
        self.iotlb = FakeIotlb()

    def close(self) -> None:
        """Close the eventfd too."""
        super().close()
        self.iotlb.close()


class FakePostcopy:
    """Post-copy without a pager: keeps the order of the real one, and maps every region at POSTCOPY_BASE + its gpa."""

    def __init__(self) -> None:
        """Be idle."""
        self.advised = 0
        self.listening = False
        self.mapped: list[MemoryRegion] = []
        self.notice = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def advise(self) -> int:
        """Return some descriptor."""
        self.advised += 1
        return os.memfd_create("userfaultfd", os.MFD_CLOEXEC)

    def listen(self) -> None:
        """Listen, once advised."""
        if not self.advised:
            raise LocalError("POSTCOPY_ADVISE comes first")
        self.listening = True

    def end(self) -> None:
        """End, once listening."""
        if not self.listening:
            raise LocalError("POSTCOPY_LISTEN comes first")
        self.listening = False
        self.advised = 0

    def map(self, regions: Sequence[MemoryRegion]) -> list[int]:
        """Return addresses."""
        self.mapped += regions
        return [POSTCOPY_BASE + region.gpa for region in regions]

    def fileno(self) -> int:
        """Return the notice."""
        return self.notice


class FakeDeviceWithPostcopy(FakeDevice):
    """A fake device whose guest may come in by post-copy."""

    def __init__(self) -> None:
        """Make one."""
        super().__init__()
        self.postcopy = FakePostcopy()

    def close(self) -> None:
        """Close."""
        super().close()
        os.close(self.postcopy.notice)


class FakePool:
    """A pool without workers."""

    def snapshot(self) -> Mapping[str, Any]:
        """Return what `vhostmp show --json` prints."""
        return {
            "workers": [
                {"index": 0, "pid": 4711, "pairs": 1, "restarts": 2, "hangs": 1, "items": 12, "wakeups": 34}
                | {"rss_bytes": 20 << 20},
            ],
        }

    def new_worker(self) -> int:
        """Start a worker."""
        return 1

    def free_worker(self, index: int, /) -> None:
        """End a worker."""
        raise LocalError(f"worker {index} is the only one", errno.EBUSY)

    def changed(self) -> None:
        """Nothing is recorded."""

    def close(self) -> None:
        """End every worker."""


def trouble(verb: str, error: VhostError) -> Callable[[str], None]:
    """Return a `FakeDevice.fail` that raises `error` in `verb`."""

    def fail(entered: str) -> None:
        if entered == verb:
            raise error

    return fail
