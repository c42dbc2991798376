"""What the README files say is so: their examples run, their tables name every file and every command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.helpers import wait_until
from tests.request_driver import RequestGuest
from vhostmp.net import NetDevice
from vhostmp.requests import PythonDevice
from vhostmp.shm.memory import DEFAULT_UVA_BASE, GuestMemory
from vhostmp.supervisor import Pool
from vhostmp.tools.stress.ring import F_VERSION_1, RingLayout
from vhostmp.tools.stress.split import SplitDriver

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES: list[str] = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
EXAMPLE_LINES_MAX = 20
FOLDERS = ("shm", "workers", "vhostmp", "tools", "tests")
#: The memory of the guest in the test of the back-end: two rings, what is sent, room for what is received; gpa.
MEMORY_BYTES = 1 << 16
RX_RING, TX_RING, SENT, RECEIVED = 0x0, 0x1000, 0x2000, 0x4000
ROOM_BYTES = 2048
#: virtio_net_hdr with VERSION_1 (virtio 1.3, 5.1.6).
HEADER_BYTES = 12
#: Made by tools or by use, and so not listed.
UNLISTED = {"build", "dist", "vhostmp.egg-info"}


def example(word: str) -> str:
    """The one Python example that holds a word."""
    (found,) = (text for text in EXAMPLES if word in text)
    return found


def run(*command: str, cwd: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def named(readme: Path) -> set[str]:
    """The names in backquotes in the first cells of a file's tables, without trailing slashes."""
    cells = re.findall(r"^\| *(`.*?) \|", readme.read_text(), re.M)
    return {name.rstrip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_two_commands_stand_on_top() -> None:
    """The first thing below the title is how to see it run and how to test it; both are targets of the Makefile."""
    first, second = README.split("\n\n")[1].splitlines()
    assert first.split("#")[0].strip() == "make demo"
    assert second.split("#")[0].strip() == "make test"
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake (\w+)", README)) <= targets | {"PYTHON"}


def test_every_file_in_the_root_is_listed() -> None:
    """The index in the README names every file and folder of the checkout's root, and no other."""
    present = {path.name for path in ROOT.iterdir()} - UNLISTED
    present = {name for name in present if not name.startswith(".")} | {".ci/run", ".pre-commit-config.yaml"}
    index = ROOT / "README.md"
    listed = {name for name in named(index) if (ROOT / name).exists()}
    assert present - listed == {"README.md"}
    assert all((ROOT / name).exists() for name in re.findall(r"^\| `([^`]+)/?` \|", README.split("## Files")[1], re.M))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_is_listed(folder: str) -> None:
    """The README of a folder names each of its modules, subfolders and documents, and nothing that is not there."""
    here = ROOT / folder
    paths = [path for path in here.iterdir() if not path.is_symlink() and not path.name.startswith(("__init__", "."))]
    modules = {path.name for path in paths if path.suffix in {".py", ".pyx", ".sh"}}
    modules |= {path.name for path in paths if path.is_dir() and path.name != "__pycache__" and any(path.iterdir())}
    listed = named(here / "README.md")
    assert modules - listed == set()
    assert {name for name in listed if not (here / name).exists() and " " not in name} == set()


def test_python_back_end_is_short() -> None:
    """A back-end in Python takes at most 20 lines."""
    assert len(example("class Mirror").splitlines()) <= EXAMPLE_LINES_MAX


def start_ring(device: NetDevice, index: int, ring: SplitDriver, fds: tuple[int, int]) -> None:
    """Bring one ring of a device up, as a front-end would."""
    device.set_vring_num(index, ring.num)
    uva = DEFAULT_UVA_BASE
    device.set_vring_addr(index, desc=uva + ring.desc_gpa, avail=uva + ring.avail_gpa, used=uva + ring.used_gpa)
    device.set_vring_base(index, 0)
    device.set_vring_kick(index, fds[0])
    device.set_vring_call(index, fds[1])
    device.start_vring(index)
    device.set_vring_enable(index, True)


@pytest.mark.slow
def test_python_back_end_runs(tmp_path: Path) -> None:
    """The example, served by a worker, answers a guest's frame with its two Ethernet addresses exchanged."""
    (tmp_path / "mirror.py").write_text(example("class Mirror"))
    frame = bytes.fromhex("0200000000aa 0200000000bb 88b5") + bytes(range(50))
    answer = frame[6:12] + frame[:6] + frame[12:]
    with ExitStack() as stack:
        pool = stack.enter_context(Pool(workers=1))
        device = stack.enter_context(closing(NetDevice(pool, backend=f"python:{tmp_path}/mirror.py:Mirror")))
        memory = stack.enter_context(GuestMemory.create(MEMORY_BYTES))
        rings = [SplitDriver(memory.buf, RingLayout.at(at, 16), features=F_VERSION_1) for at in (RX_RING, TX_RING)]
        kicks, calls = [[os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)] for _ in range(2)]
        for ring in rings:
            stack.callback(ring.close)
        for fd in (*kicks, *calls):
            stack.callback(os.close, fd)
        device.set_owner()
        device.set_features(F_VERSION_1)
        device.set_mem_table([memory.region])
        for index in range(2):
            start_ring(device, index, rings[index], (kicks[index], calls[index]))
        memory.buf[SENT : SENT + HEADER_BYTES + len(frame)] = bytes(HEADER_BYTES) + frame
        rings[0].add(writable=[(RECEIVED, ROOM_BYTES)])
        rings[1].add(readable=[(SENT, HEADER_BYTES + len(frame))])
        for ring, kick in zip(rings, kicks, strict=True):
            if ring.publish():
                os.eventfd_write(kick, 1)
        wait_until(rings[0].pending, what="the answer")
        (used,) = rings[0].reap()
        assert used.length == HEADER_BYTES + len(frame)
        start = RECEIVED + HEADER_BYTES
        assert bytes(memory.buf[start : start + len(frame)]) == answer


