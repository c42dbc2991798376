"""From vhost-user messages to device verbs: one session for each connection.

Rules: no I/O; replies are returned, descriptors are borrowed for the length of a call. A reply is built after the verb
has returned, hence it *is* the barrier: nobody uses an old memory table, or writes for a stopped ring, once the
front-end has it. A message that is refused changes nothing: it is answered with a non-zero acknowledgement when the
front-end asked for one and REPLY_ACK is negotiated, else the error is raised and the caller closes the connection.

Theory of operation: `handle` judges a message against the tables of `protocol/state.py`, checks the ring's index, calls
the function of `handlers/` that is registered for it. Two things of vhost-user are ours, not the device's: bit 30 (a
front-end without it has all rings enabled from the start, one with it enables each) and what starts a ring.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final

import attrs

from vhostmp import consts
from vhostmp.backchannel import BackendChannel
from vhostmp.consts import BackendRequest, ProtocolFeature, Request
from vhostmp.errors import LocalError, VhostError
from vhostmp.eventloop import EventLoop
from vhostmp.handlers import (
    channel,
    config,
    devicestate,
    dirty,
    inflight,
    iotlb,
    memory,
    negotiation,
    net,
    postcopy,
    rings,
    status,
)
from vhostmp.handlers.registry import HANDLERS, Reply
from vhostmp.inband import CALL, ERR, InBand
from vhostmp.kept_device import Regions
from vhostmp.protocol.codec import BadMessage, Message, encode_reply
from vhostmp.protocol.messages import MESSAGES
from vhostmp.protocol.payloads import U64, VringState, describe
from vhostmp.protocol.state import GOING_ON, Event, Phase, SessionState
from vhostmp.statetransfer import Transfer
from vhostmp.verbs import DeviceVerbs, HasConfig, offered_protocol_features

log = logging.getLogger(__name__)

TOPICS: Final = (
    negotiation,
    memory,
    dirty,
    rings,
    net,
    channel,
    config,
    status,
    devicestate,
    inflight,
    iotlb,
    postcopy,
)
"""The modules whose handlers make up the table."""


@attrs.frozen
class Outgoing:
    """Bytes to send back, maybe none, and descriptors that go with them, which whoever sends them closes."""

    data: bytes = b""
    fds: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is something to send."""
        return bool(self.data)


