"""Disks on real block devices: loop devices, whose image shows what became of each request."""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

import attrs
import pytest

from tests.helpers import seed
from tests.integration.disks import (
    ALL,
    DISCARD,
    FLUSH,
    IOERR,
    OK,
    OUT,
    SECTOR,
    UNMAP,
    UNSUPP,
    WRITE_ZEROES,
    read,
    status,
    write,
)
from tests.request_driver import RequestGuest, blk_header, blk_range
from vhostmp import blockdev
from vhostmp.blk import BlkDevice
from vhostmp.errors import LocalError, SysError
from vhostmp.supervisor import Pool

LOSETUP: Final = shutil.which("losetup")
BYTES: Final = 4 << 20
SECTORS: Final = BYTES // SECTOR
LARGE_BLOCK: Final = 4096


@attrs.frozen
class Loop:
    """A loop device and the file behind it."""

    path: str
    file: Path

    @property
    def allocated(self) -> int:
        """Bytes that the file takes up."""
        return self.file.stat().st_blocks * 512

    def queue(self, name: str) -> Path:
        """Return where sysfs has something of its queue."""
        return Path("/sys/block") / Path(self.path).name / "queue" / name


@contextmanager
def attached(file: Path, *options: str) -> Generator[Loop]:
    """Make a loop device of a file."""
    assert LOSETUP is not None
    done = subprocess.run([LOSETUP, "--find", "--show", *options, file], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    path = done.stdout.strip()
    try:
        yield Loop(path, file)
    finally:
        subprocess.run([LOSETUP, "--detach", path], check=True)


Make = Callable[..., Loop]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Return a function that makes loop devices of files of random bytes; options are those of losetup."""
    if os.geteuid() != 0 or LOSETUP is None:
        pytest.skip("a loop device needs root and the program losetup")
    with ExitStack() as stack:

        def one(*options: str, name: str = "disk.img") -> Loop:
            file = tmp_path / name
            file.write_bytes(random.Random(seed()).randbytes(BYTES))
            with file.open("rb") as written:
                os.fsync(written.fileno())  # before that a file system may count no blocks
            return stack.enter_context(attached(file, *options))

        yield one


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker."""
    with Pool(workers=1) as one:
        yield one


@contextmanager
def guest_on(pool: Pool, spec: str) -> Generator[RequestGuest]:
    """Make a guest with a disk."""
    with (
        closing(BlkDevice(pool, backend=spec)) as device,
        RequestGuest(device, features=ALL & device.get_features()) as guest,
    ):
        yield guest


def ask(guest: RequestGuest, kind: int, *ranges: bytes) -> int:
    """Ask for a discard or for zeros; return the status."""
    return status(guest.ask([blk_header(kind), b"".join(ranges)], [1]))


@pytest.mark.parametrize("block", [SECTOR, LARGE_BLOCK])
def test_configuration_is_the_devices(pool: Pool, make: Make, block: int) -> None:
    """Capacity, blocks and topology are those that the kernel tells of the device (5.2.4)."""
    loop = make("--sector-size", str(block))
    with closing(BlkDevice(pool, backend=f"file:{loop.path}")) as device:
        config = device.config
        assert config is not None

        def told(name: str) -> int:
            return int(loop.queue(name).read_text())

        assert struct.unpack_from("<Q", config, 0) == (SECTORS,)
        assert struct.unpack_from("<I", config, 20) == (told("logical_block_size"),) == (block,)
        exponent, offset, min_io, opt_io = struct.unpack_from("<BBHI", config, 24)
        assert block << exponent == told("physical_block_size")
        assert (offset, min_io * block, opt_io * block) == (0, told("minimum_io_size"), told("optimal_io_size"))
        assert struct.unpack_from("<I", config, 44) == (told("discard_granularity") // SECTOR,)


@pytest.mark.parametrize("block", [SECTOR, LARGE_BLOCK])
def test_random_requests(pool: Pool, make: Make, block: int) -> None:
    """Random writes, zeroes and discards, of sectors smaller than the device's blocks too, leave the file as a copy."""
    loop = make("--sector-size", str(block))
    rng = random.Random(seed())
    copy = bytearray(loop.file.read_bytes())
    with guest_on(pool, f"file:{loop.path}") as guest:
        for _ in range(100):
            count = rng.randint(1, 64)
            sector = rng.randint(0, SECTORS - count)
            span = slice(sector * SECTOR, (sector + count) * SECTOR)
            match rng.choice(("write", "zero", "discard")):
                case "write":
                    copy[span] = rng.randbytes(count * SECTOR)
                    write(guest, sector, bytes(copy[span]))
                case "zero":
                    copy[span] = bytes(count * SECTOR)
                    assert ask(guest, WRITE_ZEROES, blk_range(sector, count, rng.randint(0, UNMAP))) == OK
                case _:
                    assert ask(guest, DISCARD, blk_range(sector, count)) == OK
                    copy[span] = read(guest, sector, count)  # may be anything, and stays that
            sector = rng.randint(0, SECTORS - 8)
            assert read(guest, sector, 8) == copy[sector * SECTOR : (sector + 8) * SECTOR]
        assert status(guest.ask(blk_header(FLUSH), [1])) == OK
        assert loop.file.read_bytes() == bytes(copy)


@pytest.mark.parametrize("block", [SECTOR, LARGE_BLOCK])
def test_blocks_are_given_back(pool: Pool, make: Make, block: int) -> None:
    """A discard, and zeroes that may unmap, give blocks back to the file system behind; other zeroes keep them."""
    loop = make("--sector-size", str(block))
    with guest_on(pool, f"file:{loop.path}") as guest:
        before = loop.allocated
        assert ask(guest, WRITE_ZEROES, blk_range(0, 2048)) == OK
        assert status(guest.ask(blk_header(FLUSH), [1])) == OK
        assert loop.allocated == before
        assert ask(guest, DISCARD, blk_range(1, 2046), blk_range(4096, 8)) == OK
        assert loop.allocated <= before - 2000 * SECTOR
        assert read(guest, 8, 200) == bytes(200 * SECTOR)
        between = loop.allocated
        assert ask(guest, WRITE_ZEROES, blk_range(6144, 2048, UNMAP)) == OK
        assert loop.allocated == between - 2048 * SECTOR
        assert read(guest, 6144, 200) == bytes(200 * SECTOR)


def test_sparse_file_gives_blocks_back(pool: Pool, tmp_path: Path) -> None:
    """The same of a file itself, which has holes afterwards and is as long as it was."""
    file = tmp_path / "disk.img"
    file.write_bytes(random.Random(seed()).randbytes(BYTES))
    with guest_on(pool, f"file:{file}") as guest:
        assert status(guest.ask(blk_header(FLUSH), [1])) == OK
        before = file.stat().st_blocks
        assert ask(guest, WRITE_ZEROES, blk_range(0, 2048)) == OK
        assert file.stat().st_blocks == before
        assert ask(guest, WRITE_ZEROES, blk_range(0, 2048, UNMAP), blk_range(4096, 2048, UNMAP)) == OK
        assert file.stat().st_blocks == before - 2 * 2048
        assert ask(guest, DISCARD, blk_range(2048, 2048)) == OK
        assert file.stat().st_blocks == before - 3 * 2048
    assert file.stat().st_size == BYTES
    assert file.read_bytes()[: 6144 * SECTOR] == bytes(6144 * SECTOR)


def test_device_that_cannot_discard(pool: Pool, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One of which sysfs does not say that it can is not offered for it; zeroes still are, and are written."""
    loop = make()
    monkeypatch.setattr(blockdev, "SYSFS", tmp_path)  # a loop device cannot be told to discard again
    with guest_on(pool, f"file:{loop.path}") as guest:
        names = guest.device.snapshot()["features"]
        assert "DISCARD" not in names
        assert "WRITE_ZEROES" in names
        assert ask(guest, DISCARD, blk_range(0, 8)) == UNSUPP
        assert ask(guest, WRITE_ZEROES, blk_range(3, 17, UNMAP)) == OK
        assert read(guest, 3, 17) == bytes(17 * SECTOR)


def test_read_only_device(pool: Pool, make: Make) -> None:
    """One is refused unless the user says that it is only to be read, and then it is."""
    loop = make("--read-only")
    before = loop.file.read_bytes()
    with pytest.raises(SysError, match=f"cannot be written .*: use file:{loop.path},readonly"):
        BlkDevice(pool, backend=f"file:{loop.path}")
    with guest_on(pool, f"file:{loop.path},readonly") as guest:
        assert "RO" in guest.device.snapshot()["features"]
        assert status(guest.ask([blk_header(OUT), bytes(SECTOR)], [1])) == IOERR
        assert ask(guest, WRITE_ZEROES, blk_range(0, 8)) == UNSUPP
        assert read(guest, 5, 8) == before[5 * SECTOR : 13 * SECTOR]
    assert loop.file.read_bytes() == before


def test_device_in_use(pool: Pool, make: Make) -> None:
    """A device that somebody else has for himself, as a mount does, is not written to, unless it is to be shared."""
    loop = make()
    with closing(BlkDevice(pool, backend=f"file:{loop.path}")):
        with pytest.raises(OSError, match="busy"):
            os.open(loop.path, os.O_RDONLY | os.O_EXCL)
        with pytest.raises(LocalError, match="in use"):
            BlkDevice(pool, backend=f"file:{loop.path}")
    other = os.open(loop.path, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(LocalError, match="in use, mounted"):
            BlkDevice(pool, backend=f"file:{loop.path}")
        BlkDevice(pool, backend=f"file:{loop.path},share").close()
    finally:
        os.close(other)


@pytest.mark.parametrize("kind", ["device", "file"])
def test_image_that_has_grown(pool: Pool, make: Make, kind: str) -> None:
    """A swap to the image in use measures it again: the guest is told that its disk is larger, and can use it all."""
    loop = make()
    image = loop.path if kind == "device" else str(loop.file)
    with guest_on(pool, f"file:{image}") as guest:
        device, told = guest.device, list[bytes | None]()
        assert isinstance(device, BlkDevice)
        device.on_config_change = lambda: told.append(device.config)
        device.set_backend(f"file:{image}")
        assert told == []
        os.truncate(loop.file, 2 * BYTES)
        if kind == "device":
            assert LOSETUP is not None
            subprocess.run([LOSETUP, "--set-capacity", loop.path], check=True)
        device.set_backend(f"file:{image}")
        assert [struct.unpack_from("<Q", config or b"") for config in told] == [(2 * SECTORS,)]
        write(guest, 2 * SECTORS - 1, b"\x77" * SECTOR)
        assert status(guest.ask(blk_header(FLUSH), [1])) == OK
        assert loop.file.read_bytes()[-SECTOR:] == b"\x77" * SECTOR
        with pytest.raises(LocalError, match="in use"):
            BlkDevice(pool, backend=f"file:{image}")


def test_flush_that_failed_is_not_forgotten(pool: Pool, tmp_path: Path) -> None:
    """Writes that were lost are not found again by measuring the image anew: no flush of it succeeds any more."""
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(BYTES))
    with guest_on(pool, f"file:{file}") as guest:
        assert status(guest.ask(blk_header(FLUSH), [1])) == OK
        _, note = guest.device.state.backend.fds
        os.pwrite(note, struct.pack("=I", errno.EIO), 0)
        guest.device.set_backend(f"file:{file}")
        assert status(guest.ask(blk_header(FLUSH), [1])) == IOERR
