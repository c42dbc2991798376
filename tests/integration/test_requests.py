"""Devices whose requests are served in Python: the interface, what leftovers do, and what a bad class cannot do."""

from __future__ import annotations

import os
import time
import tty
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers import PATIENCE, wait_until
from tests.net_driver import Guest
from tests.request_driver import BUFFER_BYTES, F_RING_PACKED, FEATURES, FILL, RequestGuest
from tests.stuck import impatient
from vhostmp.errors import LocalError, VhostError
from vhostmp.net import NetDevice
from vhostmp.requests import PythonDevice
from vhostmp.rng import RngDevice
from vhostmp.shm.memory import GuestMemory
from vhostmp.supervisor import Pool
from vhostmp.workers.devices.rng import REQUEST_BYTES

HERE = Path(__file__).parent / "devices.py"
BURST = 64


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of two workers."""
    with Pool(workers=2) as two:
        yield two


@pytest.fixture(params=[0, F_RING_PACKED], ids=["split", "packed"])
def ring(request: pytest.FixtureRequest) -> int:
    """Return the feature bit of a ring format."""
    bit: int = request.param
    return bit


def serve(pool: Pool, name: str) -> closing[PythonDevice]:
    """Make a device of a class in devices.py."""
    return closing(PythonDevice(pool, backend=f"python:{HERE}:{name}"))


def offered(device: PythonDevice, ring: int) -> int:
    """Return what a device offers, with rings of one format."""
    return device.get_features() & ~F_RING_PACKED | ring


def test_request_is_answered(pool: Pool, ring: int) -> None:
    """A request is read and written in whatever pieces it comes; the class says what the device offers."""
    with serve(pool, "Echo") as device, RequestGuest(device, features=offered(device, ring)) as guest:
        assert device.get_features() & 0xFFFFFF == 1 << 3
        assert device.config == b"echo"
        answer = guest.ask([b"a", b"bcd", b"efg"], [2, 1, 100])
        assert (answer.length, answer.data[:7]) == (7, b"ABCDEFG")
        assert set(answer.data[7:]) == {FILL}
        assert guest.ask(b"abcdef", [4]).data == b"ABCD"
        queue = device.snapshot()["queues"][0]
        assert queue["packed"] == bool(ring)
        assert (queue["packets"], queue["bytes"], queue["drops"]) == (2, 7 + 7 + 6 + 4, {})


def test_swap_takes_a_class_that_offers_the_same(pool: Pool, ring: int) -> None:
    """The class can be exchanged for one that a guest cannot tell apart, and for no other."""
    with serve(pool, "Echo") as device, RequestGuest(device, features=offered(device, ring)) as guest:
        device.set_backend(f"python:{HERE}:Whisper")
        assert guest.ask(b"Abc", [3]).data == b"abc"
        with pytest.raises(LocalError, match=r"is another device .* config differ"):
            device.set_backend(f"python:{HERE}:Other")
        assert guest.ask(b"Abc", [3]).data == b"abc"


def test_what_is_left_waits_for_another_queue(pool: Pool, ring: int) -> None:
    """Requests that are left over are offered again when another queue of the object has finished something."""
    with serve(pool, "Pipe") as device, RequestGuest(device, features=FEATURES | ring) as guest:
        heads = [guest.send(writable=[4]) for _ in range(3)]
        guest.ask(b"12345678ab", queue=1)
        answers = [guest.wait(head) for head in heads]
        assert [(answer.length, answer.data[: answer.length]) for answer in answers] == [
            (4, b"1234"),
            (4, b"5678"),
            (2, b"ab"),
        ]
        guest.ask(b"later", queue=1)
        assert guest.ask(writable=[10]).data[:5] == b"later"
        for driver in guest.rings:
            driver.check_idle()


def test_what_is_left_waits_for_the_descriptor(pool: Pool, ring: int) -> None:
    """Requests that are left over are offered again when the object's descriptor is readable, in order."""
    with serve(pool, "Clock") as device, RequestGuest(device, features=FEATURES | ring) as guest:
        heads = [guest.send(writable=[4]) for _ in range(5)]
        assert [guest.wait(head).data for head in heads] == [b"tick"] * 5
        guest.rings[0].check_idle()


def test_more_left_over_than_a_batch(pool: Pool, ring: int) -> None:
    """More requests left over than a batch holds, and more of them coming, do not keep the worker busy."""
    with serve(pool, "Never") as device, RequestGuest(device, features=FEATURES | ring, num=128) as guest:
        (worker,) = [w.index for w in pool.workers if w.pid == device.snapshot()["queues"][0]["worker_pid"]]

        def rests(since: int) -> bool:
            shown = pool.snapshot()["workers"][worker]
            return bool(shown["items"] > since and shown["asleep"])

        for count in (BURST + 6, 1):
            before = pool.snapshot()["workers"][worker]["items"]
            for _ in range(count):
                guest.send(writable=[8])
            os.eventfd_write(guest.kicks[0], 1)
            wait_until(lambda: rests(before), what="the worker to sleep")  # noqa: B023 - called at once
        assert device.snapshot()["queues"][0]["broken"] is None