class Session:
    """What one front-end does with one device, from its connection to its hang-up.

    Attributes:
        device: what the messages are about.
        state: what is negotiated, and the phase.
        busyloop_us: busy-poll time given to each ring once there is an owner, microseconds; 0 leaves it alone.
        loop: the event loop on which a channel of our own is served; None: there can be none.
        channel: on which we ask the front-end, once SET_BACKEND_REQ_FD has come.
        inband: notifications as messages; None where there is no loop to serve them on.
        transfer: of the device's state, the last one that was begun and not asked about.
        started: rings that were started and not stopped since.
        config_changed: whether the front-end is to be told so as soon as a ring runs.
        hang_up: ends the connection, for what happens between two messages; set by who serves it.
        told: memory that the front-end has to acknowledge before it comes into force, in post-copy.
        regions_done: of the device's memory when the last message was done, where that is recorded.
        again_added, again_removed: regions that a control process before us added and removed for the message that it
            died of, which comes again.
        told_regions: by gpa, size and uva, the file a region lies in, and how many ADD_MEM_REG without a REM_MEM_REG.
    """

    def __init__(self, device: DeviceVerbs, *, busyloop_us: int = 0, loop: EventLoop | None = None) -> None:
        """Begin with a device nobody owns."""
        self.device = device
        self.state = SessionState(offered_protocol_features(device, channel=loop is not None))
        self.loop = loop
        self.channel: BackendChannel | None = None
        self.inband = InBand(loop, self._tell_ring) if loop is not None else None
        self.transfer: Transfer | None = None
        self.busyloop_us = busyloop_us
        config.watch_config(self)
        iotlb.watch_iotlb(self)
        postcopy.watch(self)
        self.started: set[int] = set()
        self.config_changed = False
        self.hang_up: Callable[[], None] | None = None
        self.told: postcopy.Told | None = None
        self.told_regions: dict[tuple[int, int, int], tuple[tuple[int, int, int], int]] = {}
        self.regions_done: Regions = frozenset()
        self.again_added: Regions = frozenset()
        self.again_removed: Regions = frozenset()

    def handle(self, message: Message) -> Outgoing:
        """Do what `message` asks for.

        Returns: what to send back.
        Raises: BadMessage: it is refused and cannot be answered; the connection is to be closed.
        """
        acks = message.need_reply and self.state.has(ProtocolFeature.REPLY_ACK)
        try:
            self.state.check(message)
            postcopy.check_order(self, message)
            self._check_index(message)
            if self.state.phase is Phase.UNOWNED and message.request in GOING_ON:
                HANDLERS[Request.SET_OWNER](self, message)
            reply = HANDLERS[message.request](self, message)
        except BadMessage as bad:
            return self.refuse(bad)
        except VhostError as error:
            return self.refuse(message.bad("payload", _explain(message, error)))
        log.debug("device %s: %s", self.device.name, _describe(message, self.device.device_class))
        if reply is None:
            return Outgoing(encode_reply(message.request, U64(0))) if acks else Outgoing()
        if not isinstance(reply, Reply):
            reply = Reply(reply)
        return Outgoing(encode_reply(message.request, reply.payload), reply.fds)

    def refuse(self, bad: BadMessage) -> Outgoing:
        """Answer a message that is not legal.

        Returns: a non-zero acknowledgement, when the front-end wants one and REPLY_ACK is negotiated.
        Raises: BadMessage: there is no way to tell the front-end; the connection is to be closed.
        """
        if bad.fatal or bad.request is None or not bad.need_reply or not self.state.has(ProtocolFeature.REPLY_ACK):
            raise bad
        log.warning("device %s: %s; refused", self.device.name, bad)
        return Outgoing(encode_nack(bad.request))

    def close(self) -> None:
        """Take note that the connection is gone; every further message is illegal."""
        self.state.advance(Event.CLOSED)
        self.started.clear()
        self.set_channel(None)
        self.set_transfer(None)
        if self.inband is not None:
            self.inband.close()
        if isinstance(self.device, HasConfig):
            self.device.on_config_change = None
        iotlb.unwatch_iotlb(self)
        postcopy.forget(self)

    def message_done(self, regions: Regions) -> None:
        """Take note that a message is done, with the device's memory as it is now."""
        self.regions_done = regions
        self.again_added = self.again_removed = frozenset()

    # --- for handlers ---

    def enable_all(self, enable: bool) -> None:
        """Enable or disable every ring."""
        for index in range(self.device.num_queues):
            self.device.set_vring_enable(index, enable)

    def start_ring(self, index: int) -> None:
        """Start a ring. Raises: VhostError: it cannot start; nothing has changed."""
        given: list[BackendRequest] = []
        try:
            self._set_inband(index, given)
            self.device.start_vring(index)
        except VhostError:
            self._unset_inband(index, given)
            raise
        self.started.add(index)
        self.state.advance(Event.RING_STARTED)
        if self.config_changed:
            config.tell_config_change(self)

    def stop_ring(self, index: int) -> int:
        """Stop a ring and return its next available index."""
        base = self.device.stop_vring(index)
        self.rings_stopped([index])
        return base

    def rings_stopped(self, rings: Iterable[int]) -> None:
        """Take note that rings were stopped, by the front-end or because they are not in its memory any more."""
        self.started.difference_update(rings)
        if not self.started:
            self.state.advance(Event.ALL_STOPPED)

    def stop_all_rings(self) -> None:
        """Stop every ring."""
        for index in range(self.device.num_queues):
            self.stop_ring(index)

    def set_channel(self, channel: BackendChannel | None) -> None:
        """Replace the channel on which we ask the front-end; the one before is closed."""
        old, self.channel = self.channel, channel
        if old is not None:
            old.close()
        if channel is not None:
            iotlb.ask_misses(self, again=True)

    def set_transfer(self, transfer: Transfer | None) -> None:
        """Replace the transfer of the device's state; one that has not ended is given up."""
        old, self.transfer = self.transfer, transfer
        if old is not None:
            old.close()

    # --- inside ---

    def _setter(self, kind: BackendRequest) -> Callable[[int, int | None], None]:
        return self.device.set_vring_call if kind is CALL else self.device.set_vring_err

    def _set_inband(self, index: int, given: list[BackendRequest]) -> None:
        """Have a ring that is about to start call and err by message, unless the front-end has set how.

        What is made for that is added to `given`.
        """
        if self.inband is None or not self.state.has(ProtocolFeature.INBAND_NOTIFICATIONS):
            return
        for kind in (CALL, ERR):
            if (fd := self.inband.watched(kind, index)) is not None:
                given.append(kind)
                self._setter(kind)(index, fd)

    def _unset_inband(self, index: int, given: Sequence[BackendRequest]) -> None:
        """Undo it."""
        for kind in given:
            assert self.inband is not None
            with suppress(VhostError):
                self._setter(kind)(index, None)
            self.inband.forget(kind, index)

    def _tell_ring(self, kind: BackendRequest, index: int) -> None:
        if self.channel is not None:
            self.channel.signal(kind, VringState(index, 0))

    def _check_index(self, message: Message) -> None:
        index = getattr(message.payload, "index", None)
        if index is not None and not index < self.device.num_queues:
            raise message.bad("index", f"index {index} is not below {self.device.num_queues}, the number of rings")


def encode_nack(request: int) -> bytes:
    """Build the acknowledgement that says a message failed; `request` may be one that we do not know."""
    return encode_reply(request, U64(1))


def _describe(message: Message, device_class: str) -> str:
    """Write a message with its fields; features by name."""
    match message.request, message.payload:
        case Request.SET_FEATURES, U64(bits):
            fields = " ".join(consts.feature_names(bits, device_class))
        case Request.SET_PROTOCOL_FEATURES, U64(bits):
            fields = " ".join(consts.protocol_feature_names(bits))
        case _, payload:
            fields = describe(payload)
    return f"{message.name}: {fields}" if fields else message.name


def _explain(message: Message, error: VhostError) -> str:
    """Say what the device has against a message, with the message's fields."""
    code = "" if isinstance(error, LocalError) else f" ({errno.errorcode.get(error.errno, error.errno)})"
    fields = describe(message.payload)
    return f"{fields}: {error}{code}" if fields else f"{error}{code}"


assert HANDLERS.keys() == MESSAGES.keys(), "every message that is understood is acted upon"
