"""Back-ends in Python that take their frames in arrays: what is in them, and for how long."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.asleep import is_asleep
from tests.helpers import wait_until
from tests.integration.batches import ETHERNET, REPORT
from tests.net_driver import F_EVENT_IDX, FEATURES, Guest, Pair, Shape
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import F_RING_PACKED
from vhostmp.tools.stress.split import NetHeader

BACKENDS = Path(__file__).with_name("batches.py")
HEAD = 64
DRIVERS = {"split": FEATURES, "packed": FEATURES | F_RING_PACKED, "legacy": F_EVENT_IDX}
SHAPES = {
    "whole": Shape(),
    "header apart": Shape(split_header=True),
    "in pieces": Shape(pieces=3),
    "header and pieces": Shape(split_header=True, pieces=5),
}


@contextmanager
def guest_on(name: str, features: int = FEATURES, *, num: int = 256, sandbox: bool = True) -> Generator[Guest]:
    """Make a guest on a back-end of batches.py."""
    with Pool(workers=1, sandbox=sandbox) as pool:
        device = NetDevice(pool, backend=f"python:{BACKENDS}:{name}")
        try:
            with Guest(device, features=features, num=num) as guest:
                yield guest
        finally:
            device.close()


def frames_of(sizes: Sequence[int]) -> list[bytes]:
    """Return frames of these sizes, each with bytes of its own and none of them 0."""
    return [bytes(1 + (number * 7 + k) % 255 for k in range(size)) for number, size in enumerate(sizes)]


def answers_to(guest: Guest, frames: Sequence[bytes], count: int, pair: Pair | None = None) -> list[bytes]:
    """Send frames; return `count` answers, without their Ethernet headers."""
    if pair is None:
        (pair,) = guest.pairs
    left = list(frames)
    got: list[bytes] = []

    def turn() -> bool:
        pair.post()
        pair.reap()
        while left and pair.send(left[0]):
            left.pop(0)
        pair.kick()
        got.extend(pair.receive())
        return len(got) >= count and not left and not pair.tx.in_flight

    wait_until(turn, what=pair.describe())
    assert {answer[: len(ETHERNET)] for answer in got} <= {ETHERNET}
    return [answer[len(ETHERNET) :] for answer in got]


def send_at_once(guest: Guest, frames: Sequence[bytes]) -> None:
    """Make frames available to a worker that sleeps, and kick it only then."""
    (pair,) = guest.pairs
    pair.post()
    pair.kick()
    wait_until(lambda: is_asleep(guest.device.pool, pair.kicks), what="the worker asleep")
    for frame in frames:
        assert pair.send(frame)
    pair.kick()


@pytest.mark.parametrize("driver", ["split", "packed"])
@pytest.mark.parametrize(("name", "most"), [("Sizes", 256), ("Hundreds", 100), ("Bursts", 64)])
def test_how_many_come_at_once(name: str, most: int, driver: str) -> None:
    """What waits comes at once, up to 256 or to the class's batch_size; each frame once, in order."""
    with guest_on(name, DRIVERS[driver], num=1024) as guest:
        for waiting in (1, 63, 64, 65, 255, 256, 257):
            frames = frames_of([HEAD + number % 7 for number in range(waiting)])
            # A work item ends after 256 packets, and a batch with it.
            sizes: list[int] = []
            for item in (min(waiting, 256), waiting - min(waiting, 256)):
                sizes += [min(most, item - start) for start in range(0, item, most)]
            expected: list[tuple[int, int, bytes, bool]] = []
            start = 0
            for size in sizes:
                expected.append((size, zlib.crc32(b"".join(frames[start : start + size])), bytes(HEAD), False))
                start += size
            send_at_once(guest, frames)
            assert [REPORT.unpack(answer) for answer in answers_to(guest, [], len(sizes))] == expected
        queue = guest.device.snapshot()["queues"][1]
        assert queue["packets"] == 1 + 63 + 64 + 65 + 255 + 256 + 257
        assert queue["drops"] == {}


def test_a_large_batch_that_raises() -> None:
    """All of a batch of several bursts is dropped with it, and comes back to the guest; the next one is as good."""
    with guest_on("Failing", num=512) as guest:
        frames = frames_of([100] * 200)
        for answers in (0, len(frames)):
            send_at_once(guest, frames)
            answers_to(guest, [], answers)
        queue = guest.device.snapshot()["queues"][1]
        assert (queue["packets"], queue["drops"]) == (200, {"backend_error": 200})


