"""DPDK's virtio-user at both ends of a patch: every frame crosses it both ways, and is compared byte for byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers import wait_until
from tests.integration.serving import ask, serving
from tests.peers.testpmd import HugePages, Testpmd
from tests.peers.verifying import SPEC, Tallies

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(300)]

FRAMES = 20_000
#: What is behind each of testpmd's ports, which it forwards between in pairs: 0 and 1, 2 and 3.
BACKENDS = (SPEC, "patch:2", "patch:1", "loopback")


@pytest.mark.parametrize("ring", ["packed_vq=0", "packed_vq=1"], ids=["split", "packed"])
def test_frames_cross_a_patch(pages: HugePages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ring: str) -> None:
    """Frames that a back-end sends go through testpmd, the patch, testpmd and a loopback, and all the way back, whole.

    While they do, either end of the patch is put in anew.
    """
    tallies = Tallies(tmp_path / "tallies", (60, 1514))
    for name, value in tallies.environment.items():
        monkeypatch.setenv(name, value)
    sockets = [tmp_path / f"{port}.sock" for port in range(len(BACKENDS))]
    words = [word for path in sockets for word in ("--socket-path", str(path))]
    words += [word for spec in BACKENDS for word in ("--backend", spec)]
    control = tmp_path / "control.sock"
    ports = [f"net_virtio_user{port},path={path},queue_size=256,{ring}" for port, path in enumerate(sockets)]
    more = [word for port in ports[1:] for word in ("--vdev", port)]
    with (
        serving(tmp_path, *words, "--control-path", str(control), "--sandbox", "off"),
        Testpmd(
            ports[0],
            pages,
            tmp_path / "user",
            max(os.sched_getaffinity(0)),
            ["--forward-mode=io", "--auto-start"],
            more,
        ) as peer,
    ):

        def ready() -> bool:
            queues = [queue for device in ask("show", control)["devices"] for queue in device["queues"]]
            return all(queue["started"] and queue["enabled"] for queue in queues)

        wait_until(ready, what="all rings")
        tallies.begin()
        for turn in range(4):
            before = tallies.read(1)[0].returned
            peer.child.wait_for(
                lambda before=before: tallies.read(1)[0].returned > before + FRAMES,  # type: ignore[misc]
                f"{FRAMES} more frames after {before}",
                60.0,
            )
            ask("swap", control, "--device", str(1 + turn % 2), BACKENDS[1 + turn % 2])
        tallies.begin(False)

        def settled() -> bool:
            tally = tallies.read(1)[0]
            return tally.returned == tally.sent

        peer.child.wait_for(settled, "what is under way")
        tallies.check(1)
        devices = ask("show", control)["devices"]
        assert [device["patch"] for device in devices] == [None, "joined to device 2", "joined to device 1", None]
        assert not any(count for one in devices[1:3] for queue in one["queues"] for count in queue["drops"].values())
        assert all(queue["packed"] == ring.endswith("1") for device in devices for queue in device["queues"])
