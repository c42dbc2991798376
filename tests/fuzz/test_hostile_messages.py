"""Messages as an enemy would send them, one by one: what a published bug or a reading of other back-ends suggests.

What must hold for each of them: it is refused by a log line that names the message and the field, every descriptor that
came with it is closed, nothing about the device has changed; where the front-end can be told (NEED_REPLY and REPLY_ACK)
the connection lives on, else it is closed and the device is free for the next front-end.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence

import attrs
import pytest

from tests.helpers import PATIENCE
from tests.rig import MEMORY_BYTES, UVA, Rig, descriptor_count
from vhostmp.consts import ProtocolFeature, Request, mask
from vhostmp.protocol.messages import MAX_FDS
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import (
    NEED_REPLY,
    VERSION,
    mem_table,
    message,
    region,
    single_region,
    u64,
    vring,
    vring_addr,
)

SLOTS = mask(
    (
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.CONFIGURE_MEM_SLOTS,
        ProtocolFeature.NET_MTU,
        ProtocolFeature.BACKEND_REQ,
        ProtocolFeature.CONFIG,
        ProtocolFeature.INBAND_NOTIFICATIONS,
        ProtocolFeature.DEVICE_STATE,
        ProtocolFeature.LOG_SHMFD,
        ProtocolFeature.INFLIGHT_SHMFD,
    )
)
Maker = Callable[[Rig], int]


def _memfd(rig: Rig) -> int:
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC)
    os.ftruncate(fd, MEMORY_BYTES)
    return fd


def _small_memfd(rig: Rig) -> int:
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC)
    os.ftruncate(fd, MEMORY_BYTES - 1)
    return fd


def _readonly_memfd(rig: Rig) -> int:
    fd = _memfd(rig)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def _eventfd(rig: Rig) -> int:
    return os.eventfd(0)


def _pipe(rig: Rig) -> int:
    read, write = os.pipe()
    os.close(write)
    return read


def _null(rig: Rig) -> int:
    return os.open("/dev/null", os.O_RDWR)


def _file(rig: Rig) -> int:
    fd, path = tempfile.mkstemp()
    os.unlink(path)
    return fd


def _directory(rig: Rig) -> int:
    return os.open("/", os.O_RDONLY | os.O_DIRECTORY)


def _socket(rig: Rig) -> int:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()


def _connection(rig: Rig) -> int:
    return fcntl.fcntl(rig.sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)


def _listener(rig: Rig) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind("")  # an abstract name that the kernel chooses
        sock.listen()
        return sock.detach()


def _unconnected(rig: Rig) -> int:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()


@attrs.frozen
class Row:
    """One bad message, with how its descriptors are made, and what the log line must hold."""

    id: str
    request: int
    payload: bytes
    log: str
    fds: Sequence[Maker] = ()
    flags: int = VERSION
    size: int | None = None
    fatal: bool = False
    has_reply: bool = False


TABLE = mem_table(region(0, MEMORY_BYTES, UVA))
ONE = single_region(region(1 << 40, MEMORY_BYTES, 1 << 40))
HALF = MEMORY_BYTES // 2


def _bad_index() -> Iterator[Row]:
    """Every message that names a ring, with an index that is none."""
    for index in (2, 0x10000, 0xFFFFFFFF):
        text = f"index {index} is not below 2"
        for request in (Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE):
            yield Row(f"{request.name} index {index:#x}", request, vring(index, 1), f"{request.name}: {text}")
        yield Row(f"VRING_KICK index {index:#x}", 35, vring(index, 0), f"VRING_KICK: {text}")
        yield Row(f"GET_VRING_BASE index {index:#x}", 11, vring(index, 0), f"GET_VRING_BASE: {text}", has_reply=True)
        yield Row(f"SET_VRING_ADDR index {index:#x}", 9, vring_addr(index), f"SET_VRING_ADDR: {text}")
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        for index in (2, 255):
            text = f"{request.name}: index {index} is not below 2"
            yield Row(f"{request.name} index {index}", request, u64(index), text, [_eventfd])
            yield Row(f"{request.name} index {index} no fd", request, u64(0x100 | index), text)
        text = f"{request.name}: payload 0x8000000000000000 has bits"
        yield Row(f"{request.name} index of 64 bits", request, u64(1 << 63), text, [_eventfd])


def _bad_event_fds() -> Iterator[Row]:
    """Descriptors that are no eventfd, missing ones and one too many."""
    makers = (_pipe, _file, _directory, _socket, _null, _memfd, _connection)
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        for maker in makers:
            yield Row(f"{request.name} {maker.__name__}", request, u64(0), f"{request.name}: index 0, has_fd", [maker])
        text = f"{request.name}: 1 fds came with it"
        yield Row(f"{request.name} fd with no-fd bit", request, u64(0x100), text, [_eventfd])
        yield Row(f"{request.name} no fd", request, u64(0), f"{request.name}: 0 fds came with it")
        text = f"{request.name}: 2 fds came with it"
        yield Row(f"{request.name} two fds", request, u64(0), text, [_eventfd, _eventfd])


def _bad_tables() -> Iterator[Row]:
    """Memory tables that do not add up, and descriptors that cannot be memory."""
    request = Request.SET_MEM_TABLE
    for name, payload, text in (
        ("nregions 0", mem_table(region(0, 1, 0), count=0), "nregions 0 is not in 1..8"),
        ("nregions 9", mem_table(*[region(0, 1, 0)] * 9), "nregions 9"),
        ("nregions 2**32-1", mem_table(region(0, 1, 0), count=0xFFFFFFFF), "nregions 0xffffffff"),
        ("size 0", b"", "size 0"),
        ("size 7", bytes(7), "size 7"),
        ("gpa wraps", mem_table(region((1 << 64) - 1, 2, 0)), "regions[0].guest_address"),
        ("user address wraps", mem_table(region(0, 2, (1 << 64) - 1)), "regions[0].user_address"),
        ("offset wraps", mem_table(region(0, 0x1000, 0, (1 << 64) - 1)), "regions[0].mmap_offset"),
        ("offset + size beyond the file", mem_table(region(0, MEMORY_BYTES, UVA, 0x1000)), "regions [guest"),
        ("size beyond the file", mem_table(region(0, 1 << 50, UVA)), "regions [guest"),
        ("fewer fds", mem_table(region(0, HALF, UVA), region(HALF, HALF, UVA + HALF)), "1 fds came with it"),
    ):
        yield Row(f"SET_MEM_TABLE {name}", request, payload, f"SET_MEM_TABLE: {text}", [_memfd])
    for number, name in ((5, "SET_MEM_TABLE"), (37, "ADD_MEM_REG"), (38, "REM_MEM_REG")):
        text = "size 8 is that of an acknowledgement, which comes in post-copy alone"
        yield Row(f"{name} acknowledged", number, u64(0), f"{name}: {text}")
    for number, name in ((28, "POSTCOPY_ADVISE"), (29, "POSTCOPY_LISTEN"), (30, "POSTCOPY_END")):
        text = f"{name}: needs protocol feature PAGEFAULT, which is not negotiated"
        yield Row(name, number, b"", text, has_reply=number != 29)  # noqa: PLR2004 - LISTEN has none
    two = [_memfd, _memfd]
    yield Row("SET_MEM_TABLE more fds", request, TABLE, "SET_MEM_TABLE: 2 fds came with it", two)
    yield Row(
        "SET_MEM_TABLE gpa overlap", request, mem_table(region(0, HALF + 1, 0), region(HALF, HALF, 1 << 40)),
        "SET_MEM_TABLE: regions[1].guest_address", two,
    )  # fmt: skip
    yield Row(
        "SET_MEM_TABLE user address overlap", request, mem_table(region(0, HALF, 0), region(1 << 40, HALF, HALF - 1)),
        "SET_MEM_TABLE: regions[1].user_address", two,
    )  # fmt: skip
    yield Row(
        "SET_MEM_TABLE duplicate", request, mem_table(region(0, HALF, 0), region(0, HALF, 0)),
        "SET_MEM_TABLE: regions[1].guest_address", two,
    )  # fmt: skip
    for maker in (_null, _pipe, _socket, _small_memfd, _readonly_memfd, _directory, _eventfd, _file):
        yield Row(f"SET_MEM_TABLE {maker.__name__}", request, TABLE, "SET_MEM_TABLE: regions [guest_address 0", [maker])
        yield Row(f"ADD_MEM_REG {maker.__name__}", 37, ONE, "ADD_MEM_REG: region guest_address", [maker])
    yield Row("ADD_MEM_REG 0 fds", 37, ONE, "ADD_MEM_REG: 0 fds came with it")
    yield Row("ADD_MEM_REG 2 fds", 37, ONE, "ADD_MEM_REG: 2 fds came with it", two)
    yield Row(
        "ADD_MEM_REG overlap",
        37,
        single_region(region(0, HALF, 1 << 40)),
        "ADD_MEM_REG: region guest_address 0",
        [_memfd],
    )
    yield Row("REM_MEM_REG unknown", 38, ONE, "REM_MEM_REG: region guest_address 0x10000000000")
    yield Row("REM_MEM_REG unknown with fd", 38, ONE, "REM_MEM_REG: region guest_address", [_memfd])
    yield Row(
        "REM_MEM_REG size mismatch", 38, single_region(region(0, HALF, UVA)), "REM_MEM_REG: region guest_address 0"
    )
    yield Row("REM_MEM_REG 2 fds", 38, single_region(region(0, MEMORY_BYTES, UVA)), "REM_MEM_REG: 2 fds", two)


def _bad_values() -> Iterator[Row]:
    """Numbers that are never legal, and those that are not now."""
    yield Row("SET_VRING_NUM 3", 8, vring(0, 3), "SET_VRING_NUM: index 0, num 3: ring size 3 is not a power of two")
    for num in (0, 32769, 65536, 0x10001):
        yield Row(f"SET_VRING_NUM {num}", 8, vring(0, num), "SET_VRING_NUM: num ")
    yield Row("SET_VRING_BASE 0x10000", 10, vring(0, 0x10000), "SET_VRING_BASE: index 0, num 0x10000: vring base")
    yield Row("SET_VRING_ENABLE 2", 18, vring(0, 2), "SET_VRING_ENABLE: num 2")
    yield Row("SET_VRING_ADDR flags", 9, vring_addr(0, 2), "SET_VRING_ADDR: flags 2")
    yield Row("SET_VRING_ADDR desc unaligned", 9, vring_addr(0, desc=15), "SET_VRING_ADDR: descriptor 15")
    yield Row("SET_VRING_ADDR avail unaligned", 9, vring_addr(0, avail=1), "SET_VRING_ADDR: available 1")
    yield Row("SET_VRING_ADDR used unaligned", 9, vring_addr(0, used=2), "SET_VRING_ADDR: used 2")
    yield Row("SET_VRING_ADDR log unaligned", 9, vring_addr(0, 1, log=1), "SET_VRING_ADDR: log 1")
    yield Row("SET_FEATURES unoffered", 2, u64(1 << 30 | 1 << 63), "SET_FEATURES: features 0x8000000040000000")
    yield Row("SET_FEATURES without bit 30", 2, u64(1 << 32), "SET_FEATURES: features 0x100000000 change PROTOCOL")
    yield Row("SET_PROTOCOL_FEATURES unoffered", 16, u64(1 << 40 | 8), "SET_PROTOCOL_FEATURES: features 0x10000000008")
    yield Row("SET_OWNER twice", 3, b"", "SET_OWNER: is not legal")
    yield Row("MTU 0", 20, u64(0), "NET_SET_MTU: mtu 0")
    yield Row("MTU 67", 20, u64(67), "NET_SET_MTU: mtu 67")
    yield Row("MTU 65536", 20, u64(65536), "NET_SET_MTU: mtu 0x10000")
    yield Row("GET_STATUS not negotiated", 40, b"", "GET_STATUS: needs protocol feature STATUS", has_reply=True)
    yield Row("VRING_KICK num", 35, vring(0, 1), "VRING_KICK: num 1 is reserved")
    yield Row("INBAND alone", 16, u64(1 << 14 | 8), "SET_PROTOCOL_FEATURES: features 0x4008 have INBAND", fatal=True)
    for name, payload, text in (
        ("direction", vring(2, 0), "direction 2"),
        ("phase", vring(0, 1), "phase 1"),
        ("size", bytes(4), "size 4"),
    ):
        request = Request.SET_DEVICE_STATE_FD
        yield Row(f"{request.name} {name}", request, payload, f"{request.name}: {text}", [_pipe], has_reply=True)
    yield Row("SET_DEVICE_STATE_FD no fd", 42, vring(0, 0), "SET_DEVICE_STATE_FD: 0 fds came", has_reply=True)
    yield Row("RARP not negotiated", 19, u64(1), "SEND_RARP: needs protocol feature RARP")


def _bad_frames() -> Iterator[Row]:
    """Headers and sizes that lie, requests that are none."""
    for request in (0, 45, 255, 0xFFFFFFFF):
        yield Row(f"request {request:#x}", request, b"", f"request {request}: request {request:#x} is not supported")
        yield Row(f"request {request:#x} with fd", request, bytes(8), f"request {request}", [_eventfd])
    for request in (Request.GET_SHMEM_CONFIG,):
        yield Row(f"{request.name} not supported", request, bytes(16), f"{request.name}: request", [_memfd])
    for size in (0x401, 0x1000, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF):
        yield Row(f"size {size:#x}", 2, u64(1 << 30), "SET_FEATURES: size ", size=size, fatal=True)
    for flags, name in ((0, "version 0"), (2, "version 2"), (3, "version 3"), (5, "reply"), (0x41, "reserved")):
        yield Row(f"flags {name}", 3, b"", f"SET_OWNER: flags {flags}", flags=flags, fatal=True)
        yield Row(f"flags {name} with fd", 3, b"", f"SET_OWNER: flags {flags}", [_memfd], flags=flags, fatal=True)
    for request, right in ((Request.SET_FEATURES, 8), (Request.SET_VRING_NUM, 8), (Request.SET_VRING_ADDR, 40)):
        for size in (0, 1, right - 1, right + 1, right + 8):
            text = f"{request.name}: size {size} is not {right}"
            yield Row(f"{request.name} size {size}", request, bytes(size), text)
    yield Row("SET_VRING_KICK size 4", 12, bytes(4), "SET_VRING_KICK: size 4", [_eventfd])
    yield Row("RESET_OWNER size 8", 4, bytes(8), "RESET_OWNER: size 8 is not 0")
    yield Row("fds on a no-fd message", 8, vring(0, 4), "SET_VRING_NUM: 8 fds came with it", [_eventfd] * 8)
    yield Row("9 fds", 5, TABLE, f"SET_MEM_TABLE: more fds came with it than the {MAX_FDS}", [_memfd] * 9)
    yield Row("33 fds", 8, vring(0, 4), "SET_VRING_NUM: more fds came with it", [_eventfd] * 33)
    yield Row("253 fds", 8, vring(0, 4), "SET_VRING_NUM: more fds came with it", [_eventfd] * 253)


def _bad_iotlb_messages() -> Iterator[Row]:
    """Messages that are none, and one to a device without an IOMMU. They have a reply of their own: no telling."""
    for size in (0, 8, 26, 31, 33):
        yield Row(f"IOTLB {size} bytes", 22, bytes(size), f"IOTLB_MSG: size {size} is not 32", has_reply=True)
    for fill in (bytes(32), b"\xff" * 32):
        yield Row(f"IOTLB {fill[:1].hex()}", 22, fill, "IOTLB_MSG: needs a device that offers", has_reply=True)


def _bad_logs() -> Iterator[Row]:
    """Dirty logs that nobody could write. SET_LOG_BASE has a reply of its own, so there is no telling."""
    for text, size, offset in (
        ("size 0 is an empty log", 0, 0),
        ("size 0 is an empty log", 0, (1 << 64) - 1),
        ("mmap_offset 0xffffffffffffffff plus size", 2, (1 << 64) - 1),
        ("size 256, mmap_offset 0xfffffffffffff000", 0x100, (1 << 64) - 0x1000),
        ("size 0x8000000000000000, mmap_offset 0: dirty log: file has", 1 << 63, 0),
        ("size 0x100000, mmap_offset 1: dirty log: file has", MEMORY_BYTES, 1),
        ("size 1, mmap_offset 0x100000: dirty log: file has", 1, MEMORY_BYTES),
    ):
        payload = frontend.log_area(size, offset)
        yield Row(f"log {size:#x} at {offset:#x}", 6, payload, f"SET_LOG_BASE: {text}", [_memfd], has_reply=True)
    for maker in (_readonly_memfd, _eventfd, _pipe, _null, _file, _directory, _socket, _connection):
        text = "SET_LOG_BASE: size 64, mmap_offset 0: dirty log"
        yield Row(f"log in {maker.__name__}", 6, frontend.log_area(64), text, [maker], has_reply=True)
    for count in (0, 2):
        text = f"SET_LOG_BASE: {count} fds came with it"
        yield Row(f"log with {count} fds", 6, frontend.log_area(64), text, [_memfd] * count, has_reply=True)
    for maker in (_pipe, _file, _null, _memfd):
        yield Row(f"SET_LOG_FD {maker.__name__}", 7, b"", "SET_LOG_FD: log descriptor is not an eventfd", [maker])
    yield Row("SET_LOG_FD no fd", 7, b"", "SET_LOG_FD: 0 fds came with it")


def _bad_channels() -> Iterator[Row]:
    """What cannot be a channel of our own."""
    request = Request.SET_BACKEND_REQ_FD
    for maker in (_pipe, _file, _directory, _socket, _null, _memfd, _eventfd, _listener, _unconnected):
        yield Row(f"{request.name} {maker.__name__}", request, b"", f"{request.name}: ", [maker])
    yield Row(f"{request.name} no fd", request, b"", f"{request.name}: 0 fds came with it")
    yield Row(f"{request.name} two fds", request, b"", f"{request.name}: 2 fds came with it", [_connection] * 2)
    yield Row(f"{request.name} size 8", request, bytes(8), f"{request.name}: size 8 is not 0", [_connection])


def _bad_inflight() -> Iterator[Row]:
    """Regions that do not add up, or lie nowhere."""
    for name, payload, text in (
        ("no queue", frontend.inflight(0, 0, 0, 256), "num_queues 0"),
        ("too many queues", frontend.inflight(0, 0, 3, 256), "mmap_size 0, mmap_offset 0, num_queues 3"),
        ("queue size", frontend.inflight(0, 0, 1, 65535), "queue_size 65535"),
        ("wraps", frontend.inflight(1 << 63, 1 << 63, 1, 1), "mmap_offset 0x8000000000000000"),
        ("size", bytes(8), "size 8 is not 20"),
    ):
        yield Row(f"GET_INFLIGHT_FD {name}", 31, payload, f"GET_INFLIGHT_FD: {text}", has_reply=True)
        yield Row(f"SET_INFLIGHT_FD {name}", 32, payload, f"SET_INFLIGHT_FD: {text}", [_memfd])
    small, large = frontend.inflight(64, 0, 2, 256), frontend.inflight(1 << 20, 1, 2, 256)
    yield Row("SET_INFLIGHT_FD too small", 32, small, "SET_INFLIGHT_FD: mmap_size 64,", [_memfd])
    yield Row("SET_INFLIGHT_FD beyond the file", 32, large, "SET_INFLIGHT_FD: mmap_size 0x100000,", [_memfd])
    yield Row("SET_INFLIGHT_FD no fd", 32, small, "SET_INFLIGHT_FD: 0 fds")
    good = frontend.inflight(1 << 20, 0, 2, 256)
    for maker in (_pipe, _socket, _null, _eventfd, _directory, _file, _readonly_memfd):
        yield Row(f"SET_INFLIGHT_FD {maker.__name__}", 32, good, "SET_INFLIGHT_FD: mmap_size 0x100000,", [maker])
    yield Row("BASE_INFLIGHT alone", 16, u64(1 << 20 | 8), "SET_PROTOCOL_FEATURES: features 0x100008 have GET_VRING")


def _bad_configs() -> Iterator[Row]:
    """Parts of the configuration space that are none, and what may not be written."""
    for name, payload, text in (
        ("size 0", frontend.config(0, b""), "size 0 is an empty part"),
        ("no payload", b"", "size 0 is below 12"),
        ("offset wraps", frontend.config(0xFFFFFFFF, b"a"), "offset 0xffffffff plus size 1"),
        ("size beyond", frontend.config(0, bytes(257)), "offset 0 plus size 257"),
        ("size lies", frontend.config(0, b"a", size=0xFFFFFFFF), "size 13 is not"),
    ):
        yield Row(f"GET_CONFIG {name}", 24, payload, f"GET_CONFIG: {text}", has_reply=True)
        yield Row(f"SET_CONFIG {name}", 25, payload, f"SET_CONFIG: {text}")
    yield Row("SET_CONFIG past the end", 25, frontend.config(39, b"ab"), "SET_CONFIG: offset 39 and size 2 pass 40")
    yield Row("SET_CONFIG read-only", 25, frontend.config(8, b"a"), "SET_CONFIG: offset 8, flags 0, data 61: read-only")
    yield Row("SET_CONFIG flags", 25, frontend.config(0, b"a", 2), "SET_CONFIG: flags 0x2 are unknown")


ROWS = [
    *_bad_logs(),
    *_bad_inflight(),
    *_bad_iotlb_messages(),
    *_bad_configs(),
    *_bad_channels(),
    *_bad_frames(),
    *_bad_values(),
    *_bad_tables(),
    *_bad_event_fds(),
    *_bad_index(),
]


@contextlib.contextmanager
def made(makers: Sequence[Maker], rig: Rig) -> Generator[list[int], None, None]:
    """Lend the descriptors that `makers` make; of the same maker in a row only one is made."""
    fds: list[int] = []
    known: dict[Maker, int] = {}
    try:
        for maker in makers:
            if maker not in known:
                known[maker] = maker(rig)
            fds.append(known[maker])
        yield fds
    finally:
        for fd in known.values():
            os.close(fd)


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A connection with memory and two rings that are set up."""
    with Rig() as rig, frontend.memfd(MEMORY_BYTES) as memory:
        rig.negotiate(SLOTS)
        rig.give_memory(memory)
        for index in range(2):
            rig.set_ring(index)
        rig.settle()
        yield rig


