"""Two guests joined by a patch: what the one sends the other receives, whatever either's device goes through meanwhile.

A real pool, two real devices, two guests in Python. Frames carry sequence numbers and checksums; memory that an end has
given up is poisoned, so a worker that still used it would be seen.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle
from threading import Thread
from typing import Final

import attrs
import pytest

from tests.dirty import LOG_ALL, DirtyLog
from tests.frames import ETHERNET, POISON, make_frame, read_frame
from tests.helpers import TORTURE_SECONDS, comes_to_rest, wait_until
from tests.integration.cable import Cable
from tests.iommu_guest import StrictGuest
from tests.net_driver import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, FEATURES, Buffers, Guest, Pair, Shape
from vhostmp.device import Device
from vhostmp.errors import LocalError
from vhostmp.kept_device import KeptDevice
from vhostmp.net import NetDevice
from vhostmp.rng import RngDevice
from vhostmp.shm import layout
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import F_RING_PACKED
from vhostmp.tools.stress.split import NetHeader

PACKED: Final = FEATURES | F_RING_PACKED
LEGACY: Final = F_EVENT_IDX | F_INDIRECT_DESC  # neither VERSION_1 nor MRG_RXBUF: a header of 10 bytes
PLAIN: Final = F_VERSION_1
#: Bytes of a receive buffer that a frame does not fit in, and of one that it does.
SMALL, LARGE = 200, 2048
FEW: Final = 5
TURNS: Final = int(40 * TORTURE_SECONDS)


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker."""
    with Pool(workers=1) as one:
        yield one


@attrs.define
class Patched:
    """Two devices that are patched to each other, and their guests."""

    pool: Pool
    devices: tuple[NetDevice, NetDevice]
    guests: tuple[Guest, Guest]

    @property
    def state(self) -> list[str]:
        """What `vhostmp show` says of the patch, from both ends."""
        return [device.snapshot()["patch"] for device in self.devices]

    def cable(self, pair: int = 0, **options: object) -> Cable:
        """Return traffic between a pair of the one and that of the other."""
        return Cable([guest.pairs[pair] for guest in self.guests], **options)  # type: ignore[arg-type]


class EnabledFirst(Guest):
    """A guest whose rings are enabled before they run: nothing that waits for them is dropped in between."""

    def start(self, index: int, base: int) -> None:
        """Enable and start a ring."""
        self.device.set_vring_enable(index, True)
        super().start(index, base)


def patched(
    stack: ExitStack,
    pool: Pool,
    features: tuple[int, int] = (FEATURES, FEATURES),
    pairs: int = 1,
    **options: int,
) -> Patched:
    """Return two devices, `a` and `b`, and guests with those features."""
    one = NetDevice(pool, name="a", backend="patch:b", queue_pairs=pairs)
    other = NetDevice(pool, name="b", backend="patch:a", queue_pairs=pairs)
    guests = [
        stack.enter_context(Guest(device, features=bits, pairs=pairs, **options))
        for device, bits in zip((one, other), features, strict=True)
    ]
    return Patched(pool, (one, other), (guests[0], guests[1]))


def drops(device: NetDevice, index: int, reason: str) -> int:
    """Return how many packets a ring has dropped for a reason."""
    dropped: dict[str, int] = device.snapshot()["queues"][index]["drops"]
    return dropped.get(reason, 0)


KINDS: Final = {"split": FEATURES, "packed": PACKED, "legacy": LEGACY, "plain": PLAIN}


