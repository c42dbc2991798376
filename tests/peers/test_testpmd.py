"""DPDK's virtio-user on vhostmp back-ends: every packet is seen on both sides, also while the back-end is swapped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.peers.counting import SPEC, Counts
from tests.peers.server import Server
from tests.peers.testpmd import HugePages, Testpmd

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(300)]

PACKETS = 200_000
"""Packets that must have passed before a test goes on."""
TXONLY_BYTES = 64
FLOWGEN_BYTES = 60
"""testpmd means 64 bytes with the checksum that a wire would add, and leaves that out here."""


def settled(server: Server, peer: Testpmd, complete: Callable[[int], bool] = lambda received: True) -> tuple[int, int]:
    """Stop sending, wait until all has arrived on both sides, and return testpmd's counters of RX and TX.

    Every packet that testpmd counts as sent is in a ring, so the back-end must come to exactly that number; and testpmd
    must receive exactly what the back-end counts as delivered. `complete` is told that number and must agree. Testpmd
    goes on receiving meanwhile: a back-end may wait for room in the RX ring before it takes more.
    """
    peer.command("stop")
    _, sent = peer.stats()
    peer.command("set fwd rxonly")
    peer.command("start")

    def all_there() -> bool:
        received, _ = peer.stats()
        return (transmitted(server), delivered(server)) == (sent, received) and complete(received)

    server.wait_for(all_there, f"the back-end takes {sent} packets, and testpmd all that it delivers")
    peer.command("stop")
    return peer.stats()


def transmitted(server: Server) -> int:
    """Return the packets that the back-end has taken from the TX rings."""
    return sum(ring["packets"] for ring in server.show()["queues"] if ring["index"] % 2)


def delivered(server: Server) -> int:
    """Return the packets that the back-end has put into the RX rings."""
    return sum(ring["packets"] for ring in server.show()["queues"] if not ring["index"] % 2)


def test_harness_counts_packets_between_two_testpmds(pages: HugePages, tmp_path: Path) -> None:
    """The tools of these tests find the same number of packets on both sides of DPDK's own vhost."""
    with (
        Testpmd.vhost(tmp_path / "net.sock", pages, tmp_path / "vhost") as back,
        Testpmd.virtio_user(tmp_path / "net.sock", pages, tmp_path / "user") as front,
    ):
        front.command("start")
        front.wait_for_stats(sent=PACKETS)
        front.command("stop")
        _, sent = front.stats()
        back.child.wait_for(lambda: back.stats()[0] == sent, f"the back-end receives the {sent} packets")


def test_null_takes_every_packet(pages: HugePages, tmp_path: Path) -> None:
    """The null back-end counts each packet that testpmd sent, and its bytes, and delivers none."""
    with (
        Server("null", tmp_path) as server,
        Testpmd.virtio_user(server.socket, pages, tmp_path / "user") as peer,
    ):
        server.await_rings(2)
        peer.command("start")
        peer.wait_for_stats(sent=PACKETS)
        received, sent = settled(server, peer)
        assert received == 0
        assert server.ring(1)["packets"] == sent
        assert server.ring(1)["bytes"] == sent * TXONLY_BYTES
        assert server.ring(0)["packets"] == 0


def test_loopback_gives_packets_back(pages: HugePages, tmp_path: Path) -> None:
    """Each packet that testpmd sent is received by it again: loopback waits for room, it does not drop."""
    with (
        Server("loopback", tmp_path) as server,
        Testpmd.virtio_user(server.socket, pages, tmp_path / "user", mode="flowgen") as peer,
    ):
        server.await_rings(2)
        peer.command("start")
        peer.wait_for_stats(received=PACKETS, sent=PACKETS)
        received, sent = settled(server, peer)
        assert received == sent
        assert not any(count for ring in server.show()["queues"] for count in ring["drops"].values())


def test_python_backend_counts_and_gives_back(pages: HugePages, tmp_path: Path) -> None:
    """A back-end written in Python sees each packet that testpmd sent, whole, and what it gives back arrives."""
    counts = Counts(tmp_path / "counts")
    with (
        Server(SPEC, tmp_path, env=counts.environment) as server,
        Testpmd.virtio_user(server.socket, pages, tmp_path / "user", mode="flowgen") as peer,
    ):
        server.await_rings(2)
        peer.command("start")
        peer.wait_for_stats(received=PACKETS // 10, sent=PACKETS // 10)
        # What it gave back and the guest had no room for waits, and is delivered when testpmd has made room.
        received, sent = settled(server, peer, lambda received: received == counts.read()[2])
        transmitted_packets, transmitted_bytes, returned = counts.read()
        print(f"sent {sent}, received {received}, back-end gave back {returned}")
        assert transmitted_packets == sent
        assert transmitted_bytes == sent * FLOWGEN_BYTES
        assert received > 0


@pytest.mark.parametrize("queues", [1, 2])
def test_swap_under_load_loses_no_packet(pages: HugePages, tmp_path: Path, queues: int) -> None:
    """While back-ends of all kinds take turns under full load, the counters of both sides stay in step."""
    counts = Counts(tmp_path / "counts")
    options = ["--queue-pairs", str(queues), "--workers", str(queues)]
    with (
        Server("null", tmp_path, env=counts.environment, options=options) as server,
        Testpmd.virtio_user(server.socket, pages, tmp_path / "user", queues=queues, mode="flowgen") as peer,
    ):
        server.await_rings(2 * queues)
        peer.command("start")
        for backend in ["loopback", SPEC, "null", "loopback", "null", SPEC, "loopback"]:
            peer.wait_for_stats(sent=PACKETS // 10)
            report = server.swap(backend)
            print(report)
            assert report["backend"] == backend
        peer.wait_for_stats(received=PACKETS // 10, sent=PACKETS // 10)
        received, sent = settled(server, peer)
        print(f"sent {sent}, received {received}")
        assert sent == transmitted(server)
        assert received == delivered(server)
        assert received > 0


def kill_worker(server: Server, ring: int) -> None:
    """Kill the worker of a ring, and wait until another one has it."""
    pid = server.ring(ring)["worker_pid"]
    os.kill(pid, signal.SIGKILL)
    server.wait_for(lambda: server.ring(ring)["worker_pid"] not in (pid, None), f"ring {ring} has a new worker")


@pytest.mark.parametrize("queues", [1, 2])
def test_killed_workers_under_load(pages: HugePages, tmp_path: Path, queues: int) -> None:
    """While workers are killed and back-ends swapped under full load, the counters of both sides stay in step.

    A frame that a worker was sending when it died may go out twice, but its chain is given back, and counted, once.
    """
    options = ["--queue-pairs", str(queues), "--workers", str(queues)]
    with (
        Server("loopback", tmp_path, options=options) as server,
        Testpmd.virtio_user(server.socket, pages, tmp_path / "user", queues=queues, mode="flowgen") as peer,
    ):
        server.await_rings(2 * queues)
        peer.command("start")
        for number, backend in enumerate(["null", "loopback"] * 3):
            peer.wait_for_stats(sent=PACKETS // 10)
            kill_worker(server, 2 * (number % queues))
            peer.wait_for_stats(sent=PACKETS // 10)
            server.swap(backend)
        peer.wait_for_stats(received=PACKETS // 10, sent=PACKETS // 10)
        received, sent = settled(server, peer)
        print(f"sent {sent}, received {received}")
        assert received > 0
        assert not any(ring["broken"] for ring in server.show()["queues"])
