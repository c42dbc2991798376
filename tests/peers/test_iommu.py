"""A Linux guest behind QEMU's IOMMU: the device sees only what the guest's kernel has mapped for it, while it is."""

from __future__ import annotations

import os
import re
import signal
from typing import Any, Final

import pytest

from tests.peers.booted import PACKET_BACKEND, TAP_BACKEND, Start, both_ways, check_ping
from tests.peers.guest import CARD, Guest
from tests.peers.image import Image
from tests.peers.network import Network
from tests.peers.server import Server
from tests.peers.stream import Ends, Stream

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(300)]

# Interrupts are not remapped: the kernel's test of its timer, which it makes then, fails now and then in an emulation.
STRICT: Final = "intremap=off intel_iommu=on iommu.strict=1 iommu.passthrough=0"
"""Each buffer is unmapped, and the device told, before the guest uses it for something else."""
LAZY: Final = "intremap=off intel_iommu=on iommu.strict=0 iommu.passthrough=0"
"""What was unmapped is collected, and the device told of much at once."""
PASSTHROUGH: Final = "intremap=off intel_iommu=on iommu.passthrough=1"
"""Every address stands for itself, and nothing is ever unmapped."""
GROW_BYTES: Final = 64 << 10
"""A guest under emulation whose every packet is mapped, asked for and unmapped is slow."""


def check_whole(server: Server, guest: Guest) -> dict[str, Any]:
    """Nothing was broken, dropped or asked for in vain, which the guest would have taken for faults of the device."""
    shown = server.show()
    assert "ACCESS_PLATFORM" in shown["acked_features"]
    assert not any(ring["broken"] or ring["drops"] for ring in shown["queues"]), shown["queues"]
    assert not re.findall(r".*\bDMAR:.*fault.*", guest.run("dmesg")), guest.run("dmesg | grep DMAR")
    found: dict[str, Any] = shown["iotlb"]
    print(found)
    assert found["unusable"] == 0
    return found


def grow(streams: list[Stream]) -> None:
    """Each connection moves more both ways."""
    for stream in streams:
        stream.grow(GROW_BYTES)


def packets(server: Server) -> int:
    """Return how many packets both rings have moved."""
    return sum(int(ring["packets"]) for ring in server.show()["queues"])


@pytest.mark.parametrize("kernel", [STRICT, LAZY, PASSTHROUGH], ids=["strict", "lazy", "passthrough"])
def test_traffic_both_ways(start: Start, guest_image: Image, network: Network, kernel: str) -> None:
    """Every byte arrives, over a swap, a killed worker and rings that are taken down and set up again."""
    server, guest = start(iommu=kernel)
    translated = kernel != PASSTHROUGH
    domain = guest.run(f"cat /sys/class/net/{CARD}/device/../iommu_group/type").strip()
    assert domain == {STRICT: "DMA", LAZY: "DMA-FQ", PASSTHROUGH: "identity"}[kernel]
    check_ping(network, guest)
    ends = Ends(guest_image, network, guest)
    with both_ways(ends) as streams:
        grow(streams)
        for backend in (PACKET_BACKEND, TAP_BACKEND):
            server.swap(backend)
            grow(streams)
        moved = packets(server)
        os.kill(server.ring(0)["worker_pid"], signal.SIGKILL)
        server.wait_for(lambda: "replaced by pid" in server.log, "the worker's replacement")
        grow(streams)
        assert packets(server) > moved
        for stream in streams:
            result = stream.finish()
            print(f"{result.sent.count} bytes to the guest, {result.received.count} from it")
    found = check_whole(server, guest)
    if translated:
        assert found["misses"] > packets(server) // 4, "buffers come and go"
        assert found["entries"] < found["misses"] // 4, "and are invalidated"
    else:
        assert found["misses"] > 0

    # The guest's driver lets the device go and takes it again.
    (device,) = re.findall(r"virtio\d+", guest.run(f"readlink /sys/class/net/{CARD}/device"))
    driver = "/sys/bus/virtio/drivers/virtio_net"
    guest.run(f"echo {device} >{driver}/unbind")
    server.wait_for(lambda: not any(ring["started"] for ring in server.show()["queues"]), "the rings are stopped")
    guest.run(f"echo {device} >{driver}/bind")
    guest.bring_up()
    check_ping(network, guest)
    with Stream(ends, 5003) as stream:
        grow([stream])
        stream.finish()
    check_whole(server, guest)


@pytest.mark.parametrize("network", [True], indirect=True, ids=["multi-queue tap"])
def test_two_queue_pairs(start: Start, guest_image: Image, network: Network) -> None:
    """Two workers share the device's IOTLB, each with a ring of the guest's processors; one of them dies."""
    server, guest = start(2, iommu=STRICT)
    ends = Ends(guest_image, network, guest)
    with Stream(ends, 5001, cpu=0) as one, Stream(ends, 5002, to_guest=True, cpu=1) as other:
        grow([one, other])
        os.kill(server.ring(2)["worker_pid"], signal.SIGKILL)
        server.wait_for(lambda: "replaced by pid" in server.log, "the worker's replacement")
        grow([one, other])
        for stream in (one, other):
            stream.finish()
    queues = server.show()["queues"]
    assert all(ring["packets"] for ring in queues), queues
    assert check_whole(server, guest)["misses"] > packets(server) // 4
