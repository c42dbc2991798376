"""Post-copy with real workers, pagers and userfaultfds: frames move through memory that is still somewhere else."""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, cast

import attrs
import pytest

from tests.frames import make_frame, read_frame
from tests.helpers import process_alive, wait_until
from tests.integration.serving import ask, serving
from tests.integration.traffic import Traffic
from tests.net_driver import Guest
from tests.paging import PAGE, Elsewhere, Place
from tests.remote import RemoteDevice
from vhostmp import flush
from vhostmp.consts import ProtocolFeature, Request, mask
from vhostmp.errors import LocalError, WorkerDied
from vhostmp.net import NetDevice
from vhostmp.shm.memory import GuestMemory, MemoryRegion
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.frontend import HEADER, mem_table, region, single_region, u64
from vhostmp.workers import processes as workers_pool
from vhostmp.workers.channel import close_all

MIRROR: Final = f"python:{Path(__file__).with_name('backends.py')}:Mirror"
FRAMES: Final = 40
ROOM: Final = 3840  # with the table before it a buffer has a page to itself
SIZE: Final = 1400
RING: Final = 64
HUGE_PAGE: Final = 2 << 20
FIRST_RECEIVED: Final = Place(1, 0)
"""The page of the first pair's first receive buffer."""


class Absent:
    """A device that is not there yet: takes every verb and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a verb."""
        return lambda *_args, **_options: None


@attrs.define
class Arrival:
    """A guest that has arrived, but for its memory."""

    guest: Guest
    device: NetDevice
    memory: Elsewhere
    others: list[int] = attrs.field(factory=list[int])
    """Userfaultfds of further queue pairs."""

    def start(self, advises: int = 1) -> None:
        """Do what its front-end does then. `advises`: how many queue pairs speak for themselves."""
        self.device.set_owner()
        self.device.set_features(self.guest.features)
        self.others += [self.postcopy.advise() for _ in range(advises - 1)]
        userfaultfd = self.postcopy.advise()
        self.postcopy.listen()
        regions = self.regions()
        self.memory.serve(userfaultfd, self.postcopy.map(regions))
        self.guest.device = self.device  # type: ignore[misc]
        self.guest.set_mem_table()

    def start_rings(self, order: Sequence[int] = (0, 1)) -> None:
        """Start rings where they stand, enabled: what a ring that is not has to send is dropped."""
        for index in order:
            self.device.set_vring_enable(index, True)
        for index in order:
            self.guest.start(index, 0)

    @property
    def postcopy(self) -> Any:
        """The device's post-copy."""
        assert self.device.postcopy is not None
        return self.device.postcopy

    def regions(self) -> list[MemoryRegion]:
        """Return the guest's regions."""
        return regions_of(self.guest)

    def received(self) -> int:
        """Return how many frames the device has brought to the guest."""
        return sum(queue["packets"] for queue in self.device.snapshot()["queues"] if queue["index"] % 2 == 0)

    def end(self) -> None:
        """Bring all that is missing, and end the post-copy."""
        self.memory.bring_all()
        self.postcopy.end()

    def frames(self, pair: int = 0) -> list[int]:
        """Return the numbers of the frames that came back, each of them whole."""
        return [read_frame(frame) for frame in self.guest.pairs[pair].receive()]


def send(guest: Guest, pair: int = 0, count: int = FRAMES) -> None:
    """Send frames. Later than the start of the rings where a verb must not meet a worker that waits for a page.

    What is written then is there, but for the receive buffers.
    """
    for sequence in range(count):
        assert guest.pairs[pair].send(make_frame(sequence, SIZE))
    guest.pairs[pair].kick()


def readable(fd: int) -> bool:
    """Whether a descriptor is readable."""
    return bool(select.select([fd], [], [], 0)[0])


def regions_of(guest: Guest) -> list[MemoryRegion]:
    """Return a guest's regions."""
    return [guest.rings.region, guest.buffers.memory.region]


