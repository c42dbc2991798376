"""Bad moments and front-ends that do harm on purpose: one device may be lost, workers, pool and other devices go on."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

import attrs
import pytest

from tests.adversity.backends import GATE
from tests.frames import make_frame
from tests.helpers import wait_until
from tests.integration import devices
from tests.integration.traffic import Traffic
from tests.net_driver import Guest, as_split
from tests.request_driver import RequestGuest
from tests.stuck import gives_up, impatient, stuck_guest
from tests.taps import inject, ip, needs_tap, tap_name
from vhostmp import flush
from vhostmp.blk import BlkDevice
from vhostmp.errors import LocalError, SynchronizeTimeout, SysError, VhostError
from vhostmp.net import NetDevice
from vhostmp.requests import PythonDevice
from vhostmp.shm._epoch import synchronize
from vhostmp.shm.memory import MemoryRegion
from vhostmp.supervisor import Pool
from vhostmp.tools.stress import frontend
from vhostmp.workers.processes import WorkerProcess

BACKENDS: Final = Path(__file__).with_name("backends.py")
DEVICES: Final = Path(devices.__file__)
#: A killed worker may repeat what it had given back to the receive ring and not yet to the transmit ring: one burst.
BURST: Final = 64
#: An eventfd whose counter has this value takes no more. Source: eventfd(2).
FULL: Final = 0xFFFFFFFFFFFFFFFE


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker."""
    with Pool(workers=1) as one:
        yield one


def broken(device: NetDevice) -> list[str | None]:
    """Return why each ring of a device is broken, None for those that are not."""
    return [queue["broken"] for queue in device.snapshot()["queues"]]


@contextmanager
def full_and_blocking(fd: int) -> Generator[None]:
    """Have whoever writes to an eventfd sleep, as a front-end can at any time: the flag is that of the open file."""
    with suppress(BlockingIOError):
        os.eventfd_read(fd)
    os.eventfd_write(fd, FULL)
    os.set_blocking(fd, True)
    try:
        yield
    finally:
        os.set_blocking(fd, False)
        with suppress(BlockingIOError):
            os.eventfd_read(fd)


@contextmanager
def no_more_descriptors() -> Generator[None]:
    """Let this process open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(2)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["rings", "buffers"])
def test_memory_truncated(pool: Pool, what: str) -> None:
    """Memory that its front-end cuts off costs one worker, once, and the rings in it; another device goes on."""
    victim, evil = NetDevice(pool, backend="loopback"), NetDevice(pool, backend="loopback", name="evil")
    err = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with Guest(victim) as good, Guest(evil) as bad, Traffic(good.pairs[0]) as traffic:
            for index in (0, 1):
                evil.set_vring_err(index, err)
            traffic.progress(100)
            pair = bad.pairs[0]
            pair.post()
            assert pair.send(make_frame(0, 60))
            if what == "buffers":
                os.ftruncate(bad.buffers.memory.fd, 0)
                pair.kick()
            else:
                os.ftruncate(bad.rings.fd, 0)  # from here on its memory must not be touched here either
                os.eventfd_write(pair.kicks[1], 1)
            wait_until(lambda: broken(evil) == ["memory", "memory"], what=f"broken rings: {broken(evil)}")
            wait_until(lambda: pool.restarts == 1, what="the replacement")
            traffic.progress(100)
            assert os.eventfd_read(err) >= 1
            os.eventfd_write(pair.kicks[1], 1)
            evil.set_backend("null")
            traffic.progress(100)
            tally = traffic.finish()
        assert tally.missing == 0, tally
        assert tally.duplicated <= BURST, tally
        assert broken(victim) == [None, None]
        assert pool.restarts == 1
    finally:
        os.close(err)


def test_call_that_would_block(pool: Pool) -> None:
    """An interrupt eventfd that is full and blocking does not hold the worker up."""
    victim, evil = NetDevice(pool, backend="loopback"), NetDevice(pool, backend="null", name="evil")
    with Guest(victim) as good, Guest(evil) as bad, Traffic(good.pairs[0]) as traffic:
        pair = bad.pairs[0]
        with full_and_blocking(pair.calls[1]):
            assert pair.send(make_frame(0, 60))
            pair.kick()
            wait_until(lambda: evil.snapshot()["queues"][1]["calls"] == 1, what="the interrupt")
            traffic.progress(100)
            evil.set_vring_call(1, pair.calls[1])  # a running ring signals the new one
            evil.set_backend("loopback")
            traffic.progress(100)
        traffic.finish()


def test_err_that_would_block(pool: Pool) -> None:
    """Nor does the eventfd that tells of a broken ring."""
    victim, evil = NetDevice(pool, backend="loopback"), NetDevice(pool, backend="null", name="evil")
    err = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with Guest(victim) as good, Guest(evil) as bad, Traffic(good.pairs[0]) as traffic:
            evil.set_vring_err(1, err)
            with full_and_blocking(err):
                as_split(bad.pairs[0].tx).offer(bad.num)
                bad.pairs[0].kick()
                wait_until(lambda: broken(evil) == [None, "head"], what="a broken ring")
                traffic.progress(100)
                evil.set_backend("loopback")
            traffic.finish()
    finally:
        os.close(err)


@pytest.mark.slow
def test_replacement_fails(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    """Without descriptors a spare takes a dead worker's place; the next one is replaced once there are some."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device) as guest, Traffic(guest.pairs[0]) as traffic:
        wait_until(lambda: pool.has_spare, what="a spare")
        with no_more_descriptors():
            pool.kill_worker(0)
            wait_until(lambda: pool.restarts == 1, what="the spare's turn")
            traffic.progress(100)
            pool.kill_worker(0)
            wait_until(lambda: "worker 0 cannot be replaced" in caplog.text, what="the failure")
        wait_until(lambda: pool.restarts == len(("spare", "new")), what="the replacement")
        traffic.progress(100)
        tally = traffic.finish()
    assert tally.missing == 0, tally


