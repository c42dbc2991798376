"""The disk: what is written is read back, whatever the driver cuts it into; a wrong request does nothing at all."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from tests.dirty import LOG_ALL, PAGE, DirtyLog, pages
from tests.helpers import seed, wait_until
from tests.integration import devices
from tests.integration.disks import (
    ALL,
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
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
from tests.request_driver import (
    BUFFER_BYTES,
    F_RING_PACKED,
    FILL,
    RequestGuest,
    blk_header,
    blk_range,
)
from tests.stuck import gives_up
from vhostmp import consts
from vhostmp.blk import BlkDevice, open_disk
from vhostmp.errors import LocalError, SynchronizeTimeout, VhostError
from vhostmp.supervisor import Pool
from vhostmp.workers.devices.blk import RANGE_SECTORS_MAX

SECTORS = 2048
LARGEST_BYTES = 126 << 20  # of one request: seg_max times size_max
CONFIG_BYTES = 60  # struct virtio_blk_config, up to write_zeroes_may_unmap and its padding


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of two workers."""
    with Pool(workers=2) as two:
        yield two


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file of random bytes."""
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(seed()).randbytes(SECTORS * SECTOR))
    return path


@pytest.fixture
def device(pool: Pool, image: Path) -> Iterator[BlkDevice]:
    """Return a disk with two queues."""
    with closing(BlkDevice(pool, backend=f"file:{image}", num_queues=2)) as made:
        yield made


@pytest.fixture(params=[0, F_RING_PACKED], ids=["split", "packed"])
def guest(device: BlkDevice, request: pytest.FixtureRequest) -> Iterator[RequestGuest]:
    """Return a guest that uses all that the disk offers, with rings of either format."""
    with RequestGuest(device, features=(ALL | request.param) & device.get_features()) as made:
        yield made


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """Cut into pieces; what is left is the last one."""
    pieces: list[bytes] = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [piece for piece in (*pieces, data) if piece]


def test_what_is_written_is_read(guest: RequestGuest, image: Path) -> None:
    """Each queue sees what the other wrote, and so does the file; what was there is read."""
    content = image.read_bytes()
    assert read(guest, 5, 3) == content[5 * SECTOR : 8 * SECTOR]
    data = random.Random(seed()).randbytes(9 * SECTOR)
    write(guest, 100, data, queue=1)
    assert read(guest, 99, 11) == content[99 * SECTOR : 100 * SECTOR] + data + content[109 * SECTOR : 110 * SECTOR]
    assert status(guest.ask(blk_header(FLUSH), [1])) == OK
    assert image.read_bytes()[100 * SECTOR : 109 * SECTOR] == data


@pytest.mark.parametrize("at", [1, 3, 4, 7, 8, 15, 16, 17])
def test_header_is_cut_anywhere(guest: RequestGuest, at: int) -> None:
    """The driver may cut a request at any byte (2.7.4.2): header, data, and room for data and status."""
    data = bytes(range(256)) * 4
    answer = guest.ask(cut(blk_header(OUT, 7) + data, [at, 100, 1]), [1])
    assert status(answer) == OK
    answer = guest.ask(cut(blk_header(IN, 7), [at]), [1, 600, 2 * SECTOR - 601 + 1])
    assert (answer.data, answer.length) == (data + b"\0", 2 * SECTOR + 1)


def test_random_requests(guest: RequestGuest, image: Path) -> None:
    """Random reads, writes, discards and zeroes, cut at random, leave the file as they leave a copy of it."""
    rng = random.Random(seed())
    copy = bytearray(image.read_bytes())
    for _ in range(300):
        count = rng.randint(1, 32)
        sector = rng.randint(0, SECTORS - count)
        span = slice(sector * SECTOR, (sector + count) * SECTOR)
        queue = rng.randint(0, 1)
        match rng.choice(("read", "write", "zero", "discard")):
            case "read":
                sizes = [rng.randint(1, 3000) for _ in range(rng.randint(0, 5))]
                total = count * SECTOR + 1
                while sum(sizes) >= total:
                    sizes.pop()
                answer = guest.ask(
                    cut(blk_header(IN, sector), [rng.randint(1, 16)]), [*sizes, total - sum(sizes)], queue=queue
                )
                assert answer.data == bytes(copy[span]) + b"\0"
            case "write":
                copy[span] = rng.randbytes(count * SECTOR)
                pieces = cut(blk_header(OUT, sector) + bytes(copy[span]), [rng.randint(1, 900) for _ in range(4)])
                assert status(guest.ask(pieces, [1], queue=queue)) == OK
            case "zero":
                copy[span] = bytes(count * SECTOR)
                flags = rng.randint(0, UNMAP)
                ranges = blk_range(sector, count, flags)
                assert status(guest.ask([blk_header(WRITE_ZEROES), ranges], [1], queue=queue)) == OK
            case _:
                assert status(guest.ask([blk_header(DISCARD), blk_range(sector, count)], [1], queue=queue)) == OK
                copy[span] = read(guest, sector, count)  # may be anything, and stays that
    assert status(guest.ask(blk_header(FLUSH), [1])) == OK
    assert image.read_bytes() == bytes(copy)


def test_discard_gives_blocks_back(guest: RequestGuest, image: Path) -> None:
    """A discard of aligned blocks makes the file smaller on its disk, not shorter; several ranges at once."""
    before = image.stat().st_blocks
    ranges = blk_range(0, 256) + blk_range(512, 256)
    assert status(guest.ask([blk_header(DISCARD), ranges], [1])) == OK
    assert image.stat().st_blocks < before
    assert image.stat().st_size == SECTORS * SECTOR
    assert read(guest, 0, 200) == bytes(200 * SECTOR)


def test_id_is_the_name(guest: RequestGuest, image: Path) -> None:
    """GET_ID returns 20 bytes, padded with zeros."""
    answer = guest.ask(blk_header(GET_ID), [20, 1])
    assert (answer.data, answer.length) == (image.name.encode().ljust(20, b"\0") + b"\0", 21)


MANY = 1 << 32
WRONG: list[tuple[str, bytes | list[bytes], list[int], int, int]] = [
    ("no header", b"\0", [1], IOERR, 1),
    ("header of 15 bytes", blk_header(OUT)[:15], [1], IOERR, 1),
    ("sector behind the end", [blk_header(OUT, SECTORS), bytes(SECTOR)], [1], IOERR, 1),
    ("last sector and one more", [blk_header(OUT, SECTORS - 1), bytes(2 * SECTOR)], [1], IOERR, 1),
    ("highest sector", [blk_header(OUT, (1 << 64) - 1), bytes(SECTOR)], [1], IOERR, 1),
    ("sector that wraps in bytes", [blk_header(OUT, 1 << 55), bytes(SECTOR)], [1], IOERR, 1),
    ("write of half a sector", [blk_header(OUT), bytes(100)], [1], IOERR, 1),
    ("read of half a sector", blk_header(IN), [100, 1], IOERR, 0),
    ("read behind the end", blk_header(IN, SECTORS), [SECTOR, 1], IOERR, 0),
    ("read that wraps", blk_header(IN, (1 << 64) - 1), [2 * SECTOR, 1], IOERR, 0),
    ("unknown type", blk_header(99), [1], UNSUPP, 1),
    ("SCSI command", blk_header(2), [1], UNSUPP, 1),
    ("secure erase", [blk_header(14), blk_range(0, 1)], [1], UNSUPP, 1),
    ("id with little room", blk_header(GET_ID), [19, 1], IOERR, 0),
    ("discard of nothing", blk_header(DISCARD), [1], IOERR, 1),
    ("discard of part of a range", [blk_header(DISCARD), blk_range(0, 8)[:15]], [1], IOERR, 1),
    ("discard with unmap", [blk_header(DISCARD), blk_range(0, 8, UNMAP)], [1], UNSUPP, 1),
    ("discard with a flag", [blk_header(DISCARD), blk_range(0, 8, 2)], [1], UNSUPP, 1),
    ("zeroes with a flag", [blk_header(WRITE_ZEROES), blk_range(0, 8, 2)], [1], UNSUPP, 1),
    ("zeroes behind the end", [blk_header(WRITE_ZEROES), blk_range(SECTORS - 1, 2)], [1], IOERR, 1),
    ("zeroes that wrap", [blk_header(WRITE_ZEROES), blk_range((1 << 64) - 1, 2)], [1], IOERR, 1),
    ("zeroes of all there is", [blk_header(WRITE_ZEROES), blk_range(0, MANY - 1)], [1], IOERR, 1),
    ("good range, bad range", [blk_header(WRITE_ZEROES), blk_range(0, 8) + blk_range(SECTORS, 1)], [1], IOERR, 1),
    ("17 ranges", [blk_header(DISCARD), blk_range(0, 8) * 17], [1], IOERR, 1),
]


@pytest.mark.parametrize(
    ("readable", "writable", "wanted", "length"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_wrong_request_does_nothing(
    guest: RequestGuest, image: Path, readable: bytes | list[bytes], writable: list[int], wanted: int, length: int
) -> None:
    """It ends in its status, the file is as it was, the length counts what was written from the start on; and on."""
    before = image.read_bytes()
    answer = guest.ask(readable, writable)
    assert (status(answer), answer.length) == (wanted, length)
    assert set(answer.data[:-1]) <= {FILL}
    assert image.read_bytes() == before
    assert read(guest, 0, 1) == before[:SECTOR]


def test_request_without_status_does_nothing(guest: RequestGuest, image: Path) -> None:
    """Where nothing can be written there is nobody to tell: the request comes back, nothing else happens."""
    before = image.read_bytes()
    answer = guest.ask([blk_header(OUT), bytes(SECTOR)])
    assert (answer.length, answer.data) == (0, b"")
    assert image.read_bytes() == before


def test_read_only(pool: Pool, image: Path) -> None:
    """A read-only disk says so, offers no discard, and refuses to be written whatever the driver does."""
    before = image.read_bytes()
    with closing(BlkDevice(pool, backend=f"file:{image},readonly")) as device:
        names = device.snapshot()["features"]
        assert "RO" in names
        assert "DISCARD" not in names
        with RequestGuest(device, features=ALL & device.get_features()) as guest:
            assert status(guest.ask([blk_header(OUT), bytes(SECTOR)], [1])) == IOERR
            assert status(guest.ask([blk_header(WRITE_ZEROES), blk_range(0, 8)], [1])) == UNSUPP
            assert status(guest.ask(blk_header(FLUSH), [1])) == OK
            assert read(guest, 0, 4) == before[: 4 * SECTOR]
    assert image.read_bytes() == before


def test_large_range_is_refused(pool: Pool, tmp_path: Path) -> None:
    """A range may have as many sectors as the configuration space says, not one more: a work item stays short."""
    image = tmp_path / "sparse.img"
    image.touch()
    os.truncate(image, 2 * RANGE_SECTORS_MAX * SECTOR)
    with (
        closing(BlkDevice(pool, backend=f"file:{image}")) as device,
        RequestGuest(device, features=ALL & device.get_features()) as guest,
    ):
        for kind in (DISCARD, WRITE_ZEROES):
            assert status(guest.ask([blk_header(kind), blk_range(0, RANGE_SECTORS_MAX)], [1])) == OK
            assert status(guest.ask([blk_header(kind), blk_range(0, RANGE_SECTORS_MAX + 1)], [1])) == IOERR


def test_large_request_is_refused(pool: Pool, tmp_path: Path) -> None:
    """One request moves 126 segments of a mebibyte at the most: more, made of the same memory again, is an error."""
    image = tmp_path / "sparse.img"
    image.touch()
    os.truncate(image, 1 << 30)
    with (
        closing(BlkDevice(pool, backend=f"file:{image}")) as device,
        RequestGuest(device, features=ALL & device.get_features()) as guest,
    ):
        room, table = guest.free.pop(), guest.free.pop()
        largest = [(room, BUFFER_BYTES)] * (LARGEST_BYTES // BUFFER_BYTES)
        for segments, wanted in ((largest, OK), ([*largest, (room, SECTOR)], IOERR)):
            guest.ask_at(blk_header(IN), [*segments, (room + 5, 1)], table=table)
            assert guest.memory.buf[room + 5] == wanted


def test_mistake_of_ours_is_an_error(pool: Pool, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in a request its driver learns that it failed, and the next ones are served."""
    monkeypatch.setattr("vhostmp.blk.REFERENCE", f"{devices.__file__}:FaultyDisk")
    pool.describe_device(f"{devices.__file__}:FaultyDisk")  # has workers import it, while they may
    with closing(BlkDevice(pool, backend=f"file:{image}")) as device, RequestGuest(device) as guest:
        heads = [guest.send(blk_header(kind), [SECTOR, 1]) for kind in (IN, GET_ID, IN, GET_ID)]
        assert [status(guest.wait(head)) for head in heads] == [IOERR, OK, IOERR, OK]


