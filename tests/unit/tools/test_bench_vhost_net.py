"""The measure beside Linux's vhost-net: what it makes of a guest's words, and what it says where there is no guest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vhostmp.errors import LocalError
from vhostmp.tools.bench import in_guest, vhost_net
from vhostmp.tools.bench.placement import Cores
from vhostmp.tools.bench.report import Report
from vhostmp.tools.bench.sides import Plan

PLAN = Plan(Cores(0, 1), fifo=False, rounds=3)
COSTS = {"size": 64, "busy_poll": 0, "ours": [100.0, 50.0, 40.0], "kernel": [80.0, 60.0, 40.0], "bare": [20.0] * 3}


def test_which_way_a_ratio_goes() -> None:
    """Who takes half as many instructions moves twice as many frames; ratios are taken inside the rounds."""
    ours, bare = in_guest.figures(COSTS)
    assert (ours.value, ours.peer_value, ours.ratio, ours.spread) == (50.0, 60.0, 1.0, (0.8, 1.2))
    assert (bare.ratio, bare.spread, bare.bound) == (3.0, (2.0, 4.0), None)


@pytest.mark.parametrize(("ours", "met"), [(80.0, True), (81.0, False)])
def test_verdict(ours: float, met: bool) -> None:
    """The goal is as many frames as the kernel's, one for each case; the bare write() has none."""
    found = in_guest.figures({**COSTS, "ours": [ours], "kernel": [80.0], "bare": [200.0]})
    (goal,) = [goal for figure in found for goal in figure.goals()]
    assert (goal.bound, goal.met) == (1.0, met)
    report = Report([], found, [], {}, 1)
    assert ("MISSED" in report.text()) is not met
    assert report.to_json()["cases"][0]["ratio_spread"] == [round(80.0 / ours, 3)] * 2


def test_polling_is_said() -> None:
    """A case in which both poll is called so, and the bare write(), which would be the same, stands there once."""
    (figure,) = in_guest.figures({**COSTS, "busy_poll": 50})
    assert "polling for 50 us" in figure.what


def _run(monkeypatch: pytest.MonkeyPatch, status: int, out: str = "", err: str = "") -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert Path(command[3]).is_dir()
        assert options["cwd"] == in_guest.ROOT
        commands.append(command)
        return subprocess.CompletedProcess(command, status, out, err)

    monkeypatch.setattr("vhostmp.tools.bench.in_guest.subprocess.run", run)
    return commands


def test_runs_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program of the checkout is run for the rounds asked for, and each of its lines becomes figures."""
    line = '{"size": 1500, "busy_poll": 0, "ours": [2.0], "kernel": [1.0], "bare": [1.0]}\n'
    commands = _run(monkeypatch, 0, line * 2)
    assert [figure.ratio for figure in in_guest.vhost_net(PLAN)] == [0.5, 1.0, 0.5, 1.0]
    ((python, *words, rounds),) = commands
    assert (python, words[1], rounds) == (sys.executable, "tests.kernel.rates", "3")


def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the program cannot do is said as it said it; without a checkout there is no such program."""
    _run(monkeypatch, 1, err="a warning\nno qemu-system-x86_64 (make peers)\n")
    with pytest.raises(LocalError, match=r"^no qemu-system-x86_64 \(make peers\)$"):
        in_guest.vhost_net(PLAN)
    monkeypatch.setattr(in_guest, "ROOT", Path("/nowhere"))
    with pytest.raises(LocalError, match="needs the checkout"):
        in_guest.vhost_net(PLAN)


def test_a_tap_that_takes_nothing() -> None:
    """No frames have no cost: that is an error and not a zero."""
    meter = vhost_net.Meter("no-such-tap", [])
    with pytest.raises(LocalError, match="took no frame"):
        meter.cost()


def test_cost_of_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the threads named the processor time between two looks, over the frames between them."""
    looks = iter([(1_000, 10), (5_000, 14)])

    def now(meter: vhost_net.Meter) -> tuple[int, int]:
        del meter
        return next(looks)

    monkeypatch.setattr(vhost_net.Meter, "_now", now)
    assert vhost_net.Meter("tap", [1]).cost() == 1000.0  # noqa: PLR2004 - 4,000 ns, 4 frames


def test_no_device_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the kernel has no vhost-net, that is said, and what to do."""
    monkeypatch.setattr(vhost_net, "DEVICE", Path("/nowhere"))
    assert vhost_net.main([]) == 1
    assert capsys.readouterr().err == "vhost-net: no /nowhere: load the module vhost_net\n"


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--seconds", "0"], ["--case", "65"]])
def test_refuses(arguments: list[str]) -> None:
    """What makes no sense is refused before anything is made."""
    with pytest.raises(SystemExit):
        vhost_net.parse(arguments)
