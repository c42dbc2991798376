"""Two servers, each on a tap of its own, and a guest that moves between them under two checked TCP streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from tests.helpers import wait_until
from tests.peers.guest import MEMORY, PROGRAM, Guest
from tests.peers.image import Image
from tests.peers.network import GUEST_ADDRESS, HOST_ADDRESS, TAP, Network
from tests.peers.processes import PATIENCE
from tests.peers.server import Server
from tests.peers.stream import Ends, Stream
from vhostmp import qemu

OTHER_TAP: Final = "vmptap1"
QUEUE_PAIRS: Final = 2
ODD_MEMORY: Final = f"{512 * 1024 + 8}K"
"""Not a multiple of 256 KiB: of memory that is one, QEMU 7.2.22 clears dirty bits 64 at a time and forgets to tell its
processor emulation, which goes on writing to those pages without setting their bits again. Dozens of pages are stale
then after one migration in two under this traffic, with a card of QEMU's own as with ours."""


class Moving:
    """The servers, the guest, its streams: context manager, which ends them all."""

    def __init__(self, image: Image, network: Network, folder: Path, queue_pairs: int) -> None:
        """Say what to start on which network, and a folder for what they write."""
        self._image = image
        self._network = network
        self._folder = folder
        self._queue_pairs = queue_pairs
        self._stack = ExitStack()
        self._moves = 0
        self._streams: list[Stream] = []

    def __enter__(self) -> Moving:
        """Start servers, guest and streams; the guest is on the first server."""
        with ExitStack() as stack:
            self._network.add_tap(OTHER_TAP, multi_queue=self._queue_pairs > 1)
            options = ["--queue-pairs", str(self._queue_pairs), "--workers", str(self._queue_pairs)]
            self._servers = [
                stack.enter_context(
                    Server(f"tap:{tap}", self._made(f"server{number}"), inside=self._network.inside, options=options)
                )
                for number, tap in enumerate((TAP, OTHER_TAP))
            ]
            first = self._servers[0]
            self.guest = stack.enter_context(Guest(self._image, self._settings(first), self._made("guest0")))
            self.guest.bring_up()
            self.guest.run(f"ping -c 5 -i 0.05 -W 5 {HOST_ADDRESS}")
            ends = Ends(self._image, self._network, self.guest)
            self._streams = [
                stack.enter_context(Stream(ends, 5001)),
                stack.enter_context(Stream(ends, 5002, to_guest=True)),
            ]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """End them."""
        self._stack.close()

    def rounds(self, count: int) -> Iterator[tuple[Server, Server]]:
        """There and back, `count` times: yield from where and to where; streams grow before and after each move."""
        first, second = self._servers
        for source, target in ((first, second), (second, first)) * count:
            self.grow()
            yield source, target
            self.grow()
            wait_until(lambda: not source.show()["connected"], PATIENCE, "the old QEMU to be gone")  # noqa: B023 - used at once
            self._network.run("ping", "-c", "3", "-i", "0.05", "-W", "5", GUEST_ADDRESS)

    def grow(self) -> None:
        """Wait until bytes have come through each stream."""
        for stream in self._streams:
            stream.grow()

    def migrate(self, target: Server, postcopy: Callable[[], None] | None = None) -> Any:
        """Move the guest (Guest.migrate); return what QEMU says of it."""
        self._moves += 1
        report = self.guest.migrate(self._settings(target), self._made(f"guest{self._moves}"), postcopy=postcopy)
        print(f"migration {self._moves}: {report['downtime']} ms down, {report['total-time']} ms, {report['ram']}")
        return report

    def finish(self) -> None:
        """End the streams: every byte has arrived. AssertionError: not so."""
        for stream in self._streams:
            result = stream.finish()
            print(f"{result.sent.count} bytes to the guest, {result.received.count} from it")
            print(f"{result.retransmits} segments sent again by the host")

    def _made(self, name: str) -> Path:
        folder = self._folder / name
        folder.mkdir()
        return folder

    def _settings(self, server: Server) -> list[str]:
        card = qemu.Card(path=str(server.socket), queue_pairs=self._queue_pairs, memory=MEMORY, msix=False)
        words = qemu.options(card, qemu.probe_version(PROGRAM))
        return [word.replace(MEMORY, ODD_MEMORY) for word in words]