def test_what_another_device_left_over(pool: Pool, ring: int) -> None:
    """What a device left over when it ended is not taken for a request of the one that has its place in the segment."""
    with serve(pool, "Leaver") as device, RequestGuest(device, features=FEATURES | ring) as guest:
        place = device.slot, device.first_ring, device.placement
        (worker, *_) = device.placement
        before = pool.snapshot()["workers"][worker]["items"]
        guest.send(b"leave", [1])

        def rests() -> bool:
            shown = pool.snapshot()["workers"][worker]
            return bool(shown["items"] > before and shown["asleep"])

        wait_until(rests, what="the worker to sleep")
    with serve(pool, "Leaver") as device, RequestGuest(device, features=FEATURES | ring) as guest:
        assert (device.slot, device.first_ring, device.placement) == place
        assert guest.ask(b"?", [1]).data == b"0"


def test_no_two_starts_are_alike(pool: Pool) -> None:
    """A worker that sleeps while a ring's place changes hands knows by the start id alone that it is another ring."""
    ids: list[int] = []
    for _ in range(2):
        with serve(pool, "Leaver") as device, RequestGuest(device):
            ids += [ring.start_id for ring in device.state.rings if ring.started]
    assert len(ids) == len(set(ids)) > 1


@pytest.mark.parametrize("how", [b"r", b"x", b"l", b"n", b"t", b"u", b"v", b"w", b"y", b"N", b"M"])
def test_clumsy_class(pool: Pool, how: bytes, ring: int) -> None:
    """A class that raises or returns nonsense has its request returned empty; the worker and the device go on."""
    with serve(pool, "Clumsy") as device, RequestGuest(device, features=FEATURES | ring) as guest:
        pids = [worker.pid for worker in pool.workers]
        assert guest.ask(how, [8]).length == 0
        assert guest.ask(b"f", [8]).data[:4] == b"fine"
        assert [worker.pid for worker in pool.workers] == pids


def test_views_do_not_outlive_the_call(pool: Pool, ring: int) -> None:
    """What is kept of a request is dead afterwards, what is to be read cannot be written, no view leads to more."""
    with serve(pool, "Clumsy") as device, RequestGuest(device, features=FEATURES | ring) as guest:
        guest.ask(b"k", [8])
        answer = guest.ask(b"g", [100])
        assert answer.data[: answer.length] == b"gone gone read-only 0"


def test_memory_of_a_kept_slice_stays_mapped(pool: Pool) -> None:
    """A slice that a class keeps shows what it showed even when the memory has gone: a mistake, not a dead worker."""
    with (
        serve(pool, "Clumsy") as device,
        RequestGuest(device) as guest,
        GuestMemory.create(1 << 16, gpa=1 << 32) as more,
    ):
        pids = [worker.pid for worker in pool.workers]
        device.set_mem_table([guest.memory.region, more.region])
        more.buf[:8] = b"12345678"
        guest.ask_at(b"K", [(more.gpa, 8)])
        device.set_mem_table([guest.memory.region])
        more.buf[:4] = b"abcd"
        answer = guest.ask(b"G", [8])
        assert answer.data[: answer.length] == b"abcd"
        assert guest.ask(b"f", [8]).data[:4] == b"fine"
        assert [worker.pid for worker in pool.workers] == pids


def test_kept_views_in_a_cycle(pool: Pool) -> None:
    """A kept view that the collector finds in a cycle, with all that it shows, does not cost the worker its life."""
    with serve(pool, "Cyclic") as device, RequestGuest(device) as guest:
        guest.ask(b"first", [1])
        assert [guest.ask(b"then", [1]).data for _ in range(3)] == [b"1"] * 3
        assert pool.restarts == 0


def test_bad_guest_breaks_its_queue_alone(pool: Pool, ring: int) -> None:
    """A chain that breaks the rules of the ring stops that queue; the other one is served."""
    with serve(pool, "Pipe") as device, RequestGuest(device, features=FEATURES | ring) as guest:
        guest.rings[0].add([], [(1 << 60, 4)])
        guest.rings[0].publish()
        os.eventfd_write(guest.kicks[0], 1)
        wait_until(lambda: device.snapshot()["queues"][0]["broken"] == "address", what="the broken queue")
        guest.ask(b"fine", queue=1)


