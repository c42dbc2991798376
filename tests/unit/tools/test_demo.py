"""The demo, run for a second: it counts, it reports what is wrong, and it leaves nothing behind however it ends."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from tests.helpers import PATIENCE, command_line, descendants, process_alive, segment_names, wait_until
from vhostmp.cli import EXIT_INTERRUPTED, EXIT_MISTAKE, main
from vhostmp.errors import LocalError
from vhostmp.tools import _board, _guest, demo, demo_plot, demo_stage
from vhostmp.tools.demo_backend import FLAG_HOLD, FLAGS_AT, PythonLoopback
from vhostmp.tools.demo_stage import Stage
from vhostmp.tools.guest import Layout

KEYS: Final = [
    *("packets", "lost", "duplicated", "reordered", "swaps", "memory_moves"),
    *("restarts", "pause_us", "grace_us", "kill"),
]
#: However busy the machine: with `--seconds 1` it takes two or three.
LONGEST: Final = 240
ROOT: Final = Path(__file__).parents[3]
FAULTY: Final = """
from vhostmp.tools.demo_backend import PythonLoopback

class Loses(PythonLoopback):
    def transmit(self, queue, packets):
        super().transmit(queue, packets[1:])

class Repeats(PythonLoopback):
    def transmit(self, queue, packets):
        super().transmit(queue, packets)
        super().transmit(queue, packets[-1:])

class Reorders(PythonLoopback):
    def transmit(self, queue, packets):
        super().transmit(queue, packets[::-1])

class Damages(PythonLoopback):
    def transmit(self, queue, packets):
        super().transmit(queue, packets[1:])
        self._frames[queue].append(bytes(packets[0][:-1]) + b"?")
