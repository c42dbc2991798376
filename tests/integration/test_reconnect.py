"""Either side goes and comes back: rings go on at the used index that guest memory holds, in every role of the socket.

The guest's memory and its driver live on; what dies is a connection, or the whole back-end with SIGKILL. Frames under
way then may be repeated or lost, as a network's may; no descriptor is, and no ring is stuck.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final

import pytest

from tests import helpers
from tests.integration.serving import Served, serving
from tests.integration.test_swap import whole
from tests.integration.traffic import Traffic
from tests.net_driver import F_EVENT_IDX, F_INDIRECT_DESC, F_MRG_RXBUF, F_VERSION_1, Guest
from tests.remote import RemoteDevice
from vhostmp import transport
from vhostmp.consts import ProtocolFeature, Request
from vhostmp.tools.stress.frontend import REPLY_ACK, Frontend, inflight
from vhostmp.tools.stress.ring import F_RING_PACKED

Connect = Callable[[], RemoteDevice]

WITH_REGION: Final = REPLY_ACK | ProtocolFeature.INFLIGHT_SHMFD.mask
SPLIT: Final = F_VERSION_1 | F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX
PACKED: Final = SPLIT | F_RING_PACKED


class Place:
    """Where the two sides meet, in one of the roles; back-ends are started there again and again."""

    def __init__(self, role: str, folder: Path) -> None:
        """Prepare the front-end's side."""
        self.role: Final = role
        self.folder: Final = folder
        self.path: Final = folder / "s"
        self.listener: socket.socket | None = None
        if role != "listen":
            self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.listener.bind(str(self.path))
            self.listener.listen()
            self.listener.settimeout(helpers.PATIENCE)

    @contextlib.contextmanager
    def serve(self) -> Generator[Served, None, None]:
        """Run a back-end."""
        options, fds = ["--backend", "loopback"], []
        if self.role == "fd":
            assert self.listener is not None
            fds = [self.listener.fileno()]
            options += ["--fd", str(fds[0])]
        else:
            options += ["--socket-path", str(self.path), *(["--connect"] if self.role == "connect" else [])]
        with serving(self.folder, *options, fds=fds) as child:
            yield child

    def connect(self, protocol_features: int = REPLY_ACK) -> RemoteDevice:
        """Be the front-end of a new connection."""
        if self.role != "connect":
            return RemoteDevice(self.path, protocol_features)
        assert self.listener is not None
        return RemoteDevice(Frontend(self.listener.accept()[0]), protocol_features)

    def close(self) -> None:
        """Close the front-end's side."""
        if self.listener is not None:
            self.listener.close()


def used_idx(guest: Guest, index: int) -> int:
    """Read where the device stands, as a front-end does that could not ask it."""
    (idx,) = struct.unpack_from("<H", guest.rings.buf, guest.layouts[index].used + 2)
    return int(idx)


def resume(guest: Guest, device: RemoteDevice) -> None:
    """Set a new connection up for a guest that is running."""
    guest.device = device.as_net_device()  # type: ignore[misc]
    device.set_owner()
    device.set_features(guest.features)
    guest.set_mem_table()
    for index in range(len(guest.layouts)):
        guest.start(index, used_idx(guest, index))


@pytest.mark.slow
@pytest.mark.parametrize("role", ["listen", "connect", "fd"])
def test_rings_resume(tmp_path: Path, role: str) -> None:
    """Traffic goes on after the back-end was killed and after the connection was lost, several times each."""
    place = Place(role, tmp_path)
    with contextlib.closing(place), contextlib.ExitStack() as running:
        child = running.enter_context(place.serve())
        device = place.connect()
        guest = Guest(device.as_net_device())
        with contextlib.closing(guest), Traffic(guest.pairs[0], returns=False) as traffic:
            for turn in range(4):
                traffic.progress_sent(300)
                traffic.pause()
                if turn % 2:
                    device.frontend.close()
                else:
                    family = helpers.descendants(child.pid)
                    os.kill(child.pid, signal.SIGKILL)
                    helpers.wait_until(lambda: not child.running)  # noqa: B023 - called before the next turn
                    helpers.wait_until(lambda: not any(map(helpers.process_alive, family)))  # noqa: B023 - likewise
                    device.frontend.close()
                    running.pop_all().close()
                    child = running.enter_context(place.serve())
                device = place.connect()
                resume(guest, device)
                traffic.resume()
            traffic.progress_sent(300)
            tally = traffic.finish()
            assert tally.received > 0
        device.frontend.close()


