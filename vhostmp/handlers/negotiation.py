"""Owner, features and protocol features; what resets a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vhostmp import consts
from vhostmp.consts import BIT_30, ProtocolFeature, Request
from vhostmp.handlers.registry import handles, payload_of
from vhostmp.protocol.codec import Message
from vhostmp.protocol.payloads import U64
from vhostmp.protocol.state import Event

if TYPE_CHECKING:
    from vhostmp.session import Session


_INBAND_NEEDS: Final = consts.mask((ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK))


@handles(Request.GET_FEATURES)
def get_features(session: Session, message: Message) -> U64:
    """Return the device's features and bit 30."""
    return U64(session.device.get_features() | BIT_30)


@handles(Request.SET_FEATURES)
def set_features(session: Session, message: Message) -> None:
    """Take the features acked; without bit 30 all rings are enabled from the start."""
    bits = payload_of(message, U64).value
    unknown = bits & ~(session.device.get_features() | BIT_30)
    if unknown:
        names = " ".join(consts.feature_names(unknown, session.device.device_class))
        raise message.bad("features", f"features {bits:#x} have bits that are not offered: {names}")
    if session.state.features is not None and (session.state.features ^ bits) & BIT_30:
        raise message.bad("features", f"features {bits:#x} change PROTOCOL_FEATURES after it was chosen")
    session.device.set_features(bits & ~BIT_30)
    session.state.features = bits
    if not session.state.rings_wait_for_enable:
        session.enable_all(True)


@handles(Request.SET_OWNER)
def set_owner(session: Session, message: Message) -> None:
    """Begin a front-end's use of the device."""
    session.device.set_owner()
    session.state.advance(Event.OWNER_SET)
    if session.busyloop_us:
        for index in range(session.device.num_queues):
            session.device.set_vring_busyloop_timeout(index, session.busyloop_us)


@handles(Request.RESET_OWNER)
def reset_owner(session: Session, message: Message) -> None:
    """Disable all rings: the message is deprecated, the specification allows that; memory and owner stay."""
    session.enable_all(False)


@handles(Request.GET_PROTOCOL_FEATURES)
def get_protocol_features(session: Session, message: Message) -> U64:
    """Return the protocol features offered."""
    return U64(session.state.offered)


@handles(Request.SET_PROTOCOL_FEATURES)
def set_protocol_features(session: Session, message: Message) -> None:
    """Take the protocol features negotiated."""
    bits = payload_of(message, U64).value
    unknown = bits & ~session.state.offered
    if unknown:
        names = " ".join(consts.protocol_feature_names(unknown))
        raise message.bad("features", f"features {bits:#x} have bits that are not offered: {names}")
    if bits & ProtocolFeature.INBAND_NOTIFICATIONS.mask and ~bits & _INBAND_NEEDS:
        names = " ".join(consts.protocol_feature_names(~bits & _INBAND_NEEDS))
        raise message.bad("features", f"features {bits:#x} have INBAND_NOTIFICATIONS without {names}", fatal=True)
    if bits & ProtocolFeature.GET_VRING_BASE_INFLIGHT.mask and ~bits & ProtocolFeature.INFLIGHT_SHMFD.mask:
        raise message.bad("features", f"features {bits:#x} have GET_VRING_BASE_INFLIGHT without INFLIGHT_SHMFD")
    session.state.negotiated = bits


@handles(Request.RESET_DEVICE)
def reset_device(session: Session, message: Message) -> None:
    """Put rings and features back to their beginning; owner, protocol features and memory stay."""
    session.stop_all_rings()
    for index in range(session.device.num_queues):
        session.device.set_vring_enable(index, False)
        session.device.set_vring_kick(index, None)
        session.device.set_vring_call(index, None)
        session.device.set_vring_err(index, None)
        session.device.set_vring_base(index, 0)
    session.device.set_features(0)
    session.state.features = None
    session.state.status = 0
    if session.inband is not None:
        session.inband.close()
