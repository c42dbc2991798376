"""A session: messages become verbs, replies come after them, refusals change nothing."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Generator, Iterator, Sequence

import pytest

from tests.fakes import FEATURES, FakeDevice, trouble
from tests.rig import MEMORY_BYTES, RING_SIZE, UVA, Rig, descriptor_count
from vhostmp.consts import ProtocolFeature, Request, mask
from vhostmp.errors import LocalError, RingsLost, SynchronizeTimeout, WorkerDied
from vhostmp.protocol.messages import MESSAGES
from vhostmp.protocol.state import GOING_ON
from vhostmp.shm.memory import MemoryTable
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import NEED_REPLY, PROTOCOL_FEATURES, REPLY_ACK, VERSION, u64, vring, vring_addr
from vhostmp.verbs import offered_protocol_features

LOG_ALL = 1 << 26
OFFERED = mask(
    (
        ProtocolFeature.MQ,
        ProtocolFeature.LOG_SHMFD,
        ProtocolFeature.RARP,
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.NET_MTU,
        ProtocolFeature.INFLIGHT_SHMFD,
        ProtocolFeature.GET_VRING_BASE_INFLIGHT,
        ProtocolFeature.DEVICE_STATE,
        ProtocolFeature.INBAND_NOTIFICATIONS,
        ProtocolFeature.STATUS,
        ProtocolFeature.CONFIG,
        ProtocolFeature.BACKEND_REQ,
        ProtocolFeature.BACKEND_SEND_FD,
        ProtocolFeature.RESET_DEVICE,
        ProtocolFeature.CONFIGURE_MEM_SLOTS,
    )
)


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A front-end connected to a port."""
    with Rig() as rig:
        yield rig


@pytest.fixture
def memory() -> Generator[int, None, None]:
    """A memfd as large as the region that rigs send."""
    with frontend.memfd(MEMORY_BYTES) as fd:
        yield fd


@pytest.fixture
def events() -> Generator[Sequence[int], None, None]:
    """Four eventfds."""
    with frontend.eventfds(4) as fds:
        yield fds


# --- the usual course ------------------------------------------------------------------------------------------------


def test_handshake_as_qemu_does_it(rig: Rig, memory: int, events: Sequence[int]) -> None:
    """Negotiation before the owner, rings enabled before SET_FEATURES, everything answered, both rings run."""
    assert rig.ask(Request.GET_FEATURES).u64 == FEATURES | PROTOCOL_FEATURES
    assert rig.ask(Request.GET_PROTOCOL_FEATURES).u64 == OFFERED
    rig.send(Request.SET_PROTOCOL_FEATURES, u64(OFFERED))
    assert rig.ask(Request.GET_QUEUE_NUM).u64 == 1
    assert rig.ask(Request.GET_MAX_MEM_SLOTS).u64 == FakeDevice.max_regions
    rig.send(Request.SET_OWNER)
    for index in range(2):
        rig.send(Request.SET_VRING_CALL, u64(index), [events[index]])
        assert rig.do(Request.SET_VRING_ENABLE, vring(index, 1)) == 0
    assert rig.do(Request.SET_FEATURES, u64(FEATURES & ~LOG_ALL | PROTOCOL_FEATURES)) == 0
    region = frontend.single_region(frontend.region(0, MEMORY_BYTES, UVA))
    assert rig.do(Request.ADD_MEM_REG, region, [memory]) == 0
    for index in range(2):
        rig.set_ring(index)
        assert rig.do(Request.SET_VRING_KICK, u64(index), [events[2 + index]]) == 0
    assert rig.ask(Request.GET_STATUS).u64 == 0
    assert rig.do(Request.SET_STATUS, u64(7)) == 0
    device = rig.device
    assert device.acked_features == FEATURES & ~LOG_ALL
    assert [(ring.num, ring.started, ring.enabled) for ring in device.rings] == [(RING_SIZE, True, True)] * 2
    assert device.rings[1].desc == UVA + 0x10000
    # a second pair's SET_FEATURES repeats the bits while the first pair runs
    assert rig.do(Request.SET_FEATURES, u64(FEATURES & ~LOG_ALL | PROTOCOL_FEATURES)) == 0


