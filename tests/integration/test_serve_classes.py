"""`vhostmp serve --device`: what a front-end is told over the socket, by class of device."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.integration.serving import ask, serving
from vhostmp.consts import ProtocolFeature, Request
from vhostmp.tools.stress import frontend
from vhostmp.tools.stress.frontend import Frontend

HERE = Path(__file__).parent / "devices.py"
DISK_BYTES = 1 << 20
QUEUES = 3


def negotiated(path: Path, *wanted: ProtocolFeature) -> Frontend:
    """Connect and negotiate protocol features."""
    talk = Frontend.connect(path)
    talk.send(Request.SET_OWNER)
    features = talk.ask(Request.GET_FEATURES).u64
    offered = talk.ask(Request.GET_PROTOCOL_FEATURES).u64
    bits = sum(1 << feature for feature in wanted)
    assert bits & ~offered == 0, f"{offered:#x} are offered"
    talk.send(Request.SET_FEATURES, frontend.u64(features))
    talk.send(Request.SET_PROTOCOL_FEATURES, frontend.u64(bits))
    return talk


def config(talk: Frontend, offset: int, size: int) -> bytes:
    """Read from the configuration space."""
    head = struct.pack("=III", offset, size, 0)
    return talk.ask(Request.GET_CONFIG, head + bytes(size)).payload[len(head) :]


@pytest.mark.slow
def test_disk(tmp_path: Path) -> None:
    """A disk counts queues, shows its capacity, lets the cache mode be written alone, and is shown as what it is."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(DISK_BYTES))
    path, control = tmp_path / "blk.sock", tmp_path / "blk.ctl"
    options = ["--socket-path", str(path), "--control-path", str(control), "--queues", str(QUEUES)]
    with serving(tmp_path, "--blk-file", str(image), *options) as child:
        with negotiated(path, ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.CONFIG) as talk:
            assert talk.ask(Request.GET_QUEUE_NUM).u64 == QUEUES
            assert struct.unpack_from("<Q", config(talk, 0, 60)) == (DISK_BYTES // 512,)
            assert config(talk, 32, 1) == b"\1"
            assert talk.do(Request.SET_CONFIG, struct.pack("=III", 32, 1, 0) + b"\0") == 0
            assert config(talk, 32, 1) == b"\0"
            assert talk.do(Request.SET_CONFIG, struct.pack("=III", 0, 8, 0) + bytes(8)) != 0
            assert struct.unpack_from("<Q", config(talk, 0, 8)) == (DISK_BYTES // 512,)
            (device,) = ask("show", control)["devices"]
            assert (device["class"], device["backend"], len(device["queues"])) == ("blk", f"file:{image}", QUEUES)
            assert {"FLUSH", "CONFIG_WCE", "MQ"} <= set(device["acked_features"])
        assert child.terminate_in_time() == 0
    assert image.read_bytes() == bytes(DISK_BYTES)


@pytest.mark.slow
def test_read_only_disk(tmp_path: Path) -> None:
    """--read-only is the back-end's ,readonly; the image need not be writable."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(DISK_BYTES))
    path, control = tmp_path / "blk.sock", tmp_path / "blk.ctl"
    options = ["--socket-path", str(path), "--control-path", str(control)]
    with serving(tmp_path, "--blk-file", str(image), "--read-only", *options):
        (device,) = ask("show", control)["devices"]
        assert device["backend"] == f"file:{image},readonly"
        assert "RO" in device["features"]


@pytest.mark.slow
def test_random_numbers_and_a_class_of_ones_own(tmp_path: Path) -> None:
    """They count queues too; random numbers have no configuration space, a class of one's own has what it says."""
    path, control = tmp_path / "rng.sock", tmp_path / "rng.ctl"
    with serving(tmp_path, "--device", "rng", "--socket-path", str(path), "--control-path", str(control)):
        with negotiated(path, ProtocolFeature.MQ) as talk:
            assert talk.ask(Request.GET_QUEUE_NUM).u64 == 1
        (device,) = ask("show", control)["devices"]
        assert (device["class"], device["backend"]) == ("rng", "urandom")
        assert ask("swap", control, "file:/dev/zero")["backend"] == "file:/dev/zero"
    with (
        serving(tmp_path, "--device", f"python:{HERE}:Echo", "--socket-path", str(path)),
        negotiated(path, ProtocolFeature.CONFIG) as talk,
    ):
        assert config(talk, 0, 6) == b"echo\0\0"
