"""Packed rings in real processes: every back-end, every layout of frames, and exchanges and deaths under load.

What tests/integration/test_swap.py demands of split rings, of packed ones: nothing lost, duplicated, reordered or
damaged, and no kick or interrupt lost (the guest never polls for ever).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.frames import POISON
from tests.helpers import TORTURE_SECONDS, wait_until
from tests.integration.traffic import Traffic
from tests.net_driver import F_EVENT_IDX, F_INDIRECT_DESC, F_MRG_RXBUF, F_VERSION_1, Guest, Shape
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.packed import WRAP
from vhostmp.tools.stress.ring import F_IN_ORDER, F_RING_PACKED

MIRROR: Final = f"python:{Path(__file__).with_name('backends.py')}:Mirror"
PLAIN: Final = F_VERSION_1 | F_RING_PACKED
ALL: Final = PLAIN | F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX
SIZES: Final = (60, 61, 590, 1514)
#: Frames under way at most, so that each finds a receive buffer.
WINDOW: Final = 80
TURNS: Final = int(30 * TORTURE_SECONDS)
#: No power of two, as only a packed ring may be.
NUM: Final = 100


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker."""
    with Pool(workers=1) as one:
        yield one


@pytest.mark.slow
@pytest.mark.parametrize(
    "bits",
    [PLAIN, PLAIN | F_EVENT_IDX, PLAIN | F_IN_ORDER, ALL, ALL | F_IN_ORDER],
    ids=["plain", "event_idx", "in_order", "all", "all_in_order"],
)
@pytest.mark.parametrize("num", [NUM, 256, 1024])
def test_swap_under_load(pool: Pool, bits: int, num: int) -> None:
    """Swaps between loopbacks and a back-end in Python lose, repeat and reorder nothing, and notify."""
    device = NetDevice(pool, backend="loopback")
    with (
        Guest(device, features=bits, num=num) as guest,
        Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW) as traffic,
    ):
        for turn in range(TURNS):
            device.set_backend((MIRROR, "loopback", "loopback")[turn % 3])
            traffic.progress(50)
        tally = traffic.finish()
    assert (tally.missing, tally.duplicated, tally.reordered) == (0, 0, 0), tally
    assert pool.restarts == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [Shape(), Shape(split_header=True), Shape(pieces=3), Shape(split_header=True, pieces=4, indirect=True)],
    ids=["one", "split_header", "pieces", "indirect"],
)
@pytest.mark.parametrize("room", [2048, 200], ids=["large_buffers", "merged_buffers"])
@pytest.mark.parametrize("backend", ["loopback", MIRROR], ids=["loopback", "python"])
def test_every_shape(pool: Pool, shape: Shape, room: int, backend: str) -> None:
    """However the guest lays its frames out, and in however many receive buffers, they come back whole."""
    device = NetDevice(pool, backend=backend)
    with Guest(device, room=room, features=ALL, num=NUM) as guest:
        guest.pairs[0].shape = shape
        with Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW if room >= max(SIZES) else 8) as traffic:
            traffic.progress(1000)
            tally = traffic.finish()
        assert (tally.missing, tally.duplicated, tally.reordered) == (0, 0, 0), tally
        if room < max(SIZES):
            assert guest.pairs[0].most_buffers > 1


@pytest.mark.slow
def test_move_under_load(pool: Pool) -> None:
    """A ring that is stopped goes on where it stood, in other memory, whatever the wrap counters are."""
    device = NetDevice(pool, backend="loopback")
    places: set[int] = set()
    with Guest(device, features=ALL, num=NUM) as guest:
        with Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW) as traffic:
            for _ in range(TURNS):
                traffic.progress(20)
                traffic.pause()
                guest.move(POISON)
                places |= {device.snapshot()["queues"][index]["last_avail_idx"] >> 15 for index in range(2)}
                traffic.resume()
            tally = traffic.finish()
        assert (tally.missing, tally.duplicated, tally.reordered) == (0, 0, 0), tally
        bases = guest.stop()
        assert [base & 0xFFFF for base in bases] == [base >> 16 for base in bases]
    assert places == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [PLAIN, ALL], ids=["plain", "all"])
