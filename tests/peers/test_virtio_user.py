"""Every variant of DPDK's virtio-user passes traffic both ways, unchanged and in order: see verifying.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest

from tests.peers.server import Server
from tests.peers.testpmd import HugePages, Testpmd
from tests.peers.verifying import SPEC, Tallies, Tally

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(120)]

FRAMES = 10_000
"""Frames that must have crossed both rings of each queue pair before a test goes on."""
SMALL = (60, 1514)
LARGE = (60, 9000)
"""What needs several receive buffers, which hold about 2 KiB each."""
SCATTERED = ("--max-pkt-len=9018", "--enable-scatter")
WAYS = ("--log-level", "pmd.net.virtio.*:debug", "--force-max-simd-bitwidth=512")
"""Has the driver say which way through its code it takes, and take the widest."""
SERVER_MODE = "server=1"


@attrs.frozen
class Variant:
    """One set of features that virtio-user negotiates, and the way through its driver that they lead to."""

    name: str
    way: str
    """What the driver says of its receive path."""
    packed: bool = False
    mergeable: bool = True
    in_order: bool = True
    vectorized: bool = False

    @property
    def device(self) -> list[str]:
        """The arguments of the virtual device."""
        return [
            f"packed_vq={self.packed:d}",
            f"mrg_rxbuf={self.mergeable:d}",
            f"in_order={self.in_order:d}",
            f"vectorized={self.vectorized:d}",
        ]

    @property
    def features(self) -> dict[str, bool]:
        """Which features must be acked, and which must not be."""
        return {"RING_PACKED": self.packed, "MRG_RXBUF": self.mergeable, "IN_ORDER": self.in_order}


def has_avx512() -> bool:
    """Whether the processor has what virtio-user's vectorised path for packed rings is made of."""
    return {"avx512f", "avx512bw", "avx512vl"} <= set(Path("/proc/cpuinfo").read_text().split())


VARIANTS = [
    Variant("split", "standard", mergeable=False, in_order=False),
    Variant("split, mergeable", "mergeable buffer", in_order=False),
    Variant("split, in order", "inorder", mergeable=False),
    Variant("split, mergeable, in order", "inorder"),
    Variant("split, vectorized", "vectorized", mergeable=False, in_order=False, vectorized=True),
    Variant("packed", "packed ring standard", packed=True, mergeable=False, in_order=False),
    Variant("packed, mergeable", "packed ring mergeable buffer", packed=True, in_order=False),
    Variant("packed, in order", "packed ring standard", packed=True, mergeable=False),
    Variant("packed, mergeable, in order", "packed ring mergeable buffer", packed=True),
    Variant(
        "packed, vectorized",
        "packed ring vectorized" if has_avx512() else "packed ring standard",
        packed=True,
        mergeable=False,
        vectorized=True,
    ),
]


@attrs.frozen
class Stage:
    """Where a test's programs run, and what they tell each other."""

    pages: HugePages
    folder: Path
    tallies: Tallies
    queue_pairs: int = 1

    def serve(self, *options: str, name: str = "serve") -> Server:
        """Start vhostmp with the verifying back-end, a worker for two queue pairs."""
        workers = (self.queue_pairs + 1) // 2
        shape = ["--queue-pairs", str(self.queue_pairs), "--workers", str(workers)]
        return Server(SPEC, self.folder, env=self.tallies.environment, options=[*shape, *options], name=name)

    def front_end(
        self, server: Server, *device: str, options: Sequence[str] = (), eal: Sequence[str] = (), name: str = "user"
    ) -> Testpmd:
        """Start virtio-user: it sends back what it receives, without a look at it, once it is told to start."""
        return Testpmd.virtio_user(
            server.socket,
            self.pages,
            self.folder / name,
            queues=self.queue_pairs,
            mode="io",
            device=device,
            options=["--no-flush-rx", *options],
            eal=eal,
        )

    def pass_frames(self, server: Server) -> list[Tally]:
        """Wait until FRAMES more than now have come back on each queue pair."""
        before = self.tallies.read(self.queue_pairs)

        def enough() -> bool:
            now = self.tallies.read(self.queue_pairs)
            return all(new.returned - old.returned >= FRAMES for new, old in zip(now, before, strict=True))

        server.wait_for(enough, f"{FRAMES} frames more than {before} come back on each queue pair")
        return self.tallies.read(self.queue_pairs)

    def run(self, server: Server, peer: Testpmd) -> list[Tally]:
        """Begin, and wait as `pass_frames` does."""
        server.await_rings(2 * self.queue_pairs)
        peer.command("start")
        self.tallies.begin()
        return self.pass_frames(server)


