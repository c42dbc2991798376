"""What only a network device is told: announcements and the MTU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhostmp.consts import Request
from vhostmp.handlers.registry import handles, payload_of
from vhostmp.protocol.codec import Message
from vhostmp.protocol.payloads import MacAddress, Mtu
from vhostmp.verbs import HasMtu, SendsRarp

if TYPE_CHECKING:
    from vhostmp.session import Session


@handles(Request.SEND_RARP)
def send_rarp(session: Session, message: Message) -> None:
    """Announce the guest's address to the network behind the back-end."""
    assert isinstance(session.device, SendsRarp)
    session.device.send_rarp(payload_of(message, MacAddress).value)


@handles(Request.NET_SET_MTU)
def net_set_mtu(session: Session, message: Message) -> None:
    """Take the MTU that the guest is told."""
    assert isinstance(session.device, HasMtu)
    session.device.set_mtu(payload_of(message, Mtu).value)