def test_rng_fills_buffers(pool: Pool, ring: int) -> None:
    """Each buffer is filled with other bytes, up to the device's most; one that cannot be written comes back empty."""
    with closing(RngDevice(pool)) as device, RequestGuest(device, features=FEATURES | ring) as guest:
        answers = [guest.ask(writable=[64]) for _ in range(8)]
        assert {answer.length for answer in answers} == {64}
        assert len({answer.data for answer in answers}) == len(answers)
        assert guest.ask(writable=[BUFFER_BYTES]).length == REQUEST_BYTES
        assert guest.ask(b"nothing to fill").length == 0
        assert 0 < guest.ask(b"readable first", [10, 20]).length <= sum((10, 20))


def test_rng_source_is_swapped(pool: Pool) -> None:
    """The source can be a character device, and exchanged; the guest sees what comes from it."""
    with closing(RngDevice(pool)) as device, RequestGuest(device) as guest:
        device.set_backend("file:/dev/zero")
        assert guest.ask(writable=[32]).data == bytes(32)
        device.set_backend("urandom")
        assert guest.ask(writable=[32]).data != bytes(32)


@pytest.fixture
def source() -> Iterator[tuple[int, str]]:
    """Return a descriptor, and the character device that has what is written there."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    yield ours, f"file:{os.ttyname(theirs)}"
    os.close(ours)
    os.close(theirs)


def test_rng_source_that_has_nothing(pool: Pool, source: tuple[int, str]) -> None:
    """Requests wait for a source without holding their worker; what comes is given to them in order, each its part."""
    with (
        closing(RngDevice(pool)) as device,
        closing(RngDevice(pool, name="other")) as other,
        RequestGuest(device) as guest,
        RequestGuest(other) as neighbour,
    ):
        other.attach_worker(0, device.worker_of(0))
        device.set_backend(source[1])
        heads = [guest.send(writable=[4]) for _ in range(3)]
        with impatient(1):
            assert neighbour.ask(writable=[8]).length == len(bytes(8))
            other.set_vring_busyloop_timeout(0, 1)
        os.write(source[0], b"abcdefg")
        answers = [guest.wait(head) for head in heads[:2]]
        assert b"".join(answer.data[: answer.length] for answer in answers) == b"abcdefg"
        guest.look()
        assert not guest.answers[0]
        with impatient(1):
            device.set_backend("urandom")
        assert guest.wait(heads[2]).length == len(bytes(4))
        guest.rings[0].check_idle()


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("null", "no source of random bytes 'null': use urandom or file:PATH"),
        ("file:", "no source of random bytes"),
        ("file:/none", "file:/none: there is no /none: use urandom or another device"),
        ("file:/etc/passwd", "not a character device"),
    ],
)
def test_rng_mistakes(pool: Pool, spec: str, why: str) -> None:
    """What is no source is refused in one line."""
    with pytest.raises(VhostError, match=why):
        RngDevice(pool, backend=spec)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("class Good: pass", "has no method process"),
        ("class Good:\n    num_queues = 0\n    process = print", "num_queues = 0 is not right"),
        ("class Good:\n    features = 1 << 32\n    process = print", "features = 4294967296 is not right"),
        ("class Good:\n    config = 'x'\n    process = print", "config is not a bytes object"),
        ("class Good:\n    config = bytes(257)\n    process = print", "config is not a bytes object"),
        ("1 / 0", "does not import: ZeroDivisionError"),
        ("import os; os._exit(3)", "while it imported"),
    ],
)
def test_wrong_class_is_refused(pool: Pool, tmp_path: Path, body: str, why: str) -> None:
    """A class that makes no sense is refused in one line when it is named."""
    (tmp_path / "device.py").write_text(body)
    with pytest.raises(LocalError, match=why) as caught:
        PythonDevice(pool, backend=f"python:{tmp_path}/device.py:Good")
    assert "\n" not in str(caught.value)


def test_classes_share_a_pool(pool: Pool) -> None:
    """A network device whose rings begin at an odd slot, behind a device with one queue, keeps its pairs together."""
    with (
        closing(RngDevice(pool, name="r")) as rng,
        closing(NetDevice(pool, name="n", backend="loopback")) as net,
        serve(pool, "Echo") as echo,
        Guest(net) as traffic,
        RequestGuest(echo, features=echo.get_features()) as guest,
        RequestGuest(rng) as entropy,
    ):
        assert net.first_ring % 2 == 1
        pair = traffic.pairs[0]
        frame = bytes(range(100))
        pair.post()
        assert pair.send(frame)
        pair.kick()
        got: list[bytes] = []
        deadline = time.monotonic() + PATIENCE
        while not got and time.monotonic() < deadline:
            got += pair.receive()
        assert got == [frame]
        assert guest.ask(b"abc", [3]).data == b"ABC"
        assert entropy.ask(writable=[8]).length == len(bytes(8))
