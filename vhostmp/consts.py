"""Numbers of virtio 1.3 and of the vhost-user protocol that this package uses, each with the section it comes from.

Rules: standard library only, no imports of ours, nothing but constants and the tables that name them. Names are the
specification's words; a feature is its *bit number*, not its mask (`1 << VIRTIO_F_VERSION_1`); everything is in the
units of the specification. "vu" below is the vhost-user document (QEMU docs/interop/vhost-user.rst) by section title.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Final

# --- virtio feature bits: virtio 1.3, 6 "Reserved Feature Bits" -----------------------------------------------------

VIRTIO_F_NOTIFY_ON_EMPTY: Final = 24  # 6.3 (legacy)
VIRTIO_F_ANY_LAYOUT: Final = 27  # 6.3 (legacy)
VIRTIO_F_INDIRECT_DESC: Final = 28  # 6, 2.7.5.3
VIRTIO_F_EVENT_IDX: Final = 29  # 6, 2.7.7 and 2.7.10
VIRTIO_F_VERSION_1: Final = 32  # 6
VIRTIO_F_ACCESS_PLATFORM: Final = 33  # 6
VIRTIO_F_RING_PACKED: Final = 34  # 6, 2.8
VIRTIO_F_IN_ORDER: Final = 35  # 6, 2.7.9
VIRTIO_F_ORDER_PLATFORM: Final = 36  # 6
VIRTIO_F_SR_IOV: Final = 37  # 6
VIRTIO_F_NOTIFICATION_DATA: Final = 38  # 6
VIRTIO_F_NOTIF_CONFIG_DATA: Final = 39  # 6
VIRTIO_F_RING_RESET: Final = 40  # 6
VIRTIO_F_ADMIN_VQ: Final = 41  # 6

# --- device status: virtio 1.3, 2.1 -------------------------------------------------------------------------------

VIRTIO_STATUS_ACKNOWLEDGE: Final = 1
VIRTIO_STATUS_DRIVER: Final = 2
VIRTIO_STATUS_DRIVER_OK: Final = 4
VIRTIO_STATUS_FEATURES_OK: Final = 8
VIRTIO_STATUS_SUSPEND: Final = 16
VIRTIO_STATUS_DEVICE_NEEDS_RESET: Final = 64
VIRTIO_STATUS_FAILED: Final = 128

# --- virtio-net feature bits: virtio 1.3, 5.1.3 ---------------------------------------------------------------------

VIRTIO_NET_F_CSUM: Final = 0
VIRTIO_NET_F_GUEST_CSUM: Final = 1
VIRTIO_NET_F_CTRL_GUEST_OFFLOADS: Final = 2
VIRTIO_NET_F_MTU: Final = 3
VIRTIO_NET_F_MAC: Final = 5
VIRTIO_NET_F_GSO: Final = 6  # 5.1.3.2 (legacy)
VIRTIO_NET_F_GUEST_TSO4: Final = 7
VIRTIO_NET_F_GUEST_TSO6: Final = 8
VIRTIO_NET_F_GUEST_ECN: Final = 9
VIRTIO_NET_F_GUEST_UFO: Final = 10
VIRTIO_NET_F_HOST_TSO4: Final = 11
VIRTIO_NET_F_HOST_TSO6: Final = 12
VIRTIO_NET_F_HOST_ECN: Final = 13
VIRTIO_NET_F_HOST_UFO: Final = 14
VIRTIO_NET_F_MRG_RXBUF: Final = 15
VIRTIO_NET_F_STATUS: Final = 16
VIRTIO_NET_F_CTRL_VQ: Final = 17
VIRTIO_NET_F_CTRL_RX: Final = 18
VIRTIO_NET_F_CTRL_VLAN: Final = 19
VIRTIO_NET_F_CTRL_RX_EXTRA: Final = 20  # Linux include/uapi/linux/virtio_net.h
VIRTIO_NET_F_GUEST_ANNOUNCE: Final = 21
VIRTIO_NET_F_MQ: Final = 22
VIRTIO_NET_F_CTRL_MAC_ADDR: Final = 23
VIRTIO_NET_F_DEVICE_STATS: Final = 50
VIRTIO_NET_F_HASH_TUNNEL: Final = 51
VIRTIO_NET_F_VQ_NOTF_COAL: Final = 52
VIRTIO_NET_F_NOTF_COAL: Final = 53
VIRTIO_NET_F_GUEST_USO4: Final = 54
VIRTIO_NET_F_GUEST_USO6: Final = 55
VIRTIO_NET_F_HOST_USO: Final = 56
VIRTIO_NET_F_HASH_REPORT: Final = 57
VIRTIO_NET_F_GUEST_HDRLEN: Final = 59
VIRTIO_NET_F_RSS: Final = 60
VIRTIO_NET_F_RSC_EXT: Final = 61
VIRTIO_NET_F_STANDBY: Final = 62
VIRTIO_NET_F_SPEED_DUPLEX: Final = 63

# --- virtio-blk feature bits: virtio 1.3, 5.2.3 ---------------------------------------------------------------------

VIRTIO_BLK_F_SIZE_MAX: Final = 1
VIRTIO_BLK_F_SEG_MAX: Final = 2
VIRTIO_BLK_F_GEOMETRY: Final = 4
VIRTIO_BLK_F_RO: Final = 5
VIRTIO_BLK_F_BLK_SIZE: Final = 6
VIRTIO_BLK_F_FLUSH: Final = 9
VIRTIO_BLK_F_TOPOLOGY: Final = 10
VIRTIO_BLK_F_CONFIG_WCE: Final = 11
VIRTIO_BLK_F_MQ: Final = 12
VIRTIO_BLK_F_DISCARD: Final = 13
VIRTIO_BLK_F_WRITE_ZEROES: Final = 14
VIRTIO_BLK_F_LIFETIME: Final = 15
VIRTIO_BLK_F_SECURE_ERASE: Final = 16
VIRTIO_BLK_F_ZONED: Final = 17

# --- feature bits of vhost and vhost-user ---------------------------------------------------------------------------

VHOST_F_LOG_ALL: Final = 26  # Linux include/uapi/linux/vhost_types.h; vu "Migration"
VHOST_USER_F_PROTOCOL_FEATURES: Final = 30  # vu "Protocol features"
BIT_30: Final = 1 << VHOST_USER_F_PROTOCOL_FEATURES  # the same as a mask

_CLASS_PREFIXES: Final = {"net": "VIRTIO_NET_F_", "blk": "VIRTIO_BLK_F_"}


def _feature_table(*prefixes: str) -> Mapping[int, str]:
    return {bit: name.partition("_F_")[2] for name, bit in globals().items() if name.startswith(prefixes)}


COMMON_FEATURE_NAMES: Final = _feature_table("VIRTIO_F_", "VHOST_F_", "VHOST_USER_F_")
"""Short name (`"VERSION_1"`) of every feature bit above that all classes of devices share."""

FEATURE_NAMES: Final[Mapping[str, Mapping[int, str]]] = {
    device_class: {**_feature_table(prefix), **COMMON_FEATURE_NAMES} for device_class, prefix in _CLASS_PREFIXES.items()
}
"""By class of device, short names of its own bits and of the common ones."""

# --- split virtqueue: virtio 1.3, 2.7 -------------------------------------------------------------------------------

VIRTQ_DESC_F_NEXT: Final = 1  # 2.7.5
VIRTQ_DESC_F_WRITE: Final = 2  # 2.7.5
VIRTQ_DESC_F_INDIRECT: Final = 4  # 2.7.5
VIRTQ_DESC_SIZE: Final = 16  # bytes, 2.7.5
VIRTQ_AVAIL_F_NO_INTERRUPT: Final = 1  # 2.7.6
VIRTQ_USED_F_NO_NOTIFY: Final = 1  # 2.7.8
VIRTQ_USED_ELEM_SIZE: Final = 8  # bytes, 2.7.8
VIRTQ_SIZE_MAX: Final = 32768  # descriptors; 2.7 "Maximum Queue Size value is 32768", a power of two
VIRTQ_DESC_ALIGN: Final = 16  # bytes, 2.7
VIRTQ_AVAIL_ALIGN: Final = 2  # bytes, 2.7
VIRTQ_USED_ALIGN: Final = 4  # bytes, 2.7

# --- virtio-net header: virtio 1.3, 5.1.6 ---------------------------------------------------------------------------

VIRTIO_NET_HDR_F_NEEDS_CSUM: Final = 1
VIRTIO_NET_HDR_F_DATA_VALID: Final = 2
VIRTIO_NET_HDR_F_RSC_INFO: Final = 4
VIRTIO_NET_HDR_GSO_NONE: Final = 0
VIRTIO_NET_HDR_GSO_TCPV4: Final = 1
VIRTIO_NET_HDR_GSO_UDP: Final = 3
VIRTIO_NET_HDR_GSO_TCPV6: Final = 4
VIRTIO_NET_HDR_GSO_UDP_L4: Final = 5
VIRTIO_NET_HDR_GSO_ECN: Final = 0x80
VIRTIO_NET_HDR_SIZE: Final = 12  # bytes, with num_buffers (VERSION_1 or MRG_RXBUF)
VIRTIO_NET_HDR_SIZE_LEGACY: Final = 10  # bytes, 5.1.6.1: neither VERSION_1 nor MRG_RXBUF
VIRTIO_NET_HDR_NUM_BUFFERS_OFFSET: Final = 10  # bytes
VIRTIO_NET_MTU_MIN: Final = 68  # bytes, 5.1.4.1
VIRTIO_NET_MTU_MAX: Final = 65535  # bytes, 5.1.4.1
VIRTIO_NET_QUEUE_PAIRS_MAX: Final = 0x8000  # 5.1.6.5.6.1, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX

# --- vhost-user messages: vu "Message Specification", "Front-end message types" -------------------------------------


class Request(enum.IntEnum):
    """Number of a request that the front-end sends (vu "Front-end message types")."""

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


class BackendRequest(enum.IntEnum):
    """Number of a request that the back-end sends on its own channel (vu "Back-end message types")."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class IotlbType(enum.IntEnum):
    """What a message about the IOTLB says (vu "An IOTLB message"); the first and the last are the back-end's."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


class ProtocolFeature(enum.IntEnum):
    """Bit number of a protocol feature (vu "Protocol features")."""

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
    GPA_ADDRESSES = 21
    SHMEM_MAP = 22

    @property
    def mask(self) -> int:
        """The feature as a mask: `1 << bit`."""
        return 1 << self


VHOST_USER_VERSION: Final = 1  # vu "Header": flags, bits 0-1
VHOST_USER_VERSION_MASK: Final = 0x3  # vu "Header"
VHOST_USER_REPLY_FLAG: Final = 0x4  # vu "Header": flags, bit 2
VHOST_USER_NEED_REPLY_FLAG: Final = 0x8  # vu "Header": flags, bit 3
VHOST_USER_VRING_IDX_MASK: Final = 0xFF  # vu SET_VRING_KICK, bits 0-7
VHOST_USER_VRING_NOFD_MASK: Final = 0x100  # vu SET_VRING_KICK, bit 8
VHOST_USER_VRING_F_LOG: Final = 1  # vu "A vring address description": flags, bit 0
VHOST_USER_MAX_REGIONS: Final = 8  # vu "Multiple memory regions description"; also the most fds a message carries
VHOST_USER_CONFIG_MAX: Final = 256  # bytes of a configuration space (QEMU, VHOST_USER_MAX_CONFIG_SIZE)
VHOST_USER_RINGS_MAX: Final = 256  # what the 8-bit index of SET_VRING_KICK can name


def _names(bits: int, table: Mapping[int, str]) -> list[str]:
    return [table.get(bit, f"BIT_{bit}") for bit in range(bits.bit_length()) if bits >> bit & 1]


def feature_names(bits: int, device_class: str = "net") -> list[str]:
    """Name the virtio and vhost-user feature bits set in `bits`, lowest first, as a class of device has them.

    Returns: short names as in the specification (`"MRG_RXBUF"`); a bit without a name here is `"BIT_<n>"`.
    """
    return _names(bits, FEATURE_NAMES.get(device_class, COMMON_FEATURE_NAMES))


def protocol_feature_names(bits: int) -> list[str]:
    """Name the vhost-user protocol feature bits set in `bits`, lowest first; see `feature_names`."""
    return _names(bits, {feature.value: feature.name for feature in ProtocolFeature})


def request_name(number: int) -> str:
    """Name a front-end request; a number without a name is `"request <n>"`."""
    try:
        return Request(number).name
    except ValueError:
        return f"request {number}"


def mask(bits: Iterable[int]) -> int:
    """Turn bit numbers into the mask that has exactly these set."""
    value = 0
    for bit in bits:
        value |= 1 << bit
    return value
