"""A front-end leaves, or is given up, while a worker is still inside a state that it knows nothing of any more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, cast

import attrs
import pytest

from tests.frames import make_frame
from tests.helpers import wait_until
from tests.net_driver import Guest
from tests.request_driver import FEATURES, RequestGuest
from tests.stuck import StuckGuest, gives_up, impatient, stuck_guest
from vhostmp import flush
from vhostmp.blk import BlkDevice
from vhostmp.errors import SynchronizeTimeout
from vhostmp.kept_device import KeptDevice
from vhostmp.net import NetDevice
from vhostmp.shm import layout
from vhostmp.shm._epoch import synchronize
from vhostmp.supervisor import Pool

TX: Final = 1
WORDS: Final = ("started", "worker", "size", "enabled", "died")


@attrs.frozen
class Found:
    """What a device that is adopted is told of what was under way: nothing was."""

    is_half_done: bool = False


FOUND: Final = cast("KeptDevice", Found())


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[StuckGuest]:
    """Return a guest whose worker is inside its back-end."""
    with stuck_guest(tmp_path) as one:
        yield one


def slot(stuck: StuckGuest) -> dict[str, Any]:
    """Read words of the transmit ring's slot."""
    offset = layout.ring_offset(stuck.device.first_ring + TX)
    return {name: layout.RING.read(stuck.pool.buf, offset, name) for name in WORDS}


def is_empty(stuck: StuckGuest) -> bool:
    """Whether it says nothing."""
    return not any(slot(stuck).values())


def test_slots_are_emptied_behind_the_worker(stuck: StuckGuest) -> None:
    """The slots of rings that were stopped stay as they are until their worker is out; then they are emptied."""
    before = slot(stuck)
    assert before["size"]
    with impatient(), pytest.raises(SynchronizeTimeout):
        stuck.device.stop_all()
    assert slot(stuck) == before
    assert not stuck.left
    stuck.let_go()
    wait_until(lambda: is_empty(stuck), what="the slot to be emptied")
    assert stuck.left


def test_stop_behind_an_earlier_verb(stuck: StuckGuest) -> None:
    """Where a verb before it is still waited for, rings are stopped once the worker is out, before anybody comes."""
    with impatient():
        with pytest.raises(SynchronizeTimeout):
            stuck.device.set_vring_enable(0, False)
        with pytest.raises(SynchronizeTimeout):
            stuck.device.stop_all()
        assert slot(stuck)["size"]
        with pytest.raises(SynchronizeTimeout):
            stuck.device.set_owner()
    stuck.let_go()
    wait_until(lambda: is_empty(stuck), what="the rings to be stopped")
    assert stuck.left
    assert stuck.device.snapshot()["regions"] == []
    stuck.device.set_owner()


def close_late(stuck: StuckGuest, *, behind: bool) -> None:
    """Close the device while its worker is inside; `behind` a verb that is still waited for."""
    with impatient():
        if behind:
            with pytest.raises(SynchronizeTimeout):
                stuck.device.set_vring_busyloop_timeout(0, 5)
        with pytest.raises(SynchronizeTimeout):
            stuck.device.close()


def serve_next(stuck: StuckGuest, place: tuple[int, int]) -> None:
    """Have another device take its place, and serve a guest."""
    with closing(NetDevice(stuck.pool, backend="null")) as other:
        assert (other.slot, other.first_ring) == place
        with Guest(other) as guest:
            assert guest.pairs[0].send(make_frame(0, 60))
            guest.pairs[0].kick()
            wait_until(guest.pairs[0].reap, what="the next guest to be served")


