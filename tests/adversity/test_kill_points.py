"""A worker is stopped at every kill point, on every ring that comes by it, and killed there; what is lost is counted.

The driver goes on while the worker is stopped, so that it meets the ring as that stands. Then: everything sent arrives,
each chain comes back once, what arrived twice is what `repeated` says, what never arrived is what `lost` says, and
the ring goes on.

This needs a build with kill points (VHOSTMP_DEBUG=1): `make sanitize` has one.
"""

from __future__ import annotations

import os
import re
import select
import signal
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

import pytest

from tests.adversity.killing import (
    PACKED,
    PATIENCE,
    TX,
    WHERE,
    BatchSends,
    Disk,
    Loopback,
    Rig,
    needs_kill_points,
    spied,
)
from tests.frames import make_frame
from tests.helpers import process_state, wait_until
from tests.taps import needs_tap
from vhostmp.deaths import RestartLimit
from vhostmp.shm.layout import KILL_POINTS
from vhostmp.supervisor import Pool

ROOT: Final = Path(__file__).resolve().parents[2]
#: Points of a replacement that takes up what a death left; test_second_death goes by them.
SECOND: Final = ("settling", "settled")


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """Return a pool of one worker, whose back-ends in Python leave traces."""
    spied(tmp_path, monkeypatch)
    # It looks at files; and it is stopped, and killed, as often as the test likes.
    with Pool(workers=1, sandbox=False, watchdog=0, restart_limit=RestartLimit(deaths=0)) as one:
        yield one


def stop_at(rig: Rig, ring: int, point: str, times: int = 1) -> int:
    """Have the worker stop when it comes by a point of a ring for the `times`-th time. Returns its pid."""
    pid = rig.pool.workers[0].pid
    rig.set_slot(ring, kill_left=times, kill_signal=signal.SIGSTOP, kill_point=1 + KILL_POINTS.index(point))
    rig.drive(lambda: process_state(pid) == "T", f"to {point} of ring {ring}")
    assert rig.slot(ring, "kill_point") == 0, "stopped by somebody else"
    return pid


def kill(rig: Rig, pid: int) -> None:
    """Kill a stopped worker and wait for its replacement; the driver has had a look at what it left."""
    rig.turn(sending=False)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: rig.pool.workers[0].pid != pid, PATIENCE, "the replacement")  # which may be stopped already


@needs_kill_points
@pytest.mark.slow
@pytest.mark.parametrize("features", [0, PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_tap if "tap" in name else ()) for name in WHERE])
def test_kill_point(pool: Pool, name: str, features: int) -> None:
    """Whoever dies at a point, nothing that was sent is lost, and what came twice or not at all is counted."""
    where = WHERE[name]
    with closing(where.rig(pool, features)) as rig:
        for point in where.points:
            if point == "half_shown" and not features:
                continue
            for times in (1, 2) if point in ("fetched", "begun", "sent", "received") else (1,):
                before = rig.repeats, rig.missing, rig.count("repeated"), rig.count("lost")
                kill(rig, stop_at(rig, where.ring, point, times))
                rig.settle()
                repeats, missing, repeated, lost = (
                    now - then
                    for now, then in zip(
                        (rig.repeats, rig.missing, rig.count("repeated"), rig.count("lost")), before, strict=True
                    )
                )
                doubt = where.doubt if point == where.doubtful else 0
                told = f"{point}: {repeats} repeats, {repeated} counted; {missing} missing, {lost} counted"
                if isinstance(rig, Disk):  # a sector written twice is written once: who counts too little is not seen
                    assert not lost, told
                    assert repeated or point != "processed", told
                    continue
                assert repeats <= repeated <= repeats + doubt, told
                assert missing <= lost <= missing + doubt, told
                if point in ("sent", "delivered", "transmitted", "processed"):
                    assert repeats, told
                if point in ("received", "held", "answered"):
                    assert missing, told
        rig.settle()
        rig.check_whole()