def test_get_vring_base_stops_that_ring_alone(rig: Rig, memory: int, events: Sequence[int]) -> None:
    """GET_VRING_BASE stops its ring and returns its index; the other runs on; asked again the answer is the same."""
    rig.start_all(memory, events)
    rig.device.rings[1].base = 777
    for _ in range(2):
        reply = rig.ask(Request.GET_VRING_BASE, vring(1, 99))  # num has no meaning here
        assert (reply.request, reply.flags, reply.payload) == (Request.GET_VRING_BASE, 5, vring(1, 777))
    assert [ring.started for ring in rig.device.rings] == [True, False]


def test_get_vring_base_of_a_ring_that_never_ran(rig: Rig) -> None:
    """A ring that was never started has its base returned."""
    rig.negotiate()
    rig.send(Request.SET_VRING_BASE, vring(0, 5))
    assert rig.ask(Request.GET_VRING_BASE, vring(0, 0)).payload == vring(0, 5)


def test_stop_and_start_again(rig: Rig, memory: int, events: Sequence[int]) -> None:
    """After all rings are stopped everything may be set up anew, protocol features too."""
    rig.start_all(memory, events)
    for index in range(2):
        rig.ask(Request.GET_VRING_BASE, vring(index, 0))
    assert rig.do(Request.SET_PROTOCOL_FEATURES, u64(REPLY_ACK)) == 0
    for index in range(2):
        rig.set_ring(index)
        rig.start_ring(index, events[2 * index], events[2 * index + 1])
    assert all(ring.started for ring in rig.device.rings)


def test_call_may_change_while_running(rig: Rig, memory: int, events: Sequence[int]) -> None:
    """SET_VRING_CALL is taken any number of times while the ring runs, and leaves no descriptor behind."""
    rig.start_all(memory, events)
    before = descriptor_count()
    for round_ in range(100):
        assert rig.do(Request.SET_VRING_CALL, u64(0), [events[round_ % 4]]) == 0
    assert rig.do(Request.SET_VRING_CALL, u64(0x100)) == 0
    assert rig.device.rings[0].call is None
    assert rig.device.rings[0].started
    assert descriptor_count() == before - 1


def test_kick_may_change_while_running(rig: Rig, memory: int, events: Sequence[int]) -> None:
    """SET_VRING_KICK on a running ring replaces the descriptor and the ring runs on."""
    rig.start_all(memory, events)
    assert rig.do(Request.SET_VRING_KICK, u64(0), [events[3]]) == 0
    assert rig.device.rings[0].started


def test_kick_starts_the_ring_on_receipt(rig: Rig, memory: int, events: Sequence[int]) -> None:
    """A ring starts when its kick descriptor arrives, enabled or not, with or without call descriptor."""
    rig.negotiate()
    rig.give_memory(memory)
    rig.set_ring(0)
    assert not rig.device.rings[0].started
    assert rig.do(Request.SET_VRING_KICK, u64(0), [events[0]]) == 0
    assert (rig.device.rings[0].started, rig.device.rings[0].enabled) == (True, False)


def test_without_bit_30_rings_are_enabled_from_the_start(rig: Rig) -> None:
    """A front-end that does not ack bit 30 finds its rings enabled; one that does has to enable them."""
    rig.send(Request.SET_OWNER)
    rig.send(Request.SET_FEATURES, u64(FEATURES))
    rig.settle()
    assert [ring.enabled for ring in rig.device.rings] == [True, True]
    with Rig() as other:
        other.negotiate()
        assert [ring.enabled for ring in other.device.rings] == [False, False]


def test_enable_is_remembered(rig: Rig, memory: int, events: Sequence[int]) -> None:
    """The enable state outlives stopping and SET_FEATURES with bit 30; ENABLE 0 ends it."""
    rig.start_all(memory, events)
    for index in range(2):
        rig.ask(Request.GET_VRING_BASE, vring(index, 0))
    assert rig.do(Request.SET_FEATURES, u64(PROTOCOL_FEATURES)) == 0
    assert [ring.enabled for ring in rig.device.rings] == [True, True]
    assert rig.do(Request.SET_VRING_ENABLE, vring(0, 0)) == 0
    assert [ring.enabled for ring in rig.device.rings] == [False, True]