@pytest.mark.parametrize("row", [row for row in ROWS if not row.fatal and not row.has_reply], ids=lambda row: row.id)
def test_told(rig: Rig, row: Row, caplog: pytest.LogCaptureFixture) -> None:
    """Told to a front-end that wants to know: refused, logged, nothing changed, nothing open, the session goes on."""
    before, count = rig.state(), descriptor_count()
    with made(row.fds, rig) as fds, caplog.at_level(logging.WARNING):
        rig.send_raw(message(row.request, row.payload, flags=row.flags | NEED_REPLY, size=row.size), fds)
        reply = rig.reply()
    assert reply.request == row.request
    assert reply.u64 != 0
    assert rig.state() == before
    assert descriptor_count() == count
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"device 0: {row.log}")
    assert line.endswith("; refused")
    assert rig.do(Request.SET_VRING_NUM, vring(0, 2)) == 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_closed(rig: Rig, row: Row, caplog: pytest.LogCaptureFixture) -> None:
    """Not told: the connection is closed with one log line, no descriptor is left, the device awaits the next one."""
    count = descriptor_count() - 1  # the device's region
    with made(row.fds, rig) as fds, caplog.at_level(logging.WARNING):
        rig.send_raw(message(row.request, row.payload, flags=row.flags, size=row.size), fds)
        assert rig.hung_up()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"device 0: {row.log}")
    assert line.endswith("; connection closed")
    assert not rig.device.owned
    assert not rig.device.table
    assert descriptor_count() == count - 1  # the port's socket


