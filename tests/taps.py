"""Taps for tests: names, and frames that the kernel's side of a tap hands to whoever serves it.

Rules: taps need root and /dev/net/tun; a test that uses one is marked `needs_tap`. A tap that a device made goes away
with that device's back-end, so nothing here cleans up.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Final

import pytest

IP: Final = shutil.which("ip")

needs_tap: Final = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists() or IP is None,
    reason="a tap needs root, /dev/net/tun and the program ip",
)


def tap_name(number: int = 0) -> str:
    """Return the name of a tap that no other test run on this machine uses."""
    return f"vt{os.getpid()}n{number}"


def ip(*arguments: str) -> None:
    """Run the program ip."""
    assert IP is not None
    subprocess.run([IP, *arguments], check=True, capture_output=True)


def inject(name: str, frame: bytes, count: int = 1) -> None:
    """Send a frame out of a tap, some times: whoever serves the tap reads it."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((name, 0))
        for _ in range(count):
            sock.send(frame)
