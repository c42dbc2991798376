"""What a vhost-user session needs of a device: the verbs of every device, and those that only some devices have.

Rules: types only. A device has what it has methods for: `offered_protocol_features` looks at that, so a protocol
feature is offered exactly when it is wired all the way to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from vhostmp import consts
from vhostmp.consts import ProtocolFeature
from vhostmp.shm.memory import MemoryRegion


class DeviceVerbs(Protocol):
    """What a session needs of a device. All verbs block until done and raise VhostError with nothing changed.

    `start_vring` of a started ring and `stop_vring` of a stopped one change nothing; the latter returns its base too.
    """

    @property
    def name(self) -> str:
        """Name in log lines."""
        ...

    @property
    def device_class(self) -> str:
        """What it is: "net", "blk", "rng" ..."""
        ...

    @property
    def num_queues(self) -> int:
        """Number of rings."""
        ...

    @property
    def queue_num(self) -> int:
        """What GET_QUEUE_NUM is answered with: queue pairs of a network device, queues of another."""
        ...

    def set_owner(self) -> None:
        """Begin a front-end's use of the device."""
        ...

    def get_features(self) -> int:
        """Return the mask of virtio features offered."""
        ...

    def set_features(self, bits: int, /) -> None:
        """Take the mask of virtio features acked."""
        ...

    def set_mem_table(self, regions: Sequence[MemoryRegion], /) -> None:
        """Replace all of guest memory; RingsLost once it is done when running rings had to be stopped for it."""
        ...

    def set_inflight(self, fd: int, offset: int, size: int, num_queues: int, queue_size: int, /) -> None:
        """Say where packed rings note what they have in flight."""
        ...

    def set_vring_num(self, index: int, num: int, /) -> None:
        """Set the number of descriptors of a ring."""
        ...

    def set_vring_addr(self, index: int, /, *, desc: int, avail: int, used: int, flags: int = 0, log: int = 0) -> None:
        """Say where a ring lies, in front-end user addresses."""
        ...

    def set_vring_base(self, index: int, base: int, /) -> None:
        """Set the next available index of a ring."""
        ...

    def set_vring_kick(self, index: int, fd: int | None, /) -> None:
        """Set the eventfd on which the guest kicks."""
        ...

    def set_vring_call(self, index: int, fd: int | None, /) -> None:
        """Set the eventfd that interrupts the guest."""
        ...

    def set_vring_err(self, index: int, fd: int | None, /) -> None:
        """Set the eventfd that tells of a broken ring."""
        ...

    def start_vring(self, index: int, /) -> None:
        """Start a ring; it is served as soon as it is enabled too."""
        ...

    def stop_vring(self, index: int, /) -> int:
        """Stop a ring and return its next available index."""
        ...

    def set_vring_enable(self, index: int, enable: bool, /) -> None:
        """Enable or disable a ring."""
        ...

    def set_vring_busyloop_timeout(self, index: int, us: int, /) -> None:
        """Set for how many microseconds a worker polls a ring before it sleeps."""
        ...


@runtime_checkable
class SendsRarp(Protocol):
    """A device that can announce a guest's MAC address."""

    def send_rarp(self, mac: bytes, /) -> None:
        """Announce the 6-byte address."""
        ...


@runtime_checkable
class HasLog(Protocol):
    """A device that can log which pages of guest memory it writes."""

    def set_log_base(self, fd: int, size: int, offset: int, /) -> None:
        """Log into `size` bytes from byte `offset` of a file; nobody uses the old log after the return."""
        ...

    def set_log_fd(self, fd: int | None, /) -> None:
        """Set the eventfd that tells that pages were logged."""
        ...


@runtime_checkable
class HasMtu(Protocol):
    """A device that wants to know the guest's MTU."""

    def set_mtu(self, mtu: int, /) -> None:
        """Take the MTU in bytes."""
        ...


@runtime_checkable
class HasMemSlots(Protocol):
    """A device whose memory can be changed region by region."""

    @property
    def max_regions(self) -> int:
        """Most regions it takes."""
        ...

    def add_mem_region(self, region: MemoryRegion, /) -> None:
        """Add a region."""
        ...

    def remove_mem_region(self, region: MemoryRegion, /) -> None:
        """Remove the region with the same gpa, uva and size; its fd is -1. RingsLost as in `set_mem_table`."""
        ...


@runtime_checkable
class HasConfig(Protocol):
    """A device with a configuration space (virtio 1.3, 2.5)."""

    on_config_change: Callable[[], None] | None
    """The session's: to be called, in the event loop's thread, when `config` has changed of itself."""

    @property
    def config(self) -> bytes | None:
        """The whole of the space, at most 256 bytes, little-endian; None: it is left to the front-end."""
        ...

    def write_config(self, offset: int, data: bytes, /) -> None:
        """Write inside of it what differs from what is there; an error when a field is read-only."""
        ...


