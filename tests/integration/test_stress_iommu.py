"""`vhostmp stress` against devices behind an IOMMU: ours keeps all clauses, and a flaw in its IOTLB is found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import pytest

from tests import helpers
from tests.flawed.iommu import FLAWS
from tests.integration import serving as served
from vhostmp.tools.stress.clause import CLAUSES
from vhostmp.tools.stress.clauses import load_all
from vhostmp.tools.stress.examiner import Examiner, asked
from vhostmp.tools.stress.result import Result
from vhostmp.tools.stress.target import Target
from vhostmp.tools.stress.verdict import Verdict
from vhostmp.tools.stress.watch import Process

KINDS: Final = ("iommu-", "iotlb-", "iova-")
LONG: Final = "iotlb-flood"
"""Not for every run: 50,000 messages."""
QUICK: Final = (
    "iommu-told.packed",
    "iommu-moved.split",
    "iotlb-before-memory",
    "iotlb-miss-unanswered.split",
    "iotlb-on-channel.packed",
    "iotlb-wraps",
    "iova-hole.split",
)
FINDS: Final = {
    "kept": "iotlb-invalidated-busy.split",
    "wider": "iotlb-downgrade.split",
    "unheard": "iommu-on-demand.split",
    "waits": "iotlb-channel-full",
    "padded": "iotlb-sizes",
    "hoards": "iotlb-flood",
}
"""The clause that finds each flaw. It passes where it is not planted."""


def ask(folder: Path, *ids: str, seconds: float = 0.3, patience: float = 5.0) -> list[Result]:
    """Serve a loopback of two pairs behind an IOMMU, ask these clauses, return the results."""
    load_all()
    path = folder / "s"
    words = ["--socket-path", str(path), "--backend", "loopback", "--iommu", "--queue-pairs", "2"]
    with served.serving(folder, *words) as server:
        examiner = Examiner(Target(path, "net", patience=patience), Process.of(server.pid), seconds)
        return [examiner.ask(one, seed=at) for at, one in enumerate(asked([], ids))]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_pass(tmp_path: Path) -> None:
    """Clauses about an IOMMU pass and apply: some of each kind; `make slow` asks all."""
    load_all()
    every = [one for one in CLAUSES if one.startswith(KINDS)]
    results = ask(tmp_path, *(every if helpers.TORTURE_SECONDS > 1 else [*QUICK, *(set(FINDS.values()) - {LONG})]))
    assert [(one.id, one.detail) for one in results if one.verdict is not Verdict.PASS] == []


@pytest.mark.slow
@pytest.mark.parametrize("flaw", FINDS)
def test_flaw_is_found(flaw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each flaw planted in our own IOTLB makes its clause fail."""
    monkeypatch.setattr(served, "PROGRAM", (sys.executable, "-m", "tests.flawed.iommu", flaw))
    (found,) = ask(tmp_path, FINDS[flaw], seconds=2, patience=1)
    assert found.verdict is Verdict.FAIL, found


def test_every_flaw_has_its_clause() -> None:
    """The table has every flaw that can be planted."""
    assert set(FINDS) == set(FLAWS)
