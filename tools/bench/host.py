"""Facts of the machine a number was measured on, and the huge pages DPDK needs.

Rule: huge pages are asked for on top of what there is, and given back.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vhostmp import __version__
from vhostmp.errors import LocalError

PAGES: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
PAGE_MEGABYTES: Final = 2


def _first(path: str, pattern: str) -> str:
    """Return the first group of `pattern` in a file, "unknown" when there is none."""
    try:
        found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else "unknown"


def _version(command: list[str], pattern: str) -> str:
    if shutil.which(command[0]) is None:
        return "not installed"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    found = re.search(pattern, done.stdout + done.stderr)
    return found[1] if found else "unknown"


def distance_text(distances_ns: list[float]) -> str:
    """Say how far apart the two cores were."""
    if not distances_ns:
        return "not probed"
    return f"{min(distances_ns):.0f}-{max(distances_ns):.0f} ns a round trip of a cache line"


def facts(*, fifo: bool) -> dict[str, str]:
    """Return what a reader must know to judge the numbers."""
    caches = ", ".join(
        f"L{_first(f'{folder}/level', '(.*)')} {_first(f'{folder}/size', '(.*)')}"
        for folder in sorted(str(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index[23]"))
    )
    return {
        "vhostmp": __version__,
        "processor": _first("/proc/cpuinfo", r"^model name\s*:\s*(.*)$"),
        "processors used": f"2 of {os.cpu_count()}",
        "caches": caches or "unknown",
        "hypervisor": "yes" if " hypervisor" in _first("/proc/cpuinfo", r"^flags\s*:\s*(.*)$") else "no",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "compiler": _version(["gcc", "--version"], r"gcc.* ([\d.]+)\s"),
        "dpdk": _version(["dpdk-testpmd", "-v", "--help"], r"DPDK ([\d.]+)"),
        "priority": "SCHED_FIFO in the windows" if fifo else "normal: no right to real-time priorities",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def _read(name: str) -> int:
    return int((PAGES / name).read_text())


@contextmanager
def huge_pages(megabytes: int) -> Generator[None]:
    """Have `megabytes` free in huge pages of 2 MiB for the block. LocalError when there is no right or no room."""
    wanted = megabytes // PAGE_MEGABYTES
    try:
        before = _read("nr_hugepages")
        missing = max(0, wanted - _read("free_hugepages"))
        if missing:
            (PAGES / "nr_hugepages").write_text(f"{before + missing}\n")
    except OSError as error:
        raise LocalError(
            f"cannot reserve {megabytes} MB of huge pages ({error.strerror}); be root, or reserve them"
        ) from error
    try:
        free = _read("free_hugepages")
        if free < wanted:
            raise LocalError(f"{free} free huge pages of 2 MiB, {wanted} are needed: too little memory in one piece")
        yield
    finally:
        if missing:
            (PAGES / "nr_hugepages").write_text(f"{before}\n")
