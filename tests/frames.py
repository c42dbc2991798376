"""Frames with sequence numbers and checksums. Loaded by workers too, for back-ends in Python: so it imports little."""

from __future__ import annotations

import struct
import zlib
from typing import Final

ETHERNET: Final = bytes.fromhex("525400000002525400000001") + b"\x88\xb5"  # local experimental EtherType
_NUMBERS: Final = struct.Struct("<QHI")  # sequence, payload bytes, crc32 of the rest
#: What memory that must not be used any more is filled with.
POISON: Final = b"\xde\xad\xbe\xef\xfe\xed\xfa\xce"


def make_frame(sequence: int, size: int) -> bytes:
    """Return a frame of at least `size` bytes that says which one it is and proves that it is whole."""
    payload = sequence.to_bytes(8, "little") * max(1, (size - len(ETHERNET) - _NUMBERS.size) // 8)
    return ETHERNET + _NUMBERS.pack(sequence, len(payload), zlib.crc32(payload)) + payload


def read_frame(frame: bytes) -> int:
    """Return a frame's sequence number; AssertionError when it is not whole."""
    if POISON in frame:
        raise AssertionError(f"poison in a frame of {len(frame)} bytes")
    start = len(ETHERNET) + _NUMBERS.size
    sequence, size, checksum = _NUMBERS.unpack_from(frame, len(ETHERNET))
    if frame[: len(ETHERNET)] != ETHERNET or len(frame) != start + size or zlib.crc32(frame[start:]) != checksum:
        raise AssertionError(f"damaged frame {sequence} of {len(frame)} bytes, said to have {start + size}")
    return int(sequence)