def test_reset_owner_only_disables(rig: Rig, memory: int, events: Sequence[int]) -> None:
    """RESET_OWNER disables the rings; owner, memory, features and started rings stay."""
    rig.start_all(memory, events)
    before = rig.state()
    assert rig.do(Request.RESET_OWNER) == 0
    assert not any(ring.enabled for ring in rig.device.rings)
    for ring in rig.device.rings:
        ring.enabled = True
    assert rig.state() == before


def test_reset_device(rig: Rig, memory: int, events: Sequence[int]) -> None:
    """RESET_DEVICE resets rings and features and keeps owner, memory and protocol features."""
    rig.start_all(memory, events)
    rig.ask(Request.GET_VRING_BASE, vring(0, 0))
    for index in range(2):
        rig.ask(Request.GET_VRING_BASE, vring(index, 0))
    assert rig.do(Request.SET_PROTOCOL_FEATURES, u64(OFFERED)) == 0
    rig.set_ring(0)
    rig.start_ring(0, events[0], events[1])
    assert rig.do(Request.RESET_DEVICE) == 0
    device = rig.device
    assert [(ring.started, ring.enabled, ring.base, ring.kick, ring.call) for ring in device.rings] == [
        (False, False, 0, None, None)
    ] * 2
    assert (device.owned, device.acked_features, len(device.table)) == (True, 0, 1)
    assert rig.do(Request.SET_FEATURES, u64(FEATURES)) == 0  # bit 30 may be chosen anew
    assert rig.do(Request.SET_PROTOCOL_FEATURES, u64(OFFERED)) == 0  # no ring runs


def test_memory_slots(rig: Rig, memory: int) -> None:
    """Regions come and go one by one; addresses and size tell which one goes, a descriptor means nothing."""
    rig.negotiate(OFFERED)
    first = frontend.single_region(frontend.region(0, 0x1000, UVA))
    second = frontend.single_region(frontend.region(0x1000, 0x1000, UVA + 0x1000, 0x1000))
    assert rig.do(Request.ADD_MEM_REG, first, [memory]) == 0
    assert rig.do(Request.ADD_MEM_REG, second, [memory]) == 0
    elsewhere = frontend.single_region(frontend.region(0x1000, 0x1000, UVA + 0x1000, 0x2000))
    assert rig.do(Request.ADD_MEM_REG, elsewhere, [memory]) != 0  # other memory under the same addresses
    offset_differs = frontend.single_region(frontend.region(0, 0x1000, UVA, 0x8000))
    assert rig.do(Request.REM_MEM_REG, offset_differs, [memory]) == 0
    assert rig.do(Request.REM_MEM_REG, first) != 0
    assert [region.gpa for region in rig.device.table] == [0x1000]


def test_memory_slot_told_twice(rig: Rig, memory: int) -> None:
    """A region that is told of twice, as QEMU 7.2 does with two queue pairs, goes when it was taken back twice."""
    rig.negotiate(OFFERED)
    region = frontend.single_region(frontend.region(0, 0x1000, UVA))
    assert rig.do(Request.ADD_MEM_REG, region, [memory]) == 0
    assert rig.do(Request.ADD_MEM_REG, region, [memory]) == 0
    assert len(rig.device.table) == 1
    assert rig.do(Request.REM_MEM_REG, region) == 0
    assert len(rig.device.table) == 1
    assert rig.do(Request.REM_MEM_REG, region) == 0
    assert len(rig.device.table) == 0
    assert rig.do(Request.REM_MEM_REG, region) != 0


@pytest.mark.parametrize("request_", [Request.REM_MEM_REG, Request.SET_MEM_TABLE])
def test_memory_that_goes_too_slowly(rig: Rig, memory: int, request_: Request) -> None:
    """Memory that went while a worker may still use it is new when it comes again, though its going was refused."""
    rig.negotiate(OFFERED)
    region = frontend.region(0, 0x1000, UVA)
    packed = frontend.single_region(region)
    other = frontend.mem_table(frontend.region(0x1000, 0x1000, UVA + 0x1000, 0x1000))
    assert rig.do(Request.ADD_MEM_REG, packed, [memory]) == 0
    verb = "remove_mem_region" if request_ == Request.REM_MEM_REG else "set_mem_table"
    taken = rig.device.table

    def late(entered: str) -> None:
        if entered == verb:
            rig.device.table = MemoryTable()
            raise SynchronizeTimeout("worker 0 (pid 1) is inside a work item")

    rig.device.fail = late
    payload, fds = (packed, []) if request_ == Request.REM_MEM_REG else (other, [memory])
    assert rig.do(request_, payload, fds) != 0
    for one in taken:
        os.close(one.fd)
    rig.device.fail = lambda _: None
    assert rig.do(Request.ADD_MEM_REG, packed, [memory]) == 0
    assert [one.gpa for one in rig.device.table] == [0]


