"""Each offload that taps and packet sockets carry, both ways: super-frames cross whole where both sides agreed on it.

The far end is another packet socket with PACKET_VNET_HDR, on the tap or at the other end of a veth: it sees what the
guest sent as the kernel took it, and what it sends leaves the kernel by the tap, cut up by the kernel where the guest
did not agree to take it whole. A packet socket cannot be told what the guest agreed to: it gets such a frame whole.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Final

import attrs
import pytest

from tests.helpers import PATIENCE, wait_until
from tests.net_driver import F_MRG_RXBUF, F_VERSION_1, Guest
from tests.taps import interface_up, needs_tap, ones_sum, quiet_tap, veth
from vhostmp import backends
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.split import NetHeader

pytestmark = needs_tap

SOL_PACKET, PACKET_VNET_HDR = 263, 15
UDP_L4, CWR = 5, 0x80
TCP, UDP = 6, 17
IPV4, IPV6 = 4, 6
ALL_ONES = 0xFFFF  # what the sum over a segment with its right checksum comes to
SEGMENT, SEGMENTS = 400, 4
PAYLOAD: Final = bytes(range(256)) * 256
SOCKET_HEADER: Final = 10
#: Of IPv4, from the start of the frame.
IP_END, UDP_HEADER = 34, 8
MAC: Final = bytes.fromhex("525400000001525400000002")


@attrs.frozen
class Kind:
    """One segmentation offload: its feature bits, and how its frames look."""

    name: str
    guest: tuple[int, ...]  # what the guest accepts
    host: tuple[int, ...]  # what the guest may send
    gso_type: int
    version: int
    protocol: int
    ecn: bool = False
    to_guest: bool = True

    def frame(self, segments: int = SEGMENTS) -> bytes:
        """Return a frame of so many segments, its checksum left to be filled in."""
        payload = PAYLOAD[: SEGMENT * segments]
        if self.protocol == TCP:
            flags = CWR | 0x10 if self.ecn else 0x10
            l4 = struct.pack(">HHIIBBHHH", 2000, 2001, 1, 1, 0x50, flags, 512, 0, 0)
        else:
            l4 = struct.pack(">HHHH", 2000, 2001, 8 + len(payload), 0)
        size = len(l4) + len(payload)
        if self.version == IPV4:
            ends = bytes([10, 78, 0, 2, 10, 78, 0, 1])
            ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + size, 1, 0, 64, self.protocol, 0) + ends
            ip = ip[:10] + struct.pack(">H", ~ones_sum(ip) & 0xFFFF) + ip[12:]
            ether = b"\x08\x00"
        else:
            ends = bytes.fromhex("fd000000000000000000000000000002fd000000000000000000000000000001")
            ip = struct.pack(">IHBB", 6 << 28, size, self.protocol, 64) + ends
            ether = b"\x86\xdd"
        pseudo = ones_sum(ends + struct.pack(">II", size, self.protocol))
        at = 16 if self.protocol == TCP else 6
        l4 = l4[:at] + struct.pack(">H", pseudo) + l4[at + 2 :]
        return MAC + ether + ip + l4 + payload

    def header(self) -> NetHeader:
        """Return the header that goes with it."""
        start = 14 + (20 if self.version == IPV4 else 40)
        l4 = 20 if self.protocol == TCP else 8
        return NetHeader(
            flags=NetHeader.NEEDS_CSUM,
            gso_type=self.gso_type | (NetHeader.GSO_ECN if self.ecn else 0),
            hdr_len=start + l4,
            gso_size=SEGMENT,
            csum_start=start,
            csum_offset=16 if self.protocol == TCP else 6,
        )


CSUM, GUEST_CSUM = backends.CSUM, backends.GUEST_CSUM
TSO4 = Kind("tso4", (backends.GUEST_TSO4,), (backends.HOST_TSO4,), NetHeader.GSO_TCPV4, IPV4, TCP)
KINDS: Final = (
    TSO4,
    Kind("tso6", (backends.GUEST_TSO6,), (backends.HOST_TSO6,), NetHeader.GSO_TCPV6, IPV6, TCP),
    Kind(
        "ecn",
        (backends.GUEST_TSO4, backends.GUEST_ECN),
        (backends.HOST_TSO4, backends.HOST_ECN),
        NetHeader.GSO_TCPV4,
        4,
        TCP,
        ecn=True,
    ),
    # Linux takes fragmented UDP from a tap and makes none any more: a guest that accepts it is never sent any.
    Kind("ufo", (backends.GUEST_UFO,), (backends.HOST_UFO,), NetHeader.GSO_UDP, IPV4, UDP, to_guest=False),
    Kind("uso4", (backends.GUEST_USO4, backends.GUEST_USO6), (backends.HOST_USO,), UDP_L4, IPV4, UDP),
    Kind("uso6", (backends.GUEST_USO4, backends.GUEST_USO6), (backends.HOST_USO,), UDP_L4, IPV6, UDP),
)


#: The Linux from which on taps and packet sockets carry all of it.
CARRIES_ALL: Final = (6, 6)
LINKS: Final = ("tap", "packet")


@contextmanager
def guest_with(*bits: int, link: str = "tap") -> Generator[tuple[Guest, socket.socket]]:
    """Make a guest on a tap or a packet socket that has acked these features, and the far end."""
    with ExitStack() as stack:
        if link == "packet":
            near, name = stack.enter_context(veth())
        else:
            near = name = stack.enter_context(quiet_tap())
        pool = stack.enter_context(Pool(workers=1))
        device = NetDevice(pool, backend=f"{link}:{near}")
        stack.callback(device.close)
        offloads = sum(1 << bit for bit in bits)
        if offloads & ~device.get_features():
            assert tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < CARRIES_ALL
            pytest.skip("this kernel does not carry it")
        guest = stack.enter_context(Guest(device, features=F_VERSION_1 | F_MRG_RXBUF | offloads))
        if link == "tap":
            interface_up(name)
        sock = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sock.bind((name, 3))
        sock.settimeout(PATIENCE)
        yield guest, sock


def drops(guest: Guest) -> dict[str, int]:
    """Return the transmit ring's drops by reason."""
    found: dict[str, int] = guest.device.snapshot()["queues"][1]["drops"]
    return found


