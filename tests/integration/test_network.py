"""What goes through taps and packet sockets: in place, whole, and each flow on its own queue."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, contextmanager

import pytest

from tests.helpers import PATIENCE, wait_until
from tests.net_driver import F_EVENT_IDX, F_MRG_RXBUF, F_VERSION_1, Guest
from tests.taps import TC, inject, interface_up, narrow, needs_tap, ones_sum, quiet_tap, tap_name, veth
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import F_RING_PACKED

pytestmark = needs_tap

F_MQ = 1 << 22
FEATURES = F_VERSION_1 | F_MRG_RXBUF | F_EVENT_IDX
#: What drivers negotiate: legacy ones have a header of 10 bytes, and no number of buffers in it.
DRIVERS = {
    "split": FEATURES,
    "packed": FEATURES | F_RING_PACKED,
    "packed_unmerged": F_VERSION_1 | F_RING_PACKED,
    "legacy": F_EVENT_IDX,
    "legacy_merged": F_MRG_RXBUF,
}
GUEST_MAC, HOST_MAC = bytes.fromhex("525400000001"), bytes.fromhex("525400000002")
PAIRS = 4
FLOWS = 15  # not a multiple of the pairs: one queue after the other is seen to be no flow on its queue
PACKETS = 8
UDP = 17
ETH_P_ALL = 3
TUNSETSNDBUF = 0x400454D4
#: What may wait behind a tap, and so many work items there are at the least when much more is sent.
SNDBUF_BYTES = 10_000
LEAST_ITEMS = 10


def udp_frame(flow: int, number: int, *, from_guest: bool, size: int = 64) -> bytes:
    """Return packet `number` of a flow, in one of its two directions; without checksums of the payload."""
    ends = [(bytes([10, 78, 0, 2]), 2000 + flow, GUEST_MAC), (bytes([10, 78, 0, 1]), 53, HOST_MAC)]
    source, target = ends if from_guest else reversed(ends)
    payload = struct.pack("<II", flow, number).ljust(size, b"\x5a")
    datagram = struct.pack(">HHHH", source[1], target[1], 8 + len(payload), 0) + payload
    header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(datagram), 0, 0, 64, UDP, 0, source[0], target[0])
    header = header[:10] + struct.pack(">H", ~ones_sum(header) & 0xFFFF) + header[12:]
    return target[2] + source[2] + b"\x08\x00" + header + datagram


def flow_of(frame: bytes) -> int | None:
    """Return which flow a frame is of; None when it is none of ours."""
    if len(frame) < 50 or frame[12:14] != b"\x08\x00" or frame[23] != UDP:  # noqa: PLR2004 - offsets in the frame
        return None
    return int(struct.unpack_from("<I", frame, 42)[0])


@contextmanager
def guest_on(
    open_backend: Callable[[ExitStack], str], pairs: int = 1, room: int = 2048, features: int = FEATURES
) -> Generator[Guest]:
    """Make a guest with `pairs` queue pairs on a back-end."""
    with ExitStack() as stack:
        spec = open_backend(stack)
        pool = stack.enter_context(Pool(workers=2))
        device = NetDevice(pool, queue_pairs=pairs, backend=spec)
        stack.callback(device.close)
        bits = features | (F_MQ if pairs > 1 else 0)
        yield stack.enter_context(Guest(device, pairs=pairs, room=room, features=bits))


def collect(guest: Guest, count: int) -> dict[int, dict[int, int]]:
    """Receive until `count` packets of our flows have come: how many of each flow, by queue pair."""
    found: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    total = 0

    def look() -> bool:
        nonlocal total
        for pair in guest.pairs:
            for frame in pair.receive():
                flow = flow_of(frame)
                if flow is not None:
                    found[flow][pair.index] += 1
                    total += 1
            pair.post()
            pair.kick()
        return total >= count

    wait_until(look, what=f"{count} packets")
    return found


def test_tap_keeps_a_flow_on_its_queue() -> None:
    """What the host answers to a flow arrives on the queue pair on which the guest sent it."""
    with quiet_tap(queues=PAIRS) as name, guest_on(lambda _: f"tap:{name}", pairs=PAIRS) as guest:
        interface_up(name)
        for pair in guest.pairs:
            pair.post()
            pair.kick()
        for flow in range(FLOWS):
            pair = guest.pairs[flow % PAIRS]
            assert pair.send(udp_frame(flow, 0, from_guest=True))
            pair.kick()
        wait_until(lambda: all(pair.reap() >= 0 and not pair.tx.in_flight for pair in guest.pairs))
        for number in range(PACKETS):
            for flow in range(FLOWS):
                inject(name, udp_frame(flow, number, from_guest=False))
        found = collect(guest, FLOWS * PACKETS)
    assert {flow: dict(queues) for flow, queues in found.items()} == {
        flow: {flow % PAIRS: PACKETS} for flow in range(FLOWS)
    }


def test_packet_keeps_a_flow_on_one_queue() -> None:
    """What comes in through a packet socket is spread over the queue pairs, each flow on one."""
    ends: list[str] = []

    def open_backend(stack: ExitStack) -> str:
        ends.extend(stack.enter_context(veth()))
        return f"packet:{ends[0]}"

    with guest_on(open_backend, pairs=PAIRS) as guest:
        for pair in guest.pairs:
            pair.post()
            pair.kick()
        for number in range(PACKETS):
            for flow in range(FLOWS):
                inject(ends[1], udp_frame(flow, number, from_guest=False))
        found = collect(guest, FLOWS * PACKETS)
    assert all(list(queues.values()) == [PACKETS] for queues in found.values()), found
    assert len(found) == FLOWS
    assert len({queue for queues in found.values() for queue in queues}) > 1


def copied(guest: Guest) -> list[int]:
    """Return the bytes that workers copied themselves, by ring."""
    return [queue["copied"] for queue in guest.device.snapshot()["queues"]]


@pytest.mark.parametrize("kind", ["tap", "packet"])
@pytest.mark.parametrize("size", [64, 1400])
@pytest.mark.parametrize("driver", DRIVERS)
def test_no_copy_in_user_space(kind: str, size: int, driver: str) -> None:
    """Frames go between guest memory and the kernel without a copy by the worker: not one byte, either way."""
    ends: list[str] = []

    def open_backend(stack: ExitStack) -> str:
        if kind == "tap":
            ends.extend(2 * [stack.enter_context(quiet_tap())])
            return f"tap:{ends[0]}"
        ends.extend(stack.enter_context(veth()))
        return f"packet:{ends[0]}"

    with (
        guest_on(open_backend, features=DRIVERS[driver]) as guest,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock,
    ):
        if kind == "tap":
            interface_up(ends[0])
        sock.bind((ends[1], 0x0800))
        (pair,) = guest.pairs
        pair.post()
        for number in range(PACKETS):
            assert pair.send(udp_frame(1, number, from_guest=True, size=size))
        pair.kick()
        got = [sock.recv(4096) for _ in range(PACKETS)]
        assert got == [udp_frame(1, number, from_guest=True, size=size) for number in range(PACKETS)]
        for number in range(PACKETS):
            inject(ends[1], udp_frame(2, number, from_guest=False, size=size))
        assert collect(guest, PACKETS)[2] == {0: PACKETS}
        assert copied(guest) == [0, 0]
        queues = guest.device.snapshot()["queues"]
        assert min(queue["bytes"] for queue in queues) >= PACKETS * size


@pytest.mark.skipif(TC is None, reason="needs the program tc")
def test_tap_that_is_full() -> None:
    """Frames that a tap does not take, since those before them still wait, are sent when it does: none is lost.

    Nobody but the tap says when that is, and the worker does not ask it in a loop.
    """
    front = HOST_MAC + GUEST_MAC + b"\x88\xb5"  # no IP: a bridge's firewall would make the tap lose sight of it
    name, frames = tap_name(), [front + struct.pack("<I", number).ljust(1000, b"\x5a") for number in range(200)]
    with (
        Pool(workers=1) as pool,
        closing(NetDevice(pool, backend=f"tap:{name}")) as device,
        Guest(device) as guest,
        narrow(name) as end,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sock,
    ):
        sock.bind((end, ETH_P_ALL))
        sock.settimeout(PATIENCE)
        fcntl.ioctl(device.state.backend.fds[0], TUNSETSNDBUF, struct.pack("i", SNDBUF_BYTES))
        before = pool.snapshot()["workers"][0]["items"]
        (pair,) = guest.pairs
        for frame in frames:
            assert pair.send(frame)
        pair.kick()
        got: list[bytes] = []
        while len(got) < len(frames):
            frame = sock.recv(2000)
            if frame.startswith(front):
                got.append(frame)
        assert got == frames
        wait_until(lambda: pair.reap() >= 0 and not pair.tx.in_flight, what="the frames to be given back")
        assert device.snapshot()["queues"][1]["drops"] == {}
        # Each time that there is room, for two frames or more, is a work item.
        assert LEAST_ITEMS < pool.snapshot()["workers"][0]["items"] - before < len(frames)


@pytest.mark.parametrize("driver", DRIVERS)
def test_loopback_for_every_driver(driver: str) -> None:
    """Whatever ring and header a driver negotiates, a frame that loopback returns is the one that was sent."""
    with guest_on(lambda _: "loopback", features=DRIVERS[driver]) as guest:
        (pair,) = guest.pairs
        pair.post()
        sent = [udp_frame(1, number, from_guest=True, size=64 + 100 * number) for number in range(PACKETS)]
        for frame in sent:
            assert pair.send(frame)
        pair.kick()
        got: list[bytes] = []

        def look() -> bool:
            got.extend(pair.receive())
            return len(got) >= PACKETS

        wait_until(look, what="the frames")
        assert got == sent


def test_a_copy_is_counted() -> None:
    """The counter of copies counts: loopback copies each frame once, the tap's way round a small ring copies too."""
    with guest_on(lambda _: "loopback") as guest:
        (pair,) = guest.pairs
        pair.post()
        frame = udp_frame(1, 0, from_guest=True)
        assert pair.send(frame)
        pair.kick()
        collect(guest, 1)
        assert copied(guest) == [len(frame), 0]
    with quiet_tap() as name, guest_on(lambda _: f"tap:{name}", room=256) as guest:
        interface_up(name)
        (pair,) = guest.pairs
        pair.rx_limit = 2
        pair.post()
        pair.kick()
        inject(name, udp_frame(1, 0, from_guest=False, size=1400))
        wait_until(lambda: guest.device.snapshot()["queues"][0]["copied"] > 0)
        pair.rx_limit = 64
        assert collect(guest, 1)[1] == {0: 1}
        assert copied(guest)[0] > 1400  # noqa: PLR2004 - once out of the buffers that were too few, once into more
