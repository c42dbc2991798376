"""The benchmarks' arithmetic and machinery, on made-up windows and a made-up testpmd: no DPDK, no root."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

import pytest

from tests.helpers import PATIENCE, process_alive, wait_until
from vhostmp.errors import LocalError
from vhostmp.tools._probe import PingPong, write_loop
from vhostmp.tools.bench import __main__ as bench
from vhostmp.tools.bench import cases, host, placement, programs, report, tap
from vhostmp.tools.bench.cases import CASES, Result, Round, Window, evaluate

NEAR: Final = 100.0
MIDDLE: Final = 250.0
FAR: Final = 400.0
CASE: Final = CASES[0]

FAKE_TESTPMD: Final = """#!{python}
import sys, time
print("EAL: whatever", flush=True)
sys.stdout.write("testpmd> "); sys.stdout.flush()
for line in sys.stdin:
    if line.strip() == "quit":
        break
    if line.strip() == "show port stats 0":
        print("  RX-packets: 12  RX-missed: 0")
        print("  Rx-pps:       1500000     Rx-bps: 1\\n  Tx-pps:   29000000   Tx-bps: 2")
    if line.strip() == "fail":
        print("port 0 has gone"); sys.exit(3)
    sys.stdout.write("testpmd> "); sys.stdout.flush()
"""


def window(mpps: float, distance: float = MIDDLE, waited_ms: float = 0.0) -> Window:
    """Make a window in which the cores did not move."""
    return Window(mpps, distance, distance, waited_ms)


def result(*rounds: Round) -> Result:
    """Evaluate rounds that must come to something."""
    found = evaluate(CASE, rounds)
    assert found is not None
    return found


def test_ratio_is_taken_inside_rounds() -> None:
    """Two slow rounds and a fast one: the ratio is the median of the rounds' ratios, not the ratio of medians."""
    found = result(
        Round([window(10.0)], [window(20.0)]),
        Round([window(18.0)], [window(20.0)]),
        Round([window(40.0)], [window(40.0)]),
    )
    assert (found.ratio.low, found.ratio.median, found.ratio.high) == (0.5, 0.9, 1.0)
    assert found.mpps.text(0) == "18 [10-40]"
    assert found.rounds == len("abc")


def test_windows_of_different_placement_are_not_compared() -> None:
    """A round whose sides ran at different distances gives no ratio; the class with most rounds is reported."""
    found = result(
        Round([window(90.0, NEAR)], [window(10.0, FAR)]),
        Round([window(10.0, FAR), window(90.0, NEAR)], [window(20.0, FAR)]),
        Round([window(30.0, FAR)], [window(30.0, FAR)]),
    )
    assert found.placement == "far"
    assert found.rounds == len("ab")
    assert (found.ratio.low, found.ratio.high) == (0.5, 1.0)


@pytest.mark.parametrize("bad", [Window(99.0, NEAR, FAR), window(99.0, waited_ms=6.0)], ids=["moved", "taken"])
def test_disturbed_windows_are_dropped(bad: Window) -> None:
    """A window in which the cores moved, or were taken by others, counts for nothing but the number of dropped ones."""
    assert bad.placement == cases.DROPPED
    found = result(Round([window(10.0), bad], [window(20.0)]))
    assert found.ratio.median == pytest.approx(0.5)
    assert found.dropped == 1
    assert evaluate(CASE, [Round([bad], [window(20.0)])]) is None


def test_json_has_what_was_asked_for() -> None:
    """The JSON object of a case has the agreed keys, and the numbers follow from each other."""
    found = result(Round([window(25.0)], [window(20.0)])).to_json()
    wanted = {"case", "size", "ring", "mpps", "peer", "peer_mpps", "ratio", "ns_per_packet", "placement"}
    assert wanted <= set(found)
    assert (found["case"], found["size"], found["ring"], found["placement"]) == ("null", 64, 1024, "middle")
    assert (found["mpps"], found["peer_mpps"], found["ratio"], found["ns_per_packet"]) == (25.0, 20.0, 1.25, 40.0)


def test_nothing_through_is_no_division() -> None:
    """A side that moved no packet is reported as such."""
    found = result(Round([window(0.0)], [window(20.0)]))
    assert found.to_json()["ns_per_packet"] is None
    assert "| - |" in report.Report([found], [], {}, 1).table()