def send(guest: Guest, header: NetHeader, frame: bytes) -> None:
    """Send one frame with this header and wait until the device has taken it."""
    (pair,) = guest.pairs
    pair.header = header
    assert pair.send(frame)
    pair.kick()
    wait_until(pair.reap, what="the frame to be taken")


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_from_the_guest(kind: Kind, link: str) -> None:
    """A super-frame that the guest sends reaches the kernel whole, as what it is."""
    with guest_with(CSUM, *kind.host, link=link) as (guest, sock):
        send(guest, kind.header(), kind.frame())
        assert drops(guest) == {}
        if kind.gso_type == NetHeader.GSO_UDP:
            sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 0)  # a packet socket has no word for it
            whole, parts = kind.frame(), b""
            while len(parts) < len(whole) - IP_END:  # a tap takes it whole, a veth has the kernel cut it into fragments
                parts += sock.recv(65536)[IP_END:]
            assert parts[UDP_HEADER:] == whole[IP_END + UDP_HEADER :]
            return
        data = sock.recv(65536)
        assert data[SOCKET_HEADER:] == kind.frame()
        got = NetHeader.unpack(data[:SOCKET_HEADER] + bytes(2))
        assert (got.gso_type, got.gso_size) == (kind.header().gso_type, SEGMENT)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_not_negotiated_from_the_guest(kind: Kind) -> None:
    """A guest that asks for an offload that it did not ack has that frame dropped and counted, nothing else."""
    with guest_with(CSUM) as (guest, sock):
        send(guest, kind.header(), kind.frame())
        assert drops(guest) == {"offload": 1}
        plain = kind.frame()[:200]
        send(guest, NetHeader(), plain)
        assert sock.recv(65536)[SOCKET_HEADER:] == plain


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.to_guest], ids=lambda kind: kind.name)
def test_not_negotiated_to_the_guest(kind: Kind) -> None:
    """A super-frame that a packet socket has for a guest that did not agree is dropped and counted, nothing else."""
    with guest_with(GUEST_CSUM, link="packet") as (guest, sock):
        (pair,) = guest.pairs
        pair.post()
        pair.kick()
        sock.send(kind.header().pack()[:SOCKET_HEADER] + kind.frame())
        sock.send(bytes(SOCKET_HEADER) + kind.frame()[:200])
        wait_until(lambda: pair.rx.pending() > 0, what="the plain frame")
        assert pair.receive() == [kind.frame()[:200]]
        assert guest.device.snapshot()["queues"][0]["drops"] == {"offload": 1}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.to_guest], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("link", "agreed"), [("tap", True), ("tap", False), ("packet", True)])
