"""`vhostmp demo --chaos`: it counts, and what it counts is none, however often workers are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from vhostmp.cli import EXIT_MISTAKE, main
from vhostmp.shm import layout
from vhostmp.tools import demo_chaos
from vhostmp.tools.demo_stage import Stage
from vhostmp.tools.guest import Layout
from vhostmp.workers.logs import RecordSocket

ROOT: Final = Path(__file__).parents[3]
KEYS: Final = [
    *("kills", "lost_tx", "duplicated", "stuck_rings", "leaked_descriptors", "leaked_fds", "leaked_segments"),
    *("replacement_ms", "seed", "packets", "seconds", "most_repeated", "swaps", "refused", "moves"),
]
KILLS: Final = 60
NO_LIMIT: Final = 300
WRAP: Final = 1 << 15
#: How long after its worker a log may be closed, seconds: seen on a machine with much else to do.
LATE_SECONDS: Final = 0.5


@pytest.mark.slow
@pytest.mark.timeout(NO_LIMIT)
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_chaos(ring: str) -> None:
    """After 60 kills at random moments, amid swaps and moves, nothing is lost, stuck or left; repeats are counted."""
    words = ["--chaos", "--kills", str(KILLS), "--ring", ring, "--seed", "5", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "vhostmp", "demo", *words],
        capture_output=True,
        text=True,
        timeout=NO_LIMIT,
        check=False,
        cwd=ROOT,
    )
    told = [line for line in done.stderr.splitlines() if "replaced by pid" not in line]
    assert done.returncode == 0, (told, done.stdout)
    assert "seed 5" in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert list(found) == KEYS
    assert found["kills"] >= KILLS
    assert {name: found[name] for name in KEYS if name.startswith(("lost", "stuck", "leaked"))} == dict.fromkeys(
        ("lost_tx", "stuck_rings", "leaked_descriptors", "leaked_fds", "leaked_segments"), 0
    )
    assert found["duplicated"] <= demo_chaos.BATCH * found["kills"]
    times = found["replacement_ms"]
    assert list(times) == ["p50", "p99", "max"]
    assert 0 < times["p50"] <= times["p99"] <= times["max"]


@pytest.mark.slow
def test_what_goes_on_meanwhile() -> None:
    """Back-ends are swapped and memory is moved amid the kills; what is shown says how often."""
    lines: list[str] = []
    report = demo_chaos.perform(1, Layout(), 10, 5, lambda make: lines.append(make()))
    assert report.problems == ()
    assert report.swaps > 0
    assert report.moves > 0
    assert " 10/10 kills" in lines[-1]


@pytest.mark.slow
def test_who_hangs_up_late_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that reads a worker's log may come to its end when the stage is gone: that is waited for."""
    close = RecordSocket.close

    def close_late(sock: RecordSocket) -> None:
        threading.Event().wait(LATE_SECONDS)
        close(sock)

    monkeypatch.setattr(RecordSocket, "close", close_late)
    assert demo_chaos.perform(1, Layout(), 1, 5, lambda make: None, calm=True).problems == ()


def report_of(**changes: Any) -> demo_chaos.Report:
    """Make a report of a good run, with changes."""
    times = {"p50": 5.0, "p99": 15.0, "max": 20.0}
    good = demo_chaos.Report(60, 0, 128, 0, 0, 0, 0, times, 5, 1_000_000, 300, 2, 40, 64, 6.0)
    return attrs.evolve(good, **changes)


def test_report_as_a_table() -> None:
    """The table says the same as JSON, and how often one kill has repeated a packet at most."""
    table = report_of().to_table()
    assert "128  (at most 64 by one kill)" in table
    assert "median 5.0 ms, 99 % 15.0 ms, max 20.0 ms" in table
    assert list(report_of().to_json()) == KEYS


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lost_tx": 1}, "lost tx: 1"),
        ({"stuck_rings": 2}, "stuck rings: 2"),
        ({"leaked_fds": 3}, "leaked fds: 3"),
        ({"leaked_descriptors": 4}, "leaked descriptors: 4"),
        ({"leaked_segments": 5}, "leaked segments: 5"),
        ({"most_repeated": 65}, "one kill repeated 65 packets"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, int], problem: str) -> None:
    """Each count that is to be none is a problem when it is not."""
    assert demo_chaos.judge(report_of(), demo_chaos.Tally()) == []
    found = demo_chaos.judge(report_of(**changes), demo_chaos.Tally())
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_who_is_left_is_said() -> None:
    """A killed worker's process that is still there is a problem."""
    found = demo_chaos.judge(report_of(), demo_chaos.Tally(pids={os.getpid()}))
    assert found == [f"processes of killed workers are left: [{os.getpid()}]"]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_taken_chain_is_a_leak(packed: bool) -> None:
    """A chain that the device says it has taken, and does not give back, is found."""
    with Stage(layout=Layout(packed=packed)) as stage:
        chaos = demo_chaos.Chaos(stage, 1, 1, lambda tally: None)
        stage.wait_for_packets(100)
        stage.settle()
        assert chaos.leaked() == 0
        offset = layout.ring_offset(stage.device.first_ring + 1)
        index = layout.RING.read(stage.pool.buf, offset, "last_avail_idx")
        if not packed:
            index = (index + 1) % (1 << 16)
        elif index & 0x7FFF < stage.layout.ring(1).entries - 1:
            index += 1
        else:  # the first place of the next round
            index = (index & WRAP) ^ WRAP
        layout.RING.write(stage.pool.buf, offset, "last_avail_idx", index)
        assert chaos.leaked(patience=0.1) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--kills", "5"],
        ["--calm"],
        ["--chaos", "--seconds", "5"],
        ["--chaos", "--plot", "x.png"],
        ["--chaos", "--kills", "0"],
    ],
)
def test_options_that_do_not_go_together(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake on the command line ends with status 2 and one line."""
    assert main(["demo", *words]) == EXIT_MISTAKE
    assert len(capsys.readouterr().err.splitlines()) == 1
