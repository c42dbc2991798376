"""Frames that a back-end port had taken from its source and not delivered, in a file for the port's successor.

A port that finds too few receive buffers for a frame keeps it. When the queue pair moves to another worker the frames
go along: the old worker writes them to an anonymous file, the control process hands that on unread, the new worker's
port delivers them first. What is in them only ports know.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from vhostmp.shm.segment import anonymous_file

_LENGTH = struct.Struct("=I")


def to_file(frames: Iterable[bytes]) -> int:
    """Return an open file, the caller's, that holds the frames, oldest first. OSError when there is no room."""
    return anonymous_file(b"".join(_LENGTH.pack(len(frame)) + frame for frame in frames))


def from_file(fd: int) -> list[bytes]:
    """Return the frames of a file of `to_file`, whose descriptor stays the caller's."""
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    frames: list[bytes] = []
    start = 0
    while start + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, start)
        start += _LENGTH.size
        frames.append(data[start : start + length])
        start += length
    return frames
