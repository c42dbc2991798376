"""Back-ends and guest memory are exchanged under load: nothing lost, duplicated, reordered or damaged, no poison seen.

A real pool, a real device, a guest in Python (tests/net_driver.py) whose frames carry sequence numbers and checksums.
The guest never polls for ever: a kick or an interrupt that gets lost in an exchange ends the test.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs
import pytest

from tests.frames import POISON
from tests.helpers import TORTURE_SECONDS, wait_until
from tests.integration.traffic import Tally, Traffic
from tests.net_driver import F_EVENT_IDX, F_INDIRECT_DESC, F_MRG_RXBUF, F_VERSION_1, Guest, Shape
from vhostmp import flush
from vhostmp.errors import LocalError, RingsLost
from vhostmp.net import NetDevice
from vhostmp.shm.memory import GuestMemory
from vhostmp.supervisor import Pool
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.ring import DeviceError

BACKENDS: Final = Path(__file__).with_name("backends.py")
MIRROR: Final = f"python:{BACKENDS}:Mirror"
SLOW: Final = f"python:{BACKENDS}:Slow"
PLAIN: Final = F_VERSION_1
ALL: Final = F_VERSION_1 | F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX
SIZES: Final = (60, 61, 590, 1514)
#: Frames under way at most, so that each finds a receive buffer (the rings have 256).
WINDOW: Final = 200
SWAPS: Final = int(60 * TORTURE_SECONDS)

MakeGuest = Callable[..., Guest]


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker."""
    with Pool(workers=1) as one:
        yield one


@pytest.fixture
def guest(pool: Pool) -> Iterator[Guest]:
    """Return a guest on a loopback device, with every feature."""
    with Guest(NetDevice(pool, backend="loopback"), features=ALL) as one:
        yield one


def whole(tally: Tally) -> None:
    """Check that every frame came back once, in order."""
    assert tally.sent > 0
    assert (tally.missing, tally.duplicated, tally.reordered) == (0, 0, 0), tally


def drops(device: NetDevice, index: int, reason: str) -> int:
    """Return how many packets a ring has dropped for a reason."""
    dropped: dict[str, int] = device.snapshot()["queues"][index]["drops"]
    return dropped.get(reason, 0)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [PLAIN, PLAIN | F_EVENT_IDX, ALL], ids=["plain", "event_idx", "all"])
def test_swap_under_load(pool: Pool, bits: int) -> None:
    """Swaps between loopbacks and a back-end in Python lose, repeat and reorder nothing, and each does happen."""
    device = NetDevice(pool, backend="loopback")
    generations: list[int] = []
    with Guest(device, features=bits) as guest, Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW) as traffic:
        for turn in range(SWAPS):
            result = device.set_backend((MIRROR, "loopback", "loopback")[turn % 3])
            generations.append(result.generation)
            assert result.grace_us >= 0
            traffic.progress(50)
        whole(traffic.finish())
    assert generations == sorted(set(generations))
    assert pool.restarts == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [Shape(), Shape(split_header=True), Shape(pieces=3), Shape(split_header=True, pieces=4, indirect=True)],
    ids=["one", "split_header", "pieces", "indirect"],
)
@pytest.mark.parametrize("room", [2048, 200], ids=["large_buffers", "merged_buffers"])
def test_swap_of_every_shape(pool: Pool, shape: Shape, room: int) -> None:
    """However the guest lays its frames out, and whether they fit one receive buffer or many, swaps lose nothing."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, room=room, features=ALL) as guest:
        guest.pairs[0].shape = shape
        with Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW if room >= max(SIZES) else 16) as traffic:
            for turn in range(SWAPS // 6):
                device.set_backend((MIRROR, "loopback")[turn % 2])
                traffic.progress(50)
            whole(traffic.finish())
        if room < max(SIZES):
            assert guest.pairs[0].most_buffers > 1


@pytest.mark.slow
def test_null_swallows_what_it_counts(pool: Pool) -> None:
    """What null gets is missing, every frame of it is counted, and everything else comes back in order."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device) as guest, Traffic(guest.pairs[0], returns=False, sizes=SIZES, window=None) as traffic:
        for turn in range(SWAPS):
            device.set_backend(("loopback", "null")[turn % 2])
            traffic.progress_sent(50)
        device.set_backend("loopback")
        tally = traffic.finish()
        wait_until(lambda: tally.missing == drops(device, 1, "null"), what=f"{tally} to fit {device.snapshot()}")
    assert (tally.duplicated, tally.reordered) == (0, 0)
    assert tally.missing > 0