def test_document_is_updated_between_its_marks(tmp_path: Path) -> None:
    """Only what stands between the marks is replaced, however often."""
    path = tmp_path / "performance.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    made = report.Report([result(Round([window(25.0)], [window(20.0)]))], ["tap-64: no tap"], {"kernel": "6"}, 5)
    for _ in range(2):
        made.update(path)
        text = path.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\n")
        assert text.endswith(f"{report.END}\nafter\n")
        assert "old" not in text
        assert "**1.25**" in text
        assert "Skipped: tap-64: no tap." in text
        assert "| kernel | 6 |" in text


def test_document_without_marks_is_left_alone(tmp_path: Path) -> None:
    """A file that has no place for results is refused and not touched."""
    path = tmp_path / "performance.md"
    path.write_text("prose\n")
    with pytest.raises(LocalError, match="has no lines"):
        report.Report([], [], {}, 5).update(path)
    assert path.read_text() == "prose\n"


def test_repository_document_has_its_marks() -> None:
    """`make bench ARGS=--update` finds its place in docs/performance.md."""
    text = bench.DOCUMENT.read_text()
    assert text.index(report.BEGIN) < text.index(report.END)


@pytest.mark.parametrize(
    ("names", "quick", "chosen"),
    [
        (["null"], False, ["null-64", "null-512", "null-1500"]),
        (["null", "tap"], True, ["null-64", "tap-64"]),
        (["*-1500"], False, ["null-1500", "loopback-1500", "tap-1500"]),
        (["loopback-512"], True, []),
        (["nil"], False, []),
    ],
)
def test_choose(names: list[str], quick: bool, chosen: list[str]) -> None:
    """Cases are chosen by name, by name and size, or by pattern; --quick leaves the 64-byte ones."""
    assert [case.title for case in bench.choose(names, quick=quick)] == chosen