def test_mtu_and_rarp(rig: Rig) -> None:
    """MTU and announcement reach the device."""
    rig.negotiate(OFFERED)
    assert rig.do(Request.NET_SET_MTU, u64(9000)) == 0
    assert rig.do(Request.SEND_RARP, b"\x02\0\0\0\0\x05\0\0") == 0
    assert (rig.device.mtu, rig.device.mac) == (9000, b"\x02\0\0\0\0\x05")


def test_log_base_is_always_answered(rig: Rig, memory: int) -> None:
    """SET_LOG_BASE is answered, once, whether an acknowledgement is asked for or not, and reaches the device."""
    rig.negotiate(OFFERED)
    for offset in (0, 0x1800):
        reply = rig.ask(Request.SET_LOG_BASE, frontend.log_area(0x100, offset), [memory])
        assert (reply.request, reply.u64) == (Request.SET_LOG_BASE, 0)
        assert rig.do(Request.SET_LOG_BASE, frontend.log_area(0x80, offset), [memory]) == 0
        assert rig.device.log is not None
        assert (rig.device.log.size, rig.device.log.offset) == (0x80, offset)
    assert rig.ask(Request.GET_QUEUE_NUM).request == Request.GET_QUEUE_NUM


def test_log_fd(rig: Rig, events: Sequence[int]) -> None:
    """SET_LOG_FD hands the eventfd on."""
    rig.negotiate(OFFERED)
    assert rig.do(Request.SET_LOG_FD, b"", [events[0]]) == 0
    assert rig.device.log_fd is not None


def test_a_log_that_is_refused_hangs_up(rig: Rig, memory: int) -> None:
    """QEMU takes any answer for success, so a log that cannot be used ends the connection."""
    rig.negotiate(OFFERED)
    rig.send(Request.SET_LOG_BASE, frontend.log_area(MEMORY_BYTES, 1), [memory], need_reply=True)
    assert rig.hung_up()


def test_busy_poll_time_is_given_to_every_ring() -> None:
    """A session with a busy-poll time sets it on each ring once there is an owner."""
    with Rig(busyloop_us=50) as rig:
        rig.negotiate()
        assert [ring.busyloop_us for ring in rig.device.rings] == [50, 50]


def test_queue_pairs_not_queues() -> None:
    """GET_QUEUE_NUM counts pairs."""
    pairs = 4
    with Rig(FakeDevice(queue_pairs=pairs)) as rig:
        assert rig.ask(Request.GET_QUEUE_NUM).u64 == pairs


def test_only_what_the_device_can_do_is_offered() -> None:
    """Protocol features that need a verb are offered only where the device has it."""

    class Bare:
        """A device with none of the optional verbs."""

    names = (
        ProtocolFeature.MQ,
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.RESET_DEVICE,
        ProtocolFeature.STATUS,
        ProtocolFeature.INFLIGHT_SHMFD,
        ProtocolFeature.GET_VRING_BASE_INFLIGHT,
    )
    assert offered_protocol_features(Bare()) == mask(names)
    assert offered_protocol_features(FakeDevice(), channel=True) == OFFERED


