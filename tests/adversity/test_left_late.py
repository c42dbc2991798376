"""A front-end leaves, or is given up, while a worker is still inside a state that it knows nothing of any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, cast

import attrs
import pytest

from tests.helpers import wait_until
from tests.request_driver import FEATURES, RequestGuest
from tests.stuck import StuckGuest, gives_up, impatient, stuck_guest
from vhostmp.blk import BlkDevice
from vhostmp.errors import SynchronizeTimeout
from vhostmp.kept_device import KeptDevice
from vhostmp.shm import layout
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