def test_file_that_shrinks_is_an_error(guest: RequestGuest, image: Path) -> None:
    """A file cut short under us makes requests fail, not the worker."""
    os.truncate(image, SECTOR)
    assert status(guest.ask(blk_header(IN, 0), [2 * SECTOR, 1])) == IOERR
    assert read(guest, 0, 1)


def test_configuration_space(device: BlkDevice) -> None:
    """Capacity, limits and number of queues stand where 5.2.4 puts them."""
    config = device.config
    assert config is not None
    assert len(config) == CONFIG_BYTES
    assert struct.unpack_from("<Q", config, 0) == (SECTORS,)
    assert struct.unpack_from("<II", config, 8) == (1 << 20, 126)
    assert struct.unpack_from("<I", config, 20) == (SECTOR,)
    assert config[32] == 1
    assert struct.unpack_from("<H", config, 34) == (2,)
    assert struct.unpack_from("<IIIII", config, 36) == (32768, 16, 8, 32768, 16)
    assert config[56] == 1


def test_write_mode(device: BlkDevice, guest: RequestGuest) -> None:
    """The driver may switch between write-back and write-through under load, and write nothing else."""
    for offset, data in ((32, b"\2"), (31, b"\0"), (32, b"\0\0"), (0, b"\0"), (60, b"\0")):
        with pytest.raises(LocalError, match="only writeback"):
            device.write_config(offset, data)
    for mode in (b"\0", b"\1", b"\0"):
        generation = device.snapshot()["generation"]
        device.write_config(32, mode)
        assert device.snapshot()["generation"] == generation + 1, "workers go on in the old mode"
        assert (device.config or b"")[32:33] == mode
        write(guest, 3, mode * SECTOR)
        assert read(guest, 3, 1) == mode * SECTOR
    guest.device.stop_all()
    assert (device.config or b"")[32:33] == b"\1"


