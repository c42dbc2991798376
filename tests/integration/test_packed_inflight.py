"""The region of what packed rings have in flight, in real processes: deaths under load, and what front-ends give."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from tests.helpers import TORTURE_SECONDS, wait_until
from tests.integration.traffic import Traffic
from tests.net_driver import F_EVENT_IDX, F_INDIRECT_DESC, F_MRG_RXBUF, F_VERSION_1, Guest
from tests.request_driver import FEATURES, RequestGuest
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.requests import PythonDevice
from vhostmp.shm import inflight
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.frontend import memfd
from vhostmp.tools.stress.packed import WRAP
from vhostmp.tools.stress.ring import F_RING_PACKED

ALL: Final = F_VERSION_1 | F_RING_PACKED | F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX
REQUESTS: Final = FEATURES | F_RING_PACKED
PIPE: Final = f"python:{Path(__file__).with_name('devices.py')}:Pipe"
NUM: Final = 100
PART: Final = inflight.queue_bytes(NUM, packed=True)
TURNS: Final = int(8 * TORTURE_SECONDS)
#: version, desc_num, free_head, old_free_head, used_idx, old_used_idx, both wrap counters; from byte 8 on.
HEADER: Final = struct.Struct("=HHHHHHBB")


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker."""
    with Pool(workers=1) as one:
        yield one


@pytest.fixture
def region() -> Iterator[int]:
    """Make a region for two rings."""
    fd, _ = inflight.create(2, NUM, packed=True)
    yield fd
    os.close(fd)


def give(guest: Guest, fd: int, base: int | None = None) -> None:
    """Start the rings again with a region; at `base` if there is one, else where they were stopped."""
    bases = guest.stop()
    guest.device.set_inflight(fd, 0, 2 * PART, 2, NUM)
    for index in range(2):
        guest.start(index, bases[index] if base is None else base)


def where(fd: int, index: int) -> int:
    """Return the position at which a region says that a ring stands; nothing is in flight."""
    version, entries, *heads, used, old, wrap, old_wrap = HEADER.unpack_from(os.pread(fd, PART, index * PART), 8)
    assert (version, entries, *heads) == (1, NUM, 0, 0)
    assert (used, wrap) == (old, old_wrap)
    return int(used | wrap << 15)


@pytest.mark.slow
def test_killed_under_load(pool: Pool, region: int) -> None:
    """Workers that die under load leave no note behind, and a back-end that comes after all of them goes on."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, features=ALL, num=NUM) as guest:
        give(guest, region)
        with Traffic(guest.pairs[0], returns=False) as traffic:
            for turn in range(TURNS):
                traffic.progress_sent(200)
                os.kill(pool.workers[0].pid, signal.SIGKILL)
                wait_until(lambda turn=turn: pool.restarts > turn)  # type: ignore[misc]
            traffic.pause()
            device.stop_all()
            assert [where(region, index) & ~WRAP < NUM for index in range(2)] == [True, True]
            with Pool(workers=2) as other:
                guest.device = NetDevice(other, backend="loopback")  # type: ignore[misc]
                guest.device.set_owner()
                guest.device.set_features(ALL)
                guest.set_mem_table()
                guest.device.set_inflight(region, 0, 2 * PART, 2, NUM)
                for index in range(2):
                    guest.start(index, WRAP)
                traffic.resume()
                traffic.progress_sent(200)
                tally = traffic.finish()
                guest.stop()
                guest.device.close()
        pair = guest.pairs[0]
        assert not pair.tx.in_flight
        assert tally.reordered == 0
        assert [where(region, 0), where(region, 1)] == [pair.rx.used_idx, pair.tx.used_idx]


def test_requests_are_resubmitted(region: int) -> None:
    """Requests that a back-end had and has not finished when it died are served by the next one, each once."""
    with Pool(workers=1) as first, RequestGuest(PythonDevice(first, backend=PIPE), features=REQUESTS, num=NUM) as guest:
        for queue in range(2):
            guest.device.stop_vring(queue)
        guest.device.set_inflight(region, 0, 2 * PART, 2, NUM)
        guest.start(WRAP | WRAP << 16)
        heads = [guest.send(writable=[4]) for _ in range(5)]
        guest.ask(b"12345678", queue=1)
        assert [guest.wait(head).data for head in heads[:2]] == [b"1234", b"5678"]
        first.kill_worker(0)
        guest.device.close()
        with Pool(workers=1) as second, closing(PythonDevice(second, backend=PIPE)) as device:
            guest.device = device
            device.set_owner()
            device.set_features(REQUESTS)
            device.set_mem_table([guest.memory.region])
            device.set_inflight(region, 0, 2 * PART, 2, NUM)
            guest.start(0)
            guest.ask(b"abcdefghijkl", queue=1)
            assert [guest.wait(head).data for head in heads[2:]] == [b"abcd", b"efgh", b"ijkl"]
            for ring in guest.rings:
                ring.check_idle()


def test_started_again(pool: Pool, region: int) -> None:
    """A ring that is stopped and started again, elsewhere, takes its region along, into other memory too."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, features=ALL, num=NUM) as guest:
        give(guest, region)
        with Traffic(guest.pairs[0], window=50) as traffic:
            for _ in range(3):
                traffic.progress(150)
                traffic.pause()
                guest.move(b"\xa5")
                traffic.resume()
            tally = traffic.finish()
        assert (tally.missing, tally.duplicated, tally.reordered) == (0, 0, 0), tally
        guest.stop()
        assert where(region, 1) == guest.pairs[0].tx.used_idx


