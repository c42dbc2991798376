"""Migration of the device's state: whole or not at all, whoever is slow, whatever is sent."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import wait_until
from tests.rig import MEMORY_BYTES, Rig, descriptor_count
from vhostmp.consts import ProtocolFeature, Request
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.shm import layout
from vhostmp.statetransfer import STATE_MAX
from vhostmp.supervisor import Pool
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import REPLY_ACK, u64, vring

SAVE, LOAD = vring(0, 0), vring(1, 0)
NO_FD, FAILED = 0x100, 0x101


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A connection with DEVICE_STATE."""
    with Rig() as rig:
        rig.negotiate(REPLY_ACK | ProtocolFeature.DEVICE_STATE.mask)
        yield rig


def begin(rig: Rig, direction: bytes) -> tuple[int, int]:
    """Bring a pipe; return the reply and our end of it."""
    read, write = os.pipe()
    ours, theirs = (read, write) if direction == SAVE else (write, read)
    reply = rig.ask(Request.SET_DEVICE_STATE_FD, direction, [theirs]).u64
    os.close(theirs)
    return reply, ours


def check(rig: Rig) -> int:
    """Ask how it went."""
    return rig.ask(Request.CHECK_DEVICE_STATE).u64


def read_all(rig: Rig, fd: int) -> bytes:
    """Read to the end, letting the port write between."""
    data = b""
    while True:
        rig.settle()
        part = os.read(fd, 4096)
        if not part:
            os.close(fd)
            return data
        data += part


@pytest.mark.parametrize("size", [0, 10, 1 << 19])
def test_save(rig: Rig, size: int) -> None:
    """All of the state arrives, however small the pipe, then the end; the device says that it went well."""
    rig.device.private = os.urandom(size)
    count = descriptor_count()
    reply, fd = begin(rig, SAVE)
    assert reply == NO_FD
    assert read_all(rig, fd) == rig.device.private
    assert check(rig) == 0
    assert descriptor_count() == count
    assert check(rig) == 1


@pytest.mark.parametrize("settle", [False, True])
def test_load(rig: Rig, settle: bool) -> None:
    """What was written before the question is taken, noticed before the question or with it."""
    reply, fd = begin(rig, LOAD)
    assert reply == NO_FD
    for part in (b"good", b"ness"):
        os.write(fd, part)
        if settle:
            rig.settle()
    os.close(fd)
    assert check(rig) == 0
    assert rig.device.private == b"goodness"


def bad_content(fd: int) -> None:
    """Write what the device refuses."""
    os.write(fd, b"bad")
    os.close(fd)


def no_end(fd: int) -> None:
    """Write good data and do not close the pipe: it is left to the end of the test."""
    os.write(fd, b"good")


@pytest.mark.parametrize(
    ("write", "why"), [(bad_content, "not good"), (no_end, "has not ended"), (os.close, "not good")]
)
def test_a_bad_load(rig: Rig, write: Callable[[int], None], why: str, caplog: pytest.LogCaptureFixture) -> None:
    """A state that is wrong, or has no end when the question comes, is refused with one line; nothing has changed."""
    before, count = rig.state(), descriptor_count()
    _, fd = begin(rig, LOAD)
    with caplog.at_level(logging.WARNING):
        write(fd)
        assert check(rig) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("device 0: state not transferred: ")
    assert why in record.getMessage()
    if write is no_end:
        os.close(fd)
    assert rig.state() == before
    assert descriptor_count() == count


