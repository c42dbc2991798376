"""Ethernet frames for cases, and the headers that guests put before them; each from a few numbers."""

from __future__ import annotations

import struct
from typing import Final

from vhostmp.tools.stress.split import NetHeader

ETHERNET: Final = 14
IPV4: Final = 20
UDP: Final = 8
TCP: Final = 20
MACS: Final = bytes.fromhex("02000000000202000000000a")
PLAIN_TYPE: Final = 0x88B5  # for local experiments: no protocol of the kernel's looks inside
UDP_PROTOCOL, TCP_PROTOCOL = 17, 6
PATTERN: Final = bytes(range(256)) * 2
LEAST: Final = {"plain": ETHERNET, "udp": ETHERNET + IPV4 + UDP, "tcp": ETHERNET + IPV4 + TCP}


def _checksum(data: bytes, start: int = 0) -> int:
    """Return the sum that IP's checksum is the complement of. Source: RFC 1071."""
    words: tuple[int, ...] = struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1])
    total = start + sum(words)
    total += data[-1] << 8 if len(data) % 2 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def build(kind: str, size: int, number: int) -> bytes:
    """Return a frame of `size` bytes, or the least that `kind` has: "plain", "udp", "tcp".

    UDP and TCP are of IPv4, with the sum of the pseudo-header where the checksum is to be, as a guest leaves it.
    """
    size = max(size, LEAST[kind])
    body = PATTERN[number & 0xFF :][:256] * (size // 256 + 1)
    if kind == "plain":
        return (MACS + struct.pack("!H", PLAIN_TYPE) + body)[:size]
    protocol = UDP_PROTOCOL if kind == "udp" else TCP_PROTOCOL
    ip_size = size - ETHERNET
    addresses = bytes((10, 0, 0, 1, 10, 0, 0, 2))
    ip = struct.pack("!BBHHHBBH", 0x45, 0, ip_size & 0xFFFF, number & 0xFFFF, 0x4000, 64, protocol, 0) + addresses
    ip = ip[:10] + struct.pack("!H", ~_checksum(ip) & 0xFFFF) + ip[12:]
    length = ip_size - IPV4
    pseudo = _checksum(addresses + struct.pack("!HH", protocol, length & 0xFFFF))
    if kind == "udp":
        transport = struct.pack("!HHHH", 1000 + (number & 0xFF), 2000, length & 0xFFFF, pseudo)
    else:
        transport = struct.pack("!HHIIBBHHH", 1000 + (number & 0xFF), 2000, number, 1, 0x50, 0x10, 1024, pseudo, 0)
    return (MACS + struct.pack("!H", 0x0800) + ip + transport + body)[:size]


def offload(kind: str, segment: int = 0) -> NetHeader:
    """Return the header that leaves the checksum of a UDP or TCP frame to the device; `segment`: TCP's segments too."""
    start = ETHERNET + IPV4
    if not segment:
        return NetHeader(flags=NetHeader.NEEDS_CSUM, csum_start=start, csum_offset=6 if kind == "udp" else 16)
    return NetHeader(
        flags=NetHeader.NEEDS_CSUM,
        gso_type=NetHeader.GSO_TCPV4 if kind == "tcp" else NetHeader.GSO_UDP,
        hdr_len=start + (TCP if kind == "tcp" else UDP),
        gso_size=segment,
        csum_start=start,
        csum_offset=16 if kind == "tcp" else 6,
    )
