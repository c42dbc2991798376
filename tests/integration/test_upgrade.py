"""`vhostmp upgrade`: a server moves to newly installed code, workers included, while frames flow; or refuses to."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
import pytest

import vhostmp
from tests import helpers
from tests.helpers import told
from tests.integration.restarting import Restarting
from tests.integration.serving import ask, command
from tests.integration.test_swap import whole
from tests.integration.traffic import Traffic
from tests.net_driver import Guest
from tests.remote import RemoteDevice
from vhostmp import control_api
from vhostmp.cli import EXIT_MISTAKE
from vhostmp.errors import LocalError

pytestmark = pytest.mark.slow

WINDOW: Final = 200
SOURCE: Final = Path(vhostmp.__file__).parent
NEXT: Final = "99.0"


@attrs.frozen
class Installed:
    """A place where vhostmp is installed, in one version and then another."""

    folder: Path

    @property
    def current(self) -> Path:
        """What is on the module path of a server."""
        return self.folder / "current"

    def add(self, name: str) -> Path:
        """Make a copy of the package; it is not used yet."""
        copy = self.folder / name / "vhostmp"
        shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.c", "stress", "bench"))
        return copy

    def use(self, name: str) -> None:
        """Have it used from now on."""
        link = self.folder / "link"
        link.symlink_to(self.folder / name)
        link.rename(self.current)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Install the version that is tested, and one that calls itself 99.0."""
    place = Installed(tmp_path / "installed")
    place.folder.mkdir()
    place.add("old")
    text = (place.add("new") / "__init__.py").read_text()
    assert text.count(f'"{vhostmp.__version__}"') == 1
    (place.folder / "new/vhostmp/__init__.py").write_text(text.replace(f'"{vhostmp.__version__}"', f'"{NEXT}"'))
    place.use("old")
    monkeypatch.setenv("PYTHONPATH", str(place.current))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    return place


@pytest.fixture
def server(installed: Installed, tmp_path: Path) -> Iterator[Restarting]:
    """Serve one loopback device with two queue pairs and two workers, from what is installed."""
    del installed
    folder = tmp_path / "run"
    folder.mkdir()
    with Restarting(folder, "--backend", "loopback", "--workers", "2", "--queue-pairs", "2") as running:
        yield running
        running.end()


def test_upgrade_under_traffic(server: Restarting, installed: Installed) -> None:
    """Control process, spawner and workers are those of the new code; not one frame is lost, repeated or reordered."""
    device = RemoteDevice(server.socket)
    before = server.show()
    assert before["version"] == vhostmp.__version__
    old = helpers.descendants(server.child.pid)
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        traffic.progress(500)
        installed.use("new")
        result = ask("upgrade", server.control)
        traffic.progress(500)
        assert (result["from"], result["to"], result["pid"]) == (vhostmp.__version__, NEXT, server.child.pid)
        shown = server.show()
        assert [worker["index"] for worker in shown["workers"]] == [0, 1]
        new = {worker["pid"] for worker in shown["workers"]}
        assert not new & {worker["pid"] for worker in before["workers"]}
        for pid in new:
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert str(installed.folder / "new") in maps
            assert str(installed.folder / "old") not in maps
        helpers.wait_until(
            lambda: helpers.descendants(server.child.pid) & old == {server.holder()}, what="the end of the old ones"
        )
        assert ask("swap", server.control, "loopback")["backend"] == "loopback"
        assert server.child.lines(f"info: upgraded from {vhostmp.__version__} to {NEXT}")
        assert not [line for what in ("died", "gone", "warning:") for line in server.child.lines(what)]
        assert command("show", "--control-path", str(server.control)).stdout.startswith("upgraded ")
        server.again()  # what is upgraded can be adopted like any other
        traffic.progress(500)
        whole(traffic.finish())


