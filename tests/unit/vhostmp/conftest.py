"""What the tests of messages share. A test file that uses these has a fixture `rig`, negotiated as it needs."""

from __future__ import annotations

import socket
from collections.abc import Generator

import pytest

from tests.rig import Rig
from vhostmp.consts import Request
from vhostmp.transport import connected_pair


@pytest.fixture
def channel(rig: Rig) -> Generator[socket.socket, None, None]:
    """The front-end's end of the channel."""
    ours, theirs = connected_pair()
    with ours:
        assert rig.do(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()]) == 0
        theirs.close()
        ours.setblocking(False)
        yield ours
