"""A Linux guest that nobody changed, on a vhostmp back-end that is swapped under it."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.helpers import process_table, wait_until
from tests.peers import sizes
from tests.peers.booted import PACKET_BACKEND, TAP_BACKEND, Start, both_ways, check_ping
from tests.peers.guest import CARD
from tests.peers.image import Image
from tests.peers.network import GUEST_ADDRESS, HOST_ADDRESS, TAP, Network
from tests.peers.processes import Child
from tests.peers.server import Server
from tests.peers.stream import Ends, Stream

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(300)]

SWAPS = 8
DEATHS = 10
WORKER_DEATHS = 10
"""In each life of the control process."""
PLUGGED_BYTES = 128 << 20
"""Linux takes memory in blocks of this size."""
QUEUE_PAIRS = 4
"""As many as that guest has processors: its driver uses no more."""
LARGE_SEGMENT_BYTES = 16 * 1514
"""The MTU of the bridge lets frames of 1,514 bytes pass; what is larger was not segmented by its sender."""
GUEST_OFFLOADS = (
    *("rx-checksumming", "tx-checksumming", "tx-checksum-ip-generic", "scatter-gather", "tcp-segmentation-offload"),
    *("tx-tcp-segmentation", "tx-tcp-ecn-segmentation", "tx-tcp6-segmentation"),
)
OFFLOAD_FEATURES = {
    *("CSUM", "HOST_TSO4", "HOST_TSO6", "HOST_ECN"),
    *("GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN"),
}


def test_ping_through_tap(start: Start, network: Network) -> None:
    """The guest and the host reach each other through the tap, whatever the guest tries.

    QEMU 7.2.22 tells vhost-user nothing when a guest resets a queue to size it: so it is not offered to the guest.
    """
    _, guest = start()
    check_ping(network, guest)
    status, _ = guest.attempt(f"ethtool -G {CARD} rx 64 tx 128")
    assert status != 0
    check_ping(network, guest)


def test_device_from_before_virtio_1(start: Start, guest_image: Image, network: Network) -> None:
    """Without VERSION_1 rings lie where drivers of old lay them; everything passes as ever."""
    server, guest = start(device=",disable-modern=on")
    assert "VERSION_1" not in server.show()["acked_features"]
    with both_ways(Ends(guest_image, network, guest)) as streams:
        for stream in streams:
            stream.grow()
        for stream in streams:
            stream.finish()


def test_back_end_killed_and_started_again(start: Start, guest_image: Image, network: Network, tmp_path: Path) -> None:
    """QEMU connects to a new back-end in place of one that died, and the guest's connections do not notice."""
    first, guest = start()
    with both_ways(Ends(guest_image, network, guest)) as streams:
        for stream in streams:
            stream.grow()
        first.kill()
        anew = ("--adopt-timeout", "0")
        with Server(TAP_BACKEND, tmp_path, inside=network.inside, options=anew, name="second") as second:
            for stream in streams:
                stream.grow()
            for stream in streams:
                result = stream.finish()
                print(f"{result.sent.count} bytes to the guest, {result.received.count} from it")
            assert not any(ring["broken"] for ring in second.show()["queues"])
            guest.qemu.end()  # before what it is connected to


def kill_worker(pid: int, times: int) -> None:
    """Kill a worker, and each that takes its place, at random moments; wait until the last one has been replaced."""
    spawner, name = process_table()[pid], Path(f"/proc/{pid}/comm").read_text()
    rng = random.Random(pid)
    killed: set[int] = set()

    def successor() -> int | None:
        for one, parent in process_table().items():
            with suppress(OSError):  # it ends while we look
                if parent == spawner and one not in killed and Path(f"/proc/{one}/comm").read_text() == name:
                    return one
        return None

    for _ in range(times):
        time.sleep(rng.random() * 0.2)  # at any moment
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
        pid = wait_until(successor, what="a replacement") or 0


