"""Numbers of the vhost-user document and of virtio 1.3, as a front-end and a driver need them.

Written from the documents: our back-end's own tables are out of this tool's reach (see frontend.py).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Request(IntEnum):
    """Requests of the front-end. Source: vhost-user, "Front-end message types"."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


ANSWERED: Final = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_VRING_BASE,
        Request.GET_QUEUE_NUM,
        Request.GET_CONFIG,
        Request.GET_INFLIGHT_FD,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_STATUS,
        Request.POSTCOPY_ADVISE,
        Request.SET_DEVICE_STATE_FD,
        Request.CHECK_DEVICE_STATE,
        Request.GET_SHARED_OBJECT,
        Request.GET_SHMEM_CONFIG,
    }
)
"""Requests that have a reply of their own. Source: vhost-user, "Communication"."""


class ProtocolFeature(IntEnum):
    """Bits of SET_PROTOCOL_FEATURES. Source: vhost-user, "Protocol features"."""

    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    NET_MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    CRYPTO_SESSION = 7
    PAGEFAULT = 8
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    XEN_MMAP = 17
    SHARED_OBJECT = 18
    DEVICE_STATE = 19
    GET_VRING_BASE_INFLIGHT = 20
    SHMEM = 21


class Feature(IntEnum):
    """Bits of SET_FEATURES that this tool knows. Source: virtio 1.3, 5.1.3 and 6; vhost-user, bits 26 and 30."""

    NET_CSUM = 0
    NET_GUEST_CSUM = 1
    NET_MTU = 3
    NET_MAC = 5
    NET_GUEST_TSO4 = 7
    NET_GUEST_TSO6 = 8
    NET_GUEST_ECN = 9
    NET_GUEST_UFO = 10
    NET_HOST_TSO4 = 11
    NET_HOST_TSO6 = 12
    NET_HOST_ECN = 13
    NET_HOST_UFO = 14
    NET_MRG_RXBUF = 15
    NET_STATUS = 16
    NET_CTRL_VQ = 17
    NET_CTRL_RX = 18
    NET_CTRL_VLAN = 19
    NET_GUEST_ANNOUNCE = 21
    NET_MQ = 22
    NET_CTRL_MAC_ADDR = 23
    NOTIFY_ON_EMPTY = 24
    LOG_ALL = 26
    ANY_LAYOUT = 27
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    PROTOCOL_FEATURES = 30
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    RING_RESET = 40


def bits(*numbers: int) -> int:
    """Return a mask with these bits set."""
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask


def has(mask: int, number: int) -> bool:
    """Whether a bit is set."""
    return bool(mask >> number & 1)


CALM: Final = bits(
    Feature.NET_MRG_RXBUF, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.PROTOCOL_FEATURES, Feature.VERSION_1
)
"""What a plain driver takes of what is offered; no format of rings but split, no offloads, no IOMMU, no log."""

DRIVABLE: Final = CALM | bits(
    Feature.NOTIFY_ON_EMPTY, Feature.ANY_LAYOUT, Feature.RING_PACKED, Feature.IN_ORDER, Feature.ORDER_PLATFORM
)
"""What this tool's driver can keep to in any combination."""
