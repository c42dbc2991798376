"""Guest memory: what is refused, what is translated, and that it is the same bytes everywhere."""

from __future__ import annotations

import errno
import mmap
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.helpers import open_descriptors
from vhostmp.errors import LocalError, SysError
from vhostmp.shm._memory import MemoryMap
from vhostmp.shm.memory import DEFAULT_UVA_BASE, GuestMemory, MemoryRegion, MemoryTable

PAGE = 4096
TOP = 1 << 64
U64_MAX = TOP - 1
MakeRegion = Callable[..., MemoryRegion]


@pytest.fixture
def region() -> Iterator[MakeRegion]:
    """Return a function that makes a region of a memfd of its own; by default one page longer than mmap_offset."""
    with ExitStack() as stack:

        def make(gpa: int, size: int = PAGE, uva: int | None = None, offset: int = 0, room: int = 0) -> MemoryRegion:
            fd = os.memfd_create("region", os.MFD_CLOEXEC)
            stack.callback(os.close, fd)
            os.truncate(fd, room or offset + size)
            return MemoryRegion(
                gpa=gpa, size=size, uva=DEFAULT_UVA_BASE + gpa if uva is None else uva, fd=fd, mmap_offset=offset
            )

        yield make


def write_file(region: MemoryRegion, offset: int, data: bytes) -> None:
    """Write into a region's file as the front-end would."""
    assert os.pwrite(region.fd, data, region.mmap_offset + offset) == len(data)


# MemoryRegion.check, MemoryTable.build


@pytest.mark.parametrize("gpa", [0, PAGE, TOP - PAGE], ids=["bottom", "page", "top"])
def test_good_region(region: MakeRegion, gpa: int) -> None:
    """A region may lie anywhere in the address space, up to its last byte."""
    region(gpa, uva=gpa).check()


@pytest.mark.parametrize(
    ("gpa", "uva", "offset", "size"),
    [
        (0, 0, 0, 0),
        (0, 0, 0, -1),
        (TOP - PAGE + 1, 0, 0, PAGE),
        (0, TOP - PAGE + 1, 0, PAGE),
        (0, 0, U64_MAX, PAGE),
        (U64_MAX, 0, 0, U64_MAX),
        (-1, 0, 0, PAGE),
        (0, -1, 0, PAGE),
        (0, 0, -PAGE, PAGE),
        (0, 0, 1, PAGE),
        (0, 0, PAGE, PAGE),
        (0, 0, 0, PAGE + 1),
    ],
)
def test_bad_numbers(region: MakeRegion, gpa: int, uva: int, offset: int, size: int) -> None:
    """Size 0, sums that wrap, and files too short for offset + size are refused."""
    good = region(0)
    with pytest.raises(LocalError):
        MemoryRegion(gpa=gpa, size=size, uva=uva, fd=good.fd, mmap_offset=offset).check()


@pytest.mark.parametrize(
    ("gpa", "uva", "size"), [(0, 0, 0), (TOP - PAGE + 1, 0, PAGE), (0, TOP - PAGE + 1, PAGE), (U64_MAX, 0, U64_MAX)]
)
def test_errors_of_the_kernel(region: MakeRegion, gpa: int, uva: int, size: int) -> None:
    """An empty region and one that wraps are EFAULT, as with Linux's VHOST_SET_MEM_TABLE."""
    with pytest.raises(LocalError) as caught:
        MemoryRegion(gpa=gpa, size=size, uva=uva, fd=region(0).fd).check()
    assert caught.value.errno == errno.EFAULT


