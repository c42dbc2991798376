"""Patches by the command line: two devices of one server that are joined, shown, swapped, adopted, and moved."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import pytest

from tests import helpers
from tests.integration.cable import Cable
from tests.integration.restarting import Restarting
from tests.integration.serving import ask, command
from tests.net_driver import FEATURES, Guest
from tests.remote import RemoteDevice
from vhostmp.cli import EXIT_MISTAKE
from vhostmp.killpoints import VARIABLE
from vhostmp.tools.stress.ring import F_RING_PACKED

pytestmark = pytest.mark.slow

WINDOW: Final = 100
BURST: Final = 64


@contextlib.contextmanager
def joined(folder: Path, *options: str) -> Generator[tuple[Restarting, Cable]]:
    """Serve two devices that are patched to each other, and have traffic between two front-ends."""
    words = ("--socket-path", str(folder / "t"), "--backend", "patch:1", "--backend", "patch:0", *options)
    with Restarting(folder, *words) as server:
        with contextlib.ExitStack() as stack:
            guests = [
                stack.enter_context(Guest(RemoteDevice(path).as_net_device(), features=features))
                for path, features in ((server.socket, FEATURES), (folder / "t", FEATURES | F_RING_PACKED))
            ]
            with Cable([guest.pairs[0] for guest in guests], window=WINDOW) as cable:
                cable.progress()
                yield server, cable
        server.end()


def states(server: Restarting) -> list[Any]:
    """Return what is shown of the patch at each end."""
    return [device["patch"] for device in server.show()["devices"]]


def test_shown_and_swapped(tmp_path: Path) -> None:
    """`show` says how it stands, `swap` takes one end away and brings it back under load, and nothing is lost."""
    with joined(tmp_path) as (server, cable):
        assert states(server) == ["joined to device 1", "joined to device 0"]
        text = command("show", "--control-path", str(server.control)).stdout
        assert "patch:      joined to device 1" in text
        for _ in range(3):
            result = ask("swap", server.control, "--device", "0", "patch:1")
            assert result["backend"] == "patch:1"
            cable.progress()
        cable.check_whole()
        ask("swap", server.control, "--device", "0", "loopback")
        assert states(server) == [None, "waits: device 0 has back-end loopback"]


@pytest.mark.parametrize(
    ("device", "spec", "text"),
    [
        ("0", "patch:0", "patch:0: that is the device itself: use loopback"),
        ("0", "patch:7", "patch:7: no device '7' among 1"),
        ("1", "patch:", "'patch:' is not complete: write patch:DEVICE"),
    ],
)
def test_swaps_refused(tmp_path: Path, device: str, spec: str, text: str) -> None:
    """What cannot be patched is refused in one line, and what there is goes on."""
    with joined(tmp_path) as (server, cable):
        done = command("swap", "--control-path", str(server.control), "--device", device, spec)
        assert done.returncode == EXIT_MISTAKE
        assert done.stderr.count("\n") == 1
        assert text in done.stderr
        cable.progress()
        cable.check_whole()


@pytest.mark.parametrize(
    ("backends", "text"),
    [
        (["patch:1"], "patch:1: that is the device itself: use loopback"),
        (["patch:2", "patch:0"], "patch:2: no device '2' among 1"),
        (["patch:1", "patch:2", "patch:0"], "patch:1: device 1 is patched to 2: a patch has two ends"),
    ],
)
def test_starts_refused(tmp_path: Path, backends: list[str], text: str) -> None:
    """Ends that do not fit each other are refused before anything is made."""
    count = max(len(backends), 2)
    words = [word for number in range(count) for word in ("--socket-path", str(tmp_path / str(number)))]
    words += [word for backend in backends for word in ("--backend", backend)]
    done = command("serve", *words)
    assert done.returncode == EXIT_MISTAKE
    assert done.stderr.count("\n") == 1, done.stderr
    assert text in done.stderr
    assert not list(tmp_path.iterdir())


def test_adopted(tmp_path: Path) -> None:
    """The control process is killed under load: packets go on between the guests, and the next one has both ends."""
    with joined(tmp_path, "--workers", "2") as (server, cable):
        for _ in range(2):
            server.kill()
            cable.progress()
            server.start()
            assert states(server) == ["joined to device 1", "joined to device 0"]
            cable.progress()
        ask("swap", server.control, "--device", "1", "patch:0")  # a new end meets one that was adopted
        cable.progress()
        cable.check_whole()


def test_killed_between_the_moves_of_the_two_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A death after one end has moved leaves them apart, and packets waiting; the next control process joins them."""
    monkeypatch.setenv(VARIABLE, "one end moved")
    with joined(tmp_path, "--workers", "2") as (server, cable):
        monkeypatch.delenv(VARIABLE)
        before = server.show()["devices"][0]["queues"][0]["worker"]
        words = ("--control-path", str(server.control), "attach", "--device", "0", "0", str(1 - before))
        assert command("workers", *words).returncode == EXIT_MISTAKE
        helpers.wait_until(lambda: not server.child.running)
        server.start()
        devices = server.show()["devices"]
        assert [device["queues"][0]["worker"] for device in devices] == [1 - before] * 2
        assert states(server) == ["joined to device 1", "joined to device 0"]
        cable.progress()
        ask_workers = command("workers", "--control-path", str(server.control), "attach", "--device", "1", "0", "0")
        assert ask_workers.returncode == 0, ask_workers
        cable.progress()
        cable.check_whole()


def test_upgraded(tmp_path: Path) -> None:
    """`vhostmp upgrade` replaces the control process and each worker, by a spare that serves both ends meanwhile."""
    with joined(tmp_path) as (server, cable):
        pids = {worker["pid"] for worker in server.show()["workers"]}
        done = command("upgrade", "--control-path", str(server.control))
        assert done.returncode == 0, done
        assert pids.isdisjoint(worker["pid"] for worker in server.show()["workers"])
        assert states(server) == ["joined to device 1", "joined to device 0"]
        cable.progress()
        cable.check_whole()
