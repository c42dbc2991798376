"""The two formats of a virtqueue as the control process knows them: sizes, and where a ring stands (its base).

The base of a split ring is the next available index, 16 bits. That of a packed ring is 32 bits, as vhost-user has it:
bits 0 to 14 the offset of the next available descriptor, bit 15 the wrap counter there, bits 16 to 30 and 31 the same
of the next used one. A front-end may leave the upper half 0: then both are the same, which is where every ring stands
that was stopped by somebody who completes in order.
"""

from __future__ import annotations

from typing import Final

from vhostmp.errors import LocalError
from vhostmp.shm import layout

RING_SIZE_MAX: Final = 32768
EVENT_IDX: Final = 1 << 29
RING_PACKED: Final = 1 << 34
OFFSET: Final = 0x7FFF
WRAP: Final = 0x8000
#: The base of a packed ring that nobody has used yet: both wrap counters begin with 1 (virtio 1.3, 2.8.1).
PACKED_START: Final = WRAP | WRAP << 16
_INDEX_MAX: Final = 0xFFFF
#: A ring that is started has a past of its own: what was not counted of a death before it is nobody's any more.
_NO_DEATH: Final = {"died": 0, "slips_known": 0, "waiting": 0}
_BASE_MAX: Final = 0xFFFFFFFF


def is_packed(features: int) -> bool:
    """Whether rings are packed when a guest has acked these features."""
    return bool(features & RING_PACKED)


def check_size(features: int, size: int) -> None:
    """Raise LocalError unless a ring may have `size` entries (virtio 1.3, 2.7 and 2.8.10.1)."""
    if not 0 < size <= RING_SIZE_MAX:
        raise LocalError(f"ring size {size} is not from 1 to {RING_SIZE_MAX}")
    if size & (size - 1) and not is_packed(features):
        raise LocalError(f"ring size {size} is not a power of two, and the ring is not packed")


def check_base(features: int, base: int) -> None:
    """Raise LocalError when a base has too many bits. Whether it lies in the ring is known when that is started."""
    if not 0 <= base <= (_BASE_MAX if is_packed(features) else _INDEX_MAX):
        raise LocalError(f"vring base {base:#x} has more than {32 if is_packed(features) else 16} bits")


def parts(features: int, size: int) -> tuple[tuple[str, int, int], ...]:
    """Return name, bytes and alignment of a ring's three parts (virtio 1.3, 2.7 and 2.8.10.1)."""
    if is_packed(features):
        return ("desc", 16 * size, 16), ("avail", 4, 4), ("used", 4, 4)
    event = 2 if features & EVENT_IDX else 0
    return ("desc", 16 * size, 16), ("avail", 4 + 2 * size + event, 2), ("used", 4 + 8 * size + event, 4)


def access(features: int, part: str) -> int:
    """Return what a device does with a part of a ring: 1 to read, 3 to read and write (an IOTLB entry's numbers)."""
    return 3 if part == "used" or (part == "desc" and is_packed(features)) else 1


def start(features: int, size: int, base: int) -> dict[str, int]:
    """Return what a ring's slot in the control segment holds when it starts at `base`.

    Raises LocalError for a size that the format does not have, and a base outside the ring.
    """
    check_size(features, size)
    check_base(features, base)
    if not is_packed(features):
        return {"last_avail_idx": base, "used_valid": 0, "batch_n": 0, **_NO_DEATH}
    avail, used = base & _INDEX_MAX, base >> 16 or base & _INDEX_MAX
    ahead = (avail & OFFSET) - (used & OFFSET) + (size if (avail ^ used) & WRAP else 0)
    if max(avail & OFFSET, used & OFFSET) >= size or not 0 <= ahead <= size:
        raise LocalError(f"vring base {base:#x} is not in a packed ring of {size}")
    return {"last_avail_idx": avail, "used_idx": used, "used_valid": 0, "batch_n": 0, **_NO_DEATH}


def base(features: int, buf: memoryview, offset: int) -> int:
    """Return the base of the ring whose slot in the control segment is at `offset`. Only if stopped it stands still."""
    avail = layout.RING.read(buf, offset, "last_avail_idx")
    return avail | layout.RING.read(buf, offset, "used_idx") << 16 if is_packed(features) else avail


def place(position: int) -> str:
    """Return a position in a packed ring for people: offset and wrap counter, as in "17/1"."""
    return f"{position & OFFSET}/{position >> 15}"
