"""The control process dies while a guest has more than plain rings: an IOMMU, a log, post-copy, neighbours.

As in test_adoption.py what is killed is the control process, by SIGKILL; its front-ends are ours, on real sockets.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Final, cast

import pytest

from tests import helpers
from tests.dirty import LOG_ALL, DirtyLog, pages, pages_of
from tests.frames import make_frame, read_frame
from tests.integration.restarting import Restarting, Reviving
from tests.integration.test_adoption import FLUSH_PLACES, MESSAGE_PLACES, TURNS_MAX
from tests.integration.test_dirty_log import LOG_BYTES
from tests.integration.test_packed_inflight import where
from tests.integration.test_postcopy import FIRST_RECEIVED, RING, ROOM, Absent, RemoteArrival, regions_of, send
from tests.integration.test_swap import whole
from tests.integration.traffic import Traffic
from tests.iommu_guest import StrictGuest
from tests.net_driver import F_EVENT_IDX, F_INDIRECT_DESC, F_MRG_RXBUF, F_VERSION_1, Guest, Shape
from tests.paging import Elsewhere
from tests.remote import RemoteDevice
from tests.remote_iommu import RemoteDeviceBehindIommu
from vhostmp.consts import ProtocolFeature, Request
from vhostmp.net import NetDevice
from vhostmp.shm.memory import GuestMemory
from vhostmp.tools.stress.frontend import REPLY_ACK, Frontend
from vhostmp.tools.stress.ring import F_RING_PACKED, Used

pytestmark = pytest.mark.slow

ALL: Final = F_VERSION_1 | F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX
SIZES: Final = (60, 61, 590, 1514)
WINDOW: Final = 20

rings = pytest.mark.parametrize("bits", [ALL, ALL | F_RING_PACKED], ids=["split", "packed"])


@contextlib.contextmanager
def behind_iommu(folder: Path, bits: int) -> Generator[tuple[Restarting, StrictGuest]]:
    """Serve a device, and connect a guest that maps each buffer for its one use."""
    with Restarting(folder, "--backend", "loopback", "--iommu") as server:
        with (
            contextlib.closing(RemoteDeviceBehindIommu(server.socket)) as device,
            StrictGuest(device.as_net_device(), features=bits, num=64) as guest,
        ):
            yield server, guest
        server.end()


def there_and_back(guest: Guest, number: int) -> None:
    """Send a frame, and wait until it has come back."""
    pair = guest.pairs[0]
    pair.post()
    assert pair.send(make_frame(number, 60))
    pair.kick()
    helpers.wait_until(lambda: pair.rx.pending() and pair.tx.pending(), what="the frame")
    assert [read_frame(frame) for frame in pair.receive()] == [number]
    assert pair.reap() == 1


@rings
@pytest.mark.parametrize("answered", ["while it is dead", "afterwards"])
def test_a_question_is_open(tmp_path: Path, bits: int, answered: str) -> None:
    """It dies with a question at the front-end: the answer counts, whenever it is sent, and the ring goes on."""
    with behind_iommu(tmp_path, bits) as (server, guest):
        pair, iommu = guest.pairs[0], guest.iommu
        there_and_back(guest, 0)
        iommu.deaf.set()
        asked = len(iommu.asked)
        assert pair.send(make_frame(1, 60))
        pair.kick()
        helpers.wait_until(lambda: len(iommu.asked) > asked, what="a question")
        server.kill()
        answering = threading.Thread(target=iommu.answer_all)
        if answered == "while it is dead":
            answering.start()  # which waits for its acknowledgement
        server.start()
        if answered == "afterwards":
            answering.start()
        answering.join()
        helpers.wait_until(lambda: pair.rx.pending() > 0, what="the frame")
        assert [read_frame(frame) for frame in pair.receive()] == [1]
        assert pair.reap() == 1
        assert iommu.unknown == 0


@rings
def test_a_question_comes_up_meanwhile(tmp_path: Path, bits: int) -> None:
    """What a ring misses while there is no control process the next one asks for, without a kick."""
    with behind_iommu(tmp_path, bits) as (server, guest):
        pair, iommu = guest.pairs[0], guest.iommu
        there_and_back(guest, 0)  # while a question is being answered nobody can map anything
        asked = len(iommu.asked)
        server.kill()
        assert pair.send(make_frame(1, 60))
        pair.kick()
        assert len(iommu.asked) == asked
        server.start()
        helpers.wait_until(lambda: pair.rx.pending() > 0, what="the frame")
        assert [read_frame(frame) for frame in pair.receive()] == [1]


@rings
def test_strict_traffic(tmp_path: Path, bits: int, rng: random.Random) -> None:
    """Killed at random moments, while each buffer of each frame is mapped, asked for and unmapped: nothing is lost."""
    with behind_iommu(tmp_path, bits) as (server, guest):
        with Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW) as traffic:
            for _ in range(8):
                traffic.progress(rng.randint(1, 40))
                server.again()
            traffic.progress(50)
            whole(traffic.finish())
        assert guest.iommu.denied == []


@rings
def test_rings_that_stop_and_start(tmp_path: Path, bits: int, rng: random.Random) -> None:
    """Of both formats, under traffic of every shape: what is in flight when it dies, and where a ring stands, is kept.

    A packed ring stands at more than a number: its wrap counters, and what its driver has not been told of, too.
    """
    with Restarting(tmp_path, "--backend", "loopback", "--workers", "2") as server:
        device = RemoteDevice(server.socket)
        with Guest(device.as_net_device(), features=bits, num=64) as guest:
            guest.pairs[0].shape = Shape(split_header=True, pieces=2, indirect=True)
            with Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW) as traffic:
                for _ in range(6):
                    traffic.progress(rng.randint(1, 300))
                    server.kill()
                    traffic.progress(rng.randint(1, 300))
                    server.start()
                    traffic.pause()
                    guest.renew_buffers()
                    for index, base in enumerate(guest.stop()):
                        guest.start(index, base)
                    traffic.resume()
                traffic.progress(300)
                whole(traffic.finish())
        server.end()


@pytest.mark.parametrize("both", [False, True], ids=["control", "control and worker"])
def test_what_is_in_flight(tmp_path: Path, both: bool) -> None:
    """The region of what packed rings have in flight is written on, by the same workers and by new ones.

    A front-end could give it to another back-end at any time: it says where the rings stand, and nothing is in flight.
    """
    num = 100
    with Restarting(tmp_path, "--backend", "loopback") as server:
        device = RemoteDevice(server.socket, REPLY_ACK | ProtocolFeature.INFLIGHT_SHMFD.mask)
        with Guest(device.as_net_device(), features=ALL | F_RING_PACKED, num=num) as guest:
            bases = guest.stop()
            region, size = device.get_inflight(2, num)
            try:
                device.set_inflight(region, 0, size, 2, num)
                for index, base in enumerate(bases):
                    guest.start(index, base)
                with Traffic(guest.pairs[0], returns=not both, window=None if both else WINDOW) as traffic:
                    for _ in range(3):
                        traffic.progress_sent(500)
                        worker = server.show()["workers"][0]["pid"]
                        server.kill()
                        traffic.progress_sent(200)
                        if both:
                            os.kill(worker, signal.SIGKILL)
                            helpers.wait_until(lambda pid=worker: not helpers.process_alive(pid))  # type: ignore[misc]
                        server.start()
                    traffic.progress_sent(500)
                    tally = traffic.finish()
                if not both:
                    whole(tally)
                assert [base & 0xFFFF for base in guest.stop()] == [where(region, index) for index in range(2)]
                assert where(region, 1) == guest.pairs[0].tx.used_idx
            finally:
                os.close(region)
        server.end()


class Logged:
    """A guest whose memory's changes are logged, over a socket: bursts of frames, each judged page by page."""

    def __init__(self, guest: Guest, device: RemoteDevice, log: DirtyLog) -> None:
        """Log from now on."""
        self.guest: Final = guest
        self.device: Final = device
        self.log: Final = log
        self.frames = 0
        device.set_log_base(log.fd, log.size)
        device.set_features(guest.features | LOG_ALL)
        base = guest.rings
        for index, place in enumerate(guest.layouts):
            device.set_vring_addr(
                index,
                desc=base.uva + place.desc,
                avail=base.uva + place.avail,
                used=base.uva + place.used,
                flags=1,
                log=base.gpa + place.used,
            )

    def begin(self, count: int) -> None:
        """Clear the log, and send frames; the device is idle before."""
        pair = self.guest.pairs[0]
        pair.post()
        for number in range(self.frames, self.frames + count):
            assert pair.send(make_frame(number, 600))
        self.frames += count
        pair.rx.publish()  # what we write ourselves is not the device's to log
        pair.tx.publish()
        self.log.clear()
        self._before = [bytes(memory.buf) for memory in self._memories()]
        for fd in pair.kicks:
            os.eventfd_write(fd, 1)

    def judge(self) -> None:
        """Wait for the frames: every page that has changed is in the log, and of buffers no page that has not."""
        guest, pair = self.guest, self.guest.pairs[0]
        count = len(pair.tx.in_flight)
        used: list[Used] = []

        def came() -> bool:
            used.extend(pair.rx.reap())
            pair.reap()
            return len(used) == count and not pair.tx.in_flight

        helpers.wait_until(came, what="the frames")
        changed: set[int] = set()
        for memory, before in zip(self._memories(), self._before, strict=True):
            for at in range(0, memory.size, 4096):
                if bytes(memory.buf[at : at + 4096]) != before[at : at + 4096]:
                    changed |= pages(memory.gpa + at, 1)
        helpers.wait_until(lambda: changed <= self.log.pages, what="the log of what has changed")
        written: set[int] = set()
        for one in used:
            assert one.length is not None
            written |= pages_of(one.chain.writable, one.length)
            guest.buffers.give(one.chain.writable[0][0])
        first = guest.buffers.memory.gpa // 4096
        assert {page for page in self.log.pages if page >= first} == written

    def _memories(self) -> Sequence[GuestMemory]:
        return [self.guest.rings, self.guest.buffers.memory]


