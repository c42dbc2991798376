"""Inside a worker that somebody has taken over: what it tries is refused, one by one; and what it was left with.

The worker runs a device in Python (tests/integration/intruder.py), whose code runs where that of an attacker would.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

from tests.helpers import wait_until
from tests.net_driver import Guest
from tests.request_driver import RequestGuest
from vhostmp.errors import LocalError
from vhostmp.net import NetDevice
from vhostmp.requests import PythonDevice
from vhostmp.shm.memory import GuestMemory
from vhostmp.supervisor import Pool
from vhostmp.workers.channel import close_all
from vhostmp.workers.pager import TOUCHING_THREADS
from vhostmp.workers.sandbox import kernel

INTRUDER: Final = Path(__file__).parents[1] / "integration" / "intruder.py"
ROOM: Final = 1 << 12
CAPABILITY_SETS: Final = ("Inh", "Prm", "Eff", "Bnd", "Amb")  # codespell:ignore

TGKILL, PRCTL, SENDTO = (234, 157, 44) if kernel.MACHINE == "x86_64" else (131, 167, 206)
#: What is answered EPERM. {sibling}: the other worker; {control}: this process; {memory}: another guest's memory.
REFUSED: Final = (
    "open('/etc/passwd').read()",
    "open('/tmp/vhostmp-intruder', 'w')",
    "os.open('/proc/self/mem', os.O_RDWR)",
    "os.open('/proc/{sibling}/mem', os.O_RDONLY)",
    "os.open('/proc/{control}/mem', os.O_RDONLY)",
    "os.open('/proc/{sibling}/environ', os.O_RDONLY)",
    "os.open('/dev/shm{memory}', os.O_RDWR)",
    "os.open('/dev/shm{segment}', os.O_RDWR)",
    "os.open('/dev/mem', os.O_RDWR)",
    "os.listdir('/dev/shm')",
    "os.stat('/etc/shadow')",
    "os.readlink('/proc/self/exe')",
    "os.unlink('/dev/shm{memory}')",
    "os.chdir('/')",
    "os.memfd_create('x') and os.ftruncate(3, 0)",
    "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
    "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "PEERS[0].connect(chr(0) + 'name')",
    "PEERS[0].sendmsg([b'x'])",
    "PEERS[0].sendto(b'x', chr(0) + 'name')",
    "replaced_channel()",
    "[fcntl.ioctl(fd, 0x5421, b'\\0\\0\\0\\0') for fd in range(3, 20)]",  # FIONBIO: of what others share, too
    "os.kill({control}, 0)",
    "os.kill({sibling}, 0)",
    "os.kill(-1, 0)",
    "os.pidfd_open({sibling})",
    "os.fork()",
    "os.execv('/bin/true', ['true'])",
    "subprocess.run(['/bin/true'])",
    "os.posix_spawn('/bin/true', ['true'], dict())",
    "os.setuid(1)",
    "os.nice(1)",
    "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "executable_page()",
    "fcntl.ioctl(0, 0x5412, b'x')",  # TIOCSTI: as if typed at the terminal
    "fcntl.fcntl(0, fcntl.F_SETOWN, {control})",
    "os.posix_fallocate(1, 0, 1 << 30)",
    f"call({TGKILL}, {{sibling}}, {{sibling}}, 0)",
    f"call({PRCTL}, 4, 1, 0, 0, 0)",  # PR_SET_DUMPABLE
    f"call({SENDTO}, 0, 0, 0, 0, ctypes.c_long(1 << 32), 16)",  # a name at an address whose lower half is 0
)
#: What ends the worker, by number of the call (x86-64, aarch64) and its arguments.
DEADLY: Final = {
    "ptrace": ((101, 117), "16, {sibling}, 0, 0"),
    "process_vm_readv": ((310, 270), "{sibling}, 0, 0, 0, 0, 0"),
    "process_vm_writev": ((311, 271), "{control}, 0, 0, 0, 0, 0"),
    "pidfd_getfd": ((438, 438), "0, 3, 0"),
    "userfaultfd": ((323, 282), "0"),
    "io_uring_setup": ((425, 425), "8, 0"),
    "bpf": ((321, 280), "0, 0, 0"),
    "mount": ((165, 40), "0, 0, 0, 0, 0"),
    "unshare": ((272, 97), "0x10000000"),
    "io_setup": ((206, 0), "1, 0"),
}


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Return a pool of two workers."""
    with Pool(workers=2) as two:
        yield two