@pytest.mark.slow
@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("one", KINDS)
def test_whatever_they_negotiated(pool: Pool, one: str, other: str) -> None:
    """Formats, header lengths and receive modes of the two ends need not be the same: every frame arrives, in order."""
    with ExitStack() as stack:
        both = patched(stack, pool, (KINDS[one], KINDS[other]))
        with both.cable(window=200) as cable:
            cable.progress(500)
            cable.check_whole()
        assert both.state == ["joined to device b", "joined to device a"]
        for device in both.devices:  # so that a swap to a tap can announce it
            mac = layout.RING.read(pool.buf, layout.ring_offset(device.first_ring + 1), "source_mac")
            assert mac.to_bytes(6, "little") == ETHERNET[6:12]


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [Shape(split_header=True), Shape(pieces=3), Shape(split_header=True, pieces=4, indirect=True)],
    ids=["split_header", "pieces", "indirect"],
)
@pytest.mark.parametrize("receiver", ["split", "packed", "plain"])
def test_every_shape(pool: Pool, shape: Shape, receiver: str) -> None:
    """However a sender lays its frames out, and whether they take one receive buffer or many."""
    with ExitStack() as stack:
        room = LARGE if receiver == "plain" else SMALL  # without MRG_RXBUF a frame takes one buffer
        both = patched(stack, pool, (FEATURES, KINDS[receiver]), room=room)
        for guest in both.guests:
            guest.pairs[0].shape = shape if guest.features & F_INDIRECT_DESC else attrs.evolve(shape, indirect=False)
        with both.cable(window=16) as cable:
            cable.progress(300)
            cable.check_whole()
        assert all(guest.pairs[0].most_buffers > 1 for guest in both.guests) == (room == SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])
def test_starved_receivers(pool: Pool, features: int) -> None:
    """With few receive buffers at either end packets wait, none is lost, and none waits for ever."""
    with ExitStack() as stack:
        both = patched(stack, pool, (features, FEATURES), rx_limit=3)
        with both.cable() as cable:
            cable.progress(500)
            cable.check_whole()


@pytest.mark.slow
def test_ends_come_and_go(pool: Pool) -> None:
    """Each end is swapped away and back under load, in any order: what is sent meanwhile waits, and arrives once."""
    with ExitStack() as stack:
        both = patched(stack, pool)
        one, other = both.devices
        with both.cable(window=100) as cable:
            for turn in range(TURNS):
                first, second = (one, other) if turn % 2 else (other, one)
                first.set_backend(f"patch:{second.name}")  # anew
                cable.progress(30)
            cable.check_whole()
        assert pool.restarts == 0


@pytest.mark.slow
def test_packets_wait_for_the_other_end(pool: Pool) -> None:
    """While one end has another back-end, what the other sends waits in its ring; both get going when it comes."""
    with ExitStack() as stack:
        both = patched(stack, pool)
        one, other = both.devices
        sender, receiver = (guest.pairs[0] for guest in both.guests)
        for turn in range(4):
            other.set_backend("null")
            assert both.state == ["waits: device b has back-end null", None]
            for number in range(FEW):
                assert sender.send(make_frame(number, 60))
            sender.kick()
            receiver.post()
            receiver.kick()
            other.set_backend("patch:a")
            frames: list[int] = []

            def came(frames: list[int] = frames) -> bool:
                frames += [read_frame(frame) for frame in receiver.receive()]
                sender.reap()
                return len(frames) >= FEW

            wait_until(came, what=f"frames of turn {turn}")
            assert frames == list(range(FEW))
        assert one.snapshot()["queues"][1]["drops"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])
