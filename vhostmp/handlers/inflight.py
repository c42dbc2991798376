"""Where the front-end keeps what the back-end has in flight, over the back-end's death (vu "Inflight I/O tracking").

Chains are given back in order, so the rings alone say what was in flight: shm/inflight.py has why the region costs
nothing. For packed rings there is no region: an answer of size 0, which tells the front-end to go on without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhostmp import consts
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
    """Make a region for the queues asked for; it is the front-end's from then on."""
    asked = payload_of(message, Inflight)
    _check(session, asked)
    if (session.state.features or 0) >> consts.VIRTIO_F_RING_PACKED & 1:
        return Reply(Inflight(0, 0, asked.num_queues, asked.queue_size, asked.tail))
    try:
        fd, size = inflight.create(asked.num_queues, asked.queue_size)
    except OSError as error:
        raise SysError.wrap("cannot make a region for what is in flight", error) from error
    return Reply(Inflight(size, 0, asked.num_queues, asked.queue_size, asked.tail), (fd,))


@handles(Request.SET_INFLIGHT_FD)
def set_inflight_fd(session: Session, message: Message) -> None:
    """Take a region back, after a death of ours or for the first time."""
    given = payload_of(message, Inflight)
    _check(session, given)
    if (session.state.features or 0) >> consts.VIRTIO_F_RING_PACKED & 1:
        raise message.bad("features", "there is no region for packed rings")
    inflight.adopt(message.fds[0], given.mmap_offset, given.mmap_size, given.num_queues, given.queue_size)


def _check(session: Session, asked: Inflight) -> None:
    if asked.num_queues > session.device.num_queues:
        raise LocalError(f"the device has {session.device.num_queues} queues")
