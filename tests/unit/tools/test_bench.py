"""The benchmarks' arithmetic and machinery, on made-up windows and a made-up testpmd: no DPDK, no root."""

from __future__ import annotations

import argparse
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

import attrs
import pytest

from tests.helpers import PATIENCE, process_alive, wait_until
from vhostmp import cli
from vhostmp.errors import LocalError
from vhostmp.tools._probe import PingPong, copy_loop, section_loop, write_loop
from vhostmp.tools.bench import (
    cases,
    command,
    devices,
    host,
    measures,
    placement,
    programs,
    report,
    rounds,
    runner,
    sides,
)
from vhostmp.tools.bench.cases import CASES, QUICK, choose
from vhostmp.tools.bench.figures import Figure, number, percentile
from vhostmp.tools.bench.rounds import PeerCost, Result, Round, Window, Work, evaluate

NEAR: Final = 100.0
MIDDLE: Final = 250.0
FAR: Final = 400.0
CASE: Final = CASES[0]

FAKE_TESTPMD: Final = """#!{python}
import sys, time
print("EAL: whatever", flush=True)
sys.stdout.write("testpmd> "); sys.stdout.flush()
for line in sys.stdin:
    sys.stdout.write(line)  # as its command line does
    if line.strip() == "quit":
        break
    if line.strip() == "show port stats 0":
        print("  RX-packets: 12  RX-missed: 0")
        print("  Rx-pps:       1500000     Rx-bps: 1\\n  Tx-pps:   29000000   Tx-bps: 2")
    if line.strip() == "show fwd stats all":
        print("  CPU cycles/packet=52.00 (busy cycles=1 / total TX packets=2) at 2600 MHz Clock")
    if line.strip() == "fail":
        print("port 0 has gone"); sys.exit(3)
    sys.stdout.write("testpmd> "); sys.stdout.flush()
"""


DRAW: Final = """
import sys
from pathlib import Path
import attrs
from vhostmp.tools.bench.cases import CASES
from vhostmp.tools.bench.report import Report
from vhostmp.tools.bench.rounds import Round, Window, evaluate

rounds = [Round([Window(25.0, 99.0, 99.0)], [Window(20.0, 99.0, 99.0)])]
made = Report([evaluate(attrs.evolve(CASES[0], goal=goal), rounds) for goal in (0.0, 2.0)], [], [], {}, 1)
for path in sys.argv[1:]:
    made.plot(Path(path))
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
    assert bad.placement == rounds.DROPPED
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
    assert (found["mpps"], found["peer_mpps"], found["ratio"], found["wall_ns_per_packet"]) == (25.0, 20.0, 1.25, 40.0)
    assert found["ns_per_packet"] is None  # nobody has said how long it was busy


def test_busy_time_is_that_of_the_back_end() -> None:
    """Nanoseconds a packet are the back-end's busy ones over what the front-end counted; duty and batch beside them."""
    work = Work(busy_ns=30_000_000, seconds=0.1, packets=2_400_000, batches=60_000)
    found = result(Round([attrs.evolve(window(20.0), work=work)], [window(20.0)])).to_json()
    assert (found["ns_per_packet"], found["duty"], found["batch"]) == (15.0, 0.3, 40.0)


def test_first_look_takes_what_there_is() -> None:
    """Where all windows are disturbed a first look has a result nevertheless, which says so."""
    disturbed = [Round([window(10.0, waited_ms=50.0)], [Window(20.0, NEAR, FAR)])]
    assert evaluate(CASE, disturbed) is None
    found = evaluate(CASE, disturbed, disturbed=True)
    assert found is not None
    assert (found.ratio.median, found.placement, found.rounds) == (0.5, rounds.DISTURBED, 1)
    assert evaluate(CASE, [Round([], [])], disturbed=True) is None


