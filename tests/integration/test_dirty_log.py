"""The dirty log, with real workers: every page that a device changes is logged, and no page beside those it wrote.

A burst here is some receive buffers and some packets of random sizes and shapes, made available at once. All guest
memory is compared before and after it, page by page.
"""

from __future__ import annotations

import os
import random
import select
import socket
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import attrs
import pytest

from tests.dirty import DirtyLog, Watch, pages_of
from tests.helpers import wait_until
from tests.integration.traffic import Traffic
from tests.net_driver import F_EVENT_IDX, F_INDIRECT_DESC, F_MRG_RXBUF, F_VERSION_1, Guest, Pair, Shape
from tests.taps import interface_up, ip, needs_tap, quiet_tap, tap_name, wait_for_link
from vhostmp.deaths import EARLY_DEATH
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import F_RING_PACKED

BACKENDS: Final = Path(__file__).with_name("backends.py")
MIRROR: Final = f"python:{BACKENDS}:Mirror"
BASE: Final = F_VERSION_1 | F_INDIRECT_DESC
#: A log with a bit for each page of a Guest's memory: packet buffers begin at 1 GiB.
LOG_BYTES: Final = (1 << 30) // 4096 // 8 + 256
BURSTS: Final = 700
DEATHS: Final = 25
FRAME_MIN: Final = 14
MTU: Final = 1500
#: Longer than the MTU that the device knows: the tap's is raised behind its back.
LONG_FRAME: Final = 1900

pytestmark = pytest.mark.slow


@attrs.frozen
class Case:
    """A back-end and how the guest drives it."""

    name: str
    backend: str = "loopback"
    features: int = BASE | F_MRG_RXBUF | F_EVENT_IDX
    num: int = 64
    room: int = 2048
    offset: int = 0


