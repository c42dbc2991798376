"""The software guest counts what a device does to its packets, exactly: a device in plain Python does it on purpose."""

from __future__ import annotations

import os
import random
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final, Protocol

import attrs
import pytest

from tests.helpers import PATIENCE, wait_until
from tests.oracle.memory import OracleMemory
from tests.oracle.packed import PackedVring
from tests.oracle.split import Memory, Vring
from vhostmp.errors import LocalError
from vhostmp.shm.memory import GuestMemory
from vhostmp.shm.segment import Segment
from vhostmp.tools import _board, _guest, guest
from vhostmp.tools.stress.packed import AVAIL, USED, WRAP, pack_packed

HEADER_BYTES = 12
POISON = 0xA5
PACKETS: Final = 500
BAD: Final = 50
REST_SECONDS: Final = 0.03
#: What has not come back after so long is lost: the device is a thread of ours, which may have to wait for a processor.
QUIET_SECONDS: Final = 1.0
MOVES: Final = 6
VERSION_1 = 1 << _guest.F_VERSION_1
PACKED = VERSION_1 | 1 << _guest.F_RING_PACKED
EVERYTHING = VERSION_1 | 1 << _guest.F_INDIRECT | 1 << _guest.F_EVENT_IDX | 1 << _guest.F_IN_ORDER
PACKED_EVERYTHING = EVERYTHING | PACKED
LAYOUT = guest.Layout(tx_entries=16, rx_entries=32)
#: A fault takes a frame number and its header and frame, and says what arrives, in order.
Fault = Callable[[int, bytes], list[bytes]]