@runtime_checkable
class HasState(Protocol):
    """A device that knows what its front-end does not, and can take it along in a migration."""

    def save_state(self) -> bytes:
        """Return the state, with a version of its own; all rings are stopped."""
        ...

    def load_state(self, data: bytes, /) -> None:
        """Take a state, whoever made it; all rings are stopped. LocalError, nothing changed: it is wrong."""
        ...


class IotlbMiss(Protocol):
    """Something to tell the front-end: an I/O virtual address that a ring needs and may not use yet."""

    @property
    def ring(self) -> int:
        """Which ring."""
        ...

    @property
    def iova(self) -> int:
        """The address."""
        ...

    @property
    def access(self) -> int:
        """What for: 1 to read, 2 to write, 3 for both."""
        ...

    @property
    def denied(self) -> bool:
        """Whether the front-end has answered and does not allow it."""
        ...


class IotlbVerbs(Protocol):
    """The IOTLB of a device (vhostmp/iotlb.py)."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when there are misses."""
        ...

    def update(self, iova: int, size: int, uva: int, access: int, /) -> None:
        """Enter what an I/O virtual address stands for."""
        ...

    def invalidate(self, iova: int, size: int, /) -> None:
        """Remove what is entered for a range; the return is the barrier."""
        ...

    def misses(self) -> Sequence[IotlbMiss]:
        """Return what the front-end is to be told, each once."""
        ...

    def unanswered(self) -> Sequence[IotlbMiss]:
        """Return what it was told and has not answered."""
        ...

    def left_open(self) -> Sequence[IotlbMiss]:
        """Return, once, what a control process before us may have told it, and it has not answered."""
        ...


@runtime_checkable
class HasIotlb(Protocol):
    """A device that may stand behind an IOMMU."""

    @property
    def iotlb(self) -> IotlbVerbs | None:
        """Its IOTLB; None: it does not offer ACCESS_PLATFORM."""
        ...


class PostcopyVerbs(Protocol):
    """Post-copy of a device (vhostmp/postcopy.py)."""

    @property
    def listening(self) -> bool:
        """Whether pages of memory that is told now may be missing."""
        ...

    def advise(self) -> int:
        """Begin; return the userfaultfd of whose faults the front-end is told, the caller's."""
        ...

    def listen(self) -> None:
        """Page all memory from now on."""
        ...

    def end(self) -> None:
        """Take note that all pages have come."""
        ...

    def map(self, regions: Sequence[MemoryRegion], /) -> list[int]:
        """Return at which address the front-end will see faults in the first byte of each region."""
        ...

    def fileno(self) -> int:
        """Return the descriptor that is readable once no page can come any more."""
        ...


@runtime_checkable
class HasPostcopy(Protocol):
    """A device whose guest may come in by post-copy."""

    @property
    def postcopy(self) -> PostcopyVerbs | None:
        """None: this machine does not let us."""
        ...


def offered_protocol_features(device: object, *, channel: bool = False) -> int:
    """Return the mask of the protocol features that are wired all the way to `device`.

    `channel`: whether messages of our own can be sent, so that what needs that can be offered.
    """
    features = [
        ProtocolFeature.MQ,
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.RESET_DEVICE,
        ProtocolFeature.STATUS,
        ProtocolFeature.INFLIGHT_SHMFD,
        ProtocolFeature.GET_VRING_BASE_INFLIGHT,
    ]
    if channel:
        features += [
            ProtocolFeature.BACKEND_REQ,
            ProtocolFeature.BACKEND_SEND_FD,
            ProtocolFeature.INBAND_NOTIFICATIONS,
        ]
        if isinstance(device, HasState):
            features.append(ProtocolFeature.DEVICE_STATE)
    if isinstance(device, HasConfig) and device.config is not None:
        features.append(ProtocolFeature.CONFIG)
    if isinstance(device, HasLog):
        features.append(ProtocolFeature.LOG_SHMFD)
    if isinstance(device, SendsRarp):
        features.append(ProtocolFeature.RARP)
    if isinstance(device, HasMtu):
        features.append(ProtocolFeature.NET_MTU)
    if isinstance(device, HasMemSlots):
        features.append(ProtocolFeature.CONFIGURE_MEM_SLOTS)
    if isinstance(device, HasPostcopy) and device.postcopy is not None:
        features.append(ProtocolFeature.PAGEFAULT)
    return consts.mask(features)