CASES: Final = [
    Case("loopback"),
    Case("loopback small buffers", room=200, num=512, offset=100),
    Case("loopback flags", features=BASE | F_MRG_RXBUF, room=700),
    Case("loopback one buffer", features=BASE | F_EVENT_IDX, num=512),
    Case("loopback legacy header", features=F_INDIRECT_DESC),
    Case("loopback packed", features=BASE | F_MRG_RXBUF | F_EVENT_IDX | F_RING_PACKED, room=300),
    Case("loopback packed flags", features=BASE | F_RING_PACKED, num=512),
    Case("python packed", MIRROR, features=BASE | F_MRG_RXBUF | F_RING_PACKED, num=512, room=700),
    Case("null", "null"),
    Case("null flags", "null", features=BASE, num=512),
    Case("python", MIRROR, room=300),
    Case("python flags", MIRROR, features=BASE),
]


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker."""
    with Pool(workers=1) as one:
        yield one


class Bursts:
    """Makes random bursts on a pair, and judges the log after each."""

    def __init__(self, watch: Watch, rng: random.Random) -> None:
        """Log from now on."""
        self.watch: Final = watch
        self.pair: Final[Pair] = watch.guest.pairs[0]
        self.rng: Final = rng
        self.logged = 0
        self.delivered = 0
        watch.settle()
        self._counted = self.counter("log_pages")

    def counter(self, name: str) -> int:
        """Return a counter of both rings."""
        return sum(queue[name] for queue in self.watch.device.snapshot()["queues"])

    def finish(self, *, late: bool = False) -> None:
        """Compare with what the device has counted; `late`: some of it may have come after it was looked for."""
        counted = self.counter("log_pages") - self._counted
        print(f"{self.delivered} buffers, {self.logged} pages, {counted} counted")
        assert counted == self.logged or (late and counted > self.logged)
        assert self.counter("log_outside") == 0

    def fill(self, most: int = 24) -> None:
        """Make receive buffers and packets available; the device does not see them yet."""
        rng, pair, guest = self.rng, self.pair, self.watch.guest
        for _ in range(rng.randrange(most)):
            if len(pair.rx.free) < 2 or len(guest.buffers.free) < guest.buffers.count // 4:  # noqa: PLR2004
                break
            gpa, cut = guest.buffers.take(), rng.choice((0, 0, 1, 12, 64, guest.room // 2))
            pair.rx.add([], [(gpa, cut), (gpa + cut, guest.room - cut)] if cut else [(gpa, guest.room)])
        for _ in range(rng.randrange(most)):
            pair.shape = Shape(rng.random() < 0.3, rng.randrange(1, 4), rng.random() < 0.2)  # noqa: PLR2004
            if len(guest.buffers.free) < guest.buffers.count // 4:
                break
            pair.send(rng.randbytes(rng.choice((FRAME_MIN, 60, 300, 1000, 2000))))

    def go(self, frames: Sequence[bytes] = (), wire: socket.socket | None = None, *, kill: int | None = None) -> None:
        """Show the device what there is, send some frames to it by what its back-end reads, and let it do everything.

        `kill`: have the worker die meanwhile, so many turns of an empty loop after the kick.
        """
        pair, watch = self.pair, self.watch
        wants = [pair.rx.publish(), pair.tx.publish()]
        watch.begin()
        for fd, wanted in zip(pair.kicks, wants, strict=True):
            if wanted:
                os.eventfd_write(fd, 1)
        if kill is not None:
            for _ in range(kill):
                pass
            restarts = watch.pool.restarts
            watch.pool.kill_worker(0)
            wait_until(lambda: watch.pool.restarts > restarts, what="the replacement")
        for frame in frames:
            assert wire is not None
            wire.send(frame)
        watch.settle()

    def judge(self, *, unused: bool = False) -> None:
        """Compare.

        `unused`: buffers may have been written that were not given back, or not for so many bytes, by frames that come
        when the kernel brings them: one may be on its way into memory right now, and is logged in a moment.
        """
        watch, pair = self.watch, self.pair
        changed, logged, allowed = watch.changed(), watch.log.pages, watch.ring_words()
        if unused and not changed <= logged:
            watch.settle()
            logged = watch.log.pages
        for used in pair.rx.reap():
            assert used.length is not None
            allowed |= pages_of(used.chain.writable, used.chain.writable_bytes if unused else used.length)
            watch.guest.buffers.give(used.chain.writable[0][0])
            self.delivered += 1
        pair.reap()
        if unused:
            for chain in pair.rx.in_flight.values():
                allowed |= pages_of(chain.writable, chain.writable_bytes)
        assert changed <= logged, f"pages {sorted(changed - logged)} have changed and are not logged"
        assert logged <= allowed, f"pages {sorted(logged - allowed)} are logged and were not written"
        self.logged += len(logged)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_change_is_logged_and_nothing_else(pool: Pool, case: Case, rng: random.Random) -> None:
    """Over many bursts: no changed page is unlogged, and no more pages are logged than were written."""
    device = NetDevice(pool, backend=case.backend)
    with (
        DirtyLog(LOG_BYTES, case.offset) as log,
        Guest(device, features=case.features, num=case.num, room=case.room) as guest,
    ):
        watch = Watch(pool, device, guest, log)
        watch.switch_on()
        bursts = Bursts(watch, rng)
        for _ in range(BURSTS):
            bursts.fill()
            bursts.go()
            bursts.judge()
        bursts.finish()
        assert [queue["broken"] for queue in device.snapshot()["queues"]] == [None, None]
    assert bursts.logged > BURSTS // 2
    if case.backend != "null":
        assert bursts.delivered > BURSTS


@contextmanager
def wire(name: str) -> Generator[socket.socket]:
    """Yield a socket that sends frames out of an interface."""
    ip("link", "set", name, "addrgenmode", "none")  # nobody but us sends
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((name, 0))
        yield sock


def receive_bursts(bursts: Bursts, sock: socket.socket, sizes: Sequence[int]) -> None:
    """Let the device receive while it transmits; sometimes there are too few buffers."""
    rng = bursts.rng
    for number in range(BURSTS):
        bursts.fill(1 + number % 12)
        bursts.go([rng.randbytes(rng.choice(sizes)) for _ in range(rng.randrange(4))], sock)
        bursts.judge(unused=True)
    bursts.finish(late=True)
    assert bursts.delivered > BURSTS // 2


@needs_tap
@pytest.mark.parametrize("room", [1600, 400])
def test_what_is_read_from_a_tap_is_logged(pool: Pool, room: int, rng: random.Random) -> None:
    """Frames from a tap, and what they leave in buffers that they do not get: too long, or too few buffers."""
    with quiet_tap() as name, DirtyLog(LOG_BYTES) as log, ExitStack() as stack:
        device = NetDevice(pool, backend=f"tap:{name}")
        stack.callback(device.close)
        guest, sock = stack.enter_context(Guest(device, room=room)), stack.enter_context(wire(name))
        interface_up(name, LONG_FRAME)
        watch = Watch(pool, device, guest, log)
        watch.switch_on()
        receive_bursts(Bursts(watch, rng), sock, (60, 500, MTU, LONG_FRAME))
        assert device.snapshot()["queues"][0]["drops"]["oversize"] > 0


@needs_tap
def test_what_is_read_from_a_packet_socket_is_logged(pool: Pool, rng: random.Random) -> None:
    """Frames from a packet socket, whose short header leaves a gap in front of them."""
    name, peer = tap_name(), tap_name(1)
    ip("link", "add", name, "type", "veth", "peer", "name", peer)
    try:
        ip("link", "set", name, "addrgenmode", "none")
        with wire(peer) as sock:
            for end in (name, peer):
                ip("link", "set", end, "up")
            wait_for_link(peer)
            device = NetDevice(pool, backend=f"packet:{name}")
            with DirtyLog(LOG_BYTES) as log, Guest(device, room=400) as guest:
                watch = Watch(pool, device, guest, log)
                watch.switch_on()
                receive_bursts(Bursts(watch, rng), sock, (60, 500, MTU))
            device.close()
    finally:
        ip("link", "delete", name)


def test_rings_only_where_asked_for(pool: Pool, rng: random.Random) -> None:
    """Without VRING_F_LOG the used rings are left out; data is not."""
    device = NetDevice(pool, backend="loopback")
    with DirtyLog(LOG_BYTES) as log, Guest(device, num=512) as guest:
        watch = Watch(pool, device, guest, log)
        watch.switch_on(rings=False)
        bursts = Bursts(watch, rng)
        bursts.fill()
        while not bursts.pair.rx.in_flight or not bursts.pair.tx.in_flight:
            bursts.fill()
        bursts.go()
        written: set[int] = set()
        for used in bursts.pair.rx.reap():
            assert used.length is not None
            written |= pages_of(used.chain.writable, used.length)
        assert log.pages == written
        assert written


@pytest.mark.parametrize("ring", [0, F_RING_PACKED], ids=["split", "packed"])
def test_nothing_is_unlogged_when_workers_die(pool: Pool, ring: int, rng: random.Random) -> None:
    """A worker that is killed inside a burst leaves nothing unlogged: its replacement sees to it."""
    device = NetDevice(pool, backend="loopback")
    with (
        DirtyLog(LOG_BYTES) as log,
        Guest(device, num=512, room=400, features=BASE | F_MRG_RXBUF | F_EVENT_IDX | ring) as guest,
    ):
        watch = Watch(pool, device, guest, log)
        watch.switch_on()
        bursts = Bursts(watch, rng)
        for number in range(DEATHS):
            old = time.monotonic() + EARLY_DEATH
            while time.monotonic() < old:  # one that dies younger is held back for a second
                bursts.fill()
                bursts.go()
                bursts.judge(unused=True)
            for _ in range(6):
                bursts.fill(60)
            bursts.go(kill=rng.randrange(2000))
            assert pool.restarts == number + 1
            bursts.judge(unused=True)
        assert [queue["broken"] for queue in device.snapshot()["queues"]] == [None, None]


def test_switched_under_load(pool: Pool) -> None:
    """Logging goes on, off and elsewhere while packets flow: after a verb's return the old log stays as it is."""
    device = NetDevice(pool, backend="loopback")
    with DirtyLog(LOG_BYTES) as first, DirtyLog(LOG_BYTES, 4096 + 64) as second, Guest(device) as guest:
        watch = Watch(pool, device, guest, first)
        with Traffic(guest.pairs[0], sizes=(60, 600, 1400)) as traffic:
            for _ in range(30):
                watch.switch_on()
                traffic.progress(200)
                assert first.pages
                device.set_log_base(second.fd, second.size, second.offset)
                first.clear()
                traffic.progress(200)
                assert second.pages
                assert not first.pages
                device.set_features(guest.features)
                second.clear()
                watch.set_addresses(log=False)
                traffic.progress(200)
                assert not first.pages
                assert not second.pages
            tally = traffic.finish()
    assert (tally.missing, tally.duplicated, tally.reordered) == (0, 0, 0), tally


def test_log_eventfd(pool: Pool, rng: random.Random) -> None:
    """The log's eventfd is signalled when pages are logged that were not, and not otherwise."""
    device = NetDevice(pool, backend="null")
    event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with DirtyLog(LOG_BYTES) as log, Guest(device) as guest:
            watch = Watch(pool, device, guest, log)
            device.set_log_fd(event)
            watch.switch_on()
            watch.settle()
            pair = guest.pairs[0]
            for clear in (True, False, True):
                with suppress(BlockingIOError):
                    os.eventfd_read(event)
                if clear:
                    log.clear()
                assert pair.send(rng.randbytes(60))
                pair.kick()
                watch.settle()
                assert pair.reap() == 1
                assert log.pages
                assert bool(select.select([event], [], [], 0)[0]) == clear
            device.set_log_fd(None)
    finally:
        os.close(event)