def test_goals_are_met_or_missed() -> None:
    """A case's ratio, its processor time against DPDK's, and a measure's bound are held against what was found."""
    case = attrs.evolve(CASE, goal=1.05, cost_goal=0.25)
    work = Work(busy_ns=50_000_000, seconds=0.1, packets=1, batches=1)
    good = evaluate(case, [Round([attrs.evolve(window(21.0), work=work)], [window(20.0)])])
    assert good is not None
    assert [goal.met for goal in good.beside([PeerCost(100.0, MIDDLE, MIDDLE)]).goals()] == [True, True]
    bad = evaluate(case, [Round([attrs.evolve(window(20.0), work=work)], [window(20.0)])])
    assert bad is not None
    bad = bad.beside([PeerCost(50.0, MIDDLE, MIDDLE)])
    assert [goal.met for goal in bad.goals()] == [False, False]
    figure = Figure("start", "until ready", 250.0, "ms", bound=300.0)
    made = report.Report([bad], [figure], [], {}, 1)
    assert [goal["met"] for goal in made.to_json()["goals"]] == [False, False, True]
    assert "1 of 3 are met." in made.markdown()
    assert "MISSED" in made.text()


def test_costs_a_packet_have_goals() -> None:
    """A bound on nanoseconds a packet is held against the busy time, one on bits against the rate."""
    work = Work(busy_ns=10_000_000, seconds=0.1, packets=100, batches=2)
    case = attrs.evolve(CASE, goal=0.0, cost_goal=0.0, ns_goal=10.0, gigabits_goal=5.0)
    found = evaluate(case, [Round([attrs.evolve(window(10.0), work=work)], [window(20.0)])])
    assert found is not None
    assert [round(goal.value, 2) for goal in found.goals()] == [5.12, 10.0]
    assert [goal.met for goal in found.goals()] == [True, True]
    assert "batches of 50" in found.goals()[1].text


def test_measures_are_chosen_by_name() -> None:
    """A measure is chosen by name or pattern; of a first look are those that take little time."""
    assert [one.name for one in measures.choose(["round-*"], quick=False)] == ["round-trip", "round-trip-event"]
    assert {one.name for one in measures.choose(["*"], quick=True)} == {"start", "idle", "section"}
    assert measures.choose(["null"], quick=False) == []


def test_section_is_a_time() -> None:
    """So many sections take some time, and more of them more."""
    for waits in (False, True):
        few, many = (min(section_loop(count, waits) for _ in range(5)) for count in (1000, 1_000_000))
        assert 0 < few < many


def test_percentiles() -> None:
    """The time that a share did not exceed is found, to within the width of its word."""
    times = [0] * 2560
    for nanoseconds in range(1, 101):
        times[nanoseconds] = 1
    assert (percentile(times, 50), percentile(times, 99), percentile(times, 100)) == (50.0, 99.0, 100.0)
    assert percentile([0] * 2560, 50) == 0.0


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123")])
def test_numbers_have_three_digits(value: float, text: str) -> None:
    """Whatever its size, a number is written with three digits."""
    assert number(value) == text


def test_nothing_through_is_no_division() -> None:
    """A side that moved no packet is reported as such."""
    found = result(Round([window(0.0)], [window(20.0)]))
    assert found.to_json()["wall_ns_per_packet"] is None
    assert "| - |" in report.Report([found], [], [], {}, 1).markdown()


