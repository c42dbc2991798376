"""The measure `vhost-net`: what a frame costs Linux's vhost-net and ours, in a guest that counts instructions.

Rules: the guest is built and booted by tests/kernel/rates.py, a program of the checkout, which is started and read.
Source: QEMU, "-icount" in qemu-options (shift=0: each instruction takes a nanosecond of the guest's time).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vhostmp.errors import LocalError
from vhostmp.tools.bench.figures import Figure
from vhostmp.tools.bench.rounds import Spread
from vhostmp.tools.bench.sides import Plan

ROOT: Final = Path(__file__).resolve().parents[2]
PROGRAM: Final = "tests.kernel.rates"
PEER: Final = "Linux vhost-net, in the same TCG guest"
UNIT: Final = "instructions"
GOAL: Final = 1.0
PATIENCE: Final = 900.0


def vhost_net(plan: Plan) -> list[Figure]:
    """Measure in a guest. LocalError where there is no checkout, or not what a guest is made of."""
    if not (ROOT / PROGRAM.replace(".", "/")).with_suffix(".py").exists():
        raise LocalError("needs the checkout: it boots a guest as the tests do")
    with tempfile.TemporaryDirectory(prefix="vhostmp-bench-") as folder:
        command = [sys.executable, "-m", PROGRAM, folder, "--rounds", str(plan.rounds)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise LocalError(f"the guest was not done in {PATIENCE:g} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise LocalError(said[-1] if said else f"the guest's program ended with status {done.returncode}")
    return [figure for line in done.stdout.splitlines() for figure in figures(json.loads(line))]


def figures(costs: Mapping[str, Any]) -> list[Figure]:
    """Return what a line of the guest's comes to: ours beside the kernel's, and a bare write() beside the kernel's.

    The ratio is how many frames pass with ours, or with write(), in the instructions in which one passes with the
    kernel's, taken inside each round.
    """
    what = f"{costs['size']} bytes to a tap, {_mode(costs['busy_poll'])}, a frame"
    found = [_figure(what, costs["ours"], costs["kernel"], bound=GOAL)]
    if not costs["busy_poll"]:
        found.append(_figure(f"{costs['size']} bytes, a bare write() of a frame", costs["bare"], costs["kernel"]))
    return found


def _mode(busy_poll: int) -> str:
    return f"both polling for {busy_poll} us" if busy_poll else "both asleep when idle"


def _figure(what: str, values: Sequence[float], kernel: Sequence[float], *, bound: float | None = None) -> Figure:
    ratio = Spread.of(theirs / value for value, theirs in zip(values, kernel, strict=True))
    return Figure(
        *("vhost-net", what, Spread.of(values).median, UNIT, PEER, Spread.of(kernel).median, ratio.median),
        bound=bound,
        bounds_ratio=True,
        at_least=True,
        spread=(ratio.low, ratio.high),
    )
