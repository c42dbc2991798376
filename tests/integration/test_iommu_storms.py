"""Behind an IOMMU whose guest is never still: on every back-end, on several workers, while pages move under traffic.

All memory that is not mapped is poison (tests/iommu_guest.py): what a device reads there is seen in a frame, what it
writes there is seen when the buffer is used again.
"""

from __future__ import annotations

import os
import random
import select
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.helpers import seed, wait_until
from tests.integration.traffic import Traffic
from tests.iommu_guest import PAGE, READ, RINGS_IOVA, WRITE, StrictBuffers, StrictGuest
from tests.net_driver import F_EVENT_IDX, F_INDIRECT_DESC, F_MRG_RXBUF, F_VERSION_1, Shape
from tests.taps import interface_up, ip, needs_tap, tap_name, veth, wait_for_link
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import F_RING_PACKED

ALL: Final = F_VERSION_1 | F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX
RINGS: Final = {"split": ALL, "packed": ALL | F_RING_PACKED}
F_MQ: Final = 1 << 22
SIZES: Final = (60, 61, 590, 1514)
BACKENDS: Final = Path(__file__).with_name("backends.py")
MIRROR: Final = f"python:{BACKENDS}:Mirror"
SLOW: Final = f"python:{BACKENDS}:Slow"
WINDOW: Final = 20
FRAMES: Final = 200
FRAME_BYTES: Final = 2048
ETH_P_ALL: Final = 0x0003
SOL_PACKET: Final = 263
PACKET_IGNORE_OUTGOING: Final = 23
#: Addresses that no guest has mapped.
NOWHERE: Final = 0x6000_0000_0000
STORMS: Final = 1000
PAIRS: Final = 3

rings = pytest.mark.parametrize("bits", list(RINGS.values()), ids=list(RINGS))


@contextmanager
def echoing(name: str) -> Generator[None]:
    """Send back out of a network device whatever comes in there."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK) as sock:
        sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        sock.bind((name, ETH_P_ALL))
        wait_for_link(name)
        stop = os.eventfd(0, os.EFD_CLOEXEC)

        def run() -> None:
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            poll.register(stop, select.POLLIN)
            while all(fd != stop for fd, _ in poll.poll()):
                sock.send(sock.recv(FRAME_BYTES))

        thread = threading.Thread(target=run, name="echo")
        thread.start()
        try:
            yield
        finally:
            os.eventfd_write(stop, 1)
            thread.join(30)
            os.close(stop)


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of two workers."""
    with Pool(workers=2) as one:
        yield one


@rings
@pytest.mark.parametrize(
    "kind", [pytest.param("tap", marks=needs_tap), pytest.param("packet", marks=needs_tap), "python"]
)
def test_every_back_end(pool: Pool, kind: str, bits: int) -> None:
    """Frames that a tap, a packet socket or Python take from buffers and bring to others are whole, both ways."""
    with ExitStack() as stack:
        here = there = tap_name()
        if kind == "packet":
            here, there = stack.enter_context(veth())
        elif kind == "tap":
            ip("tuntap", "add", here, "mode", "tap", "vnet_hdr")  # first, so that IPv6 can be kept from using it
            stack.callback(ip, "link", "del", here)
            interface_up(here)
        backend = MIRROR if kind == "python" else f"{kind}:{here}"
        guest = stack.enter_context(
            StrictGuest(NetDevice(pool, backend=backend, offloads=False, iommu=True), features=bits, num=64)
        )
        if kind != "python":
            stack.enter_context(echoing(there))
        (pair,) = guest.pairs
        for shape in (Shape(), Shape(split_header=True, pieces=3), Shape(indirect=True, pieces=2)):
            pair.shape = shape
            with Traffic(pair, sizes=SIZES, window=WINDOW) as traffic:
                traffic.progress(FRAMES)
                traffic.finish().check_whole()
        assert guest.iommu.unknown == 0
        assert guest.iommu.denied == []
        found = guest.device.snapshot()
        assert found["iotlb"]["misses"] >= 2 * FRAMES
        assert [queue["drops"] for queue in found["queues"]] == [{}, {}]


@rings
def test_pairs_on_two_workers(pool: Pool, bits: int) -> None:
    """Three pairs on two workers share the table: traffic goes on over swaps, moves between workers and a death."""
    device = NetDevice(pool, queue_pairs=PAIRS, backend="loopback", iommu=True)
    with ExitStack() as stack:
        guest = stack.enter_context(StrictGuest(device, features=bits | F_MQ, pairs=PAIRS, num=64))
        flows = [stack.enter_context(Traffic(pair, sizes=SIZES, window=WINDOW)) for pair in guest.pairs]

        def progress() -> None:
            for flow in flows:
                flow.progress(30)

        progress()
        for number in range(PAIRS):
            device.set_backend("loopback")
            device.attach_vring_worker(2 * number, number % 2)
            progress()
        restarts = pool.restarts
        pool.kill_worker(1)
        wait_until(lambda: pool.restarts > restarts, what="a replacement")
        progress()
        for flow in flows:
            tally = flow.finish()
            assert (tally.missing, tally.reordered) == (0, 0), tally
        assert guest.iommu.unknown == 0
        assert len({device.get_vring_worker(2 * number) for number in range(PAIRS)}) == len(pool.workers)


@rings
@pytest.mark.parametrize("backend", ["loopback", SLOW], ids=["loopback", "slow"])
def test_storms(pool: Pool, backend: str, bits: int) -> None:
    """Pages move and entries come and go at random under traffic: once told, the device uses nothing that was there."""
    rng = random.Random(seed())
    with StrictGuest(NetDevice(pool, backend=backend, iommu=True), features=bits, num=64) as guest:
        buffers, iotlb = guest.buffers, guest.iommu.iotlb
        assert isinstance(buffers, StrictBuffers)
        storms: list[Callable[[], object]] = [
            lambda: iotlb.invalidate(0, 0),
            lambda: iotlb.invalidate(RINGS_IOVA + rng.randrange(0, guest.rings.size, PAGE), PAGE),
            lambda: iotlb.invalidate(buffers.mapped(rng), PAGE << rng.randrange(12)),
            lambda: iotlb.update(
                NOWHERE + rng.randrange(512) * PAGE, PAGE << rng.randrange(4), rng.getrandbits(40), READ
            ),
            lambda: iotlb.update(NOWHERE, 512 * PAGE, guest.rings.uva, READ | WRITE),
            *[lambda: buffers.move(rng)] * 8,
        ]
        moved = 0
        with Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW) as traffic:
            for number in range(STORMS):
                moved += rng.choice(storms)() is True
                if number % 20 == 0:
                    guest.pairs[0].shape = Shape(
                        bool(rng.getrandbits(1)), rng.randrange(1, 4), bool(rng.getrandbits(1))
                    )
                    traffic.progress(5)
            traffic.progress(FRAMES)
            traffic.finish().check_whole()
        assert moved > STORMS // 4
        assert guest.iommu.unknown == 0
        assert guest.iommu.denied == []
        assert not any(queue["broken"] or queue["drops"] for queue in guest.device.snapshot()["queues"])