def test_document_is_updated_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what stands between the marks is replaced, however often."""
    path = tmp_path / "performance.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    made = report.Report([result(Round([window(25.0)], [window(20.0)]))], [], ["tap-64: no tap"], {"kernel": "6"}, 5)

    def plot(made: report.Report, path: Path) -> None:
        drawn.append(path)

    drawn: list[Path] = []
    monkeypatch.setattr(report.Report, "plot", plot)
    for _ in range(2):
        made.update(path)
        text = path.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\n")
        assert text.endswith(f"{report.END}\nafter\n")
        assert "old" not in text
        assert "| 1.25 [1.25-1.25] |" in text
        assert "- tap-64: no tap\n" in text
        assert f"]({report.PLOT})" in text
        assert "| kernel | 6 |" in text
    assert drawn == [tmp_path / report.PLOT] * 2


def test_picture_is_drawn(tmp_path: Path) -> None:
    """The ratios are drawn, a goal too, the same picture for the same numbers; what cannot be written is one line."""
    pytest.importorskip("matplotlib")
    paths = [str(tmp_path / name) for name in ("a.svg", "b.svg", "nowhere/a.svg")]
    # In a process of its own: matplotlib keeps its fonts open.
    done = subprocess.run([sys.executable, "-c", DRAW, *paths], capture_output=True, text=True, check=False)
    assert "LocalError: cannot write" in done.stderr.splitlines()[-1]
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()


def test_document_without_marks_is_left_alone(tmp_path: Path) -> None:
    """A file that has no place for results is refused and not touched."""
    path = tmp_path / "performance.md"
    path.write_text("prose\n")
    with pytest.raises(LocalError, match="has no lines"):
        report.Report([], [], [], {}, 5).update(path)
    assert path.read_text() == "prose\n"


def test_repository_document_has_its_marks() -> None:
    """`make bench ARGS=--update` finds its place in docs/performance.md."""
    text = command.DOCUMENT.read_text()
    assert text.index(report.BEGIN) < text.index(report.END)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["null"], ["null-64", "null-512", "null-1500"]),
        (["null-64", "tap"], ["null-64", "tap-64", "tap-1500"]),
        (["loop*-512"], ["loopback-512"]),
        (["nil"], []),
    ],
)
def test_choose(names: list[str], chosen: list[str]) -> None:
    """Cases are chosen by name, by name and size, or by pattern."""
    assert [case.title for case in choose(names, ["split"])] == chosen


def test_table_of_cases_is_sound() -> None:
    """Each case has a title of its own and a peer with a name; what a first look is made of exists."""
    titles = [case.title for case in CASES]
    assert len(set(titles)) == len(titles)
    assert set(QUICK) <= set(titles)
    assert {case.peer for case in CASES} == set(cases.PEERS)
    assert [case.title for case in cases.quick(["*"])] == list(QUICK)
    assert not [case for case in cases.quick(["*"]) if case.goal]  # two rounds show no goal met
    assert not next(case for case in CASES if case.title == QUICK[0]).needs_dpdk


def parse(*words: str) -> argparse.Namespace:
    """Read a command line."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_ring_formats() -> None:
    """--ring chooses the format of the virtqueues, or each case has its own; the table says which it was."""
    found = command.chosen(parse("--case", "null-64")).cases
    assert [(case.title, case.ring_format) for case in found] == [("null-64", "split"), ("null-64", "packed")]
    assert [case.ring_format for case in command.chosen(parse("--case", "tap-64")).cases] == ["split"]
    assert [case.ring_format for case in command.chosen(parse("--case", "null-64", "--ring", "packed")).cases] == [
        "packed"
    ]
    packed = evaluate(found[1], [Round([window(25.0)], [window(20.0)])])
    assert packed is not None
    assert packed.to_json()["ring_format"] == "packed"
    assert "| 1024 packed |" in report.Report([packed], [], [], {}, 1).markdown()


