"""What a driver may do to harm the worker or other guests, in real processes: it harms itself at the most.

Each test has a shape of descriptors that once did harm. The worker must not die nor work without a bound, and what the
driver did rightly must neither break nor stall.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from tests.frames import make_frame, read_frame
from tests.helpers import PATIENCE, wait_until
from tests.net_driver import F_INDIRECT_DESC, F_MRG_RXBUF, F_VERSION_1, HEADER, Guest, Pair, as_split
from tests.taps import inject, needs_tap, quiet_tap
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.ring import F_RING_PACKED, NEXT, WRITE, Segment
from vhostmp.tools.stress.split import NetHeader, pack_descriptor
from vhostmp.workers.channel import is_readable

MIRROR: Final = f"python:{Path(__file__).with_name('backends.py')}:Mirror"
FEATURES: Final = F_VERSION_1 | F_MRG_RXBUF | F_INDIRECT_DESC
#: The limits of workers/_vring.pxd: chains and segments taken at once, segments of one chain.
BURST: Final = 64
BURST_SEGMENTS_MAX: Final = 1280
CHAIN_SEGMENTS_MAX: Final = 1024
#: Descriptors of one chain, empty ones included (workers/_vring.pyx), and frames of one work item (workers/_work.pxd).
FOUND_MAX: Final = 2048
BUDGET_PACKETS: Final = 256
#: With receive buffers of this many bytes the buffers' region is larger than 4 MiB.
LARGE_ROOM: Final = 8192


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker."""
    with Pool(workers=1) as one:
        yield one


def write_table(guest: Guest, gpa: int, segments: Sequence[Segment], flags: int = 0) -> None:
    """Write an indirect table that chains segments in their order."""
    last = len(segments) - 1
    raw = (
        pack_descriptor(addr, length, flags | (NEXT if place < last else 0), place + 1 if place < last else 0)
        for place, (addr, length) in enumerate(segments)
    )
    guest.buffers.write(gpa, b"".join(raw))


def receive(pair: Pair, count: int) -> list[int]:
    """Wait for that many frames and return their sequence numbers. Nobody is kicked meanwhile."""
    found: list[int] = []

    def all_there() -> bool:
        found.extend(read_frame(frame) for frame in pair.receive())
        return len(found) >= count

    wait_until(all_there, what=f"{count} frames; {pair.describe()}")
    return found


def broken(device: NetDevice) -> list[str | None]:
    """Return why each ring of a device is broken, None for those that are not."""
    return [queue["broken"] for queue in device.snapshot()["queues"]]


def test_more_segments_than_a_burst_holds(pool: Pool) -> None:
    """Chains that fill a burst's segments to the last, then more chains: all come back whole and in order."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, features=FEATURES) as guest:
        pair = guest.pairs[0]
        pair.post()
        sizes = [BURST_SEGMENTS_MAX - CHAIN_SEGMENTS_MAX, CHAIN_SEGMENTS_MAX]
        for sequence, size in enumerate(sizes):
            gpa, table = guest.buffers.take(), guest.buffers.memory.gpa + guest.buffers.stride * (400 + 10 * sequence)
            guest.buffers.write(gpa, NetHeader().pack() + make_frame(sequence, size - HEADER))
            segments = [(gpa + at, 1) for at in range(size)]
            write_table(guest, table, segments)
            pair.tx.add_table(table, segments)
        for sequence in range(len(sizes), BURST):
            assert pair.send(make_frame(sequence, 60))
        pair.kick()
        assert receive(pair, BURST) == list(range(BURST))
        assert broken(device) == [None, None]
    assert pool.restarts == 0


def test_each_break_is_logged(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    """A ring that breaks is logged with its reason, and again when it was started anew and breaks again."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, features=FEATURES) as guest:
        pair = guest.pairs[0]
        for times in (1, 2):
            as_split(pair.tx).set_avail_idx(pair.tx.avail_idx + guest.num + 1)
            os.eventfd_write(pair.kicks[1], 1)
            wait_until(lambda: broken(device)[1] == "avail_idx", what="the ring to break")
            wait_until(lambda n=times: caplog.text.count("queue 1 stopped") == n, what=f"log line {times}")  # type: ignore[misc]
            base = guest.device.stop_vring(1)
            as_split(pair.tx).set_avail_idx(pair.tx.avail_idx)
            guest.start(1, base)
            assert broken(device)[1] is None
    assert pool.restarts == 0


