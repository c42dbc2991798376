"""Frames that a back-end port had taken from its source and not delivered, in a file for the port's successor.

A port that finds too few receive buffers for a frame keeps it. When the queue pair moves to another worker the frames
go along: the old worker writes them to an anonymous file, the control process hands that on unread, the new worker's
port delivers them first. What is in them only ports know.

Whoever wrote such a file may be a worker that a guest has taken over: what it hands out may be anything. It is looked
at before it is read, and no more is read than a port can have kept.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterable
from typing import Final

from vhostmp.shm.segment import anonymous_file

log = logging.getLogger(__name__)

#: What is taken of a port's frames: more than a back-end is asked for at once, of the largest there are.
FRAMES_MAX: Final = 256
BYTES_MAX: Final = 1 << 24
_LENGTH: Final = struct.Struct("=I")


def to_file(frames: Iterable[bytes]) -> int:
    """Return an open file, the caller's, that holds the frames, oldest first. OSError when there is no room.

    Frames beyond FRAMES_MAX or BYTES_MAX, of a back-end that returns more than it was asked for, are dropped.
    """
    data = bytearray()
    for count, frame in enumerate(frames):
        if count == FRAMES_MAX or len(data) + _LENGTH.size + len(frame) > BYTES_MAX:
            log.warning("a back-end has more than %d frames undelivered: the rest is dropped", count)
            break
        data += _LENGTH.pack(len(frame)) + frame
    return anonymous_file(bytes(data))


def from_file(fd: int) -> list[bytes]:
    """Return the frames of a file of `to_file`, whose descriptor stays the caller's; of another whatever is in it.

    At most FRAMES_MAX, and BYTES_MAX in all, however long the file is. OSError where the file is none in memory.
    """
    data = os.pread(fd, min(os.fstat(fd).st_size, BYTES_MAX), 0)
    frames: list[bytes] = []
    start = 0
    while start + _LENGTH.size <= len(data) and len(frames) < FRAMES_MAX:
        (length,) = _LENGTH.unpack_from(data, start)
        start += _LENGTH.size
        frames.append(data[start : start + length])
        start += length
    return frames