def test_write_mode_that_is_refused(device: BlkDevice, guest: RequestGuest, pool: Pool) -> None:
    """A switch to write-back that is refused because a worker does not let go leaves write-through in force."""
    device.write_config(32, b"\0")
    with gives_up(), pytest.raises(SynchronizeTimeout):
        device.write_config(32, b"\1")
    assert (device.config or b"")[32:33] == b"\0"
    write(guest, 3, bytes(SECTOR))
    device.set_vring_enable(0, False)  # the verb that waits for what the other one did not
    device.set_vring_enable(0, True)
    part = device.state.backend
    assert part.options["arguments"]["write_through"] is True
    assert part.id in pool.worker(device.state.worker_of(0)).parts
    assert read(guest, 3, 1) == bytes(SECTOR)


@pytest.mark.parametrize(
    ("features", "mode", "through"),
    [((), True, True), ((9,), True, False), ((9,), False, False), ((9, 11), True, False), ((9, 11), False, True)],
)
def test_who_cannot_flush_is_served_write_through(
    image: Path, features: tuple[int, ...], mode: bool, through: bool
) -> None:
    """Without FLUSH a write is on stable storage when it is done; with CONFIG_WCE as the driver says (5.2.6.2)."""
    with closing(open_disk(f"file:{image}")) as disk:
        disk.write_back = mode
        assert disk.for_guest(consts.mask(features))["write_through"] is through


