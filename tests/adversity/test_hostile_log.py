"""Dirty logs that cannot be, are too short, or are taken away: refused, counted, or the end of that device's rings."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Final

import pytest

from tests.dirty import LOG_ALL, DirtyLog, Watch, pages
from tests.frames import make_frame
from tests.helpers import wait_until
from tests.integration.traffic import Traffic
from tests.net_driver import Guest
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool

LOG_BYTES: Final = (1 << 30) // 4096 // 8 + 256
FILE_BYTES: Final = 8192


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of one worker."""
    with Pool(workers=1) as one:
        yield one


def outside(device: NetDevice) -> list[int]:
    """Return how many written pages had no bit, for each ring."""
    return [queue["log_outside"] for queue in device.snapshot()["queues"]]


def exchange(guest: Guest, watch: Watch) -> None:
    """Have one packet go through the loopback."""
    pair = guest.pairs[0]
    pair.post()
    assert pair.send(make_frame(0, 200))
    pair.kick()
    watch.settle()
    assert len(pair.receive()) == 1
    pair.reap()


@pytest.mark.parametrize(
    ("size", "offset", "number"),
    [
        (0, 0, errno.EINVAL),
        (-1, 0, errno.EINVAL),
        (1, -1, errno.EINVAL),
        (1, (1 << 64) - 1, errno.EFAULT),
        (2, (1 << 64) - 1, errno.EINVAL),
        (1 << 64, 0, errno.EFAULT),
        (FILE_BYTES + 1, 0, errno.EFAULT),
        (FILE_BYTES, 1, errno.EFAULT),
        (1, FILE_BYTES, errno.EFAULT),
    ],
)
def test_ranges_that_are_none(pool: Pool, size: int, offset: int, number: int) -> None:
    """A range that is empty, wraps or is not in the file is refused, while writes go to the log there is."""
    device = NetDevice(pool, backend="loopback")
    with DirtyLog(LOG_BYTES) as log, DirtyLog(FILE_BYTES) as other, Guest(device) as guest:
        watch = Watch(pool, device, guest, log)
        watch.switch_on()
        with pytest.raises(LocalError, match="dirty log") as caught:
            device.set_log_base(other.fd, size, offset)
        assert caught.value.errno == number
        exchange(guest, watch)
        assert log.pages
        assert not other.pages


def test_descriptors_that_are_none(pool: Pool) -> None:
    """Logs that are no writable file, and a log eventfd that is none, are refused."""
    device = NetDevice(pool, backend="null")
    device.set_owner()
    with DirtyLog(FILE_BYTES) as log:
        readonly, event = os.open(f"/proc/self/fd/{log.fd}", os.O_RDONLY), os.eventfd(0)
        try:
            for fd, number in ((readonly, errno.EACCES), (event, errno.EINVAL), (1 << 20, errno.EBADF)):
                with pytest.raises(LocalError) as caught:
                    device.set_log_base(fd, 64, 0)
                assert caught.value.errno == number
            for fd, number in ((log.fd, errno.EINVAL), (1 << 20, errno.EBADF)):
                with pytest.raises(LocalError) as caught:
                    device.set_log_fd(fd)
                assert caught.value.errno == number
        finally:
            os.close(readonly)
            os.close(event)


def test_logging_without_a_log(pool: Pool) -> None:
    """Running rings cannot be logged without a log; rings started with LOG_ALL write on, and what they write counts."""
    device = NetDevice(pool, backend="loopback")
    with DirtyLog(LOG_BYTES) as log, Guest(device) as guest:
        watch = Watch(pool, device, guest, log)
        with pytest.raises(LocalError) as caught:
            device.set_features(guest.features | LOG_ALL)
        assert caught.value.errno == errno.EFAULT
        with pytest.raises(LocalError) as caught:
            device.set_features(guest.features & ~(1 << 15) | LOG_ALL)
        assert caught.value.errno == errno.EBUSY
        exchange(guest, watch)
        assert outside(device) == [0, 0]
        bases = guest.stop()
        device.set_features(guest.features | LOG_ALL)
        for index, base in enumerate(bases):
            guest.start(index, base)
        exchange(guest, watch)
        receive, transmit = outside(device)
        assert receive > 0
        assert transmit == 0, "nothing asked for the used ring"
        watch.switch_on()
        exchange(guest, watch)
        assert outside(device) == [receive, 0]
        assert log.pages


def test_log_that_is_too_short(pool: Pool) -> None:
    """What lies beyond the log is counted; bits inside are set, the bytes behind it stay as they are."""
    device = NetDevice(pool, backend="loopback")
    with DirtyLog(FILE_BYTES) as log, Guest(device) as guest:
        watch = Watch(pool, device, guest, log)
        device.set_log_base(log.fd, 1, 0)  # pages 0 to 7: the rings, not the buffers
        device.set_features(guest.features | LOG_ALL)
        watch.set_addresses(log=True)
        exchange(guest, watch)
        used = {page for place in guest.layouts for page in pages(place.used, 1)}
        assert used <= log.pages <= set(range(8))
        assert outside(device)[0] > 0
        assert outside(device)[1] == 0


@pytest.mark.parametrize("address", [(1 << 64) - 4, (1 << 64) - 4096, 1 << 63])
def test_used_ring_outside(pool: Pool, address: int) -> None:
    """A used ring said to lie outside the log, or to wrap, is counted."""
    device = NetDevice(pool, backend="loopback")
    with DirtyLog(LOG_BYTES) as log, Guest(device) as guest:
        watch = Watch(pool, device, guest, log)
        watch.switch_on(rings=False)
        place, uva = guest.layouts[1], guest.rings.uva
        device.set_vring_addr(
            1, desc=uva + place.desc, avail=uva + place.avail, used=uva + place.used, flags=1, log=address
        )
        exchange(guest, watch)
        assert outside(device)[1] > 0


@pytest.mark.slow
def test_log_truncated(pool: Pool) -> None:
    """A log that its front-end cuts off costs one worker, once, and the rings in it; another device goes on."""
    victim, evil = NetDevice(pool, backend="loopback"), NetDevice(pool, backend="loopback", name="evil")
    with DirtyLog(LOG_BYTES) as log, Guest(victim) as good, Guest(evil) as bad, Traffic(good.pairs[0]) as traffic:
        watch = Watch(pool, evil, bad, log)
        watch.switch_on()
        traffic.progress(100)
        os.ftruncate(log.fd, 0)
        pair = bad.pairs[0]
        pair.post()
        assert pair.send(make_frame(0, 60))
        pair.kick()
        wait_until(
            lambda: [ring["broken"] for ring in evil.snapshot()["queues"]] == ["memory", "memory"], what="the end"
        )
        wait_until(lambda: pool.restarts == 1, what="the replacement")
        traffic.progress(100)
        with DirtyLog(LOG_BYTES) as other:
            evil.set_log_base(other.fd, other.size, 0)
            traffic.progress(100)
        tally = traffic.finish()
        assert tally.missing == 0, tally
        assert pool.restarts == 1
