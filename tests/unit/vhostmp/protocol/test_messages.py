"""Wire structures: sizes, what each field may hold, bytes there and back."""

from __future__ import annotations

import struct

import pytest

from vhostmp.consts import Request
from vhostmp.protocol import messages, payloads
from vhostmp.protocol.messages import MESSAGES, Header
from vhostmp.protocol.payloads import (
    U64,
    Config,
    Empty,
    FieldError,
    Inflight,
    Iotlb,
    LogArea,
    MacAddress,
    MemTable,
    Mtu,
    Payload,
    Region,
    SingleRegion,
    StateTransfer,
    Status,
    VringAddr,
    VringBase,
    VringEnable,
    VringFd,
    VringKick,
    VringNum,
    VringState,
)
from vhostmp.tools.stress import frontend

REGION = Region(0x1000, 0x2000, 0x7000, 0x3000)
PACKED_REGION = frontend.region(0x1000, 0x2000, 0x7000, 0x3000)

GOOD: list[tuple[Payload, bytes]] = [
    (Empty(), b""),
    (U64(0x0123456789ABCDEF), bytes.fromhex("efcdab8967452301")),
    (Mtu(1500), frontend.u64(1500)),
    (Mtu(68), frontend.u64(68)),
    (Mtu(65535), frontend.u64(65535)),
    (MacAddress(b"\x02\x00\x00\x00\x00\x01"), b"\x02\x00\x00\x00\x00\x01\0\0"),
    (VringState(1, 7), frontend.vring(1, 7)),
    (VringNum(1, 1), frontend.vring(1, 1)),
    (VringNum(1, 32768), frontend.vring(1, 32768)),
    (VringNum(1, 3), frontend.vring(1, 3)),
    (VringBase(0, 65535), frontend.vring(0, 65535)),
    (VringBase(0, 0x80078007), frontend.vring(0, 0x80078007)),
    (VringEnable(3, 1), frontend.vring(3, 1)),
    (VringKick(3, 0), frontend.vring(3, 0)),
    (VringFd(2, True), frontend.u64(2)),
    (VringFd(255, False), frontend.u64(0x1FF)),
    (VringAddr(1, 1, 0x10, 0x24, 0x32, 0x44), frontend.vring_addr(1, 1, desc=0x10, used=0x24, avail=0x32, log=0x44)),
    (LogArea(0x40, 0x123), frontend.log_area(0x40, 0x123)),
    (MemTable((REGION,)), struct.pack("=II", 1, 0) + PACKED_REGION),
    (Status(0xCF), frontend.u64(0xCF)),
    (StateTransfer(1, 0), frontend.vring(1, 0)),
    (Inflight(0x1000, 64, 2, 256), struct.pack("=QQHH", 0x1000, 64, 2, 256)),
    (Iotlb(1, 2, 3, 3, 2), struct.pack("=QQQBB6x", 1, 2, 3, 3, 2)),
    (Config(3, 1, b"abc"), frontend.config(3, b"abc", 1)),
    (Config(0, 0, bytes(256)), frontend.config(0, bytes(256))),
    (SingleRegion(REGION), bytes(8) + PACKED_REGION),
]


@pytest.mark.parametrize(("payload", "data"), GOOD, ids=lambda value: type(value).__name__)
def test_there_and_back(payload: Payload, data: bytes) -> None:
    """A payload packs to the document's bytes, and these unpack to an equal payload."""
    assert payload.pack() == data
    assert type(payload).unpack(data) == payload