@pytest.mark.slow
@pytest.mark.parametrize(("role", "packed"), [("listen", False), ("listen", True), ("connect", True), ("fd", True)])
def test_rings_resume_from_a_region(tmp_path: Path, role: str, packed: bool) -> None:
    """A front-end that knows no positions (base 0) and gives back its region has its rings go on where they stood."""
    place = Place(role, tmp_path)
    with contextlib.closing(place), contextlib.ExitStack() as running:
        child = running.enter_context(place.serve())
        device = place.connect(WITH_REGION)
        guest = Guest(device.as_net_device(), features=PACKED if packed else SPLIT, num=100 if packed else 256)
        guest.stop()
        with region(device, guest.num) as give, contextlib.closing(guest):
            give(device)
            for index in range(2):
                guest.start(index, guest_base(guest, index))
            with Traffic(guest.pairs[0], returns=False) as traffic:
                for turn in range(4):
                    traffic.progress_sent(300)
                    if turn % 2:
                        traffic.pause()
                        device.frontend.close()
                    else:
                        os.kill(child.pid, signal.SIGKILL)
                        helpers.wait_until(lambda: not child.running)  # noqa: B023 - called before the next turn
                        traffic.pause()
                        device.frontend.close()
                        running.pop_all().close()
                        child = running.enter_context(place.serve())
                    device = place.connect(WITH_REGION)
                    guest.device = device.as_net_device()  # type: ignore[misc]
                    device.set_owner()
                    device.set_features(guest.features)
                    give(device)
                    guest.set_mem_table()
                    for index in range(2):
                        guest.start(index, 0)
                    traffic.resume()
                traffic.progress_sent(300)
                assert traffic.finish().received > 0
                assert not guest.pairs[0].tx.in_flight
            device.frontend.close()


@contextlib.contextmanager
def region(device: RemoteDevice, num: int) -> Generator[Callable[[RemoteDevice], None]]:
    """Get a region for two queues; what is yielded gives it to a back-end."""
    device.frontend.send(Request.GET_INFLIGHT_FD, inflight(0, 0, 2, num))
    data, fds, _flags, _address = socket.recv_fds(device.frontend.sock, 100, 8)

    def give(other: RemoteDevice) -> None:
        assert other.frontend.do(Request.SET_INFLIGHT_FD, data[12:], fds) == 0

    try:
        yield give
    finally:
        for fd in fds:
            os.close(fd)


def guest_base(guest: Guest, index: int) -> int:
    """Return where a ring stands that was stopped just now."""
    ring = (guest.pairs[0].rx, guest.pairs[0].tx)[index]
    return ring.used_idx | ring.used_idx << 16 if guest.features & F_RING_PACKED else used_idx(guest, index)


def test_traffic_over_an_inherited_connection(tmp_path: Path) -> None:
    """--fd with a connected socket carries a guest's traffic like any other; its end is the program's."""
    ours, theirs = transport.connected_pair()
    with (
        theirs,
        serving(tmp_path, "--fd", str(theirs.fileno()), "--backend", "loopback", fds=[theirs.fileno()]) as child,
    ):
        theirs.close()
        device = RemoteDevice(Frontend(ours))
        with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=200) as traffic:
            traffic.progress(500)
            whole(traffic.finish())
        device.frontend.close()
        helpers.wait_until(lambda: not child.running, what="the end after the hang-up")
        assert child.wait() == 0


def test_negotiation_begins_anew(tmp_path: Path) -> None:
    """Nothing of a lost connection is left: the next one negotiates for itself, and its rings are where it says."""
    place = Place("listen", tmp_path)
    with contextlib.closing(place), place.serve():
        for base in (0, 17, 65535):
            device = RemoteDevice(place.path, REPLY_ACK)
            device.set_owner()
            device.set_features(1 << 32)
            device.set_vring_base(0, base)
            assert device.stop_vring(0) == base
            device.frontend.close()
