"""The back-end's own channel to the front-end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhostmp import transport
from vhostmp.backchannel import BackendChannel
from vhostmp.consts import ProtocolFeature, Request
from vhostmp.handlers.registry import handles
from vhostmp.protocol.codec import Message

if TYPE_CHECKING:
    from vhostmp.session import Session


@handles(Request.SET_BACKEND_REQ_FD)
def set_backend_req_fd(session: Session, message: Message) -> None:
    """Take the socket on which we may ask the front-end; it replaces an earlier one."""
    assert session.loop is not None
    sock = transport.adopt_copy(message.fds[0])
    session.set_channel(
        BackendChannel(session.loop, sock, session.device.name, reply_ack=session.state.has(ProtocolFeature.REPLY_ACK))
    )
