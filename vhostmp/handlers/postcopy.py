"""Post-copy: how it begins and ends, and how memory is told while it lasts (vu "Postcopy" and "SET_MEM_TABLE").

In post-copy a table, or a region, is answered with the addresses at which the front-end will see faults; it comes into
force when the front-end has acknowledged that, by a message of the same request with a number in it: zero. QEMU sends
one acknowledgement for all regions that it has added, and one when it has only removed some.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import attrs

from vhostmp.consts import Request
from vhostmp.errors import LocalError, SysError
from vhostmp.handlers.registry import Reply, handles
from vhostmp.parts import duplicate
from vhostmp.protocol.codec import Message
from vhostmp.protocol.payloads import U64, Empty
from vhostmp.shm.memory import MemoryRegion
from vhostmp.verbs import HasPostcopy, PostcopyVerbs
from vhostmp.workers.channel import close_all

if TYPE_CHECKING:
    from vhostmp.session import Session

log = logging.getLogger(__name__)

MEMORY_MESSAGES: Final = frozenset({Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.REM_MEM_REG})


@attrs.define
class Told:
    """Regions whose addresses the front-end was told and has not acknowledged; descriptors are owned.

    `whole`: they are a table, which replaces all; else they are added.
    """

    whole: bool
    regions: list[MemoryRegion] = attrs.field(factory=list[MemoryRegion])

    def close(self) -> None:
        """Close the descriptors."""
        close_all(region.fd for region in self.regions)


@handles(Request.POSTCOPY_ADVISE)
def postcopy_advise(session: Session, message: Message) -> Reply:
    """Answer with the userfaultfd from which the front-end reads faults."""
    return Reply(Empty(), (_postcopy_of(session).advise(),))


@handles(Request.POSTCOPY_LISTEN)
def postcopy_listen(session: Session, message: Message) -> None:
    """Page the memory that is to come."""
    _postcopy_of(session).listen()


@handles(Request.POSTCOPY_END)
def postcopy_end(session: Session, message: Message) -> U64:
    """All pages have come."""
    _postcopy_of(session).end()
    return U64(0)


def is_listening(session: Session) -> bool:
    """Whether memory is told in the way of post-copy."""
    return isinstance(session.device, HasPostcopy) and bool(
        session.device.postcopy and session.device.postcopy.listening
    )


def tell(session: Session, regions: list[MemoryRegion], *, whole: bool, new: bool = True) -> list[int]:
    """Have regions (their descriptors are borrowed) wait for the acknowledgement; return their addresses.

    Unless they are `new` they are in force already, and told once more.
    """
    for region in regions:
        region.check()
    addresses = _postcopy_of(session).map(regions)
    if not new:
        return addresses
    told = session.told if session.told is not None else Told(whole)
    kept: list[MemoryRegion] = []
    try:
        for region in regions:
            kept.append(attrs.evolve(region, fd=duplicate(region.fd)))
    except OSError as error:
        close_all(region.fd for region in kept)
        raise SysError.wrap("cannot keep the memory's descriptors", error) from error
    told.regions += kept
    session.told = told
    return addresses


def take_acknowledgement(session: Session, message: Message) -> Told | None:
    """Judge an acknowledgement; return what it is of, the caller's. None: of nothing that is not in force."""
    assert isinstance(message.payload, U64)
    if not is_listening(session):
        raise message.bad(
            "size", f"size {U64.STRUCT.size} is that of an acknowledgement, which comes in post-copy alone"
        )
    if message.payload.value:
        raise message.bad("payload", f"payload {message.payload.value:#x} says that the front-end failed", fatal=True)
    told, session.told = session.told, None
    return told


def check_order(session: Session, message: Message) -> None:
    """Refuse what may not come before the acknowledgement of what was told. Raises: BadMessage."""
    if session.told is None or (isinstance(message.payload, U64) and message.request in MEMORY_MESSAGES):
        return
    if session.told.whole or message.request not in MEMORY_MESSAGES - {Request.SET_MEM_TABLE}:
        what = "SET_MEM_TABLE" if session.told.whole else "ADD_MEM_REG"
        raise message.bad("request", f"came where the acknowledgement of {what} was due", fatal=True)


def watch(session: Session) -> None:
    """Look after the pager."""
    if session.loop is not None and isinstance(session.device, HasPostcopy) and session.device.postcopy is not None:
        session.loop.watch(session.device.postcopy, lambda: _lost(session))


def forget(session: Session) -> None:
    """The connection is gone."""
    if session.loop is not None and isinstance(session.device, HasPostcopy) and session.device.postcopy is not None:
        session.loop.unwatch(session.device.postcopy)
    if session.told is not None:
        session.told.close()
        session.told = None


def _lost(session: Session) -> None:
    """No page will come any more: the front-end cannot be told, but by hanging up."""
    log.error("device %s: post-copy: the pager has died: connection closed", session.device.name)
    if session.hang_up is not None:
        session.hang_up()


def _postcopy_of(session: Session) -> PostcopyVerbs:
    postcopy = session.device.postcopy if isinstance(session.device, HasPostcopy) else None
    if postcopy is None:
        raise LocalError("the device has no post-copy")
    return postcopy
