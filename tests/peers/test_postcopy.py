"""A live migration by post-copy between two QEMUs under traffic: the guest goes on while its memory is to follow."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.helpers import wait_until
from tests.peers.image import Image
from tests.peers.moving import QUEUE_PAIRS, Moving
from tests.peers.network import Network
from tests.peers.processes import PATIENCE
from tests.peers.server import Server

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(400)]

ROUNDS = int(os.environ.get("ROUNDS", "1"))


def pages(server: Server) -> int:
    """Return how many pages a server's device has asked for and got, 0 when there is no post-copy."""
    state = server.show()["postcopy"]
    return 0 if state is None else int(state["pages"])


@pytest.mark.parametrize(
    ("network", "queue_pairs"), [(False, 1), (True, QUEUE_PAIRS)], indirect=["network"], ids=["one pair", "two pairs"]
)
def test_there_and_back_under_traffic(guest_image: Image, network: Network, tmp_path: Path, queue_pairs: int) -> None:
    """From A to B and back to A: TCP connections that both sides made live on, every byte arrives.

    The device needs pages of rings and buffers that are still at the source, in user mode and in the tap's system
    calls: it asks for them, while traffic goes on. On the way back a worker is killed meanwhile.
    """
    with Moving(guest_image, network, tmp_path, queue_pairs) as moving:
        for number, (_, target) in enumerate(moving.rounds(ROUNDS), 1):

            def meanwhile(target: Server = target, number: int = number) -> None:
                target.wait_for(lambda: pages(target), "the device to ask for pages")
                if number % 2 == 0:
                    victim = target.ring(0)["worker_pid"]
                    os.kill(victim, signal.SIGKILL)
                    target.wait_for(lambda: target.ring(0)["worker_pid"] != victim, "another worker")
                moving.grow()
                print(f"while memory was to follow: {target.show()['postcopy']}")

            report = moving.migrate(target, meanwhile)
            wait_until(lambda: target.show()["postcopy"] is None, PATIENCE, "the end of post-copy")  # noqa: B023 - used at once
            ended = re.findall(r"post-copy has ended: (\d+) faults, (\d+) pages", target.log)
            print(f"faults and pages of the device: {ended}")
            assert int(ended[-1][1]) > 0
            assert "fault" not in moving.guest.qemu.output, "QEMU did not understand a fault of the device's"
            assert report["ram"]["postcopy-requests"] > 0
        moving.finish()
