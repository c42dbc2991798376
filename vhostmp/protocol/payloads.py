"""Payloads of vhost-user messages: wire structures, each a frozen class.

Rules: no I/O, no state. A structure is a frozen class with its `struct.Struct`, whose size is asserted at import; its
`unpack` looks at every field and raises `FieldError` for a value that is wrong whatever the state of the session (what
depends on the state is checked in `state.py` and by the handler of the message). All integers are in the byte order of
the host, as both ends run on it. "vu" is the vhost-user document (QEMU docs/interop/vhost-user.rst), by section title.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self, cast

import attrs

from vhostmp import consts


class FieldError(ValueError):
    """A field of a message has a value that is never legal.

    Attributes:
        field: name of the field as in the specification, lower case.
        value: what the field holds.
    """

    def __init__(self, field: str, value: int, why: str) -> None:
        """Say that `field` holds `value` and why that is refused."""
        super().__init__(f"{field} {value:#x} {why}" if value >= 1 << 16 else f"{field} {value} {why}")
        self.field = field
        self.value = value


class Unpacks(Protocol):
    """What makes the payload of a message."""

    @classmethod
    def unpack(cls, data: bytes) -> Payload:
        """Build from exactly the payload's bytes. Raises: FieldError."""
        ...


class Payload(Protocol):
    """What every payload class offers."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Build from exactly the payload's bytes. Raises: FieldError."""
        ...

    def pack(self) -> bytes:
        """Return the payload's bytes."""
        ...


def check_size(data: bytes, wanted: int) -> None:
    """Refuse a payload that is not exactly `wanted` bytes: nothing is guessed, nothing is left unread."""
    if len(data) != wanted:
        raise FieldError("size", len(data), f"is not {wanted} (bytes)")


def describe(payload: object) -> str:
    """Write a payload's fields for a log line: `index 1, num 256`; addresses and masks in hexadecimal."""
    return ", ".join(
        f"{field.name} {_describe_value(getattr(payload, field.name))}"
        for field in attrs.fields(cast("type[Any]", type(payload)))
    )