def test_swap_of_the_file(device: BlkDevice, guest: RequestGuest, tmp_path: Path) -> None:
    """After a swap reads and writes go to the new file, and to nothing but it; the old one may be used again."""
    old = read(guest, 8, 8)
    other = tmp_path / "other.img"
    other.write_bytes(b"\x55" * SECTORS * SECTOR)
    device.set_backend(f"file:{other}")
    assert read(guest, 8, 8, queue=1) == b"\x55" * 8 * SECTOR
    write(guest, 8, bytes(8 * SECTOR))
    device.set_backend(f"file:{tmp_path}/disk.img")
    assert read(guest, 8, 8) == old
    assert other.read_bytes()[8 * SECTOR : 16 * SECTOR] == bytes(8 * SECTOR)


def test_swap_to_a_smaller_disk_is_refused(device: BlkDevice, guest: RequestGuest, tmp_path: Path) -> None:
    """A guest knows how large its disk is and what it can do: less of either is refused, and the old one goes on."""
    other = tmp_path / "other.img"
    other.write_bytes(bytes((SECTORS - 1) * SECTOR))
    with pytest.raises(LocalError, match="the guest knows a disk of 2048"):
        device.set_backend(f"file:{other}")
    assert read(guest, 0, 1)
    guest.device.stop_all()
    with pytest.raises(LocalError, match="has no DISCARD WRITE_ZEROES"):
        device.set_backend(f"file:{other},readonly")
    device.set_backend(f"file:{other}")
    assert device.config is not None
    assert struct.unpack_from("<Q", device.config) == (SECTORS - 1,)


