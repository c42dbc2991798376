"""A worker dies at every kill point while something goes on beside it: a verb, a region, a dirty log.

It stands at the point, the verb waits for it, then it is killed. Whatever was done to the ring: nothing that was sent
is lost but what a disabled ring drops, a batch is repeated at the most, that is counted, each chain comes back once,
rings go on from where a stop said that they stand, and what was written is in the log.

This needs a build with kill points (VHOSTMP_DEBUG=1): `make sanitize` has one. Each point is tried with a few of the
verbs, other ones for each; `make slow` tries all.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from tests.adversity.beside import (
    ANY,
    POISON,
    Behind,
    Killer,
    Logged,
    Regioned,
    Verb,
    die_under,
    disable,
    disable_and_stop,
    move,
    move_and_stop,
    move_memory,
    nothing,
    stop,
    swap,
    toggle,
)
from tests.adversity.killing import PACKED, RX, TX, WHERE, NetRig, Rig, needs_kill_points, spied
from tests.helpers import TORTURE_SECONDS
from vhostmp.deaths import RestartLimit
from vhostmp.supervisor import Pool

#: Whether all verbs are tried at each point.
ALL: Final = TORTURE_SECONDS > 1
#: But at these, where rings are half done, all of them.
HALFWAY: Final = ("half_shown", "shown")
BURST: Final = 64

pytestmark = [needs_kill_points, pytest.mark.slow]
formats = pytest.mark.parametrize("features", [0, PACKED], ids=["split", "packed"])


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """Return a pool of two workers, whose back-ends in Python leave traces."""
    spied(tmp_path, monkeypatch)
    with Pool(workers=2, sandbox=False, watchdog=0, restart_limit=RestartLimit(deaths=0)) as one:
        yield one


def points_of(ring: int, features: int) -> list[str]:
    """Return the points that a ring of a loopback device comes by."""
    points = WHERE[("loopback-rx", "loopback-tx")[ring]].points
    return [point for point in points if features or point != "half_shown"]


def some(verbs: Sequence[Verb], turn: int, point: str, most: int = 1) -> Sequence[Verb]:
    """Choose so many verbs for a point: others than for the one before."""
    if point in HALFWAY or ALL:
        return verbs
    return [verbs[(turn * most + i) % len(verbs)] for i in range(most)]


def die_and_count(rig: Rig, ring: int, point: str, verb: Verb) -> None:
    """Have the worker die under a verb, and see what came of it."""
    before = rig.repeats, rig.missing, rig.count("repeated"), rig.count("lost"), rig.dropped
    die_under(rig, ring, point, verb)
    rig.settle()
    after = rig.repeats, rig.missing, rig.count("repeated"), rig.count("lost"), rig.dropped
    repeats, missing, repeated, lost, dropped = (now - then for now, then in zip(after, before, strict=True))
    told = f"{repeats} repeats, {repeated} counted; {missing} missing, {dropped} dropped, {lost} counted as lost"
    assert missing <= dropped, told
    assert not lost, told
    assert repeats <= rig.most_repeats, told
    assert repeated <= repeats + rig.most_repeats, told
    assert repeats <= repeated, told
    if isinstance(rig, NetRig):
        rig.guest.drop_idle_buffers(POISON)


@formats
@pytest.mark.parametrize("name", ["loopback-tx", "loopback-rx", "python-tx", "python-batch-tx", "requests"])
def test_verbs(pool: Pool, name: str, features: int) -> None:
    """A worker that dies under a verb leaves a ring that the verb is done to, and that goes on."""
    where = WHERE[name]
    with closing(where.rig(pool, features)) as rig:
        verbs = (*ANY, move_memory) if isinstance(rig, NetRig) else ANY
        for turn, point in enumerate(point for point in where.points if features or point != "half_shown"):
            for verb in some(verbs, turn, point, 2):
                print(name, point, verb.__name__)
                die_and_count(rig, where.ring, point, verb)
        rig.check_whole()


@pytest.mark.parametrize("ring", [RX, TX], ids=["rx", "tx"])
def test_region(pool: Pool, ring: int) -> None:
    """The region of what is in flight is whole after deaths under verbs, and says where the rings stand."""
    with closing(Regioned(pool, PACKED)) as rig:
        for turn, point in enumerate(points_of(ring, PACKED)):
            for verb in some((nothing, move, stop, disable_and_stop, move_and_stop, disable), turn, point):
                print(point, verb.__name__)
                die_and_count(rig, ring, point, verb)
        rig.check_whole()


@formats
@pytest.mark.parametrize("ring", [RX, TX], ids=["rx", "tx"])
def test_all_die(pool: Pool, ring: int, features: int) -> None:
    """A back-end that knows the region and the rings alone goes on after a death: each chain comes back."""
    for point in points_of(ring, features):
        with closing(Regioned(pool, features)) as rig:
            killer = Killer(rig, ring, point)
            rig.drive(lambda killer=killer: killer.is_there, f"to {point}")  # type: ignore[misc]
            with pool.lock:  # nobody takes its place before the device is gone
                killer.kill()
                rig.device.close()
            killer.replaced()
            rig.begin_anew()
            rig.settle()
            assert rig.repeats <= BURST
            rig.check_whole()


@formats
@pytest.mark.parametrize("ring", [RX, TX], ids=["rx", "tx"])
def test_dirty_log(pool: Pool, ring: int, features: int) -> None:
    """What changes once a front-end has cleared the log is in it, although who wrote it died, under a verb even."""
    with closing(Logged(pool, features)) as rig:
        verbs = (nothing, move, stop, disable_and_stop, toggle, swap, move_memory)
        for turn, point in enumerate(points_of(ring, features)):
            for verb in some(verbs, turn, point):
                print(point, verb.__name__)
                die_and_count(rig, ring, point, verb)
        rig.check_whole()


def late(verb: Verb) -> Verb:
    """Return a verb during which the front-end answers no question; what was asked is answered afterwards."""

    def answered_late(rig: Rig, ring: int) -> Generator[None]:
        assert isinstance(rig, Behind)
        rig.iommu.deaf.set()
        del rig.iommu.asked[:]
        both_halves = verb(rig, ring)
        next(both_halves)
        yield
        rig.iommu.answer_all()
        next(both_halves, None)

    answered_late.__name__ = f"late {verb.__name__}"
    return answered_late


def invalidate(rig: Rig, ring: int) -> Generator[None]:
    """Have the device ask for everything again."""
    del ring
    assert rig.device.iotlb is not None
    rig.device.iotlb.invalidate(0, 0)
    yield


@formats
@pytest.mark.parametrize("ring", [RX, TX], ids=["rx", "tx"])
def test_iommu(pool: Pool, ring: int, features: int) -> None:
    """So it is behind an IOMMU, which takes each buffer away as it comes back, under a verb all, or answers late."""
    at_once = (invalidate, move, disable, toggle, swap, stop, disable_and_stop, move_and_stop)
    verbs = [verb for one in at_once for verb in (one, late(one))]
    with closing(Behind(pool, features)) as rig:
        for turn, point in enumerate(points_of(ring, features)):
            for verb in some(verbs, turn, point, 3):
                print(point, verb.__name__)
                die_and_count(rig, ring, point, verb)
        rig.check_whole()
