"""`python -m vhostmp.tools.bench.safety`: what keeps a worker safe costs, against builds that do without.

One at a time is left out: the *journal*; the *checks* of what a driver's ring says (heads, addresses, lengths,
headers); the *counters*. Such a build is made in a copy of the checkout, in build/safety (VHOSTMP_WITHOUT; a minute
or two, once). Both sides live at once: a pool, a loopback device and a compiled guest, in a process of its own; each
packet, of 64 bytes, passes two rings. A *window* wakes one guest for a fraction of a second, and windows of the two
sides alternate. What is read is how much processor time the worker spends on a packet, not packets by the clock:
whoever else is on the machine takes the clock's time and not that one's. A *round* starts both sides anew, since
where their memory happens to lie makes a difference of a few percent. A ratio is taken in each round; what is
reported is the median over the rounds, with the quartiles. 1.00 means that it is free, 0.97 that a worker with it
moves 3 % fewer packets in the same time.

For the checkout alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from vhostmp.errors import LocalError, VhostError
from vhostmp.tools.bench.cases import RING_FORMATS
from vhostmp.tools.bench.rounds import Spread
from vhostmp.tools.demo_stage import Stage
from vhostmp.tools.guest import Layout
from vhostmp.workers import _loop

ROOT: Final = Path(__file__).resolve().parents[2]
COPIES: Final = ROOT / "build" / "safety"
COPIED: Final = (
    *("pyproject.toml", "setup.py", "README.md", "LICENSE"),
    *("vhostmp", "shm", "workers", "tools", "typings"),
)
#: What can be left out (shm/build.h).
PARTS: Final = ("journal", "checks", "counters")
ROUNDS: Final = 12
WINDOWS: Final = 6
WINDOW_SECONDS: Final = 0.25
WARM_SECONDS: Final = 0.05


def cpu_ns(pid: int) -> int:
    """Return how long the threads of a process have been on a processor, nanoseconds. Source: proc(5), schedstat."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


def side(*, packed: bool) -> None:
    """Be one side: for each line read, run a window and print packets and nanoseconds, until the end of the input."""
    with Stage(layout=Layout(packed=packed)) as stage:
        stage.wait_for_packets(1)
        guest, worker = stage.guests[0], stage.pool.workers[0]

        def packets() -> int:
            return stage.counters()["received"]  # the guest's: a build may count nothing

        os.kill(guest.pid, signal.SIGSTOP)
        try:
            print(json.dumps({"left_out": _loop.LEFT_OUT}), flush=True)
            for _ in sys.stdin:
                os.kill(guest.pid, signal.SIGCONT)
                time.sleep(WARM_SECONDS)
                before = packets(), cpu_ns(worker.pid)
                time.sleep(WINDOW_SECONDS)
                after = packets(), cpu_ns(worker.pid)
                os.kill(guest.pid, signal.SIGSTOP)
                print(json.dumps([after[0] - before[0], after[1] - before[1]]), flush=True)
        finally:
            os.kill(guest.pid, signal.SIGCONT)


class Side:
    """One side's process."""

    def __init__(self, tree: Path, *, packed: bool, without: str = "") -> None:
        """Start it in a tree whose build is `without` one of PARTS, or has all. LocalError when it is another one."""
        command = [sys.executable, "-m", "vhostmp.tools.bench.safety", "--side", RING_FORMATS[packed]]
        self._process = subprocess.Popen(command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        left_out = " ".join(self._answer()["left_out"])
        if left_out != without:
            self.close()
            raise LocalError(f"the build in {tree} is without {left_out or 'nothing'}, not {without or 'nothing'}")

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LocalError(f"a side of the benchmark ended with status {self._process.wait()}")
        return json.loads(line)

    def ns_per_packet(self) -> float:
        """Run a window. LocalError when nothing moved in it."""
        assert self._process.stdin is not None
        print("window", file=self._process.stdin, flush=True)
        packets, nanoseconds = self._answer()
        if not packets:
            raise LocalError("no packet moved in a whole window")
        return float(nanoseconds) / float(packets)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.close()


def make_copy(without: str) -> Path:
    """Build a copy of the checkout without one of PARTS; only what changed since the last time. LocalError."""
    if not (ROOT / "setup.py").exists():
        raise LocalError("this needs a checkout: it builds the package a second time")
    tree = COPIES / without
    tree.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source = ROOT / name
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            if path.suffix in (".so", ".pyc") or (path.is_dir() and not path.is_symlink()):
                continue
            copy = tree / path.relative_to(ROOT)
            if path.is_symlink() or not copy.exists() or copy.read_bytes() != path.read_bytes():
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.unlink(missing_ok=True)
                shutil.copy2(path, copy, follow_symlinks=False)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        env=os.environ | {"VHOSTMP_WITHOUT": without},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LocalError(f"the build without {without} failed: {done.stderr.strip().splitlines()[-1]}")
    return tree


def measure(tree: Path, without: str, *, packed: bool, rounds: int) -> dict[str, Any]:
    """Measure one format, against the build in `tree`, which is without one of PARTS ("": the same build)."""
    found: list[tuple[float, float]] = []
    for number in range(rounds):
        with ExitStack() as stack:
            ours = stack.enter_context(Side(ROOT, packed=packed))
            bare = stack.enter_context(Side(tree, packed=packed, without=without))
            order = (ours, bare) if number % 2 else (bare, ours)
            costs: dict[Side, list[float]] = {ours: [], bare: []}
            for _ in range(WINDOWS):
                for one in order:
                    costs[one].append(one.ns_per_packet())
            found.append((statistics.median(costs[ours]), statistics.median(costs[bare])))
    ratios = [without / having for having, without in found]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "without": without or None,
        "ring_format": RING_FORMATS[packed],
        "rounds": rounds,
        "ns_per_packet": round(Spread.of(having for having, _ in found).median, 1),
        "ns_per_packet_without": round(Spread.of(without for _, without in found).median, 1),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vhostmp.tools.bench.safety", description="Measure what safety costs."
    )
    parser.add_argument(
        "--without", choices=PARTS, nargs="+", default=list(PARTS), help="leave these out, one by one (default: each)"
    )
    parser.add_argument("--rounds", metavar="N", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument(
        "--ring", choices=RING_FORMATS, nargs="+", default=list(RING_FORMATS), help="formats (default: both)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON objects, one a line, instead of the table")
    parser.add_argument(
        "--against-itself",
        action="store_true",
        help="the same build on both sides: the ratios must come out as 1 (proves the harness)",
    )
    parser.add_argument("--side", choices=RING_FORMATS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rounds < 2:  # noqa: PLR2004 - of fewer there are no quartiles
        parser.error("--rounds: choose 2 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    args = parse(argv)
    if args.side:
        side(packed=args.side == RING_FORMATS[True])
        return 0
    try:
        if not args.json:
            print("| without | ring | ns a packet | without | packets in the same time | quartiles | rounds |")
            print("|---|---|---|---|---|---|---|")
        for without in [""] if args.against_itself else args.without:
            tree = make_copy(without) if without else ROOT
            for form in args.ring:
                done = measure(tree, without, packed=form == RING_FORMATS[True], rounds=args.rounds)
                low, high = done["ratio_quartiles"]
                ratio = f"**{done['ratio']:.3f}**", f"{low:.3f}-{high:.3f}"
                costs = (done["ns_per_packet"], done["ns_per_packet_without"])
                cells = (without or "nothing", form, *costs, *ratio, args.rounds)
                print(json.dumps(done) if args.json else f"| {' | '.join(map(str, cells))} |", flush=True)
    except VhostError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
