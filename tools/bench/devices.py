"""Network devices to write to, and the yardstick: a bare loop of write() on them.

Both sides are counted by the device: a tap by what the kernel took from whoever writes to it (rx_packets of
/sys/class/net/NAME/statistics), one end of a pair (veth) by what it has passed to the other end (tx_packets). The
bare loop opens the device as our back-end does, with a virtio header before each frame, and writes one constant frame:
what remains of the difference is the virtqueue.
Source: Linux Documentation/networking/tuntap.rst, packet(7).
"""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import struct
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Self

from vhostmp.errors import LocalError
from vhostmp.tools._probe import write_loop

TUN: Final = "/dev/net/tun"
TUNSETIFF: Final = 0x400454CA
TUNSETVNETHDRSZ: Final = 0x400454D8
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
HEADER_BYTES: Final = 12
SOL_PACKET: Final = 263
PACKET_VNET_HDR, PACKET_VNET_HDR_SZ = 15, 24
PACKET_HEADER_BYTES: Final = 10

_numbers = itertools.count(int(time.time()) & 0xFFFF)


def new_name() -> str:
    """Return a name for a device that no other run has."""
    return f"vmpb{next(_numbers):x}"


class Counted:
    """A device that somebody else makes, and its counter."""

    counter = "rx_packets"

    def __init__(self, name: str) -> None:
        """Count what `name` takes."""
        self.name: Final = name

    @property
    def taken(self) -> int:
        """Frames that the kernel has taken from the device's user; 0 while there is no such device."""
        try:
            return int(Path(f"/sys/class/net/{self.name}/statistics/{self.counter}").read_text())
        except OSError:
            return 0


class Device(Counted):
    """A device that is up, without addresses, removed at the end. Needs CAP_NET_ADMIN."""

    words: ClassVar[tuple[str, ...]] = ()
    """What `ip` adds it with."""

    def __init__(self, name: str) -> None:
        """Create it. LocalError, in one line, when that is not allowed."""
        super().__init__(name)
        _ip(*(word.replace("NAME", name) for word in self.words))
        try:
            self._set_up(name)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _set_up(name: str) -> None:
        try:
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1\n")
        except OSError as error:
            raise LocalError(f"cannot set up {name}: {error.strerror}") from error
        _ip("link", "set", name, "up")

    def open(self) -> int:
        """Open it as a back-end does; returns the descriptor. LocalError when it cannot be."""
        raise NotImplementedError

    def header(self) -> bytes:
        """Return the empty header that goes before each frame."""
        return bytes(HEADER_BYTES)

    def close(self) -> None:
        """Remove it."""
        _ip("link", "delete", self.name)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it."""
        self.close()


class Tap(Device):
    """A persistent tap device."""

    words = ("tuntap", "add", "NAME", "mode", "tap")

    def open(self) -> int:
        """Open it as a back-end does; returns the descriptor. LocalError when it cannot be."""
        fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            request = struct.pack("16sH22x", self.name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
            fcntl.ioctl(fd, TUNSETIFF, request)
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER_BYTES))
        except OSError as error:
            os.close(fd)
            raise LocalError(f"cannot open tap {self.name}: {error.strerror}") from error
        return fd


class Pair(Device):
    """A device whose frames come out of another one, where nobody wants them."""

    words = ("link", "add", "NAME", "type", "veth", "peer", "name", "NAMEp")
    counter = "tx_packets"

    def __init__(self, name: str) -> None:
        """Create both. LocalError, in one line, when that is not allowed."""
        super().__init__(name)
        self._header_bytes = HEADER_BYTES
        try:
            self._set_up(f"{name}p")
        except BaseException:
            self.close()
            raise

    def open(self) -> int:
        """Open a packet socket on it as a back-end does; returns the descriptor. LocalError when it cannot be."""
        try:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
                sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
                self._header_bytes = self._long_header(sock)
                sock.bind((self.name, 0))
                return sock.detach()
        except OSError as error:
            raise LocalError(f"cannot open a packet socket on {self.name}: {error.strerror}") from error

    @staticmethod
    def _long_header(sock: socket.socket) -> int:
        try:
            sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR_SZ, HEADER_BYTES)
        except OSError:  # before Linux 6.6 there is but one length
            return PACKET_HEADER_BYTES
        return HEADER_BYTES

    def header(self) -> bytes:
        """Return the empty header that goes before each frame, as long as the socket wants it."""
        return bytes(self._header_bytes)


def _ip(*words: str) -> None:
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise LocalError(f"cannot run ip (package iproute2): {error.strerror}") from error
    if done.returncode:
        raise LocalError(f"ip {' '.join(words)}: {done.stderr.strip() or done.returncode}")


class Rate:
    """Frames a second that a device has taken since the last call."""

    def __init__(self, device: Counted) -> None:
        """Start now."""
        self._device = device
        self._taken, self._at = device.taken, time.monotonic_ns()

    def __call__(self) -> float:
        """Return the rate since the last call."""
        taken, at = self._device.taken, time.monotonic_ns()
        rate = (taken - self._taken) * 1e9 / (at - self._at)
        self._taken, self._at = taken, at
        return rate


def frame(size: int) -> bytes:
    """Return a frame of `size` bytes that no protocol in the kernel takes."""
    return b"\x02\0\0\0\0\x02" + b"\x02\0\0\0\0\x01" + b"\x88\xb5" + bytes(size - 14)


def bare_write(device: Device, packet: bytes | int, seconds: float) -> float:
    """Write to the device as fast as one thread can, `packet` or a frame of so many bytes; returns frames a second."""
    fd = device.open()
    try:
        data = device.header() + frame(packet) if isinstance(packet, int) else packet
        write_loop(fd, data, seconds / 10)
        taken = device.taken
        _, _, nanoseconds = write_loop(fd, data, seconds)
        return (device.taken - taken) * 1e9 / nanoseconds
    finally:
        os.close(fd)
