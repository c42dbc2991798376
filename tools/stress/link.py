"""A front-end's connection during which features are negotiated, and what a back-end did with a message.

Rules: `ask`, `do` and the like of frontend.py send one message. `must` is for messages that a careful front-end sends:
whatever comes back but success is a Failure. `try_` is for those that a back-end should refuse: it returns what it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from vhostmp.tools.stress.consts import ANSWERED, Feature, ProtocolFeature, Request, bits, has
from vhostmp.tools.stress.frontend import NEED_REPLY, REPLY, U64_BYTES, VERSION, Frontend, Reply, message, u64
from vhostmp.tools.stress.verdict import Failure


class Outcome(StrEnum):
    """What a back-end did with a message."""

    ACCEPTED = "accepted"  # acknowledged with 0, or answered
    REFUSED = "refused"  # acknowledged with another number, or answered by an empty payload
    CLOSED = "closed"  # hung up
    SILENT = "silent"  # no acknowledgement was asked for, and the connection lives


REJECTED = (Outcome.REFUSED, Outcome.CLOSED)
"""How a message may be turned down."""


class Link(Frontend):
    """A connection: what was offered, what was taken."""

    features_offered = 0
    protocol_offered = 0
    features = 0
    protocol = 0

    @property
    def acks(self) -> bool:
        """Whether REPLY_ACK is negotiated."""
        return has(self.protocol, ProtocolFeature.REPLY_ACK)

    def look(self) -> None:
        """Learn what is offered. The first messages of every connection."""
        self.features_offered = self.get_u64(Request.GET_FEATURES)
        if has(self.features_offered, Feature.PROTOCOL_FEATURES):
            self.protocol_offered = self.get_u64(Request.GET_PROTOCOL_FEATURES)

    def handshake(self, protocol: int | None = None) -> None:
        """Learn what is offered, take these protocol features of it (None: the default), and own the device."""
        self.look()
        self.take(DEFAULT_PROTOCOL if protocol is None else protocol)
        self.must(Request.SET_OWNER)

    def take(self, protocol: int) -> None:
        """Take these protocol features of those that are offered."""
        self.protocol = 0
        if has(self.features_offered, Feature.PROTOCOL_FEATURES):
            # Nobody acknowledges anything before this one.
            self.send(Request.SET_PROTOCOL_FEATURES, u64(self.protocol_offered & protocol))
            self.protocol = self.protocol_offered & protocol

    def get_u64(self, request: int, payload: bytes = b"") -> int:
        """Send a request whose reply is a number, and return it. Failure when the reply is anything else."""
        answer = self.answer(request, payload)
        if len(answer.payload) != U64_BYTES:
            raise Failure(f"the reply to {name(request)} has {len(answer.payload)} bytes, not {U64_BYTES}")
        return answer.u64

    def answer(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Reply:
        """Send a request that has a reply of its own, and return it. Failure when it is no reply to that."""
        try:
            self.send(request, payload, fds)
            got = self.reply()
        except EOFError:
            raise Failure(f"hung up at {name(request)}") from None
        except ConnectionError:
            raise Failure(f"has hung up before {name(request)}") from None
        except TimeoutError:
            raise Failure(f"no reply to {name(request)} in {self.patience:g} s") from None
        if got.request != request or got.flags & ~NEED_REPLY != VERSION | REPLY:
            raise Failure(f"the reply to {name(request)} is request {got.request} with flags {got.flags:#x}")
        return got

    def must(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a message that a back-end has no reason to refuse, and wait until it was handled.

        Without REPLY_ACK a GET_FEATURES after it shows that the connection lives.
        """
        outcome = self.try_(request, payload, fds)
        if outcome in REJECTED:
            raise Failure(f"{name(request)} was {outcome}")

    def try_(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, size: int | None = None) -> Outcome:
        """Send a message, with NEED_REPLY where that is negotiated, and return what became of it. `size` lies.

        Failure when nothing comes back at all.
        """
        flags = VERSION | (NEED_REPLY if self.acks and request not in ANSWERED else 0)
        return self.try_raw(message(request, payload, flags=flags, size=size), fds, request, flags)

    def try_raw(self, data: bytes, fds: Sequence[int], request: int, flags: int = VERSION) -> Outcome:
        """Send the bytes of one message and return what became of it."""
        acked = bool(flags & NEED_REPLY) and self.acks
        answered = request in ANSWERED
        try:
            self.send_raw(data, fds)
            if not (acked or answered):
                self.send(Request.GET_FEATURES)
            got = self.reply()
        except (EOFError, ConnectionError):
            return Outcome.CLOSED
        except TimeoutError:
            raise Failure(f"nothing comes back for {name(request)} in {self.patience:g} s") from None
        if not (acked or answered):
            if got.request != Request.GET_FEATURES:
                raise Failure(f"an answer to {name(request)} that nobody asked for: {got}")
            return Outcome.SILENT
        if got.request != request or not got.flags & REPLY:
            raise Failure(f"{name(request)} was answered by {got}")
        if answered:
            return Outcome.ACCEPTED if got.payload else Outcome.REFUSED
        if len(got.payload) != U64_BYTES:
            raise Failure(f"{name(request)} was acknowledged with {len(got.payload)} bytes")
        return Outcome.REFUSED if got.u64 else Outcome.ACCEPTED

    def drain(self) -> bool:
        """Read whatever comes back until all that was sent has been handled. Returns whether the connection lives."""
        try:
            self.send(Request.GET_FEATURES)
            while self.reply().request != Request.GET_FEATURES:
                pass
        except (EOFError, ConnectionError):
            return False
        except TimeoutError:
            raise Failure(f"no reply to GET_FEATURES in {self.patience:g} s") from None
        return True


DEFAULT_PROTOCOL = bits(
    ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.CONFIG, ProtocolFeature.CONFIGURE_MEM_SLOTS
)
"""What a plain front-end takes of what is offered."""


def name(request: int) -> str:
    """Return a request's name, for messages."""
    try:
        return Request(request).name
    except ValueError:
        return f"request {request}"
