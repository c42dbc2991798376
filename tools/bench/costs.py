"""What is paid besides packets: swaps, idle servers, memory, start-up, more devices, greedy neighbours, safety."""

from __future__ import annotations

import importlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from vhostmp.errors import LocalError
from vhostmp.tools._probe import section_loop
from vhostmp.tools.bench import placement
from vhostmp.tools.bench.cases import RING_FORMATS
from vhostmp.tools.bench.figures import Figure, percentile
from vhostmp.tools.bench.flood import Flood, Spec
from vhostmp.tools.bench.insight import Insight
from vhostmp.tools.bench.programs import Serve, pollers_of
from vhostmp.tools.bench.sides import Plan, pinned
from vhostmp.tools.demo_stage import LOOPBACK, Quantiles, Stage

SWAPS: Final = 200
SWAP_PAUSE_SECONDS: Final = 0.005
PAUSE_BOUND_US: Final = 100.0
NO_SWAP: Final = "as long without a swap"
GRACE_BOUND_US: Final = 50.0
STARTS: Final = 7
READY_BOUND_MS: Final = 300.0
IDLE_SECONDS: Final = 2.0
#: After so long what still goes on is not the start any more.
SETTLE_SECONDS: Final = 10.0
WORKER_BOUND_MB: Final = 30.0
IDLE_DEVICES: Final = 1000
DEVICE_BOUND_KB: Final = 50.0
DEVICES: Final = (1, 2, 4, 16, 64)
WINDOW_SECONDS: Final = 0.3
QUIET_GAP_NS: Final = 1_000_000
QUIET_BOUND_US: Final = 200.0
#: Of a quiet device's packets that were due in a window, per cent, so many must come back in it.
QUIET_BACK_BOUND: Final = 90.0
LOG_WINDOWS: Final = 3
SECTIONS: Final = 1_000_000
SECTION_BOUND_NS: Final = 2.0


def swap(plan: Plan) -> list[Figure]:
    """Replace the back-end under full load, in the demo's setting; the guest says what it noticed.

    After each swap as much time passes without one: what a guest notices then is the machine's, not the swap's. Then
    the same from the worker's own processor, which it needs for a grace period to end.
    """
    del plan
    with Stage(seconds=60.0) as stage:
        stage.wait_for_packets(10_000)
        _swap(stage)
        apart = len(stage.swaps)
        pauses, rests = _pauses(stage)
        if stage.served:
            os.sched_setaffinity(0, stage.served)
            _swap(stage)
        stage.settle()
        counters = stage.counters()
        graces = Quantiles.of([one.grace_us for one in stage.swaps[:apart]])
        shared = [one.grace_us for one in stage.swaps[apart:]]
    wrong = sum(counters[name] for name in ("lost", "duplicated", "reordered", "corrupted"))
    what = f"packets lost, doubled, reordered or damaged in {apart + len(shared)} swaps"
    return [
        Figure("swap", what, wrong, "packets", bound=0.0),
        Figure("swap", "pause, median", pauses.p50, "us", peer=NO_SWAP, peer_value=rests.p50),
        Figure("swap", "pause, p99", pauses.p99, "us", peer=NO_SWAP, peer_value=rests.p99, bound=PAUSE_BOUND_US),
        Figure("swap", "grace period, median", graces.p50, "us"),
        Figure("swap", "grace period, p99", graces.p99, "us", bound=GRACE_BOUND_US),
        *_shared_graces(shared),
    ]


def _swap(stage: Stage) -> None:
    for _ in range(SWAPS):
        began = time.monotonic()
        stage.swap(LOOPBACK)
        took = time.monotonic() - began
        time.sleep(SWAP_PAUSE_SECONDS)
        stage.rest(took)
        time.sleep(SWAP_PAUSE_SECONDS)
    stage.wait_for_packets(1000)  # the guest enters a pause with what comes after it


