"""`vhostmp serve` as a user without rights, with a tap that root has opened; and what other users can see of it."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.frames import make_frame
from tests.helpers import PATIENCE, descendants, segment_names, told, wait_until
from tests.integration import serving as serving_module
from tests.integration.serving import ask, command, serving
from tests.net_driver import Guest
from tests.remote import RemoteDevice
from tests.taps import inject, interface_up, ip, needs_tap, tap_name, veth
from vhostmp import backends
from vhostmp.backends import IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUNSETIFF, open_backend
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool

NOBODY: Final = 65534
ROOT: Final = Path(__file__).parents[2]
#: Whether an interpreter can be run, and run again by itself, and finds everything.
PROBE: Final = "import subprocess, sys, vhostmp.serve; subprocess.run([sys.executable, '-c', ''], check=True)"
AS_NOBODY: Final = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", "--")


def open_tap(name: str, flags: int = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) -> int:
    """Open a tap, as whoever starts vhostmp does; it is made, and goes with its last descriptor."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH", name.encode(), flags).ljust(40, b"\0"))
    return fd


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder of nobody's, which nobody can reach."""
    path = Path(tempfile.mkdtemp(prefix="vhostmp-nobody-"))
    try:
        os.chown(path, NOBODY, NOBODY)
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture
def as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `serving` start programs as nobody, with no capability."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and the program setpriv")
    packages = os.pathsep.join([str(ROOT), *(path for path in sys.path if path.endswith("-packages"))])
    for python in (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"):
        probe = subprocess.run(
            [*AS_NOBODY, "env", f"PYTHONPATH={packages}", python, "-c", PROBE],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        if probe.returncode == 0:
            monkeypatch.setenv("PYTHONPATH", packages)
            monkeypatch.setattr(serving_module, "PROGRAM", (*AS_NOBODY, python, "-m", "vhostmp"))
            return
    pytest.skip("the user nobody has no interpreter here, or cannot read the checkout")


def identity(pid: int) -> tuple[str, str]:
    """Return the user and the effective capabilities of a process."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return lines["Uid"].split("\t")[1], lines["CapEff"].lstrip("0") or "0"


def packets(name: str) -> int:
    """Return how many frames have come out of a tap."""
    return int(Path(f"/sys/class/net/{name}/statistics/rx_packets").read_text())


@needs_tap
@pytest.mark.usefixtures("as_nobody")
def test_nobody_serves_a_tap_of_ours(folder: Path) -> None:
    """A server without rights moves frames both ways through a tap that it was given, swaps away from it and back."""
    name = tap_name()
    tap = open_tap(name)
    try:
        interface_up(name)
        path, control = folder / "s", folder / "c"
        with serving(
            folder, f"--socket-path={path}", f"--control-path={control}", f"--backend=tapfd:{tap}", fds=[tap]
        ) as server:
            everybody = {server.pid, *descendants(server.pid)}
            assert {identity(pid) for pid in everybody} == {(str(NOBODY), "0")}
            with Guest(RemoteDevice(path).as_net_device()) as guest:
                pair = guest.pairs[0]
                for backend in ("loopback", f"tapfd:{tap}"):
                    assert ask("swap", control, backend)["backend"] == backend
                frame = make_frame(1, 60)
                sent = packets(name)
                pair.post()
                pair.send(frame)
                pair.kick()
                wait_until(lambda: packets(name) > sent, what="a frame through the tap")
                inject(name, frame)
                wait_until(lambda: frame in pair.receive(), what="a frame from the tap")
    finally:
        os.close(tap)


@pytest.mark.usefixtures("as_nobody")
def test_what_others_can_see(folder: Path) -> None:
    """Every file that a server makes is its user's alone: sockets, segments; under a umask that would let all in."""
    old = os.umask(0)
    try:
        options = (f"--socket-path={folder}/s", f"--control-path={folder}/c", "--backend=loopback")
        with serving(folder, *options) as server:
            segments = [name for name in segment_names() if name.split(".")[2] == str(server.pid)]
            assert len(segments) == 1
            made = [Path("/dev/shm") / segments[0], *(folder / name for name in ("s", "c", "c.hold"))]
            assert {(path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) for path in made} == {(NOBODY, 0o600)}
    finally:
        os.umask(old)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a socket to another group")
def test_socket_for_a_group(tmp_path: Path) -> None:
    """`--socket-group` lets a group connect, `--socket-mode` others as well; the control socket stays its owner's."""
    with serving(
        tmp_path, f"--socket-path={tmp_path}/s", f"--control-path={tmp_path}/c", "--socket-group", str(NOBODY)
    ):
        status = (tmp_path / "s").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, NOBODY)
        assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o600  # noqa: PLR2004
    with serving(tmp_path, f"--socket-path={tmp_path}/s", "--socket-mode", "0622"):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o622  # noqa: PLR2004


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--socket-mode", "999"], "no permissions: write them in octal"),
        (["--socket-group", "no such group"], "no group 'no such group'"),
        (["--socket-mode", "0660", "--connect"], "go with --socket-path, where we listen"),
        (["--backend", "tapfd:0"], "tapfd:0: descriptor 0 is not a tap"),
        (["--backend", "tapfd:x"], "give the numbers of inherited descriptors"),
        (["--backend", "tapfd:3", "--queue-pairs", "2"], "descriptors: 1, queue pairs: 2"),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], why: str) -> None:
    """A mistake is one line, and nothing is left."""
    done = command("serve", f"--socket-path={tmp_path}/s", *words)
    assert done.returncode == 2  # noqa: PLR2004
    assert why in done.stderr
    assert len(told(done.stderr)) == 1
    assert not (tmp_path / "s").exists()


