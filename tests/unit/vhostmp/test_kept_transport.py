"""What a connection that outlives its control process needs of Linux (vhostmp/kept_transport.py, "Theory")."""

from __future__ import annotations

import os
import socket

from vhostmp.kept_transport import SO_PEEK_OFF
from vhostmp.transport import connected_pair


def offset(sock: socket.socket) -> int:
    """Return where the next look begins."""
    return sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)


def received(sock: socket.socket, flags: int = 0) -> bytes:
    """Read up to eight bytes, and close what came along."""
    data, control, _, _ = sock.recvmsg(8, socket.CMSG_SPACE(4), flags)
    for _, _, payload in control:
        os.close(int.from_bytes(payload[:4], "little"))
    return data


def test_what_is_taken_is_taken_off_where_to_look() -> None:
    """SO_PEEK_OFF says, after a death at any place, how many of the bytes that were peeked are still to be taken.

    Each read lowers it by what that takes, and takes no more than up to the end of the bytes that descriptors came
    with; it is never below 0. tests/model/adopt.py builds on that.
    """
    ours, theirs = connected_pair()
    event = os.eventfd(0)
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        socket.send_fds(ours, [b"abcd"], [event])
        ours.send(b"efgh")
        os.close(event)
        seen = b""
        while len(seen) < len(b"abcdefgh"):
            seen += received(theirs, socket.MSG_PEEK)
            assert offset(theirs) == len(seen)
        assert seen == b"abcdefgh"
        assert received(theirs) == b"abcd"
        assert offset(theirs) == len(b"efgh")
        assert theirs.recv(3) == b"efg"
        assert offset(theirs) == len(b"h")
        assert theirs.recv(8) == b"h"
        assert offset(theirs) == 0
        ours.send(b"i")
        assert theirs.recv(1) == b"i"
        assert offset(theirs) == 0