def test_inconsistent_region(pool: Pool, region: int, caplog: pytest.LogCaptureFixture) -> None:
    """A region that contradicts itself is told of in one line for each ring, each time, and rings start at the base."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, features=ALL, num=NUM) as guest:
        line = "queue 1 stands where the front-end says: its region of what is in flight is not used"
        for times in (1, 2):
            os.pwrite(region, HEADER.pack(1, NUM, 0, 0, NUM, 0, 1, 1), PART + 8)
            give(guest, region)
            wait_until(lambda n=times: caplog.text.count(line) == n, what=f"log line {times}")  # type: ignore[misc]
            assert caplog.text.count("inconsistent: used_idx") == times
            with Traffic(guest.pairs[0], window=50) as traffic:
                traffic.progress(300)
                tally = traffic.finish()
            assert (tally.missing, tally.duplicated, tally.reordered) == (0, 0, 0), tally


@pytest.mark.slow
def test_truncated_region(pool: Pool) -> None:
    """A region that is made shorter under load stops its rings, and the worker's replacement goes on with others."""
    device = NetDevice(pool, name="evil", backend="loopback")
    victim = NetDevice(pool, name="victim", backend="loopback")
    with memfd() as fd, Guest(device, features=ALL, num=NUM) as guest, Guest(victim) as other:
        os.truncate(fd, 2 * PART)
        give(guest, fd)
        with Traffic(other.pairs[0], returns=False) as traffic, Traffic(guest.pairs[0], returns=False) as doomed:
            doomed.progress_sent(100)
            os.truncate(fd, 0)
            wait_until(
                lambda: [queue["broken"] for queue in device.snapshot()["queues"]] == ["memory"] * 2,
                what="rings that are broken",
            )
            traffic.progress_sent(300)
            doomed.pause()
            doomed.abandon()
            traffic.finish()
        assert [queue["broken"] for queue in victim.snapshot()["queues"]] == [None, None]


def test_refused(pool: Pool, region: int, caplog: pytest.LogCaptureFixture) -> None:
    """A region is refused while rings run, and where no worker can use it; one that is too small is not used."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, features=ALL, num=NUM) as guest:
        with pytest.raises(LocalError, match="rings run: stop them before"):
            device.set_inflight(region, 0, 2 * PART, 2, NUM)
        guest.stop()
        for arguments, why in (
            ((region, 1, 2 * PART - 1, 1, NUM), "offset 0x1 is not a multiple of 64"),
            ((region, 0, 2 * PART - 1, 2, NUM), "are too few for 2 queues of 100"),
            ((region, 64, 2 * PART, 2, NUM), "the file has"),
            ((guest.pairs[0].kicks[0], 0, 2 * PART, 2, NUM), "not one of shared memory"),
        ):
            with pytest.raises(LocalError, match=why):
                device.set_inflight(*arguments)
        reading = os.open(f"/proc/self/fd/{region}", os.O_RDONLY)
        with pytest.raises(LocalError, match="not open for reading and writing"):
            device.set_inflight(reading, 0, 2 * PART, 2, NUM)
        os.close(reading)
        before = os.pread(region, 2 * PART, 0)
        device.set_inflight(region, 0, 2 * PART, 2, NUM // 2)
        for index in range(2):
            guest.start(index, WRAP | WRAP << 16)
        assert caplog.text.count("has more descriptors than its region of what is in flight: not used") == len("rt")
        with Traffic(guest.pairs[0], window=50) as traffic:
            traffic.progress(100)
            traffic.finish()
        assert os.pread(region, 2 * PART, 0) == before