def _pauses(stage: Stage) -> tuple[Quantiles, Quantiles]:
    """Return what the guest noticed of the swaps, and of the rests between them, microseconds."""
    found = [pause / 1e3 for pause in stage.pauses_ns()]
    if len(found) != 2 * len(stage.swaps):
        raise LocalError(f"the guest noticed {len(found)} of {2 * len(stage.swaps)} swaps and rests")
    return Quantiles.of(found[0::2]), Quantiles.of(found[1::2])


def _shared_graces(graces: Sequence[float]) -> list[Figure]:
    if not graces:
        return []
    times = Quantiles.of(graces)
    what = "grace period from the worker's processor"
    return [
        Figure("swap", f"{what}, median", times.p50, "us"),
        Figure("swap", f"{what}, p99", times.p99, "us", bound=GRACE_BOUND_US),
    ]


def start(plan: Plan) -> list[Figure]:
    """Start the server again and again, beside a bare interpreter that does nothing."""
    ours: list[float] = []
    bare: list[float] = []
    for _ in range(STARTS):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare.append((time.monotonic() - began) * 1e3)
        with _serve(plan) as server:
            ours.append(server.seconds * 1e3)
    value, peer = statistics.median(ours), statistics.median(bare)
    what = "until front-ends can connect"
    return [Figure("start", what, value, "ms", "an empty Python", peer, value / peer, bound=READY_BOUND_MS)]


def idle(plan: Plan) -> list[Figure]:
    """Look at a server with a device that nobody uses."""
    with _serve(plan) as server, Insight(server.pid, 1, 2) as insight:
        pids = _settled(server)
        before, switches = insight.counts().wakeups, _switches(pids)
        time.sleep(IDLE_SECONDS)
        woken, switched = insight.counts().wakeups - before, _switches(pids) - switches
        worker = largest_worker([_own_kilobytes(pid) / 1024 for pid in pids if _is_worker(pid)])
        control = _own_kilobytes(server.pid) / 1024
    seconds = f"in {IDLE_SECONDS:g} s"
    return [
        Figure("idle", f"wake-ups of workers {seconds}", woken, "times", bound=0.0),
        Figure("idle", f"wake-ups of all its processes {seconds}", switched, "times", bound=0.0),
        Figure("idle", "own memory of a worker", worker, "MB", bound=WORKER_BOUND_MB),
        Figure("idle", "own memory of the control process", control, "MB"),
    ]


def devices(plan: Plan) -> list[Figure]:
    """Look at a server with very many devices that nobody uses."""
    sizes: list[float] = []
    ready: list[float] = []
    for count in (1, IDLE_DEVICES):
        with _serve(plan, count) as server, Insight(server.pid, 1, 2) as insight:
            ready.append(server.seconds)
            sizes.append(_own_kilobytes(server.pid))
            pids = _settled(server)
            before, switches = insight.counts().wakeups, _switches(pids)
            time.sleep(IDLE_SECONDS)
            woken = insight.counts().wakeups - before + _switches(pids) - switches
    each, longer = (max(0.0, many - one) / (IDLE_DEVICES - 1) for one, many in (sizes, ready))
    return [
        Figure("devices", f"control process, each of {IDLE_DEVICES} idle devices", each, "KB", bound=DEVICE_BOUND_KB),
        Figure("devices", f"wake-ups of all processes in {IDLE_SECONDS:g} s", woken, "times", bound=0.0),
        Figure("devices", "start-up, each device", longer * 1e3, "ms"),
    ]


