"""Memory region by region, as with hot-plug: up to 509, added and removed under load (vu "VHOST_USER_ADD_MEM_REG")."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path
from typing import Final

import pytest

from tests.frames import POISON
from tests.helpers import TORTURE_SECONDS, wait_until
from tests.integration.serving import serving
from tests.integration.test_swap import whole
from tests.integration.traffic import Traffic
from tests.net_driver import Guest
from tests.remote import Refused, RemoteDevice
from vhostmp.consts import ProtocolFeature, Request
from vhostmp.shm.memory import MemoryRegion
from vhostmp.tools.stress.frontend import REPLY_ACK, vring

SLOTS: Final = 509
PAGE: Final = 4096
#: Where the regions that nobody uses lie: between, below and above those that are used.
GAP: Final = 1 << 26


class SlottedGuest(Guest):
    """A guest whose front-end tells of each region by itself."""

    def set_mem_table(self) -> None:
        """Add what is new, then remove what has gone."""
        wanted = [self.rings, self.buffers.memory, *(old.memory for old in self.old_buffers)]
        told: dict[str, MemoryRegion] = self.__dict__.setdefault("told", {})
        for memory in wanted:
            if memory.name not in told:
                told[memory.name] = memory.region
                self.device.add_mem_region(memory.region)
        for name in told.keys() - {memory.name for memory in wanted}:
            self.device.remove_mem_region(told.pop(name))


def fillers(fd: int, count: int) -> list[MemoryRegion]:
    """Return regions of a page that nobody uses, at guest and front-end addresses in opposite order."""
    return [
        MemoryRegion(gpa=(1 << 36) + i * GAP, size=PAGE, uva=(1 << 45) - i * GAP, fd=fd, mmap_offset=i * PAGE)
        for i in range(count)
    ]


@pytest.mark.slow
def test_hot_add_and_remove_under_load(tmp_path: Path, rng: random.Random) -> None:
    """Up to 509 regions come and go at random while packets flow through memory that comes and goes itself.

    Nothing is lost, what was removed (and poisoned) is never seen; the 510th region is refused and changes nothing.
    """
    features = REPLY_ACK | ProtocolFeature.CONFIGURE_MEM_SLOTS.mask
    fd = os.memfd_create("fillers", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, SLOTS * PAGE)
        with serving(tmp_path, "--socket-path", str(tmp_path / "s"), "--backend", "loopback"):
            device = RemoteDevice(tmp_path / "s", features)
            assert device.frontend.ask(Request.GET_MAX_MEM_SLOTS).u64 == SLOTS
            with SlottedGuest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=200) as traffic:
                absent = fillers(fd, SLOTS - 2)
                rng.shuffle(absent)
                present: list[MemoryRegion] = []
                while absent:
                    present.append(absent.pop())
                    device.add_mem_region(present[-1])
                traffic.progress(200)
                with pytest.raises(Refused):
                    device.add_mem_region(fillers(fd, SLOTS)[-1])
                traffic.progress(200)
                for _ in range(int(20 * TORTURE_SECONDS)):
                    for _ in range(10):
                        absent.append(present.pop(rng.randrange(len(present))))
                        device.remove_mem_region(absent[-1])
                    traffic.pause()
                    guest.renew_buffers()
                    traffic.resume()
                    wait_until(lambda: traffic.alive() and guest.old_buffers[0].idle, what="the old buffers")
                    assert guest.drop_idle_buffers(POISON) == 1
                    for _ in range(rng.randrange(10)):
                        present.append(absent.pop())
                        device.add_mem_region(present[-1])
                    traffic.progress(50)
                for region in present:
                    device.remove_mem_region(region)
                traffic.progress(200)
                whole(traffic.finish())
    finally:
        os.close(fd)


def test_a_ring_and_packets_in_the_last_of_many(tmp_path: Path) -> None:
    """Rings and buffers are found wherever they lie among 509 regions, below, between and above the others."""
    features = REPLY_ACK | ProtocolFeature.CONFIGURE_MEM_SLOTS.mask
    fd = os.memfd_create("fillers", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, SLOTS * PAGE)
        with serving(tmp_path, "--socket-path", str(tmp_path / "s"), "--backend", "loopback"):
            device = RemoteDevice(tmp_path / "s", features)
            with SlottedGuest(device.as_net_device()) as guest:
                for region in fillers(fd, SLOTS - 2):
                    device.add_mem_region(region)
                bases = guest.stop()
                for index, base in enumerate(bases):
                    guest.start(index, base)
                with Traffic(guest.pairs[0], window=200) as traffic:
                    for region in itertools.islice(fillers(fd, SLOTS), 0, SLOTS - 2, 50):
                        device.remove_mem_region(region)
                        traffic.progress(100)
                    whole(traffic.finish())
                assert device.frontend.ask(Request.GET_VRING_BASE, vring(0, 0)).payload[:4] == bytes(4)
    finally:
        os.close(fd)
