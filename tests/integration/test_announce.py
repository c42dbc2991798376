"""Announcements reach the network behind each kind of back-end; the guest's MTU fits the link, or is refused."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.helpers import PATIENCE, wait_until
from tests.net_driver import Guest
from tests.taps import interface_up, ip, needs_tap, tap_name, veth
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool

MAC: Final = bytes.fromhex("020000000042")
ETH_P_RARP: Final = 0x8035
#: RFC 903: a broadcast from MAC; hardware Ethernet, protocol IPv4, "request reverse", MAC asks for MAC.
RARP: Final = b"\xff" * 6 + MAC + struct.pack("!HHHBBH", ETH_P_RARP, 1, 0x0800, 6, 4, 3) + (MAC + bytes(4)) * 2

ANNOUNCER: Final = """
file = open({path!r}, "a", buffering=1)  # by an object that is too late: the worker has given up its rights

class Announcer:
    def transmit(self, queue, packets):
        pass

    def receive(self, queue, budget):
        return ()

    def announce(self, mac):
        file.write(mac.hex() + "\\n")
        if mac[-1] == 0xFF:
            raise RuntimeError("as it happens")
"""


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of two workers."""
    with Pool(workers=2) as one:
        yield one


@contextlib.contextmanager
def listening(interface: str) -> Generator[socket.socket, None, None]:
    """Hear the RARP frames that come in at an interface."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_RARP)) as sock:
        sock.bind((interface, ETH_P_RARP))
        sock.settimeout(PATIENCE)
        yield sock


@needs_tap
def test_tap(pool: Pool) -> None:
    """The tap's network hears a RARP from the guest's address, padded to the shortest Ethernet frame."""
    name = tap_name()
    device = NetDevice(pool, backend=f"tap:{name}")
    interface_up(name)
    with listening(name) as sock:
        device.send_rarp(MAC)
        assert sock.recv(2048) == RARP.ljust(60, b"\0")
    device.close()


@needs_tap
def test_packet(pool: Pool) -> None:
    """So does what is behind a network device's packet socket."""
    with veth() as (here, there), listening(there) as sock:
        device = NetDevice(pool, backend=f"packet:{here}")
        device.send_rarp(MAC)
        assert sock.recv(2048) == RARP.ljust(60, b"\0")
        device.close()


def test_python(pool: Pool, tmp_path: Path) -> None:
    """A back-end in Python is told, once whatever the number of workers; what it makes of it harms nobody."""
    said = tmp_path / "said"
    (tmp_path / "announcer.py").write_text(ANNOUNCER.format(path=str(said)))
    device = NetDevice(pool, queue_pairs=2, backend=f"python:{tmp_path}/announcer.py:Announcer")
    with Guest(device, pairs=2):
        device.send_rarp(MAC)
        device.send_rarp(b"\x02\0\0\0\0\xff")
        device.send_rarp(MAC)
        assert said.read_text().split() == [MAC.hex(), "0200000000ff", MAC.hex()]
    wait_until(lambda: all(worker.alive for worker in pool.workers))
    device.send_rarp(MAC)  # no worker has the back-end: nobody to tell
    device.close()


def test_where_there_is_no_network(pool: Pool) -> None:
    """Null and loopback have nobody to tell; an address of another length is refused."""
    for backend in ("null", "loopback"):
        device = NetDevice(pool, backend=backend)
        device.send_rarp(MAC)
        with pytest.raises(LocalError, match="6 bytes, not 5"):
            device.send_rarp(MAC[:5])
        device.close()


@needs_tap
def test_mtu_of_the_link(pool: Pool) -> None:
    """An MTU above the link's is refused, in one line that says what to do, until the link has it; so is a swap."""
    names = tap_name(3), tap_name(4)
    ip("tuntap", "add", names[1], "mode", "tap")
    try:
        device = NetDevice(pool, backend=f"tap:{names[0]}")
        device.set_owner()
        device.set_mtu(1500)
        with pytest.raises(LocalError, match=f"MTU of 9000 bytes is above the 1500 of tap:{names[0]}: raise that"):
            device.set_mtu(9000)
        interface_up(names[0], mtu=9000)
        device.set_mtu(9000)
        with pytest.raises(LocalError, match=f"above the 1500 of tap:{names[1]}"):
            device.set_backend(f"tap:{names[1]}")
        assert device.backend == f"tap:{names[0]}"
        device.stop_all()  # the next front-end has no MTU yet
        device.set_backend(f"tap:{names[1]}")
        device.close()
    finally:
        ip("link", "del", names[1])


def test_offered() -> None:
    """MTU and GUEST_ANNOUNCE are offered: the front-end, which has what they need, may offer them to the guest."""
    with Pool(workers=1) as pool:
        device = NetDevice(pool)
        assert device.get_features() & (1 << 3 | 1 << 21) == 1 << 3 | 1 << 21
        device.close()
