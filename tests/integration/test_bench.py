"""The benchmarks' own front-end, and a first look: against our server, without DPDK, huge pages or rights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from tests.helpers import PATIENCE, wait_until
from vhostmp.errors import LocalError
from vhostmp.tools.bench import costs, flood, latency
from vhostmp.tools.bench.command import QUICK_LAST_SECONDS
from vhostmp.tools.bench.figures import Measure, percentile
from vhostmp.tools.bench.flood import Flood, Spec
from vhostmp.tools.bench.insight import Insight
from vhostmp.tools.bench.measures import MEASURES
from vhostmp.tools.bench.placement import Cores
from vhostmp.tools.bench.programs import Serve
from vhostmp.tools.bench.report import Report
from vhostmp.tools.bench.sides import Plan

pytestmark = pytest.mark.slow

#: Answers each frame with what it was sent, but that every thousandth has another number.
LIAR: Final = """
from collections import deque

class Liar:
    def __init__(self):
        self.waiting, self.count = deque(maxlen=4096), 0

    def transmit(self, queue, packets):
        for frame in packets:
            self.count += 1
            copy = bytearray(frame)
            copy[20] ^= self.count % 1000 == 0
            self.waiting.append(bytes(copy))

    def receive(self, queue, budget):
        return [self.waiting.popleft() for _ in range(min(budget, len(self.waiting)))]
"""


@pytest.fixture
def core() -> int:
    """Name a processor that this process may use."""
    return max(os.sched_getaffinity(0))


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_every_packet_comes_back(tmp_path: Path, core: int, *, packed: bool) -> None:
    """In a loop all that is sent comes back, in order and as it was; the server's own counters agree."""
    with (
        Serve([tmp_path / "s"], "loopback", core, busy_poll=0) as server,
        Insight(server.pid, 1, 2) as insight,
        Flood(Spec([str(tmp_path / "s")], "loop", packed=packed), core) as front,
    ):
        wait_until(lambda: front.board.totals()["Rx"] > 100_000, what="packets to come back")  # noqa: PLR2004
        rates = front.rates()
        assert rates["Rx"] > 0
        totals = front.board.totals()
        assert totals["bad"] == totals["lost"] == 0
        counts = insight.counts()
        assert counts.packets >= 2 * totals["Rx"]  # each is counted on both rings
        assert counts.busy_ns > 0
        assert counts.batches > 0


def test_wrong_packets_are_seen(tmp_path: Path, core: int) -> None:
    """A back-end that changes a packet's number now and then gives no rate but an error."""
    (tmp_path / "liar.py").write_text(LIAR)
    with (
        Serve([tmp_path / "s"], f"python:{tmp_path}/liar.py:Liar", core) as _,
        Flood(Spec([str(tmp_path / "s")], "loop"), core) as front,
    ):
        wait_until(lambda: front.board.totals()["bad"] > 0, what="the lie to be seen")
        with pytest.raises(LocalError, match="were not what they should be"):
            front.rates()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_both_directions(tmp_path: Path, core: int, *, packed: bool) -> None:
    """What is sent is taken; what is received fills the buffers as it should."""
    for backend, way, counter in (("null:copy", "send", "Tx"), ("source:64", "receive", "Rx")):
        with (
            Serve([tmp_path / way], backend, core) as _,
            Flood(Spec([str(tmp_path / way)], way, packed=packed), core) as front,
        ):
            wait_until(lambda: front.board.totals()[counter] > 10_000, what=way)  # noqa: B023, PLR2004
            assert front.board.totals()["bad"] == 0


def test_wrong_length_is_seen(tmp_path: Path, core: int) -> None:
    """Frames of another length than the front-end was told are bad ones."""
    with (
        Serve([tmp_path / "s"], "source:100", core) as _,
        Flood(Spec([str(tmp_path / "s")], "receive", size=64), core) as front,
    ):
        wait_until(lambda: front.board.totals()["bad"] > 0, what="bad packets")


@pytest.mark.parametrize("way", ["loop", "ping"])
def test_times_are_noted(tmp_path: Path, core: int, way: str) -> None:
    """With a gap between packets each one's time is noted, polling or asleep."""
    gap_ns = 20_000_000 if way == "ping" else 100_000
    spec = Spec([str(tmp_path / "s")], way, event_idx=way == "ping", gap_ns=gap_ns)
    with Serve([tmp_path / "s"], "loopback", core) as _, Flood(spec, core) as front:
        wait_until(lambda: sum(front.board.times()) >= 100, what="times")  # noqa: PLR2004
        noted, totals, noted_later = sum(front.board.times()), front.board.totals(), sum(front.board.times())
        assert totals["Tx"] - totals["Rx"] <= 1 or way == "loop"  # who sleeps has one under way
        assert noted - flood.HEADER <= totals["Rx"] <= noted_later + flood.HEADER  # packets come all the time
        assert 100 < percentile(front.board.times(), 50) < PATIENCE * 1e9  # noqa: PLR2004
        # The quickest at least is taken as soon as it is back, and not when the next one is sent.
        assert percentile(front.board.times(), 1) < gap_ns or way == "loop"


def test_no_server_is_one_line(tmp_path: Path, core: int) -> None:
    """Where nobody listens the front-end ends, and says why in one line."""
    with pytest.raises(LocalError, match="our front-end"):
        Flood(Spec([str(tmp_path / "s")], "loop"), core)


def test_a_first_look(tmp_path: Path) -> None:
    """`vhostmp bench --quick` prints what was asked for as JSON, within its time, and leaves nothing behind."""
    began = time.monotonic()
    words = ["bench", "--quick", "--json", "--rounds", "1", "--case", "memory-null-64", "memory-64"]
    done = subprocess.run(
        [sys.executable, "-m", "vhostmp", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert time.monotonic() - began < QUICK_LAST_SECONDS + 5
    assert done.returncode == 0, done.stderr
    found = {case["case"]: case for case in json.loads(done.stdout)["cases"]}
    assert found["memory"]["mpps"] > 0
    wanted = {"case", "size", "ring", "mpps", "peer", "peer_mpps", "ratio", "ns_per_packet", "placement"}
    assert wanted <= set(found["memory"])
    assert found["memory"]["ns_per_packet"] > 0
    assert "Traceback" not in done.stderr


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plan one short round of everything."""
    for name, value in (("SWAPS", 5), ("STARTS", 1), ("IDLE_SECONDS", 0.2), ("IDLE_DEVICES", 3), ("DEVICES", (1, 3))):
        monkeypatch.setattr(costs, name, value)
    for module in (costs, latency):
        monkeypatch.setattr(module, "WINDOW_SECONDS", 0.1)
    monkeypatch.setattr(latency, "ENOUGH", 10)
    cores = sorted(os.sched_getaffinity(0))
    return Plan(Cores(cores[0], cores[-1]), fifo=False, rounds=1)


@pytest.mark.parametrize("measure", [one for one in MEASURES if one.name != "safety"], ids=lambda one: one.name)
def test_each_measure_comes_to_figures(plan: Plan, measure: Measure) -> None:
    """Each measure runs, its figures are finite, have names of their own and can be printed; nothing was lost."""
    figures = measure.take(plan)
    assert figures
    assert len({(figure.case, figure.what) for figure in figures}) == len(figures)
    assert all(0 <= figure.value < PATIENCE * 1e9 for figure in figures)
    assert "swap" not in measure.name or figures[0].value == 0
    report = Report([], figures, [], {}, 1)
    assert all(figure.what in report.markdown() for figure in figures)
