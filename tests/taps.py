"""Taps for tests: names, and frames that the kernel's side of a tap hands to whoever serves it.

Rules: taps need root and /dev/net/tun; a test that uses one is marked `needs_tap`. A tap that a device made goes away
with that device's back-end. But the device also sets it up, and then the kernel sends frames of its own there, soon or
late: where a test counts what comes, or has few buffers, it makes the tap itself (`quiet_tap`).
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.helpers import wait_until

IP: Final = shutil.which("ip")
TC: Final = shutil.which("tc")

needs_tap: Final = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists() or IP is None,
    reason="a tap needs root, /dev/net/tun and the program ip",
)


def ones_sum(data: bytes) -> int:
    """Return the one's complement sum of 16-bit words, as IP, TCP and UDP have it. Source: RFC 1071."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def tap_name(number: int = 0) -> str:
    """Return the name of a tap that no other test run on this machine uses."""
    return f"vt{os.getpid()}n{number}"


def ip(*arguments: str) -> None:
    """Run the program ip."""
    assert IP is not None
    subprocess.run([IP, *arguments], check=True, capture_output=True)


def wait_for_link(name: str) -> None:
    """Wait until what is sent out of an interface goes out, if it is connected to anything.

    That is some time after somebody has attached to the tap, or set the other end of the pair up. Until then the kernel
    drops what is sent, and says nothing.
    """
    folder = Path(f"/sys/class/net/{name}")
    if (folder / "carrier").read_text() == "1\n" and (folder / "operstate").read_text() == "down\n":
        wait_until(lambda: (folder / "operstate").read_text() != "down\n", what=f"the link of {name}")
        ip("link", "show", name)  # answered only once the kernel is done with it


def without_ipv6(name: str) -> None:
    """Keep an interface from having IPv6: what that sends by itself nobody asked for."""
    Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")


@contextmanager
def quiet_tap(number: int = 0, queues: int = 1) -> Generator[str]:
    """Make a tap, for a device that comes later, out of which nothing is sent but what the test sends."""
    name = tap_name(number)
    ip("tuntap", "add", "dev", name, "mode", "tap", *(["multi_queue"] if queues > 1 else []))
    try:
        without_ipv6(name)
        yield name
    finally:
        ip("link", "del", name)


def interface_up(name: str, mtu: int | None = None) -> None:
    """Set an interface up, without IPv6."""
    without_ipv6(name)
    ip("link", "set", name, "up", *(["mtu", str(mtu)] if mtu else []))
    wait_for_link(name)


@contextmanager
def veth(number: int = 0) -> Generator[tuple[str, str]]:
    """Make a pair of interfaces where what goes in at one comes out at the other; both are up."""
    here, there = f"vv{os.getpid()}a{number}", f"vv{os.getpid()}b{number}"
    ip("link", "add", here, "type", "veth", "peer", "name", there)
    try:
        interface_up(here)
        interface_up(there)
        wait_for_link(here)
        yield here, there
    finally:
        ip("link", "del", here)


@contextmanager
def narrow(name: str, rate: str = "20mbit") -> Generator[str]:
    """Put an interface on a bridge out of which frames go slowly, and wait in between; where they come out."""
    bridge = f"{name}b"
    with veth(2) as (way_out, end):
        ip("link", "add", bridge, "type", "bridge", "mcast_snooping", "0")
        try:
            for one in (name, way_out):
                ip("link", "set", one, "master", bridge)
            interface_up(bridge)
            interface_up(name)
            subprocess.run(
                [str(TC), "qdisc", "add", "dev", way_out, "root", "tbf", "rate", rate, "burst", "5kb", "limit", "4mb"],
                check=True,
                capture_output=True,
            )
            yield end
        finally:
            ip("link", "delete", bridge)


def inject(name: str, frame: bytes, count: int = 1) -> None:
    """Send a frame out of a tap, some times: whoever serves the tap reads it."""
    wait_for_link(name)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((name, 0))
        for _ in range(count):
            sock.send(frame)