class Cell:
    """A guest whose worker does what it says, beside another guest with a worker of its own."""

    def __init__(self, pool: Pool, guest: RequestGuest, neighbour: Guest) -> None:
        """Know them."""
        self.pool, self.guest, self.neighbour = pool, guest, neighbour
        self.ours = pool.workers[guest.device.worker_of(0)]
        self.sibling = pool.workers[neighbour.device.worker_of(0)]
        assert self.ours.index != self.sibling.index

    def tries(self, expression: str) -> Any:
        """Have our worker evaluate an expression; return what came of it."""
        text = expression.format(
            control=os.getpid(),
            sibling=self.sibling.pid,
            memory=self.neighbour.buffers.memory.name,
            segment=self.pool.segment_name,
        )
        answer = self.guest.ask(text.encode(), [ROOM])
        return json.loads(answer.data[: answer.length])


@pytest.fixture
def cell(pool: Pool) -> Iterator[Cell]:
    """Make one."""
    with (
        closing(PythonDevice(pool, backend=f"python:{INTRUDER}:Intruder")) as device,
        closing(NetDevice(pool, backend="loopback", name="1")) as other,
    ):
        other.attach_worker(0, 1 - device.worker_of(0))
        with RequestGuest(device) as guest:
            neighbour = Guest(other)
            try:
                yield Cell(pool, guest, neighbour)
            finally:
                neighbour.close()


def test_what_is_refused(cell: Cell) -> None:
    """Each attempt raises PermissionError in the worker, which goes on; none of them has done anything."""
    pid = cell.ours.pid
    outcomes = {text: cell.tries(text) for text in REFUSED}
    refused = {"error": "PermissionError", "errno": errno.EPERM}
    assert {text: outcome for text, outcome in outcomes.items() if outcome != refused} == {}
    assert cell.pool.workers[cell.ours.index].pid == pid
    assert cell.sibling.alive
    assert not Path("/tmp/vhostmp-intruder").exists()