@pytest.mark.parametrize("place", ["spare", "moved", "removed", "added", "moved back"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_death_in_the_middle(
    tmp_path: Path, installed: Installed, monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    """Killed while workers are renewed, the next control process ends that: no frame is lost, and no worker either."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("VHOSTMP_KILL_AT", f"{place}:{number}")
    with Restarting(folder, "--backend", "loopback", "--workers", "2") as server:
        monkeypatch.delenv("VHOSTMP_KILL_AT")
        device = RemoteDevice(server.socket)
        before = {worker["pid"] for worker in server.show()["workers"]}
        with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
            traffic.progress(100)
            installed.use("new")
            with contextlib.suppress(LocalError):
                control_api.call(str(server.control), {"cmd": "upgrade"})
            helpers.wait_until(lambda: not server.child.running)
            traffic.progress(100)
            server.start()
            helpers.wait_until(lambda: not server.show()["renewing"])
            after = {worker["pid"] for worker in server.show()["workers"]}
            assert (len(after), before & after) == (len(before), set())
            traffic.progress(100)
            whole(traffic.finish())
        server.end()


def broken(copy: Path) -> None:
    """Leave out a module."""
    (copy / "adoption.py").write_text("raise ImportError('no such thing')\n")


def other_layout(copy: Path) -> None:
    """Have another layout of the control segment."""
    path = copy / "shm" / "layout.py"
    text = path.read_text()
    start = text.index('"SEGMENT_VERSION": ')
    path.write_text(text[:start] + '"SEGMENT_VERSION": 99, #' + text[start:])


def other_schema(copy: Path) -> None:
    """Record other things."""
    path = copy / "keeper.py"
    text = path.read_text()
    assert text.count("\nSCHEMA: Final = 1\n") == 1
    path.write_text(text.replace("\nSCHEMA: Final = 1\n", "\nSCHEMA: Final = 99\n"))


def other_format(copy: Path) -> None:
    """Record in another way."""
    path = copy / "shm" / "records.py"
    text = path.read_text()
    assert text.count("\nVERSION: Final = 1\n") == 1
    path.write_text(text.replace("\nVERSION: Final = 1\n", "\nVERSION: Final = 99\n"))


def no_look(copy: Path) -> None:
    """Know nothing of upgrades."""
    (copy / "__main__.py").write_text("print('hello')\n")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (broken, "no such thing"),
        (other_layout, "this program needs 99"),
        (
            other_schema,
            f"by version {vhostmp.__version__} in schema 1, and version {NEXT} reads schema 99: use the program that",
        ),
        (other_format, "has format 1, and this program reads format 99: use the program that started it"),
        (no_look, "does not know how to be upgraded to"),
    ],
)
def test_new_code_that_cannot_go_on(server: Restarting, installed: Installed, damage: object, text: str) -> None:
    """Code that does not start, or that has another control segment, is refused in one line; the old one serves on."""
    assert callable(damage)
    device = RemoteDevice(server.socket)
    before = server.show()["workers"]
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        traffic.progress(100)
        damage(installed.folder / "new" / "vhostmp")
        installed.use("new")
        environment = dict(os.environ)
        try:
            os.environ.update(PYTHONPATH=str(installed.folder / "old"))
            done = command("upgrade", "--control-path", str(server.control))
        finally:
            os.environ.update(environment)
        assert (done.returncode, len(told(done.stderr))) == (EXIT_MISTAKE, 1), done
        assert text in done.stderr
        installed.use("old")
        traffic.progress(100)
        assert [w["pid"] for w in server.show()["workers"]] == [w["pid"] for w in before]
        whole(traffic.finish())


@pytest.mark.parametrize("damage", [other_layout, other_schema, other_format])
def test_adopted_by_code_that_cannot_read_it(server: Restarting, installed: Installed, damage: object) -> None:
    """A newer version that is started after a death says in one line that it cannot go on, and touches nothing.

    What is served waits, and the version that started it goes on with it.
    """
    assert callable(damage)
    damage(installed.folder / "new" / "vhostmp")
    device = RemoteDevice(server.socket)
    before = server.show()["workers"]
    with Guest(device.as_net_device()) as guest, Traffic(guest.pairs[0], window=WINDOW) as traffic:
        traffic.progress(100)
        server.kill()
        installed.use("new")
        done = command("serve", *server.options)
        assert (done.returncode, len(told(done.stderr))) == (EXIT_MISTAKE, 1), done
        assert "99" in done.stderr
        assert "or --adopt-timeout 0 to end" in done.stderr
        traffic.progress(100)
        installed.use("old")
        server.start()
        traffic.progress(100)
        assert [w["pid"] for w in server.show()["workers"]] == [w["pid"] for w in before]
        whole(traffic.finish())


def test_nothing_to_upgrade(tmp_path: Path) -> None:
    """A server that nothing outlives says that it cannot be upgraded."""
    with Restarting(tmp_path, "--backend", "loopback", adopt_timeout="0") as server:
        done = command("upgrade", "--control-path", str(server.control))
        assert (done.returncode, len(told(done.stderr))) == (EXIT_MISTAKE, 1), done
        assert "nothing outlives this server" in done.stderr
        server.end()
