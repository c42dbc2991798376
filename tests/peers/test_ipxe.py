"""iPXE, the boot firmware in QEMU's card, gets an address and its file through a vhostmp back-end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.peers import bootserver
from tests.peers.guest import PROGRAM
from tests.peers.network import BRIDGE, GUEST_ADDRESS, HOST_ADDRESS, TAP, Network
from tests.peers.processes import Child
from tests.peers.server import Server
from vhostmp import qemu

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(120)]

MAC = "52:54:00:77:00:01"
ROM = Path("/usr/lib/ipxe/qemu/efi-virtio.rom")
BOOT_SECONDS = 60.0
LEGACY = "disable-modern=on"
MODERN = "disable-legacy=on"


@pytest.mark.parametrize(
    ("interface", "version_1"), [(MODERN, True), (LEGACY, False)], ids=["virtio 1", "before virtio 1"]
)
def test_ipxe_boots_from_the_network(network: Network, tmp_path: Path, interface: str, version_1: bool) -> None:
    """Its driver, which shares no code with Linux's or DPDK's, sends and receives with headers of 12 and 10 bytes."""
    if not ROM.exists():
        pytest.skip(f"no {ROM} (make peers)")
    script = tmp_path / "boot.ipxe"
    script.write_text("#!ipxe\nexit\n")
    words = [sys.executable, bootserver.__file__, BRIDGE, HOST_ADDRESS, GUEST_ADDRESS, str(script)]
    with (
        Child(network.inside(*words), tmp_path / "boot.log") as boot,
        Server(f"tap:{TAP}", tmp_path, inside=network.inside) as server,
    ):
        boot.expect("^ready$")
        card = qemu.Card(path=str(server.socket), memory="256M", msix=False)
        options = qemu.options(card, qemu.probe_version(PROGRAM))
        options[-1] += f",mac={MAC},{interface},bootindex=1"
        machine = ["-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
        with Child([PROGRAM, *machine, *options], tmp_path / "qemu.log", grace=2.0):
            boot.expect(f"^leased {MAC} {GUEST_ADDRESS}$", BOOT_SECONDS)
            acked = server.show()["acked_features"]
            print(acked)
            assert ("VERSION_1" in acked) is version_1
            boot.expect(f"^asked {GUEST_ADDRESS} {script.name}$")
            boot.expect(f"^taken {GUEST_ADDRESS}$")
            assert not any(ring["broken"] or ring["drops"] for ring in server.show()["queues"])