def test_too_much(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """An endless state is given up at the bound, and the pipe is closed."""
    _, fd = begin(rig, LOAD)
    sent = 0
    with contextlib.suppress(BrokenPipeError):
        while sent < 2 * STATE_MAX:
            sent += os.write(fd, b"good" * 1000)
            rig.settle()
    os.close(fd)
    assert sent < STATE_MAX + (1 << 18)
    assert check(rig) == 1
    assert f"more than {STATE_MAX} bytes" in caplog.text


def test_a_reader_that_goes(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """A front-end that closes its end of the pipe early learns that it failed."""
    rig.device.private = bytes(1 << 20)
    _, fd = begin(rig, SAVE)
    os.close(fd)
    rig.settle()
    assert check(rig) == 1
    assert "cannot write: Broken pipe" in caplog.text


def test_only_while_suspended(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """While a ring runs nothing is transferred; a load is refused too when a ring was started meanwhile."""
    with frontend.memfd(MEMORY_BYTES) as memory, frontend.eventfds(2) as fds:
        rig.give_memory(memory)
        rig.set_ring(0)
        _, pending = begin(rig, LOAD)
        rig.start_ring(0, *fds)
        os.write(pending, b"good")
        os.close(pending)
        assert check(rig) == 1
        for direction in (SAVE, LOAD):
            reply, fd = begin(rig, direction)
            os.close(fd)
            assert reply == FAILED
        assert caplog.text.count("a ring runs: stop all of them first") == 3  # noqa: PLR2004
        assert rig.do(Request.SET_FEATURES, u64(rig.device.acked_features | 1 << 30)) == 0


@pytest.mark.parametrize("direction", [SAVE, LOAD], ids=["save", "load"])
def test_a_pipe_that_would_block(rig: Rig, direction: bytes) -> None:
    """A front-end that clears O_NONBLOCK of the pipe that it gave holds nobody up: the loop turns."""
    rig.device.private = bytes(1 << 19)
    read, write = os.pipe()
    ours, theirs = (read, write) if direction == SAVE else (write, read)
    assert rig.ask(Request.SET_DEVICE_STATE_FD, direction, [theirs]).u64 == NO_FD
    os.set_blocking(theirs, True)  # the flag is that of the open file, which the port has too
    if direction == LOAD:
        os.write(ours, b"good")
    else:
        assert os.read(ours, 1 << 13)  # room for less than is written at a time
    turn = threading.Thread(target=rig.settle, daemon=True)
    turn.start()
    turn.join(5)
    stuck = turn.is_alive()
    os.close(ours)  # which ends a wait, too
    turn.join()
    os.close(theirs)
    assert not stuck


def test_what_is_no_channel(rig: Rig) -> None:
    """A file, memory or an eventfd is refused: the end of the data could not be told, or it could block."""
    with frontend.memfd() as memory, frontend.eventfds(1) as events:
        for fd in (memory, events[0]):
            for direction in (SAVE, LOAD):
                assert rig.ask(Request.SET_DEVICE_STATE_FD, direction, [fd]).u64 == FAILED


def test_a_transfer_that_is_left(rig: Rig) -> None:
    """A second transfer replaces the first; the end of the connection ends it: no descriptor stays."""
    count = descriptor_count()
    ends = [begin(rig, LOAD)[1] for _ in range(3)]
    assert descriptor_count() == count + 3 + 3
    for fd in ends:
        os.close(fd)
    rig.sock.close()
    rig.settle()
    assert descriptor_count() == count - 2


# --- the network device's --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device() -> Iterator[NetDevice]:
    """A network device of two queue pairs."""
    with Pool(workers=1) as pool:
        made = NetDevice(pool, queue_pairs=2)
        wait_until(lambda: pool.has_spare, what="the spare, which would come in the middle of a test")
        yield made
        made.close()


def test_there_and_back(device: NetDevice) -> None:
    """The guest's address and what the rings moved come back, into a device with fewer rings too."""
    state = {"version": 1, "class": "net", "mac": "02:00:00:00:00:09", "rings": [[1, 60], [2, 120], [0, 0], [3, 99]]}
    device.load_state(json.dumps(state).encode())
    assert json.loads(device.save_state()) == state
    shown = device.snapshot()["queues"]
    assert [(ring["packets"], ring["bytes"]) for ring in shown] == [(1, 60), (2, 120), (0, 0), (3, 99)]
    state["rings"] = [[5, 6]] * 9
    device.load_state(json.dumps(state).encode())
    assert json.loads(device.save_state())["rings"] == [[5, 6]] * 4
    device.load_state(json.dumps({**state, "mac": None, "rings": []}).encode())
    assert json.loads(device.save_state())["mac"] is None


GOOD = {"version": 1, "class": "net", "mac": None, "rings": [[1, 2]]}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        (b"[" * 100000, "is not JSON"),
        (b'{"version":' + b"9" * 100000 + b"}", "is not JSON"),
        (b"[]", "not that of a network device"),
        (json.dumps(GOOD | {"version": 2}).encode(), "has version 2, not 1"),
        (json.dumps(GOOD | {"version": "1"}).encode(), "network device"),
        (json.dumps(GOOD | {"class": "blk"}).encode(), "not that of a network device"),
        (json.dumps(GOOD | {"mac": "02:00"}).encode(), "no Ethernet address"),
        (json.dumps(GOOD | {"mac": "02:00:00:00:00:0g"}).encode(), "no Ethernet address"),
        (json.dumps(GOOD | {"mac": 7}).encode(), "network device"),
        (json.dumps(GOOD | {"rings": [[1]]}).encode(), "counters"),
        (json.dumps(GOOD | {"rings": [[1, -1]]}).encode(), "counters"),
        (json.dumps(GOOD | {"rings": [[1, 1 << 64]]}).encode(), "counters"),
        (json.dumps(GOOD | {"rings": [[1, 1.5]]}).encode(), "counters"),
        (json.dumps(GOOD | {"rings": 5}).encode(), "network device"),
    ],
    ids=range(16),
)
def test_hostile_states(device: NetDevice, data: bytes, why: str) -> None:
    """What `save_state` never returns is refused in one line, and nothing has changed."""
    before = device.save_state()
    with pytest.raises(LocalError, match=why) as caught:
        device.load_state(data)
    assert "\n" not in str(caught.value)
    assert device.save_state() == before


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), st.lists, max_leaves=8
)


@given(st.dictionaries(st.sampled_from(["version", "class", "mac", "rings"]), values | st.sampled_from([1, "net"])))
def test_any_state(device: NetDevice, state: dict[str, object]) -> None:
    """Whatever the fields hold, the state is taken or refused by LocalError."""
    try:
        device.load_state(json.dumps({**GOOD, **state}).encode())
    except LocalError:
        return
    buf = device._pool.buf  # pyright: ignore[reportPrivateUsage]
    assert layout.RING.read(buf, layout.ring_offset(device.first_ring), "packets") >= 0
