"""What a frame costs Linux's vhost-net and ours is measured in a guest (`vhostmp bench --case vhost-net`)."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Final

import pytest

from tests.kernel import rates
from vhostmp.tools.bench.in_guest import figures

SHORT: Final = ("--rounds", "2", "--seconds", "0.03", "--case", "64")
#: How far two measurements of the same thing may lie apart: a batch in a short window, and a tick of the clock.
SAME: Final = 0.15
#: Instructions: no frame is copied, given to the kernel and dropped by it in fewer, nor takes more of any worker.
PLAUSIBLE: Final = range(1000, 10000)

pytestmark = [pytest.mark.peer, pytest.mark.slow]


@pytest.mark.timeout(600)
def test_both_sides_move_frames(tmp_path: Path) -> None:
    """Ours, the kernel's and a bare write() have plausible costs; the kernel's on both sides comes to the same."""
    if reason := rates.missing():
        pytest.skip(reason)
    found = rates.run(tmp_path, SHORT, (*SHORT, "--against-itself"))
    (costs,), (itself,) = ([json.loads(line) for line in lines] for lines in found)
    for name in ("ours", "kernel", "bare"):
        assert len(costs[name]) == 2, costs  # noqa: PLR2004 - the rounds asked for
        assert all(int(cost) in PLAUSIBLE for cost in costs[name]), costs
    assert [figure.what for figure in figures(costs) if figure.goals()] == [
        "64 bytes to a tap, both asleep when idle, a frame"
    ]
    ratio = statistics.median(itself["ours"]) / statistics.median(itself["kernel"])
    assert abs(ratio - 1) < SAME, itself
