"""When a worker is taken for one that hangs. Looks are made by hand, and told how much time has passed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Final, cast

import attrs
import pytest

from tests.helpers import process_state, wait_until
from vhostmp.shm import layout
from vhostmp.watchdog import BEGIN_SECONDS, LOOK_MAX, Hang, Watchdog
from vhostmp.workers.processes import WorkerProcess

LIMIT: Final = 100.0
INDEX: Final = 3
RING: Final = 7


@attrs.define
class FakeWorker:
    """What the watchdog asks of a worker, and what it does to it."""

    index: int
    pid: int
    alive: bool = True
    waits_for_page: bool = False
    kills: int = 0
    nudges: int = 0

    def kill(self) -> None:
        """Count."""
        self.kills += 1

    def nudge(self) -> None:
        """Count."""
        self.nudges += 1


class Scene:
    """A watchdog that looks when it is told to, a worker within a work item, and a kick eventfd."""

    def __init__(self, pid: int, kick: int, limit: float = LIMIT) -> None:
        """Set it."""
        self.buf: Final = memoryview(bytearray(layout.SEGMENT_SIZE))
        self.kick: Final = kick
        self.worker = FakeWorker(INDEX, pid)
        self.workers: list[FakeWorker] = []  # at first: then its thread has nothing to look at, and sleeps
        self.watchdog: Final = Watchdog(self.buf, limit, self._workers, lambda index: [kick])
        wait_until(lambda: self.watchdog._idle, what="the thread's sleep")  # pyright: ignore[reportPrivateUsage]
        self.workers.append(self.worker)
        self.set(life=1, doing=1 + RING)
        self.look(0.0)

    def _workers(self) -> list[WorkerProcess]:
        return cast("list[WorkerProcess]", self.workers)

    def set(self, **words: int) -> None:
        """Write words of the worker's slot."""
        for name, value in words.items():
            layout.WORKER.write(self.buf, layout.worker_offset(INDEX), name, value)

    def word(self, name: str) -> Any:
        """Read one."""
        return layout.WORKER.read(self.buf, layout.worker_offset(INDEX), name)

    def look(self, seconds: float) -> None:
        """Have it look, so much later."""
        self.watchdog._look(seconds)  # pyright: ignore[reportPrivateUsage]


@pytest.fixture(scope="module")
def process() -> Iterator[int]:
    """Return a process that is stopped: what it is in /proc matters, and nothing else."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as child:
        os.kill(child.pid, signal.SIGSTOP)
        wait_until(lambda: process_state(child.pid) == "T")
        yield child.pid
        child.kill()


@pytest.fixture
def scene(process: int) -> Iterator[Scene]:
    """Set it."""
    kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    made = Scene(process, kick)
    yield made
    made.watchdog.stop()
    os.close(kick)


def test_standing_still(scene: Scene, process: int) -> None:
    """Who stands still up to the limit is killed, once; that is counted, and why it was is told, once."""
    scene.look(LIMIT / 2)
    assert scene.worker.kills == 0
    scene.look(LIMIT / 2)
    scene.look(LIMIT)
    assert (scene.worker.kills, scene.word("hangs")) == (1, 1)
    assert scene.watchdog.took(process) == Hang(LIMIT, innocent=True)  # somebody has stopped it
    assert scene.watchdog.took(process) is None


def test_running(scene: Scene) -> None:
    """Who is not stopped and stands still is to blame."""
    scene.worker.pid = os.getpid()
    scene.look(0.0)
    scene.look(LIMIT)
    assert scene.watchdog.took(os.getpid()) == Hang(LIMIT, innocent=False)


@pytest.mark.parametrize("name", ["seq", "items", "wakeups", "polls"])
def test_signs_of_life(scene: Scene, name: str) -> None:
    """Each word that a worker at work changes has the time begin anew."""
    for count in range(1, 5):
        scene.set(**{name: count})
        scene.look(0.9 * LIMIT)
        scene.look(0.9 * LIMIT)
    assert scene.worker.kills == 0


def test_waiting_for_a_page(scene: Scene) -> None:
    """Who waits for a guest's page is left alone for as long as it does."""
    scene.worker.waits_for_page = True
    scene.look(10 * LIMIT)
    assert scene.worker.kills == 0
    scene.worker.waits_for_page = False
    scene.look(0.0)
    assert scene.worker.kills == 1


def test_not_begun(process: int) -> None:
    """Who has not begun yet may take longer than a short limit: it may have much to import."""
    kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    scene = Scene(process, kick, 1.0)
    try:
        scene.set(life=0)
        scene.look(0.9 * BEGIN_SECONDS)
        assert scene.worker.kills == 0
        scene.look(0.2 * BEGIN_SECONDS)
        assert scene.worker.kills == 1
    finally:
        scene.watchdog.stop()
        os.close(kick)


def test_asleep(scene: Scene) -> None:
    """Who sleeps is left alone; with a kick that nobody reads it is nudged, and killed when it stands still then."""
    scene.set(asleep=1)
    scene.look(0.0)
    for _ in range(3):
        scene.look(10 * LIMIT)
    assert (scene.worker.nudges, scene.worker.kills) == (0, 0)
    os.eventfd_write(scene.kick, 1)
    scene.look(10 * LIMIT)
    assert (scene.worker.nudges, scene.worker.kills) == (1, 0)
    scene.look(LIMIT / 2)
    assert (scene.worker.nudges, scene.worker.kills) == (1, 0)
    scene.look(LIMIT / 2)
    assert (scene.worker.nudges, scene.worker.kills) == (1, 1)


def test_nudged_and_awake(scene: Scene) -> None:
    """Who was nudged and moves, though its ring leaves the kick unread, is left alone."""
    scene.set(asleep=1)
    os.eventfd_write(scene.kick, 1)
    scene.look(0.0)
    for count in range(1, 4):
        scene.look(0.0)
        assert scene.worker.nudges == count
        scene.set(wakeups=count)
        scene.look(LIMIT)
    assert scene.worker.kills == 0


def test_another_process(scene: Scene) -> None:
    """What was seen of a process is not held against the one that takes its place."""
    scene.look(0.9 * LIMIT)
    scene.worker.pid = os.getpid()
    scene.look(0.9 * LIMIT)
    scene.look(0.9 * LIMIT)
    assert scene.worker.kills == 0


def test_dead(scene: Scene) -> None:
    """Who has died is somebody else's matter."""
    scene.worker.alive = False
    scene.look(LIMIT)
    assert scene.worker.kills == 0


def test_time_that_does_not_count(scene: Scene) -> None:
    """Of the time between two looks no more than two intervals count: the machine was suspended, or we were stopped."""
    begun = time.monotonic()
    count = scene.watchdog._elapsed  # pyright: ignore[reportPrivateUsage]
    count(begun)
    assert count(begun + LOOK_MAX) == pytest.approx(LOOK_MAX)
    assert count(begun + LOOK_MAX + LIMIT) == pytest.approx(2 * LOOK_MAX)
    assert count(begun + 2 * LOOK_MAX + LIMIT) == pytest.approx(LOOK_MAX)
