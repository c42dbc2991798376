"""A back-end on the tap of the test's network, and the Linux guest whose network card it serves."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import attrs

from tests.peers.guest import MEMORY, PROGRAM, Guest
from tests.peers.image import Image
from tests.peers.network import GUEST_ADDRESS, HOST_ADDRESS, TAP, VETH, Network
from tests.peers.server import Server
from tests.peers.stream import Ends, Stream
from vhostmp import qemu

TAP_BACKEND: Final = f"tap:{TAP}"
PACKET_BACKEND: Final = f"packet:{VETH}"


@attrs.frozen
class Start:
    """Starts a back-end and a guest on it; `stack` ends both after the test."""

    stack: ExitStack
    image: Image
    network: Network
    folder: Path

    def __call__(
        self, queue_pairs: int = 1, *, more: Sequence[str] = (), device: str = "", iommu: str = ""
    ) -> tuple[Server, Guest]:
        """Do it.

        Args:
            queue_pairs: of the card; each has a worker.
            more: further QEMU options.
            device: what to add to the card's.
            iommu: puts the card behind an IOMMU: words for the command line of the guest's kernel, which is to use it.
        """
        options = ["--queue-pairs", str(queue_pairs), "--workers", str(queue_pairs), *(["--iommu"] if iommu else [])]
        server = self.stack.enter_context(Server(TAP_BACKEND, self.folder, inside=self.network.inside, options=options))
        card = qemu.Card(path=str(server.socket), queue_pairs=queue_pairs, memory=MEMORY, msix=False, iommu=bool(iommu))
        words = qemu.options(card, qemu.probe_version(PROGRAM))
        words = [*words[:-1], words[-1] + device, *more]
        guest = Guest(self.image, words, self.folder, processors=max(2, queue_pairs), append=iommu)
        self.stack.enter_context(guest)
        guest.bring_up()
        return server, guest


def check_ping(network: Network, guest: Guest) -> None:
    """Each side answers the other one's pings, all of them."""
    guest.run(f"ping -c 5 -i 0.05 -W 5 {HOST_ADDRESS}")
    network.run("ping", "-c", "5", "-i", "0.05", "-W", "5", GUEST_ADDRESS)


@contextmanager
def both_ways(ends: Ends) -> Generator[list[Stream]]:
    """Yield two connections, one made by the guest and one made to it."""
    with (
        Stream(ends, 5001) as outward,
        Stream(ends, 5002, to_guest=True) as inward,
    ):
        yield [outward, inward]
