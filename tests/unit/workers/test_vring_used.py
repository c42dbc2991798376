"""The used ring and the notifications of a split ring, on the compiled ring and on the plain-Python one alike."""

from __future__ import annotations

from typing import Final

import pytest

from tests.oracle.rig import BASE, ChainLike, MakeRig, Rig
from vhostmp.tools.stress.ring import F_EVENT_IDX, DeviceError
from vhostmp.tools.stress.split import NO_INTERRUPT, NO_NOTIFY

DATA: Final = BASE + 0x4000  # where these tests put buffers
MAX_IDX: Final = 0xFFFF


def take(rig: Rig) -> ChainLike:
    """Pop a chain that must be there."""
    chain = rig.ring.pop()
    assert chain is not None
    return chain


def test_used_elements(make: MakeRig) -> None:
    """Used elements appear at publish, not before, in the order staged, with the lengths given."""
    rig = make(4)
    heads = [rig.driver.add([], [(DATA + 64 * i, 64)]) for i in range(3)]
    rig.driver.publish()
    for _ in heads:
        take(rig)
    for length, head in enumerate(heads):
        rig.ring.push(head, length)
    assert rig.driver.pending() == 0
    rig.ring.publish()
    assert rig.ring.used_idx == len(heads)
    assert [(used.chain.head, used.length) for used in rig.driver.reap()] == list(zip(heads, range(3), strict=True))


