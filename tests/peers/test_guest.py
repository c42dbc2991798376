"""A Linux guest that nobody changed, on a vhostmp back-end that is swapped under it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.peers.guest import CARD, MEMORY, PROGRAM, Guest
from tests.peers.image import Image
from tests.peers.network import GUEST_ADDRESS, HOST_ADDRESS, TAP, VETH, Network
from tests.peers.server import Server
from tests.peers.stream import Ends, Stream
from vhostmp import qemu

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(300)]

TAP_BACKEND = f"tap:{TAP}"
PACKET_BACKEND = f"packet:{VETH}"
SWAPS = 8
QUEUE_PAIRS = 2
"""As many as the guest has processors: its driver uses no more."""
ETHERNET_FRAME_BYTES = 1514
"""The largest frame of the bridge's MTU; what is larger was segmented, or merged, by somebody else than its sender."""

Start = Callable[..., tuple[Server, Guest]]


@pytest.fixture
def start(guest_image: Image, network: Network, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a back-end and a guest on it, both ended after the test."""
    with ExitStack() as stack:

        def begin(queue_pairs: int = 1) -> tuple[Server, Guest]:
            options = ["--queue-pairs", str(queue_pairs), "--workers", str(queue_pairs)]
            server = stack.enter_context(Server(TAP_BACKEND, tmp_path, inside=network.inside, options=options))
            card = qemu.Card(path=str(server.socket), queue_pairs=queue_pairs, memory=MEMORY, msix=False)
            guest = stack.enter_context(Guest(guest_image, qemu.options(card, qemu.probe_version(PROGRAM)), tmp_path))
            guest.bring_up()
            return server, guest

        yield begin


def check_ping(network: Network, guest: Guest) -> None:
    """Each side answers the other one's pings, all of them."""
    guest.run(f"ping -c 5 -i 0.05 -W 5 {HOST_ADDRESS}")
    network.run("ping", "-c", "5", "-i", "0.05", "-W", "5", GUEST_ADDRESS)


def frame_bytes(server: Server, ring: int) -> float:
    """Return the average size of the packets that have passed a ring."""
    now = server.ring(ring)
    return float(now["bytes"] / max(1, now["packets"]))


@contextmanager
def both_ways(ends: Ends) -> Generator[list[Stream]]:
    """Yield two connections, one made by the guest and one made to it."""
    with (
        Stream(ends, 5001) as outward,
        Stream(ends, 5002, to_guest=True) as inward,
    ):
        yield [outward, inward]


def test_ping_through_tap(start: Start, network: Network) -> None:
    """The guest and the host reach each other through the tap."""
    _, guest = start()
    check_ping(network, guest)


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


def test_offloads_are_negotiated_through_to_the_tap(start: Start, guest_image: Image, network: Network) -> None:
    """The guest's driver has checksums and segmentation switched on, and large segments do pass, both ways."""
    server, guest = start()
    offloads = guest.offloads()
    for name in ("rx-checksumming", "tx-checksumming", "scatter-gather", "tcp-segmentation-offload"):
        assert offloads[name].split()[0] == "on", f"{name}: {offloads[name]}"
    assert {"CSUM", "HOST_TSO4", "GUEST_TSO4"} <= set(server.show()["acked_features"])
    with Stream(Ends(guest_image, network, guest), 5001) as stream:
        stream.grow(4 << 20)
        stream.finish()
    receive, transmit = frame_bytes(server, 0), frame_bytes(server, 1)
    print(f"average packet: {receive:.0f} bytes to the guest, {transmit:.0f} bytes from it")
    assert max(receive, transmit) > ETHERNET_FRAME_BYTES
    # Half of the packets each way may be bare acknowledgements, so an average says little; the largest are what counts.
    assert receive > ETHERNET_FRAME_BYTES / 2
    assert transmit > ETHERNET_FRAME_BYTES / 2


@pytest.mark.parametrize("network", [True], indirect=True, ids=["multi-queue tap"])
def test_two_queue_pairs(start: Start, guest_image: Image, network: Network) -> None:
    """A guest with two queue pairs uses all four rings, and its connections live through swaps."""
    server, guest = start(queue_pairs=QUEUE_PAIRS)
    assert guest.run(f"ls /sys/class/net/{CARD}/queues").split() == ["rx-0", "rx-1", "tx-0", "tx-1"]
    assert "MQ" in server.show()["acked_features"]
    check_ping(network, guest)
    ends = Ends(guest_image, network, guest)
    with ExitStack() as stack:
        # A driver sends on the queue of the processor that the sender runs on.
        streams = [
            stack.enter_context(Stream(ends, 5001 + cpu, to_guest=bool(cpu), cpu=cpu)) for cpu in range(QUEUE_PAIRS)
        ]
        for backend in (PACKET_BACKEND, TAP_BACKEND, PACKET_BACKEND, TAP_BACKEND):
            for stream in streams:
                stream.grow()
            server.swap(backend)
        for stream in streams:
            stream.grow()
        for stream in streams:
            stream.finish()
    queues = server.show()["queues"]
    print([(ring["index"], ring["packets"], ring["worker_pid"]) for ring in queues])
    assert [ring["index"] for ring in queues if ring["packets"] > 0] == [0, 1, 2, 3]
    assert len({ring["worker_pid"] for ring in queues}) == QUEUE_PAIRS, "each pair has a worker of its own"