def test_memory_of_one_end_moves_under_load(pool: Pool, features: int) -> None:
    """Packet buffers of one end move to new memory under load: what left the table is poisoned, and never touched."""
    with ExitStack() as stack:
        both = patched(stack, pool, (FEATURES, features))
        with both.cable(window=200) as cable:
            for turn, guest in zip(range(TURNS // 2), cycle(both.guests), strict=False):
                cable.pause()
                guest.renew_buffers()
                cable.resume()

                def idle(old: Buffers = guest.old_buffers[0]) -> bool:
                    cable.check()
                    return old.idle

                wait_until(idle, what=f"the old buffers to come back, turn {turn}")
                assert guest.drop_idle_buffers(POISON) == 1
                cable.progress(50)
            cable.check_whole()
        assert [queue["broken"] for device in both.devices for queue in device.snapshot()["queues"]] == [None] * 4


@pytest.mark.slow
@pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])
def test_everything_of_one_end_moves(pool: Pool, features: int) -> None:
    """All memory of one end, rings too, is exchanged while the other end goes on sending into it: stop, move, start."""
    with ExitStack() as stack:
        both = patched(stack, pool, (FEATURES, features))
        with both.cable(window=200) as cable:
            for _, guest in zip(range(TURNS // 2), cycle(both.guests), strict=False):
                cable.pause()
                guest.move(POISON)
                cable.resume()
                cable.progress(50)
            cable.check_whole()
        assert pool.restarts == 0


@pytest.mark.slow
def test_a_barrier_of_one_end_is_one_for_the_others_items(pool: Pool) -> None:
    """When a verb on B returns, no item of A's writes to B's memory: it stays as it is though A goes on sending."""
    with ExitStack() as stack:
        both = patched(stack, pool)
        one, other = both.guests
        sender = one.pairs[0]
        other.pairs[0].post()
        other.pairs[0].kick()
        for turn in range(TURNS):
            while sender.send(make_frame(turn, 60)):
                pass
            sender.kick()  # and A's items go on while B's ring is stopped
            bases = other.stop()
            before = bytes(other.rings.buf), bytes(other.buffers.memory.buf)
            sender.reap()
            sender.kick()
            assert (bytes(other.rings.buf), bytes(other.buffers.memory.buf)) == before
            for index, base in enumerate(bases):
                other.start(index, base)

            def taken() -> bool:
                sender.reap()
                other.pairs[0].receive()
                other.pairs[0].post()
                other.pairs[0].kick()
                return not sender.tx.in_flight

            wait_until(taken, what="what waited")


@pytest.mark.slow
def test_one_end_closes_and_comes_anew(pool: Pool) -> None:
    """A device that is closed under load leaves the other one alone; a new one of its name takes its end over."""
    with ExitStack() as stack:
        both = patched(stack, pool)
        one, sender = both.devices[0], both.guests[0].pairs[0]
        for turn in range(TURNS // 4):
            with both.cable(window=100) as cable:
                cable.progress(50)
                cable.pause()
                cable.abandon()
                sent = cable.tallies[0].sent
            both.devices[1].close()
            assert both.state[0] == "waits: there is no device b"
            sender.reap()
            while sender.send(make_frame(sent, 60)):
                sent += 1
            sender.kick()
            device = NetDevice(pool, name="b", backend="patch:a")
            guest = stack.enter_context(EnabledFirst(device))
            both = Patched(pool, (one, device), (both.guests[0], guest))

            def arrived(last: int = sent - 1, receiver: Pair = guest.pairs[0]) -> bool:
                receiver.post()
                receiver.kick()
                sender.reap()
                return last in [read_frame(frame) for frame in receiver.receive()]

            wait_until(arrived, what=f"what waited for the new device, turn {turn}")
            # It is shown to the one guest before it is given back to the other.
            wait_until(lambda: sender.reap() >= 0 and not sender.tx.in_flight, what="the last to be given back")
            both.guests[0].pairs[0].receive()
        assert pool.restarts == 0


@pytest.mark.slow
def test_disabled_receiver_has_packets_dropped(pool: Pool) -> None:
    """A receive ring that is disabled wants no packets: the other end's are taken, dropped and counted there."""
    with ExitStack() as stack:
        both = patched(stack, pool)
        one, other = both.devices
        with both.cable() as cable:
            cable.progress(100)
            cable.lossy.add(0)
            other.set_vring_enable(0, False)
            cable.progress_sent(500)
            other.set_vring_enable(0, True)
            cable.progress(100)
            tallies = cable.finish()
            wait_until(lambda: tallies[0].missing == drops(one, 1, "disabled"), what=f"{tallies[0]}")
        assert tallies[0].missing > 0
        assert (tallies[1].missing, drops(other, 1, "disabled")) == (0, 0)


@pytest.mark.slow
def test_one_end_is_logged(pool: Pool) -> None:
    """With the dirty log of one end on, its pages are logged that the other guest's packets go into, and no others."""
    with ExitStack() as stack:
        both = patched(stack, pool)
        log = stack.enter_context(DirtyLog(64 << 30 >> 15))
        device = both.devices[1]
        device.set_log_base(log.fd, log.size, 0)
        device.set_features(both.guests[1].features | LOG_ALL)
        with both.cable(window=100) as cable:
            cable.progress(200)
            cable.check_whole()
        logged = [sum(queue["log_pages"] for queue in one.snapshot()["queues"]) for one in both.devices]
        assert logged[0] == 0
        assert logged[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("strict", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
def test_ends_behind_an_iommu(pool: Pool, strict: tuple[int, ...], features: int) -> None:
    """An end whose guest maps each buffer for its one use loses nothing, whatever the other end is behind."""
    with ExitStack() as stack:
        devices = [
            NetDevice(pool, name=name, backend=f"patch:{other}", iommu=number in strict)
            for number, (name, other) in enumerate((("a", "b"), ("b", "a")))
        ]
        guests = [
            stack.enter_context((StrictGuest if device.iotlb is not None else Guest)(device, features=features, num=64))
            for device in devices
        ]
        with Cable([guest.pairs[0] for guest in guests], window=16) as cable:
            cable.progress(200)
            cable.check_whole()
        misses = [(device.snapshot()["iotlb"] or {"misses": 0})["misses"] for device in devices]
        assert [count > 0 for count in misses] == [number in strict for number in range(2)]


@pytest.mark.slow
def test_busy_polling_and_idle(pool: Pool) -> None:
    """With rings that are polled for a while traffic passes too; when it ends the worker sleeps, and stays asleep."""
    with ExitStack() as stack:
        both = patched(stack, pool)
        for device in both.devices:
            for index in range(2):
                device.set_vring_busyloop_timeout(index, 100)
        with both.cable(window=50) as cable:
            cable.progress(300)
            cable.check_whole()

        def wakeups() -> int:
            return layout.WORKER.read(pool.buf, layout.worker_offset(0), "wakeups")

        assert comes_to_rest(wakeups)


@pytest.mark.slow
def test_pairs_on_several_workers() -> None:
    """Queue pairs are served where the other end's are, move together, and lose nothing on the way."""
    with Pool(workers=3) as pool, ExitStack() as stack:
        both = patched(stack, pool, pairs=2)
        one, other = both.devices
        assert one.placement == other.placement
        cables = [stack.enter_context(both.cable(pair, window=100)) for pair in range(2)]
        for turn in range(TURNS):
            device, pair = both.devices[turn % 2], turn // 2 % 2
            device.attach_vring_worker(2 * pair, (device.placement[pair] + 1) % 3)
            assert one.placement == other.placement
            cables[pair].progress(30)
        for cable in cables:
            cable.check_whole()
        assert pool.restarts == 0


@pytest.mark.slow
def test_second_end_goes_where_the_first_is_served() -> None:
    """An end that comes later, by a swap under load, is first moved to the workers of the other one."""
    with Pool(workers=2) as pool:
        one, other = NetDevice(pool, name="a"), NetDevice(pool, name="b")
        assert one.placement != other.placement
        with Guest(one) as first, Guest(other) as second:
            one.set_backend("patch:b")
            assert one.placement != other.placement
            other.set_backend("patch:a")
            assert one.placement == other.placement
            with Cable([first.pairs[0], second.pairs[0]], window=100) as cable:
                cable.progress(100)
                cable.check_whole()


def test_what_is_refused(pool: Pool) -> None:
    """A patch to itself, to nobody, to another class, to other numbers of queues, or to a third one's end: one line."""
    one = NetDevice(pool, name="a", backend="loopback")
    NetDevice(pool, name="b", queue_pairs=2)
    NetDevice(pool, name="c", backend="patch:d")
    NetDevice(pool, name="d", backend="patch:c")
    RngDevice(pool, name="r", backend="urandom")
    NetDevice(pool, name="twin")
    twin = NetDevice(pool, name="twin")
    for spec, text, number in (
        ("patch:a", "the device itself: use loopback", errno.EINVAL),
        ("patch:e", "no device 'e' among b c d r twin twin", errno.ENODEV),
        ("patch:r", "device r is none for a network: its class is rng", errno.EINVAL),
        ("patch:b", "queue pairs of device b: 2, of device a: 1: serve both with the same number", errno.EINVAL),
        ("patch:c", "device c is patched to d already: swap its back-end first", errno.EBUSY),
        ("patch:twin", "several devices of this pool are called 'twin'", errno.EINVAL),
        ("patch:", "'patch:' is not complete: write patch:DEVICE", errno.EINVAL),
    ):
        with pytest.raises(LocalError, match=text) as caught:
            one.set_backend(spec)
        assert caught.value.errno == number
        assert one.backend == "loopback"
    with pytest.raises(LocalError, match="several devices of this pool are called 'twin'"):
        twin.set_backend("patch:a")


@pytest.mark.parametrize("backend", ["patch:b", "null", "patch:c"])
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("waits", [False, True], ids=["joined", "waits"])
def test_names_of_ends_are_their_own(pool: Pool, waits: bool, name: str, backend: str) -> None:
    """No device comes by a name that a patch has at either end, whatever its back-end; once its owner is gone one may.

    `waits`: the patch has one end, and the other name is that of a device with another back-end.
    """
    ends = [NetDevice(pool, name="b", backend="null" if waits else "patch:a")]
    ends.insert(0, NetDevice(pool, name="a", backend="patch:b"))
    state = [device.snapshot()["patch"] for device in ends]
    itself = "that is the device itself" if backend == f"patch:{name}" else "a name of its own"
    with pytest.raises(LocalError, match=itself):
        NetDevice(pool, name=name, backend=backend)
    assert pool.devices == ends[::-1]
    assert [device.snapshot()["patch"] for device in ends] == state
    next(device for device in ends if device.name == name).close()
    NetDevice(pool, name=name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a", "another device of this pool is called 'a'"),
        ("b", "device a is patched to 'b', which is to be a network device and not one of class rng"),
    ],
)
def test_other_classes_leave_the_names_of_ends_alone(pool: Pool, name: str, text: str) -> None:
    """Nor does a device of another class come by such a name, whether its owner is there or waited for."""
    end = NetDevice(pool, name="a", backend="patch:b")
    with pytest.raises(LocalError, match=f"{text}.*: give .* a name of its own"):
        RngDevice(pool, name=name)
    assert pool.devices == [end]
    end.close()
    RngDevice(pool, name=name)


def test_names_may_be_shared_where_no_patch_has_them(pool: Pool) -> None:
    """Devices without a name of their own do not disturb each other, until one is to be patched."""
    for _ in range(2):
        NetDevice(pool)
    NetDevice(pool, name="a", backend="patch:b")
    with pytest.raises(LocalError, match="several devices of this pool are called '0': give each a name of its own"):
        NetDevice(pool, backend="patch:a")
    NetDevice(pool)


def test_first_end_stays_while_the_second_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody moves an end between the choice of the other one's workers and its place in the pool: they are joined."""
    with Pool(workers=2) as pool:
        one = NetDevice(pool, name="a", backend="patch:b")
        register = pool.register

        def move() -> None:
            if pool.lock.acquire(timeout=0.5):  # so long may the supervisor thread have it, too
                try:
                    one.attach_worker(0, 1)
                finally:
                    pool.lock.release()

        def be_interrupted(device: Device, kept: KeptDevice | None = None) -> tuple[int, int]:
            mover = Thread(target=move)
            mover.start()
            mover.join()
            return register(device, kept)

        monkeypatch.setattr(pool, "register", be_interrupted)
        other = NetDevice(pool, name="b", backend="patch:a")
        assert [device.snapshot()["patch"] for device in (one, other)] == ["joined to device b", "joined to device a"]
        one.attach_worker(0, 1)
        assert one.placement == other.placement == (1,)


def test_header_of_the_sender_is_judged_by_the_receiver(pool: Pool) -> None:
    """What the receiver has not negotiated is dropped at the sender, and of what passes nothing else is handed on."""
    csum, guest_csum = 1 << 0, 1 << 1
    with ExitStack() as stack:
        both = patched(stack, pool, (FEATURES | csum, FEATURES | guest_csum))
        one, other = both.devices
        sender, receiver = (guest.pairs[0] for guest in both.guests)
        for guest in both.guests:
            guest.pairs[0].post()
            guest.pairs[0].kick()
        # DATA_VALID is not a sender's to claim; TSO is not the receiver's.
        for header in (
            NetHeader(flags=2, hdr_len=9, csum_start=5),
            NetHeader(flags=1, csum_start=14, csum_offset=2, hdr_len=54),
            NetHeader(flags=1, gso_type=1, gso_size=100, csum_start=14, csum_offset=2),
        ):
            sender.header = header
            assert sender.send(make_frame(0, 60))
        sender.kick()
        packets: list[tuple[bytes, NetHeader]] = []
        passed = 2

        def came() -> bool:
            packets.extend(receiver.receive_with_headers())
            return len(packets) == passed and drops(one, 1, "offload") == 1

        wait_until(came, what=f"two packets and a drop; {packets}")
        assert packets[0][1] == NetHeader(num_buffers=1)
        assert packets[1][1] == NetHeader(flags=1, csum_start=14, csum_offset=2, num_buffers=1)
        assert other.snapshot()["queues"][0]["packets"] == passed
