"""Nothing outlives a server, in whatever order its processes die; the next start sweeps what could not be taken along.

A server with a tap, two sockets, workers and a spawner is killed, process by process, in every order. Whoever dies last
but for the kernel cleans up: the control process where it is asked to end, else the spawner. Only where both are killed
is something left: names (a segment, sockets), which the next start removes, with one line each.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from tests.helpers import by_name, command_line, process_alive, segment_names, wait_until
from tests.integration.serving import Served, serving
from tests.net_driver import Guest
from tests.remote import RemoteDevice
from tests.taps import needs_tap, tap_name

ROOT: Final = Path(__file__).parents[2]
ENDS: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: Every order in which the control process dies, and others before or after it.
ORDERS: Final = [
    order
    for count in (1, 2, 3)
    for order in itertools.permutations(("control", "spawner", "worker"), count)
    if "control" in order
]


#: The same with who keeps everything for a control process to come.
HELD_ORDERS: Final = [
    order
    for count in (1, 2, 3)
    for order in itertools.permutations(("control", "holder", "spawner"), count)
    if "control" in order and order not in ORDERS[1:]
]


class Scene:
    """A server, what it has made, and its processes by what they are."""

    def __init__(self, server: Served, folder: Path, tap: str, *, is_held: bool) -> None:
        """Find them."""
        self.server, self.folder, self.tap = server, folder, tap
        kinds = {"spawner": "vhostmp-spawn", "worker": "vhostmp-w0", **({"holder": "vhostmp-hold"} if is_held else {})}
        family = by_name(server.pid, *kinds.values())
        self.everybody = {server.pid, *family.values()}
        self.victims = {"control": server.pid, **{who: family[name] for who, name in kinds.items()}}
        #: With a lock as whoever keeps them has: no pool that somebody else starts meanwhile sweeps them away.
        self._held: Final = [os.open(f"/dev/shm/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in self.segments()]
        for fd in self._held:
            fcntl.flock(fd, fcntl.LOCK_SH)

    def let_go(self) -> None:
        """From now on whoever comes may sweep. Idempotent."""
        while self._held:
            os.close(self._held.pop())

    def segments(self) -> set[str]:
        """Return the names of segments that are the server's."""
        return {name for name in segment_names() if name.split(".")[2] == str(self.server.pid)}

    def left(self) -> list[str]:
        """Return what is there of what the server had made."""
        found = [f"process {pid}: {command_line(pid)}" for pid in self.everybody if process_alive(pid)]
        found += [f"segment {name}" for name in self.segments()]
        found += [f"socket {name}" for name in ("s", "c", "c.hold") if (self.folder / name).exists()]
        if Path(f"/sys/class/net/{self.tap}").exists():
            found.append(f"tap {self.tap}")
        return found

    def wait_for_the_end(self, *kinds: str) -> None:
        """Wait until nothing of these kinds is left, or nothing at all; else say what is."""
        kinds = kinds or ("",)
        with suppress(AssertionError):
            wait_until(lambda: not [what for what in self.left() if what.startswith(kinds)])
        assert [what for what in self.left() if what.startswith(kinds)] == []

    def kill(self, order: tuple[str, ...], end: signal.Signals) -> None:
        """Kill the processes in that order; the control process gets the signal `end`, the others SIGKILL."""
        for who in order:
            pid = self.victims[who]
            try:
                os.kill(pid, end if who == "control" else signal.SIGKILL)
            except ProcessLookupError:
                continue  # it went with one before it
            if who == "control":
                self.server.wait()


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Return the options of a server with something of everything."""
    return [
        f"--socket-path={tmp_path}/s",
        f"--control-path={tmp_path}/c",
        f"--backend=tap:{tap_name()}",
        "--workers=2",
        "--verbose",
    ]


def look_for_leftovers(
    scene: Scene, folder: Path, options: list[str], *, nobody_cleaned: bool, is_certain: bool
) -> None:
    """Wait until nothing is left; where nobody was there to clean up, have the next server do it.

    `is_certain`: that nobody was; else somebody may do it before the next server comes to it. A control process that
    finds its spawner dead starts another one, which nobody here knows of, and which cleans up.
    """
    try:
        scene.wait_for_the_end("process", "tap")
        if not nobody_cleaned:
            scene.wait_for_the_end()
            return
    finally:
        scene.let_go()
    # Both may have been killed before they could do anything.
    before = scene.left() if is_certain else []
    with serving(folder, *options) as server:
        for name in {"s", "c"} & {what.split()[1] for what in before}:
            said = f"removed socket {folder / name} of a program that is gone"
            wait_until(lambda: server.lines(said), what=said)  # noqa: B023 - used at once
        assert server.terminate_in_time() == 0
    scene.wait_for_the_end()


def is_before(one: str, other: str, order: tuple[str, ...]) -> bool:
    """Whether both are killed, and in this order."""
    return other in order[order.index(one) :]


@needs_tap
@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS, ids=lambda number: number.name)
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_nothing_is_left(tmp_path: Path, options: list[str], order: tuple[str, ...], end: signal.Signals) -> None:
    """Whoever dies first: no process, tap, socket, segment is left; where nobody could clean up, the next one does."""
    options.append("--adopt-timeout=0")
    with serving(tmp_path, *options) as server, Guest(RemoteDevice(tmp_path / "s").as_net_device()):
        scene = Scene(server, tmp_path, tap_name(), is_held=False)
        scene.kill(order, end)
    look_for_leftovers(
        scene,
        tmp_path,
        options,
        nobody_cleaned=end == signal.SIGKILL and "spawner" in order,
        is_certain=is_before("control", "spawner", order),
    )


@needs_tap
@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS, ids=lambda number: number.name)
@pytest.mark.parametrize("order", HELD_ORDERS, ids="-".join)
def test_nothing_is_left_that_is_not_adopted(
    tmp_path: Path, options: list[str], order: tuple[str, ...], end: signal.Signals
) -> None:
    """The same of a server that a holder waits with for its successor, which does not come; the holder dies, too."""
    options.append("--adopt-timeout=1")
    with serving(tmp_path, *options) as server, Guest(RemoteDevice(tmp_path / "s").as_net_device()):
        scene = Scene(server, tmp_path, tap_name(), is_held=True)
        scene.kill(order, end)
    look_for_leftovers(
        scene,
        tmp_path,
        options,
        nobody_cleaned=end == signal.SIGKILL and len(order) > 1,
        is_certain=is_before("control", "spawner", order) and order[2:] == ("holder",),
    )


#: A control process that bequeaths a socket to a spawner which cannot listen just then.
TESTATOR: Final = """
import json, os, signal, socket, sys, threading
from tests.helpers import by_name, process_state, wait_until
from vhostmp import transport
from vhostmp.supervisor import Pool
pool = Pool(workers=1)
spawner = by_name(os.getpid(), "vhostmp-spawn", "vhostmp-w0", "vhostmp-spare")["vhostmp-spawn"]
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
os.kill(spawner, signal.SIGSTOP)
wait_until(lambda: process_state(spawner) == "T")
pool.bequeath([(sys.argv[1], *transport.identity(sys.argv[1]))])
print(json.dumps({"control": os.getpid(), "spawner": spawner}), flush=True)
threading.Event().wait()
"""


def test_what_is_bequeathed_last_is_removed(tmp_path: Path) -> None:
    """A spawner that comes to read it only when the control process is dead removes the socket all the same."""
    path = tmp_path / "s"
    command = [sys.executable, "-c", TESTATOR, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        try:
            assert child.stdout is not None
            known = json.loads(child.stdout.readline())
        finally:
            child.kill()
    assert path.exists()
    os.kill(known["spawner"], signal.SIGCONT)
    wait_until(lambda: not process_alive(known["spawner"]), what="the spawner's end")
    assert not path.exists()


#: A control process of an embedder's, with a pager: it says who is who, and stays.
EMBEDDER: Final = """
import json, os, threading
from tests.helpers import by_name
from vhostmp.supervisor import Pool
pool = Pool(workers=1)
pager = pool.new_pager()
pager.ask({"op": "userfaultfd"}, [os.open("/dev/userfaultfd", os.O_RDWR)])
names = by_name(os.getpid(), "vhostmp-spawn", "vhostmp-w0", "vhostmp-pager")
print(json.dumps({"control": os.getpid(), "segment": pool.segment_name, **names}), flush=True)
threading.Event().wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/dev/userfaultfd", os.R_OK | os.W_OK), reason="no access to /dev/userfaultfd")
@pytest.mark.parametrize(
    "order",
    [
        order
        for count in (1, 2, 3)
        for order in itertools.permutations(("control", "vhostmp-pager", "vhostmp-w0"), count)
        if "control" in order
    ],
    ids="-".join,
)
def test_no_pager_is_left(order: tuple[str, ...]) -> None:
    """Pagers go with their control process, in whatever order they and the workers die."""
    with subprocess.Popen([sys.executable, "-c", EMBEDDER], stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        try:
            assert child.stdout is not None
            known = json.loads(child.stdout.readline())
            for who in order:
                with suppress(ProcessLookupError):
                    os.kill(known[who], signal.SIGKILL)
        finally:
            child.kill()
    pids = {name: pid for name, pid in known.items() if isinstance(pid, int)}
    wait_until(lambda: not [name for name, pid in pids.items() if process_alive(pid)], what="all to be gone")
    wait_until(lambda: known["segment"].strip("/") not in segment_names(), what="the segment to be gone")