@pytest.mark.parametrize("worker_deaths", [0, WORKER_DEATHS], ids=["control", "control-and-workers"])
def test_tcp_survives_deaths_of_the_control_process(
    start: Start, guest_image: Image, network: Network, tmp_path: Path, worker_deaths: int
) -> None:
    """The control process is killed ten times and started again: TCP goes on, and QEMU's connection stays.

    So it does when workers are killed ten times in each of its lives.
    """
    server, guest = start()
    connected = len(re.findall("front-end connected", server.log))
    with both_ways(Ends(guest_image, network, guest)) as streams, ExitStack() as lives:
        for life in range(DEATHS):
            for stream in streams:
                stream.grow()
            kill_worker(server.show()["queues"][0]["worker_pid"], worker_deaths)
            for stream in streams:  # the replacement has to have heard what it serves: nobody would tell it
                stream.grow()
            server.kill()
            for stream in streams:
                stream.grow()
            server = lives.enter_context(Server(TAP_BACKEND, tmp_path, inside=network.inside, name=f"life{life}"))
            assert server.show()["connected"]
            connected += len(re.findall("front-end connected", server.log))
        server.swap(PACKET_BACKEND)
        for stream in streams:
            stream.grow()
        for stream in streams:
            result = stream.finish()
            print(f"{result.sent.count} bytes to the guest, {result.received.count} from it")
        assert connected == 1
        assert not any(ring["broken"] for ring in server.show()["queues"])
        guest.qemu.end()  # before what it is connected to


def test_tcp_survives_swaps_between_tap_and_packet(start: Start, guest_image: Image, network: Network) -> None:
    """Connections made from both sides live through every swap, and every byte arrives as it was sent."""
    server, guest = start()
    check_ping(network, guest)
    generation = server.show()["generation"]
    with both_ways(Ends(guest_image, network, guest)) as streams:
        for number in range(SWAPS):
            for stream in streams:
                stream.grow()
            backend = TAP_BACKEND if number % 2 else PACKET_BACKEND
            report = server.swap(backend)
            print(f"swap {number}: {report}")
            assert report["backend"] == backend
            assert report["generation"] > generation
            generation = report["generation"]
            assert server.show()["backend"] == backend
        for stream in streams:
            stream.grow()
        for stream in streams:
            result = stream.finish()
            print(f"{result.sent.count} bytes to the guest, {result.received.count} from it")
            print(f"{result.retransmits} segments sent again by the host")
    check_ping(network, guest)
    server.swap(PACKET_BACKEND)
    check_ping(network, guest)


def test_swap_without_load_lets_the_next_packet_through(start: Start, network: Network) -> None:
    """After a swap the first ping already gets through, in both directions: no kick is lost and the bridge knows."""
    server, guest = start()
    check_ping(network, guest)
    for backend in (PACKET_BACKEND, TAP_BACKEND, PACKET_BACKEND, TAP_BACKEND):
        server.swap(backend)
        network.run("ping", "-c", "1", "-W", "5", GUEST_ADDRESS)
        guest.run(f"ping -c 1 -W 5 {HOST_ADDRESS}")


def test_offloads_are_negotiated_through_to_the_tap(
    start: Start, guest_image: Image, network: Network, tmp_path: Path
) -> None:
    """The guest's driver has every offload on that it knows, and segments of many packets' size pass, both ways."""
    server, guest = start()
    offloads = guest.offloads()
    assert {name: offloads[name].split()[0] for name in GUEST_OFFLOADS} == dict.fromkeys(GUEST_OFFLOADS, "on")
    assert set(server.show()["acked_features"]) >= OFFLOAD_FEATURES
    with (
        Child(network.inside(sys.executable, sizes.__file__, TAP), tmp_path / "sizes.log") as watch,
        Stream(Ends(guest_image, network, guest), 5001) as stream,
    ):
        watch.expect("^ready$")
        stream.grow(4 << 20)
        stream.finish()
        largest = {way: int(size) for way, size in re.findall(r"^(in|out) (\d+)$", watch.output, re.MULTILINE)}
    print(f"largest frames on the tap: {largest}")
    assert largest["in"] > LARGE_SEGMENT_BYTES, "from the guest"
    assert largest["out"] > LARGE_SEGMENT_BYTES, "to the guest"
    drops = [ring["drops"] for ring in server.show()["queues"]]
    assert not any(drops), drops