"""


def command(*words: str) -> list[str]:
    """Return the command line of a demo."""
    return [sys.executable, "-m", "vhostmp", "demo", *words]


@pytest.mark.slow
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_json(ring: str) -> None:
    """--json prints one object with the agreed keys and nothing else; a second of the demo leaves nothing wrong."""
    done = subprocess.run(
        command("--seconds", "1", "--json", "--ring", ring),
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert list(found) == KEYS
    assert {name: found[name] for name in ("lost", "duplicated", "reordered", "restarts")} == {
        "lost": 0,
        "duplicated": 0,
        "reordered": 0,
        "restarts": 1,
    }
    assert found["packets"] > 0
    assert found["swaps"] > 0
    assert list(found["pause_us"]) == list(found["grace_us"]) == ["p50", "p99", "max"]
    assert 0 < found["pause_us"]["p50"] <= found["pause_us"]["p99"] <= found["pause_us"]["max"]
    assert list(found["kill"]) == ["lost", "duplicated"]


@pytest.mark.slow
def test_table_and_progress_with_two_workers() -> None:
    """Without a terminal progress is whole lines; the table has a line for each number and one for the kill."""
    words = command("--seconds", "1", "--workers", "2")
    done = subprocess.run(words, capture_output=True, text=True, timeout=LONGEST, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert rows == [
        *("packets", "lost", "duplicated", "reordered", "swaps", "memory moves"),
        *("pause", "grace period", "restarts", "the kill"),
    ]
    assert "\r" not in done.stderr
    assert "0 wrong" in done.stderr


@pytest.fixture
def running() -> Iterator[tuple[subprocess.Popen[str], set[int]]]:
    """Start a demo in a session of its own; yield it and the processes it has started, once its guest has."""
    process = subprocess.Popen(
        command("--seconds", "60"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        assert "packets" in process.stderr.readline()
        children = descendants(process.pid)
        assert len(children) >= len(("spawner", "worker", "guest"))
        yield process, children
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def gone(process: subprocess.Popen[str], children: set[int]) -> bool:
    """Whether nothing of a demo is left."""
    names = [name for name in segment_names() if name.split(".")[2] == str(process.pid)]
    return not names and not any(process_alive(pid) for pid in children)


@pytest.mark.slow
def test_interrupt_ends_cleanly(running: tuple[subprocess.Popen[str], set[int]]) -> None:
    """Ctrl-C, which goes to every process of the group, ends the demo without a traceback and without remains."""
    process, children = running
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_INTERRUPTED
    assert "Traceback" not in errors
    assert gone(process, children)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["spawner", "guest"])
def test_interrupt_while_it_starts(moment: str) -> None:
    """Ctrl-C while processes start ends it as silently, and nothing is left of those."""
    process = subprocess.Popen(
        command("--seconds", "60"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    children: set[int] = set()

    def there() -> bool:
        children.update(descendants(process.pid))
        if moment == "spawner":
            return bool(children)
        guests = [pid for pid in children if "tools.guest" in command_line(pid)]
        assert all(os.getpgid(pid) != process.pid for pid in guests), "Ctrl-C reaches a guest that is not ready for it"
        return bool(guests)

    try:
        wait_until(there, what=moment)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == EXIT_INTERRUPTED
    assert "Traceback" not in errors
    wait_until(lambda: gone(process, children), what="the end of all processes")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_demo_leaves_nothing(running: tuple[subprocess.Popen[str], set[int]], number: signal.Signals) -> None:
    """A demo that is killed takes its guest, its spawner, its workers and every segment with it."""
    process, children = running
    process.send_signal(number)
    process.wait(PATIENCE)
    wait_until(lambda: gone(process, children), what="nothing of the demo is left")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("Loses", "lost"), ("Repeats", "duplicated"), ("Reorders", "reordered"), ("Damages", "corrupted")],
)
def test_faulty_backend_is_found_out(tmp_path: Path, name: str, kind: str) -> None:
    """A back-end that does one thing wrong in each batch makes the demo fail, for that reason."""
    path = tmp_path / "faulty.py"
    path.write_text(FAULTY)
    with Stage() as stage:
        spec = f"python:{path}:{name}"
        report = demo.perform(stage, 1.0, acts=[lambda: stage.swap(spec), lambda: stage.wait_for_packets(1000)])
    assert any(f"packets {kind}" in problem for problem in report.problems), report.problems
    if kind != "corrupted":
        assert getattr(report, kind) > 0
    assert (report.lost > 0) == (kind in ("lost", "corrupted"))


@pytest.mark.slow
def test_kill_under_load_is_survived() -> None:
    """After the kill another worker goes on, whatever the back-end, and what went wrong is the kill's alone."""
    for spec in demo_stage.BACKENDS:
        with Stage() as stage:
            report = demo.perform(stage, 1.0, acts=[lambda: stage.swap(spec)])  # noqa: B023 - called in this round
        assert report.problems == ()
        assert report.restarts == 1


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_all_sizes_of_frames_survive(packed: bool) -> None:
    """Frames from 48 to 1514 bytes, some in pieces by way of indirect tables, survive swaps and moves."""
    with Stage(layout=Layout(packed=packed), sizes=(48, 1514)) as stage:
        acts = [lambda: stage.swap(demo_stage.PYTHON), stage.move, lambda: stage.swap(demo_stage.LOOPBACK), stage.move]
        report = demo.perform(stage, 10.0, acts=acts * 3)
    assert report.problems == ()
    assert report.memory_moves == len("ab") * 3
    assert bool(stage.features >> _guest.F_RING_PACKED & 1) == packed


@pytest.mark.slow
def test_stray_write_is_found_out() -> None:
    """One byte written to the old place of the memory after it was poisoned is found before the place is used again."""
    with Stage() as stage:

        def stray() -> None:
            stage.spare.buf[12345] = 0

        report = demo.perform(stage, 10.0, acts=[stage.move, stray, stage.move])
    assert report.problems == ("old guest memory was written to after 1 memory moves",)


def report_of(**changes: Any) -> demo.Report:
    """Make a report of a good run, with changes."""
    times = demo_stage.Quantiles(1.0, 2.0, 3.0)
    return attrs.evolve(demo.Report(5_000_000, 0, 0, 0, 1200, 40, 1, times, times, 3, 4, 12.0), **changes)