@pytest.mark.slow
@pytest.mark.parametrize("other", ["loopback", MIRROR], ids=["loopback", "python"])
def test_starved_receiver(pool: Pool, other: str) -> None:
    """With few receive buffers packets wait, whatever the back-end: swaps lose none of those that wait."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device, rx_limit=4) as guest, Traffic(guest.pairs[0], sizes=SIZES) as traffic:
        for turn in range(SWAPS):
            device.set_backend((other, "loopback")[turn % 2])
            traffic.progress(20)
        whole(traffic.finish())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loopback", MIRROR], ids=["loopback", "python"])
def test_buffers_move_under_load(guest: Guest, backend: str) -> None:
    """Packet buffers move to new memory while packets flow; what left the table is poisoned, and never seen again."""
    guest.device.set_backend(backend)
    moved = 0
    with Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW) as traffic:
        for _ in range(SWAPS // 4):
            traffic.pause()  # the driver's own books change hands; the device goes on with what it has
            guest.renew_buffers()
            traffic.resume()
            wait_until(lambda: traffic.alive() and guest.old_buffers[0].idle, what="the old buffers to come back")
            moved += guest.drop_idle_buffers(POISON)
            traffic.progress(50)
        whole(traffic.finish())
    assert moved == SWAPS // 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loopback", MIRROR], ids=["loopback", "python"])
def test_everything_moves(guest: Guest, backend: str) -> None:
    """All memory, rings too, moves with packets under way: the rings stop, and go on elsewhere where they stood."""
    guest.device.set_backend(backend)
    with Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW) as traffic:
        for _ in range(SWAPS // 4):
            traffic.pause()
            guest.move(POISON)
            traffic.resume()
            traffic.progress(50)
        whole(traffic.finish())
    snapshot = guest.device.snapshot()
    assert [queue["broken"] for queue in snapshot["queues"]] == [None, None]


@pytest.mark.slow
def test_same_memory_mapped_anew(guest: Guest) -> None:
    """The same table again, with rings running and packets under way, is mapped anew and loses nothing."""
    with Traffic(guest.pairs[0], sizes=SIZES) as traffic:
        for _ in range(SWAPS):
            guest.set_mem_table()
            traffic.progress(50)
        whole(traffic.finish())


@pytest.mark.slow
def test_everything_at_once(rng: random.Random) -> None:
    """Two pairs on two workers, swaps, new tables, interrupts and kicks by new eventfds, in any order, under load."""
    with Pool(workers=2) as pool, ExitStack() as stack:
        device = NetDevice(pool, backend="loopback", queue_pairs=2)
        guest = stack.enter_context(Guest(device, pairs=2))
        traffic = [stack.enter_context(Traffic(pair, sizes=SIZES, window=WINDOW)) for pair in guest.pairs]

        def same_eventfd(kind: str) -> None:
            index = rng.randrange(4)
            fds = guest.pairs[index // 2].calls if kind == "call" else guest.pairs[index // 2].kicks
            getattr(device, f"set_vring_{kind}")(index, fds[index % 2])

        actions: Sequence[Callable[[], object]] = (
            lambda: device.set_backend(rng.choice([MIRROR, "loopback"])),
            guest.set_mem_table,
            lambda: same_eventfd("call"),
            lambda: same_eventfd("kick"),
            lambda: device.set_vring_busyloop_timeout(rng.randrange(4), rng.choice([0, 50])),
            lambda: device.set_vring_err(rng.randrange(4), None),
        )
        for _ in range(SWAPS * 3):
            rng.choice(actions)()
            if rng.randrange(4) == 0:
                for one in traffic:
                    one.progress(20)
        for one in traffic:
            whole(one.finish())
        assert pool.restarts == 0


@pytest.mark.slow
def test_stop_and_start_under_load(guest: Guest) -> None:
    """Rings stopped and started at the base that stopping gave go on with the next packet, none skipped or repeated."""
    with Traffic(guest.pairs[0], sizes=SIZES) as traffic:
        for _ in range(SWAPS // 2):
            bases = guest.stop()
            assert guest.stop() == bases
            for index, base in enumerate(bases):
                guest.device.set_vring_base(index, base)
                guest.device.start_vring(index)
            traffic.progress(50)
        whole(traffic.finish())


@pytest.mark.parametrize("taken", [0, 5, 0xFFFF])
def test_goes_on_where_the_ring_says(guest: Guest, taken: int) -> None:
    """Whatever base a front-end names that lost a back-end, chains that were not given back are taken, once and all."""
    with Traffic(guest.pairs[0]) as traffic:
        for _ in range(5):
            traffic.progress(20)
            bases = guest.stop()
            assert bases != [taken] * 2
            for index in range(2):
                guest.start(index, taken)
        whole(traffic.finish())
    assert not guest.device.snapshot()["queues"][0]["broken"]


def test_stopped_ring_is_left_alone(guest: Guest) -> None:
    """After stop_vring has returned nothing is written to a ring or its buffers, however much is available."""
    with Traffic(guest.pairs[0]) as traffic:
        traffic.progress(1000)
        traffic.pause()
        guest.stop()
        pair = guest.pairs[0]
        pair.send(bytes(60))
        pair.kick()
        before = bytes(guest.rings.buf), bytes(guest.buffers.memory.buf)
        guest.device.set_backend(MIRROR)  # a barrier for whatever might still run
        guest.device.set_mem_table([guest.rings.region])
        assert (bytes(guest.rings.buf), bytes(guest.buffers.memory.buf)) == before
        traffic.abandon()


@pytest.mark.slow
def test_old_memory_is_not_read_after_the_return(pool: Pool) -> None:
    """A back-end that dwells in the guest's memory never sees it change: set_mem_table waits for it."""
    device = NetDevice(pool, backend=SLOW)
    with Guest(device) as guest, Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW) as traffic:
        for _ in range(SWAPS // 4):
            traffic.pause()
            guest.move(POISON)
            traffic.resume()
            traffic.progress(20)
        whole(traffic.finish())
    assert pool.restarts == 0


@pytest.mark.slow
def test_flush_that_does_not_wait_is_caught(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above finds a set_mem_table whose synchronize() returns at once: poison, damage, loss or a crash."""

    def at_once(_buf: memoryview, _readers: object, _timeout_ns: int) -> int:
        return 0

    monkeypatch.setattr(flush, "synchronize", at_once)
    device = NetDevice(pool, backend=SLOW)
    found = False
    with Guest(device) as guest, Traffic(guest.pairs[0], sizes=SIZES) as traffic:
        try:
            for _ in range(100):
                traffic.pause()
                guest.move(POISON)
                traffic.resume()
                traffic.progress(20, timeout=1)
                if pool.restarts:
                    break
            whole(traffic.finish())
        except (AssertionError, DeviceError, LocalError):
            found = True
        assert found or pool.restarts > 0


def test_ring_that_leaves_the_memory(guest: Guest) -> None:
    """A table that lacks a running ring is taken, EFAULT, and that ring is stopped: the memory is what counts."""
    with Traffic(guest.pairs[0]) as traffic:
        traffic.progress(200)
        traffic.pause()
        with pytest.raises(LocalError) as caught:
            guest.device.set_mem_table([guest.buffers.memory.region])
        assert caught.value.errno == errno.EFAULT
        assert [queue["started"] for queue in guest.device.snapshot()["queues"]] == [False, False]
        guest.set_mem_table()
        for index in (0, 1):
            guest.start(index, guest.device.get_vring_base(index))
        traffic.resume()
        traffic.progress(200)
        whole(traffic.finish())


@pytest.mark.parametrize(
    "spec", ["nonesuch", "tap:", "python:nonesuch:Class", f"python:{BACKENDS}:Nonesuch", "packet:nonesuch0"]
)
def test_failed_swap_changes_nothing(guest: Guest, spec: str) -> None:
    """A back-end that cannot be had is an error of one line; the old one goes on without a pause."""
    with Traffic(guest.pairs[0]) as traffic:
        before = guest.device.snapshot()["backend"]
        with pytest.raises(Exception, match=r"^[^\n]+$") as caught:
            guest.device.set_backend(spec)
        assert "Traceback" not in str(caught.value)
        assert guest.device.snapshot()["backend"] == before
        traffic.progress(200)
        whole(traffic.finish())


def test_table_that_a_worker_refuses(guest: Guest) -> None:
    """Memory in which a worker finds a ring misaligned is refused: it is no table that is in force without a ring."""
    with Traffic(guest.pairs[0]) as traffic, frontend.memfd(2 << 20) as memory:
        generation = guest.device.snapshot()["generation"]
        askew = attrs.evolve(guest.rings.region, fd=memory, mmap_offset=1)
        with pytest.raises(LocalError, match="ring 0") as caught:
            guest.device.set_mem_table([askew, guest.buffers.memory.region])
        assert not isinstance(caught.value, RingsLost)
        assert guest.device.snapshot()["generation"] == generation
        traffic.progress(200)
        whole(traffic.finish())


def test_failed_table_changes_nothing(guest: Guest) -> None:
    """A table that is refused leaves the old one in force, and the guest's descriptors as they were."""
    with Traffic(guest.pairs[0]) as traffic, GuestMemory.create(4096, gpa=0) as overlapping:
        for regions in (
            [guest.rings.region, overlapping.region],
            [guest.rings.region] * 2,
            [*[guest.rings.region] * 70],
        ):
            with pytest.raises(LocalError) as caught:
                guest.device.set_mem_table(regions)
            assert caught.value.errno in (errno.EINVAL, errno.E2BIG)
            traffic.progress(200)
        whole(traffic.finish())