def test_fork_that_fails_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that cannot be forked is forked a little later; the others are not touched meanwhile."""
    monkeypatch.setattr("vhostmp.deaths.RESTART_DELAY", 0.05)
    with Pool(workers=3) as pool:
        fork: Callable[[int], WorkerProcess] = pool._pool._fork  # pyright: ignore[reportPrivateUsage]
        failed: list[int] = []

        def fail_once(index: int) -> WorkerProcess:
            if not failed:
                failed.append(index)
                raise SysError("cannot start a worker: Resource temporarily unavailable")
            return fork(index)

        monkeypatch.setattr(pool._pool, "_fork", fail_once)  # pyright: ignore[reportPrivateUsage]
        monkeypatch.setattr(pool._pool, "start_spawner", lambda: failed.append(-1))  # pyright: ignore[reportPrivateUsage]
        before = [worker.pid for worker in pool.workers]
        pool.kill_worker(1)
        wait_until(lambda: pool.restarts == 1 and pool.worker(1).alive, what="the replacement")
        after = [worker.pid for worker in pool.workers]
        assert failed == [1], "a new spawner costs every worker its life"
        assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
        assert pool.restarts == 1


def test_backend_that_kills_its_worker(pool: Pool) -> None:
    """A back-end that ends the process that makes it is refused: the old one goes on, in one replacement."""
    device = NetDevice(pool, backend="loopback")
    with Guest(device) as guest, Traffic(guest.pairs[0]) as traffic:
        traffic.progress(100)
        with pytest.raises(LocalError, match=r"^worker 0 [^\n]+ while it prepared the new back-end$"):
            device.set_backend(f"python:{BACKENDS}:Deadly")
        assert device.backend == "loopback"
        wait_until(lambda: pool.restarts == 1, what="the replacement")
        traffic.progress(100)
        tally = traffic.finish()
    assert (tally.missing, pool.restarts) == (0, 1), tally


VERBS: Final[dict[str, Callable[[NetDevice], object]]] = {
    "stop": lambda device: device.stop_vring(1),
    "stop_other": lambda device: device.stop_vring(0),
    "stop_all": lambda device: device.stop_all(),
    "disable": lambda device: device.set_vring_enable(0, False),
    "swap": lambda device: device.set_backend("null"),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_verb_after_a_timeout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: Callable[[NetDevice], object]
) -> None:
    """After a verb that gave up waiting for a worker, the next one is a barrier: it returns once that is out."""
    with stuck_guest(tmp_path) as stuck:
        pair = stuck.guest.pairs[0]

        def let_go(buf: memoryview, readers: list[tuple[int, int]], timeout_ns: int) -> int:
            stuck.let_go()
            return synchronize(buf, readers, timeout_ns)

        with impatient():
            for _ in range(2):
                with pytest.raises(SynchronizeTimeout):
                    stuck.device.stop_vring(1)
            assert pair.tx.used_idx == 0
        monkeypatch.setattr(flush, "synchronize", let_go)
        assert not stuck.left
        verb(stuck.device)
        monkeypatch.setattr(flush, "synchronize", synchronize)
        assert stuck.left
        before = bytes(stuck.guest.rings.buf)
        assert pair.tx.used_idx == 1
        stuck.device.set_backend("loopback")
        assert bytes(stuck.guest.rings.buf) == before
        assert stuck.pool.restarts == 0


@needs_tap
def test_tap_deleted(pool: Pool) -> None:
    """A tap that is deleted while served: the front-end can leave and come back, and a swap brings the network back."""
    name = tap_name()
    device = NetDevice(pool, backend=f"tap:{name}")
    with Guest(device) as guest:
        ip("link", "delete", name)
        assert guest.pairs[0].send(make_frame(0, 60))
        guest.pairs[0].kick()
        wait_until(lambda: guest.pairs[0].tx.used_idx == 1, what="the packet to be dropped")
        device.stop_all()
        assert device.snapshot()["regions"] == []
        device.set_owner()
        with pytest.raises(SysError, match=rf"^tap:{name}: [^\n]+$"):
            device.set_features(guest.features)
        assert device.acked_features == 0
        device.stop_all()
    device.set_backend(f"tap:{name}")
    with Guest(device) as guest:
        pair = guest.pairs[0]
        pair.post()
        pair.kick()
        frame = make_frame(3, 200)
        inject(name, frame)
        wait_until(lambda: frame in pair.receive(), what="the frame")
    assert pool.restarts == 0


@pytest.mark.slow
def test_err_of_truncated_memory_that_would_block(pool: Pool) -> None:
    """The control process does not sleep in an err eventfd that is full and blocking, with the pool's lock held."""
    victim, evil = NetDevice(pool, backend="loopback"), NetDevice(pool, backend="loopback", name="evil")
    err = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with Guest(victim) as good, Guest(evil) as bad, Traffic(good.pairs[0]) as traffic:
            for index in (0, 1):
                evil.set_vring_err(index, err)
            traffic.progress(100)
            with full_and_blocking(err):
                os.ftruncate(bad.rings.fd, 0)
                os.eventfd_write(bad.pairs[0].kicks[1], 1)
                wait_until(lambda: pool.restarts == 1, what="the replacement")
                traffic.progress(100)
            traffic.finish()
    finally:
        os.close(err)


