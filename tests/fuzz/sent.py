"""What the hostile front-end of the fuzz target "session" sends: payloads of each class, descriptors of every kind."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from tests.fuzz.feed import Feed
from vhostmp.protocol import payloads

MEMORY_BYTES: Final = 1 << 20
UVA: Final = 0x7F00_0000_0000
WIDE: Final = (
    *(0, 1, 2, 3, 4, 8, 64, 255, 256, 257, 0x1FF, 1000, 4095, 4096, 32768, 32769, 65535, 65536, 65537),
    *(0x10000, 0x20000, 0x80000, MEMORY_BYTES - 4096, MEMORY_BYTES, 1 << 21, 1 << 30, 1 << 31, (1 << 32) - 1, 1 << 32),
    *(UVA, UVA + 0x1000, UVA + 0x4000, UVA + 0x8000, UVA + MEMORY_BYTES, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1),
)
KINDS: Final = ("memory", "small", "readonly", "event", "pipe", "drain", "stream", "listener", "null", "folder")
Maker: TypeAlias = Callable[[Feed], bytes]

#: A byte from here on asks for what is rarely wanted: any number, whatever it means.
RARE: Final = 0xF0


class Descriptors:
    """What a front-end sends: each kind is made when it is first asked for."""

    def __init__(self) -> None:
        """Begin with none."""
        self.ours: dict[str, int] = {}
        self.theirs: dict[str, int] = {}
        """What the front-end keeps of a pair, by the kind of what it gave away."""

    def get(self, kind: str) -> int:
        """Return a descriptor of a kind."""
        if kind not in self.ours:
            self.ours[kind] = self._make(kind)
        return self.ours[kind]

    def _make(self, kind: str) -> int:
        if kind in ("pipe", "drain", "stream"):
            return self._make_pair(kind)
        match kind:
            case "memory" | "small":
                fd = os.memfd_create(kind, os.MFD_CLOEXEC)
                os.ftruncate(fd, MEMORY_BYTES if kind == "memory" else 4096)
                return fd
            case "readonly":
                return os.open(f"/proc/self/fd/{self.get('memory')}", os.O_RDONLY | os.O_CLOEXEC)
            case "event":
                return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            case "listener":
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                    sock.bind("")
                    sock.listen()
                    return sock.detach()
            case _:
                return os.open("/dev/null" if kind == "null" else "/", os.O_RDONLY | os.O_CLOEXEC)

    def _make_pair(self, kind: str) -> int:
        """Make two ends; the front-end keeps one. Of "pipe" and "drain" the names say what the device does."""
        if kind == "stream":
            given, kept = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self.theirs[kind] = kept.detach()
            return given.detach()
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.theirs[kind] = write if kind == "pipe" else read
        return read if kind == "pipe" else write

    def hang_up(self, kind: str) -> None:
        """The front-end closes what it kept, and what it gave: the next of the kind is another one."""
        for held in (self.ours, self.theirs):
            if kind in held:
                os.close(held.pop(kind))

    def close(self) -> None:
        """Close everything."""
        for fd in [*self.ours.values(), *self.theirs.values()]:
            os.close(fd)


def _wide(source: Feed) -> int:
    kind = source.u8()
    return WIDE[kind % len(WIDE)] if kind < RARE else source.number(8)


def _narrow(source: Feed) -> int:
    return _wide(source) & 0xFFFFFFFF


def _index(source: Feed) -> int:
    kind = source.u8()
    return kind & 1 if kind < RARE else _wide(source) & 0xFFFFFFFF


def _state(source: Feed) -> bytes:
    return payloads.VringState.STRUCT.pack(_index(source), _narrow(source))


def _small_state(source: Feed) -> bytes:
    return payloads.VringState.STRUCT.pack(_index(source), source.u8() % 3)


def _addr(source: Feed) -> bytes:
    places = [_wide(source) for _ in range(4)]
    flags = source.pick((0, 0, 1, 2))
    return payloads.VringAddr.STRUCT.pack(_index(source), flags, *places)


def _region(source: Feed) -> bytes:
    kind = source.u8()
    if kind < 0xA0:  # noqa: PLR2004 - most often one of a few that fit
        slot = kind & 3
        size = 0x10000 << (kind >> 2 & 1)
        return payloads.Region.STRUCT.pack(slot << 17, size, UVA + (slot << 17), 0 if kind & 8 else 0x10000)
    return payloads.Region.STRUCT.pack(*(_wide(source) for _ in range(4)))


def _table(source: Feed) -> bytes:
    count = source.u8()
    if count < 0x80:  # noqa: PLR2004 - half of the time all of the memory
        whole = payloads.Region.STRUCT.pack(0, MEMORY_BYTES, UVA, 0)
        return payloads.MemTable.STRUCT.pack(1, 0) + whole
    regions = [_region(source) for _ in range(count % 10)]
    return payloads.MemTable.STRUCT.pack(count % 10, 0) + b"".join(regions)


def _acknowledgement(source: Feed) -> bytes:
    return payloads.U64(_wide(source) if source.u8() >= RARE else 0).pack()


def _config(source: Feed) -> bytes:
    data = source.bytes(source.u8() % 64)
    return payloads.Config.STRUCT.pack(source.u8(), len(data), source.u8() % 3) + data


def _inflight(source: Feed) -> bytes:
    numbers = (_wide(source), _wide(source), source.u8() % 4, _narrow(source) & 0xFFFF)
    return payloads.Inflight.STRUCT.pack(*numbers) + bytes(4 * (source.u8() & 1))


def _iotlb(source: Feed) -> bytes:
    return payloads.Iotlb.STRUCT.pack(_wide(source), _wide(source), _wide(source), source.u8() % 4, source.u8() % 8)


def _bits(source: Feed) -> bytes:
    kind = source.u8()
    if kind < 0x40:  # noqa: PLR2004 - all that is offered, as far as a mask of bytes lets it be
        return payloads.U64(0).pack()
    mask = source.number(8) if kind >= RARE else (1 << 32 | 1 << 30 | source.number(4))
    return payloads.U64(mask & (1 << 64) - 1).pack()


MAKERS: Final[Mapping[str, Maker]] = {
    "Empty": lambda source: b"",
    "U64": _bits,
    "Mtu": lambda source: payloads.U64(_wide(source)).pack(),
    "MacAddress": lambda source: source.bytes(8),
    "Status": lambda source: payloads.U64(_narrow(source) if source.u8() > 0xE0 else source.u8()).pack(),  # noqa: PLR2004
    "VringState": _state,
    "VringNum": _state,
    "VringBase": _state,
    "VringEnable": _small_state,
    "VringKick": _small_state,
    "VringAddr": _addr,
    "VringFd": lambda source: payloads.U64(_index(source) & 0xFF | (source.u8() & 1) << 8).pack(),
    "LogArea": lambda source: payloads.LogArea.STRUCT.pack(_wide(source), _wide(source)),
    "MemTableOrAck": lambda source: _table(source) if source.u8() < RARE else _acknowledgement(source),
    "SingleRegionOrAck": lambda source: bytes(8) + _region(source) if source.u8() < RARE else _acknowledgement(source),
    "Inflight": _inflight,
    "StateTransfer": lambda source: payloads.StateTransfer.STRUCT.pack(source.u8() % 3, source.u8() // 0xF0),
    "Config": _config,
    "Iotlb": _iotlb,
}
"""How a payload is made, by the name of its class: of the right size, with fields that often make sense."""