@contextmanager
def arriving(pool: Pool, *, pairs: int = 1, frames: int = FRAMES, advises: int = 1) -> Generator[Arrival]:
    """Make a guest with frames to send on each pair, and with none of its memory here."""
    with ExitStack() as stack:
        device = NetDevice(pool, backend="loopback", queue_pairs=pairs)
        guest = stack.enter_context(Guest(cast("NetDevice", Absent()), pairs=pairs, num=RING, room=ROOM))
        for number, pair in enumerate(guest.pairs):
            pair.post()
            send(guest, number, frames)
        memory = stack.enter_context(Elsewhere(regions_of(guest)))
        if not frames:
            memory.bring_all(0)  # the guest is about to use its rings
        arrival = Arrival(guest, device, memory)
        stack.callback(device.stop_all)
        arrival.start(advises)
        stack.callback(close_all, arrival.others)
        yield arrival


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Two workers."""
    with Pool(workers=2) as pool:
        yield pool


def test_frames_through_missing_memory(pool: Pool) -> None:
    """Each page that is needed is asked for, and no other; each frame arrives as it was sent, then as ever.

    Two workers serve a pair each; the pages are asked for at the pager's addresses, whoever of them faults, and by the
    last userfaultfd alone: a front-end may not know yet what it would read by another.
    """
    with arriving(pool, pairs=2, advises=2) as arrival:
        arrival.start_rings(range(4))
        wait_until(lambda: arrival.received() == 2 * FRAMES, what="all frames")
        needed = {Place(1, offset) for offset in range(0, 2 * 2 * RING * PAGE, PAGE)}
        asked = set(arrival.memory.asked)
        assert not arrival.memory.strays
        sent_and_received = {place for place in asked if place.region == 1}
        assert sent_and_received <= needed
        assert len(sent_and_received) == 2 * 2 * FRAMES
        assert len(asked - sent_and_received) >= 2 * 2  # each ring is somewhere
        state = arrival.device.snapshot()["postcopy"]
        assert state["pages"] == len(asked)
        assert state["faults"] >= len(asked)
        assert process_alive(state["pager_pid"])
        assert not readable(arrival.others[0])
        arrival.end()
        assert process_alive(state["pager_pid"]), "it was advised twice"
        arrival.end()
        wait_until(lambda: not process_alive(state["pager_pid"]), what="the pager's end")
        assert arrival.device.snapshot()["postcopy"] is None
        for pair in range(2):
            assert arrival.frames(pair) == list(range(FRAMES))
            arrival.guest.pairs[pair].reap()
            with Traffic(arrival.guest.pairs[pair]) as traffic:
                traffic.progress(200)
                assert traffic.finish().missing == 0
        assert pool.restarts == 0


class HugeMemory:
    """Guest memory of huge pages, with the contents and addresses of other memory. Quacks like GuestMemory."""

    def __init__(self, other: GuestMemory) -> None:
        """Allocate it. Skips the test where there are no huge pages."""
        self.size: Final = -(-other.size // HUGE_PAGE) * HUGE_PAGE
        self.gpa: Final = other.gpa
        self._fd: Final = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
        os.ftruncate(self._fd, self.size)
        self.region: Final = MemoryRegion(gpa=other.gpa, size=self.size, uva=other.uva, fd=self._fd)
        try:
            self.map: Final = mmap.mmap(self._fd, self.size)
        except OSError:
            os.close(self._fd)
            pytest.skip("no huge pages are free: vm.nr_hugepages")
        self.buf: Final = memoryview(self.map)
        self.buf[: other.size] = other.buf

    def close(self) -> None:
        """Give it back."""
        self.buf.release()
        self.map.close()
        os.close(self._fd)


def test_huge_pages(pool: Pool) -> None:
    """Memory in hugetlbfs: a fault anywhere in a huge page asks for that page, once, and has all of it."""
    device = NetDevice(pool, backend="loopback")
    with Guest(cast("NetDevice", Absent()), num=RING, room=ROOM) as guest:
        guest.pairs[0].post()
        send(guest)
        small = guest.buffers.memory
        guest.buffers.memory = cast("GuestMemory", HugeMemory(small))  # type: ignore[misc]
        small.close()
        with Elsewhere(regions_of(guest)) as memory:
            arrival = Arrival(guest, device, memory)
            arrival.start()
            arrival.start_rings()
            wait_until(lambda: arrival.received() == FRAMES, what="all frames")
            assert {place for place in memory.asked if place.region == 1} == {Place(1, 0)}
            assert not memory.strays
            arrival.end()
            assert arrival.frames() == list(range(FRAMES))
            device.stop_all()


def test_what_is_there_is_not_asked_for(pool: Pool) -> None:
    """Pages that the front-end has brought unasked are used without a question."""
    with arriving(pool) as arrival:
        arrival.memory.bring_all()
        arrival.start_rings()
        wait_until(lambda: arrival.received() == FRAMES, what="all frames")
        assert not arrival.memory.asked
        arrival.postcopy.end()
        assert arrival.frames() == list(range(FRAMES))


def test_worker_killed_while_it_waits(pool: Pool) -> None:
    """A worker dies while it waits for a page: its successor asks again for what it needs, and no frame is lost."""
    with arriving(pool, frames=0) as arrival:
        arrival.start_rings()
        arrival.memory.withhold(FIRST_RECEIVED)
        send(arrival.guest)
        arrival.memory.wait_until_withheld()
        worker = pool.workers[0]
        assert worker.waits_for_page
        pool.kill_worker(0)
        wait_until(lambda: pool.restarts == 1, what="the replacement")
        wait_until(lambda: pool.workers[0].waits_for_page, what="the replacement to need the page")
        assert arrival.memory.asked[FIRST_RECEIVED] == 1, "it was asked for already"
        arrival.memory.release()
        wait_until(lambda: arrival.received() >= FRAMES, what="all frames")
        arrival.end()
        assert set(arrival.frames()) == set(range(FRAMES))


@pytest.mark.parametrize("asked", [0, 1, 10, 45, 80])
def test_worker_killed_anywhere(pool: Pool, asked: int) -> None:
    """However many pages have come when a worker dies, its successor goes on: every frame arrives."""
    with arriving(pool) as arrival:
        arrival.start_rings()
        arrival.memory.wait_for_faults(asked)
        pool.kill_worker(0)
        wait_until(lambda: pool.restarts == 1, what="the replacement")
        wait_until(lambda: arrival.received() >= FRAMES, what="all frames")
        arrival.end()
        assert set(arrival.frames()) == set(range(FRAMES))


def test_pair_moves_to_another_worker(pool: Pool) -> None:
    """A queue pair goes to a worker that has none of the memory mapped yet, half-way through."""
    with arriving(pool) as arrival:
        arrival.start_rings()
        arrival.memory.wait_for_faults(20)
        arrival.device.attach_vring_worker(0, 1)
        wait_until(lambda: arrival.received() == FRAMES, what="all frames")
        arrival.end()
        assert arrival.frames() == list(range(FRAMES))


def test_one_page_that_does_not_come(pool: Pool) -> None:
    """While one pair waits for a page that does not come, another worker's pages come as ever."""
    with arriving(pool, pairs=2, frames=0) as arrival:
        arrival.start_rings(range(4))
        arrival.memory.withhold(FIRST_RECEIVED)
        send(arrival.guest)
        arrival.memory.wait_until_withheld()
        send(arrival.guest, 1)
        wait_until(lambda: arrival.received() == FRAMES, what="the other pair's frames")
        assert pool.workers[0].waits_for_page
        assert not pool.workers[1].waits_for_page
        arrival.end()
        wait_until(lambda: arrival.received() == 2 * FRAMES, what="all frames")
        assert pool.restarts == 0


