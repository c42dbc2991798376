"""Notifications that are rare and right: too early, too many, none; rings enabled and disabled; eventfds exchanged."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Final

from vhostmp.tools.stress.clause import FORMATS, SETTLE, Context, clause
from vhostmp.tools.stress.consts import Feature, Request
from vhostmp.tools.stress.frontend import u64
from vhostmp.tools.stress.machine import NOFD, S_ALL, Ring
from vhostmp.tools.stress.split import SplitDriver
from vhostmp.tools.stress.verdict import Failure

STATES: Final = "vhost-user, Ring states"
KICKS: Final = "virtio 1.3, 2.7.13.4 and 2.8.21.3: a device is notified at least when it asks"
HUGE: Final = (1 << 64) - 2
"""The most that an eventfd holds."""
EIGHT: Final = 8
STORM: Final = 20_000


@clause("edge", "kick-before-enable", source=f"{STATES}: started and disabled", rings=FORMATS, devices=("net",))
def before_enable(ctx: Context) -> None:
    """A ring that is started and disabled gives frames back unsent, or keeps them; once enabled all is well."""
    machine = ctx.net(start=False)
    for ring in machine.rings:
        machine.start(ring, enable=False)
    machine.set_status(S_ALL)
    machine.offer(8)
    machine.go()
    time.sleep(SETTLE / 2)
    if machine.rx().driver.pending():
        raise Failure("a frame was received by a ring that is disabled")
    for ring in machine.rings:
        machine.enable(ring)
        ring.notify()
    machine.give(machine.tx().take(8))
    machine.forget()
    machine.traffic()


@clause("edge", "disabled-and-enabled", source=STATES, rings=FORMATS, devices=("net",))
def toggled(ctx: Context) -> None:
    """Rings are disabled and enabled while frames are under way: every buffer comes back once, and no more is lost."""
    machine = ctx.net()
    for _ in range(30):
        machine.offer(16)
        machine.go()
        for value in (0, 1):
            for ring in machine.rings:
                machine.enable(ring, value)
        for ring in machine.rings:
            ring.notify()
        machine.give(machine.tx().take(16))
        machine.tx().driver.check_idle()
        machine.forget()
    machine.traffic()


@clause("edge", "disabled-receives-nothing", source=f"{STATES}: must not supply any new RX packets", devices=("net",))
def receives_nothing(ctx: Context) -> None:
    """Into a disabled receive ring nothing is received; after it is enabled traffic goes on."""
    ctx.need_echo()
    machine = ctx.net()
    machine.post()
    machine.enable(machine.rx(), 0)
    machine.offer(4)
    machine.go()
    if not machine.rx().quiet(SETTLE):
        raise Failure("a frame was received by a ring that is disabled")
    machine.enable(machine.rx())
    machine.rx().notify()
    machine.give(machine.tx().take(4))
    machine.forget()
    machine.traffic()


@clause("edge", "enabled-twice", source="vhost-user, VHOST_USER_SET_VRING_ENABLE", rings=FORMATS)
def enabled_twice(ctx: Context) -> None:
    """Enabling what is enabled, and disabling what is disabled, changes nothing."""
    machine = ctx.machine(start=False)
    for ring in machine.rings:
        for value in (0, 0, 1, 1):
            machine.enable(ring, value)
    machine.start_all()
    for ring in machine.rings:
        machine.enable(ring)
    machine.traffic()


@clause("edge", "enabled-before-all-else", source="vhost-user, VHOST_USER_SET_VRING_ENABLE", rings=FORMATS)
def enabled_first(ctx: Context) -> None:
    """Rings are enabled before anything else is said of them, or after all of them have started."""
    for late in (False, True):
        machine = ctx.machine(start=False)
        if not late:
            for ring in machine.rings:
                machine.enable(ring)
        for ring in machine.rings:
            machine.start(ring, enable=False)
        for ring in machine.rings:
            machine.enable(ring)
        machine.set_status(S_ALL)
        machine.traffic()
        machine.close()


@clause("edge", "kicks-for-nothing", source=KICKS, rings=FORMATS)
def for_nothing(ctx: Context) -> None:
    """Rings in which nothing is new are kicked, and kicked."""
    machine = ctx.machine()
    for _ in range(200):
        for ring in machine.rings:
            ring.notify()
    machine.traffic()
    for ring in machine.rings:
        ring.notify()
    time.sleep(SETTLE / 5)
    machine.traffic()


@clause("edge", "kick-storm", source=KICKS, rings=FORMATS)
def storm(ctx: Context) -> None:
    """Twenty thousand kicks in a row, with requests among them."""
    machine = ctx.machine()
    for turn in range(20):
        machine.offer(8)
        machine.go()
        for _ in range(STORM // 20):
            machine.rings[turn % len(machine.rings)].notify()
        machine.collect()


@clause("edge", "kick-counts-much", source="eventfd(2); vhost-user, VHOST_USER_SET_VRING_KICK", rings=FORMATS)
def much(ctx: Context) -> None:
    """The kick eventfd holds a huge number: it means one kick."""
    machine = ctx.machine()
    for value in (1 << 32, 1 << 63, HUGE):
        for ring in machine.rings:
            drained(ring)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(ring.kick_fd, value)
        machine.traffic(8)


def drained(ring: Ring) -> None:
    """Take kicks back that nobody has seen yet."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(ring.kick_fd)


