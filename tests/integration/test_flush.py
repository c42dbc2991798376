"""A disk's flushes: who waits for a slow one, who does not, and what becomes of it when its worker or object goes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from tests.adversity.backends import GATE
from tests.helpers import wait_until
from tests.integration import devices
from tests.request_driver import FEATURES, RequestGuest, blk_header, blk_range
from tests.stuck import impatient
from vhostmp import consts
from vhostmp.blk import BlkDevice
from vhostmp.supervisor import Pool

IN, OUT, FLUSH, WRITE_ZEROES = 0, 1, 4, 13
OK, IOERR = 0, 1
SECTOR: Final = 512
IMAGE_BYTES: Final = 1 << 20
ALL: Final = FEATURES | consts.mask([1, 2, 5, 6, 9, 10, 11, 12, 13, 14])


class Scene:
    """A disk of two queues, both served by one worker, whose flushes wait for `let_go`."""

    def __init__(self, directory: Path, pool: Pool, guest: RequestGuest) -> None:
        """Keep what tests look at."""
        self.directory: Final = directory
        self.pool: Final = pool
        self.guest: Final = guest

    @property
    def begun(self) -> int:
        """How many flushes have begun."""
        entered = self.directory / "entered"
        return len(entered.read_text()) if entered.exists() else 0

    def let_go(self, code: int = 0) -> None:
        """Let flushes end, with an errno or well."""
        waiting = self.directory / "waiting"
        waiting.write_text(str(code))
        waiting.rename(self.directory / "open")

    def hold(self) -> None:
        """Have later flushes wait."""
        (self.directory / "open").unlink()

    def slow_flush(self, queue: int = 0) -> int:
        """Send a flush, and wait until it has begun."""
        before = self.begun
        head = self.guest.send(blk_header(FLUSH), [1], queue=queue)
        wait_until(lambda: self.begun > before, what="the flush to begin")
        return head

    def unanswered(self, head: int, queue: int = 0) -> bool:
        """Whether a request has not come back."""
        self.guest.look(queue)
        return head not in self.guest.answers[queue]

    def status(self, head: int, queue: int = 0) -> int:
        """Wait for a request; return its status."""
        return self.guest.wait(head, queue).data[-1]

    def read(self, queue: int) -> int:
        """Read a sector; return the status."""
        return self.guest.ask(blk_header(IN), [SECTOR, 1], queue=queue).data[-1]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Make one."""
    monkeypatch.setenv(GATE, str(tmp_path))
    monkeypatch.setattr("vhostmp.blk.REFERENCE", f"{devices.__file__}:SlowDisk")
    (tmp_path / "disk.img").write_bytes(bytes(IMAGE_BYTES))
    with (
        Pool(workers=1, sandbox=False) as pool,  # SlowDisk looks at files
        closing(BlkDevice(pool, backend=f"file:{tmp_path}/disk.img", num_queues=2)) as device,
        RequestGuest(device, features=ALL & device.get_features()) as guest,
    ):
        yield Scene(tmp_path, pool, guest)


def test_only_who_flushes_waits(scene: Scene) -> None:
    """While a flush runs, for as long as it likes, other queues of the same worker are served, and verbs succeed."""
    head = scene.slow_flush()
    behind = scene.guest.send([blk_header(OUT, 1), b"\x77" * SECTOR], [1])
    with impatient(1):
        assert scene.read(queue=1) == OK
        scene.guest.device.set_vring_busyloop_timeout(0, 1)
        assert scene.read(queue=1) == OK
    assert scene.unanswered(head)
    assert scene.unanswered(behind)
    scene.let_go()
    assert [scene.status(head), scene.status(behind)] == [OK, OK]
    assert scene.begun == 1
    assert scene.guest.ask(blk_header(IN, 1), [SECTOR, 1]).data[:-1] == b"\x77" * SECTOR


def test_each_flush_is_one(scene: Scene) -> None:
    """Flush after flush, on both queues, each is done for itself after what was written before it."""
    scene.let_go()
    for turn in range(1, 6):
        for queue in range(2):
            assert scene.guest.ask([blk_header(OUT), bytes(SECTOR)], [1], queue=queue).data[-1] == OK
            assert scene.guest.ask(blk_header(FLUSH), [1], queue=queue).data[-1] == OK
        assert scene.begun == 2 * turn


def test_worker_dies(scene: Scene) -> None:
    """A flush that was under way when its worker died is done again by the replacement, before it is answered."""
    head = scene.slow_flush()
    pid = scene.pool.worker(0).pid
    scene.pool.kill_worker(0)
    wait_until(lambda: scene.begun == len("12"), what="the flush to begin anew")
    assert scene.pool.worker(0).pid != pid
    assert scene.unanswered(head)
    scene.let_go()
    assert scene.status(head) == OK


@pytest.mark.parametrize("how", ["swap", "mode"])
def test_object_is_replaced(scene: Scene, how: str) -> None:
    """A swap, or another write mode, does not wait for a flush: whoever comes does it again before it is answered."""
    head = scene.slow_flush()
    device = scene.guest.device
    assert isinstance(device, BlkDevice)
    (scene.directory / "other.img").write_bytes(bytes(IMAGE_BYTES))
    with impatient(1):
        if how == "swap":
            device.set_backend(f"file:{scene.directory}/other.img")
        else:
            device.write_config(32, b"\0")
    assert scene.unanswered(head)
    scene.let_go()
    assert scene.status(head) == OK
    assert scene.begun == len("12")


def test_ring_is_restarted(scene: Scene) -> None:
    """A flush of before a reset says nothing of one that comes after it, though the object is the same."""
    head = scene.slow_flush()
    base = scene.guest.device.stop_vring(0)
    scene.let_go()
    scene.guest.device.set_vring_base(0, base)
    wait_until(lambda: scene.unanswered(head))
    before = scene.begun
    scene.guest.device.start_vring(0)
    assert scene.status(head) == OK
    assert scene.begun == before + 1


def test_failure_is_for_good(scene: Scene) -> None:
    """A flush that failed fails each later one, of other queues, workers and objects; reads go on."""
    device = scene.guest.device
    assert isinstance(device, BlkDevice)
    scene.let_go(errno.EIO)
    assert scene.guest.ask(blk_header(FLUSH), [1]).data[-1] == IOERR
    scene.hold()
    scene.let_go()
    changes: list[Callable[[], object]] = [
        lambda: scene.pool.kill_worker(0),
        lambda: device.write_config(32, b"\0"),
        lambda: device.attach_vring_worker(1, device.new_worker()),
    ]
    for change in changes:
        change()
        for queue in range(2):
            assert scene.guest.ask(blk_header(FLUSH), [1], queue=queue).data[-1] == IOERR
            assert scene.read(queue) == OK
    assert scene.begun == 1
    (scene.directory / "other.img").write_bytes(bytes(IMAGE_BYTES))
    device.set_backend(f"file:{scene.directory}/other.img")
    assert scene.guest.ask(blk_header(FLUSH), [1]).data[-1] == OK


def test_zeroes_that_are_written_through(scene: Scene) -> None:
    """Zeroes for a guest that does not flush are answered once they are flushed, and hold nobody up."""
    device = scene.guest.device
    assert isinstance(device, BlkDevice)
    device.write_config(32, b"\0")
    os.truncate(scene.directory / "disk.img", IMAGE_BYTES)
    head = scene.guest.send([blk_header(WRITE_ZEROES), blk_range(0, 8)], [1])
    wait_until(lambda: scene.begun == 1, what="the flush")
    assert scene.read(queue=1) == OK
    assert scene.unanswered(head)
    scene.let_go()
    assert scene.status(head) == OK