@pytest.mark.parametrize(("payload", "data"), GOOD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("change", [-1, 1, 8], ids=["short", "long", "longer"])
def test_size_is_exact(payload: Payload, data: bytes, change: int) -> None:
    """One byte less or more than the structure is refused by naming the size: nothing stale, nothing unread."""
    wrong = data[:change] if change < 0 and data else data + bytes(abs(change))
    with pytest.raises(FieldError) as caught:
        type(payload).unpack(wrong)
    assert caught.value.field == "size"


BIG = 1 << 63

BAD: list[tuple[str, type[Payload], bytes, str, str]] = [
    ("num 0", VringNum, frontend.vring(0, 0), "num", "num 0 is not in 1..32768"),
    ("num 32769", VringNum, frontend.vring(0, 32769), "num", "num 32769"),
    ("num 65536", VringNum, frontend.vring(0, 65536), "num", "num 0x10000"),
    ("num 0x10001", VringNum, frontend.vring(0, 0x10001), "num", "num 0x10001"),
    ("enable 2", VringEnable, frontend.vring(0, 2), "num", "num 2 is neither 0 nor 1"),
    ("index of 9 bits", VringFd, frontend.u64(0x200), "payload", "payload 512"),
    ("index of 64 bits", VringFd, frontend.u64(BIG), "payload", "payload 0x8000000000000000"),
    ("mtu 67", Mtu, frontend.u64(67), "mtu", "mtu 67 is not in 68..65535"),
    ("mtu 0", Mtu, frontend.u64(0), "mtu", "mtu 0"),
    ("mtu 65536", Mtu, frontend.u64(65536), "mtu", "mtu 0x10000"),
    ("desc unaligned", VringAddr, frontend.vring_addr(0, desc=8), "descriptor", "descriptor 8 is not aligned to 16"),
    ("avail unaligned", VringAddr, frontend.vring_addr(0, avail=1), "available", "available 1 is not aligned to 2"),
    ("used unaligned", VringAddr, frontend.vring_addr(0, used=2), "used", "used 2 is not aligned to 4"),
    ("log unaligned", VringAddr, frontend.vring_addr(0, 1, log=2), "log", "log 2 is not aligned to 4"),
    ("short IOTLB message", Iotlb, bytes(31), "size", "size 31 is not 32"),
    ("empty config", Config, frontend.config(0, b""), "size", "size 0 is an empty part"),
    ("config too large", Config, frontend.config(1, bytes(256)), "offset", "offset 1 plus size 256 is above 256"),
    ("config offset wraps", Config, frontend.config(0xFFFFFFFF, b"a"), "offset", "offset 0xffffffff plus size 1"),
    ("config of another size", Config, frontend.config(0, b"ab", size=3), "size", "size 14 is not 15"),
    ("config size 2**32-1", Config, frontend.config(0, b"ab", size=0xFFFFFFFF), "size", "size 14 is not"),
    ("status of 9 bits", Status, frontend.u64(0x100), "status", "status 256 has more than 8 bits"),
    ("kick with a number", VringKick, frontend.vring(0, 1), "num", "num 1 is reserved and not 0"),
    ("third direction", StateTransfer, frontend.vring(2, 0), "direction", "direction 2 is neither 0 (save)"),
    ("phase of a running device", StateTransfer, frontend.vring(0, 1), "phase", "phase 1 is not 0 (stopped)"),
    ("no queues", Inflight, frontend.inflight(0, 0, 0, 256), "num_queues", "num_queues 0 asks for nothing"),
    ("no entries", Inflight, frontend.inflight(0, 0, 1, 0), "queue_size", "queue_size 0 is not in 1..32768"),
    ("32769 entries", Inflight, frontend.inflight(0, 0, 1, 32769), "queue_size", "queue_size 32769 is not in"),
    ("region wraps", Inflight, frontend.inflight(BIG, BIG, 1, 1), "mmap_offset", "passes 2**63"),
    ("inflight of 22 bytes", Inflight, bytes(22), "size", "size 22 is not 20"),
    ("addr flags", VringAddr, frontend.vring_addr(0, 2), "flags", "flags 2 have unknown bits"),
    ("log of 0", LogArea, frontend.log_area(0, 8), "size", "size 0 is an empty log"),
    ("log wraps", LogArea, frontend.log_area(BIG, BIG + 1), "mmap_offset", "mmap_offset 0x8000000000000001 plus size"),
    ("no regions", MemTable, frontend.mem_table(), "nregions", "nregions 0 is not in 1..8"),
    ("9 regions", MemTable, frontend.mem_table(*[PACKED_REGION] * 9), "nregions", "nregions 9"),
    ("2**32-1 regions", MemTable, frontend.mem_table(count=0xFFFFFFFF), "nregions", "nregions 0xffffffff"),
    ("fewer than it says", MemTable, frontend.mem_table(PACKED_REGION, count=2), "size", "size 40 is not 72"),
    ("more than it says", MemTable, frontend.mem_table(*[PACKED_REGION] * 2, count=1), "size", "size 72 is not 40"),
    (
        "empty region",
        MemTable,
        frontend.mem_table(frontend.region(0, 0, 0)),
        "regions[0].size",
        "regions[0].size 0 is an empty region",
    ),
    (
        "gpa wraps",
        MemTable,
        frontend.mem_table(frontend.region(BIG, BIG + 1, 0)),
        "regions[0].guest_address",
        "wraps 2**64",
    ),
    (
        "user address wraps",
        MemTable,
        frontend.mem_table(frontend.region(0, BIG + 1, BIG)),
        "regions[0].user_address",
        "wraps 2**64",
    ),
    (
        "offset wraps",
        MemTable,
        frontend.mem_table(frontend.region(0, 0x1000, 0, (1 << 64) - 0x800)),
        "regions[0].mmap_offset",
        "wraps 2**64",
    ),
    (
        "gpa overlap",
        MemTable,
        frontend.mem_table(frontend.region(0, 0x1001, 0), frontend.region(0x1000, 0x1000, 0x10000)),
        "regions[1].guest_address",
        "regions[1].guest_address 4096 overlaps",
    ),
    (
        "user address overlap",
        MemTable,
        frontend.mem_table(frontend.region(0, 0x1000, 0x10000), frontend.region(0x1000, 0x1001, 0xF000)),
        "regions[0].user_address",
        "overlaps",
    ),
    (
        "duplicate",
        MemTable,
        frontend.mem_table(PACKED_REGION, PACKED_REGION),
        "regions[1].guest_address",
        "overlaps",
    ),
    ("single empty", SingleRegion, frontend.single_region(frontend.region(0, 0, 0)), "size", "size 0 is an empty"),
    (
        "single wraps",
        SingleRegion,
        frontend.single_region(frontend.region(BIG, BIG + 1, 0)),
        "guest_address",
        "wraps",
    ),
]


@pytest.mark.parametrize(("kind", "data", "field", "text"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_fields_are_named(kind: type[Payload], data: bytes, field: str, text: str) -> None:
    """A value that is never legal is refused by an error with the field's name and the value."""
    with pytest.raises(FieldError) as caught:
        kind.unpack(data)
    assert caught.value.field == field
    assert text in str(caught.value)


def test_adjacent_regions_are_legal() -> None:
    """Regions may touch, and may end exactly at 2**64."""
    data = frontend.mem_table(frontend.region(0, 0x1000, 0), frontend.region(BIG, BIG, 0x1000))
    first, last = MemTable.unpack(data).regions
    assert (first.size, last.guest_address + last.size) == (0x1000, 1 << 64)


@pytest.mark.parametrize(
    ("flags", "size", "field"),
    [(0, 0, "flags"), (2, 0, "flags"), (3, 0, "flags"), (5, 0, "flags"), (0x11, 0, "flags"), (1 << 31 | 1, 0, "flags"),
     (1, 0x1000, "size"), (1, messages.MAX_PAYLOAD_SIZE + 1, "size"), (1, 0xFFFFFFFF, "size")],
)  # fmt: skip
def test_bad_headers_are_refused(flags: int, size: int, field: str) -> None:
    """Another version, a reply, reserved flags or a size above all messages' is refused by its name."""
    with pytest.raises(FieldError) as caught:
        Header(Request.GET_FEATURES, flags, size).check()
    assert caught.value.field == field


def test_good_headers_pass() -> None:
    """Version 1 with or without NEED_REPLY passes, for any request and every size that may be skipped."""
    Header(99, 1, messages.MAX_PAYLOAD_SIZE).check()
    header = Header(1, 9, 0)
    header.check()
    assert header.need_reply


def test_every_message_refuses_a_wrong_size() -> None:
    """No message of the table has a payload of 3 bytes, and each refuses one."""
    for spec in MESSAGES.values():
        with pytest.raises(FieldError):
            spec.payload.unpack(bytes(3))


def test_describe_names_fields_and_values() -> None:
    """A log line shows every field by name, large numbers in hexadecimal."""
    assert payloads.describe(VringState(1, 70000)) == "index 1, num 0x11170"
    assert payloads.describe(VringFd(1, False)) == "index 1, has_fd no"
    assert payloads.describe(MacAddress(b"\x02\0\0\0\0\1")) == "value 02:00:00:00:00:01"
    assert payloads.describe(MemTable((REGION,))).startswith("regions [guest_address 4096, size 8192")
    assert payloads.describe(SingleRegion(REGION)).startswith("region guest_address 4096")
    assert payloads.describe(Empty()) == ""