@clause("edge", "call-is-full", source="eventfd(2); vhost-user, VHOST_USER_SET_VRING_CALL", rings=FORMATS)
def call_full(ctx: Context) -> None:
    """The call eventfd holds as much as it can, since nobody reads it: the device goes on all the same."""
    machine = ctx.machine(ctx.setup(features=ctx.features(without=[Feature.EVENT_IDX])))
    for _ in range(20):
        for ring in machine.rings:
            ring.called(0)
            with contextlib.suppress(BlockingIOError):  # signalled meanwhile
                os.eventfd_write(ring.call_fd, HUGE)
        machine.offer(8)
        machine.go()
        deadline = time.monotonic() + machine.link.patience
        while machine.work.driver.in_flight and time.monotonic() < deadline:
            machine.give(machine.work.driver.reap())
        if machine.work.driver.in_flight:
            raise Failure("requests are not done while the call eventfd is full")
        for ring in machine.rings:
            ring.called(0)
        machine.forget()
    machine.traffic()


@clause("edge", "call-replaced", source="vhost-user, VHOST_USER_SET_VRING_CALL", rings=FORMATS)
def call_replaced(ctx: Context) -> None:
    """The call eventfd is exchanged while requests are under way: no interrupt is lost."""
    machine = ctx.machine()
    pairs = [(ctx.fd(os.dup(ring.call_fd)), ctx.eventfd()) for ring in machine.rings]
    for turn in range(30):
        machine.offer(8)
        machine.go()
        for ring in machine.rings:
            old, new = pairs[ring.index][turn % 2], pairs[ring.index][1 - turn % 2]
            machine.link.must(Request.SET_VRING_CALL, u64(ring.index), [new])
            os.dup2(new, ring.call_fd, inheritable=False)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(new, os.eventfd_read(old))  # what was signalled before goes to the new one
        machine.collect()


@clause("edge", "call-taken-away", source="vhost-user, VHOST_USER_SET_VRING_CALL: bit 8", rings=FORMATS)
def call_away(ctx: Context) -> None:
    """The call eventfd is taken away while rings run, as when a guest masks its interrupt, and given back."""
    machine = ctx.machine()
    for _ in range(10):
        for ring in machine.rings:
            machine.link.must(Request.SET_VRING_CALL, u64(ring.index | NOFD))
        machine.offer(8)
        machine.go()
        time.sleep(0.002)
        for ring in machine.rings:
            machine.link.must(Request.SET_VRING_CALL, u64(ring.index), [ring.call_fd])
            os.eventfd_write(ring.call_fd, 1)  # what was done while nobody was told
        machine.collect()


@clause("edge", "err-taken-away", source="vhost-user, VHOST_USER_SET_VRING_ERR: bit 8", rings=FORMATS)
def err_away(ctx: Context) -> None:
    """No error eventfd."""
    machine = ctx.machine()
    for ring in machine.rings:
        machine.link.must(Request.SET_VRING_ERR, u64(ring.index | NOFD))
    machine.traffic()


@clause("edge", "kick-replaced", source="vhost-user, VHOST_USER_SET_VRING_KICK", rings=FORMATS)
def kick_replaced(ctx: Context) -> None:
    """Stopped rings start again with other kick eventfds; the old ones are kicked too, in vain."""
    machine = ctx.machine()
    for _ in range(5):
        machine.traffic(8)
        bases = machine.stop_all()
        for ring in machine.rings:
            old = ctx.fd(os.dup(ring.kick_fd))
            new = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            os.dup2(new, ring.kick_fd, inheritable=False)
            os.close(new)
            os.eventfd_write(old, 1)
        machine.resume(bases)
    machine.traffic()


@clause("edge", "interrupts-off-and-on", source="virtio 1.3, 2.7.7 and 2.8.10", rings=FORMATS)
def off_and_on(ctx: Context) -> None:
    """Interrupts are refused and wanted again while requests are done: one that is wanted comes."""
    for without in ([], [Feature.EVENT_IDX]):
        machine = ctx.machine(ctx.setup(features=ctx.features(without=without)))
        for turn in range(100):
            machine.work.driver.refuse_interrupts()
            machine.offer(4)
            machine.go()
            if turn % 3:
                machine.work.driver.want_interrupts()
            machine.collect()
        machine.close()


@clause("edge", "interrupts-refused", source="virtio 1.3, 2.7.7.2 and 2.8.10: SHOULD NOT send", rings=FORMATS)
def refused(ctx: Context) -> None:
    """A driver that wants no interrupt gets hardly any: one for ten requests at most."""
    for without in ([], [Feature.EVENT_IDX]):
        machine = ctx.machine(ctx.setup(features=ctx.features(without=without)))
        ring, came, many = machine.work, 0, 60
        ring.called(0)
        for _ in range(many):
            ring.driver.refuse_interrupts()
            machine.offer(1)
            machine.go()
            if ring.quiet(ring.patience):
                raise Failure("a request is not done while no interrupt is wanted")
            machine.give(ring.driver.reap())
            came += ring.called(0)
            machine.forget()
        if came > many // 10:
            raise Failure(f"{came} interrupts for {many} requests, and none was wanted")
        machine.close()


@clause("edge", "used-event-far-away", source="virtio 1.3, 2.7.7.2: idx equal to used_event", rings=("split",))
def far_away(ctx: Context) -> None:
    """used_event names a place that is reached after thousands of requests, or was just passed; then a near one."""
    ctx.need(Feature.EVENT_IDX)
    machine = ctx.machine()
    driver = machine.work.driver
    assert isinstance(driver, SplitDriver)
    for ahead in (0x7FFF, 0x8000, 0xFFFE, 0xFFFF, 1000):
        driver.set_used_event(driver.last_used + ahead)
        machine.offer(EIGHT)
        machine.go()
        deadline = time.monotonic() + machine.link.patience
        while driver.pending() < EIGHT and time.monotonic() < deadline:
            time.sleep(0.001)
        machine.collect()
    machine.traffic()