@pytest.mark.parametrize("features", [0, F_EVENT_IDX], ids=["flags", "event_idx"])
def test_wrap_at_65536(make: MakeRig, features: int) -> None:
    """Both indices run through 65,536 several times; nothing is lost, repeated or wrongly announced."""
    rig = make(256, features=features, first_idx=MAX_IDX - 100)
    for _ in range(600):
        heads = [rig.driver.add([(DATA, 1)], [(DATA, 2)]) for _ in range(256 // 2)]
        rig.driver.publish()
        assert [take(rig).head for _ in heads] == heads
        for head in heads:
            rig.ring.push(head, 2)
        assert rig.ring.publish()
        assert len(rig.driver.reap()) == len(heads)
        rig.driver.want_interrupts()
    rig.driver.check_idle()
    assert rig.ring.last_avail_idx == rig.ring.used_idx == (MAX_IDX - 100 + 600 * 128) & MAX_IDX


def test_resumes_at_any_index(make: MakeRig) -> None:
    """A device side that is given an index takes the ring up there, and the used index from the ring."""
    rig = make(8, first_idx=0xFFFE)
    heads = [rig.driver.add([(DATA, 1)]) for _ in range(4)]
    rig.driver.publish()
    assert [take(rig).head for _ in range(3)] == heads[:3]
    for head in heads[:3]:
        rig.ring.push(head, 0)
    rig.ring.publish()
    again = rig.attach(rig.ring.last_avail_idx)
    assert (again.last_avail_idx, again.used_idx) == (1, 1)
    chain = again.pop()
    assert chain is not None
    again.push(chain.head, 0)
    again.publish()
    assert [used.chain.head for used in rig.driver.reap()] == heads
    rig.driver.check_idle()


def test_interrupt_flag(make: MakeRig) -> None:
    """Without event index the driver's NO_INTERRUPT flag decides, alone."""
    rig = make(8)
    for flags, wanted in [(0, True), (NO_INTERRUPT, False), (0xFFFE, True), (MAX_IDX, False), (0, True)]:
        rig.driver.set_avail_flags(flags)
        rig.ring.push(0, 0)
        assert rig.ring.publish() is wanted


def test_first_interrupt_with_event_idx(make: MakeRig) -> None:
    """With event index the first publication interrupts, whatever used_event says: it is not known what came before."""
    rig = make(8, features=F_EVENT_IDX)
    rig.driver.set_used_event(1000)
    rig.ring.push(0, 0)
    assert rig.ring.publish() is True
    rig.ring.push(0, 0)
    assert rig.ring.publish() is False


@pytest.mark.parametrize("start", [0, 0xFFFC])
@pytest.mark.parametrize("event", [*range(8), 100, 0x8000, MAX_IDX])
def test_interrupt_by_event_idx(make: MakeRig, start: int, event: int) -> None:
    """Going from old to new interrupts if and only if that passes used_event: old <= used_event < new (2.7.10)."""
    rig = make(8, features=F_EVENT_IDX, first_idx=start)
    rig.ring.push(0, 0)
    rig.ring.publish()
    rig.driver.set_used_event(start + event)
    for _ in range(3):
        rig.ring.push(0, 0)
    assert rig.ring.publish() is (event in (1, 2, 3))


def test_avail_flags_mean_nothing_with_event_idx(make: MakeRig) -> None:
    """With event index the flags are not looked at."""
    rig = make(8, features=F_EVENT_IDX)
    rig.driver.set_avail_flags(NO_INTERRUPT)
    for n in range(3):
        rig.driver.set_used_event(n)
        rig.ring.push(0, 0)
        assert rig.ring.publish() is True


def test_kick_flag(make: MakeRig) -> None:
    """Without event index the device asks by the used ring's flag, and says when it is too late to sleep."""
    rig = make(8)
    rig.ring.disable_notify()
    assert rig.driver.used_flags == NO_NOTIFY
    rig.driver.add([(DATA, 1)])
    assert rig.driver.publish() is False
    assert rig.ring.enable_notify() is True
    assert rig.driver.used_flags == 0
    take(rig)
    assert rig.ring.enable_notify() is False
    rig.driver.add([(DATA, 1)])
    assert rig.driver.publish() is True


@pytest.mark.parametrize("start", [0, 0xFFFE])
def test_kick_by_event_idx(make: MakeRig, start: int) -> None:
    """With event index the device is kicked once, at the next chain after it asked, and never sets the flag."""
    rig = make(8, features=F_EVENT_IDX, first_idx=start)
    assert rig.ring.enable_notify() is False
    assert rig.driver.avail_event == start
    kicks: list[bool] = []
    for _ in range(4):
        rig.driver.add([(DATA, 1)])
        kicks.append(rig.driver.publish())
    assert kicks == [True, False, False, False]
    assert rig.ring.enable_notify() is True
    for _ in range(4):
        take(rig)
    assert rig.ring.enable_notify() is False
    assert rig.driver.avail_event == (start + 4) & MAX_IDX
    rig.ring.disable_notify()
    assert rig.driver.used_flags == 0


def test_nothing_of_ours_is_read_back(make: MakeRig) -> None:
    """The used index in guest memory is written, never read: a guest that changes it does not move the device."""
    rig = make(8)
    heads = [rig.driver.add([(DATA, 1)]) for _ in range(2)]
    rig.driver.publish()
    take(rig)
    rig.ring.push(heads[0], 0)
    rig.ring.publish()
    rig.write(rig.driver.used_gpa + 2, b"\x77\x77")
    take(rig)
    rig.ring.push(heads[1], 0)
    rig.ring.publish()
    assert rig.driver.used_idx == rig.ring.used_idx == len(heads)


# The referee: the driver finds a device that breaks the rules


@pytest.mark.parametrize("mistake", ["twice", "unknown", "too_long", "too_far"])
def test_driver_finds_a_bad_device(make: MakeRig, mistake: str) -> None:
    """The driver these tests rely on reports heads returned twice or never given, lies about lengths, index jumps."""
    rig = make(8)
    heads = [rig.driver.add([], [(DATA, 10)]) for _ in range(2)]
    rig.driver.publish()
    for head, length in {
        "twice": [(heads[0], 1), (heads[0], 1)],
        "unknown": [(heads[0], 1), (7, 1)],
        "too_long": [(heads[0], 11)],
        "too_far": [(heads[0], 1), (heads[1], 1), (heads[0], 1)],
    }[mistake]:
        rig.ring.push(head, length)
    rig.ring.publish()
    with pytest.raises(DeviceError):
        rig.driver.reap()


@pytest.mark.parametrize("bits", [0, F_EVENT_IDX], ids=["flags", "event_idx"])
@pytest.mark.parametrize("on_empty", [False, True])
def test_notify_on_empty(bits: int, on_empty: bool) -> None:
    """With NOTIFY_ON_EMPTY a driver that wants no interrupts gets one when nothing more is available, and only then."""
    with Rig("cython", 8, features=bits | (1 << 24 if on_empty else 0)) as rig:
        rig.driver.refuse_interrupts()
        rig.ring.publish()  # with event index the first answer is always yes
        for _ in range(2):
            rig.driver.add([(rig.data, 60)])
        rig.driver.publish()
        if bits:
            rig.driver.set_used_event(100)
        wanted: list[bool] = []
        for _ in range(2):
            chain = rig.ring.pop()
            assert chain is not None
            rig.ring.push(chain.head, 0)
            wanted.append(rig.ring.publish())
        assert wanted == [False, on_empty]