def test_to_the_guest(kind: Kind, link: str, agreed: bool) -> None:
    """A super-frame for the guest arrives whole where it agreed, with its header; else in segments without one."""
    with guest_with(GUEST_CSUM, *(kind.guest if agreed else ()), link=link) as (guest, sock):
        (pair,) = guest.pairs
        pair.post()
        pair.kick()
        sock.send(kind.header().pack()[:SOCKET_HEADER] + kind.frame())
        frames: list[bytes] = []
        headers: list[NetHeader] = []
        length = len(kind.frame()) - SEGMENT * SEGMENTS
        payload = 0

        def look() -> bool:
            nonlocal payload
            for frame, header in pair.receive_with_headers():
                if frame[:14] == kind.frame()[:14]:
                    frames.append(frame)
                    headers.append(header)
                    payload += len(frame) - length
            return payload >= SEGMENT * SEGMENTS

        wait_until(look, what="the payload")
        assert b"".join(frame[length:] for frame in frames) == PAYLOAD[: SEGMENT * SEGMENTS]
        if agreed:
            assert len(frames) == 1
            assert (headers[0].gso_type, headers[0].gso_size) == (kind.header().gso_type, SEGMENT)
            assert headers[0].flags & NetHeader.NEEDS_CSUM
        else:
            assert len(frames) == SEGMENTS
            assert {header.gso_type for header in headers} == {0}


@pytest.mark.parametrize("agreed", [True, False])
def test_checksum_to_the_guest(agreed: bool) -> None:
    """A frame whose checksum is still to be filled in says so to a guest that agreed; another one gets it complete."""
    with guest_with(*([GUEST_CSUM] if agreed else [])) as (guest, sock):
        (pair,) = guest.pairs
        pair.post()
        pair.kick()
        header = attrs.evolve(TSO4.header(), gso_type=0, gso_size=0, hdr_len=0)
        sock.send(header.pack()[:SOCKET_HEADER] + TSO4.frame(1))
        found: list[tuple[bytes, NetHeader]] = []

        def look() -> bool:
            found.extend(one for one in pair.receive_with_headers() if one[0][:14] == TSO4.frame()[:14])
            return bool(found)

        wait_until(look, what="the frame")
        frame, got = found[0]
        complete = bytes(8) + struct.pack(">II", len(frame) - 34, TCP)
        assert bool(got.flags & NetHeader.NEEDS_CSUM) == agreed
        whole = ones_sum(frame[26:34] + complete[8:] + frame[34:])
        assert (whole == ALL_ONES) == (not agreed)


LARGE: Final = 160  # segments of 400 bytes: with its headers just under the 65,535 bytes that IP carries


def test_largest_to_the_guest() -> None:
    """A frame of 64 KiB arrives in as many receive buffers as it takes, and says how many."""
    with guest_with(GUEST_CSUM, backends.GUEST_TSO4) as (guest, sock):
        (pair,) = guest.pairs
        pair.post()
        pair.kick()
        frame = TSO4.frame(LARGE)
        sock.send(TSO4.header().pack()[:SOCKET_HEADER] + frame)
        found: list[tuple[bytes, NetHeader]] = []

        def look() -> bool:
            found.extend(one for one in pair.receive_with_headers() if len(one[0]) == len(frame))
            return bool(found)

        wait_until(look, what="the frame")
        assert found[0][0] == frame
        assert found[0][1].num_buffers == -(-(NetHeader.SIZE + len(frame)) // guest.room)
        assert found[0][1].gso_size == SEGMENT


def test_largest_from_the_guest() -> None:
    """A frame of 64 KiB in many descriptors leaves as one."""
    with guest_with(CSUM, backends.HOST_TSO4) as (guest, sock):
        (pair,) = guest.pairs
        frame = TSO4.frame(LARGE)
        data = TSO4.header().pack() + frame
        segments: list[tuple[int, int]] = []
        for at in range(0, len(data), guest.room):
            piece = data[at : at + guest.room]
            segments.append((guest.buffers.take(), len(piece)))
            guest.buffers.write(segments[-1][0], piece)
        pair.tx.add(segments)
        pair.kick()
        assert sock.recv(1 << 17)[SOCKET_HEADER:] == frame
        assert drops(guest) == {}