class Rig:
    """A guest in a thread of this process and a device in plain Python in the caller's hands."""

    def __init__(self, features: int = EVERYTHING, *, sizes: tuple[int, int] = (64, 64), loses: bool = False) -> None:
        """Build everything; the guest runs, and sends once `go` was called.

        `loses`: not all will come back, so that the end has to wait for what does not.
        """
        self.packed = features >> _guest.F_RING_PACKED & 1 == 1
        self.layout = attrs.evolve(LAYOUT, packed=self.packed)
        self.base = GuestMemory.create(LAYOUT.base_size)
        self.pools = [GuestMemory.create(LAYOUT.pool_size, gpa=guest.POOL_GPA) for _ in range(2)]
        self.current = 0
        self.boards = Segment.create(guest.board_segment_size(1))
        self.board = _board.Board(self.boards.buf)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.spec = guest.Spec(
            pair=0,
            layout=self.layout,
            base_fd=self.base.fd,
            pool_fds=(self.pools[0].fd, self.pools[1].fd),
            board_fd=self.boards.fd,
            tx_kick_fd=self.kicks[1],
            tx_call_fd=self.calls[1],
            rx_kick_fd=self.kicks[0],
            rx_call_fd=self.calls[0],
            features=features,
            sizes=sizes,
            indirect_every=3,
            quiet_seconds=QUIET_SECONDS if loses else PATIENCE,
        )
        pools = (self.pools[0].buf, self.pools[1].buf)
        self._guest = guest.make_guest(self.spec, self.base.buf, pools, self.boards.buf)
        self._maps: list[OracleMemory] = []
        self.memory: Memory = self.map()
        self.rx, self.tx = self.ring(0), self.ring(1)
        self.fault: Fault = lambda _, packet: [packet]
        self.under_way: deque[bytes] = deque()
        self.taken = 0
        self.delivered = 0
        self._thread = threading.Thread(target=self._guest.run)
        self._thread.start()

    def map(self) -> OracleMemory:
        """Map the memory table as it is now."""
        self._maps.append(OracleMemory([self.base.region, self.pools[self.current].region]))
        return self._maps[-1]

    def ring(self, index: int, last_avail_idx: int | None = None) -> Vring | PackedVring:
        """Make the device's side of virtqueue `index`, which stands at its beginning unless said otherwise."""
        place = self.layout.ring(index)
        places = place.desc, place.avail, place.used
        features = self.spec.features
        if self.packed:
            first = WRAP if last_avail_idx is None else last_avail_idx
            return PackedVring(self.memory, place.entries, *places, features=features, last_avail_idx=first)
        return Vring(self.memory, place.entries, *places, features=features, last_avail_idx=last_avail_idx or 0)

    def order(self, code: int, work: bool = True) -> None:
        """Give the guest an order and wait until it is done, the device working meanwhile or not."""
        command = self.board.order(code)
        wait_until(lambda: (work and self.step(), self.board.acknowledged(command))[1], what=f"order {code}")

    def step(self) -> int:
        """Let the device work once: take what is sent, do its fault, deliver. Returns packets delivered."""
        sent = False
        while (chain := self.tx.pop()) is not None:
            packet = b"".join(self.memory.read(gpa, length) for gpa, length in chain.readable)
            self.under_way.extend(self.fault(self.taken, packet))
            self.taken += 1
            self.tx.push(chain.head, 0)
            sent = True
        if sent:
            self.call(self.tx, 1)
        return self.deliver()

    def deliver(self) -> int:
        """Give the guest what is under way, as far as it has buffers."""
        done = 0
        while self.under_way and (chain := self.rx.pop()) is not None:
            packet = self.under_way.popleft()
            packet = packet[:10] + b"\1\0" + packet[HEADER_BYTES:]
            ((gpa, _),) = chain.writable
            self.memory.write(gpa, packet)
            self.rx.push(chain.head, len(packet))
            done += 1
        if done:
            self.call(self.rx, 0)
        self.delivered += done
        return done

    def call(self, ring: Vring | PackedVring, index: int) -> None:
        """Publish, and interrupt when the guest wants it."""
        if ring.publish():
            os.eventfd_write(self.calls[index], 1)

    def work_until(self, condition: Callable[[], bool], what: str) -> None:
        """Work until `condition` holds."""
        wait_until(lambda: (self.step(), condition())[1], what=what)

    def run_until(self, packets: int) -> None:
        """Work until so many packets have been taken from the guest."""
        self.work_until(lambda: self.taken >= packets, f"{packets} packets")

    def rest(self, seconds: float) -> None:
        """Deliver nothing for a while, which begins when the guest has noted all that was delivered."""
        wait_until(lambda: sum(self.board.bins(1 << 18)) == self.delivered, what="the guest's notes")
        threading.Event().wait(seconds)

    def wait_for_full_ring(self) -> None:
        """Wait until the guest has filled its transmit ring; the device rests."""
        wait_until(lambda: self.board.counters()["sent"] == self.taken + LAYOUT.tx_entries, what="a full ring")

    def move(self, packets_meanwhile: int) -> None:
        """Move the buffers to the other pool, as the demo does, device included.

        The ring is full when both pools become valid, and again when the old one is given up some packets later.
        """
        old = self.pools[self.current]
        self.wait_for_full_ring()
        self.order(_board.DUAL, work=False)
        if packets_meanwhile:
            self.run_until(self.taken + packets_meanwhile)
            self.wait_for_full_ring()
        self.current = 1 - self.current
        self.remap()
        part = LAYOUT.transmit_part(0)
        old.buf[part] = bytes([POISON]) * (part.stop - part.start)
        self.order(_board.MOVED)
        old.buf[:] = bytes([POISON]) * old.size

    def remap(self) -> None:
        """Have the device use the table as it is now."""
        self.memory = self.map()
        self.rx, self.tx = self.ring(0, self.rx.last_avail_idx), self.ring(1, self.tx.last_avail_idx)

    def totals(self) -> dict[str, int]:
        """Drain, and return the guest's counters."""
        self.order(_board.DRAIN)
        return self.board.counters()

    def close(self) -> None:
        """End the guest and everything else."""
        self.board.order(_board.STOP)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the guest does not end"
        del self._guest, self.board
        for mapped in self._maps:
            mapped.close()
        for memory in (self.base, *self.pools):
            memory.close()
        self.boards.close()
        for fd in (*self.kicks, *self.calls):
            os.close(fd)


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    """Make rigs, closed at the end."""
    rigs: list[Rig] = []

    def make(*args: Any, **options: Any) -> Rig:
        rigs.append(Rig(*args, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


FAULTS = ("lost", "duplicated", "reordered", "corrupted", "kill_lost", "kill_duplicated", "violations")
NOTHING_WRONG = dict.fromkeys(FAULTS, 0)


def wrong(totals: dict[str, int]) -> dict[str, int]:
    """Return the counters that should be nought."""
    return {name: totals[name] for name in FAULTS}


@pytest.mark.parametrize("size", [48, 64, 65, 71, 1514])
def test_frame_every_byte_counts(size: int, rng: random.Random) -> None:
    """A frame is good only when every byte of it is; exchanged addresses are allowed."""
    frame = _board.make_frame(123456789012345, 7, 1, size)
    assert len(frame) == size
    assert _board.check_frame(frame) == (123456789012345, 7)
    assert _board.check_frame(frame[6:12] + frame[:6] + frame[12:]) == (123456789012345, 7)
    for position in range(size):
        changed = bytearray(frame)
        changed[position] ^= 1 << rng.randrange(8)
        assert _board.check_frame(bytes(changed)) is None, f"byte {position}"
    assert _board.check_frame(frame[:-1]) is None
    assert _board.check_frame(bytes(size)) is None


def test_frame_size_is_checked() -> None:
    """No frame is made that is shorter than its own header or longer than Ethernet allows."""
    for size in (0, 47, 1515):
        with pytest.raises(LocalError, match="frame size"):
            _board.make_frame(0, 0, 0, size)


@pytest.mark.parametrize(
    "features", [VERSION_1, VERSION_1 | 1 << _guest.F_EVENT_IDX, EVERYTHING, PACKED, PACKED_EVERYTHING]
)
@pytest.mark.parametrize("sizes", [(64, 64), (48, 1514)])
def test_loop_counts_every_packet(make_rig: Callable[..., Rig], features: int, sizes: tuple[int, int]) -> None:
    """A device that loops everything in order has nothing counted against it, whatever was negotiated."""
    rig = make_rig(features, sizes=sizes)
    rig.order(_board.RUN)
    rig.run_until(PACKETS)
    totals = rig.totals()
    assert totals["sent"] == totals["received"] == rig.taken >= PACKETS
    assert wrong(totals) == NOTHING_WRONG


class _Nowhere:
    """Memory that forgets."""

    def write(self, gpa: int, data: bytes, /) -> None:
        """Write nothing."""


class Writes(Protocol):
    """What packets can be written to."""

    def write(self, gpa: int, data: bytes, /) -> None:
        """Copy bytes in."""
        ...


class _Split:
    """Reads packets from one memory and writes them to another."""

    def __init__(self, source: Memory, target: Writes) -> None:
        self.read = source.read
        self.write = target.write
        self.run = source.run


def _lose(number: int, packet: bytes) -> list[bytes]:
    return [] if number in (10, 11, 90) else [packet]


def _repeat(number: int, packet: bytes) -> list[bytes]:
    return [packet, packet] if number in (10, 90) else [packet]


def _damage(number: int, packet: bytes) -> list[bytes]:
    return [packet[:-1] + bytes([packet[-1] ^ 1])] if number == BAD else [packet]


def _shorten(number: int, packet: bytes) -> list[bytes]:
    return [packet[:-4]] if number == BAD else [packet]


class _Exchange:
    """Delivers packet BAD three packets later."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []

    def __call__(self, number: int, packet: bytes) -> list[bytes]:
        if number == BAD:
            self.kept = [packet]
            return []
        return [packet, *self.kept] if number == BAD + 3 else [packet]


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        (_lose, {"lost": 3}),
        (_repeat, {"duplicated": 2}),
        (_Exchange(), {"reordered": 1}),
        (_damage, {"lost": 1, "corrupted": 1}),
        (_shorten, {"lost": 1, "corrupted": 1}),
    ],
    ids=["lose", "repeat", "exchange", "damage", "shorten"],
)
def test_faults_are_counted(make_rig: Callable[..., Rig], fault: Fault, counted: dict[str, int]) -> None:
    """What a device does wrong is counted, each kind under its name and nothing else with it."""
    rig = make_rig(loses="lost" in counted)
    rig.fault = fault
    rig.order(_board.RUN)
    rig.run_until(200)
    totals = rig.totals()
    assert wrong(totals) == NOTHING_WRONG | counted
    assert totals["received"] == totals["sent"] - counted.get("lost", 0)


def test_untouched_buffer_is_no_packet(make_rig: Callable[..., Rig]) -> None:
    """A receive buffer that the device returns without having written to it is damage, whatever it held before."""
    rig = make_rig(loses=True)
    rig.order(_board.RUN)
    rig.run_until(200)
    memory = rig.memory
    rig.memory = _Split(memory, _Nowhere())
    rig.run_until(rig.taken + 1)
    rig.memory = memory
    rig.run_until(rig.taken + 100)
    totals = rig.totals()
    assert totals["corrupted"] == totals["lost"] > 0
    assert totals["duplicated"] == 0


def test_last_packets_can_be_lost(make_rig: Callable[..., Rig]) -> None:
    """A packet that nothing follows is found missing too, once nothing has come for `quiet_seconds`."""
    rig = make_rig(loses=True)
    rig.order(_board.RUN)
    rig.run_until(100)
    rig.wait_for_full_ring()
    start = rig.taken
    rig.fault = lambda number, packet: [] if number >= start else [packet]
    totals = rig.totals()
    assert wrong(totals) == NOTHING_WRONG | {"lost": LAYOUT.tx_entries}


@pytest.mark.parametrize("features", [VERSION_1, EVERYTHING, PACKED, PACKED_EVERYTHING])
def test_kick_only_when_asked(make_rig: Callable[..., Rig], features: int) -> None:
    """The guest kicks for the first packet after it was asked to, and otherwise not."""
    rig = make_rig(features)
    # The first stocking of the receive ring: nobody has asked for silence yet.
    wait_until(lambda: _readable(rig.kicks[0]), what="a kick of the receive ring")
    rig.tx.disable_notify()
    rig.order(_board.RUN)
    rig.run_until(100)
    with suppress(BlockingIOError):
        os.eventfd_read(rig.kicks[1])
    before = rig.taken
    rig.run_until(before + 100)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(rig.kicks[1])
    # Everything is taken and nothing delivered: the guest runs out of receive buffers and must stop.
    rig.wait_for_full_ring()
    packets = 0
    while (chain := rig.tx.pop()) is not None:
        rig.under_way.append(b"".join(rig.memory.read(gpa, length) for gpa, length in chain.readable))
        rig.tx.push(chain.head, 0)
        packets += 1
    rig.taken += packets
    assert not rig.tx.enable_notify()
    rig.call(rig.tx, 1)
    rig.deliver()
    wait_until(lambda: _readable(rig.kicks[1]), what="a kick")
    rig.tx.disable_notify()
    assert wrong(rig.totals()) == NOTHING_WRONG


def _readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


@pytest.mark.parametrize("features", [VERSION_1, EVERYTHING, PACKED, PACKED_EVERYTHING])
def test_sleeps_and_is_woken(make_rig: Callable[..., Rig], features: int) -> None:
    """A guest with nothing to do sleeps, and an interrupt wakes it; while it works it asks for none."""
    rig = make_rig(features)
    rig.order(_board.RUN)
    rig.run_until(50)
    sleeps = rig.board.counters()["sleeps"]
    wait_until(lambda: rig.board.counters()["sleeps"] > sleeps, what="the guest sleeps")
    calls = rig.board.counters()["calls"]
    rig.work_until(lambda: rig.board.counters()["calls"] > calls, "an interrupt is taken")
    assert wrong(rig.totals()) == NOTHING_WRONG


@pytest.mark.parametrize("features", [EVERYTHING, PACKED_EVERYTHING], ids=["split", "packed"])
@pytest.mark.parametrize("packets_meanwhile", [0, 40])
def test_move_under_load(make_rig: Callable[..., Rig], packets_meanwhile: int, features: int) -> None:
    """A device that follows the memory table loses nothing although the old place is poisoned each time.

    Neither of what the device held before both places were valid (0 packets meanwhile) nor of what it was given later.
    """
    rig = make_rig(features, sizes=(48, 1514))
    rig.order(_board.RUN)
    for _ in range(MOVES):
        rig.run_until(rig.taken + 100)
        rig.move(packets_meanwhile)
    rig.run_until(rig.taken + 100)
    totals = rig.totals()
    assert wrong(totals) == NOTHING_WRONG
    assert totals["moves"] == MOVES


@pytest.mark.parametrize("features", [EVERYTHING, PACKED_EVERYTHING], ids=["split", "packed"])
@pytest.mark.parametrize("ring", ["tx", "rx"])
def test_stale_memory_is_found_out(make_rig: Callable[..., Rig], ring: str, features: int) -> None:
    """A device that goes on reading, or writing, the old place for one ring after the move is found out."""
    rig = make_rig(features, loses=True)
    rig.order(_board.RUN)
    rig.run_until(100)
    rig.order(_board.DUAL)
    rig.run_until(rig.taken + 40)
    stale = rig.memory
    old = rig.pools[rig.current]
    rig.current = 1 - rig.current
    rig.remap()
    part = LAYOUT.transmit_part(0)
    old.buf[part] = bytes([POISON]) * (part.stop - part.start)
    fresh = rig.memory
    rig.order(_board.MOVED, work=False)

    rig.memory = _Split(stale if ring == "tx" else fresh, stale if ring == "rx" else fresh)
    rig.run_until(rig.taken + BAD)
    rig.memory = fresh
    totals = rig.totals()
    assert totals["corrupted"] >= BAD
    assert totals["lost"] == totals["corrupted"]


def test_pause_is_measured(make_rig: Callable[..., Rig]) -> None:
    """One pause a swap, and as long as nothing came; a swap that the guest slept through counts as well."""
    rig = make_rig()
    rig.board.clock(time.monotonic_ns(), 1_000_000)
    rig.order(_board.RUN)
    rig.run_until(100)
    assert rig.board.swap_mark()
    rig.run_until(rig.taken + 10)
    assert not rig.board.swap_mark()
    rig.work_until(lambda: len(rig.board.pauses_ns()) == 1, "the first pause")
    # The device rests within a window, then two windows open and close in one rest.
    rig.board.swap_mark()
    rig.rest(REST_SECONDS)
    rig.board.swap_mark()
    rig.work_until(lambda: len(rig.board.pauses_ns()) == 1 + 1, "the second pause")
    rig.rest(REST_SECONDS)
    for _ in range(2 * 2):
        rig.board.swap_mark()
    rig.work_until(lambda: len(rig.board.pauses_ns()) == 1 + 1 + 2, "the third and the fourth pause")
    assert all(pause >= REST_SECONDS * 1e9 for pause in rig.board.pauses_ns()[1:])
    assert wrong(rig.totals()) == NOTHING_WRONG
    assert sum(rig.board.bins(1 << 18)) == rig.board.counters()["received"]


def test_kill_has_its_own_account(make_rig: Callable[..., Rig]) -> None:
    """What goes wrong after KILL was acknowledged is the kill's; what went wrong before is not."""
    rig = make_rig(loses=True)
    rig.fault = lambda number, packet: [] if number == BAD else [packet]
    rig.order(_board.RUN)
    rig.run_until(100)
    rig.order(_board.KILL)
    start = rig.taken

    def fault(number: int, packet: bytes) -> list[bytes]:
        return {start + 60: [], start + 61: [], start + 70: [packet, packet]}.get(number, [packet])

    rig.fault = fault
    rig.run_until(start + 200)
    assert wrong(rig.totals()) == NOTHING_WRONG | {"lost": 1, "kill_lost": 2, "kill_duplicated": 1}


@pytest.mark.parametrize("ring", ["tx", "rx"])
def test_violations_are_counted(make_rig: Callable[..., Rig], ring: str) -> None:
    """A used index that runs ahead, or a head the device does not hold, is a violation and no packet."""
    rig = make_rig()
    place = LAYOUT.ring(1 if ring == "tx" else 0)
    index = rig.base.buf[place.used + 2 : place.used + 4]
    index[0] = 200  # more than was ever offered
    wait_until(lambda: rig.board.counters()["violations"] > 0, what="a violation")
    assert rig.board.counters()["received"] == 0
    index[0] = 0
    index.release()


@pytest.mark.parametrize("buffer_id", [LAYOUT.rx_entries, 0xFFFF])
def test_packed_violations_are_counted(make_rig: Callable[..., Rig], buffer_id: int) -> None:
    """A used descriptor with an id that the device does not hold is a violation and no packet."""
    rig = make_rig(PACKED_EVERYTHING)
    wait_until(lambda: _readable(rig.kicks[0]), what="receive buffers")
    start = rig.layout.ring(0).desc
    rig.base.buf[start : start + 16] = pack_packed(0, 100, buffer_id, AVAIL | USED)
    wait_until(lambda: rig.board.counters()["violations"] == 1, what="a violation")
    assert rig.board.counters()["received"] == 0


def test_one_used_descriptor_for_a_batch(make_rig: Callable[..., Rig]) -> None:
    """A device in order that marks only the last of a batch of packets as used has all of them taken back (2.8.8)."""
    rig = make_rig(PACKED_EVERYTHING)
    rig.order(_board.RUN)
    rig.wait_for_full_ring()
    taken: list[int] = []
    while (chain := rig.tx.pop()) is not None:
        taken.append(chain.head)
    start = rig.layout.ring(1).desc
    rig.base.buf[start : start + 16] = pack_packed(0, 0, taken[-1], AVAIL | USED)
    wait_until(lambda: rig.board.counters()["sent"] == 2 * LAYOUT.tx_entries, what="another full ring")
    assert rig.board.counters()["violations"] == 0


@pytest.mark.parametrize("entries", [0, 1, 3, 2048])
def test_bad_ring_size_is_refused(entries: int) -> None:
    """A ring that the layout has no room for, or that is no power of two, is refused."""
    with pytest.raises(LocalError, match="ring size"):
        guest.Layout(tx_entries=entries)


def test_spec_survives_the_command_line(make_rig: Callable[..., Rig]) -> None:
    """A spec read back from JSON is the same spec."""
    rig = make_rig()
    assert guest.Spec.from_json(rig.spec.to_json()) == rig.spec
