"""Tables for people."""

from __future__ import annotations

import re

from tests.fakes import FakeDevice, FakePool
from tests.rig import MEMORY_BYTES, UVA
from vhostmp import show
from vhostmp.shm.memory import MemoryRegion
from vhostmp.tools.stress.frontend import memfd


def test_table_is_aligned() -> None:
    """Columns are as wide as their widest cell, right-aligned; nothing is a dash."""
    assert show.table(("a", "bcd"), [(1, None), (22222, "x")]) == ["    a  bcd", "    1    -", "22222    x"]


def test_everything_is_shown() -> None:
    """Back-end, features by name, regions, rings with their numbers and state, workers."""
    device = FakeDevice(backend="loopback")
    with memfd(MEMORY_BYTES) as fd:
        device.set_owner()
        device.set_features(1 << 32)
        device.set_mem_table([MemoryRegion(gpa=0x4000, size=MEMORY_BYTES, uva=UVA, fd=fd)])
        device.set_vring_num(0, 256)
        connection = {"socket": "/tmp/s", "connected": True, "protocol_features": ["MQ"]}
        shown = {**device.snapshot(), **connection, "refused": "it does not start"}
        text = show.render({**FakePool().snapshot(), "devices": [shown]})
        device.close()
    lines = text.splitlines()
    assert lines[0] == "device 0 (net)"
    assert "  back-end:   loopback" in lines
    assert "  socket:     /tmp/s (connected)" in lines
    assert "  refused:    it does not start" in lines
    assert "  offered:    MRG_RXBUF LOG_ALL INDIRECT_DESC EVENT_IDX VERSION_1" in lines
    assert "  acked:      VERSION_1" in lines
    assert "          0x4000  0x100000     0x7f0000000000" in lines
    ring = next(line for line in lines if line.split()[:2] == ["0", "256"])
    assert ring.split()[-2:] == ["stopped", "-"]
    assert lines[-1].split() == ["0", "4711", "1", "-", "2", "1", "12", "34", "20.0", "MiB"]


def test_ring_states() -> None:
    """A ring is running, disabled, stopped or broken by reason; drops are shown by reason where there are any."""
    rings = [
        {"started": True, "enabled": True, "drops": {"short": 2, "csum": 0}},
        {"started": True, "enabled": False},
        {"started": False, "enabled": True},
        {"started": True, "enabled": True, "broken": "loop"},
    ]
    text = show.render({"devices": [{"device": "0", "queues": rings}]})
    assert [line.split()[16:] for line in text.splitlines() if line.startswith("     -")] == [
        ["running", "short=2"],
        ["disabled", "-"],
        ["stopped", "-"],
        ["broken:", "loop", "-"],
    ]


def test_missing_keys_are_dashes() -> None:
    """An answer without a single key we know still makes a table."""
    assert "device None" in show.render({"devices": [{}], "workers": [{}]})
    assert show.render_swap({}).splitlines()[1].split() == ["-"] * 7


def test_swap() -> None:
    """The result of a swap is one line below its heads, times with one decimal."""
    result = {
        "device": "0",
        "backend": "null",
        "generation": 3,
        "grace_us": 12.345,
        "pause_us": 7.0,
        "packets_crossed": 9,
        "frames_left": 1,
    }
    head, line = show.render_swap(result).splitlines()
    assert head.split() == ["device", "backend", "generation", "grace_us", "pause_us", "packets_crossed", "frames_left"]
    assert line.split() == ["0", "null", "3", "12.3", "7.0", "9", "1"]


def test_render_swap_without_traffic() -> None:
    """Zeros that come of a device nobody uses are said to be that."""
    idle = {"device": "0", "backend": "null", "generation": 0, "grace_us": 0.0, "pause_us": 0.0, "packets_crossed": 0}
    assert "no ring runs" in show.render_swap(idle).splitlines()[-1]
    assert "no ring runs" not in show.render_swap({**idle, "packets_crossed": 1})


def test_who_was_taken_up() -> None:
    """A server that was adopted says from whom; one that was upgraded has nobody but itself to name."""
    state: dict[str, object] = {**FakePool().snapshot(), "pid": 7, "devices": []}
    for before, words in (
        (6, "adopted .* from process 6, adoption 2 of these"),
        (7, "upgraded .*, adoption 2 of what"),
    ):
        line = show.render({**state, "adopted": {"at": 1.0, "count": 2, "from_pid": before}}).splitlines()[0]
        assert re.match(words, line), line
