"""Workers that do not come out of a work item in time: for tests of what verbs do then."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs
import pytest

from tests.adversity import backends
from tests.frames import make_frame
from tests.helpers import wait_until
from tests.net_driver import Guest
from vhostmp import flush
from vhostmp.errors import SynchronizeTimeout
from vhostmp.net import NetDevice
from vhostmp.shm._epoch import synchronize
from vhostmp.supervisor import Pool

GATE: Final = f"python:{Path(backends.__file__)}:Gate"


@contextmanager
def gives_up() -> Generator[None]:
    """Have each verb of this thread that has to wait for workers give up at once, though none of them is stuck."""
    caller = threading.current_thread()

    def late(buf: memoryview, readers: Sequence[tuple[int, int]], timeout_ns: int) -> int:
        if threading.current_thread() is not caller:
            return synchronize(buf, readers, timeout_ns)
        raise SynchronizeTimeout("late")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flush, "synchronize", late)
        yield


@contextmanager
def impatient(seconds: float = 0.02, index: int | None = None) -> Generator[None]:
    """Have verbs wait for workers for so long only; with `index` for that one alone: the others are at work."""

    def for_one(buf: memoryview, readers: Sequence[tuple[int, int]], timeout_ns: int) -> int:
        took = synchronize(buf, [reader for reader in readers if reader[0] != index], timeout_ns)
        return took + synchronize(buf, [reader for reader in readers if reader[0] == index], int(seconds * 1e9))

    with pytest.MonkeyPatch.context() as patch:
        if index is None:
            patch.setattr(flush, "SYNCHRONIZE_TIMEOUT", seconds)
        else:
            patch.setattr(flush, "synchronize", for_one)
        yield


@attrs.frozen
class StuckGuest:
    """A guest whose only worker is inside its back-end's `transmit`, with one packet; `let_go` has it return."""

    pool: Pool
    device: NetDevice
    guest: Guest
    signs: Path

    def let_go(self) -> None:
        """Open the gate."""
        (self.signs / "open").touch()

    @property
    def left(self) -> bool:
        """Whether the worker has come out."""
        return (self.signs / "left").exists()


@contextmanager
def stuck_guest(signs: Path, workers: int = 1) -> Generator[StuckGuest]:
    """Make one; `signs` is an empty directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.GATE, str(signs))
        with Pool(workers=workers, sandbox=False) as pool:  # its signs are files
            device = NetDevice(pool, backend=GATE)
            with Guest(device) as guest:
                assert guest.pairs[0].send(make_frame(0, 60))
                guest.pairs[0].kick()
                wait_until((signs / "entered").exists, what="the back-end to be called")
                yield StuckGuest(pool, device, guest, signs)