@needs_kill_points
@pytest.mark.slow
@pytest.mark.parametrize("features", [0, PACKED], ids=["split", "packed"])
def test_between_two_bursts(pool: Pool, features: int) -> None:
    """Of a batch of several bursts what was shown to the driver is not done again; all the rest is, and is counted."""
    bursts = (64, 64, 64, 8)
    # From where on a burst is the driver's whatever happens: a packed one is finished by the replacement.
    shown = KILL_POINTS.index("noted" if features else "shown")
    with closing(BatchSends(pool, features)) as rig:
        for point in KILL_POINTS[KILL_POINTS.index("returning") : KILL_POINTS.index("calling")]:
            for times in range(1, len(bursts) + 1) if features or point != "half_shown" else ():
                rig.settle()
                wait_until(lambda: rig.asleep, PATIENCE, "the worker asleep")
                before, counted = rig.repeats, rig.count("repeated")
                rig.set_slot(TX, kill_left=times, kill_signal=signal.SIGSTOP, kill_point=1 + KILL_POINTS.index(point))
                pid = rig.pool.workers[0].pid
                rig.send(sum(bursts))
                rig.pair.kick()
                wait_until(lambda pid=pid: process_state(pid) == "T", PATIENCE, point)  # type: ignore[misc]
                kill(rig, pid)
                rig.settle()
                again = sum(bursts[times - (KILL_POINTS.index(point) < shown) :])
                told = f"{point} of burst {times}"
                assert (rig.repeats - before, rig.count("repeated") - counted) == (again, again), told
        rig.check_whole()


@needs_kill_points
@pytest.mark.slow
@pytest.mark.parametrize("features", [0, PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("point", SECOND)
def test_second_death(pool: Pool, point: str, features: int) -> None:
    """A replacement that dies while it counts what a death has cost leaves that to the next: it is counted once."""
    with closing(Loopback(pool, features)) as rig:
        for _ in range(2):
            before, counted = rig.repeats, rig.count("repeated")
            pid = stop_at(rig, TX, "delivered")
            rig.set_slot(TX, kill_left=1, kill_signal=signal.SIGSTOP, kill_point=1 + KILL_POINTS.index(point))
            kill(rig, pid)
            second = rig.pool.workers[0].pid
            wait_until(lambda second=second: process_state(second) == "T", PATIENCE, point)  # type: ignore[misc]
            kill(rig, second)
            rig.settle()
            assert rig.repeats - before == rig.count("repeated") - counted > 0
        rig.check_whole()


@needs_kill_points
@pytest.mark.slow
@pytest.mark.parametrize("features", [0, PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("point", ["shown", "published", "calling"])
def test_interrupt_that_was_not_sent(pool: Pool, point: str, features: int) -> None:
    """What was given back and not told of any more, the replacement tells of: the driver may be asleep."""
    with closing(Loopback(pool, features)) as rig:
        rig.plenty()
        rig.turn(sending=False)
        pid, pair = rig.pool.workers[0].pid, rig.pair
        pair.tx.want_interrupts()
        rig.set_slot(TX, kill_left=1, kill_signal=signal.SIGSTOP, kill_point=1 + KILL_POINTS.index(point))
        assert pair.send(make_frame(rig.sent, 60))
        rig.sent += 1
        pair.kick()
        wait_until(lambda: process_state(pid) == "T", PATIENCE, point)
        with suppress(BlockingIOError):
            os.eventfd_read(pair.calls[TX])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: select.select([pair.calls[TX]], [], [], 0)[0], PATIENCE, "the interrupt")
        rig.settle()
        rig.check_whole()


def test_every_point() -> None:
    """The points that layout.py names, those in the source and those that are tried are the same."""
    sources = [path for kind in ("*.pyx", "*.pxd") for path in (ROOT / "workers").rglob(kind)]
    text = "\n".join(path.read_text() for path in sources)
    in_source = {name.lower() for name in re.findall(r"vmp_kill_point\([^,]+, VMP_KILL_(\w+)\)", text)}
    tried = {point for where in WHERE.values() for point in where.points} | set(SECOND)
    assert in_source == set(KILL_POINTS) == tried