def test_cases_said_one_by_one() -> None:
    """--case and --ring given several times mean all that they name; without any, all cases."""
    one_by_one = parse("--case", "null-64", "--case", "copy-64", "--ring", "split", "--ring", "packed")
    assert command.chosen(one_by_one) == command.chosen(parse("--case", "null-64", "copy-64"))
    assert len(command.chosen(parse()).cases) > len(command.chosen(one_by_one).cases)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--case", "nil"], "no case is called nil"),
        (["--case", "copy", "--quick"], "no case is called copy in --quick"),
        (["--rounds", "-1"], "choose 1 or more"),
        (["--quick", "--update"], "--update wants real results"),
        (["--plot", "/nowhere/a.svg"], "no directory /nowhere"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake on the command line ends with status 2 and a line that says what is wrong."""
    assert cli.main(["bench", *words]) == len("xx")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]


def test_missing_peer_skips(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without testpmd what needs it is skipped with a line that says how to get it; with nothing left, status 1."""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cli.main(["bench", "--quick", "--json", "--case", "null-64", "loop-64"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["cases"] == []
    assert len(found["skipped"]) == len(["null-64", "loop-64"])
    assert all("apt-get install" in line for line in found["skipped"])


@pytest.mark.parametrize(
    ("case", "dpdk", "reason"),
    [("null-64", "no DPDK", "no DPDK"), ("memory-64", "no DPDK", ""), ("tap-64", "no DPDK", "needs root")],
)
def test_obstacles(case: str, dpdk: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a case lacks here is said, and of what it does not need nothing is said."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert sides.obstacle(choose([case])[0], dpdk=dpdk).startswith(reason)
    assert bool(sides.obstacle(choose([case])[0], dpdk=dpdk)) is bool(reason)


def test_no_round_is_begun_without_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case stops before a round that would not fit into what is left."""
    monkeypatch.setattr(sides, "opened", None)  # nothing is started
    case = choose(["null-64"])[0]
    plan = sides.Plan(placement.Cores(0, 1), fifo=False, deadline=time.monotonic() + runner.DPDK_ROUND_SECONDS - 1)
    assert runner.run_case(case, plan, print) == []


def test_a_first_look_ends_in_time() -> None:
    """Whatever hangs is left when the last second has come, and what it held is given back."""
    given_back: list[bool] = []

    def hang() -> None:
        with command.limited(0.3):
            try:
                time.sleep(PATIENCE)
            finally:
                given_back.append(True)

    with pytest.raises(command.OutOfTime):
        hang()
    assert given_back
    with command.limited(PATIENCE):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_ping_pong_needs_two() -> None:
    """A partner that goes away in the middle is noticed, at whatever round: nobody waits for ever."""
    game = PingPong()
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(game.answer(100_000, 0.3)))
    thread.start()
    game.ask(10, PATIENCE)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert answers == [False]


def test_copy_loop_copies() -> None:
    """Copies are counted for as long as was asked for; what makes no sense is refused."""
    done, nanoseconds = copy_loop(64, 128, 16, 0.01)
    assert done > 0
    assert nanoseconds >= 10_000_000  # noqa: PLR2004 - the 0.01 s
    with pytest.raises(ValueError, match="128 bytes apart"):
        copy_loop(129, 128, 16, 0.01)


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
    """The yardstick's frame has the size asked for, and a type nobody takes."""
    made = devices.frame(64)
    assert len(made) == len(b"x" * 64)
    assert made[12:14] == b"\x88\xb5"


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
    with programs.Testpmd.front_end([Path("/s")], "txonly", 256, core) as testpmd:
        assert testpmd.rates() == {"Rx": 1.5e6, "Tx": 29e6}
        assert testpmd.ns_per_packet() == pytest.approx(20.0)
        assert testpmd.command("start")
        assert os.sched_getaffinity(testpmd.pid) == {core}
        pid = testpmd.pid
    assert not process_alive(pid)


@pytest.mark.usefixtures("fake_testpmd")
def test_testpmd_that_ends_is_noticed() -> None:
    """A testpmd that gives up is reported with its last words, at once."""
    with (
        programs.Testpmd.back_end([Path("/s")], "rxonly", min(os.sched_getaffinity(0))) as testpmd,
        pytest.raises(LocalError, match=r"ended with status 3: port 0 has gone"),
    ):
        testpmd.command("fail")


def test_missing_program_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that cannot be started is an error of one line."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LocalError, match="cannot start nothing"):
        programs.Program(["nothing"], 0)
