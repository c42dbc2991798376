"""`vhostmp stress` with its good and edge clauses, against our own back-end: all that apply pass."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests import helpers
from tests.integration.serving import serving
from vhostmp.tools.stress.clause import CLAUSES
from vhostmp.tools.stress.clauses import good_resume, load_all
from vhostmp.tools.stress.examiner import Examiner, asked
from vhostmp.tools.stress.target import Target
from vhostmp.tools.stress.verdict import Verdict
from vhostmp.tools.stress.watch import Process

LONG: Final = (
    "long-run",
    "reconnect-1000",
    "iommu-reconnect-1000",
    "hang-up-anywhere",
    "features-subsets",
    "ring-sizes",
    "kick-storm",
)
"""Clauses that take a second or more."""
OFTEN: Final = ("loopback", "blk", "rng")
ECHO: Final = """
from collections import defaultdict

class Echo:
    def __init__(self):
        self.frames = defaultdict(list)

    def transmit(self, queue, packets):
        self.frames[queue].extend(map(bytes, packets))

    def receive(self, queue, budget):
        frames, self.frames[queue] = self.frames[queue][:budget], self.frames[queue][budget:]
        return frames
"""
SERVED: Final = {
    "loopback": ("net", ["--backend", "loopback", "--queue-pairs", "2", "--mac", "02:00:00:00:00:05"]),
    "null": ("net", ["--backend", "null"]),
    "python": ("net", ["--backend", "python:{folder}/echo.py:Echo"]),
    "iommu": ("net", ["--backend", "loopback", "--iommu"]),
    "python-iommu": ("net", ["--backend", "python:{folder}/echo.py:Echo", "--iommu"]),
    "workers": ("net", ["--backend", "loopback", "--queue-pairs", "2", "--workers", "2"]),
    "blk": ("blk", ["--device", "blk", "--backend", "file:{folder}/disk", "--queues", "2"]),
    "rng": ("rng", ["--device", "rng"]),
}


def ask(tmp_path: Path, kind: str, *, everything: bool) -> None:
    """Serve, ask, and fail with what failed."""
    load_all()
    (tmp_path / "echo.py").write_text(ECHO)
    with (tmp_path / "disk").open("wb") as disk:
        disk.truncate(16 << 20)
    device, options = SERVED[kind]
    path = tmp_path / "s"
    words = [word.format(folder=tmp_path) for word in options]
    with serving(tmp_path, "--socket-path", str(path), *words) as served:
        examiner = Examiner(Target(path, device), Process.of(served.pid), 1.0)
        clauses = [one for one in asked(["good", "edge"], []) if device in one.devices]
        if not everything:
            short = [one for one in clauses if one.id.partition(".")[0] not in LONG]
            clauses = short[OFTEN.index(kind) :: len(OFTEN)]
        results = [examiner.ask(one, seed=at) for at, one in enumerate(clauses)]
    assert not [(one.id, one.detail, one.seed) for one in results if one.verdict is Verdict.FAIL]
    assert sum(one.verdict is Verdict.PASS for one in results) > len(results) // 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", SERVED)
def test_all_pass(tmp_path: Path, kind: str) -> None:
    """Of some kinds of back-ends a third of the short clauses; `make slow` asks all of all kinds."""
    everything = helpers.TORTURE_SECONDS > 1
    if kind not in OFTEN and not everything:
        pytest.skip("`make slow` asks this kind")
    ask(tmp_path, kind, everything=everything)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "id_"),
    [("loopback", "reconnect-1000"), ("python", "reconnect-1000"), ("python-iommu", "iommu-reconnect-1000")],
)
def test_flat(tmp_path: Path, kind: str, id_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors and memory stay as many while front-ends come and go; `make slow` asks it of a thousand."""
    load_all()
    monkeypatch.setattr(good_resume, "RECONNECTS", 120)
    monkeypatch.setattr(good_resume, "WARM", 60)
    device, options = SERVED[kind]
    (tmp_path / "echo.py").write_text(ECHO)
    words = [word.format(folder=tmp_path) for word in options]
    with serving(tmp_path, "--socket-path", str(tmp_path / "s"), *words) as served:
        found = Examiner(Target(tmp_path / "s", device), Process.of(served.pid), 1.0).ask(CLAUSES[id_], seed=1)
    assert found.verdict is Verdict.PASS, found.detail
