"""The dirty log: where writes to guest memory are logged while LOG_ALL is acked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhostmp.consts import Request
from vhostmp.handlers.registry import handles, payload_of
from vhostmp.protocol.codec import Message
from vhostmp.protocol.payloads import U64, LogArea
from vhostmp.verbs import HasLog

if TYPE_CHECKING:
    from vhostmp.session import Session


@handles(Request.SET_LOG_BASE)
def set_log_base(session: Session, message: Message) -> U64:
    """Log into the file that came along.

    Always answered, acknowledgements or not: the front-end waits before it lets go of the old log. A refusal hangs up,
    since QEMU does not look at what the answer says.
    """
    assert isinstance(session.device, HasLog)
    area = payload_of(message, LogArea)
    session.device.set_log_base(message.fds[0], area.size, area.mmap_offset)
    return U64(0)


@handles(Request.SET_LOG_FD)
def set_log_fd(session: Session, message: Message) -> None:
    """Signal an eventfd when pages were logged."""
    assert isinstance(session.device, HasLog)
    session.device.set_log_fd(message.fds[0])