@pytest.mark.parametrize("network", [True], indirect=True, ids=["multi-queue tap"])
def test_four_queue_pairs(start: Start, guest_image: Image, network: Network) -> None:
    """A guest with four queue pairs uses all eight rings, and its connections live through swaps."""
    server, guest = start(queue_pairs=QUEUE_PAIRS)
    names = [f"{way}-{number}" for way in ("rx", "tx") for number in range(QUEUE_PAIRS)]
    assert guest.run(f"ls /sys/class/net/{CARD}/queues").split() == names
    assert "MQ" in server.show()["acked_features"]
    check_ping(network, guest)
    ends = Ends(guest_image, network, guest)
    with ExitStack() as stack:
        # A driver sends on the queue of the processor that the sender runs on.
        streams = [
            stack.enter_context(Stream(ends, 5001 + cpu, to_guest=bool(cpu % 2), cpu=cpu)) for cpu in range(QUEUE_PAIRS)
        ]
        for backend in (PACKET_BACKEND, TAP_BACKEND):
            for stream in streams:
                stream.grow()
            server.swap(backend)
        for stream in streams:
            stream.grow()
        for stream in streams:
            stream.finish()
    queues = server.show()["queues"]
    print([(ring["index"], ring["packets"], ring["worker_pid"]) for ring in queues])
    assert [ring["index"] for ring in queues if ring["packets"] > 0] == list(range(2 * QUEUE_PAIRS))
    assert len({ring["worker_pid"] for ring in queues}) == QUEUE_PAIRS, "each pair has a worker of its own"


def test_memory_comes_and_goes_under_load(start: Start, guest_image: Image, network: Network) -> None:
    """Memory is plugged in and pulled out while connections run, region by region; not a byte is lost."""
    server, guest = start(more=["-m", "slots=4,maxmem=2G"])
    assert "CONFIGURE_MEM_SLOTS" in server.show()["protocol_features"]
    before = regions(server)
    with guest.monitor() as monitor, both_ways(Ends(guest_image, network, guest)) as streams:
        for number in range(2):
            for stream in streams:
                stream.grow()
            memory = {"qom_type": "memory-backend-memfd", "id": f"more{number}", "size": PLUGGED_BYTES, "share": True}
            monitor.execute("object-add", **memory)
            monitor.execute("device_add", driver="pc-dimm", id=f"dimm{number}", memdev=f"more{number}")
            server.wait_for(lambda: len(regions(server) - before) > 0, "the memory is in the back-end's table")
            new = regions(server) - before
            print(f"plugged in: {new}")
            assert [size for _, size in new] == [PLUGGED_BYTES]
            for stream in streams:
                stream.grow()
            # The guest gives back what it has not put to use.
            monitor.execute("device_del", id=f"dimm{number}")
            server.wait_for(lambda: regions(server) == before, "the memory is gone from the back-end's table")
            monitor.execute("object-del", id=f"more{number}")
        for stream in streams:
            stream.grow()
        for stream in streams:
            result = stream.finish()
            print(f"{result.sent.count} bytes to the guest, {result.received.count} from it")
    assert not any(ring["broken"] for ring in server.show()["queues"])


def regions(server: Server) -> set[tuple[int, int]]:
    """Return the regions of guest memory that the back-end knows: guest address and size, in bytes."""
    return {(region["gpa"], region["size"]) for region in server.show()["regions"]}
