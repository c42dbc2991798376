"""The device's configuration space (vu "Virtio device config space").

A read beyond the end of what the device has is answered with zeros as long as it begins inside: front-ends ask for the
whole of the newest structure that they know. A write that says what is there already is taken whatever the field, for
that is what the destination of a migration is sent; what a write may change is the device's to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhostmp.consts import BackendRequest, ProtocolFeature, Request
from vhostmp.handlers.registry import handles, payload_of
from vhostmp.protocol.codec import Message
from vhostmp.protocol.payloads import Config, Empty
from vhostmp.verbs import HasConfig

if TYPE_CHECKING:
    from vhostmp.session import Session


@handles(Request.GET_CONFIG)
def get_config(session: Session, message: Message) -> Config | Empty:
    """Return a part of the configuration space, or nothing when it begins beyond the end: that is the error reply."""
    asked = payload_of(message, Config)
    space = _space(session)
    if asked.offset >= len(space):
        return Empty()
    size = len(asked.data)
    return Config(asked.offset, asked.flags, space[asked.offset : asked.offset + size].ljust(size, b"\0"))


@handles(Request.SET_CONFIG)
def set_config(session: Session, message: Message) -> None:
    """Write to the configuration space."""
    assert isinstance(session.device, HasConfig)
    written = payload_of(message, Config)
    if written.flags > 1:
        raise message.bad("flags", f"flags {written.flags:#x} are unknown")
    space = _space(session)
    end = written.offset + len(written.data)
    if end > len(space):
        raise message.bad("offset", f"offset {written.offset} and size {len(written.data)} pass {len(space)} bytes")
    if space[written.offset : end] != written.data:
        session.device.write_config(written.offset, written.data)


def watch_config(session: Session) -> None:
    """Have the front-end told whenever the device's configuration changes."""
    if isinstance(session.device, HasConfig):
        session.device.on_config_change = lambda: tell_config_change(session)


def tell_config_change(session: Session) -> None:
    """Tell the front-end that the configuration has changed, now or, while the device is suspended, once it runs."""
    session.config_changed = not session.started
    if session.started and session.channel is not None and session.state.has(ProtocolFeature.CONFIG):
        session.channel.signal(BackendRequest.CONFIG_CHANGE_MSG)


def _space(session: Session) -> bytes:
    assert isinstance(session.device, HasConfig)
    return session.device.config or b""
