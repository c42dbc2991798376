"""A Linux guest that nobody changed, with a disk and with a source of random numbers of ours."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.helpers import seed
from tests.peers.guest import MEMORY, PROGRAM, Guest
from tests.peers.image import Image
from tests.peers.server import Server
from vhostmp import qemu

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(300)]

DISK = "/dev/vda"
MEBIBYTES = 32
SECTOR = 512
QUEUES = 2


class Machine:
    """What a test starts and ends: a back-end, and guests on it one after the other."""

    def __init__(self, stack: ExitStack, image: Image, folder: Path) -> None:
        """Keep what they need."""
        self._stack = stack
        self._image = image
        self._folder = folder
        self._boots = 0

    def serve(self, device: str, backend: str, *options: str) -> Server:
        """Start the back-end."""
        words = ["--device", device, *options]
        return self._stack.enter_context(Server(backend, self._folder, options=words))

    def boot(self, server: Server, device: str, queues: int = 1) -> Guest:
        """Boot a guest; its caller ends it."""
        self._boots += 1
        folder = self._folder / f"boot{self._boots}"
        folder.mkdir()
        card = qemu.Card(path=str(server.socket), device=device, queues=queues, memory=MEMORY, msix=False)
        return Guest(self._image, qemu.options(card, qemu.probe_version(PROGRAM)), folder)


@pytest.fixture
def machine(guest_image: Image, tmp_path: Path) -> Iterator[Machine]:
    """Return what starts back-ends and guests, all ended after the test."""
    with ExitStack() as stack:
        yield Machine(stack, guest_image, tmp_path)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Return an image of random bytes."""
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(seed()).randbytes(MEBIBYTES << 20))
    return path


def checksum(guest: Guest, first: int = 0, count: int = MEBIBYTES) -> str:
    """Have the guest read megabytes from the disk, past its own cache, and add them up."""
    read = f"dd if={DISK} bs=1M skip={first} count={count} iflag=direct 2>/dev/null"
    return guest.run(f"{read} | sha256sum").split()[0]


def sha256(data: bytes) -> str:
    """Add up ourselves."""
    return hashlib.sha256(data).hexdigest()


def fill(guest: Guest, first: int, count: int) -> str:
    """Have the guest write random megabytes to the disk and flush; return the sum of what it meant to write."""
    guest.run(f"dd if=/dev/urandom of=/tmp/data bs=1M count={count} 2>/dev/null")
    guest.run(f"dd if=/tmp/data of={DISK} bs=1M seek={first} oflag=direct conv=fsync,notrunc 2>/dev/null")
    return guest.run("sha256sum </tmp/data").split()[0]


def has_served(server: Server, count: int) -> bool:
    """Whether the first queue has served so many requests."""
    return int(server.ring(0)["packets"]) >= count


def test_disk_holds_what_was_written_over_a_reboot(machine: Machine, disk: Path) -> None:
    """The guest reads what the file holds; what it wrote has the same checksum after a reboot, and in the file.

    Both queues are used, with requests of a mebibyte and of a sector.
    """
    server = machine.serve("blk", f"file:{disk}", "--queues", str(QUEUES), "--workers", str(QUEUES))
    with machine.boot(server, "blk", QUEUES) as guest:
        assert int(guest.run(f"blockdev --getsize64 {DISK}")) == MEBIBYTES << 20
        assert guest.run("ls /sys/block/vda/mq").split() == ["0", "1"]
        assert guest.run("cat /sys/block/vda/serial").strip("\0\n ") == disk.name
        assert "back" in guest.run("cat /sys/block/vda/cache_type")
        assert checksum(guest) == sha256(disk.read_bytes())
        written = fill(guest, 5, 8)
        guest.run(
            f"for cpu in 0 1; do taskset $((1 << cpu)) dd if={DISK} of=/dev/null bs=512 count=200 iflag=direct; done"
        )
        guest.run("sync")
    queues = server.show()["queues"]
    assert min(queue["packets"] for queue in queues) > 0, queues
    assert {"FLUSH", "MQ", "DISCARD", "WRITE_ZEROES", "BLK_SIZE"} <= set(server.show()["features"])
    assert sha256(disk.read_bytes()[5 << 20 : 13 << 20]) == written
    with machine.boot(server, "blk", QUEUES) as guest:
        assert checksum(guest, 5, 8) == written
        assert checksum(guest) == sha256(disk.read_bytes())


def test_disk_discards_and_zeroes(machine: Machine, disk: Path) -> None:
    """A discard of the guest's gives blocks back, and the guest's file system on the disk is whole after a reboot."""
    server = machine.serve("blk", f"file:{disk}")
    before = disk.stat().st_blocks
    with machine.boot(server, "blk") as guest:
        assert int(guest.run("cat /sys/block/vda/queue/discard_max_bytes")) > 0
        assert int(guest.run("cat /sys/block/vda/queue/write_zeroes_max_bytes")) > 0
        guest.run(f"blkdiscard -o {16 << 20} -l {8 << 20} {DISK}")
        assert checksum(guest, 16, 8) == sha256(bytes(8 << 20))
    assert disk.stat().st_blocks <= before - (8 << 20) // SECTOR
    assert disk.stat().st_size == MEBIBYTES << 20


