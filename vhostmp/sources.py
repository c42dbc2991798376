"""Where the front-ends of a device come from: sockets to listen at or to connect to, and inherited ones."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import attrs

from vhostmp import transport
from vhostmp.transport import Listener


@attrs.frozen
class Dialer:
    """A place to connect to, for a front-end that listens."""

    path: str


@attrs.frozen
class Source:
    """Where the front-ends of one device come from, and what it is called."""

    kind: Listener | Dialer | socket.socket
    label: str

    def close(self) -> None:
        """Close what is open."""
        if not isinstance(self.kind, Dialer):
            self.kind.close()


def open_sources(
    paths: Sequence[str], fds: Sequence[int], *, connect: bool = False, access: transport.Access = transport.PRIVATE
) -> list[Source]:
    """Open every place that front-ends come from, paths first.

    Args:
        access: who may connect to sockets that we listen at.
        paths: sockets to listen at, or with `connect` to connect to.
        fds: inherited sockets, listening or connected.
        connect: whether the front-ends listen and we connect.

    Raises: LocalError: says what to do; nothing is left open or on disk, inherited descriptors excepted.
    """
    sources: list[Source] = []
    try:
        for path in paths:
            sources.append(Source(Dialer(path) if connect else transport.listen(path, access), path))
        for fd in fds:
            sources.append(Source(transport.adopt(fd), f"fd {fd}"))
    except BaseException:
        for source in sources:
            source.close()
        raise
    return sources