@pytest.mark.parametrize("slots", [False, True])
def test_a_ring_that_loses_its_memory(
    rig: Rig, memory: int, events: Sequence[int], caplog: pytest.LogCaptureFixture, slots: bool
) -> None:
    """Memory without a running ring in it is taken: that ring is stopped, the message succeeds, the rest goes on."""
    rig.start_all(memory, events)
    for index in range(2):
        rig.ask(Request.GET_VRING_BASE, vring(index, 0))
    assert rig.do(Request.SET_PROTOCOL_FEATURES, u64(OFFERED & ~ProtocolFeature.STATUS.mask)) == 0
    half = MEMORY_BYTES // 2
    far = [frontend.region(0, half, UVA), frontend.region(half, half, UVA + half, half)]
    assert rig.do(Request.SET_MEM_TABLE, frontend.mem_table(*far), [memory, memory]) == 0
    addr = vring_addr(1, desc=UVA + half, avail=UVA + half + 0x4000, used=UVA + half + 0x8000)
    assert rig.do(Request.SET_VRING_ADDR, addr) == 0
    for index in range(2):
        rig.start_ring(index, events[0], events[1])
    if slots:
        assert rig.do(Request.REM_MEM_REG, frontend.single_region(far[1])) == 0
    else:
        assert rig.do(Request.SET_MEM_TABLE, frontend.mem_table(far[0]), [memory]) == 0
    assert [ring.started for ring in rig.device.rings] == [True, False]
    assert [region.gpa for region in rig.device.table] == [0]
    assert "rings [1] are not in the new memory" in caplog.text


# --- acknowledgements ------------------------------------------------------------------------------------------------


def test_no_acknowledgement_unless_negotiated(rig: Rig) -> None:
    """NEED_REPLY without REPLY_ACK gets nothing: the next bytes are the answer to the next question."""
    rig.negotiate(0)
    rig.send(Request.SET_VRING_NUM, vring(0, 64), need_reply=True)
    assert rig.ask(Request.GET_QUEUE_NUM).request == Request.GET_QUEUE_NUM
    assert [ring.num for ring in rig.device.rings] == [64, 0]


def test_no_acknowledgement_unless_asked_for(rig: Rig) -> None:
    """A message without NEED_REPLY gets nothing, whatever is negotiated."""
    rig.negotiate()
    rig.send(Request.SET_VRING_NUM, vring(0, 64))
    assert rig.ask(Request.GET_QUEUE_NUM).request == Request.GET_QUEUE_NUM


def test_one_reply_to_a_question_with_need_reply(rig: Rig) -> None:
    """A message with a reply of its own gets exactly that one, NEED_REPLY or not."""
    rig.negotiate()
    for _ in range(2):
        rig.send(Request.GET_FEATURES, need_reply=True)
        assert rig.reply().u64 == FEATURES | PROTOCOL_FEATURES
    assert rig.ask(Request.GET_QUEUE_NUM).request == Request.GET_QUEUE_NUM


def test_negotiating_acknowledgements_is_not_acknowledged(rig: Rig) -> None:
    """The message that negotiates REPLY_ACK comes before it is negotiated."""
    rig.send(Request.SET_OWNER)
    rig.send(Request.SET_PROTOCOL_FEATURES, u64(REPLY_ACK), need_reply=True)
    assert rig.do(Request.SET_VRING_NUM, vring(0, 64)) == 0


