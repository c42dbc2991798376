"""The device status, where the front-end passes it on (virtio 1.3, 2.1; vu "VHOST_USER_SET_STATUS").

What starts a ring is its kick descriptor, with STATUS as without: QEMU sends it once the driver has said DRIVER_OK,
which it then passes on for some classes of device, and for others (random numbers) it never does. FEATURES_OK is taken
only once features were: read back without it, the front-end knows that they were not. Zero stops all rings and begins
the status anew; where the rings stood, the memory and the features stay until they are set again, since some front-ends
write the zero before they ask for the rings' positions.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vhostmp import consts
from vhostmp.consts import Request
from vhostmp.handlers.registry import handles, payload_of
from vhostmp.protocol.codec import Message
from vhostmp.protocol.payloads import U64, Status

if TYPE_CHECKING:
    from vhostmp.session import Session

log = logging.getLogger(__name__)


@handles(Request.GET_STATUS)
def get_status(session: Session, message: Message) -> U64:
    """Return the status as we have taken it."""
    return U64(session.state.status)


@handles(Request.SET_STATUS)
def set_status(session: Session, message: Message) -> None:
    """Take a new status, and do what its bits ask for."""
    status = payload_of(message, Status).value
    if not status:
        session.stop_all_rings()
    elif status & consts.VIRTIO_STATUS_FEATURES_OK and session.state.features is None:
        log.warning("device %s: FEATURES_OK before any features: not taken", session.device.name)
        status &= ~consts.VIRTIO_STATUS_FEATURES_OK
    session.state.status = status