@rings
def test_the_log_is_complete(tmp_path: Path, bits: int) -> None:
    """While writes are logged it dies: before, while and after it is gone every page that the device changes is logged.

    Also when frames are under way at its death, and at its successor's first flush; and logging can be ended after it.
    """
    with Restarting(tmp_path, "--backend", "loopback") as server:
        device = RemoteDevice(server.socket, REPLY_ACK | ProtocolFeature.LOG_SHMFD.mask)
        with Guest(device.as_net_device(), features=bits, num=64) as guest, DirtyLog(LOG_BYTES) as log:
            logged = Logged(guest, device, log)
            for turn in range(6):
                logged.begin(30)
                if turn % 2:
                    server.kill()
                logged.judge()
                if turn % 2 == 0:
                    server.kill()
                logged.begin(30)
                logged.judge()
                logged.begin(30)
                server.start()
                logged.judge()
            device.set_features(guest.features)
            log.clear()
            logged.guest.pairs[0].post()
            there_and_back(guest, 0)
            assert not {page for page in log.pages if page >= guest.buffers.memory.gpa // 4096}
        server.end()


def test_the_log_is_exchanged(tmp_path: Path, rng: random.Random) -> None:
    """Killed at each step while the log goes on, off and elsewhere: after an answer the log before is never written."""
    places = [f"{place}:{rng.randint(1, 12)}" for place in (*MESSAGE_PLACES, *FLUSH_PLACES) for _ in range(2)]
    with Restarting(tmp_path, "--backend", "loopback") as server, Reviving(server, places) as reviving:
        device = RemoteDevice(server.socket, REPLY_ACK | ProtocolFeature.LOG_SHMFD.mask)
        with (
            DirtyLog(LOG_BYTES) as first,
            DirtyLog(LOG_BYTES) as second,
            Guest(device.as_net_device(), num=64) as guest,
            Traffic(guest.pairs[0], sizes=SIZES, window=WINDOW) as traffic,
        ):
            os.kill(server.child.pid, signal.SIGKILL)
            for _ in range(TURNS_MAX):
                device.set_log_base(first.fd, first.size)
                device.set_features(guest.features | LOG_ALL)
                traffic.progress(30)
                assert first.pages
                device.set_log_base(second.fd, second.size)
                first.clear()
                traffic.progress(30)
                assert second.pages
                assert not first.pages
                device.set_features(guest.features)
                second.clear()
                traffic.progress(30)
                assert not first.pages
                assert not second.pages
                if reviving.is_exhausted:
                    break
            else:
                pytest.fail("not all places were reached")
            whole(traffic.finish())
        reviving.rest()
        server.end()


@pytest.mark.parametrize("place", ["", "published:1", "settled:1", "connected:1"])
@pytest.mark.parametrize("waits", [True, False], ids=["a worker waits", "advised"])
def test_post_copy_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool, place: str) -> None:
    """It dies while a guest comes in by post-copy: the next one hangs up on that front-end, and on no other.

    Neither a worker that waits for a page nor its replacement sends or brings anything that nobody has sent; the pager
    ends; the next front-end is served. Also when the next one dies as well, at a `place` of its adoption.
    """
    other = tmp_path / "t"
    with Restarting(tmp_path, "--backend", "loopback", "--workers", "2", "--socket-path", str(other)) as server:
        device = RemoteDevice(other)
        with Guest(device.as_net_device()) as neighbour, Traffic(neighbour.pairs[0], window=WINDOW) as traffic:
            with (
                Guest(cast("NetDevice", Absent()), num=RING, room=ROOM) as guest,
                Elsewhere(regions_of(guest)) as memory,
            ):
                memory.bring_all(0)
                arriving = RemoteArrival(server.socket, memory, slots=False)
                if waits:
                    guest.device = arriving.as_net_device()  # type: ignore[misc]
                    arriving.set_owner()
                    arriving.set_features(guest.features)
                    guest.set_mem_table()
                    for index in (0, 1):
                        guest.start(index, 0)
                        arriving.set_vring_enable(index, True)
                    memory.withhold(FIRST_RECEIVED)
                    guest.pairs[0].post()
                    send(guest)
                    memory.wait_until_withheld()
                else:
                    arriving.set_owner()
                    _, fds = arriving.frontend.ask_fds(Request.POSTCOPY_ADVISE)
                    os.close(fds[0])
                pager = server.show()["devices"][0]["postcopy"]["pager_pid"]
                traffic.progress(100)
                server.kill()
                traffic.progress_sent(50)
                assert not readable(arriving.frontend)
                if place:
                    monkeypatch.setenv("VHOSTMP_KILL_AT", place)
                    with contextlib.suppress(AssertionError):  # it does not get ready
                        server.start()
                    helpers.wait_until(lambda: not server.child.running)
                    monkeypatch.delenv("VHOSTMP_KILL_AT")
                server.start()
                assert arriving.frontend.hung_up()
                helpers.wait_until(lambda: not helpers.process_alive(pager), what="the pager's end")
                assert "post-copy does not survive the control process" in server.child.output
                arriving.frontend.close()
                assert not guest.pairs[0].rx.pending()
            shown = server.show()["devices"][0]
            assert (shown["postcopy"], shown["regions"], shown["connected"]) == (None, [], False)
            with (
                Guest(RemoteDevice(server.socket).as_net_device()) as following,
                Traffic(following.pairs[0], window=WINDOW) as more,
            ):
                more.progress(200)
                whole(more.finish())
            traffic.progress(100)
            whole(traffic.finish())
        server.end()


