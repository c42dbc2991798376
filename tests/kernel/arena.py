"""What both sides of a case share: guest memory, the dirty log, eventfds, and the frames of the tap.

One of each for all cases, since the sides take turns: a case begins with everything as `reset` leaves it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import struct
from typing import Final

from tests.kernel.case import MEMORY_BYTES, PAGE, REGIONS, TABLES, pieces

LOG_BYTES: Final = PAGE
FILL: Final = 0xA5

SOL_PACKET: Final = 263
PACKET_VNET_HDR: Final = 15
PACKET_QDISC_BYPASS: Final = 20
PACKET_IGNORE_OUTGOING: Final = 23
ETH_P_ALL: Final = 3
VNET_HEADER: Final = 10
FRAME_MOST: Final = 70000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


class Mapped:
    """A file in memory, mapped at an address that the kernel can be told."""

    def __init__(self, name: str, size: int) -> None:
        """Make it, zeroed."""
        self.size: Final = size
        self.fd: Final = os.memfd_create(name)
        os.ftruncate(self.fd, size)
        self._map: Final = mmap.mmap(self.fd, size)
        self.address: Final = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.buf: Final = memoryview(self._map)


class Tap:
    """The network's side of a tap: what comes out of it, and what is put in."""

    def __init__(self, name: str) -> None:
        """Listen to a tap that is there, and set it up."""
        self._sock: Final = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._sock.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)  # a frame is in the tap's queue when `send` returns
        self._sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        flags = struct.pack("16sH22x", name.encode(), IFF_UP)
        fcntl.ioctl(self._sock, SIOCSIFFLAGS, flags)
        self._sock.bind((name, ETH_P_ALL))
        self._sock.setblocking(False)

    def send(self, frame: bytes, header: bytes = bytes(VNET_HEADER)) -> None:
        """Have the network send a frame, with a virtio_net_hdr of 10 bytes that says what is still to do for it."""
        self._sock.send(header + frame)

    def received(self) -> list[bytes]:
        """Return the frames that came from the guest since last asked, each behind its virtio_net_hdr of 10 bytes.

        One whose offloads the kernel has taken and cannot put into a header is an empty string.
        """
        frames: list[bytes] = []
        while True:
            try:
                frames.append(self._sock.recv(FRAME_MOST))
            except BlockingIOError:
                return frames
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                frames.append(b"")


def empty(fd: int) -> None:
    """Read and drop what a tap still has for whoever serves it."""
    while True:
        try:
            os.read(fd, FRAME_MOST)
        except BlockingIOError:
            return


class Arena:
    """Memory, log and eventfds."""

    def __init__(self) -> None:
        """Make them."""
        self.memory: Final = Mapped("oracle-memory", MEMORY_BYTES)
        self.log: Final = Mapped("oracle-log", LOG_BYTES)
        self.kicks: Final = [_eventfd(), _eventfd()]
        self.calls: Final = [_eventfd(), _eventfd()]
        self.errs: Final = [_eventfd(), _eventfd()]
        self.log_fd: Final = _eventfd()
        self.file: Final = os.open("/dev/null", os.O_RDWR)
        blank = bytearray(MEMORY_BYTES)
        for gpa, size, offset in REGIONS:
            if gpa >= TABLES.stop:
                blank[offset : offset + size] = bytes([FILL]) * size
        self._blank: Final = bytes(blank)

    def reset(self) -> None:
        """Make everything as it was: rings of zeros, buffers that show what was never written."""
        self.memory.buf[:] = self._blank
        self.log.buf[:] = bytes(LOG_BYTES)
        for fd in (*self.kicks, *self.calls, *self.errs, self.log_fd):
            fired(fd)

    def write(self, gpa: int, data: bytes) -> None:
        """Write to guest memory, as far as there is any."""
        done = 0
        for offset, size in pieces(gpa, len(data)):
            self.memory.buf[offset : offset + size] = data[done : done + size]
            done += size

    def take_log(self) -> list[int]:
        """Return the pages that were logged since last asked."""
        raw = bytes(self.log.buf)
        if not any(raw):
            return []
        self.log.buf[:] = bytes(LOG_BYTES)
        return [8 * at + bit for at, byte in enumerate(raw) if byte for bit in range(8) if byte >> bit & 1]


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def fired(fd: int) -> bool:
    """Whether an eventfd was signalled since last asked."""
    try:
        return os.eventfd_read(fd) > 0
    except BlockingIOError:
        return False
