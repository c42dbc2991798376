"""Guest memory: the whole table at once, or region by region."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vhostmp.consts import Request
from vhostmp.errors import LocalError, RingsLost
from vhostmp.handlers.registry import handles, payload_of
from vhostmp.protocol.codec import Message
from vhostmp.protocol.payloads import U64, MemTable, Region, SingleRegion
from vhostmp.shm.memory import MemoryRegion
from vhostmp.verbs import HasMemSlots

if TYPE_CHECKING:
    from vhostmp.session import Session

log = logging.getLogger(__name__)


@handles(Request.SET_MEM_TABLE)
def set_mem_table(session: Session, message: Message) -> None:
    """Replace all of guest memory."""
    regions = payload_of(message, MemTable).regions
    with _losing_rings(session, message):
        session.device.set_mem_table(
            [_memory_region(region, fd) for region, fd in zip(regions, message.fds, strict=True)]
        )
    session.told_regions.clear()


@handles(Request.GET_MAX_MEM_SLOTS)
def get_max_mem_slots(session: Session, message: Message) -> U64:
    """Return how many regions the device takes."""
    assert isinstance(session.device, HasMemSlots)
    return U64(session.device.max_regions)


@handles(Request.ADD_MEM_REG)
def add_mem_reg(session: Session, message: Message) -> None:
    """Add a region.

    QEMU 7.2 tells of each region once for every queue pair, and takes it back as often. It is the same region only when
    it is the same file too; otherwise the device refuses it, for it overlaps.
    """
    assert isinstance(session.device, HasMemSlots)
    region = _memory_region(payload_of(message, SingleRegion).region, message.fds[0])
    key = (region.gpa, region.size, region.uva)
    file = _file(region)
    known, count = session.told_regions.get(key, (file, 0))
    if not count or known != file:
        session.device.add_mem_region(region)
    session.told_regions[key] = (known, count + 1)


@handles(Request.REM_MEM_REG)
def rem_mem_reg(session: Session, message: Message) -> None:
    """Remove a region; gpa, uva and size say which, a descriptor that came along means nothing."""
    assert isinstance(session.device, HasMemSlots)
    region = _memory_region(payload_of(message, SingleRegion).region, -1)
    key = (region.gpa, region.size, region.uva)
    file, count = session.told_regions.get(key, ((0, 0, 0), 0))
    if count > 1:
        session.told_regions[key] = (file, count - 1)
        return
    with _losing_rings(session, message):
        session.device.remove_mem_region(region)
    session.told_regions.pop(key, None)


@contextmanager
def _losing_rings(session: Session, message: Message) -> Generator[None, None, None]:
    """Change memory; a running ring that is not in it any more was stopped (EFAULT), which is no refusal."""
    try:
        yield
    except RingsLost as error:
        log.warning("device %s: %s: %s", session.device.name, message.name, error)
        session.rings_stopped(error.rings)


def _file(region: MemoryRegion) -> tuple[int, int, int]:
    """Return what names the place of a region in a file: device, inode, offset."""
    try:
        status = os.fstat(region.fd)
    except OSError as error:
        raise LocalError(f"bad file descriptor {region.fd}", errno.EBADF) from error
    return status.st_dev, status.st_ino, region.mmap_offset


def _memory_region(region: Region, fd: int) -> MemoryRegion:
    return MemoryRegion(
        gpa=region.guest_address,
        size=region.size,
        uva=region.user_address,
        fd=fd,
        mmap_offset=region.mmap_offset,
    )