def readable(frontend: Frontend) -> bool:
    """Whether anything, or the end, has come from the back-end."""
    return bool(select.select([frontend.sock], [], [], 0)[0])


def test_several_front_ends(tmp_path: Path, rng: random.Random) -> None:
    """Four devices, in every state: each goes on where it stood, whichever message of whichever it died of.

    Two are under traffic and change their memory, one is connected and has set nothing up, one has nobody; front-ends
    come and go between the deaths.
    """
    paths = [tmp_path / name for name in "stuv"]
    more = [word for path in paths[1:] for word in ("--socket-path", str(path))]
    places = [f"{place}:{rng.randint(1, 15)}" for place in (*MESSAGE_PLACES, *FLUSH_PLACES)]
    with (
        Restarting(tmp_path, "--backend", "loopback", "--workers", "2", *more) as server,
        Reviving(server, places) as reviving,
        Guest(RemoteDevice(paths[0]).as_net_device()) as one,
        Guest(RemoteDevice(paths[1]).as_net_device(), features=ALL | F_RING_PACKED) as two,
        Traffic(one.pairs[0], window=WINDOW) as first,
        Traffic(two.pairs[0], window=WINDOW) as second,
        Frontend.connect(paths[2]) as quiet,
    ):
        assert quiet.ask(Request.GET_QUEUE_NUM).u64 == 1
        os.kill(server.child.pid, signal.SIGKILL)
        for _ in range(TURNS_MAX):
            for guest, traffic in ((one, first), (two, second)):
                traffic.pause()
                guest.drop_idle_buffers(b"gone")
                guest.renew_buffers()
                traffic.resume()
                traffic.progress(20)
            assert quiet.ask(Request.GET_QUEUE_NUM).u64 == 1
            with Frontend.connect(paths[3]) as passing:
                assert passing.ask(Request.GET_QUEUE_NUM).u64 == 1
            if reviving.is_exhausted:
                break
        else:
            pytest.fail("not all places were reached")
        whole(first.finish())
        whole(second.finish())
        assert [device["connected"] for device in server.show()["devices"]][:3] == [True] * 3
        reviving.rest()
        quiet.close()
        one.device.stop_all()
        two.device.stop_all()
        server.end()
