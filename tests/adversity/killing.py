"""What a death at a kill point is tried on: a guest on each kind of back-end, and books of what became of what it sent.

Rules:
- Every packet and request has a number; a rig knows which numbers were sent on their way, and how often each arrived.
- `turn` moves a little, and never waits: the worker may be stopped at a kill point meanwhile.
- Receive buffers are few at first, so that rings run dry and frames have to wait; `plenty` ends that.
"""

from __future__ import annotations

import os
import socket
import struct
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final

import attrs
import pytest

from tests.adversity.spies import NUMBER, SOURCE, SPY
from tests.asleep import is_asleep
from tests.frames import ETHERNET, make_frame, read_frame
from tests.helpers import deadline, wait_until
from tests.net_driver import FEATURES, Guest
from tests.request_driver import FEATURES as REQUEST_FEATURES
from tests.request_driver import RequestGuest, blk_header
from tests.taps import interface_up, ip, tap_name, wait_for_link
from vhostmp.blk import BlkDevice
from vhostmp.device import Device
from vhostmp.net import NetDevice
from vhostmp.requests import PythonDevice
from vhostmp.shm import layout
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import F_RING_PACKED
from vhostmp.workers import _loop

NUM: Final = 32
ROOM: Final = 256
FEW: Final = 2
#: Bytes of frames, in turn: the larger ones take several receive buffers.
SIZES: Final = (60, 600)
IN_A_TURN: Final = 3
#: What may wait in a back-end's queue.
UNDER_WAY: Final = 64
SPIES: Final = Path(__file__).with_name("spies.py")
BATCH_SPIES: Final = Path(__file__).with_name("batch_spies.py")
#: Of a ring on which whole batches wait, and frames of a turn: more than two bursts.
BATCH_NUM: Final = 512
IN_A_BATCH: Final = 150
SECTOR: Final = 512
RX, TX = 0, 1
OTHER_RX: Final = 2
#: So many turns rings may run dry, and so many not, and so on.
DRY_TURNS: Final = 8
#: And of these so many in which something is sent: then the worker may come to an end.
SENDING_TURNS: Final = 6
#: How long a worker may take to come by a kill point, and to be replaced, seconds: it may run under a sanitizer.
PATIENCE: Final = 60.0

needs_kill_points: Final = pytest.mark.skipif(
    not _loop.HAS_KILL_POINTS, reason="a build without kill points (VHOSTMP_DEBUG=1 has them; make sanitize)"
)


