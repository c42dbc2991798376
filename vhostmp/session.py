"""From vhost-user messages to device verbs: one session for each connection.

Rules: no I/O; replies are returned, descriptors are borrowed for the length of a call. A reply is built after the verb
has returned, hence it *is* the barrier: nobody uses an old memory table, or writes for a stopped ring, once the
front-end has it. A message that is refused changes nothing: it is answered with a non-zero acknowledgement when the
front-end asked for one and REPLY_ACK is negotiated, else the error is raised and the caller closes the connection.

Theory of operation: `handle` judges a message against the tables of `protocol/state.py`, checks the ring's index, calls
the method that `_handles` it. Two things of vhost-user are ours, not the device's: bit 30 (a front-end without
it has all rings enabled from the start, one with it enables each) and that the kick descriptor's arrival starts a ring.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, Protocol, TypeAlias, TypeVar, runtime_checkable

from vhostmp import consts
from vhostmp.consts import ProtocolFeature, Request
from vhostmp.errors import LocalError, VhostError
from vhostmp.protocol.codec import BadMessage, Message, encode_reply
from vhostmp.protocol.messages import (
    MESSAGES,
    U64,
    MacAddress,
    MemTable,
    Mtu,
    Payload,
    Region,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
    describe,
)
from vhostmp.protocol.state import Event, SessionState
from vhostmp.shm.memory import MemoryRegion

log = logging.getLogger(__name__)

T = TypeVar("T")

_BIT_30: Final = 1 << consts.VHOST_USER_F_PROTOCOL_FEATURES


class DeviceVerbs(Protocol):
    """What a session needs of a device. All verbs block until done and raise VhostError with nothing changed.

    `start_vring` of a started ring and `stop_vring` of a stopped one change nothing; the latter returns its base too.
    """

    @property
    def name(self) -> str:
        """Name in log lines."""
        ...

    @property
    def num_queues(self) -> int:
        """Number of rings; two for each queue pair."""
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
        """Replace all of guest memory; EFAULT once it is done when running rings had to be stopped for it."""
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
        """Remove the region with the same gpa, uva and size; its fd is -1. EFAULT as in `set_mem_table`."""
        ...


def offered_protocol_features(device: object) -> int:
    """Return the mask of the protocol features that are wired all the way to `device`."""
    features = [ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.RESET_DEVICE]
    if isinstance(device, SendsRarp):
        features.append(ProtocolFeature.RARP)
    if isinstance(device, HasMtu):
        features.append(ProtocolFeature.NET_MTU)
    if isinstance(device, HasMemSlots):
        features.append(ProtocolFeature.CONFIGURE_MEM_SLOTS)
    return consts.mask(features)


Handler: TypeAlias = Callable[["Session", Message], Payload | None]

_HANDLERS: Final[dict[Request, Handler]] = {}


def _handles(request: Request) -> Callable[[Handler], Handler]:
    """Make a method of Session the one that acts upon `request`."""

    def register(handler: Handler) -> Handler:
        _HANDLERS[request] = handler
        return handler

    return register


class Session:
    """What one front-end does with one device, from its connection to its hang-up."""

    def __init__(self, device: DeviceVerbs, *, busyloop_us: int = 0) -> None:
        """Begin with a device nobody owns.

        Args:
            device: what the messages are about.
            busyloop_us: busy-poll time given to each ring once there is an owner, microseconds; 0 leaves it alone.
        """
        self.device = device
        self.state = SessionState(offered_protocol_features(device))
        self._busyloop_us = busyloop_us
        self._started: set[int] = set()
        # gpa, size, uva -> the file it lies in, and how many ADD_MEM_REG without a REM_MEM_REG
        self._told: dict[tuple[int, int, int], tuple[tuple[int, int, int], int]] = {}

    def handle(self, message: Message) -> bytes:
        """Do what `message` asks for.

        Returns: the bytes to send back, maybe none.
        Raises: BadMessage: it is refused and cannot be answered; the connection is to be closed.
        """
        acks = message.need_reply and self.state.has(ProtocolFeature.REPLY_ACK)
        try:
            self.state.check(message)
            self._check_index(message)
            reply = _HANDLERS[message.request](self, message)
        except BadMessage as bad:
            return self.refuse(bad)
        except VhostError as error:
            return self.refuse(message.bad("payload", _explain(message, error)))
        if reply is None and acks:
            reply = U64(0)
        log.debug("device %s: %s", self.device.name, _describe(message))
        return b"" if reply is None else encode_reply(message.request, reply)

    def refuse(self, bad: BadMessage) -> bytes:
        """Answer a message that is not legal.

        Returns: a non-zero acknowledgement, when the front-end wants one and REPLY_ACK is negotiated.
        Raises: BadMessage: there is no way to tell the front-end; the connection is to be closed.
        """
        if bad.fatal or bad.request is None or not bad.need_reply or not self.state.has(ProtocolFeature.REPLY_ACK):
            raise bad
        log.warning("device %s: %s; refused", self.device.name, bad)
        return encode_nack(bad.request)

    def close(self) -> None:
        """Take note that the connection is gone; every further message is illegal."""
        self.state.advance(Event.CLOSED)
        self._started.clear()

    # --- helpers ---

    def _check_index(self, message: Message) -> None:
        index = getattr(message.payload, "index", None)
        if index is not None and not index < self.device.num_queues:
            raise message.bad("index", f"index {index} is not below {self.device.num_queues}, the number of rings")

    def _enable_all(self, enable: bool) -> None:
        for index in range(self.device.num_queues):
            self.device.set_vring_enable(index, enable)

    def _ring_stopped(self, index: int) -> None:
        self._started.discard(index)
        if not self._started:
            self.state.advance(Event.ALL_STOPPED)

    @contextmanager
    def _losing_rings(self, message: Message) -> Generator[None, None, None]:
        """Change memory; a running ring that is not in it any more was stopped (EFAULT), which is no refusal."""
        try:
            yield
        except LocalError as error:
            if error.errno != errno.EFAULT:
                raise
            log.warning("device %s: %s: %s", self.device.name, message.name, error)

    # --- handlers, in the order of the numbers ---

    @_handles(Request.GET_FEATURES)
    def _get_features(self, message: Message) -> U64:
        return U64(self.device.get_features() | _BIT_30)

    @_handles(Request.SET_FEATURES)
    def _set_features(self, message: Message) -> None:
        bits = _payload(message, U64).value
        unknown = bits & ~(self.device.get_features() | _BIT_30)
        if unknown:
            names = " ".join(consts.feature_names(unknown))
            raise message.bad("features", f"features {bits:#x} have bits that are not offered: {names}")
        if self.state.features is not None and (self.state.features ^ bits) & _BIT_30:
            raise message.bad("features", f"features {bits:#x} change PROTOCOL_FEATURES after it was chosen")
        self.device.set_features(bits & ~_BIT_30)
        self.state.features = bits
        if not self.state.rings_wait_for_enable:
            self._enable_all(True)

    @_handles(Request.SET_OWNER)
    def _set_owner(self, message: Message) -> None:
        self.device.set_owner()
        self.state.advance(Event.OWNER_SET)
        if self._busyloop_us:
            for index in range(self.device.num_queues):
                self.device.set_vring_busyloop_timeout(index, self._busyloop_us)

    @_handles(Request.RESET_OWNER)
    def _reset_owner(self, message: Message) -> None:
        # deprecated: the specification wants it ignored, or taken as "disable all rings"; memory and owner stay
        self._enable_all(False)

    @_handles(Request.SET_MEM_TABLE)
    def _set_mem_table(self, message: Message) -> None:
        regions = _payload(message, MemTable).regions
        with self._losing_rings(message):
            self.device.set_mem_table(
                [_memory_region(region, fd) for region, fd in zip(regions, message.fds, strict=True)]
            )
        self._told.clear()

    @_handles(Request.SET_VRING_NUM)
    def _set_vring_num(self, message: Message) -> None:
        payload = _payload(message, VringState)
        self.device.set_vring_num(payload.index, payload.num)

    @_handles(Request.SET_VRING_ADDR)
    def _set_vring_addr(self, message: Message) -> None:
        addr = _payload(message, VringAddr)
        self.device.set_vring_addr(
            addr.index, desc=addr.descriptor, avail=addr.available, used=addr.used, flags=addr.flags, log=addr.log
        )

    @_handles(Request.SET_VRING_BASE)
    def _set_vring_base(self, message: Message) -> None:
        payload = _payload(message, VringState)
        self.device.set_vring_base(payload.index, payload.num)

    @_handles(Request.GET_VRING_BASE)
    def _get_vring_base(self, message: Message) -> VringState:
        index = _payload(message, VringState).index  # its num means nothing here
        base = self.device.stop_vring(index)
        self._ring_stopped(index)
        return VringState(index, base)

    @_handles(Request.SET_VRING_KICK)
    def _set_vring_kick(self, message: Message) -> None:
        index = _payload(message, VringFd).index
        self.device.set_vring_kick(index, _fd(message))
        try:
            self.device.start_vring(index)
        except VhostError:
            if index not in self._started:
                with suppress(VhostError):
                    self.device.set_vring_kick(index, None)
            raise
        self._started.add(index)
        self.state.advance(Event.RING_STARTED)

    @_handles(Request.SET_VRING_CALL)
    def _set_vring_call(self, message: Message) -> None:
        self.device.set_vring_call(_payload(message, VringFd).index, _fd(message))

    @_handles(Request.SET_VRING_ERR)
    def _set_vring_err(self, message: Message) -> None:
        self.device.set_vring_err(_payload(message, VringFd).index, _fd(message))

    @_handles(Request.GET_PROTOCOL_FEATURES)
    def _get_protocol_features(self, message: Message) -> U64:
        return U64(self.state.offered)

    @_handles(Request.SET_PROTOCOL_FEATURES)
    def _set_protocol_features(self, message: Message) -> None:
        bits = _payload(message, U64).value
        unknown = bits & ~self.state.offered
        if unknown:
            names = " ".join(consts.protocol_feature_names(unknown))
            raise message.bad("features", f"features {bits:#x} have bits that are not offered: {names}")
        self.state.negotiated = bits

    @_handles(Request.GET_QUEUE_NUM)
    def _get_queue_num(self, message: Message) -> U64:
        return U64(self.device.num_queues // 2)  # for net, QEMU takes this for queue pairs

    @_handles(Request.SET_VRING_ENABLE)
    def _set_vring_enable(self, message: Message) -> None:
        # legal as soon as bit 30 is offered: QEMU enables rings before it sends SET_FEATURES
        payload = _payload(message, VringState)
        self.device.set_vring_enable(payload.index, bool(payload.num))

    @_handles(Request.SEND_RARP)
    def _send_rarp(self, message: Message) -> None:
        assert isinstance(self.device, SendsRarp)
        self.device.send_rarp(_payload(message, MacAddress).value)

    @_handles(Request.NET_SET_MTU)
    def _net_set_mtu(self, message: Message) -> None:
        assert isinstance(self.device, HasMtu)
        self.device.set_mtu(_payload(message, Mtu).value)

    @_handles(Request.RESET_DEVICE)
    def _reset_device(self, message: Message) -> None:
        # rings and features go back to their beginning; owner, protocol features and memory stay
        for index in range(self.device.num_queues):
            self.device.stop_vring(index)
            self._ring_stopped(index)
            self.device.set_vring_enable(index, False)
            self.device.set_vring_kick(index, None)
            self.device.set_vring_call(index, None)
            self.device.set_vring_err(index, None)
            self.device.set_vring_base(index, 0)
        self.device.set_features(0)
        self.state.features = None

    @_handles(Request.GET_MAX_MEM_SLOTS)
    def _get_max_mem_slots(self, message: Message) -> U64:
        assert isinstance(self.device, HasMemSlots)
        return U64(self.device.max_regions)

    @_handles(Request.ADD_MEM_REG)
    def _add_mem_reg(self, message: Message) -> None:
        assert isinstance(self.device, HasMemSlots)
        # QEMU 7.2 tells of each region once for every queue pair, and takes it back as often. It is the same region
        # only when it is the same file too; otherwise the device refuses it, for it overlaps.
        region = _memory_region(_payload(message, SingleRegion).region, message.fds[0])
        key = (region.gpa, region.size, region.uva)
        file = _file(region)
        known, count = self._told.get(key, (file, 0))
        if not count or known != file:
            self.device.add_mem_region(region)
        self._told[key] = (known, count + 1)

    @_handles(Request.REM_MEM_REG)
    def _rem_mem_reg(self, message: Message) -> None:
        # gpa, uva and size say which region; a descriptor that came along means nothing
        assert isinstance(self.device, HasMemSlots)
        region = _memory_region(_payload(message, SingleRegion).region, -1)
        key = (region.gpa, region.size, region.uva)
        file, count = self._told.get(key, ((0, 0, 0), 0))
        if count > 1:
            self._told[key] = (file, count - 1)
            return
        with self._losing_rings(message):
            self.device.remove_mem_region(region)
        self._told.pop(key, None)


def _file(region: MemoryRegion) -> tuple[int, int, int]:
    """Return what names the place of a region in a file: device, inode, offset."""
    try:
        status = os.fstat(region.fd)
    except OSError as error:
        raise LocalError(f"bad file descriptor {region.fd}", errno.EBADF) from error
    return status.st_dev, status.st_ino, region.mmap_offset


def encode_nack(request: int) -> bytes:
    """Build the acknowledgement that says a message failed; `request` may be one that we do not know."""
    return encode_reply(request, U64(1))


def _payload(message: Message, kind: type[T]) -> T:
    """Return the payload as what `MESSAGES` says it is."""
    assert isinstance(message.payload, kind)
    return message.payload


def _fd(message: Message) -> int | None:
    return message.fds[0] if message.fds else None


def _memory_region(region: Region, fd: int) -> MemoryRegion:
    return MemoryRegion(
        gpa=region.guest_address,
        size=region.size,
        uva=region.user_address,
        fd=fd,
        mmap_offset=region.mmap_offset,
    )


def _describe(message: Message) -> str:
    """Write a message with its fields; features by name."""
    match message.request, message.payload:
        case Request.SET_FEATURES, U64(bits):
            fields = " ".join(consts.feature_names(bits))
        case Request.SET_PROTOCOL_FEATURES, U64(bits):
            fields = " ".join(consts.protocol_feature_names(bits))
        case _, payload:
            fields = describe(payload)
    return f"{message.name}: {fields}" if fields else message.name


def _explain(message: Message, error: VhostError) -> str:
    """Say what the device has against a message, with the message's fields."""
    code = "" if isinstance(error, LocalError) else f" ({errno.errorcode.get(error.errno, error.errno)})"
    fields = describe(message.payload)
    return f"{fields}: {error}{code}" if fields else f"{error}{code}"


assert _HANDLERS.keys() == MESSAGES.keys(), "every message that is understood is acted upon"
