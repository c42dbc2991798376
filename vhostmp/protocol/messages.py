"""The header of vhost-user messages, and the table of the messages this back-end understands.

Rules: no I/O, no state. A new message is a new row of `MESSAGES` and, where it brings a new payload, a class in
`payloads.py`; its handler is in the module of its topic in `vhostmp/handlers`.

Theory of operation: a message is a 12-byte header (request, flags, size), `size` bytes of payload and up to 8 file
descriptors. "vu" is the vhost-user document (QEMU docs/interop/vhost-user.rst), by section title.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from typing import ClassVar, Final

import attrs

from vhostmp import consts
from vhostmp.consts import ProtocolFeature, Request
from vhostmp.protocol.payloads import (
    U64,
    Config,
    Empty,
    FieldError,
    Inflight,
    Iotlb,
    LogArea,
    MacAddress,
    MemTable,
    MemTableOrAck,
    Mtu,
    Payload,
    Region,
    SingleRegion,
    SingleRegionOrAck,
    StateTransfer,
    Status,
    Unpacks,
    VringAddr,
    VringBase,
    VringEnable,
    VringFd,
    VringKick,
    VringNum,
    VringState,
)


@attrs.frozen
class Header:
    """The fixed part of every message (vu "Header")."""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("=III")
    SIZE: ClassVar[int] = 12

    request: int
    flags: int
    size: int

    @property
    def need_reply(self) -> bool:
        """Whether the front-end asks for an acknowledgement (vu "REPLY_ACK"; counts only once that is negotiated)."""
        return bool(self.flags & consts.VHOST_USER_NEED_REPLY_FLAG)

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Build from 12 bytes; any value is accepted, `check` judges it."""
        return cls(*cls.STRUCT.unpack(data))

    def pack(self) -> bytes:
        """Return the header's 12 bytes."""
        return self.STRUCT.pack(self.request, self.flags, self.size)

    def check(self) -> None:
        """Judge a received header. Raises: FieldError: after it the byte stream cannot be trusted any more."""
        version = self.flags & consts.VHOST_USER_VERSION_MASK
        if version != consts.VHOST_USER_VERSION:
            raise FieldError("flags", self.flags, f"have version {version}, not {consts.VHOST_USER_VERSION}")
        if self.flags & consts.VHOST_USER_REPLY_FLAG:
            raise FieldError("flags", self.flags, "have the reply bit set in a request")
        if self.flags & ~0xF:
            raise FieldError("flags", self.flags, "have reserved bits set")
        if self.size > MAX_PAYLOAD_SIZE:
            raise FieldError("size", self.size, f"is above {MAX_PAYLOAD_SIZE} (bytes)")


assert Header.STRUCT.size == Header.SIZE


class Fds(enum.Enum):
    """How many file descriptors come with a message."""

    NONE = "none"
    ONE = "exactly one"
    ONE_FOR_REGION = "exactly one for a region"
    OPTIONAL = "at most one"
    PER_REGION = "one for each region"
    PER_NOFD_BIT = "one, or none with the no-fd bit set"

    def wanted(self, payload: Payload) -> range:
        """Return the counts that are right for `payload`."""
        match self:
            case Fds.NONE:
                return range(1)
            case Fds.ONE:
                return range(1, 2)
            case Fds.OPTIONAL:
                return range(2)
            case Fds.ONE_FOR_REGION:
                return range(1, 2) if isinstance(payload, SingleRegion) else range(1)
            case Fds.PER_REGION:
                count = len(payload.regions) if isinstance(payload, MemTable) else 0
                return range(count, count + 1)
            case Fds.PER_NOFD_BIT:
                assert isinstance(payload, VringFd)
                return range(1, 2) if payload.has_fd else range(1)


@attrs.frozen
class MessageSpec:
    """What is true of a message in every session.

    Attributes:
        payload: class of the front-end's payload.
        fds: how many file descriptors it carries.
        has_reply: whether it has a reply of its own (then it never gets an acknowledgement).
        offered: the protocol feature that has to be offered for the message to be legal, if any.
        negotiated: the protocol feature that has to be negotiated for the message to be legal, if any.
    """

    payload: type[Unpacks] = Empty
    fds: Fds = Fds.NONE
    has_reply: bool = False
    offered: ProtocolFeature | None = None
    negotiated: ProtocolFeature | None = None