def test_disk_grows(device: BlkDevice, guest: RequestGuest, tmp_path: Path) -> None:
    """A swap to a larger image is told to whoever shows the configuration to the guest, which can use all of it."""
    told: list[bytes | None] = []
    device.on_config_change = lambda: told.append(device.config)
    other = tmp_path / "other.img"
    other.write_bytes(bytes(2 * SECTORS * SECTOR))
    device.set_backend(f"file:{other}")
    assert [struct.unpack_from("<Q", config or b"") for config in told] == [(2 * SECTORS,)]
    write(guest, 2 * SECTORS - 1, b"\x77" * SECTOR)
    assert other.read_bytes()[-SECTOR:] == b"\x77" * SECTOR


def test_two_writers_are_refused(pool: Pool, device: BlkDevice, image: Path) -> None:
    """An image that is in use cannot be opened again, not to read either, unless both say that they share it."""
    for spec in (f"file:{image}", f"file:{image},readonly", f"file:{image},share"):
        with pytest.raises(LocalError, match="in use"):
            BlkDevice(pool, backend=spec)
    device.close()
    first, second = open_disk(f"file:{image},share"), open_disk(f"file:{image},readonly")
    first.close()
    second.close()
    open_disk(f"file:{image}").close()


def test_everything_written_is_logged(device: BlkDevice, guest: RequestGuest) -> None:
    """While a guest migrates each page that a request changed is logged, a status behind a gap too, and none beside."""
    rng = random.Random(seed())
    with DirtyLog(guest.memory.size // PAGE // 8 + 1) as log:
        device.set_log_base(log.fd, log.size, log.offset)
        device.set_features(device.acked_features | LOG_ALL)
        for _ in range(200):
            size = rng.randint(1, 40) * SECTOR
            part = rng.randint(1, size - 1)
            kind, sector = rng.choice((IN, IN, OUT, GET_ID, 99)), rng.choice((0, SECTORS - 40, SECTORS - 1, 1 << 60))
            log.clear()
            answer = guest.ask(blk_header(kind, sector), [part, size - part, 1])
            assert status(answer) in (OK, IOERR, UNSUPP)
            changed = {(answer.gpa + at) // PAGE for at, byte in enumerate(answer.data) if byte != FILL}
            assert changed <= log.pages <= pages(answer.gpa, size + 1)
        guest.device.stop_all()


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("null", "no image 'null': use file:PATH"),
        ("file:", "no image 'file:'"),
        ("file:,readonly", "no image"),
        ("file:none", "file:none: no file none: make one, say with truncate -s 1G none, or give another path"),
        ("file:empty,ro", "no file empty,ro: and 'ro' is no option: those are readonly and share"),
        ("file:empty", "less than one sector"),
        ("file:.", "file:."),
        ("file:fifo", "neither a file nor a block device"),
        ("file:/dev/null", "neither a file nor a block device"),
    ],
)
def test_mistake_is_one_line(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, why: str) -> None:
    """What is no disk is refused in one line when it is named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_bytes(b"x" * 511)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(VhostError, match=why) as caught:
        BlkDevice(pool, backend=spec)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_queues_are_moved(device: BlkDevice, guest: RequestGuest) -> None:
    """A queue can be given to another worker with requests under way: each comes back once, done."""
    rng = random.Random(seed())
    for turn in range(8):
        wanted = {number: rng.randbytes(8 * SECTOR) for number in range(16)}
        heads = [guest.send([blk_header(OUT, 8 * number), data], [1]) for number, data in wanted.items()]
        device.attach_vring_worker(0, turn % 2)
        assert [status(guest.wait(head)) for head in heads] == [OK] * len(heads)
        for number, data in wanted.items():
            assert read(guest, 8 * number, 8) == data
    guest.rings[0].check_idle()


def replaced(pool: Pool, worker: int, pid: int) -> bool:
    """Whether a worker has another process."""
    return pool.workers[worker].pid != pid


@pytest.mark.slow
def test_killed_worker(pool: Pool, guest: RequestGuest, image: Path) -> None:
    """Requests under way when workers are killed are done all the same: each comes back once, and nothing is lost."""
    rng = random.Random(seed())
    for turn in range(6):
        wanted = {number: rng.randbytes(8 * SECTOR) for number in range(24)}
        heads = [
            (guest.send([blk_header(OUT, 8 * number), data], [1], queue=number % 2), number % 2)
            for number, data in wanted.items()
        ]
        pid = pool.workers[turn % 2].pid
        pool.kill_worker(turn % 2)
        for head, queue in heads:
            assert status(guest.wait(head, queue)) == OK
        wait_until(partial(replaced, pool, turn % 2, pid), what="a replacement")
        for number, data in wanted.items():
            assert read(guest, 8 * number, 8, queue=number % 2) == data
    for ring in guest.rings:
        ring.check_idle()