def scaling(plan: Plan) -> list[Figure]:
    """Drive more and more devices of two workers with one front-end: cost a packet, and what is carried."""
    figures: list[Figure] = []
    for count in DEVICES:
        with tempfile.TemporaryDirectory(prefix="vhostmp-bench-") as folder:
            paths = [Path(folder) / str(number) for number in range(count)]
            cores = plan.cores.backends(2)
            with (
                Serve(paths, LOOPBACK, cores, workers=2) as server,
                Insight(server.pid, 2, 2 * count) as insight,
                Flood(Spec([str(path) for path in paths], "loop", ring=256), plan.cores.frontend) as front,
            ):
                time.sleep(WINDOW_SECONDS)
                front.rates()
                before = insight.counts().busy_ns
                began = front.board.totals()["Rx"]
                time.sleep(WINDOW_SECONDS)
                busy = insight.counts().busy_ns - before
                packets = front.board.totals()["Rx"] - began
                mpps = front.rates()["Rx"] / 1e6
                each = front.board.each(count)
        if not packets:
            raise LocalError(f"no packet came back from {count} devices")
        what = f"{count} devices on 2 workers, {len(cores)} processors"
        figures += [
            Figure("scaling", f"{what}: carried", mpps, "Mpps", size=64),
            Figure("scaling", f"{what}: busy a packet", busy / packets, "ns", size=64),
            Figure("scaling", f"{what}: the device with least, of the mean", min(each) * count / sum(each), "x"),
        ]
    return figures


def fairness(plan: Plan) -> list[Figure]:
    """Flood one device, and send a packet a millisecond through another one of the same worker."""
    with tempfile.TemporaryDirectory(prefix="vhostmp-bench-") as folder:
        paths = [Path(folder) / name for name in ("greedy", "quiet")]
        spec = Spec([str(path) for path in paths], "loop", gap_ns=QUIET_GAP_NS, greedy=True)
        with Serve(paths, LOOPBACK, plan.cores.backend) as server, Flood(spec, plan.cores.frontend) as front:
            threads = [tid for _, tid in pollers_of((server, front))]
            with placement.measuring(threads if plan.fifo else [], []):
                # First those come back that were due while others had the processors. All in less than the 0.95 s of
                # each second that the kernel leaves to real-time priorities (sched(7), sched_rt_runtime_us).
                time.sleep(WINDOW_SECONDS / 3)
                before, began = front.board.times(), time.monotonic_ns()
                time.sleep(2 * WINDOW_SECONDS)
                times = [now - then for now, then in zip(front.board.times(), before, strict=True)]
                due = (time.monotonic_ns() - began) // QUIET_GAP_NS
            for program in (server, front):
                program.check()
    return quiet_figures(times, due)


def quiet_figures(times: Sequence[int], due: int) -> list[Figure]:
    """Judge a quiet device by the times of what came back (of a board) and by how many packets were `due` meanwhile.

    Packets that do not come back have no time: where too many are missing the percentiles are only those of the lucky
    ones, which meet no goal.
    """
    what, back = "quiet device beside a greedy one", 100 * sum(times) / due
    enough = back >= QUIET_BACK_BOUND
    of = "" if enough else f" of the {back:.0f} % that came back"
    figures = [Figure("fairness", f"{what}, came back", back, "%", bound=QUIET_BACK_BOUND, at_least=True, size=64)]
    if sum(times):
        bound = QUIET_BOUND_US if enough else None
        figures += [
            Figure("fairness", f"{what}, median{of}", percentile(times, 50) / 1e3, "us", size=64),
            Figure("fairness", f"{what}, p99{of}", percentile(times, 99) / 1e3, "us", bound=bound, size=64),
        ]
    return figures


def dirty_log(plan: Plan) -> list[Figure]:
    """Loop packets with the log of written pages on and off: busy time a packet."""
    pairs: list[tuple[float, float]] = []
    for number in range(plan.rounds):
        costs = {log: _loop_cost(plan, log=log) for log in ((True, False) if number % 2 else (False, True))}
        pairs.append((costs[True], costs[False]))
    value, peer = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    ratio = statistics.median(on / off for on, off in pairs)
    return [Figure("log", "busy a packet, log of written pages on", value, "ns", "log off", peer, ratio, size=64)]


def _loop_cost(plan: Plan, *, log: bool) -> float:
    """Return the busy time a packet of a loopback that is started for it, with the log of written pages or without."""
    with (
        tempfile.TemporaryDirectory(prefix="vhostmp-bench-") as folder,
        Serve([Path(folder) / "s"], LOOPBACK, plan.cores.backend) as server,
        Insight(server.pid, 1, 2) as insight,
        Flood(Spec([f"{folder}/s"], "loop", log=log), plan.cores.frontend) as front,
    ):
        return _least_cost(plan, server, front, insight)


