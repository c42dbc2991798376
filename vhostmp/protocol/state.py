"""Which message is legal when: the session's phases and transitions, as data.

Rules: no I/O; everything that decides legality by what happened before stands in the tables below; an illegal message
raises and changes nothing. What concerns one ring only (its size may not change while it runs) is the device's to say.

::

    UNOWNED --owner set--> OWNED --ring started--> RUNNING
                             ^                        |
                             '--all rings stopped-----'       each --closed--> CLOSED
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import attrs

from vhostmp import consts
from vhostmp.consts import ProtocolFeature, Request
from vhostmp.protocol.codec import Message
from vhostmp.protocol.messages import MESSAGES


class Phase(enum.Enum):
    """What a connection has reached."""

    UNOWNED = "before SET_OWNER"
    OWNED = "while all rings are stopped"
    RUNNING = "while a ring runs"
    CLOSED = "after the connection is closed"


class Event(enum.Enum):
    """What moves a connection from one phase to another."""

    OWNER_SET = "owner set"
    RING_STARTED = "ring started"
    ALL_STOPPED = "all rings stopped"
    CLOSED = "closed"


TRANSITIONS: Final[Mapping[Phase, Mapping[Event, Phase]]] = {
    Phase.UNOWNED: {Event.OWNER_SET: Phase.OWNED, Event.CLOSED: Phase.CLOSED},
    Phase.OWNED: {
        Event.RING_STARTED: Phase.RUNNING,
        Event.ALL_STOPPED: Phase.OWNED,
        Event.CLOSED: Phase.CLOSED,
    },
    Phase.RUNNING: {
        Event.RING_STARTED: Phase.RUNNING,
        Event.ALL_STOPPED: Phase.OWNED,
        Event.CLOSED: Phase.CLOSED,
    },
    Phase.CLOSED: {Event.CLOSED: Phase.CLOSED},
}
"""Next phase by phase and event; a pair that is missing cannot happen."""

_ALWAYS: Final = frozenset(
    {Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM, Request.GET_MAX_MEM_SLOTS}
)

GOING_ON: Final = frozenset({Request.SET_VRING_ENABLE, Request.GET_VRING_BASE})
"""With one of these a front-end begins that goes on with a new back-end after it lost one: DPDK's virtio-user in server
mode stops its rings first, and thinks of itself as the owner still. So they set the owner too."""

LEGAL: Final[Mapping[Phase, frozenset[Request]]] = {
    # QEMU negotiates protocol features and gives us our channel before it sets the owner
    Phase.UNOWNED: _ALWAYS | GOING_ON | {Request.SET_OWNER, Request.SET_PROTOCOL_FEATURES, Request.SET_BACKEND_REQ_FD},
    Phase.OWNED: frozenset(MESSAGES) - {Request.SET_OWNER},
    Phase.RUNNING: frozenset(MESSAGES) - {Request.SET_OWNER, Request.SET_PROTOCOL_FEATURES},
    Phase.CLOSED: frozenset(),
}
"""Requests that are legal in each phase (vu "Starting and stopping rings", "Multiple queue support")."""


@attrs.define
class SessionState:
    """What a connection has negotiated.

    Attributes:
        offered: mask of the protocol features offered on this connection.
        phase: see `Phase`.
        negotiated: mask of the protocol features the front-end has set.
        features: mask the front-end gave with SET_FEATURES, bit 30 included; None before that.
        status: the device status, where STATUS is negotiated.
    """

    offered: int
    phase: Phase = Phase.UNOWNED
    negotiated: int = 0
    features: int | None = None
    status: int = 0

    def has(self, feature: ProtocolFeature) -> bool:
        """Whether `feature` is negotiated."""
        return bool(self.negotiated & feature.mask)

    @property
    def rings_wait_for_enable(self) -> bool:
        """Whether rings begin disabled: bit 30 is acked (vu "Ring states")."""
        return self.features is not None and bool(self.features >> consts.VHOST_USER_F_PROTOCOL_FEATURES & 1)

    def check(self, message: Message) -> None:
        """Judge whether `message` is legal now. Raises: BadMessage: it is not; nothing has changed."""
        spec = MESSAGES[message.request]
        if spec.offered is not None and not self.offered & spec.offered.mask:
            raise message.bad("request", f"needs protocol feature {spec.offered.name}, which is not offered")
        if spec.negotiated is not None and not self.has(spec.negotiated):
            raise message.bad("request", f"needs protocol feature {spec.negotiated.name}, which is not negotiated")
        if message.request not in LEGAL[self.phase]:
            raise message.bad("request", f"is not legal {self.phase.value}")

    def advance(self, event: Event) -> None:
        """Move to the phase that follows on `event`."""
        self.phase = TRANSITIONS[self.phase][event]