def test_ring_formats() -> None:
    """--ring chooses the format of the virtqueues, or both; the front-end is told, the table says which."""
    args = bench.parse(["--case", "null", "--quick", "--ring", "split", "packed"])
    assert [(case.title, case.ring_format) for case in args.cases] == [("null-64", "split"), ("null-64", "packed")]
    assert [case.ring_format for case in bench.parse(["--case", "tap", "--quick"]).cases] == ["split"]
    found = evaluate(args.cases[1], [Round([window(25.0)], [window(20.0)])])
    assert found is not None
    assert found.to_json()["ring_format"] == "packed"
    assert "| 1024 packed |" in report.Report([found], [], {}, 1).table()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--case", "nil"], "no case is called nil"),
        (["--rounds", "-1"], "choose 1 or more"),
        (["--ring", "round"], "invalid choice: 'round'"),
        (["--quick", "--update"], "--update wants real results"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake on the command line ends with status 2 and a line that says what is wrong."""
    with pytest.raises(SystemExit) as end:
        bench.parse(words)
    assert end.value.code == len("xx")
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_missing_peer_skips(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without testpmd every case is skipped with a line that says how to get it, and the status is 1."""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert bench.main(["--quick", "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["cases"] == []
    assert len(found["skipped"]) == len([case for case in CASES if case.size == bench.QUICK_SIZE])
    assert all("apt-get install" in line for line in found["skipped"])


def test_ping_pong() -> None:
    """Two threads bounce a word as often as asked; the round trip is a time; a missing partner is noticed."""
    game = PingPong()
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(game.answer(2000, PATIENCE)))
    thread.start()
    distance = game.ask(2000, PATIENCE)
    thread.join(PATIENCE)
    assert answers == [True]
    assert 1 < distance < PATIENCE * 1e9
    assert PingPong().ask(2000, 0.01) == 0.0
    assert PingPong().answer(2000, 0.01) is False


def test_write_loop_counts() -> None:
    """Every write that goes through is counted, a full pipe too, and an error is raised as what it is."""
    reader, writer = os.pipe2(os.O_NONBLOCK)
    frame = bytes(1000)
    done, full, nanoseconds = write_loop(writer, frame, 0.01)
    assert nanoseconds >= 10_000_000  # noqa: PLR2004 - the 0.01 s
    assert full > 0
    got = 0
    while True:
        try:
            got += len(os.read(reader, 1 << 20))
        except BlockingIOError:
            break
    assert got == done * len(frame)
    os.close(writer)
    os.close(reader)
    with pytest.raises(OSError, match="Bad file descriptor"):
        write_loop(writer, frame, 0.01)


def test_tap_frame_is_no_protocols() -> None:
    """The yardstick's frame has the size asked for behind its empty header, and a type nobody takes."""
    made = tap.frame(64)
    assert len(made) == tap.HEADER_BYTES + 64
    assert made[: tap.HEADER_BYTES] == bytes(tap.HEADER_BYTES)
    assert made[tap.HEADER_BYTES + 12 :][:2] == b"\x88\xb5"


@pytest.fixture
def fake_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the kernel's huge page files elsewhere: 100 pages, 10 of them free."""
    (tmp_path / "nr_hugepages").write_text("100\n")
    (tmp_path / "free_hugepages").write_text("10\n")
    monkeypatch.setattr(host, "PAGES", tmp_path)
    return tmp_path


def test_huge_pages_are_given_back(fake_pages: Path) -> None:
    """What is missing is asked for on top of what there is; afterwards there is as much as before."""
    (fake_pages / "free_hugepages").write_text("64\n")
    with host.huge_pages(64 * host.PAGE_MEGABYTES):
        assert (fake_pages / "nr_hugepages").read_text() == "100\n"
    with (
        pytest.raises(LocalError, match="64 free huge pages"),
        host.huge_pages(70 * host.PAGE_MEGABYTES),
    ):
        pytest.fail("there are not so many")
    assert (fake_pages / "nr_hugepages").read_text() == "100\n"


def test_huge_pages_need_rights(fake_pages: Path) -> None:
    """Where they cannot be had the error says what to do."""
    (fake_pages / "nr_hugepages").unlink()
    with pytest.raises(LocalError, match="be root"), host.huge_pages(2):
        pytest.fail("they cannot be had")


def test_host_facts_are_all_there() -> None:
    """Every fact has a value, whatever the machine."""
    facts = host.facts(fifo=False)
    assert {"processor", "kernel", "python", "dpdk", "priority"} <= set(facts)
    assert all(facts.values())


def test_busiest_thread_is_found() -> None:
    """Of a process's threads the one that computes is found, and the process that descends from another one."""
    with subprocess.Popen(
        [sys.executable, "-c", "import subprocess,sys; subprocess.run([sys.executable,'-c','while 1: pass'])"]
    ) as process:
        try:
            child = wait_until(lambda: placement.children_of(process.pid), what="a child")[0]
            before = placement.all_ticks([process.pid, child])
            wait_until(lambda: placement.processor_ticks(child, child) > before[child, child], what="it computes")
            assert placement.busiest_thread([process.pid, child], before) == (child, child)
        finally:
            for pid in placement.children_of(process.pid):
                os.kill(pid, 9)
            process.wait(PATIENCE)
    with pytest.raises(LocalError, match="has ended"):
        placement.busiest_thread([process.pid], {})


def test_priorities_are_taken_back() -> None:
    """After a measurement everybody has the priority from before, also when it fails."""
    with pytest.raises(ZeroDivisionError), placement.measuring([threading.get_native_id()], []):
        _ = 1 / 0
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.fixture
def fake_testpmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program called dpdk-testpmd in front of the path."""
    program = tmp_path / "dpdk-testpmd"
    program.write_text(FAKE_TESTPMD.replace("{python}", sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("fake_testpmd")
def test_testpmd_is_understood() -> None:
    """Rates are read from its statistics, and it ends when it is told to, on the core it was given."""
    core = min(os.sched_getaffinity(0))
    with programs.Testpmd.front_end(Path("/s"), "txonly", 256, core) as testpmd:
        assert testpmd.rates() == {"Rx": 1.5e6, "Tx": 29e6}
        assert testpmd.command("start")
        assert os.sched_getaffinity(testpmd.pid) == {core}
        pid = testpmd.pid
    assert not process_alive(pid)


@pytest.mark.usefixtures("fake_testpmd")
def test_testpmd_that_ends_is_noticed() -> None:
    """A testpmd that gives up is reported with its last words, at once."""
    with (
        programs.Testpmd.back_end(Path("/s"), "rxonly", min(os.sched_getaffinity(0))) as testpmd,
        pytest.raises(LocalError, match=r"ended with status 3: port 0 has gone"),
    ):
        testpmd.command("fail")


def test_missing_program_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that cannot be started is an error of one line."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LocalError, match="cannot start nothing"):
        programs.Program(["nothing"], 0)
