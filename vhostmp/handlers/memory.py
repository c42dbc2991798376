"""Guest memory: the whole table at once, or region by region.

Adding and removing a region are the only messages that cannot be acted upon twice. One that a control process before us
died of comes again (kept_transport.py): what it had done shows in `Session.again_added` and `again_removed`.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs

from vhostmp.consts import Request
from vhostmp.errors import LocalError, RingsLost, SynchronizeTimeout
from vhostmp.handlers import postcopy
from vhostmp.handlers.registry import handles, payload_of
from vhostmp.protocol.codec import Message
from vhostmp.protocol.payloads import U64, MemTable, Region, SingleRegion
from vhostmp.shm.memory import MemoryRegion
from vhostmp.verbs import HasMemSlots

if TYPE_CHECKING:
    from vhostmp.session import Session

log = logging.getLogger(__name__)


@handles(Request.SET_MEM_TABLE)
def set_mem_table(session: Session, message: Message) -> MemTable | None:
    """Replace all of guest memory; in post-copy, once its addresses are told and acknowledged."""
    if isinstance(message.payload, U64):
        _acknowledged(session, message)
        return None
    table = payload_of(message, MemTable)
    regions = [_memory_region(region, fd) for region, fd in zip(table.regions, message.fds, strict=True)]
    if postcopy.is_listening(session):
        addresses = postcopy.tell(session, regions, whole=True)
        return MemTable([_seen_at(region, address) for region, address in zip(table.regions, addresses, strict=True)])
    _replace(session, message, regions)
    return None


@handles(Request.GET_MAX_MEM_SLOTS)
def get_max_mem_slots(session: Session, message: Message) -> U64:
    """Return how many regions the device takes."""
    assert isinstance(session.device, HasMemSlots)
    return U64(session.device.max_regions)


@handles(Request.ADD_MEM_REG)
def add_mem_reg(session: Session, message: Message) -> SingleRegion | None:
    """Add a region; in post-copy, once its address is told and acknowledged.

    QEMU 7.2 tells of each region once for every queue pair, and takes it back as often. It is the same region only when
    it is the same file too; otherwise the device refuses it, for it overlaps.
    """
    assert isinstance(session.device, HasMemSlots)
    if isinstance(message.payload, U64):
        _acknowledged(session, message)
        return None
    told = payload_of(message, SingleRegion).region
    region = _memory_region(told, message.fds[0])
    key = (region.gpa, region.size, region.uva)
    file = _file(region)
    known, count = session.told_regions.get(key, (file, 0))
    is_new = not count or known != file
    reply = None
    if postcopy.is_listening(session):
        if is_new and session.told is not None and len(session.told.regions) >= session.device.max_regions:
            raise LocalError(f"the device takes {session.device.max_regions} regions", errno.E2BIG)
        (address,) = postcopy.tell(session, [region], whole=False, new=is_new)
        reply = SingleRegion(_seen_at(told, address))
    elif is_new and key not in session.again_added:
        session.device.add_mem_region(region)
    session.told_regions[key] = (known, count + 1)
    return reply


@handles(Request.REM_MEM_REG)
def rem_mem_reg(session: Session, message: Message) -> None:
    """Remove a region; gpa, uva and size say which, a descriptor that came along means nothing."""
    assert isinstance(session.device, HasMemSlots)
    if isinstance(message.payload, U64):
        _acknowledged(session, message)
        return
    region = _memory_region(payload_of(message, SingleRegion).region, -1)
    key = (region.gpa, region.size, region.uva)
    file, count = session.told_regions.get(key, ((0, 0, 0), 0))
    if count > 1:
        session.told_regions[key] = (file, count - 1)
        return
    try:
        if key not in session.again_removed:
            with _losing_rings(session, message):
                session.device.remove_mem_region(region)
    except SynchronizeTimeout:  # somebody may still use it, but it is gone
        session.told_regions.pop(key, None)
        raise
    session.told_regions.pop(key, None)


def _acknowledged(session: Session, message: Message) -> None:
    """Put in force what the front-end was told of in post-copy (postcopy.py)."""
    told = postcopy.take_acknowledgement(session, message)
    if told is None:
        return
    try:
        with _losing_rings(session, message):
            if told.whole:
                _replace(session, message, told.regions)
            else:
                _add(session, told.regions)
    finally:
        told.close()


def _replace(session: Session, message: Message, regions: Sequence[MemoryRegion]) -> None:
    """Put a table in force; no region was told one by one then."""
    try:
        with _losing_rings(session, message):
            session.device.set_mem_table(regions)
    except SynchronizeTimeout:  # in force all the same
        session.told_regions.clear()
        raise
    session.told_regions.clear()


def _add(session: Session, regions: Sequence[MemoryRegion]) -> None:
    """Put regions in force that were told. When one is refused, it and those behind it were never told."""
    assert isinstance(session.device, HasMemSlots)
    left = list(regions)
    try:
        while left:
            session.device.add_mem_region(left[0])
            del left[0]
    finally:
        for region in left:
            session.told_regions.pop((region.gpa, region.size, region.uva), None)


def _seen_at(region: Region, address: int) -> Region:
    """Return a region for the answer in post-copy: where faults in its first byte will be seen."""
    return attrs.evolve(region, user_address=address)


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