def test_lengths_whose_sum_wraps(pool: Pool) -> None:
    """A receive chain of 2**32 - 1 bytes after one of 100: their sum does not wrap, the packet takes just those two."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, features=FEATURES, room=LARGE_ROOM) as guest:
        pair, base = guest.pairs[0], guest.buffers.memory.gpa
        first, third, table = base + 0x100000, base + 0x110000, base + 0x120000
        total, count = (1 << 32) - 1, 1000
        segments = [(base, total // count)] * (count - 1) + [(base, total - total // count * (count - 1))]
        write_table(guest, table, segments, WRITE)
        pair.rx.add([], [(first, 100)])
        pair.rx.add_table(table, [], segments)
        pair.rx.add([], [(third, 4096)])
        frame = make_frame(7, 1000)
        data = NetHeader().pack() + frame
        pair.tx.add([(base + 0x200000, len(data))])
        guest.buffers.write(base + 0x200000, data)
        pair.kick()
        lengths = [100, len(data) - 100]
        wait_until(lambda: pair.rx.pending() >= len(lengths), what=f"two used buffers; {pair.describe()}")
        assert [one.length for one in pair.rx.reap()] == lengths
        got = guest.buffers.read(first, 100) + guest.buffers.read(base, len(data) - 100)
        assert NetHeader.unpack(got).num_buffers == len(lengths)
        assert got[HEADER:] == frame
        assert broken(device) == [None, None]


@pytest.mark.parametrize("backend", ["loopback", MIRROR], ids=["loopback", "python"])
def test_receive_chains_of_many_segments(pool: Pool, backend: str) -> None:
    """Where receive chains fill a burst by their segments, packets still all arrive, without another kick."""
    device = NetDevice(pool, backend=backend)
    with Guest(device, features=F_VERSION_1 | F_INDIRECT_DESC, room=LARGE_ROOM) as guest:
        pair = guest.pairs[0]
        for _ in range(guest.num):
            table = guest.buffers.take()
            segments = [(table + 512 + 256 * place, 256) for place in range(19)]
            write_table(guest, table, segments, WRITE)
            pair.rx.add_table(table, [], segments)
        for sequence in range(BURST):
            assert pair.send(make_frame(sequence, 60))
        pair.kick()
        assert receive(pair, BURST) == list(range(BURST))
        wait_until(lambda: pair.tx.pending() == BURST, what="the transmit chains")


@pytest.mark.parametrize("backend", ["loopback", MIRROR], ids=["loopback", "python"])
@pytest.mark.parametrize("ring", [0, F_RING_PACKED], ids=["split", "packed"])
def test_broken_receive_ring(pool: Pool, backend: str, ring: int) -> None:
    """A driver that broke its receive ring may go on sending: what it sends is taken and dropped.

    The ring is stopped by whoever finds it broken, its own work item or the other ring's, and its front-end is told.
    """
    device = NetDevice(pool, backend=backend)
    with Guest(device, features=FEATURES | ring) as guest, frontend.eventfds(1) as (err,):
        device.set_vring_err(0, err)
        pair = guest.pairs[0]
        pair.rx.add([], [(0xDEAD0000000, 2048)])
        for _ in range(3):
            for sequence in range(10):
                assert pair.send(make_frame(sequence, 60))
            pair.kick()
            wait_until(lambda: pair.reap() >= 0 and not pair.tx.in_flight, what=pair.describe())
        wait_until(lambda: broken(device) == ["address", None], what=f"a broken ring: {broken(device)}")
        assert not pair.rx.pending()
        assert is_readable(err, PATIENCE)


@pytest.mark.parametrize(
    ("empty", "reason"), [(FOUND_MAX - 1, None), (FOUND_MAX, "segments"), (65535, "segments")], ids=str
)
def test_descriptors_of_no_length(pool: Pool, empty: int, reason: str | None) -> None:
    """Descriptors of length 0 hold nothing, but each costs time: too many in a chain break the ring."""
    device = NetDevice(pool, backend="null")
    with Guest(device, features=FEATURES, room=LARGE_ROOM) as guest:
        pair, table = guest.pairs[0], guest.buffers.memory.gpa + 0x100000
        segments = [(table, 0)] * empty + [(table, 76)]
        write_table(guest, table, segments)
        pair.tx.add_table(table, segments)
        pair.kick()
        if reason is None:
            wait_until(lambda: pair.tx.used_idx == 1, what="the packet")
        wait_until(lambda: broken(device) == [None, reason], what=f"{reason}, not {broken(device)}")
        assert pair.tx.used_idx == (0 if reason else 1)


@needs_tap
def test_flood_that_nobody_takes(pool: Pool) -> None:
    """Frames from a tap that fit no receive buffer count to the budget of a work item as those that do."""
    flood = 2048
    with quiet_tap() as name, ExitStack() as stack:
        device = NetDevice(pool, backend=f"tap:{name}")
        stack.callback(device.close)
        guest = stack.enter_context(Guest(device, features=F_VERSION_1, room=20, rx_limit=1))
        Path(f"/sys/class/net/{name}/tx_queue_len").write_text(f"{2 * flood}\n")
        device.set_vring_enable(0, False)
        guest.pairs[0].post()
        guest.pairs[0].kick()
        inject(name, make_frame(0, 60), flood)
        before = pool.snapshot()["workers"][0]["items"]
        device.set_vring_enable(0, True)
        wait_until(
            lambda: device.snapshot()["queues"][0]["drops"].get("no_room", 0) >= flood,
            what=f"{flood} drops: {device.snapshot()['queues'][0]}",
        )
        assert pool.snapshot()["workers"][0]["items"] - before >= flood // BUDGET_PACKETS
        assert guest.pairs[0].rx.used_idx == 0
