"""The table of handlers: which function acts upon which message.

Rules: a handler is a function of the session and the message, registered by `handles`. It raises VhostError or
BadMessage with nothing changed; it returns the reply of its message, or None where the message has none of its own.
What it keeps of a descriptor of the message it duplicates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import attrs

from vhostmp.consts import Request
from vhostmp.protocol.codec import Message
from vhostmp.protocol.payloads import Payload

if TYPE_CHECKING:
    from vhostmp.session import Session

T = TypeVar("T")


@attrs.frozen
class Reply:
    """A reply that carries descriptors, which it owns: who sends it closes them."""

    payload: Payload
    fds: tuple[int, ...] = ()


Handler: TypeAlias = Callable[["Session", Message], "Payload | Reply | None"]

HANDLERS: Final[dict[Request, Handler]] = {}
"""Handler by request; complete once every module of this package is imported."""


def handles(request: Request) -> Callable[[Handler], Handler]:
    """Make a function the one that acts upon `request`."""

    def register(handler: Handler) -> Handler:
        assert request not in HANDLERS, f"{request.name} has two handlers"
        HANDLERS[request] = handler
        return handler

    return register


def payload_of(message: Message, kind: type[T]) -> T:
    """Return the payload as what `MESSAGES` says it is."""
    assert isinstance(message.payload, kind)
    return message.payload


def fd_of(message: Message) -> int | None:
    """Return the descriptor that came with the message, if any; borrowed."""
    return message.fds[0] if message.fds else None
