"""The tap case: a tap device of our own, and the yardstick, a bare loop of write() on it.

Both sides are counted by the device (rx_packets of /sys/class/net/NAME/statistics: what the kernel took from whoever
writes to the tap). The bare loop opens the device as our back-end does, with IFF_VNET_HDR and a 12-byte header before
each frame, and writes one constant frame: what remains of the difference is the virtqueue.
Source: Linux Documentation/networking/tuntap.rst.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from vhostmp.errors import LocalError
from vhostmp.tools._probe import write_loop
from vhostmp.tools.bench import placement

TUN: Final = "/dev/net/tun"
TUNSETIFF: Final = 0x400454CA
TUNSETVNETHDRSZ: Final = 0x400454D8
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
HEADER_BYTES: Final = 12
NAME_BYTES: Final = 16


class Tap:
    """A persistent tap device that is up, without addresses, removed at the end. Needs CAP_NET_ADMIN."""

    def __init__(self, name: str) -> None:
        """Create it. LocalError, in one line, when that is not allowed."""
        self.name: Final = name
        _ip("tuntap", "add", name, "mode", "tap")
        try:
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1\n")
            _ip("link", "set", name, "up")
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise LocalError(f"cannot set up tap {name}: {error.strerror}") from error
            raise

    @property
    def taken(self) -> int:
        """Frames that the kernel has taken from the tap's user."""
        return int(Path(f"/sys/class/net/{self.name}/statistics/rx_packets").read_text())

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


def _ip(*words: str) -> None:
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise LocalError(f"cannot run ip (package iproute2): {error.strerror}") from error
    if done.returncode:
        raise LocalError(f"ip {' '.join(words)}: {done.stderr.strip() or done.returncode}")


class Rate:
    """Frames a second that a tap has taken since the last call."""

    def __init__(self, device: Tap) -> None:
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
    """Return an empty virtio header and a frame of `size` bytes that no protocol in the kernel takes."""
    return bytes(HEADER_BYTES) + b"\x02\0\0\0\0\x02" + b"\x02\0\0\0\0\x01" + b"\x88\xb5" + bytes(size - 14)


def bare_write(device: Tap, size: int, core: int, seconds: float, *, fifo: bool) -> float:
    """Write frames of `size` bytes to the tap from `core` as fast as one thread can; returns frames a second."""
    before = os.sched_getaffinity(0)
    fd = device.open()
    try:
        os.sched_setaffinity(0, {core})
        if fifo:
            placement.set_fifo(0, placement.POLLER)
        write_loop(fd, frame(size), seconds / 10)
        taken = device.taken
        _, _, nanoseconds = write_loop(fd, frame(size), seconds)
        return (device.taken - taken) * 1e9 / nanoseconds
    finally:
        placement.set_fifo(0, 0)
        os.sched_setaffinity(0, before)
        os.close(fd)