@needs_tap
def test_macvtap() -> None:
    """A macvtap, which a shell can open (3<>/dev/tapN), is a tap that is open already."""
    name = f"vm{os.getpid()}"
    with veth() as (here, there), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as peer:
        try:
            ip("link", "add", "link", here, "name", name, "type", "macvtap", "mode", "passthru")
        except subprocess.CalledProcessError:
            pytest.skip("the kernel has no macvtap")
        try:
            interface_up(name)
            peer.bind((there, 3))  # ETH_P_ALL
            peer.settimeout(PATIENCE)
            number = Path(f"/sys/class/net/{name}/ifindex").read_text().strip()
            tap = wait_until(lambda: open_if_there(f"/dev/tap{number}"), what="the device's file")
            try:
                with Pool(workers=1) as pool, Guest(NetDevice(pool, backend=f"tapfd:{tap}")) as guest:
                    pair, frame = guest.pairs[0], make_frame(7, 60)
                    pair.post()
                    pair.send(frame)
                    pair.kick()
                    while peer.recv(2048) != frame:
                        pass
                    answer = b"\xff" * 6 + frame[6:]
                    peer.send(answer)
                    wait_until(lambda: answer in pair.receive(), what="the answer")
            finally:
                os.close(tap)
        finally:
            ip("link", "del", name)


def open_if_there(path: str) -> int:
    """Open a device's file, once udev or the kernel has made it; 0: it is not there yet."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC) if Path(path).exists() else 0


@needs_tap
def test_taps_that_cannot_be_used() -> None:
    """A tap without the header is refused, and so are two; those of several queues are taken in their order."""
    taps = [open_tap(tap_name(), IFF_TAP | IFF_NO_PI), open_tap(tap_name(1)), open_tap(tap_name(2))]
    several = [open_tap(tap_name(3), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE) for _ in range(2)]
    try:
        with pytest.raises(LocalError, match="was not opened with IFF_TAP"):
            open_backend(f"tapfd:{taps[0]}", 1)
        with pytest.raises(LocalError, match="descriptors of different taps"):
            open_backend(f"tapfd:{taps[1]},{taps[2]}", 2)
        setup = open_backend(f"tapfd:{several[0]},{several[1]}", 2)
        assert (setup.interface, setup.mtu, len(setup.fds)) == (tap_name(3), 1500, 2)
        assert setup.offloads & backends.TCP_OFFLOADS
        setup.close()
        for fd in several:
            os.fstat(fd)  # stays open, for a swap back
    finally:
        for fd in (*taps, *several):
            os.close(fd)