@pytest.fixture
def stage(request: pytest.FixtureRequest, pages: HugePages, tmp_path: Path) -> Stage:
    """Return a stage of small frames, of as many queue pairs as the fixture's parameter says."""
    return Stage(pages, tmp_path, Tallies(tmp_path / "tallies", SMALL), getattr(request, "param", 1))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_variant_passes_traffic(pages: HugePages, tmp_path: Path, variant: Variant) -> None:
    """What a variant is named after is negotiated and used, and all frames come back byte for byte, in order."""
    stage = Stage(pages, tmp_path, Tallies(tmp_path / "tallies", LARGE if variant.mergeable else SMALL))
    options = SCATTERED if variant.mergeable else ()
    with stage.serve() as server, stage.front_end(server, *variant.device, options=options, eal=WAYS) as peer:
        assert f"using {variant.way} Rx path on port 0" in peer.child.output
        stage.run(server, peer)
        acked = server.show()["acked_features"]
        assert {name: name in acked for name in variant.features} == variant.features
        stage.tallies.check(1)


@pytest.mark.parametrize("stage", [2, 3, 4], indirect=True)
def test_queue_pairs(stage: Stage) -> None:
    """Frames of each queue pair come back on it, and on no other, also when workers have several pairs."""
    with stage.serve() as server, stage.front_end(server) as peer:
        stage.run(server, peer)
        queues = server.show()["queues"]
        print([(ring["index"], ring["packets"], ring["worker_pid"]) for ring in queues])
        assert all(ring["packets"] >= FRAMES for ring in queues)
        stage.tallies.check(stage.queue_pairs)


def test_virtio_user_listens(stage: Stage) -> None:
    """With the roles at the socket exchanged (``serve --connect``) traffic passes as ever."""
    with stage.serve("--connect") as server, stage.front_end(server, SERVER_MODE) as peer:
        stage.run(server, peer)
        stage.tallies.check(1)


@pytest.mark.parametrize("stage", [1, 2], indirect=True)
def test_front_end_killed_and_started_again(stage: Stage) -> None:
    """The back-end outlives its front-end: a new one on the same socket passes traffic at once."""
    with stage.serve() as server:
        with stage.front_end(server) as peer:
            stage.run(server, peer)
            peer.kill()
        stage.tallies.begin(False)
        with stage.front_end(server, name="second") as peer:
            stage.run(server, peer)
        check_nothing_wrong(stage)


@pytest.mark.parametrize("stage", [1, 2], indirect=True)
def test_back_end_killed_and_started_again(stage: Stage) -> None:
    """The front-end outlives its back-end: rings go on where they stopped with a new one that connects to it."""
    with stage.serve("--connect") as first, stage.front_end(first, SERVER_MODE) as peer:
        stage.run(first, peer)
        first.kill()
        with stage.serve("--connect", "--adopt-timeout", "0", name="second") as second:
            stage.pass_frames(second)
            assert not any(ring["broken"] for ring in second.show()["queues"])
        check_nothing_wrong(stage)


def test_worker_killed_and_swaps_under_load(stage: Stage) -> None:
    """While workers are killed and back-ends swapped, no frame is changed, and none comes twice or out of order."""
    with stage.serve() as server, stage.front_end(server) as peer:
        stage.run(server, peer)
        for _ in range(4):
            os.kill(server.ring(0)["worker_pid"], signal.SIGKILL)
            stage.pass_frames(server)
            server.swap("null")
            server.swap(SPEC)
            stage.pass_frames(server)
        check_nothing_wrong(stage)


def check_nothing_wrong(stage: Stage) -> None:
    """No frame was changed, and none came twice or out of order; some may be missing where something was killed."""
    tallies = stage.tallies.read(stage.queue_pairs)
    print(*tallies, sep="\n")
    for tally in tallies:
        assert (tally.wrong, tally.disorder) == (0, 0), tally
