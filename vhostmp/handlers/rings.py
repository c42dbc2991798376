"""Setting up, starting, stopping and enabling rings. The arrival of a kick descriptor starts a ring."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from vhostmp.consts import Request
from vhostmp.errors import VhostError
from vhostmp.handlers.registry import fd_of, handles, payload_of
from vhostmp.inband import CALL, ERR
from vhostmp.protocol.codec import Message
from vhostmp.protocol.payloads import U64, VringAddr, VringFd, VringState

if TYPE_CHECKING:
    from vhostmp.session import Session


@handles(Request.SET_VRING_NUM)
def set_vring_num(session: Session, message: Message) -> None:
    """Set the number of descriptors of a ring."""
    payload = payload_of(message, VringState)
    session.device.set_vring_num(payload.index, payload.num)


@handles(Request.SET_VRING_ADDR)
def set_vring_addr(session: Session, message: Message) -> None:
    """Say where a ring lies."""
    addr = payload_of(message, VringAddr)
    session.device.set_vring_addr(
        addr.index, desc=addr.descriptor, avail=addr.available, used=addr.used, flags=addr.flags, log=addr.log
    )


@handles(Request.SET_VRING_BASE)
def set_vring_base(session: Session, message: Message) -> None:
    """Set the next available index of a ring."""
    payload = payload_of(message, VringState)
    session.device.set_vring_base(payload.index, payload.num)


@handles(Request.GET_VRING_BASE)
def get_vring_base(session: Session, message: Message) -> VringState:
    """Stop a ring and return its next available index."""
    index = payload_of(message, VringState).index  # its num means nothing here
    return VringState(index, session.stop_ring(index))


@handles(Request.SET_VRING_KICK)
def set_vring_kick(session: Session, message: Message) -> None:
    """Set the kick descriptor and start the ring."""
    index = payload_of(message, VringFd).index
    _start(session, index, fd_of(message))
    if session.inband is not None:
        session.inband.kick_chosen(index)


@handles(Request.VRING_KICK)
def vring_kick(session: Session, message: Message) -> None:
    """Kick a ring by message; a stopped ring is started. A ring with a kick descriptor, or polled, needs none."""
    assert session.inband is not None
    index = payload_of(message, VringState).index
    running = index in session.started
    if running and not session.inband.is_kicked(index):
        return
    fd = session.inband.kick(index)
    if not running:
        try:
            _start(session, index, fd)
        except VhostError:
            session.inband.kick_chosen(index)
            raise


def _start(session: Session, index: int, kick: int | None) -> None:
    """Set the kick descriptor and start the ring. Raises: VhostError: neither is done."""
    session.device.set_vring_kick(index, kick)
    try:
        session.start_ring(index)
    except VhostError:
        if index not in session.started:
            with suppress(VhostError):
                session.device.set_vring_kick(index, None)
        raise


@handles(Request.SET_VRING_CALL)
def set_vring_call(session: Session, message: Message) -> None:
    """Set the descriptor that interrupts the guest."""
    index = payload_of(message, VringFd).index
    session.device.set_vring_call(index, fd_of(message))
    if session.inband is not None:
        session.inband.chosen(CALL, index)


@handles(Request.SET_VRING_ERR)
def set_vring_err(session: Session, message: Message) -> None:
    """Set the descriptor that tells of a broken ring."""
    index = payload_of(message, VringFd).index
    session.device.set_vring_err(index, fd_of(message))
    if session.inband is not None:
        session.inband.chosen(ERR, index)


@handles(Request.GET_QUEUE_NUM)
def get_queue_num(session: Session, message: Message) -> U64:
    """Return the number of queue pairs."""
    return U64(session.device.queue_num)


@handles(Request.SET_VRING_ENABLE)
def set_vring_enable(session: Session, message: Message) -> None:
    """Enable or disable a ring; legal as soon as bit 30 is offered: QEMU does it before it sends SET_FEATURES."""
    payload = payload_of(message, VringState)
    session.device.set_vring_enable(payload.index, bool(payload.num))
