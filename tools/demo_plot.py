"""The demo's picture: packets that came back in each millisecond, with swaps, memory moves and the kill marked."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vhostmp.errors import LocalError
from vhostmp.tools.demo_stage import LOOPBACK

if TYPE_CHECKING:
    from vhostmp.tools.demo_stage import Stage

SUFFIXES: Final = (".png", ".svg", ".pdf")


def check(path: str) -> None:
    """Refuse, before the demo has run in vain, what `draw` could not do. LocalError says what to do about it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LocalError(f"--plot needs matplotlib: {sys.executable} -m pip install matplotlib")
    if Path(path).suffix not in SUFFIXES:
        raise LocalError(f"--plot: {path} must end in one of {', '.join(SUFFIXES)}")
    if not Path(path).absolute().parent.is_dir():
        raise LocalError(f"--plot: there is no directory {Path(path).absolute().parent}")


def draw(stage: Stage, seconds: float, path: str) -> None:
    """Draw what `stage` went through in its `seconds` into the file `path`. LocalError when it cannot be written."""
    bin_ms = stage.bin_ns / 1e6
    rates = [count / bin_ms for count in stage.packets_per_bin(seconds)]
    # An extra that need not be there, and slow to import.
    figure: Any = importlib.import_module("matplotlib.figure").Figure(figsize=(14, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([n * stage.bin_ns / 1e9 for n in range(len(rates))], rates, linewidth=0.4, color="0.35")
    top = max(rates, default=1.0) or 1.0
    for loopback, color, label, low in (
        (True, "tab:blue", "to loopback", 0.03),
        (False, "tab:orange", "to Python", 0.06),
    ):
        times = [(swap.at_ns - stage.start_ns) / 1e9 for swap in stage.swaps if (swap.backend == LOOPBACK) == loopback]
        axes.plot(
            times, [-low * top] * len(times), "|", color=color, markersize=6, label=f"swap {label} ({len(times)})"
        )
    moves = [(at - stage.start_ns) / 1e9 for at in stage.moves_ns]
    axes.plot(
        moves, [-0.1 * top] * len(moves), "^", color="tab:green", markersize=4, label=f"memory move ({len(moves)})"
    )
    if stage.kill_ns:
        axes.axvline((stage.kill_ns - stage.start_ns) / 1e9, color="tab:red", linewidth=1, label="worker killed")
    axes.set(xlabel="seconds", ylabel="packets in a millisecond", xlim=(0, max(seconds, bin_ms / 1e3)))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick >= 0])  # the marks stand below zero, no rate does
    axes.legend(loc="upper right", ncols=4)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise LocalError(f"--plot: cannot write {path}: {error.strerror or error}") from error
