"""Where the front-end keeps what the back-end has in flight, over the back-end's death (vu "Inflight I/O tracking").

Split rings alone say what was in flight, and the region of packed ones is the workers': shm/inflight.py has why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhostmp import rings
from vhostmp.consts import Request
from vhostmp.errors import LocalError, SysError
from vhostmp.handlers.registry import Reply, handles, payload_of
from vhostmp.protocol.codec import Message
from vhostmp.protocol.payloads import Inflight
from vhostmp.shm import inflight

if TYPE_CHECKING:
    from vhostmp.session import Session


@handles(Request.GET_INFLIGHT_FD)
def get_inflight_fd(session: Session, message: Message) -> Reply:
    """Make a region for the queues asked for; it is the front-end's, and used once that gives it back."""
    asked = payload_of(message, Inflight)
    _check(session, asked)
    try:
        fd, size = inflight.create(asked.num_queues, asked.queue_size, packed=_is_packed(session))
    except OSError as error:
        raise SysError.wrap("cannot make a region for what is in flight", error) from error
    return Reply(Inflight(size, 0, asked.num_queues, asked.queue_size, asked.tail), (fd,))


@handles(Request.SET_INFLIGHT_FD)
def set_inflight_fd(session: Session, message: Message) -> None:
    """Take a region, after a death of ours or for the first time."""
    given = payload_of(message, Inflight)
    _check(session, given)
    place = given.mmap_offset, given.mmap_size, given.num_queues, given.queue_size
    if _is_packed(session):
        session.device.set_inflight(message.fds[0], *place)
    else:
        inflight.adopt(message.fds[0], *place)


def _is_packed(session: Session) -> bool:
    """Whether rings are packed: front-ends say so, by SET_FEATURES, before they ask for a region."""
    return rings.is_packed(session.state.features or 0)


def _check(session: Session, asked: Inflight) -> None:
    if asked.num_queues > session.device.num_queues:
        raise LocalError(f"the device has {session.device.num_queues} queues")
