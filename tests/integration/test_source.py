"""Back-ends that are load and measure: `source:BYTES` fills what the guest offers, `null:copy` copies what it sends."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.frames import make_frame
from tests.helpers import PATIENCE, comes_to_rest, wait_until
from tests.net_driver import F_EVENT_IDX, F_MRG_RXBUF, F_VERSION_1, FEATURES, Guest, Shape
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.shm import layout
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import F_RING_PACKED

DRIVERS = {
    "split": FEATURES,
    "packed": FEATURES | F_RING_PACKED,
    "unmerged": F_VERSION_1,
    "packed_unmerged": F_VERSION_1 | F_RING_PACKED,
    "legacy": F_EVENT_IDX,
    "legacy_merged": F_MRG_RXBUF,
}
MERGED = [name for name, features in DRIVERS.items() if features & F_MRG_RXBUF]
ROOM = 2048
ROUNDS = 3
ETHERNET_HEADER, NUMBER_SIZE = 14, 8
EXPERIMENTAL = b"\x88\xb5"
#: Chains taken at once, and what ends a work item (workers/_vring.pxd, _work.pxd).
BURST, BUDGET_PACKETS, BUDGET_BYTES = 64, 256, 512 << 10
MIRROR = f"python:{Path(__file__).with_name('backends.py')}:Mirror"


@contextmanager
def guest_on(
    spec: str, features: int, *, room: int = ROOM, rx_limit: int = 64, num: int = 256
) -> Generator[tuple[Guest, Pool]]:
    """Make a guest whose buffers have `room` bytes, at most `rx_limit` of them posted at a time, in rings of `num`."""
    with Pool(workers=1) as pool:
        device = NetDevice(pool, backend=spec)
        try:
            with Guest(device, room=room, features=features, rx_limit=rx_limit, num=num) as guest:
                yield guest, pool
        finally:
            device.close()


def items(pool: Pool) -> int:
    """Return how many work items the worker has run."""
    return int(pool.snapshot()["workers"][0]["items"])


def number_of(frame: bytes) -> int:
    """Return a frame's number."""
    return int.from_bytes(frame[ETHERNET_HEADER : ETHERNET_HEADER + NUMBER_SIZE])


def fill(size: int) -> bytes:
    """Return what stands behind the number in frames of `size` bytes."""
    return bytes(k & 0xFF for k in range(ETHERNET_HEADER + NUMBER_SIZE, size))


def receive(guest: Guest, count: int) -> list[bytes]:
    """Post buffers until `count` frames have come, and return what has. Sleeps on interrupts in between."""
    (pair,) = guest.pairs
    frames: list[bytes] = []
    limit = time.monotonic() + PATIENCE
    while len(frames) < count:
        assert time.monotonic() < limit, f"{len(frames)} of {count} frames: {pair.describe()}"
        pair.post()
        pair.kick()
        if not (came := pair.receive()):
            pair.wait()
        frames.extend(came)
    return frames


@pytest.mark.parametrize("size", [60, 64, 65, 1500, 2048 - 12])
@pytest.mark.parametrize("driver", DRIVERS)
def test_every_buffer_is_filled(driver: str, size: int) -> None:
    """Frames have the size asked for, are whole, and are numbered in the order in which they come, around the ring."""
    with guest_on(f"source:{size}", DRIVERS[driver]) as (guest, _):
        frames = receive(guest, ROUNDS * guest.num)
        assert {len(frame) for frame in frames} == {size}
        assert [number_of(frame) for frame in frames] == list(range(len(frames)))
        assert {frame[12:14] for frame in frames} == {EXPERIMENTAL}
        assert {frame[ETHERNET_HEADER + NUMBER_SIZE :] for frame in frames} == {fill(size)}
        assert len({frame[6:12] for frame in frames}) == 32  # noqa: PLR2004 - so many flows
        queue = guest.device.snapshot()["queues"][0]
        assert queue["bytes"] == queue["copied"] == size * queue["packets"]
        assert queue["drops"] == {}


