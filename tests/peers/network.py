r"""A network of the test's own, out of reach of the machine's.

::

    +-- network namespace ------------------------------------------+
    |              br0 HOST_ADDRESS                                 |
    |             /                \                                |
    |   TAP (a tap device)       veth-bridge === VETH               |
    +----|----------------------------------------|-----------------+
      back-end tap:TAP                        back-end packet:VETH

The guest reaches the same bridge, and so the same address, through either back-end.

Rules: the namespace has no name; it lives as long as a process that holds it, which ends when its standard input does.
So whatever becomes of the test, the kernel removes the namespace with all that is in it.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from tests.peers.processes import Child, run

HOST_ADDRESS = "10.77.0.1"
GUEST_ADDRESS = "10.77.0.2"
PREFIX_LENGTH = 24
TAP = "vmptap0"
VETH = "vmpveth0"
BRIDGE = "vmpbr0"
_BRIDGE_END = "vmpveth1"


class Network(AbstractContextManager["Network"]):
    """The namespace with bridge, tap and veth pair of the picture above; needs root."""

    def __init__(self, folder: Path, *, multi_queue: bool = False) -> None:
        """Make it all; `multi_queue` is for the tap, which must be opened as it was made."""
        self._holder = Child(["unshare", "--net", "sh", "-c", "echo ready; exec cat"], folder / "namespace.log")
        try:
            self._holder.expect("^ready$")
            self.inode = os.stat(f"/proc/{self._holder.pid}/ns/net").st_ino
            self._make(multi_queue)
        except BaseException:
            self._holder.end()
            raise

    def _make(self, multi_queue: bool) -> None:
        """Build the picture."""
        mode = ["multi_queue"] if multi_queue else []
        # Every automatic packet of IPv6 would be one that the test did not send.
        self.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "add", BRIDGE, "type", "bridge", "forward_delay", "0", "stp_state", "0")
        self.run("ip", "address", "add", f"{HOST_ADDRESS}/{PREFIX_LENGTH}", "dev", BRIDGE)
        self.run("ip", "tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr", *mode)
        self.run("ip", "link", "add", VETH, "type", "veth", "peer", "name", _BRIDGE_END)
        # The host would answer for its address on this end too, and a back-end behind it could not reach that answer.
        self.run("ip", "link", "set", VETH, "arp", "off")
        for port in (TAP, _BRIDGE_END):
            self.run("ip", "link", "set", port, "master", BRIDGE)
        for name in (BRIDGE, TAP, _BRIDGE_END, VETH):
            self.run("ip", "link", "set", name, "up")

    def add_tap(self, name: str, *, multi_queue: bool = False) -> None:
        """Put another tap at the bridge."""
        mode = ["multi_queue"] if multi_queue else []
        self.run("ip", "tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr", *mode)
        self.run("ip", "link", "set", name, "master", BRIDGE)
        self.run("ip", "link", "set", name, "up")

    def inside(self, *command: str | Path) -> list[str | Path]:
        """Return the command line that runs `command` inside this network."""
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "--", *command]

    def run(self, *command: str | Path, timeout: float = 60.0) -> str:
        """Run `command` inside to its end and return its output; AssertionError when it fails."""
        return run(self.inside(*command), timeout)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let it go; the kernel takes it down when the last process inside has ended."""
        self._holder.end()
