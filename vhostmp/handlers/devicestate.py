"""Migration of what the device knows and the front-end does not (vu "Migrating back-end state")."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vhostmp.consts import Request
from vhostmp.errors import LocalError, VhostError
from vhostmp.handlers.registry import handles, payload_of
from vhostmp.protocol.codec import Message
from vhostmp.protocol.payloads import U64, StateTransfer
from vhostmp.statetransfer import Transfer
from vhostmp.verbs import HasState

if TYPE_CHECKING:
    from vhostmp.session import Session

log = logging.getLogger(__name__)

NO_FD = 0x100  # bit 8 of the reply: we use the front-end's channel
FAILED = 1


@handles(Request.SET_DEVICE_STATE_FD)
def set_device_state_fd(session: Session, message: Message) -> U64:
    """Begin to save or load the state over the descriptor; the device must be suspended. A later one replaces it."""
    assert session.loop is not None
    device = session.device
    assert isinstance(device, HasState)
    session.set_transfer(None)
    try:
        _check_suspended(session)
        if payload_of(message, StateTransfer).direction == StateTransfer.SAVE:
            transfer = Transfer(session.loop, message.fds[0], device.name, save=device.save_state(), load=None)
        else:

            def load(data: bytes) -> None:
                _check_suspended(session)
                device.load_state(data)

            transfer = Transfer(session.loop, message.fds[0], device.name, load=load)
    except VhostError as error:
        log.warning("device %s: %s: %s", device.name, message.name, error)
        return U64(FAILED | NO_FD)
    session.set_transfer(transfer)
    return U64(NO_FD)


@handles(Request.CHECK_DEVICE_STATE)
def check_device_state(session: Session, message: Message) -> U64:
    """Say whether the transfer succeeded; without any there is nothing that did."""
    if session.transfer is None:
        log.warning("device %s: %s: no state was transferred", session.device.name, message.name)
        return U64(FAILED)
    failed = session.transfer.check() is not None
    session.set_transfer(None)
    return U64(FAILED if failed else 0)


def _check_suspended(session: Session) -> None:
    if session.started:
        raise LocalError("a ring runs: stop all of them first")
