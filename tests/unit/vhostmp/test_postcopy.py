"""The messages of post-copy: what is answered, what comes into force when, what is refused."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fakes import POSTCOPY_BASE as BASE
from tests.fakes import FakeDeviceWithPostcopy
from tests.rig import MEMORY_BYTES, UVA, Rig, descriptor_count
from vhostmp import postcopy
from vhostmp.consts import ProtocolFeature, Request, mask
from vhostmp.errors import SysError, WorkerDied
from vhostmp.postcopy import DevicePostcopy, PagedTable, PagersOf, Paging, may_make_userfaultfds
from vhostmp.shm._userfault import new_userfaultfd
from vhostmp.shm.memory import MemoryRegion
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import mem_table, memfd, region, single_region, u64, vring
from vhostmp.workers.processes import PagerProcess, WorkerProcess

FEATURES = mask((ProtocolFeature.REPLY_ACK, ProtocolFeature.PAGEFAULT, ProtocolFeature.CONFIGURE_MEM_SLOTS))
HALF = MEMORY_BYTES // 2
PAGE = 4096
OFFSET = 2 * PAGE
ACK = u64(0)
DUE = "came where the acknowledgement of SET_MEM_TABLE was due"


class PostcopyRig(Rig):
    """A connection to such a device, with PAGEFAULT negotiated."""

    device: FakeDeviceWithPostcopy

    def __init__(self) -> None:
        """Connect and negotiate."""
        super().__init__(FakeDeviceWithPostcopy())
        self.negotiate(FEATURES)

    def advise(self) -> None:
        """POSTCOPY_ADVISE: the answer has no payload, and one descriptor."""
        self.send(Request.POSTCOPY_ADVISE)
        self.settle()
        data, fds, _flags, _address = socket.recv_fds(self.sock, 100, 8)
        assert struct.unpack("=III", data) == (Request.POSTCOPY_ADVISE, frontend.VERSION | frontend.REPLY, 0)
        (fd,) = fds
        assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:userfaultfd")
        os.close(fd)

    def listen(self) -> None:
        """Begin."""
        self.advise()
        assert self.do(Request.POSTCOPY_LISTEN) == 0

    def table(self) -> list[int]:
        """Return where the regions in force begin."""
        self.settle()
        return [region.gpa for region in self.device.table]


@pytest.fixture
def rig() -> Iterator[PostcopyRig]:
    """Return a connection to a device that has post-copy."""
    rig = PostcopyRig()
    yield rig
    rig.close()


@pytest.fixture
def memory() -> Iterator[int]:
    """Return a file."""
    with memfd(MEMORY_BYTES) as fd:
        yield fd


def test_table(rig: PostcopyRig, memory: int) -> None:
    """In post-copy the table is answered with addresses, and in force once that is acknowledged; after END at once."""
    assert rig.ask(Request.GET_PROTOCOL_FEATURES).u64 & ProtocolFeature.PAGEFAULT.mask
    rig.listen()
    told = mem_table(region(0, HALF, UVA), region(HALF, HALF, UVA + HALF, HALF))
    reply = rig.ask(Request.SET_MEM_TABLE, told, [memory, memory])
    assert (reply.request, reply.flags) == (Request.SET_MEM_TABLE, frontend.VERSION | frontend.REPLY)
    assert reply.payload == mem_table(region(0, HALF, BASE), region(HALF, HALF, BASE + HALF, HALF))
    assert rig.table() == []
    rig.send(Request.SET_MEM_TABLE, ACK)
    assert rig.table() == [0, HALF]
    end = rig.ask(Request.POSTCOPY_END)
    assert (end.request, end.u64) == (Request.POSTCOPY_END, 0)
    rig.give_memory(memory)
    assert rig.table() == [0]


def test_regions(rig: PostcopyRig, memory: int) -> None:
    """Regions are answered one by one and come into force together, by one acknowledgement.

    QEMU tells them once more for its next queue pair: the same answers, no region twice, one more acknowledgement; and
    it acknowledges when it has only taken some back.
    """
    rig.listen()
    told = [single_region(region(at, HALF, UVA + at, at)) for at in (0, HALF)]
    for _ in range(2):
        for at, packed in zip((0, HALF), told, strict=True):
            reply = rig.ask(Request.ADD_MEM_REG, packed, [memory])
            assert reply.request == Request.ADD_MEM_REG
            assert reply.payload == single_region(region(at, HALF, BASE + at, at))
        rig.send(Request.ADD_MEM_REG, ACK)
        assert rig.table() == [0, HALF]
    assert rig.do(Request.REM_MEM_REG, told[0]) == 0
    assert rig.table() == [0, HALF], "told twice, taken back once"
    assert rig.do(Request.REM_MEM_REG, told[0]) == 0
    rig.send(Request.REM_MEM_REG, ACK)
    assert rig.table() == [HALF]


@pytest.mark.parametrize(
    ("request_", "payload", "text"),
    [
        (Request.SET_MEM_TABLE, u64(1), "SET_MEM_TABLE: payload 0x1 says that the front-end failed"),
        (
            Request.SET_VRING_NUM,
            vring(0, 256),
            f"SET_VRING_NUM: {DUE}",
        ),
        (Request.POSTCOPY_END, b"", f"POSTCOPY_END: {DUE}"),
        (Request.GET_FEATURES, b"", f"GET_FEATURES: {DUE}"),
    ],
)
def test_wrong_acknowledgement(
    rig: PostcopyRig, memory: int, caplog: pytest.LogCaptureFixture, request_: Request, payload: bytes, text: str
) -> None:
    """What is no acknowledgement of a table ends the connection, in one line; the table is forgotten."""
    count = descriptor_count()
    rig.listen()
    rig.ask(Request.SET_MEM_TABLE, mem_table(region(0, HALF, UVA)), [memory])
    rig.send(request_, payload, need_reply=True)
    assert rig.hung_up()
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line == f"device 0: {text}; connection closed"
    assert len(rig.device.table) == 0
    assert descriptor_count() == count - 1  # the connection's


def test_table_twice(rig: PostcopyRig, memory: int) -> None:
    """A second table before the first is acknowledged ends the connection; so does one among regions."""
    rig.listen()
    rig.ask(Request.ADD_MEM_REG, single_region(region(0, HALF, UVA)), [memory])
    rig.send(Request.SET_MEM_TABLE, mem_table(region(0, HALF, UVA)), [memory])
    assert rig.hung_up()


def test_hang_up_before_the_acknowledgement(rig: PostcopyRig, memory: int) -> None:
    """A front-end that goes without an acknowledgement leaves no descriptor behind."""
    count = descriptor_count()
    rig.listen()
    rig.ask(Request.SET_MEM_TABLE, mem_table(region(0, HALF, UVA)), [memory])
    assert descriptor_count() == count + 1
    rig.sock.shutdown(socket.SHUT_RDWR)
    rig.settle()
    assert descriptor_count() == count - 1


@pytest.mark.parametrize("request_", [Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.REM_MEM_REG])
def test_acknowledgement_of_nothing(rig: PostcopyRig, request_: Request) -> None:
    """An acknowledgement outside of post-copy is refused, one of nothing in post-copy changes nothing."""
    assert rig.do(request_, ACK) != 0
    rig.listen()
    assert rig.do(request_, ACK) == 0


def test_order(rig: PostcopyRig) -> None:
    """LISTEN comes after ADVISE; END, which is answered in its own way, after LISTEN, and once."""
    assert rig.do(Request.POSTCOPY_LISTEN) != 0
    rig.listen()
    assert rig.ask(Request.POSTCOPY_END).u64 == 0
    rig.send(Request.POSTCOPY_END)
    assert rig.hung_up()


def test_refused_memory(rig: PostcopyRig, memory: int) -> None:
    """A table that no worker could map is refused before anything is told; another one may follow."""
    rig.listen()
    assert rig.do(Request.SET_MEM_TABLE, mem_table(region(0, 2 * MEMORY_BYTES, UVA)), [memory]) != 0
    reply = rig.ask(Request.SET_MEM_TABLE, mem_table(region(0, HALF, UVA)), [memory])
    assert reply.payload == mem_table(region(0, HALF, BASE))
    assert [region.size for region in rig.device.postcopy.mapped] == [HALF]


def test_more_regions_than_the_device_takes(rig: PostcopyRig, memory: int) -> None:
    """Regions that wait for the acknowledgement are as many as the device takes, with a descriptor of ours each."""
    rig.device.max_regions = 2
    rig.listen()
    count = descriptor_count()
    told = [single_region(region(at * PAGE, PAGE, UVA + at * PAGE, at * PAGE)) for at in range(3)]
    for packed in told[:2]:
        assert rig.ask(Request.ADD_MEM_REG, packed, [memory]).payload != packed
    assert rig.do(Request.ADD_MEM_REG, told[2], [memory]) != 0
    assert descriptor_count() == count + 2
    rig.send(Request.ADD_MEM_REG, ACK)
    assert rig.table() == [0, PAGE]


@pytest.mark.parametrize("answered", [OFFSET - PAGE, OFFSET + 1, 1 << 64, "0", None])
def test_pager_that_lies(memory: int, answered: object) -> None:
    """The address that a pager tells is one of a page, with room for the file before it: else it is as good as dead."""

    class Pager:
        pid = 1

        def __init__(self) -> None:
            self.touches, self._other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def ask(self, message: object, fds: object) -> tuple[dict[str, object], list[int]]:
            return {"address": answered}, []

        def close(self) -> None:
            self.touches.close()
            self._other.close()

    class Nothing:
        def release(self, names: list[str]) -> None:
            assert not names

    notice = os.eventfd(0)
    paging = Paging(cast("PagersOf", Nothing()), cast("PagerProcess", Pager()), [], notice)
    with pytest.raises(WorkerDied, match="says that it mapped a region at"):
        paging.map([MemoryRegion(0, PAGE, UVA, memory, OFFSET)])
    paging.close()
    os.close(notice)


@pytest.mark.parametrize("start", [float("inf"), 1 << 64, 5, None])
def test_worker_that_lies(start: object) -> None:
    """A worker that names no place for its memory is killed, whatever it says, and its descriptor closed."""
    killed: list[bool] = []

    class Liar:
        index, pid = 0, 1

        def kill(self) -> None:
            killed.append(True)

    class Idle:
        relay = None

    fd = os.eventfd(0)
    table = PagedTable(cast("Paging", Idle()), ((0, PAGE, 0),))
    with pytest.raises(WorkerDied, match="did not say where its memory is"):
        table.add(cast("WorkerProcess", Liar()), 1, [[start, PAGE]], [fd])
    assert killed
    with pytest.raises(OSError, match="Bad file"):
        os.close(fd)


def test_regions_refused_in_the_end(rig: PostcopyRig, memory: int) -> None:
    """A region that the device refuses once it is acknowledged is not known: told again, it comes into force."""
    rig.listen()
    wrong, right = region(HALF // 2, HALF, UVA + HALF), region(HALF, HALF, UVA + HALF, HALF)
    for packed in (region(0, HALF, UVA), wrong, right):
        rig.ask(Request.ADD_MEM_REG, single_region(packed), [memory])
    assert rig.do(Request.ADD_MEM_REG, ACK) != 0
    assert rig.table() == [0]
    rig.ask(Request.ADD_MEM_REG, single_region(right), [memory])
    assert rig.do(Request.ADD_MEM_REG, ACK) == 0
    assert rig.table() == [0, HALF]


def test_pager_lost(rig: PostcopyRig, caplog: pytest.LogCaptureFixture) -> None:
    """When no page can come any more the connection is closed: there is no message for it."""
    rig.listen()
    os.eventfd_write(rig.device.postcopy.notice, 1)
    assert rig.hung_up()
    assert "device 0: post-copy: the pager has died: connection closed" in caplog.text


def test_not_offered(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where userfaultfds cannot be made there is no post-copy: no feature, and one line that says what it takes."""

    def denied(device: int = -1) -> int:
        raise SysError("cannot make a userfaultfd: Operation not permitted", 1)

    monkeypatch.setattr(postcopy, "new_userfaultfd", denied)
    monkeypatch.setattr(postcopy, "DEVICE", "/nonexistent")
    for sandboxed, why in (
        (False, "no permission for userfaultfd: it takes CAP_SYS_PTRACE"),
        (True, "workers in a sandbox need /nonexistent for it: No such file"),
    ):
        caplog.clear()
        pool: Any = SimpleNamespace(sandboxed=sandboxed)
        with caplog.at_level(logging.INFO):
            assert DevicePostcopy.make(pool, "0", 2, lambda: False) is None
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"device 0: post-copy is not offered: {why}")
    rig = Rig()
    assert not rig.ask(Request.GET_PROTOCOL_FEATURES).u64 & ProtocolFeature.PAGEFAULT.mask
    rig.negotiate()
    assert rig.do(Request.POSTCOPY_LISTEN) != 0
    rig.close()


@pytest.mark.skipif(not os.access(postcopy.DEVICE, os.R_OK | os.W_OK), reason="no access to /dev/userfaultfd")
def test_by_the_device_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system call is not allowed, and /dev/userfaultfd is, processes are given a descriptor of that."""
    real = new_userfaultfd

    def by_device(device: int = -1) -> int:
        if device < 0:
            raise SysError("cannot make a userfaultfd: Operation not permitted", 1)
        return real(device)

    monkeypatch.setattr(postcopy, "new_userfaultfd", by_device)
    fd = may_make_userfaultfds()
    made = real(fd)
    assert os.readlink(f"/proc/self/fd/{made}") == "anon_inode:[userfaultfd]"
    os.close(made)
    os.close(fd)
