"""What waits when something is exchanged is not lost: frames in a tap's queue, packets for a ring that is stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Final

import pytest

from tests.helpers import PATIENCE, wait_until
from tests.net_driver import F_MRG_RXBUF, F_VERSION_1, FEATURES, Guest, Pair
from tests.taps import inject, ip, needs_tap, tap_name
from vhostmp import steps
from vhostmp.net import NetDevice
from vhostmp.shm import layout
from vhostmp.shm._epoch import published
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import F_RING_PACKED

FRAME: Final = bytes.fromhex("525400000002525400000001") + b"\x88\xb5"
WAITING: Final = 100
BATCH: Final = 10
#: More work items than these for one frame would mean that its worker spins.
ITEMS_MOST: Final = 100


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker."""
    with Pool(workers=1) as one:
        yield one


def numbered(number: int, size: int = 60) -> bytes:
    """Return a frame with a number."""
    return (FRAME + number.to_bytes(4, "little")).ljust(size, b"\0")


def numbers(pair: Pair) -> list[int]:
    """Receive, and return the numbers of the frames that have one."""
    return [int.from_bytes(frame[14:18], "little") for frame in pair.receive() if frame[:14] == FRAME]


def fill(name: str, count: int, size: int = 60) -> None:
    """Have numbered frames wait in the queue of a tap or packet socket. Nothing else shall come."""
    for number in range(count):
        inject(name, numbered(number, size))


def items(pool: Pool) -> int:
    """Return how many work items the worker has run."""
    count: int = pool.snapshot()["workers"][0]["items"]
    return count


def quiet(name: str) -> None:
    """Keep the kernel from sending frames of its own out of an interface."""
    ip("link", "set", name, "addrgenmode", "none")
    ip("link", "set", name, "down")
    ip("link", "set", name, "up")