MESSAGES: Final[Mapping[Request, MessageSpec]] = {
    Request.GET_FEATURES: MessageSpec(has_reply=True),
    Request.SET_FEATURES: MessageSpec(U64),
    Request.SET_OWNER: MessageSpec(),
    Request.RESET_OWNER: MessageSpec(),
    Request.SET_MEM_TABLE: MessageSpec(MemTableOrAck, Fds.PER_REGION),
    Request.SET_LOG_BASE: MessageSpec(LogArea, Fds.ONE, has_reply=True, negotiated=ProtocolFeature.LOG_SHMFD),
    Request.SET_LOG_FD: MessageSpec(fds=Fds.ONE, negotiated=ProtocolFeature.LOG_SHMFD),
    Request.SET_VRING_NUM: MessageSpec(VringNum),
    Request.SET_VRING_ADDR: MessageSpec(VringAddr),
    Request.SET_VRING_BASE: MessageSpec(VringBase),
    Request.GET_VRING_BASE: MessageSpec(VringState, has_reply=True),
    Request.SET_VRING_KICK: MessageSpec(VringFd, Fds.PER_NOFD_BIT),
    Request.SET_VRING_CALL: MessageSpec(VringFd, Fds.PER_NOFD_BIT),
    Request.SET_VRING_ERR: MessageSpec(VringFd, Fds.PER_NOFD_BIT),
    Request.GET_PROTOCOL_FEATURES: MessageSpec(has_reply=True),
    Request.SET_PROTOCOL_FEATURES: MessageSpec(U64),
    Request.GET_QUEUE_NUM: MessageSpec(has_reply=True, offered=ProtocolFeature.MQ),
    Request.SET_VRING_ENABLE: MessageSpec(VringEnable),
    Request.SEND_RARP: MessageSpec(MacAddress, negotiated=ProtocolFeature.RARP),
    Request.NET_SET_MTU: MessageSpec(Mtu, negotiated=ProtocolFeature.NET_MTU),
    Request.SET_BACKEND_REQ_FD: MessageSpec(fds=Fds.ONE, negotiated=ProtocolFeature.BACKEND_REQ),
    Request.GET_CONFIG: MessageSpec(Config, has_reply=True, negotiated=ProtocolFeature.CONFIG),
    Request.SET_CONFIG: MessageSpec(Config, negotiated=ProtocolFeature.CONFIG),
    Request.IOTLB_MSG: MessageSpec(Iotlb, has_reply=True, negotiated=ProtocolFeature.BACKEND_REQ),
    Request.RESET_DEVICE: MessageSpec(negotiated=ProtocolFeature.RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: MessageSpec(has_reply=True, offered=ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: MessageSpec(
        SingleRegionOrAck, Fds.ONE_FOR_REGION, negotiated=ProtocolFeature.CONFIGURE_MEM_SLOTS
    ),
    Request.REM_MEM_REG: MessageSpec(SingleRegionOrAck, Fds.OPTIONAL, negotiated=ProtocolFeature.CONFIGURE_MEM_SLOTS),
    Request.POSTCOPY_ADVISE: MessageSpec(has_reply=True, negotiated=ProtocolFeature.PAGEFAULT),
    Request.POSTCOPY_LISTEN: MessageSpec(negotiated=ProtocolFeature.PAGEFAULT),
    Request.POSTCOPY_END: MessageSpec(has_reply=True, negotiated=ProtocolFeature.PAGEFAULT),
    Request.VRING_KICK: MessageSpec(VringKick, negotiated=ProtocolFeature.INBAND_NOTIFICATIONS),
    Request.SET_DEVICE_STATE_FD: MessageSpec(
        StateTransfer, Fds.ONE, has_reply=True, negotiated=ProtocolFeature.DEVICE_STATE
    ),
    Request.CHECK_DEVICE_STATE: MessageSpec(has_reply=True, negotiated=ProtocolFeature.DEVICE_STATE),
    Request.GET_INFLIGHT_FD: MessageSpec(Inflight, has_reply=True, negotiated=ProtocolFeature.INFLIGHT_SHMFD),
    Request.SET_INFLIGHT_FD: MessageSpec(Inflight, Fds.ONE, negotiated=ProtocolFeature.INFLIGHT_SHMFD),
    Request.SET_STATUS: MessageSpec(Status, negotiated=ProtocolFeature.STATUS),
    Request.GET_STATUS: MessageSpec(has_reply=True, negotiated=ProtocolFeature.STATUS),
}
"""Every message this back-end understands."""

MAX_PAYLOAD_SIZE: Final = 1024
"""Largest payload that is read, in bytes; above that of every message, so that a foreign one is skipped and refused."""

MAX_FDS: Final = consts.VHOST_USER_MAX_REGIONS
"""Most file descriptors a message carries."""

assert MemTable.STRUCT.size + consts.VHOST_USER_MAX_REGIONS * Region.STRUCT.size <= MAX_PAYLOAD_SIZE
