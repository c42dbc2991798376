"""A device's state as plain data and back: what the next control process makes of it works as the first one did."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import closing
from pathlib import Path

import pytest

from vhostmp.adoption import MAKERS
from vhostmp.blk import open_disk
from vhostmp.parts import DeviceState, RingState, Setup
from vhostmp.plain import Described, Fds, Setups, describe_state, restore_state
from vhostmp.shm.records import Plain
from vhostmp.workers.channel import close_all

NOTE = 1  # the place of a disk's note among its descriptors


@pytest.mark.parametrize("adoptions", [0, 1, 2])
def test_each_worker_locks_for_itself(tmp_path: Path, adoptions: int) -> None:
    """Of the note of a disk's flushes each worker gets an open file of its own, after an adoption as before it.

    Otherwise the lock excludes nobody, and a flush succeeds while another worker's is being told of lost writes.
    """
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    disk: Setup = open_disk(f"file:{image}")
    state = DeviceState(disk.part(0), (RingState(),), (0,), 1)
    for _ in range(adoptions):
        with closing(disk):
            fds: Fds = {}
            plain = json.loads(json.dumps(describe_state(state, fds)))
            kept = {name: os.dup(fd) for name, fd in fds.items()}
        state = restore_state(plain, Setups(MAKERS, kept.pop), {}, kept.pop, None)
        assert state.backend.setup is not None
        disk = state.backend.setup
    made: list[int] = []
    with closing(disk):
        notes = [state.backend.describe([0], made)[1][NOTE] for _ in range(2)]
        fcntl.flock(notes[0], fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(notes[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        close_all(made)


def test_what_was_described_is_not_gone_through_again() -> None:
    """Rings and memory are described once for as long as they are in force, and what is new is described anew."""
    said: list[object] = []

    def describe(thing: object, fds: Fds) -> Plain:
        said.append(thing)
        fds[f"fd of {thing}"] = len(said)
        return {"thing": thing}

    described = Described()
    fds: Fds = {}
    for _ in range(3):
        described.turn()
        fds = {}
        assert [described.of(thing, fds, describe) for thing in ("a", "b", "a")] == [
            {"thing": thing} for thing in ("a", "b", "a")
        ]
        assert fds == {"fd of a": 1, "fd of b": 2}
    assert said == ["a", "b"]
    described.turn()
    described.of("c", fds, describe)
    described.turn()
    described.of("b", fds, describe)
    assert said == ["a", "b", "c", "b"], "what has gone is not kept"