@pytest.mark.parametrize("name", DEADLY)
def test_what_is_deadly(cell: Cell, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A call that nobody makes by mistake ends the worker, and that is said; its rings go on, others notice nothing."""
    numbers, arguments = DEADLY[name]
    number = numbers[0 if kernel.MACHINE == "x86_64" else 1]
    assert cell.tries(f"call({number}, {arguments})") == {"error": "died", "errno": None}
    wait_until(lambda: "SIGSYS: it made a system call that its sandbox forbids" in caplog.text, what="the line")
    assert cell.tries("6 * 7") == {"value": 42}
    assert cell.sibling.alive
    assert cell.pool.restarts == 1


@pytest.mark.skipif(kernel.MACHINE != "x86_64", reason="x86-64 alone has the numbers of x32")
def test_numbers_of_another_kind(cell: Cell) -> None:
    """A call by its x32 number, which seccomp sees as another one, ends the worker."""
    assert cell.tries("call(0x40000000 + 39)") == {"error": "died", "errno": None}


def test_calls_to_come(cell: Cell) -> None:
    """A call that the kernel may have and the table does not know is answered as by a kernel without it."""
    assert cell.tries("call(999)") == {"error": "OSError", "errno": errno.ENOSYS}
    assert cell.tries("call(435, 0, 0)") == {"error": "OSError", "errno": errno.ENOSYS}  # clone3


def test_abort_is_an_abort(cell: Cell, caplog: pytest.LogCaptureFixture) -> None:
    """A worker may end itself, and it shows how."""
    assert cell.tries("os.abort()") == {"error": "died", "errno": None}
    wait_until(lambda: "of SIGABRT" in caplog.text, what="the line")


def test_what_is_allowed(cell: Cell) -> None:
    """Code that keeps to what is documented works: threads, time, pipes, what its module has opened."""
    assert cell.tries("everything_harmless()")["value"].startswith("True 5242880 b'x' 7 3 linux")


def status_of(pid: int) -> dict[str, str]:
    """Return what the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def test_what_it_is_left_with(cell: Cell) -> None:
    """No capability in any set, no new ones to be had, a filter for every thread."""
    for worker in cell.pool.workers:
        for task in os.listdir(f"/proc/{worker.pid}/task"):
            status = status_of(int(task))
            sets = {name: int(status[f"Cap{name}"], 16) for name in CAPABILITY_SETS}
            if os.geteuid() != 0:
                del sets["Bnd"]
            assert set(sets.values()) == {0}, sets
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


@pytest.mark.skipif(not os.access("/dev/userfaultfd", os.R_OK | os.W_OK), reason="no access to /dev/userfaultfd")
def test_what_a_pager_is_left_with(pool: Pool) -> None:
    """The same of a pager, its touching threads included."""
    pager = pool.new_pager()
    device = os.open("/dev/userfaultfd", os.O_RDWR)
    try:
        _, fds = pager.ask({"op": "userfaultfd"}, [device])
        close_all(fds)
        tasks = os.listdir(f"/proc/{pager.pid}/task")
        assert len(tasks) > TOUCHING_THREADS
        for task in tasks:
            status = status_of(int(task))
            assert {int(status[f"Cap{name}"], 16) for name in ("Prm", "Eff", "Amb")} == {0}
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    finally:
        os.close(device)
        pager.close()


def descriptors(pid: int) -> list[str]:
    """Return what a process's descriptors are."""
    return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd") if int(fd) > 2]  # noqa: PLR2004


def test_what_it_holds(pool: Pool) -> None:
    """A worker has no descriptor of memory, no mapping of another guest's, and of descriptors what it needs."""
    devices = [NetDevice(pool, backend="loopback", name=str(number)) for number in range(2)]
    guests = [Guest(device) for device in devices]
    try:
        memory = [{guest.buffers.memory.name, guest.rings.name} for guest in guests]
        for own, other in ((0, 1), (1, 0)):
            worker = pool.workers[devices[own].worker_of(0)]
            held = sorted(re.sub(r"\d+", "N", link) for link in descriptors(worker.pid))
            events = held.count("anon_inode:[eventfd]")
            # Sockets: the channel, the log. Eventfds: nudge, notices, signals; a kick and a call for each ring.
            assert held == ["anon_inode:[eventfd]"] * events + ["anon_inode:[eventpoll]"] + ["socket:[N]"] * 2
            assert events == 3 + 2 * devices[own].num_queues
            mapped = Path(f"/proc/{worker.pid}/maps").read_text()
            assert [f"/dev/shm{name}" in mapped for name in sorted(memory[own])] == [True, True]
            assert [f"/dev/shm{name}" in mapped for name in sorted(memory[other])] == [False, False]
    finally:
        for guest in guests:
            guest.close()
        for device in devices:
            device.close()


def test_object_that_opens_something(pool: Pool, tmp_path: Path) -> None:
    """An object that opens a file when it is made is refused in one line that says what it may do; its module may."""
    source = """
class Late:
    def __init__(self): self.file = open(__file__)
    def transmit(self, queue, packets): pass
    def receive(self, queue, budget): return ()
class Early(Late):
    file = open(__file__)
    def __init__(self): pass
"""
    (tmp_path / "one.py").write_text(source)
    device = NetDevice(pool, backend="loopback")
    guest = Guest(device)
    try:
        with pytest.raises(
            LocalError, match=r"does not start: PermissionError.*\(sandbox: .* top of the module, or --sandbox off\)"
        ):
            device.set_backend(f"python:{tmp_path}/one.py:Late")
        device.set_backend(f"python:{tmp_path}/one.py:Early")
    finally:
        guest.close()
        device.close()


def test_without_a_sandbox(caplog: pytest.LogCaptureFixture) -> None:
    """`sandbox=False`: an object may open what it likes, and workers keep the rights of their control process."""
    caplog.set_level(logging.INFO)
    with Pool(workers=1, sandbox=False) as pool:
        with (
            closing(PythonDevice(pool, backend=f"python:{INTRUDER}:Intruder")) as device,
            RequestGuest(device) as guest,
        ):
            answer = guest.ask(b"len(os.listdir('/')) > 0", [ROOM])
            assert json.loads(answer.data[: answer.length]) == {"value": True}
        mine, its = (status_of(pid) for pid in (os.getpid(), pool.workers[0].pid))
        assert [its[name] for name in ("CapEff", "CapBnd", "Seccomp")] == [
            mine[name] for name in ("CapEff", "CapBnd", "Seccomp")
        ]


def test_memory_of_a_replacement(cell: Cell) -> None:
    """A worker that replaces a dead one is as bare as the first: sandboxed before it has seen anything."""
    pid = cell.ours.pid
    cell.pool.kill_worker(cell.ours.index)
    new = wait_until(lambda: next((w.pid for w in cell.pool.workers if w.index == cell.ours.index and w.pid != pid), 0))
    assert cell.tries("open('/etc/passwd')") == {"error": "PermissionError", "errno": errno.EPERM}
    assert status_of(new)["Seccomp"] == "2"


def test_a_stranger_cannot_open_the_memory(pool: Pool) -> None:
    """Segments are the owner's alone: the control segment, and guest memory that is made here."""
    with GuestMemory.create(1 << 16) as memory:
        for name in (pool.segment_name, memory.name):
            assert os.stat(f"/dev/shm{name}").st_mode & 0o777 == 0o600  # noqa: PLR2004