class Rig(ABC):
    """A device with a guest, served by one worker."""

    #: What a death repeats at the most.
    most_repeats = 64

    def __init__(self, pool: Pool, device: Device) -> None:
        """Begin with empty books."""
        self.pool: Final = pool
        self.device: Final = device
        self.sent: int = 0
        self.arrived: Counter[int] = Counter()

    def slot(self, ring: int, name: str) -> int:
        """Read a word of a ring's slot."""
        return layout.RING.read(self.pool.buf, layout.ring_offset(self.device.first_ring + ring), name)

    def set_slot(self, ring: int, **words: int) -> None:
        """Write words of a ring's slot, in that order."""
        for name, value in words.items():
            layout.RING.write(self.pool.buf, layout.ring_offset(self.device.first_ring + ring), name, value)

    def count(self, name: str) -> int:
        """Return the sum of a counter over the rings."""
        return sum(self.slot(ring, name) for ring in range(self.device.num_queues))

    @property
    def dropped(self) -> int:
        """How many packets were dropped since a ring was disabled; who dies over one may drop it twice."""
        reason = layout.DROP_REASONS.index("disabled")
        offsets = [layout.ring_offset(self.device.first_ring + ring) for ring in range(self.device.num_queues)]
        return sum(layout.RING.read(self.pool.buf, offset, "drops", reason) for offset in offsets)

    @property
    def repeats(self) -> int:
        """How often something arrived that had arrived already."""
        return self.arrived.total() - len(self.arrived)

    @property
    def missing(self) -> int:
        """How much was sent and has not arrived."""
        return self.sent - len(self.arrived)

    def drive(self, until: Callable[[], bool], what: str) -> None:
        """Move until something holds; rings run dry, and do not, in turn."""
        turns = 0
        with deadline(PATIENCE, what) as check:
            self.few()
            while not until():
                check()
                self.turn(sending=turns % DRY_TURNS < SENDING_TURNS)
                turns += 1
                if turns % DRY_TURNS == 0:
                    (self.plenty if turns // DRY_TURNS % 2 else self.few)()

    @property
    def is_counted(self) -> bool:
        """Whether what a death has cost is in the counters: the replacement has taken up the rings."""
        return not self.count("died")

    def settle(self) -> None:
        """Have everything arrive that was sent, and what was lost be counted, though nothing more is to arrive."""
        with deadline(PATIENCE, "what was sent") as check:
            self.plenty()
            while not (self.is_counted and self.settled()):
                check()
                self.turn(sending=False)

    @abstractmethod
    def few(self) -> None:
        """From now on rings may run dry."""

    @abstractmethod
    def plenty(self) -> None:
        """From now on they do not."""

    @abstractmethod
    def turn(self, *, sending: bool) -> None:
        """Take what came back, and send some more."""

    @abstractmethod
    def settled(self) -> bool:
        """Whether nothing more is to be expected of what was sent."""

    @abstractmethod
    def check_whole(self) -> None:
        """Check that every chain that the device has comes back, once."""

    @abstractmethod
    def close(self) -> None:
        """End guest and device."""


class NetRig(Rig):
    """A network device."""

    spec: str

    def __init__(self, pool: Pool, features: int) -> None:
        """Start it."""
        self.stack: Final = ExitStack()
        device = self.stack.enter_context(closing(self.make_device(pool)))
        super().__init__(pool, device)
        self.guest: Final = self.stack.enter_context(self.make_guest(device, FEATURES | features))
        self.pair: Final = self.guest.pairs[0]

    def make_device(self, pool: Pool) -> NetDevice:
        """Return the device."""
        return NetDevice(pool, backend=self.spec)

    def make_guest(self, device: NetDevice, features: int) -> Guest:
        """Return the guest, whose rings run."""
        return Guest(device, num=NUM, features=features, room=ROOM, rx_limit=FEW)

    def few(self) -> None:
        """Post few receive buffers."""
        self.pair.rx_limit = FEW

    def plenty(self) -> None:
        """Post as many as there is room for."""
        self.pair.rx_limit = NUM // 2

    def turn(self, *, sending: bool) -> None:
        """Move a little; both rings are kicked whether the device asks for that or not."""
        pair = self.pair
        pair.reap()
        self.got(pair.receive())
        pair.post()
        if sending:
            self.send()
        pair.kick()
        for driver, kick in zip((pair.rx, pair.tx), pair.kicks, strict=True):
            driver.want_interrupts()
            os.eventfd_write(kick, 1)

    def send(self) -> None:
        """Make frames available on the transmit ring."""
        for _ in range(IN_A_TURN):
            if not self.pair.send(make_frame(self.sent, SIZES[self.sent % 2])):
                return
            self.sent += 1

    def got(self, frames: list[bytes]) -> None:
        """Note what was received: nothing is expected."""
        assert not frames

    def settled(self) -> bool:
        """Whether all has arrived, and come back."""
        return not self.pair.tx.in_flight and self.missing <= self.dropped

    def fill(self) -> None:
        """Have something received."""

    def check_whole(self) -> None:
        """Check that transmit chains are back, and have the receive ring emptied."""
        self.pair.tx.check_idle()

    def close(self) -> None:
        """End guest and device."""
        self.stack.close()


class Loopback(NetRig):
    """What is sent comes back."""

    spec = "loopback"

    def got(self, frames: list[bytes]) -> None:
        """Note what came back."""
        self.arrived.update(read_frame(frame) for frame in frames)

    def _all_back(self) -> bool:
        """Take what came back; whether that is all."""
        self.pair.reap()
        self.got(self.pair.receive())
        return self.settled()

    def check_whole(self) -> None:
        """Have every receive buffer used."""
        self.pair.rx_limit = 0
        while self.pair.rx.in_flight:
            assert self.pair.send(make_frame(self.sent, 60))
            self.sent += 1
            self.pair.kick()
            wait_until(self._all_back, what="a buffer")
        super().check_whole()
        self.pair.rx.check_idle()


class Patch(NetRig):
    """What is sent another guest receives; rings 2 and 3 are that one's."""

    spec = "patch:other"

    def __init__(self, pool: Pool, features: int) -> None:
        """Start both."""
        super().__init__(pool, features)
        self.other: Final = self.stack.enter_context(closing(NetDevice(pool, name="other", backend="patch:0")))
        assert self.other.first_ring == self.device.first_ring + self.device.num_queues
        self.receiver: Final = self.stack.enter_context(self.make_guest(self.other, FEATURES | features)).pairs[0]

    def count(self, name: str) -> int:
        """Return the sum of a counter over the rings of both."""
        return sum(self.slot(ring, name) for ring in range(2 * self.device.num_queues))

    def few(self) -> None:
        """Post few receive buffers."""
        self.receiver.rx_limit = FEW

    def plenty(self) -> None:
        """Post as many as there is room for."""
        self.receiver.rx_limit = NUM // 2

    def turn(self, *, sending: bool) -> None:
        """Move a little at both ends."""
        super().turn(sending=sending)
        self.arrived.update(read_frame(frame) for frame in self.receiver.receive())
        self.receiver.post()
        self.receiver.kick()
        self.receiver.rx.want_interrupts()
        os.eventfd_write(self.receiver.kicks[RX], 1)

    def _all_there(self) -> bool:
        """Take what came; whether that is all."""
        self.pair.reap()
        self.arrived.update(read_frame(frame) for frame in self.receiver.receive())
        return self.settled()

    def check_whole(self) -> None:
        """Have every receive buffer of the other one used."""
        self.receiver.rx_limit = 0
        while self.receiver.rx.in_flight:
            assert self.pair.send(make_frame(self.sent, 60))
            self.sent += 1
            self.pair.kick()
            wait_until(self._all_there, what="a buffer")
        super().check_whole()
        self.receiver.rx.check_idle()


class TapRig(NetRig):
    """A tap; `wire` is its other end."""

    def __init__(self, pool: Pool, features: int) -> None:
        """Make the tap, and only then have it served: nothing is on it that the test has not sent."""
        self.name: Final = tap_name()
        self.spec = f"tap:{self.name}"
        ip("tuntap", "add", "dev", self.name, "mode", "tap")
        try:
            interface_up(self.name)
            super().__init__(pool, features)
            wait_for_link(self.name)
        except BaseException:
            ip("link", "del", self.name)
            raise
        self.wire: Final = self.stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
        self.wire.bind((self.name, 0))
        self.wire.setblocking(False)

    def close(self) -> None:
        """End guest, device and tap."""
        super().close()
        ip("link", "del", self.name)


class TapSends(TapRig):
    """Frames that the guest sends are seen on the wire."""

    def turn(self, *, sending: bool) -> None:
        """Look at the wire too."""
        super().turn(sending=sending)
        while True:
            try:
                frame, origin = self.wire.recvfrom(2048)
            except BlockingIOError:
                return
            if origin[2] != socket.PACKET_OUTGOING and frame.startswith(ETHERNET):
                self.arrived[read_frame(frame)] += 1


class Receives(NetRig):
    """What reaches the guest comes from the back-end, in order: what arrives after a packet says that it is lost."""

    #: Numbers below this one are settled; at first nothing is, though nothing has been sent.
    horizon = -1

    def got(self, frames: list[bytes]) -> None:
        """Note what came."""
        self.arrived.update(read_frame(frame) for frame in frames)

    def give(self) -> None:
        """Hand frame `sent` to the back-end."""
        raise NotImplementedError

    def send(self) -> None:
        """Hand some to the back-end, not more than its queue holds."""
        for _ in range(IN_A_TURN if self.sent - max(self.arrived, default=-1) < UNDER_WAY else 0):
            self.give()
            self.sent += 1

    def settled(self) -> bool:
        """Whether a frame that was handed to the back-end after all the others has arrived."""
        if self.sent - 1 in self.arrived and self.horizon == self.sent:
            return True
        if self.horizon < self.sent:
            self.give()
            self.sent += 1
            self.horizon = self.sent
        return False

    def check_whole(self) -> None:
        """Have every receive buffer used."""
        self.pair.rx_limit = 0
        while self.pair.rx.in_flight:
            self.give()
            self.sent += 1
            self.pair.kick()
            os.eventfd_write(self.pair.kicks[0], 1)
            before = len(self.pair.rx.in_flight)
            wait_until(lambda n=before: self.pair.receive() or len(self.pair.rx.in_flight) < n, what="a buffer")  # type: ignore[misc]
        self.pair.rx.check_idle()
        super().check_whole()


class TapReceives(Receives, TapRig):
    """Frames from the wire reach the guest."""

    def give(self) -> None:
        """Put a frame on the wire."""
        self.wire.send(make_frame(self.sent, SIZES[self.sent % 2]))


class SpySends(NetRig):
    """A back-end in Python that is sent to."""

    spec = f"python:{SPIES}:Spy"

    def turn(self, *, sending: bool) -> None:
        """Look at what the back-end has done."""
        super().turn(sending=sending)
        self.arrived = acts()


class BatchSends(SpySends):
    """A back-end in Python that is sent several bursts at once: it always has room for answers, and gives none."""

    spec = f"python:{BATCH_SPIES}:BatchSpy"
    most_repeats = 256

    def make_guest(self, device: NetDevice, features: int) -> Guest:
        """Return a guest with large rings."""
        return Guest(device, num=BATCH_NUM, features=features, room=ROOM)

    def few(self) -> None:
        """Go on: a batch is as large as the room for answers."""

    def plenty(self) -> None:
        """Go on."""

    def send(self, count: int = IN_A_BATCH) -> None:
        """Make many frames available."""
        for _ in range(count):
            if not self.pair.send(make_frame(self.sent, SIZES[0])):
                return
            self.sent += 1

    @property
    def asleep(self) -> bool:
        """Whether the worker has read every kick, and sleeps."""
        return is_asleep(self.pool, self.pair.kicks)


class SpyReceives(Receives):
    """A back-end in Python that is received from."""

    spec = f"python:{SPIES}:Spy"

    def give(self) -> None:
        """Let the back-end take one more; it has the numbers."""
        path = Path(os.environ[SPY]) / "source"
        with path.open("r+b") as file:
            file.seek(NUMBER.size)
            file.write(NUMBER.pack(self.sent + 1))


class Requests(Rig):
    """A device that serves requests; each of them is known by a number."""

    guest: RequestGuest

    def __init__(self, pool: Pool, features: int) -> None:
        """Start it."""
        self.stack: Final = ExitStack()
        device = self.stack.enter_context(closing(self.make(pool)))
        super().__init__(pool, device)
        acked = (REQUEST_FEATURES | features) & device.get_features()
        self.guest = self.stack.enter_context(RequestGuest(device, features=acked, num=NUM))
        self.heads: Final[dict[int, int]] = {}

    def make(self, pool: Pool) -> Device:
        """Return the device."""
        return PythonDevice(pool, backend=f"python:{SPIES}:Server")

    def few(self) -> None:
        """Do nothing: nothing is received."""

    def plenty(self) -> None:
        """Do nothing."""

    def ask(self, number: int) -> int:
        """Send a request; its head."""
        return self.guest.send(NUMBER.pack(number), [NUMBER.size])

    def check_answer(self, number: int, data: bytes) -> None:
        """Check what came back."""
        assert data == NUMBER.pack(number)

    def turn(self, *, sending: bool) -> None:
        """Send some, and look."""
        for _ in range(IN_A_TURN if sending and len(self.heads) < NUM // 4 else 0):
            self.heads[self.ask(self.sent)] = self.sent
            self.sent += 1
        self.guest.rings[0].want_interrupts()
        os.eventfd_write(self.guest.kicks[0], 1)
        self.guest.look()
        for head, answer in list(self.guest.answers[0].items()):
            del self.guest.answers[0][head]
            self.check_answer(self.heads.pop(head), answer.data)
        self.arrived = acts()

    def settled(self) -> bool:
        """Whether all were answered."""
        return not self.heads and not self.missing

    def check_whole(self) -> None:
        """Check that every request came back."""
        self.guest.rings[0].check_idle()

    def close(self) -> None:
        """End guest and device."""
        self.stack.close()


class Disk(Requests):
    """A disk: request n writes sector n, and is read back at the end."""

    def make(self, pool: Pool) -> Device:
        """Return a disk on a new image."""
        self.image = Path(os.environ[SPY]) / "image"
        self.image.write_bytes(bytes(4096 * SECTOR))
        return BlkDevice(pool, backend=f"file:{self.image}")

    def ask(self, number: int) -> int:
        """Write a sector."""
        return self.guest.send([blk_header(1, number), NUMBER.pack(number) * (SECTOR // NUMBER.size)], [1])

    def check_answer(self, number: int, data: bytes) -> None:
        """Check the status."""
        del number
        assert data == b"\0"

    def turn(self, *, sending: bool) -> None:
        """Move; what is written twice is written once."""
        super().turn(sending=sending)
        self.arrived = Counter(range(self.sent))

    def check_whole(self) -> None:
        """Check what is on the disk, too."""
        super().check_whole()
        data = self.image.read_bytes()
        assert all(data[n * SECTOR :].startswith(NUMBER.pack(n)) for n in range(self.sent))


def acts() -> Counter[int]:
    """Count what spies have done, by number."""
    data = (Path(os.environ[SPY]) / "acts").read_bytes()
    return Counter(number for (number,) in struct.iter_unpack("<Q", data))


def spied(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the spies' files, before a pool is made."""
    (directory / "acts").touch()
    (directory / "source").write_bytes(SOURCE.pack(0, 0))
    monkeypatch.setenv(SPY, str(directory))


PACKED: Final = F_RING_PACKED

#: What each ring that is served comes by.
EVERY: Final = (
    *("kick_read", "fetched", "returning", "returned", "noted", "half_shown", "shown", "avail_noted"),
    *("used_noted", "unmarked", "published", "calling", "called", "asked"),
)


@attrs.frozen
class Where:
    """A ring of a rig, and the points that it comes by."""

    rig: Callable[[Pool, int], Rig]
    ring: int
    points: tuple[str, ...]
    #: How many more than there are may be counted before anything is done: all of a batch, or the last one. What was
    #: marked may not have got anywhere.
    doubt: int = 0
    #: The point at which that is so.
    doubtful: str = "begun"


WHERE: Final = {
    "loopback-tx": Where(Loopback, TX, (*EVERY, "begun", "copied", "delivered")),
    "loopback-rx": Where(Loopback, RX, (*EVERY, "hushed")),
    "patch-tx": Where(Patch, TX, (*EVERY, "begun", "copied", "delivered")),
    # The transmit ring may be taken up before the receive ring, which alone can tell that nothing was shown.
    "patch-rx": Where(Patch, OTHER_RX, (*EVERY, "hushed"), doubt=64, doubtful="noted"),
    "tap-tx": Where(TapSends, TX, (*EVERY, "begun", "sent"), doubt=1),
    "tap-rx": Where(TapReceives, RX, (*EVERY, "hushed", "begun", "received", "held"), doubt=1),
    "python-tx": Where(SpySends, TX, (*EVERY, "begun", "transmitted"), doubt=64),
    "python-batch-tx": Where(BatchSends, TX, (*EVERY, "begun", "transmitted"), doubt=256),
    "python-rx": Where(SpyReceives, RX, (*EVERY, "hushed", "answered")),
    "requests": Where(Requests, 0, (*EVERY, "hushed", "begun", "processed"), doubt=64),
    "disk": Where(Disk, 0, (*EVERY, "hushed", "begun", "processed"), doubt=64),
}
