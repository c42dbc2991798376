"""Devices behind an IOMMU: the front-end's entries, and our questions (vu "IOMMU support").

The message is answered always, whether REPLY_ACK is negotiated or not: the front-end lets the guest go on by it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vhostmp.consts import BackendRequest, IotlbType, Request
from vhostmp.errors import VhostError
from vhostmp.handlers.registry import handles, payload_of
from vhostmp.protocol.codec import Message
from vhostmp.protocol.payloads import U64, Iotlb, describe
from vhostmp.verbs import HasIotlb, IotlbMiss, IotlbVerbs

if TYPE_CHECKING:
    from vhostmp.session import Session

log = logging.getLogger(__name__)


@handles(Request.IOTLB_MSG)
def iotlb_msg(session: Session, message: Message) -> U64:
    """Take an entry, or take one back: nobody uses it any more once that is answered."""
    entry = payload_of(message, Iotlb)
    iotlb = iotlb_of(session)
    if iotlb is None:
        raise message.bad("request", "needs a device that offers ACCESS_PLATFORM")
    try:
        match entry.type:
            case IotlbType.UPDATE:
                iotlb.update(entry.iova, entry.size, entry.uaddr, entry.perm)
            case IotlbType.INVALIDATE:
                iotlb.invalidate(entry.iova, entry.size)
            case _:
                log.warning("device %s: IOTLB_MSG: type %d is refused", session.device.name, entry.type)
                return U64(1)
    except VhostError as error:
        log.warning("device %s: IOTLB_MSG: %s: %s; refused", session.device.name, describe(entry), error)
        return U64(1)
    return U64(0)


def watch_iotlb(session: Session) -> None:
    """Ask the front-end, from now on, for what the device's rings miss."""
    iotlb = iotlb_of(session)
    if iotlb is not None and session.loop is not None:
        session.loop.watch(iotlb, lambda: ask_misses(session))


def unwatch_iotlb(session: Session) -> None:
    """The front-end is gone: ask nobody."""
    iotlb = iotlb_of(session)
    if iotlb is not None and session.loop is not None:
        session.loop.unwatch(iotlb)


def ask_misses(session: Session, *, again: bool = False) -> None:
    """Ask for what was missed since the last time; with `again`, on a new channel, for all that is not answered.

    Without a channel the questions stay open until there is one.
    """
    iotlb = iotlb_of(session)
    if iotlb is None:
        return
    misses = iotlb.misses()
    if again:
        misses = list({miss.ring: miss for miss in [*iotlb.unanswered(), *misses]}.values())
    _post(session, misses)


def ask_what_was_open(session: Session) -> None:
    """Ask, a moment after an adoption, for what is still not answered of the questions of whoever died."""
    iotlb = iotlb_of(session)
    if iotlb is not None:
        _post(session, iotlb.left_open())


def _post(session: Session, misses: Iterable[IotlbMiss]) -> None:
    """Ask the front-end for what was missed, if there is a channel."""
    if session.channel is None:
        return
    for miss in misses:
        kind = IotlbType.ACCESS_FAIL if miss.denied else IotlbType.MISS
        session.channel.post(BackendRequest.IOTLB_MSG, Iotlb(miss.iova, 0, 0, miss.access, kind))


def iotlb_of(session: Session) -> IotlbVerbs | None:
    """Return the device's IOTLB; None: it offers no ACCESS_PLATFORM."""
    return session.device.iotlb if isinstance(session.device, HasIotlb) else None