@pytest.mark.parametrize("driver", ["split", "packed"])
@pytest.mark.parametrize("verb", ["swap", "memory"])
def test_verbs_wait_for_a_batch(driver: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While Python has a batch, neither its memory goes nor does another back-end come; its answers precede that."""
    monkeypatch.setenv("GATES", str(tmp_path))
    frames = frames_of([100 + number % 9 for number in range(250)])
    with guest_on("Waiting", DRIVERS[driver], num=512, sandbox=False) as guest, ThreadPoolExecutor(1) as threads:
        send_at_once(guest, frames)
        wait_until((tmp_path / "entered").exists, what="the batch")
        done = threads.submit(guest.renew_buffers if verb == "memory" else lambda: guest.device.set_backend("null"))
        with pytest.raises(TimeoutError):
            done.result(0.2)
        (tmp_path / "open").touch()
        done.result(30)
        reports = [REPORT.unpack(answer) for answer in answers_to(guest, [], len(frames))]
    assert reports == [(len(frame), zlib.crc32(frame), frame[:HEAD].ljust(HEAD, b"\0"), False) for frame in frames]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("driver", DRIVERS)
def test_headers_lengths_and_views(driver: str, shape: str) -> None:
    """Each frame has its row, its length and its view, in order; a short one's row ends in zeros."""
    sizes = [1500, 14, 63, 64, 65, 60, 2000, 15] * 40
    frames = frames_of(sizes)
    with guest_on("Reporter", DRIVERS[driver]) as guest:
        guest.pairs[0].shape = SHAPES[shape]
        reports = [REPORT.unpack(answer) for answer in answers_to(guest, frames, len(frames))]
    assert reports == [(len(frame), zlib.crc32(frame), frame[:HEAD].ljust(HEAD, b"\0"), False) for frame in frames]


def test_what_is_dropped_has_no_row() -> None:
    """Frames too short to be any, and those that ask for what was not offered, are counted and in no batch."""
    good = frames_of([100] * 20)
    with guest_on("Reporter") as guest:
        (pair,) = guest.pairs
        sent = 0
        for frame in good:
            for bad, header in ((b"\1" * 13, NetHeader()), (b"\1" * 60, NetHeader(flags=1)), (frame, NetHeader())):
                pair.header = header
                assert pair.send(bad)
                sent += 1
        pair.header = NetHeader()
        reports = [REPORT.unpack(answer) for answer in answers_to(guest, [], len(good))]
        queue = guest.device.snapshot()["queues"][1]
        assert queue["drops"] == {"short": len(good), "offload": len(good)}
        assert queue["packets"] == len(good)
    assert [report[1] for report in reports] == [zlib.crc32(frame) for frame in good]


def test_views_end_with_the_call() -> None:
    """A view that was kept shows nothing any more."""
    with guest_on("Keeper") as guest:
        for _ in range(3):
            answers_to(guest, frames_of([100]), 0)
        assert {answer.rstrip() for answer in answers_to(guest, frames_of([100]), 1)} == {b"released"}


def test_who_clings_to_a_view_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A view that cannot be released is complained of, and the guest has its buffers back."""
    with guest_on("Clinging") as guest:
        answers_to(guest, frames_of([100] * 3), 0)
        wait_until(lambda: "Clinging keeps a view of a packet" in caplog.text, what="the warning")


def test_an_exception_drops_the_batch() -> None:
    """What a batch that raised had is counted as dropped; the next one is as good as any."""
    with guest_on("Failing") as guest:
        for _ in range(4):
            answers_to(guest, frames_of([100]), 0)
        wait_until(lambda: guest.device.snapshot()["queues"][1]["packets"] == 2, what="two good ones")  # noqa: PLR2004
        assert guest.device.snapshot()["queues"][1]["drops"] == {"backend_error": 2}


def test_numpy_has_to_be_imported(tmp_path: Path) -> None:
    """A class that takes batches and whose module has no NumPy is refused in a line that says what to do."""
    text = "class Plain:\n    def transmit_batch(self, queue, batch): pass\n    def receive(self, *_): return ()\n"
    (tmp_path / "plain.py").write_text(text)
    with Pool(workers=1) as pool, pytest.raises(LocalError, match=r"import numpy in .*plain\.py"):
        NetDevice(pool, backend=f"python:{tmp_path}/plain.py:Plain")


@pytest.mark.parametrize("size", ["0", "257", "64.0", "None"])
def test_how_many_is_a_number(size: str, tmp_path: Path) -> None:
    """A batch_size that is none is refused in a line."""
    text = f"import numpy\nclass Odd:\n    batch_size = {size}\n    def transmit_batch(self, queue, batch): pass\n"
    (tmp_path / "odd.py").write_text(text + "    def receive(self, *_): return ()\n")
    with Pool(workers=1) as pool, pytest.raises(LocalError, match=rf"batch_size is {size}, not a number from 1 to 256"):
        NetDevice(pool, backend=f"python:{tmp_path}/odd.py:Odd")


def test_neither_way_to_transmit(tmp_path: Path) -> None:
    """A class that has neither is told of both."""
    (tmp_path / "deaf.py").write_text("class Deaf:\n    def receive(self, queue, budget): return ()\n")
    with Pool(workers=1) as pool, pytest.raises(LocalError, match="has no method transmit or transmit_batch"):
        NetDevice(pool, backend=f"python:{tmp_path}/deaf.py:Deaf")


def test_who_stops_taking_batches_harms_nobody() -> None:
    """A class is judged once: who changes later has its frames dropped, also those of a pair that comes to it then."""
    with Pool(workers=2) as pool:
        device = NetDevice(pool, backend=f"python:{BACKENDS}:Fickle", queue_pairs=2)
        with Guest(device, pairs=2) as guest:
            for pair in range(2):
                device.attach_worker(pair, 0)
            assert answers_to(guest, frames_of([60]), 1, guest.pairs[0])
            for worker in (1, 0):
                device.attach_worker(1, worker)
            assert guest.pairs[1].send(frames_of([60])[0])
            guest.pairs[1].kick()
            wait_until(lambda: guest.pairs[1].reap() == 1, what="the frame that nobody takes")
            assert device.snapshot()["queues"][3]["drops"] == {"backend_error": 1}
            assert pool.restarts == 0
        device.close()