@pytest.fixture(params=["tap", "packet"])
def source(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Return the spec of a back-end with a queue in the kernel, and the interface whose frames come there."""
    name, other = tap_name(0), tap_name(1)
    if request.param == "tap":
        ip("tuntap", "add", name, "mode", "tap")
        quiet(name)
        spec, sender = f"tap:{name}", name
    else:
        ip("link", "add", name, "type", "veth", "peer", "name", other)
        quiet(name)
        quiet(other)
        spec, sender = f"packet:{name}", other
    try:
        yield spec, sender
    finally:
        ip("link", "delete", name)


@needs_tap
@pytest.mark.slow
@pytest.mark.parametrize("ring", [0, F_RING_PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("target", ["loopback", "null"])
@pytest.mark.parametrize("size", [60, 1000], ids=["whole", "merged"])
def test_swap_empties_the_old_queue(
    pool: Pool, source: tuple[str, str], target: str, size: int, ring: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that wait for receive buffers when the back-end is swapped are all delivered, in order, if buffers come.

    Also the one that the worker has taken already and that fits the buffers that there are only in part.
    """
    monkeypatch.setattr(steps, "DRAIN_SECONDS", PATIENCE)
    spec, sender = source
    device = NetDevice(pool, backend=spec)
    with Guest(device, features=F_VERSION_1 | F_MRG_RXBUF | ring, room=200) as guest:
        (pair,) = guest.pairs
        pair.rx_limit = 2
        if size > guest.room:
            pair.post()
        pair.kick()
        fill(sender, WAITING, size)
        before = published(pool.buf, device.slot)
        seen: list[int] = []

        def serve() -> None:
            wait_until(lambda: published(pool.buf, device.slot) > before, what="the first step")
            pair.rx_limit = guest.num
            while len(seen) < WAITING:
                pair.post()
                pair.kick()
                pair.wait()
                seen.extend(numbers(pair))

        thread = threading.Thread(target=serve)
        thread.start()
        result = device.set_backend(target)
        thread.join()
        assert seen == list(range(WAITING))
        assert result.frames_left == 0
        assert device.snapshot()["generation"] == before + 2
        assert pool.worker(0).groups.keys() == {device.state.backend.id}


@needs_tap
@pytest.mark.slow
def test_swap_without_buffers_is_bounded(pool: Pool, source: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """A guest without receive buffers holds a swap up for a moment only; what is lost is counted and logged."""
    spec, sender = source
    device = NetDevice(pool, backend=spec)
    with Guest(device) as guest:
        fill(sender, WAITING)
        began = time.monotonic()
        result = device.set_backend("null")
        assert time.monotonic() - began < steps.DRAIN_SECONDS + PATIENCE
        assert result.frames_left == WAITING
        assert f"{WAITING} frames from {spec} found no receive buffers: dropped" in caplog.text
        (pair,) = guest.pairs
        pair.post()
        pair.kick()
        assert pair.send(numbered(0))
        pair.kick()
        wait_until(pair.reap, what="the new back-end")


@needs_tap
@pytest.mark.slow
def test_a_frame_in_the_hand_is_counted(pool: Pool, source: tuple[str, str]) -> None:
    """A frame that the worker had taken and could not deliver is counted with those that it had not taken."""
    spec, sender = source
    device = NetDevice(pool, backend=spec)
    with Guest(device, features=F_VERSION_1 | F_MRG_RXBUF, room=200) as guest:
        (pair,) = guest.pairs
        pair.rx_limit = 2
        pair.post()
        pair.kick()
        fill(sender, WAITING, 1000)
        offset = layout.ring_offset(device.first_ring)
        wait_until(lambda: layout.RING.read(pool.buf, offset, "waiting") == 1, what="a frame in the hand")
        assert device.set_backend("null").frames_left == WAITING


@needs_tap
@pytest.mark.slow
@pytest.mark.parametrize("ring", [0, F_RING_PACKED], ids=["split", "packed"])
def test_drain_and_a_killed_worker(
    pool: Pool, source: tuple[str, str], ring: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies while an old queue is emptied ends the swap no worse: the new back-end is in force."""
    spec, sender = source
    device = NetDevice(pool, backend=spec)
    wait = steps.wait_until_drained

    def killing(*arguments: object) -> None:
        pool.kill_worker(0)
        wait(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(steps, "wait_until_drained", killing)
    with Guest(device, features=FEATURES | ring) as guest:
        fill(sender, WAITING)
        assert device.set_backend("loopback").frames_left == WAITING
        wait_until(lambda: pool.restarts == 1, what="the replacement")
        (pair,) = guest.pairs
        pair.post()
        assert pair.send(numbered(7))
        pair.kick()
        assert wait_until(lambda: numbers(pair), what="the new back-end") == [7]


@pytest.mark.parametrize("ring", [0, F_RING_PACKED], ids=["split", "packed"])
def test_loopback_waits_for_a_stopped_ring(pool: Pool, ring: int) -> None:
    """While the receive ring is stopped what the guest sends stays in the transmit ring; started, it all arrives."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, features=FEATURES | ring) as guest:
        (pair,) = guest.pairs
        pair.post()
        pair.kick()
        for turn in range(20):
            base = device.stop_vring(0)
            for number in range(BATCH):
                assert pair.send(numbered(BATCH * turn + number))
            pair.kick()
            device.set_vring_busyloop_timeout(1, turn)  # a flush: the worker has looked at the transmit ring
            guest.start(0, base)
            seen: list[int] = []
            wait_until(lambda seen=seen: seen.extend(numbers(pair)) or len(seen) == BATCH, what="the frames")  # type: ignore[misc]
            assert seen == [BATCH * turn + number for number in range(BATCH)]
            pair.reap()
            pair.post()
            pair.kick()
        assert device.snapshot()["queues"][1]["drops"] == {}


@pytest.mark.parametrize("ring", [0, F_RING_PACKED], ids=["split", "packed"])
def test_loopback_sees_buffers_that_come_later(pool: Pool, ring: int) -> None:
    """A frame that needs more receive buffers than loopback last saw gets those that were posted since, at once."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, features=FEATURES | ring, num=64, room=512) as guest:
        (pair,) = guest.pairs
        pair.rx_limit = 2
        pair.post()
        assert pair.send(numbered(1))
        pair.kick()
        assert wait_until(lambda: numbers(pair), what="a small frame") == [1]  # of two buffers it used one
        pair.rx_limit = 50
        assert pair.post() > 0
        assert pair.send(numbered(2).ljust(1000, b"x"))
        before = items(pool)
        pair.kick()
        assert wait_until(lambda: numbers(pair), what="a frame of two buffers") == [2]
        assert items(pool) - before < ITEMS_MOST


@pytest.mark.parametrize("ring", [0, F_RING_PACKED], ids=["split", "packed"])
def test_loopback_drops_for_a_disabled_ring(pool: Pool, ring: int) -> None:
    """A receive ring that is started and disabled takes nothing: what the guest sends is taken, dropped and counted."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, features=FEATURES | ring) as guest:
        (pair,) = guest.pairs
        pair.post()
        pair.kick()
        device.set_vring_enable(0, False)
        for number in range(BATCH):
            assert pair.send(numbered(number))
        pair.kick()
        wait_until(lambda: device.snapshot()["queues"][1]["drops"] == {"disabled": BATCH}, what="the drops")
        assert pair.receive() == []
