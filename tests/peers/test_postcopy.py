"""A live migration by post-copy between two QEMUs under traffic: the guest goes on while its memory is to follow."""

from __future__ import annotations

import os
import re
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers import wait_until
from tests.peers.guest import Guest
from tests.peers.image import Image
from tests.peers.network import GUEST_ADDRESS, HOST_ADDRESS, TAP, Network
from tests.peers.processes import PATIENCE
from tests.peers.server import Server
from tests.peers.stream import Ends, Stream
from tests.peers.test_migration import OTHER_TAP, QUEUE_PAIRS, settings

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
    network.add_tap(OTHER_TAP, multi_queue=queue_pairs > 1)
    options = ["--queue-pairs", str(queue_pairs), "--workers", str(queue_pairs)]
    with ExitStack() as stack:
        servers: list[Server] = []
        for number, tap in enumerate((TAP, OTHER_TAP)):
            folder = tmp_path / f"server{number}"
            folder.mkdir()
            servers.append(stack.enter_context(Server(f"tap:{tap}", folder, inside=network.inside, options=options)))
        first, second = servers
        folder = tmp_path / "guest0"
        folder.mkdir()
        guest = stack.enter_context(Guest(guest_image, settings(first, queue_pairs), folder))
        guest.bring_up()
        guest.run(f"ping -c 5 -i 0.05 -W 5 {HOST_ADDRESS}")
        ends = Ends(guest_image, network, guest)
        streams = [
            stack.enter_context(Stream(ends, 5001)),
            stack.enter_context(Stream(ends, 5002, to_guest=True)),
        ]
        for number, (source, target) in enumerate(((first, second), (second, first)) * ROUNDS, 1):
            for stream in streams:
                stream.grow()
            folder = tmp_path / f"guest{number}"
            folder.mkdir()

            def meanwhile(target: Server = target, number: int = number) -> None:
                target.wait_for(lambda: pages(target), "the device to ask for pages")
                if number % 2 == 0:
                    victim = target.ring(0)["worker_pid"]
                    os.kill(victim, signal.SIGKILL)
                    target.wait_for(lambda: target.ring(0)["worker_pid"] != victim, "another worker")
                for stream in streams:
                    stream.grow()
                print(f"while memory was to follow: {target.show()['postcopy']}")

            report = guest.migrate(settings(target, queue_pairs), folder, postcopy=meanwhile)
            print(f"migration {number}: {report['downtime']} ms down, {report['total-time']} ms, {report['ram']}")
            for stream in streams:
                stream.grow()
            wait_until(lambda: target.show()["postcopy"] is None, PATIENCE, "the end of post-copy")  # noqa: B023 - used at once
            ended = re.findall(r"post-copy has ended: (\d+) faults, (\d+) pages", target.log)
            print(f"faults and pages of the device: {ended}")
            assert int(ended[-1][1]) > 0
            assert "fault" not in guest.qemu.output, "QEMU did not understand a fault of the device's"
            assert report["ram"]["postcopy-requests"] > 0
            wait_until(lambda: not source.show()["connected"], PATIENCE, "the old QEMU to be gone")  # noqa: B023 - used at once
            network.run("ping", "-c", "3", "-i", "0.05", "-W", "5", GUEST_ADDRESS)
        for stream in streams:
            result = stream.finish()
            print(f"{result.sent.count} bytes to the guest, {result.received.count} from it")
            print(f"{result.retransmits} segments sent again by the host")