@pytest.mark.parametrize("row", [row for row in ROWS if row.fatal], ids=lambda row: row.id)
def test_fatal_is_not_told(rig: Rig, row: Row) -> None:
    """Where the next message begins is unknown: the connection is closed although an answer is wanted."""
    with made(row.fds, rig) as fds:
        rig.send_raw(message(row.request, row.payload, flags=row.flags | NEED_REPLY, size=row.size), fds)
        assert rig.hung_up()


def test_fds_in_two_parts(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Descriptors split over two sendmsg() are all closed with the connection."""
    count = descriptor_count() - 2
    data = message(Request.SET_MEM_TABLE, mem_table(region(0, HALF, UVA), region(HALF, HALF, UVA + HALF)))
    with made([_memfd], rig) as fds:
        rig.send_raw(data[:20], fds)
        rig.settle()
        rig.send_raw(data[20:], fds)
        assert rig.hung_up()
    assert "SET_MEM_TABLE: fds came in two parts; connection closed" in caplog.text
    assert descriptor_count() == count


def test_foreign_ancillary_data(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Ancillary data other than descriptors refuses the message it came with; descriptors beside it are closed."""
    before, count = rig.state(), descriptor_count()
    rig.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with made([_eventfd], rig) as fds:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", *fds))
        credentials = (
            socket.SOL_SOCKET,
            socket.SCM_CREDENTIALS,
            struct.pack("=III", os.getpid(), os.getuid(), os.getgid()),
        )
        data = message(Request.SET_VRING_CALL, u64(0), flags=VERSION | NEED_REPLY)
        rig.sock.sendmsg([data], [rights, credentials])
        assert rig.reply().u64 != 0
    assert "SET_VRING_CALL: ancillary data" in caplog.text
    assert rig.state() == before
    assert descriptor_count() == count


@pytest.mark.parametrize("request_", [Request.GET_FEATURES, Request.SET_OWNER, Request.SET_VRING_CALL])
def test_no_growth(rig: Rig, request_: Request) -> None:
    """A thousand messages with eight descriptors each leave none open."""
    count = descriptor_count()
    with made([_eventfd] * 8, rig) as fds:
        for _ in range(1000):
            rig.send(request_, fds=fds, need_reply=True)
            if request_ is Request.GET_FEATURES:
                break  # nothing can be told: the connection ends with the first
            assert rig.reply().u64 != 0
    rig.settle()
    assert descriptor_count() == count - (2 if request_ is Request.GET_FEATURES else 0)


def test_ring_set_up_again_and_again(rig: Rig) -> None:
    """Setting a ring's size again and again costs nothing."""
    count = descriptor_count()
    for _ in range(1000):
        rig.set_ring(0)
    assert descriptor_count() == count


def test_while_running(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """While a ring runs its size and base, and protocol features, cannot change; it runs on."""
    with frontend.eventfds(2) as fds:
        rig.start_ring(0, fds[0], fds[1])
        before = rig.state()
        for request, payload in (
            (Request.SET_VRING_NUM, vring(0, 64)),
            (Request.SET_VRING_BASE, vring(0, 1)),
            (Request.SET_PROTOCOL_FEATURES, u64(8)),
        ):
            assert rig.do(request, payload) != 0
            assert rig.state() == before
    assert "SET_VRING_NUM: index 0, num 64: the ring runs; refused" in caplog.text


def test_same_table_with_other_descriptors_is_a_new_table(rig: Rig) -> None:
    """A table with the same numbers and another file is taken as what it is: another one."""
    with made([_memfd], rig) as fds:
        rig.give_memory(fds[0])
        new = rig.device.table.regions[0].fd
        assert os.path.samestat(os.fstat(new), os.fstat(fds[0]))


def test_every_prefix_of_a_handshake() -> None:
    """The front-end may go after any byte of a handshake: no descriptor is left, and the device is free."""
    with frontend.memfd(MEMORY_BYTES) as memory, frontend.eventfds(4) as fds:
        script = handshake(memory, fds)
        total = sum(len(data) for data, _ in script)
        count = descriptor_count()
        for cut in range(0, total + 1, 7):
            with Rig() as rig:
                play(rig, script, cut)
                rig.sock.close()
                rig.settle()
                assert not rig.port.connected
                assert not rig.device.owned
            assert descriptor_count() == count


def handshake(memory: int, fds: Sequence[int]) -> list[tuple[bytes, list[int]]]:
    """Return a usual conversation as (bytes, descriptors) of each message."""
    script: list[tuple[bytes, list[int]]] = [
        (message(Request.SET_OWNER), []),
        (message(Request.SET_FEATURES, u64(1 << 32 | 1 << 30)), []),
        (message(Request.SET_PROTOCOL_FEATURES, u64(8)), []),
        (message(Request.SET_MEM_TABLE, TABLE), [memory]),
    ]
    for index in range(2):
        start = UVA + index * 0x10000
        addr = vring_addr(index, desc=start, avail=start + 0x4000, used=start + 0x8000)
        script += [
            (message(Request.SET_VRING_NUM, vring(index, 256)), []),
            (message(Request.SET_VRING_BASE, vring(index, 0)), []),
            (message(Request.SET_VRING_ADDR, addr), []),
            (message(Request.SET_VRING_CALL, u64(index)), [fds[2 * index]]),
            (message(Request.SET_VRING_KICK, u64(index)), [fds[2 * index + 1]]),
            (message(Request.SET_VRING_ENABLE, vring(index, 1)), []),
        ]
    return script


def play(rig: Rig, script: Sequence[tuple[bytes, list[int]]], cut: int) -> None:
    """Send the first `cut` bytes of a conversation."""
    for data, fds in script:
        if cut <= 0:
            return
        rig.send_raw(data[:cut], fds)
        cut -= len(data)


def test_a_silent_flood_holds_nobody_up(rig: Rig) -> None:
    """Who asks and never reads is not listened to any more, and costs no wake-ups; when it reads, all is answered."""
    rig.device.calls.clear()
    rig.sock.setblocking(False)
    asked = 0
    question = message(Request.SET_VRING_NUM, vring(0, 2), flags=VERSION | NEED_REPLY)
    with contextlib.suppress(BlockingIOError):
        while True:
            for _ in range(100):
                asked += rig.sock.send(question)
            rig.settle()
    rig.settle()
    assert not rig.loop.turn(0)
    handled, answered = len(rig.device.calls), 0
    with contextlib.suppress(BlockingIOError):
        while True:
            answered += len(rig.sock.recv(len(message(0, u64(0))))) // len(message(0, u64(0)))
    assert handled <= answered + 1
    rig.sock.settimeout(PATIENCE)
    # a question that was cut in two ends with the connection; the answers to the whole ones come
    for _ in range(asked // len(question) - answered):
        assert rig.reply().u64 == 0