@pytest.mark.parametrize(
    "kind", ["pipe", "null", "directory", "read_only", "write_only", "eventfd", "closed", "negative"]
)
def test_bad_descriptor(kind: str) -> None:
    """Only a regular file open for reading and writing can be guest memory."""
    with tempfile.NamedTemporaryFile() as file, ExitStack() as stack:
        file.truncate(PAGE)
        if kind == "pipe":
            fd, other = os.pipe()
            stack.callback(os.close, other)
        elif kind == "eventfd":
            fd = os.eventfd(0)
        elif kind in ("closed", "negative"):
            fd = -1
        else:
            name = {"null": "/dev/null", "directory": "/tmp"}.get(kind, file.name)
            fd = os.open(name, {"null": os.O_RDWR, "write_only": os.O_WRONLY}.get(kind, os.O_RDONLY))
        if fd >= 0:
            stack.callback(os.close, fd)
        if kind == "closed":
            fd = max(open_descriptors()) + 100
        with pytest.raises(LocalError):
            MemoryRegion(gpa=0, size=PAGE, uva=0, fd=fd).check()


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        ((0, PAGE), (PAGE, PAGE), True),
        ((PAGE, PAGE), (0, PAGE), True),
        ((0, PAGE + 1), (PAGE, PAGE), False),
        ((0, PAGE), (0, PAGE), False),
        ((0, 4 * PAGE), (PAGE, PAGE), False),
        ((TOP - PAGE, PAGE), (0, PAGE), True),
    ],
)
@pytest.mark.parametrize("kind", ["gpa", "uva"])
def test_overlap(region: MakeRegion, first: tuple[int, int], second: tuple[int, int], fits: bool, kind: str) -> None:
    """Regions may touch, not overlap, neither in guest-physical nor in front-end addresses, in either order."""
    apart = [0, 1 << 40]
    regions = [
        region(start if kind == "gpa" else other, size, uva=start if kind == "uva" else other)
        for (start, size), other in zip((first, second), apart, strict=True)
    ]
    if fits:
        assert len(MemoryTable.build(regions, 8)) == len(regions)
    else:
        with pytest.raises(LocalError) as caught:
            MemoryTable.build(regions, 8)
        assert caught.value.errno == errno.EINVAL


def test_too_many_regions(region: MakeRegion) -> None:
    """More regions than allowed are E2BIG; as many as allowed are not."""
    regions = [region(PAGE * i) for i in range(9)]
    assert len(MemoryTable.build(regions[:8], 8)) == len(regions[:8])
    with pytest.raises(LocalError) as caught:
        MemoryTable.build(regions, 8)
    assert caught.value.errno == errno.E2BIG


def test_table_is_sorted(region: MakeRegion) -> None:
    """A table's regions come by ascending guest-physical address, however they were given."""
    regions = [region(gpa * PAGE) for gpa in (5, 1, 3)]
    assert [one.gpa for one in MemoryTable.build(regions, 8)] == [PAGE, 3 * PAGE, 5 * PAGE]


def test_contains_uva(region: MakeRegion) -> None:
    """A range is contained when it lies in one region, to the last byte."""
    table = MemoryTable.build([region(0, uva=PAGE), region(PAGE, uva=2 * PAGE)], 8)
    assert table.contains_uva(PAGE, PAGE)
    assert table.contains_uva(3 * PAGE - 1, 1)
    assert not table.contains_uva(PAGE, PAGE + 1)
    assert not table.contains_uva(3 * PAGE, 1)
    assert not table.contains_uva(PAGE - 1, 1)
    assert not table.contains_uva(U64_MAX, 2)


# MemoryMap


def test_map_sees_the_file(region: MakeRegion) -> None:
    """Reads and writes go to the region's file at mmap_offset, aligned to nothing."""
    one = region(0x1000, size=100, offset=4097)
    write_file(one, 90, b"0123456789")
    memory = MemoryMap([one])
    assert memory.read(0x1000 + 90, 10) == b"0123456789"
    memory.write(0x1000 + 5, b"abc")
    assert os.pread(one.fd, 5, 4097 + 4) == b"\0abc\0"
    memory.close()


@pytest.mark.parametrize(
    ("gpa", "size", "inside"),
    [
        (PAGE, PAGE, True),
        (2 * PAGE - 1, 1, True),
        (2 * PAGE - 1, 2, False),
        (PAGE - 1, 1, False),
        (PAGE - 1, 2, False),
        (2 * PAGE, 1, False),
        (2 * PAGE, 0, False),
        (PAGE, PAGE + 1, False),
        (PAGE, U64_MAX, False),
        (PAGE + 1, U64_MAX, False),
        (U64_MAX, 1, False),
        (U64_MAX, 2, False),
        (U64_MAX, U64_MAX, False),
        (0, U64_MAX, False),
    ],
)
def test_translate(region: MakeRegion, gpa: int, size: int, inside: bool) -> None:
    """A range translates when all of it lies in one region; no sum may wrap."""
    memory = MemoryMap([region(PAGE, uva=PAGE)])
    start = memory.translate(PAGE, 1)
    assert start is not None
    expected = start + gpa - PAGE if inside else None
    assert memory.translate(gpa, size) == expected
    assert memory.translate_uva(gpa, size) == expected
    memory.close()