def test_report() -> None:
    """A report says the same as JSON and as a table."""
    report = report_of()
    assert report.to_json()["kill"] == {"lost": 3, "duplicated": 4}
    assert report.to_json()["pause_us"] == {"p50": 1.0, "p99": 2.0, "max": 3.0}
    assert "5,000,000" in report.to_table()
    assert "lost 3, duplicated 4" in report.to_table().splitlines()[-1]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([], (0.0, 0.0, 0.0)),
        ([7.0], (7.0, 7.0, 7.0)),
        ([float(n) for n in range(1, 101)], (50.0, 99.0, 100.0)),
        ([float(n) for n in range(1000, 0, -1)], (500.0, 990.0, 1000.0)),
    ],
)
def test_quantiles_are_nearest_ranks(values: Sequence[float], wanted: tuple[float, float, float]) -> None:
    """Median, 99th percentile and maximum are values that were measured."""
    assert attrs.astuple(demo_stage.Quantiles.of(values)) == wanted


def test_python_loopback_keeps_order_and_pairs_apart() -> None:
    """Each queue pair gets its own frames back, in order, as many at a time as it has room for; views are not kept."""
    loop = PythonLoopback()
    frames = [_board.make_frame(number, 0, 0, 64) for number in range(10)]
    views = [memoryview(frame) for frame in frames]
    loop.transmit(0, views[:6])
    loop.transmit(1, views[6:])
    for view in views:
        view.release()
    assert loop.receive(0, 4) == frames[:4]
    assert loop.receive(0, 4) == frames[4:6]
    assert loop.receive(1, 64) == frames[6:]
    assert loop.receive(1, 64) == []


def test_python_loopback_dwells_on_marked_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose first frame is marked is dwelt on before it is copied, another one is not."""
    dwells: list[float] = []
    monkeypatch.setattr("time.sleep", dwells.append)
    marked = _board.make_frame(1, 0, FLAG_HOLD, 64)
    assert marked[FLAGS_AT] == FLAG_HOLD
    loop = PythonLoopback()
    loop.transmit(0, [memoryview(_board.make_frame(0, 0, 0, 64))])
    assert not dwells
    loop.transmit(0, [memoryview(marked)])
    assert len(dwells) == 1
    loop.transmit(0, [memoryview(bytes(14))])
    assert len(dwells) == 1


@pytest.mark.parametrize("words", [["--seconds", "0"], ["--seconds", "x"], ["--workers", "65"], ["--workers", "1.5"]])
def test_bad_arguments(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake on the command line ends with status 2 and one line."""
    assert main(["demo", *words]) == EXIT_MISTAKE
    assert len(capsys.readouterr().err.splitlines()) == 1


def _find_nothing(_: str) -> None:
    """Find no module."""


def test_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without matplotlib --plot ends at once, in one line that says how to get it."""
    monkeypatch.setattr("importlib.util.find_spec", _find_nothing)
    assert main(["demo", "--plot", "x.png"]) == EXIT_MISTAKE
    assert capsys.readouterr().err == f"vhostmp: --plot needs matplotlib: {sys.executable} -m pip install matplotlib\n"


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.parametrize(("name", "message"), [("x.txt", "must end in"), ("none/x.png", "there is no directory")])
def test_plot_that_cannot_be_written(tmp_path: Path, name: str, message: str) -> None:
    """A plot that could not be written is refused before the demo runs."""
    with pytest.raises(LocalError, match=message):
        demo_plot.check(str(tmp_path / name))


@pytest.mark.slow
def test_plot(tmp_path: Path) -> None:
    """A picture of the run is written."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "demo.png"
    words = command("--seconds", "1", "--json", "--plot", str(path))
    subprocess.run(words, capture_output=True, timeout=LONGEST, check=True, cwd=ROOT)
    assert path.read_bytes().startswith(b"\x89PNG")