def test_device_in_python_is_short() -> None:
    """A device in Python takes at most 20 lines."""
    assert len(example("class Shout").splitlines()) <= EXAMPLE_LINES_MAX


@pytest.mark.slow
def test_device_in_python_runs(tmp_path: Path) -> None:
    """The example, served by a worker, answers what one queue brings on the other one."""
    (tmp_path / "shout.py").write_text(example("class Shout"))
    with (
        Pool(workers=2) as pool,
        closing(PythonDevice(pool, backend=f"python:{tmp_path}/shout.py:Shout")) as device,
        RequestGuest(device) as guest,
    ):
        heads = [guest.send(writable=[3]) for _ in range(2)]
        guest.ask(b"hello", queue=1)
        answers = [guest.wait(head) for head in heads]
        assert b"".join(answer.data[: answer.length] for answer in answers) == b"HELLO"


@pytest.mark.slow
def test_hypervisor_example_runs() -> None:
    """The example of device verbs runs as it stands, and ends."""
    done = run(sys.executable, "-c", example("NetDevice"), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"0x[0-9a-f]+\n[\d.]+ us until .*\n", done.stdout)


@pytest.mark.slow
def test_commands_exist() -> None:
    """Each command that the README shows is one of the program's, and so is each option it is shown with."""
    lines = re.findall(r"^ +vhostmp .*|`vhostmp [^`]*`", README, re.M)
    shown = {match[1] for line in lines if (match := re.search(r"vhostmp ([a-z-]+)", line))}
    assert {"serve", "swap", "show", "qemu-args", "demo"} <= shown
    for command in sorted(shown):
        done = run(sys.executable, "-m", "vhostmp", command, "--help", cwd=ROOT)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        options = {o for line in lines if f"vhostmp {command}" in line for o in re.findall(r"--[a-z-]+", line)}
        assert {option for option in options if option not in done.stdout} == set(), command