def _describe_value(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return hex(value) if value >= 1 << 16 else str(value)
        case bytes():
            return value.hex(":")
        case tuple():
            items = cast("tuple[object, ...]", value)
            return "[" + "; ".join(describe(item) for item in items) + "]"
        case _:
            return describe(value)


@attrs.frozen
class Empty:
    """No payload."""

    @classmethod
    def unpack(cls, data: bytes) -> Empty:
        """Build from zero bytes."""
        check_size(data, 0)
        return cls()

    def pack(self) -> bytes:
        """Return no bytes."""
        return b""


@attrs.frozen
class U64:
    """One 64-bit number (vu "A u64 integer"): feature bits, a count, an acknowledgement."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("=Q")

    value: int

    @classmethod
    def unpack(cls, data: bytes) -> U64:
        """Build from 8 bytes."""
        check_size(data, cls.STRUCT.size)
        return cls(*cls.STRUCT.unpack(data))

    def pack(self) -> bytes:
        """Return the number's 8 bytes."""
        return self.STRUCT.pack(self.value)


@attrs.frozen
class Mtu:
    """The MTU the front-end tells the guest, in bytes (vu "NET_SET_MTU")."""

    value: int

    @classmethod
    def unpack(cls, data: bytes) -> Mtu:
        """Build from 8 bytes. Raises: FieldError: outside virtio's range (virtio 1.3, 5.1.4.1)."""
        value = U64.unpack(data).value
        if not consts.VIRTIO_NET_MTU_MIN <= value <= consts.VIRTIO_NET_MTU_MAX:
            raise FieldError(
                "mtu", value, f"is not in {consts.VIRTIO_NET_MTU_MIN}..{consts.VIRTIO_NET_MTU_MAX} (bytes)"
            )
        return cls(value)

    def pack(self) -> bytes:
        """Return the MTU's 8 bytes."""
        return U64(self.value).pack()


@attrs.frozen
class MacAddress:
    """The MAC address to announce, in the first 6 of 8 bytes (vu "SEND_RARP")."""

    value: bytes

    @classmethod
    def unpack(cls, data: bytes) -> MacAddress:
        """Build from 8 bytes; the last two carry nothing."""
        check_size(data, U64.STRUCT.size)
        return cls(data[:6])

    def pack(self) -> bytes:
        """Return 8 bytes, the last two zero."""
        return self.value.ljust(U64.STRUCT.size, b"\0")


@attrs.frozen
class Status:
    """The device status, in the lowest of 8 bytes (vu "SET_STATUS")."""

    value: int

    @classmethod
    def unpack(cls, data: bytes) -> Status:
        """Build from 8 bytes. Raises: FieldError: more than 8 bits."""
        value = U64.unpack(data).value
        if value >= 1 << 8:
            raise FieldError("status", value, "has more than 8 bits")
        return cls(value)

    def pack(self) -> bytes:
        """Return the status's 8 bytes."""
        return U64(self.value).pack()


@attrs.frozen
class VringState:
    """A ring and a number about it (vu "A vring state description")."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("=II")

    index: int
    num: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Build from 8 bytes."""
        check_size(data, cls.STRUCT.size)
        return cls(*cls.STRUCT.unpack(data))

    def pack(self) -> bytes:
        """Return the pair's 8 bytes."""
        return self.STRUCT.pack(self.index, self.num)


@attrs.frozen
class VringNum(VringState):
    """SET_VRING_NUM: the number of descriptors of a ring."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Build from 8 bytes. Raises: FieldError: not in 1..32768. Powers of two are for split rings alone."""
        state = super().unpack(data)
        if not 0 < state.num <= consts.VIRTQ_SIZE_MAX:
            raise FieldError("num", state.num, f"is not in 1..{consts.VIRTQ_SIZE_MAX} (descriptors)")
        return state


@attrs.frozen
class VringBase(VringState):
    """SET_VRING_BASE: where a ring stands: 16 bits if split, 32 if packed (vu "A vring state description")."""


@attrs.frozen
class VringEnable(VringState):
    """SET_VRING_ENABLE: 1 enables a ring, 0 disables it."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Build from 8 bytes. Raises: FieldError: neither 0 nor 1."""
        state = super().unpack(data)
        if state.num > 1:
            raise FieldError("num", state.num, "is neither 0 nor 1")
        return state


@attrs.frozen
class VringKick(VringState):
    """VRING_KICK: a ring to look at."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Build from 8 bytes. Raises: FieldError: the reserved number is not 0."""
        state = super().unpack(data)
        if state.num:
            raise FieldError("num", state.num, "is reserved and not 0")
        return state


@attrs.frozen
class VringAddr:
    """Where a ring lies (vu "A vring address description"): front-end user addresses, `log` guest-physical."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("=IIQQQQ")

    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int

    @classmethod
    def unpack(cls, data: bytes) -> VringAddr:
        """Build from 40 bytes. Raises: FieldError: unknown flag, or an address off its alignment (virtio 1.3, 2.7)."""
        check_size(data, cls.STRUCT.size)
        addr = cls(*cls.STRUCT.unpack(data))
        if addr.flags & ~consts.VHOST_USER_VRING_F_LOG:
            raise FieldError("flags", addr.flags, "have unknown bits set")
        for field, value, align in (
            ("descriptor", addr.descriptor, consts.VIRTQ_DESC_ALIGN),
            ("available", addr.available, consts.VIRTQ_AVAIL_ALIGN),
            ("used", addr.used, consts.VIRTQ_USED_ALIGN),
        ):
            if value % align:
                raise FieldError(field, value, f"is not aligned to {align} bytes")
        if addr.flags & consts.VHOST_USER_VRING_F_LOG and addr.log % consts.VIRTQ_USED_ALIGN:
            raise FieldError("log", addr.log, f"is not aligned to {consts.VIRTQ_USED_ALIGN} bytes")
        return addr

    def pack(self) -> bytes:
        """Return the description's 40 bytes."""
        return self.STRUCT.pack(*attrs.astuple(self))


@attrs.frozen
class VringFd:
    """SET_VRING_KICK, _CALL and _ERR: a ring, and whether a file descriptor comes with it (vu "SET_VRING_KICK")."""

    index: int
    has_fd: bool

    @classmethod
    def unpack(cls, data: bytes) -> VringFd:
        """Build from 8 bytes. Raises: FieldError: bits above the index and the no-fd bit are set."""
        value = U64.unpack(data).value
        if value & ~(consts.VHOST_USER_VRING_IDX_MASK | consts.VHOST_USER_VRING_NOFD_MASK):
            raise FieldError("payload", value, "has bits above 8 set")
        return cls(value & consts.VHOST_USER_VRING_IDX_MASK, not value & consts.VHOST_USER_VRING_NOFD_MASK)

    def pack(self) -> bytes:
        """Return the payload's 8 bytes."""
        return U64(self.index | (0 if self.has_fd else consts.VHOST_USER_VRING_NOFD_MASK)).pack()


@attrs.frozen
class LogArea:
    """SET_LOG_BASE: where in the file that comes with it the dirty log lies (vu "Log description"), in bytes."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("=QQ")

    size: int
    mmap_offset: int

    @classmethod
    def unpack(cls, data: bytes) -> LogArea:
        """Build from 16 bytes. Raises: FieldError: empty, or an end that wraps 2**64."""
        check_size(data, cls.STRUCT.size)
        area = cls(*cls.STRUCT.unpack(data))
        if not area.size:
            raise FieldError("size", 0, "is an empty log")
        if area.mmap_offset + area.size > 1 << 64:
            raise FieldError("mmap_offset", area.mmap_offset, f"plus size {area.size:#x} wraps 2**64")
        return area

    def pack(self) -> bytes:
        """Return the description's 16 bytes."""
        return self.STRUCT.pack(self.size, self.mmap_offset)


@attrs.frozen
class Region:
    """One region of guest memory (vu "Memory region description"), all in bytes."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("=QQQQ")

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int

    def check(self, where: str = "") -> None:
        """Judge the region alone. Raises: FieldError: empty, or an end that wraps 2**64."""
        if not self.size:
            raise FieldError(f"{where}size", 0, "is an empty region")
        for field in ("guest_address", "user_address", "mmap_offset"):
            start: int = getattr(self, field)
            if start + self.size > 1 << 64:
                raise FieldError(f"{where}{field}", start, f"plus size {self.size:#x} wraps 2**64")

    def pack(self) -> bytes:
        """Return the region's 32 bytes."""
        return self.STRUCT.pack(*attrs.astuple(self))


@attrs.frozen
class MemTable:
    """SET_MEM_TABLE: all regions of guest memory at once (vu "Multiple memory regions description")."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("=II")

    regions: Sequence[Region]

    @classmethod
    def unpack(cls, data: bytes) -> MemTable:
        """Build from 8 + 32 * n bytes. Raises: FieldError: the count, a region, or two regions that overlap."""
        if len(data) < cls.STRUCT.size:
            raise FieldError("size", len(data), f"is below {cls.STRUCT.size} (bytes)")
        count, _padding = cls.STRUCT.unpack_from(data)
        if not 0 < count <= consts.VHOST_USER_MAX_REGIONS:
            raise FieldError("nregions", count, f"is not in 1..{consts.VHOST_USER_MAX_REGIONS}")
        check_size(data, cls.STRUCT.size + count * Region.STRUCT.size)
        regions = tuple(Region(*fields) for fields in Region.STRUCT.iter_unpack(data[cls.STRUCT.size :]))
        for index, region in enumerate(regions):
            region.check(f"regions[{index}].")
        for field in ("guest_address", "user_address"):
            spans = sorted((getattr(region, field), region.size, index) for index, region in enumerate(regions))
            for (low, size, _), (high, _, index) in itertools.pairwise(spans):
                if low + size > high:
                    raise FieldError(f"regions[{index}].{field}", high, "overlaps another region")
        return cls(regions)

    def pack(self) -> bytes:
        """Return the table's bytes."""
        return self.STRUCT.pack(len(self.regions), 0) + b"".join(region.pack() for region in self.regions)


@attrs.frozen
class SingleRegion:
    """ADD_MEM_REG and REM_MEM_REG: one region of guest memory (vu "Single memory region description")."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("=Q")

    region: Region

    @classmethod
    def unpack(cls, data: bytes) -> SingleRegion:
        """Build from 40 bytes, the first 8 of them padding. Raises: FieldError: see `Region.check`."""
        check_size(data, cls.STRUCT.size + Region.STRUCT.size)
        region = Region(*Region.STRUCT.unpack_from(data, cls.STRUCT.size))
        region.check()
        return cls(region)

    def pack(self) -> bytes:
        """Return the description's 40 bytes."""
        return self.STRUCT.pack(0) + self.region.pack()


class MemTableOrAck:
    """SET_MEM_TABLE: the table, or the number that acknowledges the back-end's answer to it (vu "SET_MEM_TABLE")."""

    @classmethod
    def unpack(cls, data: bytes) -> MemTable | U64:
        """Build either; an acknowledgement has 8 bytes, which is not enough for a region. Raises: FieldError."""
        return U64.unpack(data) if len(data) == U64.STRUCT.size else MemTable.unpack(data)


class SingleRegionOrAck:
    """ADD_MEM_REG and REM_MEM_REG: a region, or the number that acknowledges the back-end's answers."""

    @classmethod
    def unpack(cls, data: bytes) -> SingleRegion | U64:
        """Build either. Raises: FieldError."""
        return U64.unpack(data) if len(data) == U64.STRUCT.size else SingleRegion.unpack(data)


@attrs.frozen
class Inflight:
    """GET_INFLIGHT_FD and SET_INFLIGHT_FD: a region for what is in flight (vu "Inflight description").

    The specification's four numbers have 20 bytes; front-ends in C send the 24 of their padded structure and want as
    many back. `tail` is how many bytes of padding came.
    """

    STRUCT: ClassVar[struct.Struct] = struct.Struct("=QQHH")
    PADDED: ClassVar[int] = 24

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int
    tail: int = 0

    @classmethod
    def unpack(cls, data: bytes) -> Inflight:
        """Build from 20 or 24 bytes. Raises: FieldError: no queue, a size no queue can have, or an end that wraps."""
        if len(data) != cls.PADDED:
            check_size(data, cls.STRUCT.size)
        size, offset, num_queues, queue_size = cls.STRUCT.unpack_from(data)
        region = cls(size, offset, num_queues, queue_size, len(data) - cls.STRUCT.size)
        if not region.num_queues:
            raise FieldError("num_queues", 0, "asks for nothing")
        if not 0 < region.queue_size <= consts.VIRTQ_SIZE_MAX:
            raise FieldError("queue_size", region.queue_size, f"is not in 1..{consts.VIRTQ_SIZE_MAX} (descriptors)")
        if region.mmap_offset + region.mmap_size >= 1 << 63:
            raise FieldError("mmap_offset", region.mmap_offset, f"plus size {region.mmap_size:#x} passes 2**63")
        return region

    def pack(self) -> bytes:
        """Return the numbers' 20 bytes and the padding."""
        numbers = self.STRUCT.pack(self.mmap_size, self.mmap_offset, self.num_queues, self.queue_size)
        return numbers + bytes(self.tail)


@attrs.frozen
class StateTransfer:
    """SET_DEVICE_STATE_FD: which way the device's state goes, and in which phase (vu "Migrating back-end state")."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("=II")
    SAVE: ClassVar[int] = 0
    LOAD: ClassVar[int] = 1

    direction: int
    phase: int

    @classmethod
    def unpack(cls, data: bytes) -> StateTransfer:
        """Build from 8 bytes. Raises: FieldError: a direction or phase that there is not."""
        check_size(data, cls.STRUCT.size)
        transfer = cls(*cls.STRUCT.unpack(data))
        if transfer.direction not in (cls.SAVE, cls.LOAD):
            raise FieldError("direction", transfer.direction, "is neither 0 (save) nor 1 (load)")
        if transfer.phase:
            raise FieldError("phase", transfer.phase, "is not 0 (stopped)")
        return transfer

    def pack(self) -> bytes:
        """Return the pair's 8 bytes."""
        return self.STRUCT.pack(self.direction, self.phase)


@attrs.frozen
class Config:
    """GET_CONFIG and SET_CONFIG: a part of the configuration space (vu "Virtio device config space")."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("=III")

    offset: int
    flags: int
    data: bytes

    @classmethod
    def unpack(cls, data: bytes) -> Config:
        """Build from 12 + size bytes. Raises: FieldError: an empty part, or one that passes 256 bytes."""
        if len(data) < cls.STRUCT.size:
            raise FieldError("size", len(data), f"is below {cls.STRUCT.size} (bytes)")
        offset, size, flags = cls.STRUCT.unpack_from(data)
        check_size(data, cls.STRUCT.size + size)
        if not size:
            raise FieldError("size", 0, "is an empty part")
        if offset + size > consts.VHOST_USER_CONFIG_MAX:
            raise FieldError("offset", offset, f"plus size {size} is above {consts.VHOST_USER_CONFIG_MAX} (bytes)")
        return cls(offset, flags, data[cls.STRUCT.size :])

    def pack(self) -> bytes:
        """Return the part's bytes, its head before them."""
        return self.STRUCT.pack(self.offset, len(self.data), self.flags) + self.data


@attrs.frozen
class Iotlb:
    """An IOTLB message, of either direction (vu "An IOTLB message"): Linux' struct vhost_iotlb_msg.

    `perm` has bit 0 for reading and bit 1 for writing; what `type` and the ranges may be is for who acts upon them.
    """

    STRUCT: ClassVar[struct.Struct] = struct.Struct("=QQQBB6x")

    iova: int
    size: int
    uaddr: int
    perm: int
    type: int

    @classmethod
    def unpack(cls, data: bytes) -> Iotlb:
        """Build from 32 bytes; any values are accepted."""
        check_size(data, cls.STRUCT.size)
        return cls(*cls.STRUCT.unpack(data))

    def pack(self) -> bytes:
        """Return the message's 32 bytes."""
        return self.STRUCT.pack(self.iova, self.size, self.uaddr, self.perm, self.type)


for _struct, _size in (
    (U64.STRUCT, 8),
    (VringState.STRUCT, 8),
    (VringAddr.STRUCT, 40),
    (LogArea.STRUCT, 16),
    (Region.STRUCT, 32),
    (MemTable.STRUCT, 8),  # followed by 1 to 8 regions
    (SingleRegion.STRUCT, 8),  # followed by one region
    (Inflight.STRUCT, 20),
    (StateTransfer.STRUCT, 8),
    (Iotlb.STRUCT, 32),
    (Config.STRUCT, 12),  # followed by 1 to 256 bytes
):
    assert _struct.size == _size, f"{_struct.format} has {_struct.size} bytes, not {_size}"
