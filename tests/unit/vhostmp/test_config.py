"""The configuration space: what is read, what may be written, and when the front-end is told that it changed."""

from __future__ import annotations

import socket
import struct
from collections.abc import Generator, Iterator, Sequence

import pytest

from tests.rig import MEMORY_BYTES, Rig
from vhostmp.consts import BackendRequest, ProtocolFeature, Request, mask
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import config
from vhostmp.verbs import offered_protocol_features

FEATURES = mask((ProtocolFeature.REPLY_ACK, ProtocolFeature.BACKEND_REQ, ProtocolFeature.CONFIG))
CHANGED = struct.pack("=III", BackendRequest.CONFIG_CHANGE_MSG, 9, 0)


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A connection with CONFIG."""
    with Rig() as rig:
        rig.negotiate(FEATURES)
        yield rig


@pytest.fixture
def events() -> Generator[Sequence[int], None, None]:
    """Four eventfds."""
    with frontend.eventfds(4) as fds:
        yield fds


@pytest.mark.parametrize(("offset", "size"), [(0, 40), (0, 1), (39, 1), (7, 20)])
def test_a_part_is_read(rig: Rig, offset: int, size: int) -> None:
    """A part comes back with its place and size."""
    reply = rig.ask(Request.GET_CONFIG, config(offset, bytes(size)))
    assert reply.payload == config(offset, bytes(rig.device.config[offset : offset + size]))


def test_beyond_the_end(rig: Rig) -> None:
    """What begins inside is filled up with zeros, for front-ends that know a longer structure; else no payload."""
    assert rig.ask(Request.GET_CONFIG, config(30, bytes(96))).payload == config(
        30, bytes(range(31, 41)).ljust(96, b"\0")
    )
    for offset in (40, 255):
        assert rig.ask(Request.GET_CONFIG, config(offset, b"\0")).payload == b""


def test_writing(rig: Rig) -> None:
    """Writable bytes change; what is there already may be said of any field, as a migration's destination is told."""
    assert rig.do(Request.SET_CONFIG, config(6, b"ab")) == 0
    assert rig.device.config[6:8] == b"ab"
    rig.device.calls.clear()
    assert rig.do(Request.SET_CONFIG, config(0, bytes(rig.device.config), 1)) == 0
    assert rig.device.calls == []


def test_told_while_running(rig: Rig, channel: socket.socket, events: Sequence[int]) -> None:
    """A change is told at once while a ring runs; while the device is suspended once it runs again, once."""
    assert rig.device.on_config_change is not None
    rig.device.on_config_change()
    rig.device.on_config_change()
    rig.settle()
    with pytest.raises(BlockingIOError):
        channel.recv(64)
    with frontend.memfd(MEMORY_BYTES) as memory:
        rig.give_memory(memory)
    rig.set_ring(0)
    rig.start_ring(0, events[0], events[1])
    assert channel.recv(64) == CHANGED
    channel.send(struct.pack("=IIIQ", BackendRequest.CONFIG_CHANGE_MSG, 5, 8, 0))
    rig.settle()
    with pytest.raises(BlockingIOError):
        channel.recv(64)
    rig.device.on_config_change()
    assert channel.recv(64) == CHANGED
    rig.sock.close()
    rig.settle()
    assert rig.device.on_config_change is None


def test_without_the_feature_nothing_is_told(events: Sequence[int]) -> None:
    """A front-end that did not negotiate CONFIG hears nothing of it, nor does one without a channel."""
    with Rig() as rig, frontend.memfd(MEMORY_BYTES) as memory:
        rig.start_all(memory, events)
        assert rig.device.on_config_change is not None
        rig.device.on_config_change()
        assert rig.port.connected


def test_of_a_network_device() -> None:
    """Only a device that was given an address offers the space; it has the fields of virtio 1.3, 5.1.4."""
    with Pool(workers=1) as pool:
        plain = NetDevice(pool, name="plain")
        device = NetDevice(pool, name="device", queue_pairs=2, mac=b"\x02\0\0\0\0\7")
        try:
            assert not offered_protocol_features(plain) & ProtocolFeature.CONFIG.mask
            assert offered_protocol_features(device) & ProtocolFeature.CONFIG.mask
            assert device.get_features() & ~plain.get_features() & 0xFFFFF == 1 << 5 | 1 << 16
            assert device.config == b"\x02\0\0\0\0\7" + struct.pack("<HHHIB", 1, 2, 1500, 0xFFFFFFFF, 0xFF)
            with pytest.raises(LocalError, match="configuration bytes 6 to 7 are read-only"):
                device.write_config(6, b"\0\0")
        finally:
            device.close()
            plain.close()
        for mac in (b"", b"\x01\0\0\0\0\0", bytes(6), bytes(7)):
            with pytest.raises(LocalError, match="no unicast Ethernet address"):
                NetDevice(pool, mac=mac)