@pytest.mark.parametrize("how", ["verb", "alone"])
def test_nothing_is_kept_after_a_timeout(pool: Pool, tmp_path: Path, how: str) -> None:
    """What a verb that timed out replaced is let go of, by the worker too, with the next verb; else a little later."""
    images = [tmp_path / name for name in ("first.img", "second.img")]
    for image in images:
        image.write_bytes(bytes(1 << 20))
    with (
        closing(BlkDevice(pool, backend=f"file:{images[0]}")) as device,
        RequestGuest(device) as guest,
        frontend.memfd(1 << 20) as other,
    ):
        pid = pool.worker(0).pid
        extra = MemoryRegion(gpa=1 << 40, size=1 << 20, uva=1 << 40, fd=other)

        def has(what: str) -> bool:
            found = Path(f"/proc/{pid}/maps").read_text()
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with suppress(FileNotFoundError):  # closed while we look
                    found += os.readlink(f"/proc/{pid}/fd/{fd}")
            return what in found

        device.set_mem_table([guest.memory.region, extra])
        name = os.readlink(f"/proc/self/fd/{other}").split()[0]
        assert has(name)
        with gives_up(), pytest.raises(SynchronizeTimeout):
            device.set_mem_table([guest.memory.region])
        if how == "verb":
            device.set_vring_busyloop_timeout(0, 1)
            assert not has(name)
        wait_until(lambda: not has(name), what="the old memory to go")
        assert has(images[0].name)
        with gives_up(), pytest.raises(SynchronizeTimeout):
            device.set_backend(f"file:{images[1]}")
        if how == "verb":
            device.set_vring_busyloop_timeout(0, 0)
            assert not has(images[0].name)
        wait_until(lambda: not has(images[0].name), what="the old image to go")
        device.set_backend(f"file:{images[0]}")  # which is locked no more
        assert pool.restarts == 0


def test_verbs_while_a_worker_is_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs that come, time out or are refused while a worker is inside a work item take nothing from under it."""
    monkeypatch.setenv(GATE, str(tmp_path))
    with (
        Pool(workers=1, sandbox=False) as pool,  # its signs are files
        closing(PythonDevice(pool, backend=f"python:{DEVICES}:Gated")) as device,
        RequestGuest(device) as guest,
        frontend.memfd(16 << 20) as other,
    ):
        first = guest.send(b"wait", [4])
        wait_until((tmp_path / "entered").exists, what="the worker to be stuck")
        following = guest.send(b"next", [4])  # the same work item takes it
        askew = attrs.evolve(guest.memory.region, fd=other, mmap_offset=1)
        with impatient():
            for _ in range(2):
                with pytest.raises(VhostError):
                    device.set_mem_table([askew])
                with pytest.raises(SynchronizeTimeout):
                    device.stop_vring(0)
        (tmp_path / "open").touch()
        assert [guest.wait(head).data for head in (first, following)] == [b"done", b"done"]
        device.start_vring(0)
        assert guest.ask(b"more", [4]).data == b"done"
        assert pool.restarts == 0


@pytest.mark.parametrize("between", ["stop_other", "swap", "disable"])
def test_base_after_a_timeout(tmp_path: Path, between: str) -> None:
    """Where a ring stands that a verb stopped in vain is known once a later verb has waited, whichever that is."""
    with stuck_guest(tmp_path) as stuck:
        with impatient(), pytest.raises(SynchronizeTimeout):
            stuck.device.stop_vring(1)
        stuck.let_go()
        VERBS[between](stuck.device)
        assert stuck.device.get_vring_base(1) == stuck.guest.pairs[0].tx.used_idx == 1
        assert stuck.device.stop_vring(1) == 1
