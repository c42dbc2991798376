"""Fuzz target "session": conversations of a hostile front-end with a session, over a device that remembers (fakes.py).

Theory of operation. The bytes become steps: mostly messages, of payloads that have the right size and fields that are
often sensible, with descriptors of every kind (sent.py); beside them what the world does meanwhile: the event loop
turns, the front-end writes to the pipes and channels that it gave us or hangs them up, the device changes its
configuration, misses an address, or has trouble of its own. The conversation begins before the handshake, after it,
with memory, or with both rings running. So coverage goes deep from the first input on.

What must hold: handle() raises nothing but BadMessage; a message that is refused has changed nothing; a reply is one
whole message of the right kind; once the session is closed no descriptor is left.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any, Final, cast

from tests.fakes import FEATURES, FakeDevice, FakeDeviceBehindIommu, FakeDeviceWithPostcopy
from tests.fuzz.feed import Feed
from tests.fuzz.sent import KINDS, MAKERS, MEMORY_BYTES, UVA, WIDE, Descriptors
from vhostmp.consts import BIT_30, Request
from vhostmp.errors import SysError
from vhostmp.eventloop import EventLoop
from vhostmp.iotlb import Miss
from vhostmp.protocol.codec import BadMessage, Decoder, Message
from vhostmp.protocol.messages import MESSAGES, Fds, Header
from vhostmp.protocol.payloads import U64, Region, VringAddr, VringState
from vhostmp.session import Outgoing, Session

STEPS_MAX: Final = 64
FDS_MAX: Final = 9
REQUESTS: Final = sorted(MESSAGES)
FITS: Final = {
    Request.SET_MEM_TABLE: "memory",
    Request.ADD_MEM_REG: "memory",
    Request.SET_LOG_BASE: "memory",
    Request.SET_INFLIGHT_FD: "memory",
    Request.SET_BACKEND_REQ_FD: "stream",
}
"""What kind of descriptor a message wants, where that is not an eventfd."""


class World:
    """A session, its device, and the front-end's side."""

    def __init__(self, source: Feed) -> None:
        """Make both, as the first byte says."""
        options = source.u8()
        self.source = source
        self.given = Descriptors()
        self.device = (FakeDevice, FakeDeviceBehindIommu, FakeDeviceWithPostcopy)[options % 3]()
        self.loop = EventLoop()
        self.session = Session(
            self.device, loop=self.loop if options & 24 else None, busyloop_us=50 if options & 4 else 0
        )
        self.decoder = Decoder()
        self.ended = False
        self.troubled = False
        """Whether the device has failed: then it may fail to undo, too."""

    def seen(self) -> tuple[object, ...]:
        """Everything that a message may change, but for what a ring that is stopped is kicked by."""
        session = self.session
        device = dict(self.device.state())
        for ring in cast("list[dict[str, Any]]", device["rings"]):
            if not ring["started"]:
                ring["fds"] = ring["fds"][1:]
        state = (session.state.phase, session.state.negotiated, session.state.features, session.state.status)
        acknowledged = session.told is None or len(session.told.regions)
        told = (acknowledged, frozenset(session.started), dict(session.told_regions), session.channel, session.transfer)
        return (*state, *told, session.config_changed, device)

    def say(self, request: int, payload: bytes = b"", kinds: Sequence[str] = (), flags: int = 1) -> None:
        """Send a message with descriptors and look at what comes of it."""
        if self.ended:
            return
        before = self.seen()
        fds = [self.given.get(kind) for kind in kinds]
        refused = False
        reply = Outgoing()
        try:
            message = self.decoder.feed(Header(request, flags, len(payload)).pack(), fds)
            if message is None:
                message = self.decoder.feed(payload)
            assert message is not None, "a whole message, and nothing came out"
            reply = self.session.handle(message)
            refused = bool(reply) and self._is_nack(message, reply)
        except BadMessage as bad:
            refused = True
            try:
                reply = self.session.refuse(bad)
            except BadMessage:
                self.ended = True
        self._check_reply(request, reply)
        for fd in reply.fds:
            os.close(fd)
        if refused and not self.troubled:
            after = self.seen()
            assert after == before, f"refused, and yet changed: {request}: {before} to {after}"

    @staticmethod
    def _is_nack(message: Message, reply: Outgoing) -> bool:
        payload = reply.data[Header.SIZE :]
        # In post-copy a table, or a region, is answered with itself, not with a number.
        own = MESSAGES[message.request].has_reply or len(payload) != U64.STRUCT.size
        return not own and U64.unpack(payload).value != 0

    @staticmethod
    def _check_reply(request: int, reply: Outgoing) -> None:
        if reply:
            header = Header.unpack(reply.data[: Header.SIZE])
            assert header.request == request, "a reply to something else"
            assert header.flags == 5, "a reply that does not say so"  # noqa: PLR2004 - version 1, reply
            assert header.size == len(reply.data) - Header.SIZE, "a reply of another size than it says"
        else:
            assert not reply.fds, "descriptors without a message"

    def begin(self) -> None:
        """Have the usual conversation up to somewhere."""
        how_far = self.source.u8() % 6
        if how_far == 0:
            return
        self.say(Request.SET_OWNER)
        self.say(Request.SET_FEATURES, U64(FEATURES & ~(1 << 26) | BIT_30).pack())
        features = self.session.state.offered
        if how_far == 1:
            features &= self.source.number(3)
        self.say(Request.SET_PROTOCOL_FEATURES, U64(features).pack())
        if how_far > 2:  # noqa: PLR2004 - and memory
            whole = Region(0, MEMORY_BYTES, UVA, 0).pack()
            self.say(Request.SET_MEM_TABLE, bytes([1, *bytes(7)]) + whole, ["memory"])
        if how_far > 3:  # noqa: PLR2004 - and the channel
            self.say(Request.SET_BACKEND_REQ_FD, b"", ["stream"])
        if how_far > 4:  # noqa: PLR2004 - and the rings
            for index in range(2):
                start = UVA + index * 0x10000
                self.say(Request.SET_VRING_NUM, VringState(index, 256).pack())
                self.say(Request.SET_VRING_ADDR, VringAddr(index, 0, start, start + 0x8000, start + 0x4000, 0).pack())
                self.say(Request.SET_VRING_KICK, U64(index).pack(), ["event"])

    def step(self) -> None:
        """One thing that happens."""
        kind = self.source.u8()
        if kind < 0xB0:  # noqa: PLR2004 - mostly messages
            self._message(kind)
        elif kind < 0xC0:  # noqa: PLR2004
            self.loop.turn(0)
        elif kind < 0xD0:  # noqa: PLR2004
            self._write()
        elif kind < 0xD8:  # noqa: PLR2004
            self.given.hang_up(self.source.pick(KINDS))
        elif kind < 0xE8:  # noqa: PLR2004
            self._happen(kind)
        else:
            self._trouble()

    def _message(self, kind: int) -> None:
        source = self.source
        request = REQUESTS[kind] if kind < len(REQUESTS) else source.pick(REQUESTS)
        spec = MESSAGES[request]
        payload = MAKERS[spec.payload.__name__](source)
        shape = source.u8()
        if shape >= 0xF8:  # noqa: PLR2004 - rarely of another size
            payload = source.bytes(source.u8())
        kinds = self._kinds(request, spec.fds, payload, shape)
        flags = 1 | (8 if shape & 1 else 0)
        self.say(request, payload, kinds, flags if shape < 0xFE else source.u8())  # noqa: PLR2004

    def _kinds(self, request: Request, fds: Fds, payload: bytes, shape: int) -> list[str]:
        """Choose descriptors: mostly as many as there have to be, of the kind that fits."""
        if shape & 0x60 == 0x60:  # noqa: PLR2004 - any
            return [self.source.pick(KINDS) for _ in range(self.source.u8() % FDS_MAX)]
        match fds:
            case Fds.ONE | Fds.OPTIONAL:
                count = 1
            case Fds.PER_REGION:
                count = payload[0] if payload else 0
            case Fds.PER_NOFD_BIT:
                count = 1 - (payload[1] & 1) if len(payload) > 1 else 0
            case _:
                count = 0
        usual = FITS.get(request, "event")
        if request is Request.SET_DEVICE_STATE_FD:
            usual = self.source.pick(("pipe", "drain", "stream"))
        return [usual] * count

    def _write(self) -> None:
        """The front-end writes to what it kept of a pair, or reads it."""
        kind = self.source.pick(("pipe", "stream", "drain"))
        fd = self.given.theirs.get(kind)
        if fd is None:
            return
        how = self.source.u8()
        try:
            if kind == "drain":
                os.read(fd, 4096)
            elif how & 1:
                os.write(fd, b"good" + self.source.bytes(how >> 4))
            elif how & 2:
                answer = Header(how >> 3 & 7, 5, 8).pack() + U64(how >> 6).pack()
                os.write(fd, answer)
            elif how & 4:
                os.write(fd, self.source.bytes(how >> 3))
            elif kind == "stream":
                os.read(fd, 4096)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            pass  # full, empty, or our end is closed

    def _happen(self, kind: int) -> None:
        """The device, or a worker, does something."""
        if kind & 1 and self.device.on_config_change is not None:
            self.device.on_config_change()
        elif isinstance(self.device, FakeDeviceBehindIommu):
            self.device.iotlb.miss(Miss(kind & 1, WIDE[kind & 7], 1 + kind % 3, denied=bool(kind & 4)))
        elif self.session.inband is not None:
            for ring in self.device.rings:
                for fd in (ring.call, ring.err):
                    if fd is not None:
                        os.eventfd_write(fd, 1)

    def _trouble(self) -> None:
        """The device refuses the n-th verb from now on, once, for want of memory, say."""
        left = self.source.u8() % 16

        def fail(verb: str) -> None:
            nonlocal left
            left -= 1
            if left < 0 and verb != "stop_all":
                self.device.fail = lambda verb: None
                self.troubled = True
                raise SysError(f"{verb}: no", errno.ENOMEM)

        self.device.fail = fail

    def end(self) -> None:
        """The front-end goes: as the server does it."""
        self.device.fail = lambda verb: None
        self.session.close()
        self.device.stop_all()
        self.device.close()
        self.loop.close()
        self.given.close()


def one(data: bytes) -> None:
    """Have one conversation, from its beginning to the hang-up."""
    before = os.listdir("/proc/self/fd")
    world = World(Feed(data))
    try:
        world.begin()
        for _ in range(STEPS_MAX):
            if world.ended or not world.source:
                break
            world.step()
    finally:
        world.end()
    after = os.listdir("/proc/self/fd")
    assert len(before) == len(after), f"{len(after) - len(before)} descriptors are left"
