"""The control process dies while it waits for a worker that does not come out of a back-end in time.

As in test_adoption.py what is killed is the control process, by SIGKILL; its front-ends are ours, on real sockets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import helpers
from tests.adversity import backends
from tests.adversity.backends import GATE
from tests.frames import make_frame
from tests.integration.restarting import Restarting
from tests.integration.test_adoption import SLOTS, attached, control_segment, workers
from tests.net_driver import Guest
from tests.remote import RemoteDevice
from vhostmp import control_api
from vhostmp.shm._epoch import published
from vhostmp.shm.memory import MemoryRegion
from vhostmp.tools.stress.frontend import memfd

pytestmark = pytest.mark.slow


@pytest.fixture
def memory() -> Iterator[int]:
    """Return a megabyte of memory that no ring is in."""
    with memfd(1 << 20) as fd:
        yield fd


@pytest.fixture
def stuck_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Restarting]:
    """Serve a device whose back-end does not return from `transmit` before there is a file `open`."""
    monkeypatch.setenv(GATE, str(tmp_path))
    monkeypatch.setattr(helpers, "PATIENCE", 3 * helpers.PATIENCE)  # an adoption waits until it gives up
    backend = f"python:{backends.__file__}:Gate"
    with Restarting(tmp_path, "--backend", backend, "--sandbox", "off", "--watchdog", "60", "--workers", "2") as server:
        yield server
        server.end()


def die_while_waiting(server: Restarting, guest: Guest, begin: Callable[[], object]) -> None:
    """Have a worker inside the back-end, and the server die once a verb is in force and waits for it; start it again.

    `begin` has a thread call the verb.
    """
    generation = server.show()["devices"][0]["generation"]
    assert guest.pairs[0].send(make_frame(0, 60))
    guest.pairs[0].kick()
    helpers.wait_until((server.folder / "entered").exists, what="the worker to be inside")
    begin()
    with control_segment(server) as buf:
        helpers.wait_until(lambda: published(buf, 0) > generation, what="the verb to be in force")
    server.kill()


def test_a_worker_stays_inside_an_older_state(stuck_server: Restarting, memory: int) -> None:
    """Killed while it waits for a worker inside a back-end: what only an older state names stays until it is out.

    Then that goes, with no verb to see to it, and the rings are served by the same worker.
    """
    device = RemoteDevice(stuck_server.socket, SLOTS)
    extra = MemoryRegion(gpa=1 << 40, size=1 << 20, uva=1 << 45, fd=memory)
    with Guest(device.as_net_device()) as guest, ThreadPoolExecutor(1) as front_end:
        before = workers(stuck_server)

        def mapped() -> int:
            maps = Path(f"/proc/{before[0]}/maps").read_text()  # the guest is in this process
            return sum("/dev/shm/" in line and f".{os.getpid()}." in line for line in maps.splitlines())

        count = mapped()
        assert count > 0
        die_while_waiting(stuck_server, guest, lambda: front_end.submit(device.add_mem_region, extra))
        inside = mapped()
        assert inside == 2 * count, "in the old table and the new one"
        stuck_server.start()
        assert stuck_server.child.lines("the pool goes on waiting for that")
        assert mapped() == inside
        (stuck_server.folder / "open").touch()
        helpers.wait_until(lambda: mapped() == count, what="the old table to go")
        helpers.wait_until(lambda: guest.pairs[0].reap() == 1)
        assert workers(stuck_server) == before


def test_a_pair_that_nobody_serves(stuck_server: Restarting) -> None:
    """Killed while a move waits for the old worker: once that is out the new one serves the pair, with no verb."""
    device = RemoteDevice(stuck_server.socket)
    with Guest(device.as_net_device()) as guest, ThreadPoolExecutor(1) as administrator:
        before = workers(stuck_server)
        move = {"cmd": "workers", "action": "attach", "pair": 0, "worker": 1}
        die_while_waiting(
            stuck_server, guest, lambda: administrator.submit(control_api.call, str(stuck_server.control), move)
        )
        stuck_server.start()
        assert stuck_server.child.lines("the pool goes on waiting for that")
        assert attached(stuck_server) == [1, 1]
        (stuck_server.folder / "open").touch()
        helpers.wait_until(lambda: guest.pairs[0].reap() == 1)
        assert guest.pairs[0].send(make_frame(1, 60))
        guest.pairs[0].kick()
        helpers.wait_until(lambda: guest.pairs[0].reap() == 1, what="the new worker to serve the pair")
        helpers.wait_until(lambda: attached(stuck_server) == [2, 2], what="that to be said")
        assert workers(stuck_server) == before