def test_disk_write_through_is_the_guests_choice(machine: Machine, disk: Path) -> None:
    """The guest may switch the cache off and on; what it writes in between is there."""
    server = machine.serve("blk", f"file:{disk}")
    with machine.boot(server, "blk") as guest:
        guest.run("echo 'write through' >/sys/block/vda/cache_type")
        assert guest.run("cat /sys/block/vda/cache_type").strip() == "write through"
        written = fill(guest, 0, 4)
        guest.run("echo 'write back' >/sys/block/vda/cache_type")
        assert checksum(guest, 0, 4) == written
    assert sha256(disk.read_bytes()[: 4 << 20]) == written


def test_disk_read_only(machine: Machine, disk: Path) -> None:
    """The guest sees that the disk cannot be written, reads it, and cannot write it."""
    before = sha256(disk.read_bytes())
    server = machine.serve("blk", f"file:{disk},readonly")
    with machine.boot(server, "blk") as guest:
        assert guest.run("cat /sys/block/vda/ro").strip() == "1"
        status, _ = guest.attempt(f"dd if=/dev/zero of={DISK} bs=512 count=1 oflag=direct")
        assert status != 0
        assert checksum(guest) == before
    assert sha256(disk.read_bytes()) == before


def test_disk_grows(machine: Machine, disk: Path) -> None:
    """The guest hears that its disk is larger, and uses what has come."""
    server = machine.serve("blk", f"file:{disk}")
    with machine.boot(server, "blk") as guest:
        os.truncate(disk, (MEBIBYTES + 8) << 20)
        server.swap(f"file:{disk}")
        size = f"[ $(blockdev --getsize64 {DISK}) = {(MEBIBYTES + 8) << 20} ]"
        server.wait_for(lambda: guest.attempt(size)[0] == 0, "the guest's disk to grow")
        written = fill(guest, MEBIBYTES, 8)
    assert sha256(disk.read_bytes()[MEBIBYTES << 20 :]) == written


def test_disk_swapped_and_worker_killed_under_load(machine: Machine, disk: Path, tmp_path: Path) -> None:
    """While the guest writes, workers are killed, and the image is swapped for a copy: no write fails or is lost."""
    server = machine.serve("blk", f"file:{disk}")
    with machine.boot(server, "blk") as guest:
        guest.run("dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null")
        wanted = guest.run("sha256sum </tmp/data").split()[0]
        write = f"dd if=/tmp/data of={DISK} bs=64k oflag=direct conv=fsync,notrunc 2>/dev/null"
        job = guest.start("sh", "-c", f"while [ ! -e /tmp/stop ]; do {write} || exit 1; done")
        for _ in range(3):
            ring = server.ring(0)
            os.kill(ring["worker_pid"], signal.SIGKILL)
            server.wait_for(partial(has_served, server, ring["packets"] + 300), "writes going on")
        guest.run("touch /tmp/stop")
        status, output = guest.join(job)
        assert status == 0, output
        server.wait_for(lambda: server.log.count("replaced by pid") == len(range(3)), "three replacements")
        assert checksum(guest, 0, 16) == wanted
        other = tmp_path / "other.img"
        other.write_bytes(disk.read_bytes())
        server.swap(f"file:{other}")
        assert checksum(guest, 0, 16) == wanted
        written = fill(guest, 20, 2)
    assert sha256(other.read_bytes()[20 << 20 : 22 << 20]) == written
    assert sha256(disk.read_bytes()[20 << 20 : 22 << 20]) != written


def test_random_numbers(machine: Machine) -> None:
    """The guest's hardware generator is ours: it gives bytes that differ, and go on after a swap and a kill."""
    server = machine.serve("rng", "urandom")
    with machine.boot(server, "rng") as guest:
        assert guest.run("cat /sys/class/misc/hw_random/rng_current").strip().startswith("virtio_rng")

        def read() -> str:
            return guest.run("dd if=/dev/hwrng bs=64 count=16 iflag=fullblock 2>/dev/null | sha256sum").split()[0]

        empty = sha256(b"")
        sums = {read() for _ in range(4)}
        assert len(sums) == len(range(4))
        assert empty not in sums
        server.swap("file:/dev/zero")
        # What the guest has asked for before is in its buffers: the third is new.
        assert [read() for _ in range(3)][-1] == sha256(bytes(1024))
        server.swap("urandom")
        os.kill(server.ring(0)["worker_pid"], signal.SIGKILL)
        assert [read() for _ in range(3)][-1] not in {*sums, empty, sha256(bytes(1024))}
        server.wait_for(lambda: "replaced by pid" in server.log, "the worker's replacement")
