"""A live migration from one QEMU to another, each on a vhostmp server of its own, under traffic."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.peers.image import Image
from tests.peers.moving import QUEUE_PAIRS, Moving
from tests.peers.network import Network
from tests.peers.server import Server

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(400)]

ROUNDS = int(os.environ.get("ROUNDS", "1"))


def received(server: Server) -> int:
    """Return how many packets a server has brought to its guest."""
    return sum(int(ring["packets"]) for ring in server.show()["queues"] if ring["index"] % 2 == 0)


@pytest.mark.parametrize(
    ("network", "queue_pairs"), [(False, 1), (True, QUEUE_PAIRS)], indirect=["network"], ids=["one pair", "two pairs"]
)
def test_there_and_back_under_traffic(guest_image: Image, network: Network, tmp_path: Path, queue_pairs: int) -> None:
    """Twice in a row, from A to B and back to A: TCP connections that both sides made live on, every byte arrives.

    What the device wrote to guest memory during the copy is in the log or the guest would come to grief on the other
    side: with stale used rings its queues would stand still, with stale packets its checksums would be wrong.
    """
    with Moving(guest_image, network, tmp_path, queue_pairs) as moving:
        for source, target in moving.rounds(ROUNDS):
            assert source.show()["logging"] is False
            logged = sum(ring["log_pages"] for ring in source.show()["queues"])
            before = received(target)
            moving.migrate(target)
            logged = sum(ring["log_pages"] for ring in source.show()["queues"]) - logged
            print(f"{logged} pages logged by the device")
            assert logged > 0
            assert sum(ring["log_outside"] for ring in source.show()["queues"]) == 0
            moving.grow()
            assert received(target) > before
        moving.finish()