def test_the_reply_comes_after_the_verb(rig: Rig) -> None:
    """While a verb works nothing has been sent; its return is what the acknowledgement stands for."""
    rig.negotiate()
    seen: list[bytes] = []

    def look(verb: str) -> None:
        rig.sock.setblocking(False)
        try:
            seen.append(rig.sock.recv(100))
        except BlockingIOError:
            seen.append(b"")
        rig.sock.settimeout(1)

    rig.device.fail = look
    assert rig.do(Request.SET_VRING_NUM, vring(0, 64)) == 0
    assert seen == [b""]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_refusal_is_told_and_the_session_goes_on(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """With REPLY_ACK a bad message gets a non-zero answer, one log line, and nothing else happens."""
    rig.negotiate()
    before = rig.state()
    with caplog.at_level(logging.WARNING):
        assert rig.do(Request.SET_VRING_NUM, vring(0, 0)) != 0
    assert rig.state() == before
    assert [record.getMessage() for record in caplog.records] == [
        "device 0: SET_VRING_NUM: num 0 is not in 1..32768 (descriptors); refused"
    ]
    assert rig.do(Request.SET_VRING_NUM, vring(0, 4)) == 0


def test_a_refusal_that_cannot_be_told_closes(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Without NEED_REPLY a bad message ends the connection with one log line; the device is free again."""
    rig.negotiate()
    with caplog.at_level(logging.WARNING):
        rig.send(Request.SET_VRING_NUM, vring(7, 4))
        assert rig.hung_up()
    assert [record.getMessage() for record in caplog.records] == [
        "device 0: SET_VRING_NUM: index 7 is not below 2, the number of rings; connection closed"
    ]
    assert rig.device.calls[-1] == "stop_all"
    assert not rig.device.owned
    assert rig.finished


def test_a_refusal_without_reply_ack_closes(rig: Rig) -> None:
    """NEED_REPLY on a bad message counts only once REPLY_ACK is negotiated: before, the connection is closed."""
    rig.negotiate(0)
    rig.send(Request.SET_VRING_NUM, vring(0, 0), need_reply=True)
    assert rig.hung_up()


def test_a_bad_question_closes(rig: Rig) -> None:
    """A message with a reply of its own has no room for a refusal: the connection ends."""
    rig.negotiate()
    rig.send(Request.GET_VRING_BASE, vring(2, 0), need_reply=True)
    assert rig.hung_up()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (LocalError("the ring runs", errno.EBUSY), "SET_VRING_NUM: index 0, num 64: the ring runs; refused"),
        (WorkerDied("worker 3 died"), "SET_VRING_NUM: index 0, num 64: worker 3 died (ESRCH); refused"),
        (SynchronizeTimeout("worker 1 is stuck"), "num 64: worker 1 is stuck (ETIMEDOUT); refused"),
    ],
)
def test_trouble_of_the_device_is_told(
    rig: Rig, caplog: pytest.LogCaptureFixture, error: LocalError, text: str
) -> None:
    """Whatever a verb raises is answered, and logged with the message, its fields and their values."""
    rig.negotiate()
    rig.device.fail = trouble("set_vring_num", error)
    with caplog.at_level(logging.WARNING):
        assert rig.do(Request.SET_VRING_NUM, vring(0, 64)) != 0
    assert text in caplog.text
    rig.device.fail = lambda verb: None
    assert rig.do(Request.SET_VRING_NUM, vring(0, 64)) == 0


def test_memory_that_is_refused(rig: Rig) -> None:
    """A table that no worker can map is refused, whatever the errno; only a table in force without a ring is not."""
    rig.negotiate()
    with frontend.memfd(MEMORY_BYTES) as memory:
        table = frontend.mem_table(frontend.region(0, MEMORY_BYTES, UVA))
        rig.device.fail = trouble("set_mem_table", LocalError("cannot map", errno.EFAULT))
        assert rig.do(Request.SET_MEM_TABLE, table, [memory]) != 0
        rig.device.fail = trouble("set_mem_table", RingsLost([0]))
        assert rig.do(Request.SET_MEM_TABLE, table, [memory]) == 0


def test_our_own_mistake_closes_that_connection_alone(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """An exception that is nobody's protocol error ends the connection, never the server."""
    rig.negotiate()

    def crash(verb: str) -> None:
        raise ZeroDivisionError("oops")

    rig.device.fail = crash
    rig.send(Request.SET_VRING_NUM, vring(0, 64))
    assert rig.hung_up()
    assert "internal error" in caplog.text


def test_a_start_that_fails_leaves_no_kick(rig: Rig, events: Sequence[int]) -> None:
    """A kick for a ring that cannot start (no memory yet) is refused, and its descriptor is not kept."""
    rig.negotiate()
    rig.set_ring(0)
    before = (rig.state(), descriptor_count())
    assert rig.do(Request.SET_VRING_KICK, u64(0), [events[0]]) != 0
    assert (rig.state(), descriptor_count()) == before


def test_bit_30_is_chosen_once(rig: Rig) -> None:
    """SET_FEATURES cannot change bit 30 afterwards."""
    rig.negotiate()
    before = rig.state()
    assert rig.do(Request.SET_FEATURES, u64(FEATURES)) != 0
    assert rig.state() == before


def test_features_while_running(rig: Rig, memory: int, events: Sequence[int]) -> None:
    """While a ring runs only LOG_ALL may change."""
    rig.start_all(memory, events)
    assert rig.do(Request.SET_FEATURES, u64(FEATURES | PROTOCOL_FEATURES)) == 0
    assert rig.do(Request.SET_FEATURES, u64((FEATURES | PROTOCOL_FEATURES) & ~(1 << 15))) != 0
    assert rig.device.acked_features == FEATURES


def test_second_owner_is_refused(rig: Rig) -> None:
    """SET_OWNER twice is refused, and the first one stands."""
    rig.negotiate()
    assert rig.do(Request.SET_OWNER) != 0
    assert rig.device.owned


@pytest.mark.parametrize(
    "request_",
    [
        request
        for request in MESSAGES
        if request.name.startswith(("SET_VRING", "SET_MEM", "GET_VR")) and request not in GOING_ON
    ],
)
def test_nothing_before_the_owner(rig: Rig, request_: Request, memory: int, events: Sequence[int]) -> None:
    """Messages that change the device are refused before SET_OWNER, their descriptors closed."""
    rig.send(Request.SET_PROTOCOL_FEATURES, u64(REPLY_ACK))
    payload = {
        Request.SET_MEM_TABLE: frontend.mem_table(frontend.region(0, MEMORY_BYTES, UVA)),
        Request.SET_VRING_ADDR: vring_addr(0),
        Request.SET_VRING_NUM: vring(0, 64),
    }.get(request_, u64(0))
    fds = {Request.SET_MEM_TABLE: [memory]}.get(request_, events[:1] if _carries_fd(request_) else [])
    rig.settle()
    before = (rig.state(), descriptor_count())
    assert rig.do(request_, payload, fds) != 0
    assert (rig.state(), descriptor_count()) == before
    assert not [call for call in rig.device.calls if call != "stop_all"]


@pytest.mark.parametrize("begins_with", sorted(GOING_ON))
def test_a_front_end_that_goes_on(rig: Rig, memory: int, events: Sequence[int], begins_with: Request) -> None:
    """A front-end that lost its back-end stops its rings first, sets no owner again, and is served all the same."""
    if begins_with is Request.GET_VRING_BASE:
        assert rig.ask(begins_with, vring(0, 0)).payload == vring(0, 0)
    else:
        rig.send(begins_with, vring(0, 0))
    assert rig.ask(Request.GET_FEATURES).u64 == FEATURES | PROTOCOL_FEATURES
    assert rig.device.owned
    rig.send(Request.SET_PROTOCOL_FEATURES, u64(REPLY_ACK))
    assert rig.do(Request.SET_FEATURES, u64(FEATURES & ~LOG_ALL | PROTOCOL_FEATURES)) == 0
    assert rig.do(Request.SET_MEM_TABLE, frontend.mem_table(frontend.region(0, MEMORY_BYTES, UVA)), [memory]) == 0
    rig.set_ring(0)
    assert rig.do(Request.SET_VRING_KICK, u64(0), [events[0]]) == 0
    assert rig.device.rings[0].started


def _carries_fd(request: Request) -> bool:
    return request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)


def test_debug_log_names_messages(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """With debugging on, every message that was acted upon is logged by name with its fields, features by name."""
    with caplog.at_level(logging.DEBUG, "vhostmp"):
        rig.negotiate()
    assert [record.getMessage() for record in caplog.records] == [
        "device 0: SET_OWNER",
        "device 0: SET_FEATURES: MRG_RXBUF INDIRECT_DESC EVENT_IDX PROTOCOL_FEATURES VERSION_1",
        "device 0: SET_PROTOCOL_FEATURES: REPLY_ACK",
    ]


def test_flags_of_replies(rig: Rig) -> None:
    """A reply carries version 1 and the reply bit, nothing else, and repeats the request's number."""
    rig.negotiate()
    rig.send_raw(frontend.message(Request.SET_VRING_NUM, vring(0, 2), flags=VERSION | NEED_REPLY))
    reply = rig.reply()
    assert (reply.request, reply.flags, len(reply.payload)) == (Request.SET_VRING_NUM, 5, 8)


def test_descriptors_of_verbs_are_borrowed(rig: Rig, memory: int, events: Sequence[int]) -> None:
    """After a message is dealt with only what the device duplicated is open, close-on-exec."""
    before = set(os.listdir("/proc/self/fd"))
    rig.start_all(memory, events)
    added = set(os.listdir("/proc/self/fd")) - before
    assert len(added) == len(["region", "kick", "call", "kick", "call"])
    assert not any(os.get_inheritable(int(fd)) for fd in added)
