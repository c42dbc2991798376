"""Small helpers every test may use: waiting with a deadline, looking at processes, seeds.

Rules:
- A test never sleeps for a guess: it polls a condition with `wait_until` and fails when time is up.
- Randomness comes from `seed()`, which is printed in the report header, so that a failure can be run again.
"""

from __future__ import annotations

import fcntl
import os
import select
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

#: How long a test waits for something that happens within milliseconds on a healthy machine, seconds.
PATIENCE: Final = float(os.environ.get("PATIENCE", "30"))
#: Length of a torture test, seconds; `SECONDS=30 pytest tests/torture` by hand.
TORTURE_SECONDS: Final = float(os.environ.get("SECONDS", "1"))
#: Set in the environment of the test process, so that what it starts can be found again even when it was orphaned.
RUN_TAG: Final = "VHOSTMP_TEST_RUN"
_POLL_SECONDS: Final = 0.001


def seed() -> int:
    """Return the seed of this run: `SEED` of the environment, else always the same one."""
    return int(os.environ.get("SEED", "20100114"))


def wait_until(predicate: Callable[[], T], timeout: float = PATIENCE, what: str = "") -> T:
    """Call `predicate` until it returns something true, and return that.

    Raises AssertionError when it has not within `timeout` seconds; `what` says what was awaited.
    """
    limit = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= limit:
            raise AssertionError(f"not within {timeout:g} s: {what or predicate}")
        time.sleep(_POLL_SECONDS)


def comes_to_rest(look: Callable[[], object], seconds: float = 1.0) -> bool:
    """Whether there are, before long, `seconds` after which what `look` returns is what it was before them.

    Time passes without a thread of ours being woken. The one thing that a test of idleness has to wait for.
    """
    limit = time.monotonic() + PATIENCE
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        while time.monotonic() < limit:
            before = look()
            select.select([fd], [], [], seconds)
            if look() == before:
                return True
    finally:
        os.close(fd)
    return False


def told(stderr: str) -> list[str]:
    """Return what a command has said, a line each, but for what it swept: tests beside this one kill processes."""
    return [line for line in stderr.splitlines() if not line.startswith("vhostmp: info: removed what processes")]


@contextmanager
def deadline(seconds: float, what: str = "the block") -> Generator[Callable[[], None]]:
    """Yield a function that raises AssertionError once `seconds` have passed, for loops that work while they wait."""
    limit = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() >= limit:
            raise AssertionError(f"{what} took more than {seconds:g} s")

    yield check


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State, parent and start time of a process; None when there is none. Source: proc(5), /proc/pid/stat."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), int(fields[19])


def process_alive(pid: int) -> bool:
    """Whether there is such a process, and not just its corpse."""
    found = _stat(pid)
    return found is not None and found[0] not in ("Z", "X")


def process_state(pid: int) -> str:
    """Return the state letter of a process, "" when there is none."""
    found = _stat(pid)
    return "" if found is None else found[0]


def command_line(pid: int) -> str:
    """Return the command line of a process, "" when there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def process_with(words: str) -> int:
    """Return the process whose command line has these words.

    Waits for it: whoever has just started a program may be before the kernel, which notes its command line last.
    """

    def look() -> int:
        return next((pid for pid in process_table() if words in command_line(pid)), 0)

    return wait_until(look, what=f"a process with {words} in its command line")


def process_table() -> dict[int, int]:
    """Return the parent of every process on the machine that is not a corpse."""
    table: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (found := _stat(int(entry.name))) is not None and found[0] not in ("Z", "X"):
            table[int(entry.name)] = found[1]
    return table


def descendants(root: int, table: dict[int, int] | None = None) -> set[int]:
    """Return the living processes that descend from `root`, itself not among them."""
    children: dict[int, list[int]] = {}
    for pid, parent in (process_table() if table is None else table).items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    todo = [root]
    while todo:
        for pid in children.get(todo.pop(), ()):
            if pid not in found:
                found.add(pid)
                todo.append(pid)
    return found


def by_name(root: int, *wanted: str) -> dict[str, int]:
    """Return the living descendants of `root` by name, once those that are `wanted` are there.

    Who has been forked just now has its parent's name: each must have one of its own.
    """

    def look() -> dict[str, int]:
        names: dict[str, int] = {}
        pids = descendants(root)
        for pid in pids:
            with suppress(OSError):
                names[Path(f"/proc/{pid}/comm").read_text().strip()] = pid
        return names if len(names) == len(pids) and names.keys() >= set(wanted) else {}

    return wait_until(look, what=f"{' '.join(wanted)}, each of them once")


def tagged_processes(tag: str, table: dict[int, int] | None = None) -> set[int]:
    """Return the living processes that were exec'd with RUN_TAG set to `tag`, orphans among them."""
    wanted = f"{RUN_TAG}={tag}".encode()
    found: set[int] = set()
    for pid in process_table() if table is None else table:
        with suppress(OSError):
            if pid != os.getpid() and wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.add(pid)
    return found


def open_descriptors() -> dict[int, str]:
    """Return this process's open file descriptors and what each one is."""
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of this very listing is gone by now
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def segment_names() -> set[str]:
    """Return the names of vhostmp's shared-memory segments on this machine."""
    return {entry.name for entry in Path("/dev/shm").glob("vhostmp.*")}


def segment_owner_alive(name: str) -> bool:
    """Whether the process that a segment's name speaks of (pid and start time) lives, or another holds it for it."""
    parts = name.split(".")
    found = _stat(int(parts[2]))
    if found is not None and found[0] not in ("Z", "X") and found[2] == int(parts[3]):
        return True
    with suppress(OSError), (Path("/dev/shm") / name).open("rb") as segment:
        try:
            fcntl.flock(segment, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
