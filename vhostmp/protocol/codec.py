"""Bytes and file descriptors in, messages out: the incremental decoder of vhost-user, and the encoder.

Rules: no I/O: the decoder never closes a descriptor, it hands the numbers on; whoever received them (`transport.py`)
owns them until the message is dealt with. A message is judged once it is complete; what is wrong raises `BadMessage`,
which names the message and the field. After a `BadMessage` that is not fatal the decoder stands at the next message.

Theory of operation: `wanted` says how many bytes complete the header or the payload; the caller reads at most so many,
hence descriptors it receives belong to the message being read (on a UNIX stream socket a read never passes the bytes
that descriptors were sent with). A front-end sends a message and its descriptors with one sendmsg(), so a second batch
within one message is refused at once, which also bounds how many can pile up.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from vhostmp import consts
from vhostmp.consts import Request
from vhostmp.errors import PeerError
from vhostmp.protocol.messages import MESSAGES, Header
from vhostmp.protocol.payloads import FieldError, Payload


class BadMessage(PeerError):
    """The front-end sent a message that is not legal; nothing of it has been acted upon.

    Attributes:
        request: number of the request, None while less than a header has arrived.
        field: name of the field that is wrong.
        need_reply: whether the message asks for an acknowledgement and has no reply of its own.
        fatal: whether only closing helps: the place where the next message begins is unknown, say.
    """

    def __init__(
        self, request: int | None, field: str, why: str, *, need_reply: bool = False, fatal: bool = False
    ) -> None:
        """Build the text `<message>: <why>`; `why` begins with the field and its value."""
        super().__init__(f"{'header' if request is None else consts.request_name(request)}: {why}")
        self.request = request
        self.field = field
        self.need_reply = need_reply
        self.fatal = fatal


@attrs.frozen
class Message:
    """A complete message, right as far as it can be judged alone.

    Attributes:
        request: which message.
        payload: its payload, of the class that `MESSAGES` names.
        fds: descriptors that came with it, as many as the message wants; borrowed from who received them.
        need_reply: whether it asks for an acknowledgement and has no reply of its own.
    """

    request: Request
    payload: Payload
    fds: Sequence[int] = ()
    need_reply: bool = False

    @property
    def name(self) -> str:
        """Name of the request."""
        return self.request.name

    def bad(self, field: str, why: str, *, fatal: bool = False) -> BadMessage:
        """Build the error that refuses this message for `field`; with `fatal` the connection ends by it."""
        return BadMessage(self.request, field, why, need_reply=self.need_reply, fatal=fatal)


class Decoder:
    """Turns a stream of bytes and descriptors into messages; one for each connection."""

    def __init__(self) -> None:
        """Start at a message boundary."""
        self._reset()

    def _reset(self) -> None:
        self._header: Header | None = None
        self._data = bytearray()
        self._fds: tuple[int, ...] = ()
        self._fault: str | None = None
        self._doubtful = False

    @property
    def wanted(self) -> int:
        """Number of bytes, at least 1, that complete the header or the payload now being read."""
        size = Header.STRUCT.size if self._header is None else self._header.size
        return size - len(self._data)

    @property
    def inside(self) -> bool:
        """Whether a message has begun and is not complete."""
        return self._header is not None or bool(self._data)

    def feed(
        self, data: bytes, fds: Sequence[int] = (), fault: str | None = None, *, doubtful: bool = False
    ) -> Message | None:
        """Take the next bytes, 1 to `wanted` of them, and what came with them.

        Args:
            data: the bytes.
            fds: descriptors received with them.
            fault: what was wrong with the ancillary data, if anything; it is held against the message when it is
                complete, so that it can still be answered.
            doubtful: the descriptors may be another message's: they count only for one that has any.

        Returns: the message these bytes complete, or None when more are needed.
        Raises: BadMessage: the message is refused. Unless it is fatal, the next byte begins a new message.
        """
        if not 0 < len(data) <= self.wanted:
            raise ValueError(f"{len(data)} bytes fed, 1 to {self.wanted} wanted")
        if fds and self._fds:
            self._fault = fault = "came in two parts"
            raise self._bad("fds", f"fds {fault}", fatal=True)
        self._data += data
        self._fds += tuple(fds)
        self._fault = self._fault or fault
        self._doubtful = self._doubtful or doubtful
        if self.wanted:
            return None
        if self._header is None:
            header = self._header = Header.unpack(bytes(self._data))
            self._data.clear()
            try:
                header.check()
            except FieldError as error:
                raise self._bad(error.field, str(error), fatal=True) from None
            if header.size:
                return None
        return self._complete(self._header)

    def end(self) -> None:
        """Take the end of the stream. Raises: BadMessage (fatal): it comes inside a message."""
        if self.inside:
            part, size = ("payload", self._header.size) if self._header else ("header", Header.STRUCT.size)
            raise self._bad("size", f"hang-up after {len(self._data)} of {size} bytes of the {part}", fatal=True)

    def _complete(self, header: Header) -> Message:
        """Judge a whole message and stand at the next one."""
        data, fds, fault = bytes(self._data), self._fds, self._fault
        try:
            try:
                request = Request(header.request)
                spec = MESSAGES[request]
            except (ValueError, KeyError):
                raise self._bad("request", f"request {header.request:#x} is not supported") from None
            if fault is not None:
                raise self._bad("fds", fault)
            try:
                payload = spec.payload.unpack(data)
            except FieldError as error:
                raise self._bad(error.field, str(error)) from None
            if self._doubtful and len(fds) not in spec.fds.wanted(payload):
                fds = ()
            if len(fds) not in spec.fds.wanted(payload):
                raise self._bad("fds", f"{len(fds)} fds came with it, wanted {spec.fds.value}")
            return Message(request, payload, fds, header.need_reply and not spec.has_reply)
        finally:
            self._reset()

    def _bad(self, field: str, why: str, *, fatal: bool = False) -> BadMessage:
        """Build the error for the message being read."""
        header = self._header
        if header is None:
            return BadMessage(None, field, why, fatal=fatal)
        spec = next((spec for request, spec in MESSAGES.items() if request == header.request), None)
        need_reply = header.need_reply and not (spec is not None and spec.has_reply)
        return BadMessage(header.request, field, why, need_reply=need_reply, fatal=fatal)


def encode_request(request: int, payload: bytes = b"", *, need_reply: bool = False) -> bytes:
    """Build a front-end's message (for a front-end: tests, tools); descriptors travel beside it."""
    flags = consts.VHOST_USER_VERSION | (consts.VHOST_USER_NEED_REPLY_FLAG if need_reply else 0)
    return Header(request, flags, len(payload)).pack() + payload


def encode_reply(request: int, payload: Payload) -> bytes:
    """Build the reply to `request`, which may be one that is not known here."""
    data = payload.pack()
    return Header(request, consts.VHOST_USER_VERSION | consts.VHOST_USER_REPLY_FLAG, len(data)).pack() + data