def _least_cost(plan: Plan, server: Serve, front: Flood, insight: Insight) -> float:
    threads = [tid for _, tid in pollers_of((server, front))]
    found: list[float] = []
    for _ in range(LOG_WINDOWS):
        with placement.measuring(threads if plan.fifo else [], []):
            busy, packets = insight.counts().busy_ns, front.board.totals()["Rx"]
            time.sleep(WINDOW_SECONDS)
            busy, packets = insight.counts().busy_ns - busy, front.board.totals()["Rx"] - packets
        if packets:
            found.append(busy / packets)
        time.sleep(WINDOW_SECONDS)
    if not found:
        raise LocalError("no packet came back")
    return min(found)


def section(plan: Plan) -> list[Figure]:
    """Do what a worker does about its section around each work item, under load and where it waits between them."""
    with pinned([plan.cores.backend], fifo=plan.fifo):
        passing, waiting = (
            min(section_loop(SECTIONS, waits) / SECTIONS for _ in range(plan.rounds)) for waits in (False, True)
        )
    return [
        Figure(
            "section", "going from one to the next, once a work item under load", passing, "ns", bound=SECTION_BOUND_NS
        ),
        Figure("section", "entering and leaving it, around an item that was waited for", waiting, "ns"),
    ]


def safety(plan: Plan) -> list[Figure]:
    """Hold the build against those without the journal, checks or counters, which are made in the checkout."""
    try:
        module = importlib.import_module("vhostmp.tools.bench.safety")  # which those who install vhostmp have not
    except ImportError:
        raise LocalError("needs the checkout: it builds the package a second time") from None
    figures: list[Figure] = []
    for without in module.PARTS:
        tree = module.make_copy(without)
        for packed, form in enumerate(RING_FORMATS):
            done = module.measure(tree, without, packed=bool(packed), rounds=max(2, plan.rounds))
            cost, bare = done["ns_per_packet"], done["ns_per_packet_without"]
            what = f"processor time a packet of a loopback, {form}, with {without}"
            figures.append(Figure("safety", what, cost, "ns", f"without {without}", bare, 1 / done["ratio"], size=64))
    return figures


@contextmanager
def _serve(plan: Plan, count: int = 1) -> Generator[Serve]:
    """Serve `count` devices that nobody uses, each of whose workers sleeps."""
    with tempfile.TemporaryDirectory(prefix="vhostmp-bench-") as folder:
        paths = [Path(folder) / str(number) for number in range(count)]
        with Serve(paths, "null", sorted([plan.cores.backend, plan.cores.frontend]), busy_poll=0) as server:
            yield server


def _settled(server: Serve) -> list[int]:
    """Wait until a server's processes have done what they do after a start; returns them."""
    limit = time.monotonic() + SETTLE_SECONDS
    while True:
        pids = server.pids()
        before = _switches(pids)
        time.sleep(IDLE_SECONDS / 2)
        if (_switches(pids), server.pids()) == (before, pids) or time.monotonic() > limit:
            return pids


def _own_kilobytes(pid: int) -> float:
    """Return the memory that a process shares with nobody. Source: proc(5), smaps_rollup."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return float(sum(int(size) for size in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE)))


def largest_worker(sizes: Sequence[float]) -> float:
    """Return the size of the largest worker. LocalError when none was found: no worker is not a small one."""
    if not sizes:
        raise LocalError("none of the server's processes has a worker's name: their memory is not known")
    return max(sizes)


def _switches(pids: list[int]) -> int:
    """Return how often the threads of some processes have gone to sleep, after they had woken. Source: proc(5)."""
    total = 0
    for pid in pids:
        for tid in placement.threads_of(pid):
            with suppress(OSError):
                text = Path(f"/proc/{pid}/task/{tid}/status").read_text()
                total += sum(
                    int(count) for count in re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", text, re.MULTILINE)
                )
    return total


def _is_worker(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().startswith("vhostmp-w")
    return False
