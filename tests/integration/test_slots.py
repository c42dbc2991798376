"""Device slots and rings that change hands before a worker has looked: nobody is served by what was another's.

The worker is led through its work items one by one: back-ends that hold it up (gates.py) are kicked in an order, and
verbs are called while it stands in one of them, so that it meets what they published in a known order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest

from tests.asleep import is_asleep, kick_in_order
from tests.frames import make_frame
from tests.helpers import comes_to_rest, wait_until
from tests.net_driver import Guest, Pair
from vhostmp.net import NetDevice
from vhostmp.shm import layout
from vhostmp.shm._epoch import published
from vhostmp.supervisor import Pool

GATES = Path(__file__).with_name("gates.py")
T = TypeVar("T")


class Scene:
    """A pool with one worker, whose work items are led."""

    def __init__(self, stack: ExitStack, folder: Path, gates: int) -> None:
        """Make the pool and the guests whose back-ends are gates."""
        self.folder = folder
        self.stack = stack
        self.pool = stack.enter_context(Pool(workers=1, sandbox=False))
        names = [f"python:{GATES}:G{number}" for number in range(1, gates + 1)]
        self.gates = [self.guest(f"gate{number}", spec) for number, spec in enumerate(names, 1)]

    def guest(self, name: str, backend: str, pairs: int = 1) -> Guest:
        """Make a device and a guest on it."""
        device = NetDevice(self.pool, name=name, backend=backend, queue_pairs=pairs)
        return self.stack.enter_context(Guest(device, pairs=pairs))

    def kick(self, guests: Sequence[Guest], sends: Sequence[Guest]) -> None:
        """Have the worker run the transmit rings of `guests` in that order; those of `sends` have a frame."""
        kicks = [guest.pairs[0].kicks[1] for guest in guests]
        wait_until(lambda: is_asleep(self.pool, kicks), what="the worker's sleep")
        for guest in sends:
            assert guest.pairs[0].send(make_frame(0, 60))
            guest.pairs[0].tx.publish()
        kick_in_order(self.pool, kicks)

    def entered(self, number: int) -> None:
        """Wait until the worker stands in a gate."""
        wait_until((self.folder / f"entered{number}").exists, what=f"gate {number}")

    def during(self, number: int, verb: Callable[[], T], slot: int) -> T:
        """Call a verb while the worker stands in a gate; open it once the verb has published, and return its result."""
        self.entered(number)
        before, results = published(self.pool.buf, slot), list[T]()
        thread = threading.Thread(target=lambda: results.append(verb()))
        thread.start()
        wait_until(lambda: published(self.pool.buf, slot) > before or not thread.is_alive(), what="the publication")
        (self.folder / f"open{number}").touch()
        thread.join()
        return results[0]

    def rests(self) -> None:
        """Wait until the worker has nothing to do."""
        offset = layout.worker_offset(0)
        assert comes_to_rest(lambda: layout.WORKER.read(self.pool.buf, offset, "items"), 0.3)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Scene]]:
    """Make scenes."""
    monkeypatch.setenv("GATES", str(tmp_path))
    with ExitStack() as stack:
        yield lambda gates: Scene(stack, tmp_path, gates)


def echoes(pair: Pair) -> bool:
    """Whether a frame comes back through a loopback."""
    pair.post()
    assert pair.send(make_frame(0, 60))
    pair.kick()
    wait_until(pair.rx.pending, what="the echo")
    pair.reap()
    return len(pair.receive()) == 1


def test_rings_of_a_running_device_are_left_alone(make: Callable[[int], Scene]) -> None:
    """Who takes a slot whose rings another device has by now does not silence that one."""
    scene = make(0)
    first, second = scene.guest("x", "loopback"), scene.guest("b", "loopback")
    assert echoes(first.pairs[0])
    assert echoes(second.pairs[0])
    first.device.close()
    second.device.close()
    wide = scene.guest("c", "loopback", pairs=2)
    assert [echoes(pair) for pair in wide.pairs] == [True, True]
    later = scene.guest("e", "loopback")
    assert later.device.slot == second.device.slot
    assert echoes(later.pairs[0])
    assert [echoes(pair) for pair in wide.pairs] == [True, True]


def test_rings_that_changed_hands_are_no_end_of_a_patch(make: Callable[[int], Scene]) -> None:
    """Where a patch's other end is gone and its rings are another device's, that one gets nothing of the patch."""
    scene = make(0)
    before = scene.guest("x", "null")
    gates = [scene.guest(f"gate{n}", f"python:{GATES}:G{n}") for n in (1, 2)]
    a, b = NetDevice(scene.pool, name="a", backend="patch:b"), NetDevice(scene.pool, name="b", backend="patch:a")
    guest_a, guest_b = scene.stack.enter_context(Guest(a)), scene.stack.enter_context(Guest(b))
    sender, receiver = guest_a.pairs[0], guest_b.pairs[0]
    receiver.post()
    receiver.kick()
    assert sender.send(make_frame(0, 60))
    sender.kick()
    wait_until(receiver.rx.pending, what="a frame through the patch")
    before.device.close()
    scene.kick(gates, gates)
    scene.during(1, b.close, b.slot)
    scene.entered(2)
    c = NetDevice(scene.pool, name="c", backend="null", queue_pairs=2)
    assert b.first_ring in range(c.first_ring, c.first_ring + 4), "its rings are those of the one that is gone"
    stranger = scene.stack.enter_context(scene.during(2, lambda: Guest(c, pairs=2), c.slot))
    stranger.pairs[0].post()
    stranger.pairs[0].kick()
    scene.rests()
    sender.reap()
    assert sender.send(make_frame(7, 60))
    sender.kick()
    scene.rests()
    assert stranger.pairs[0].rx.pending() == 0
    assert scene.pool.restarts == 0


class Receiver(Guest):
    """A guest that starts its receive ring alone, without a kick."""

    def start(self, index: int, base: int) -> None:
        """Start the ring if it is the receive ring."""
        if index:
            return
        place, pair, device = self.layouts[index], self.pairs[0], self.device
        device.set_vring_num(index, place.num)
        device.set_vring_addr(index, **self.addresses(index))
        device.set_vring_base(index, base)
        device.set_vring_call(index, pair.calls[0])
        device.set_vring_kick(index, pair.kicks[0])
        device.set_vring_enable(index, True)
        pair.post()
        pair.rx.publish()
        device.start_vring(index)


def test_third_device(make: Callable[[int], Scene]) -> None:
    """An item of one end never goes on by a generation of the other one that was retired, whoever had that name."""
    scene = make(5)
    a, b = NetDevice(scene.pool, name="a", backend="patch:b"), NetDevice(scene.pool, name="b", backend="patch:a")
    x = NetDevice(scene.pool, name="x", backend="null")
    guest_a, _, guest_x = (scene.stack.enter_context(Guest(one)) for one in (a, b, x))
    scene.rests()
    first, second, third, fourth, fifth = scene.gates
    scene.kick((first, second, third, guest_x, fourth, fifth, guest_a), (*scene.gates, guest_a))
    scene.during(1, b.close, b.slot)
    scene.during(2, x.close, x.slot)
    NetDevice(scene.pool, name="e", backend="null")
    c = NetDevice(scene.pool, name="b", backend="patch:a")
    receiver = scene.stack.enter_context(scene.during(3, lambda: Receiver(c), c.slot))
    scene.during(4, lambda: a.set_vring_busyloop_timeout(0, 1), a.slot)
    base = scene.during(5, lambda: c.stop_vring(0), c.slot)
    scene.rests()
    assert base == 0
    assert receiver.pairs[0].rx.pending() == 0, "a frame came after the ring had been stopped"
    assert layout.RING.read(scene.pool.buf, layout.ring_offset(c.first_ring), "packets") == 0