def test_killed_under_load(pool: Pool, bits: int) -> None:
    """A worker killed again and again loses no descriptor: every chain comes back, and frames go on."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, features=bits, num=NUM) as guest:
        with Traffic(guest.pairs[0], sizes=SIZES, returns=False) as traffic:
            for turn in range(TURNS):
                traffic.progress_sent(50)
                os.kill(pool.workers[0].pid, signal.SIGKILL)
                wait_until(lambda turn=turn: pool.restarts > turn)  # type: ignore[misc]
            tally = traffic.finish()
            assert not guest.pairs[0].tx.in_flight
        assert [queue["broken"] for queue in device.snapshot()["queues"]] == [None, None]
        assert tally.reordered == 0


def test_null_counts(pool: Pool) -> None:
    """The null back-end takes what a packed ring has."""
    device = NetDevice(pool, backend="null")
    with Guest(device, features=PLAIN, num=7) as guest, Traffic(guest.pairs[0], returns=False) as traffic:
        traffic.progress_sent(500)
        tally = traffic.finish()
        # A work item counts its drops when it ends, which may be after the driver has its buffers back.
        wait_until(lambda: device.snapshot()["queues"][1]["drops"] == {"null": tally.sent})


@pytest.mark.parametrize(
    ("num", "base", "why"),
    [
        (100, 100, "not in a packed ring of 100"),
        (100, WRAP | 99 | 100 << 16, "not in a packed ring of 100"),
        (100, 5 | 6 << 16, "not in a packed ring of 100"),
        (100, (WRAP | 6) | 5 << 16, "not in a packed ring of 100"),
        (100, 1 << 32, "more than 32 bits"),
        (0, 0, "not from 1 to 32768"),
        (32769, 0, "not from 1 to 32768"),
    ],
)
def test_refused(pool: Pool, num: int, base: int, why: str) -> None:
    """A size that no ring has and a base outside the ring are refused in one line, and nothing starts."""
    device = NetDevice(pool, backend="null")
    with Guest(device, features=PLAIN, num=7) as guest:
        guest.stop()
        with pytest.raises(LocalError, match=why):  # noqa: PT012 - which verb finds it is not promised
            device.set_vring_num(0, num)
            device.set_vring_base(0, base)
            device.start_vring(0)
        assert not device.snapshot()["queues"][0]["started"]


def test_split_sizes_stay(pool: Pool) -> None:
    """Without the feature a size that is no power of two is refused, even if it was set while packed was acked."""
    device = NetDevice(pool, backend="null")
    with Guest(device, features=PLAIN, num=7) as guest:
        guest.stop()
        device.set_features(F_VERSION_1)
        with pytest.raises(LocalError, match="not a power of two"):
            device.start_vring(0)
        with pytest.raises(LocalError, match="not a power of two"):
            device.set_vring_num(0, 12)


@pytest.mark.parametrize("bits", [F_VERSION_1, PLAIN], ids=["split", "packed"])
def test_one_pair_is_reset_and_resized_alone(pool: Pool, bits: int) -> None:
    """Rings of a pair are stopped, laid out anew with another size and started while the other runs on (2.6.1)."""
    device = NetDevice(pool, queue_pairs=2, backend="loopback")
    with Guest(device, pairs=2, features=bits, num=64) as guest:
        with Traffic(guest.pairs[0], sizes=SIZES, window=40) as traffic:
            for num in (16, 64, 8) if bits == F_VERSION_1 else (10, 63, 8):
                traffic.progress(50)
                guest.resize(1, num)
                with Traffic(guest.pairs[1], sizes=SIZES, window=4) as other:
                    other.progress(100)
                    tally = other.finish()
                assert (tally.missing, tally.duplicated, tally.reordered) == (0, 0, 0), tally
                assert [queue["size"] for queue in device.snapshot()["queues"]] == [64, 64, num, num]
            tally = traffic.finish()
        assert (tally.missing, tally.duplicated, tally.reordered) == (0, 0, 0), tally
    assert pool.restarts == 0