@pytest.mark.parametrize("driver", MERGED)
@pytest.mark.parametrize("room", [16, 300])
def test_a_frame_over_several_buffers(driver: str, room: int) -> None:
    """Where buffers can be merged a frame takes as many as it needs, wherever its header and its number are cut."""
    size = 700
    with guest_on(f"source:{size}", DRIVERS[driver], room=room) as (guest, _):
        frames = receive(guest, ROUNDS * guest.num * room // size)
        assert [number_of(frame) for frame in frames] == list(range(len(frames)))
        assert {frame[ETHERNET_HEADER + NUMBER_SIZE :] for frame in frames} == {fill(size)}
        assert guest.pairs[0].most_buffers == -(-(size + 12) // room)


@pytest.mark.parametrize("driver", MERGED)
def test_waits_for_the_rest_of_the_buffers(driver: str) -> None:
    """With too few buffers for one frame the ring rests, and a driver that adds the last one is heard."""
    size, room = 9000, 1024
    needed = -(-(size + 12) // room)
    with guest_on(f"source:{size}", DRIVERS[driver], room=room, rx_limit=1) as (guest, pool):
        (pair,) = guest.pairs
        for posted in range(1, needed + 1):
            assert pair.receive() == []
            pair.rx_limit = posted
            pair.post()
            pair.kick()
            if posted < needed:
                assert comes_to_rest(lambda: items(pool))
        (frame,) = receive(guest, 1)
        assert (len(frame), number_of(frame)) == (size, 0)
        assert guest.device.snapshot()["queues"][0]["drops"] == {}


@pytest.mark.parametrize("driver", [name for name in DRIVERS if name not in MERGED])
def test_a_buffer_that_no_frame_fits_into(driver: str) -> None:
    """Where buffers cannot be merged one that is too small is left alone: counted for each kick, and nothing spins."""
    with guest_on("source:1500", DRIVERS[driver], room=1024, rx_limit=2 * BURST) as (guest, pool):
        (pair,) = guest.pairs
        pair.post()
        pair.kick()
        wait_until(lambda: guest.device.snapshot()["queues"][0]["drops"].get("no_room"), what="the drop")
        assert comes_to_rest(lambda: items(pool))
        os.eventfd_write(pair.kicks[0], 1)
        wait_until(lambda: guest.device.snapshot()["queues"][0]["drops"]["no_room"] > 1, what="the second")
        assert pair.receive() == []


@pytest.mark.parametrize("driver", MERGED)
def test_a_frame_that_a_whole_burst_does_not_hold(driver: str) -> None:
    """Where as many buffers as are taken at once have no room for one frame that is counted, and nothing spins."""
    with guest_on("source:9000", DRIVERS[driver], room=16, rx_limit=2 * BURST) as (guest, pool):
        (pair,) = guest.pairs
        pair.post()
        pair.kick()
        wait_until(lambda: guest.device.snapshot()["queues"][0]["drops"].get("no_room"), what="the drop")
        assert comes_to_rest(lambda: items(pool))
        assert pair.receive() == []


@pytest.mark.parametrize(("size", "packets_most"), [(60, BUDGET_PACKETS), (9000, BUDGET_BYTES // 9000 + BURST)])
def test_others_get_their_turn(size: int, packets_most: int) -> None:
    """A work item ends after so many packets, or bytes, however many buffers there are."""
    with guest_on(f"source:{size}", FEATURES, room=size + 12, rx_limit=1024, num=1024) as (guest, pool):
        (pair,) = guest.pairs
        assert comes_to_rest(lambda: items(pool))
        before = items(pool)
        pair.post()
        pair.kick()
        wait_until(lambda: guest.device.snapshot()["queues"][0]["packets"] == guest.num, what="all buffers filled")
        assert comes_to_rest(lambda: items(pool))
        assert items(pool) - before >= guest.num // packets_most


@pytest.mark.parametrize("spec", ["null", "source:60"])
def test_nothing_waits_any_more(spec: str) -> None:
    """What the back-end before had in its hand was dropped with it: a death of the worker does not cost it again."""
    with guest_on(MIRROR, FEATURES, room=200, rx_limit=2) as (guest, pool):
        (pair,) = guest.pairs
        offset = layout.ring_offset(guest.device.first_ring)
        pair.post()
        assert pair.send(make_frame(0, 1000))
        pair.kick()
        wait_until(lambda: layout.RING.read(pool.buf, offset, "waiting") == 1, what="a frame in the hand")
        assert guest.device.set_backend(spec).frames_left == 1
        wait_until(lambda: layout.RING.read(pool.buf, offset, "waiting") == 0, what="none")


def test_what_is_sent_to_a_source_is_dropped() -> None:
    """It sends as null does: counted and dropped."""
    with guest_on("source:64", FEATURES) as (guest, _):
        (pair,) = guest.pairs
        assert pair.send(bytes(100))
        pair.kick()
        wait_until(pair.reap, what="the buffer")
        assert guest.device.snapshot()["queues"][1]["drops"] == {"null": 1}


@pytest.mark.parametrize("spec", ["source", "source:", "source:59", "source:65563", "source:x", "source:-64", "null:x"])
def test_sizes_are_checked(spec: str) -> None:
    """A size that no frame has is refused, in a line that says what to write."""
    with Pool(workers=1) as pool, pytest.raises(LocalError, match="source:"):
        NetDevice(pool, backend=spec)


@pytest.mark.parametrize("spec", ["null", "null:copy"])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("driver", DRIVERS)
def test_null_copies(driver: str, pieces: int, spec: str) -> None:
    """null:copy counts what it copies: frames without their headers; null copies nothing."""
    with guest_on(spec, DRIVERS[driver]) as (guest, _):
        (pair,) = guest.pairs
        pair.shape = Shape(pieces=pieces)
        frames = [bytes(size) for size in (60, 61, 1500, 2000)] * 50
        for frame in frames:
            wait_until(lambda frame=frame: pair.reap() >= 0 and pair.send(frame))  # type: ignore[misc]
            pair.kick()
        wait_until(lambda: pair.reap() >= 0 and not pair.tx.in_flight, what="the buffers")
        queue = guest.device.snapshot()["queues"][1]
        sent = sum(map(len, frames))
        assert (queue["packets"], queue["bytes"], queue["drops"]) == (len(frames), sent, {"null": len(frames)})
        assert queue["copied"] == (0 if spec == "null" else sent)


@pytest.mark.parametrize("size", [65000, 300_000], ids=["as large as any", "larger than all room"])
def test_null_copies_what_it_has_no_room_for(size: int) -> None:
    """What it copies to has an end, which neither a burst nor one frame of a hostile guest gets past."""
    with guest_on("null:copy", FEATURES, room=size + 12, num=64) as (guest, pool):
        (pair,) = guest.pairs
        for _ in range(guest.num):
            assert pair.send(bytes(size))
        pair.kick()
        wait_until(lambda: pair.reap() >= 0 and not pair.tx.in_flight, what="the buffers")
        assert guest.device.snapshot()["queues"][1]["packets"] == guest.num
        assert pool.restarts == 0


@pytest.mark.parametrize("spec", ["null", "null:copy"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_shorter_than_a_header(driver: str, spec: str) -> None:
    """What does not even hold a header is no frame: counted as that alone, and given back."""
    with guest_on(spec, DRIVERS[driver]) as (guest, pool):
        (pair,) = guest.pairs
        for size in (1, 9):
            pair.tx.add([(guest.buffers.take(), size)])
        assert pair.send(bytes(60))
        pair.kick()
        wait_until(lambda: pair.reap() >= 0 and not pair.tx.in_flight, what="the buffers")
        queue = guest.device.snapshot()["queues"][1]
        assert (queue["packets"], queue["bytes"], queue["drops"]) == (1, 60, {"null": 1, "short": 2})
        assert queue["copied"] == (0 if spec == "null" else 60)
        assert pool.restarts == 0
