"""A verb that is refused has the errno of Linux's ioctl for the same mistake (tests/kernel holds all of them to it)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from vhostmp.errors import LocalError
from vhostmp.net import EVENT_IDX, NetDevice
from vhostmp.shm.memory import GuestMemory
from vhostmp.supervisor import Pool


@pytest.fixture
def device() -> Iterator[NetDevice]:
    """Return a device that nobody owns yet."""
    with Pool() as pool:
        yield NetDevice(pool)


def errno_of(verb: Callable[[], object]) -> int | None:
    """Return the errno with which a verb is refused."""
    with pytest.raises(LocalError) as caught:
        verb()
    return caught.value.errno


def test_features_need_no_owner(device: NetDevice) -> None:
    """Features can be acked before there is an owner, and an unknown one is refused as such; all other verbs wait."""
    assert errno_of(partial(device.set_features, 1 << 50)) == errno.EOPNOTSUPP
    device.set_features(1 << EVENT_IDX)
    assert device.acked_features == 1 << EVENT_IDX
    assert errno_of(partial(device.set_vring_num, 0, 8)) == errno.EPERM
    device.set_owner()
    device.reset_owner()
    assert device.acked_features == 0


def test_start_tells_what_is_missing(device: NetDevice) -> None:
    """A ring without addresses is as one at addresses that are not there; one without a size has none to be checked."""
    device.set_owner()
    assert errno_of(partial(device.start_vring, 0)) == errno.EFAULT
    device.set_vring_num(0, 8)
    assert errno_of(partial(device.start_vring, 0)) == errno.EFAULT
    with GuestMemory.create(1 << 16) as memory:
        device.set_mem_table([memory.region])
        device.set_vring_addr(1, desc=memory.uva, avail=memory.uva + 4096, used=memory.uva + 8192)
        assert errno_of(partial(device.start_vring, 1)) == errno.EINVAL
        device.set_vring_num(1, 8)
        device.start_vring(1)
        device.set_mem_table([memory.region])