@pytest.mark.parametrize("behind", [False, True])
def test_closed_while_a_worker_is_inside(stuck: StuckGuest, behind: bool) -> None:
    """A device that is closed meanwhile keeps its slots until its worker is out, which then serves its guest no more.

    Also where a verb before it is still waited for, and nothing could be published.
    """
    pair, place = stuck.guest.pairs[0], (stuck.device.slot, stuck.device.first_ring)
    close_late(stuck, behind=behind)
    with impatient():
        stuck.device.close()
    assert stuck.pool.devices == []
    assert slot(stuck)["size"]
    with closing(NetDevice(stuck.pool, backend="null")) as other:
        assert other.slot != place[0]
        assert other.first_ring >= place[1] + stuck.device.num_queues
    assert not stuck.left
    stuck.let_go()
    wait_until(lambda: sum(stuck.pool.loads().values()) == 0, what="the slots to be free")
    assert is_empty(stuck)
    pair.reap()
    assert pair.send(make_frame(1, 60))
    pair.kick()
    serve_next(stuck, place)  # its verbs wait for the worker
    assert pair.reap() == 0


@pytest.mark.parametrize("behind", [False, True])
def test_killed_inside_a_closed_device(stuck: StuckGuest, behind: bool) -> None:
    """Where the worker dies in there the slots are free too, and the one that replaces it does not serve that guest."""
    pair, place = stuck.guest.pairs[0], (stuck.device.slot, stuck.device.first_ring)
    close_late(stuck, behind=behind)
    assert slot(stuck)["size"]
    stuck.pool.kill_worker(0)
    wait_until(lambda: sum(stuck.pool.loads().values()) == 0, what="the slots to be free")
    assert is_empty(stuck)
    wait_until(lambda: stuck.pool.restarts == 1, what="the count")
    assert not stuck.left
    serve_next(stuck, place)
    assert pair.reap() == 0


def test_closed_device_is_tried_again(stuck: StuckGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its end is late once more, after the worker is out, that is not left to a next verb: it has none."""
    with impatient(), pytest.raises(SynchronizeTimeout):
        stuck.device.close()
    times: list[int] = []

    def late(buf: memoryview, readers: Sequence[tuple[int, int]], timeout_ns: int) -> int:
        times.append(timeout_ns)
        if len(times) == 1:
            raise SynchronizeTimeout("late")
        return synchronize(buf, readers, timeout_ns)

    monkeypatch.setattr(flush, "synchronize", late)
    stuck.let_go()
    wait_until(lambda: sum(stuck.pool.loads().values()) == 0, what="the slots to be free")
    assert len(times) > 1
    assert is_empty(stuck)


def test_pool_closed_while_a_closed_device_is_left(tmp_path: Path) -> None:
    """A pool that is closed ends what such a device is made of."""
    with stuck_guest(tmp_path) as stuck:
        with impatient(), pytest.raises(SynchronizeTimeout):
            stuck.device.close()
        assert stuck.device.is_leaving
        stuck.pool.close()
        assert not stuck.device.is_leaving
        stuck.device.close()


def test_adopted_after_post_copy(stuck: StuckGuest) -> None:
    """A guest that came in by post-copy when the control process died: its rings are never served again, late or not.

    Nor does it cease to be on record as such before they are stopped.
    """
    generation = stuck.device.snapshot()["generation"]
    stuck.device.was_paged = True
    with impatient():
        stuck.device.settle_adopted(FOUND)
        assert stuck.device.unsynchronized
        with pytest.raises(SynchronizeTimeout):
            stuck.device.stop_all()  # its connection is closed
    assert stuck.device.is_paged
    stuck.let_go()
    wait_until(lambda: is_empty(stuck), what="the rings to be stopped")
    assert stuck.device.snapshot()["generation"] == generation + 1, "nothing but the stop was put in force"
    assert not stuck.device.is_paged
    assert stuck.device.snapshot()["regions"] == []


def test_adopted_disk(tmp_path: Path) -> None:
    """A disk whose workers are late when it is adopted is served, in the mode on record once they are out."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with (
        Pool(workers=1) as pool,
        closing(BlkDevice(pool, backend=f"file:{image}")) as device,
        RequestGuest(device, features=FEATURES & device.get_features(), num=16),
    ):
        part = device.state.backend
        with gives_up():
            device.settle_adopted(FOUND)
        wait_until(lambda: device.state.backend is not part, what="the back-end to be made anew")
        assert pool.restarts == 0
