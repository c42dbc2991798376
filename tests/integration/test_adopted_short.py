"""The control process has no descriptor left, and dies: what cannot go on is lost, and no start is refused for it."""

from __future__ import annotations

import array
import fcntl
import os
import resource
import socket
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.helpers import wait_until
from tests.integration.restarting import Restarting
from tests.integration.traffic import Traffic
from tests.net_driver import Guest
from tests.remote import RemoteDevice
from vhostmp.consts import Request
from vhostmp.protocol.messages import Header
from vhostmp.transport import dial

pytestmark = pytest.mark.slow

PAYLOAD: Final = bytes(8)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Restarting]:
    """Serve two devices on loopbacks."""
    other = ("--socket-path", str(tmp_path / "other"))
    with Restarting(tmp_path, *other, "--backend", "loopback", "--backend", "loopback") as one:
        yield one
        one.end()


def leave_room_for(pid: int, count: int) -> None:
    """Have a process be able to open so many descriptors more, and no others."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    limit = 0
    while count:
        count -= limit not in used
        limit += 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))


def unread(sock: socket.socket) -> int:
    """Return how much of what was sent is still on the socket."""
    waiting = array.array("i", [0])
    fcntl.ioctl(sock, termios.TIOCOUTQ, waiting)
    return waiting[0]


def test_descriptors_of_half_a_message(server: Restarting) -> None:
    """What came with a message could not be kept: that message is refused; its front-end and the others go on."""
    with Guest(RemoteDevice(server.socket).as_net_device()) as guest:
        sock = dial(str(server.folder / "other"))
        event = os.eventfd(0)
        try:
            wait_until(lambda: server.show()["devices"][1]["connected"])
            server.descriptors()  # with a spare worker: nothing more is opened
            leave_room_for(server.child.pid, 1)
            header = Header(request=Request.SET_VRING_CALL, flags=1, size=len(PAYLOAD)).pack()
            socket.send_fds(sock, [header], [event])
            wait_until(lambda: not unread(sock), what="the header to be taken")
            assert server.child.lines("is not kept over a death")
            server.again()
            sock.sendall(PAYLOAD)
            wait_until(lambda: server.child.lines("fds were not kept"), what="the message to be refused")
            assert server.show()["devices"][0]["connected"]
        finally:
            os.close(event)
            sock.close()
        wait_until(lambda: not server.show()["devices"][1]["connected"], what="the other to be gone")
        with Traffic(guest.pairs[0]) as traffic:
            traffic.progress(100)
            traffic.finish().check_whole()