def test_translate_does_not_join_regions(region: MakeRegion) -> None:
    """A range over two regions that touch has no single address, though each part has."""
    memory = MemoryMap([region(0), region(PAGE)])
    assert memory.translate(PAGE - 1, 2) is None
    assert memory.translate(PAGE - 1, 1) is not None
    assert memory.translate(PAGE, 1) is not None
    memory.close()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 509])
def test_every_region_is_found(region: MakeRegion, rng: random.Random, count: int) -> None:
    """However many regions there are and in whatever order they come, each byte is its own region's; holes are none."""
    places = [i * 3 * PAGE + PAGE for i in range(count)]
    order = rng.sample(places, count)
    regions = [region(gpa) for gpa in order]
    for one in regions:
        write_file(one, 0, one.gpa.to_bytes(8, "little"))
        write_file(one, PAGE - 8, (one.gpa + 1).to_bytes(8, "little"))
    memory = MemoryMap(regions)
    for gpa in places:
        assert memory.read(gpa, 8) == gpa.to_bytes(8, "little")
        assert memory.read(gpa + PAGE - 8, 8) == (gpa + 1).to_bytes(8, "little")
        assert memory.translate(gpa - 1, 1) is None
        assert memory.translate(gpa + PAGE, 1) is None
    memory.close()


def test_region_at_the_top(region: MakeRegion) -> None:
    """The last byte of the address space can be memory, and nothing follows it."""
    memory = MemoryMap([region(TOP - PAGE, uva=TOP - PAGE), region(0, uva=0)])
    assert memory.translate(U64_MAX, 1) is not None
    assert memory.translate(U64_MAX, 2) is None
    assert memory.translate_uva(U64_MAX, 1) is not None
    assert memory.translate_uva(U64_MAX, 2) is None
    memory.close()


def test_descriptors_may_be_closed() -> None:
    """A mapping outlives the descriptor it was made from, and takes none of its own."""
    fd = os.memfd_create("closed", os.MFD_CLOEXEC)
    os.truncate(fd, PAGE)
    os.pwrite(fd, b"here", 0)
    memory = MemoryMap([MemoryRegion(gpa=0, size=PAGE, uva=0, fd=fd)])
    os.close(fd)
    assert memory.read(0, 4) == b"here"
    memory.close()


def mappings() -> int:
    """Return how many memfds of these tests this process has mapped."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum("memfd:region" in line for line in maps)


def test_close_unmaps(region: MakeRegion) -> None:
    """close() unmaps everything, is idempotent, and translates nothing afterwards; so does forgetting the map."""
    before = mappings()
    memory = MemoryMap([region(0), region(PAGE)])
    assert mappings() == before + 2
    memory.close()
    memory.close()
    assert mappings() == before
    assert memory.translate(0, 1) is None
    with pytest.raises(LocalError):
        memory.read(0, 1)
    memory = MemoryMap([region(2 * PAGE)])
    del memory
    assert mappings() == before


def test_failed_map_leaves_nothing(region: MakeRegion) -> None:
    """When one region cannot be mapped the error says why, and those before it are unmapped again."""
    before = mappings()
    bad = os.eventfd(0)
    try:
        with pytest.raises(SysError) as caught:
            MemoryMap([region(0), MemoryRegion(gpa=PAGE, size=PAGE, uva=PAGE, fd=bad)])
        assert caught.value.errno == errno.ENODEV
    finally:
        os.close(bad)
    assert mappings() == before


def test_empty_map() -> None:
    """A table without regions translates nothing."""
    memory = MemoryMap([])
    assert memory.translate(0, 1) is None
    memory.close()


# GuestMemory


def test_guest_memory() -> None:
    """Memory that we make is one region: writable here, mapped elsewhere, with uva beside gpa."""
    with GuestMemory.create(2 * PAGE, gpa=0x10_0000) as memory:
        memory.region.check()
        assert (memory.region.gpa, memory.region.size, memory.region.uva) == (
            0x10_0000,
            2 * PAGE,
            DEFAULT_UVA_BASE + 0x10_0000,
        )
        mapped = MemoryMap([memory.region])
        memory.buf[5:8] = b"abc"
        assert mapped.read(0x10_0000 + 5, 3) == b"abc"
        mapped.close()
        with mmap.mmap(memory.fd, memory.size) as other:
            assert other[5:8] == b"abc"


def test_guest_memory_address() -> None:
    """The front-end address can be chosen."""
    with GuestMemory.create(PAGE, uva=0x1234_0000) as memory:
        assert memory.region.uva == 0x1234_0000  # noqa: PLR2004 (the one above)