def test_table_changes_meanwhile(pool: Pool) -> None:
    """The memory table is replaced, and grows by a region, while pages are missing, and stay so.

    The front-end is told the same addresses as before.
    """
    with arriving(pool) as arrival:
        arrival.start_rings()
        arrival.memory.wait_for_faults(20)
        assert arrival.postcopy.map(arrival.regions()) == arrival.memory.bases
        arrival.guest.set_mem_table()
        arrival.memory.wait_for_faults(40)
        extra = attrs.evolve(arrival.guest.rings.region, gpa=1 << 40, uva=1 << 40)
        arrival.device.add_mem_region(extra)
        wait_until(lambda: arrival.received() == FRAMES, what="all frames")
        arrival.device.remove_mem_region(extra)
        arrival.end()
        assert arrival.frames() == list(range(FRAMES))
        assert pool.restarts == 0


def test_a_verb_while_a_page_does_not_come(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb that waits for a worker that waits for a page is not held up for ever, and does not fail.

    The worker is killed; its successor asks for the page anew. Another device's verb is not concerned otherwise.
    """
    with arriving(pool, frames=0) as arrival:
        arrival.start_rings()
        arrival.memory.withhold(FIRST_RECEIVED)
        send(arrival.guest)
        arrival.memory.wait_until_withheld()
        monkeypatch.setattr(flush, "SYNCHRONIZE_TIMEOUT", 0.05)
        arrival.device.set_vring_busyloop_timeout(0, 1)
        monkeypatch.undo()
        wait_until(lambda: pool.restarts == 1, what="the replacement")
        other = NetDevice(pool, backend="loopback", name="other")
        with Guest(other) as guest:
            assert other.placement == (1,)
            with Traffic(guest.pairs[0]) as traffic:
                traffic.progress(100)
                traffic.finish()
        arrival.memory.release()
        wait_until(lambda: arrival.received() >= FRAMES, what="all frames")
        arrival.end()
        assert set(arrival.frames()) == set(range(FRAMES))


def test_a_verb_while_python_waits_for_a_page(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that waits for a page with the interpreter's lock answers nothing: verbs get on, a swap among them."""
    with arriving(pool, frames=0) as arrival:
        arrival.device.set_backend(MIRROR)
        arrival.start_rings()
        arrival.memory.withhold(FIRST_RECEIVED)
        send(arrival.guest)
        arrival.memory.wait_until_withheld()
        monkeypatch.setattr(workers_pool, "PAGE_TIMEOUT", 0.05)
        begun = time.monotonic()
        arrival.device.set_backend("loopback")
        assert time.monotonic() - begun < workers_pool.ANSWER_TIMEOUT / 2
        monkeypatch.undo()
        wait_until(lambda: pool.restarts == 1, what="the replacement")
        arrival.memory.release()
        arrival.end()


def test_front_end_gone_during_a_fault(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    """The front-end dies: who waits for its pages is killed and sends nothing; the next guest finds all as it was."""
    with arriving(pool, frames=0) as arrival:
        arrival.start_rings()
        arrival.memory.withhold(FIRST_RECEIVED)
        send(arrival.guest)
        arrival.memory.wait_until_withheld()
        pager = arrival.device.snapshot()["postcopy"]["pager_pid"]
        arrival.memory.stop()
        arrival.device.stop_all()
        wait_until(lambda: not process_alive(pager), what="the pager's end")
        wait_until(lambda: pool.restarts == 1, what="the replacement")
        assert "waits for a page" not in caplog.text, "it was killed at once, not when a verb had waited for it"
        assert arrival.received() == 0
        with Guest(arrival.device) as guest, Traffic(guest.pairs[0]) as traffic:
            traffic.progress(100)
            traffic.finish()
        assert pool.restarts == 1


def test_pager_gone(pool: Pool) -> None:
    """A pager that dies is noticed; nothing goes on without it, nothing hangs."""
    with arriving(pool, frames=0) as arrival:
        arrival.start_rings()
        arrival.memory.withhold(FIRST_RECEIVED)
        send(arrival.guest)
        arrival.memory.wait_until_withheld()
        notice = arrival.postcopy.fileno()
        assert not readable(notice)
        os.kill(arrival.device.snapshot()["postcopy"]["pager_pid"], signal.SIGKILL)
        wait_until(lambda: readable(notice), what="the notice")
        with pytest.raises(WorkerDied, match="pager"):
            arrival.postcopy.map([attrs.evolve(arrival.guest.rings.region, size=PAGE)])
        arrival.device.stop_all()
        assert not readable(notice)
        wait_until(lambda: pool.restarts == 1, what="the replacement")


class RemoteArrival(RemoteDevice):
    """A front-end in post-copy: its memory tables are acknowledged once their addresses are known."""

    def __init__(self, path: Path, memory: Elsewhere, *, slots: bool) -> None:
        """Connect; with `slots` tell each region by itself."""
        self._memory = memory
        self._slots = slots
        wanted = [ProtocolFeature.REPLY_ACK, ProtocolFeature.PAGEFAULT, ProtocolFeature.CONFIGURE_MEM_SLOTS]
        super().__init__(path, mask(wanted))

    def set_mem_table(self, regions: Sequence[MemoryRegion]) -> None:
        """POSTCOPY_ADVISE, POSTCOPY_LISTEN, the table or its regions, the acknowledgement."""
        self.frontend.send(Request.POSTCOPY_ADVISE)
        _, fds, _, _ = socket.recv_fds(self.frontend.sock, HEADER.size, 1)
        assert self.frontend.do(Request.POSTCOPY_LISTEN) == 0
        if self._slots:
            request, bases = Request.ADD_MEM_REG, [self._tell(item) for item in regions]
        else:
            request = Request.SET_MEM_TABLE
            table = mem_table(*(region(item.gpa, item.size, item.uva, item.mmap_offset) for item in regions))
            reply = self.frontend.ask(request, table, [item.fd for item in regions])
            assert len(reply.payload) == len(table)
            bases = [user_address for _, _, user_address, _ in struct.iter_unpack("=QQQQ", reply.payload[8:])]
        self._memory.serve(fds[0], bases)
        self.frontend.send(request, u64(0))

    def _tell(self, item: MemoryRegion) -> int:
        packed = single_region(region(item.gpa, item.size, item.uva, item.mmap_offset))
        reply = self.frontend.ask(Request.ADD_MEM_REG, packed, [item.fd])
        assert len(reply.payload) == len(packed)
        return int(struct.unpack("=QQQQQ", reply.payload)[3])


@contextmanager
def served(folder: Path, *, slots: bool, frames: int = FRAMES) -> Generator[tuple[Guest, Elsewhere, Path]]:
    """Run a server; make a guest with frames to send on a pair, that is about to arrive there."""
    path, control = folder / "net.sock", folder / "net.ctl"
    options = ("--socket-path", str(path), "--control-path", str(control), "--backend", "loopback")
    with (
        serving(folder, *options) as child,
        Guest(cast("NetDevice", Absent()), num=RING, room=ROOM) as guest,
    ):
        guest.pairs[0].post()
        send(guest, count=frames)
        with Elsewhere(regions_of(guest)) as memory:
            if not frames:
                memory.bring_all(0)
            device = RemoteArrival(path, memory, slots=slots)
            guest.device = device.as_net_device()  # type: ignore[misc]
            device.set_owner()
            device.set_features(guest.features)
            guest.set_mem_table()
            for index in (0, 1):
                device.set_vring_enable(index, True)
            yield guest, memory, control
            device.stop_all()
        assert child.terminate_in_time() == 0, child.output
        assert "Traceback" not in child.output


def received(control: Path) -> int:
    """Return how many frames the server has brought to its guest."""
    return int(ask("show", control)["devices"][0]["queues"][0]["packets"])


@pytest.mark.slow
@pytest.mark.parametrize("slots", [False, True], ids=["table", "regions"])
def test_over_the_socket(tmp_path: Path, slots: bool) -> None:
    """A front-end's messages do all of that: frames come back through missing pages; END releases what it took."""
    with served(tmp_path, slots=slots) as (guest, memory, control):
        for index in (0, 1):
            guest.start(index, 0)
        wait_until(lambda: received(control) == FRAMES, what="all frames")
        assert len({place for place in memory.asked if place.region == 1}) == 2 * FRAMES
        pager = ask("show", control)["devices"][0]["postcopy"]["pager_pid"]
        memory.bring_all()
        frontend = cast("RemoteArrival", guest.device).frontend
        assert frontend.ask(Request.POSTCOPY_END).u64 == 0
        wait_until(lambda: not process_alive(pager), what="the pager's end")
        assert [read_frame(frame) for frame in guest.pairs[0].receive()] == list(range(FRAMES))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["front-end", "pager"])
def test_hang_up_during_a_fault(tmp_path: Path, victim: str) -> None:
    """A front-end that dies in the middle takes nothing with it, and one without a pager is hung up on.

    The server takes the next one, whose frames move, with the same workers' slots.
    """
    with served(tmp_path, slots=True, frames=0) as (guest, memory, control):
        for index in (0, 1):
            guest.start(index, 0)
        memory.withhold(FIRST_RECEIVED)
        send(guest)
        memory.wait_until_withheld()
        remote = cast("RemoteArrival", guest.device)
        pager = ask("show", control)["devices"][0]["postcopy"]["pager_pid"]
        if victim == "front-end":
            memory.stop()
            remote.frontend.close()
        else:
            os.kill(pager, signal.SIGKILL)
            assert remote.frontend.hung_up()
        wait_until(lambda: not ask("show", control)["devices"][0]["connected"], what="the end of the connection")
        wait_until(lambda: not process_alive(pager), what="the pager's end")
        assert ask("show", control)["devices"][0]["postcopy"] is None
        next_one = RemoteDevice(tmp_path / "net.sock")
        with Guest(next_one.as_net_device()) as other, Traffic(other.pairs[0]) as traffic:
            traffic.progress(200)
            assert traffic.finish().missing == 0


def test_order(pool: Pool) -> None:
    """What comes in a wrong order is refused with nothing changed."""
    device = NetDevice(pool, backend="loopback", queue_pairs=2)
    postcopy = device.postcopy
    assert postcopy is not None
    for verb in (postcopy.listen, postcopy.end, lambda: postcopy.map([])):
        with pytest.raises(LocalError, match="comes first"):
            verb()
    for _ in range(4):  # each queue pair of QEMU's speaks for itself: never more than there are rings
        os.close(postcopy.advise())
    with pytest.raises(LocalError, match="begun already"):
        postcopy.advise()
    with pytest.raises(LocalError, match="LISTEN comes first"):
        postcopy.end()
    postcopy.listen()
    postcopy.listen()
    with pytest.raises(LocalError, match="begun already"):
        postcopy.advise()
    for _ in range(4):
        assert postcopy.listening
        postcopy.end()
    with pytest.raises(LocalError, match="comes first"):
        postcopy.end()
    assert device.snapshot()["postcopy"] is None


def test_memory_before_listen(pool: Pool) -> None:
    """Memory that was set before ends what was only advised: pages that are mapped cannot be asked for any more."""
    device = NetDevice(pool, backend="loopback")
    assert device.postcopy is not None
    with GuestMemory.create(PAGE) as memory:
        device.set_owner()
        device.set_mem_table([memory.region])
        os.close(device.postcopy.advise())
        with pytest.raises(LocalError, match="memory is set already"):
            device.postcopy.listen()
        pager = device.snapshot()["postcopy"]["pager_pid"]
        device.set_mem_table([memory.region])
        wait_until(lambda: not process_alive(pager), what="the pager's end")
        assert device.snapshot()["postcopy"] is None
        device.stop_all()


def test_memory_that_cannot_be_paged(pool: Pool, tmp_path: Path) -> None:
    """A file of a file system is refused in one line, and memory of that kind is as before."""
    device = NetDevice(pool, backend="loopback")
    postcopy = device.postcopy
    assert postcopy is not None
    device.set_owner()
    os.close(postcopy.advise())
    postcopy.listen()
    file = tmp_path / "memory"
    file.write_bytes(bytes(PAGE))
    with file.open("r+b") as opened:
        region = MemoryRegion(gpa=0, size=PAGE, uva=0, fd=opened.fileno())
        with pytest.raises(LocalError, match="cannot be paged in"):
            postcopy.map([region])
        with pytest.raises(LocalError, match="cannot be paged in"):
            device.set_mem_table([region])
    assert device.snapshot()["regions"] == []
    device.stop_all()
