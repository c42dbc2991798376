"""A Linux guest under QEMU's own processor emulation, driven by commands over a serial line.

It boots in about three seconds without KVM. Its network card is what the caller's QEMU options say; its serial line is
QEMU's standard input and output, so one file holds all that was asked and answered.

Rules: a command's end is known by a marker line with its exit status, never by time. Commands run one after the other;
what shall go on meanwhile is a `Job`.
"""

from __future__ import annotations

import mmap
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs

from tests.helpers import wait_until
from tests.peers.image import Image
from tests.peers.network import GUEST_ADDRESS, PREFIX_LENGTH
from tests.peers.processes import PATIENCE, Child
from tests.peers.qmp import Monitor, migrate, migrate_postcopy

PROGRAM = "qemu-system-x86_64"
CARD = "eth0"
BOOT_SECONDS = 90.0
MEMORY = "512M"
QMP_SOCKET = "qmp.sock"
PAGE_BYTES = 4096
BLOCK_BYTES = 1 << 20


@attrs.frozen
class Job:
    """A command that goes on in the guest; its output is in a file there."""

    pid: int
    output: str


def differences(one: int, other: int) -> list[int]:
    """Return where the guest memories of two QEMUs differ, by page; offsets in bytes."""
    found: list[int] = []
    with _memory(one) as here, _memory(other) as there:
        for start in range(0, len(here), BLOCK_BYTES):
            stop = start + BLOCK_BYTES
            if here[start:stop] != there[start:stop]:
                pages = range(start, stop, PAGE_BYTES)
                found += [page for page in pages if here[page : page + PAGE_BYTES] != there[page : page + PAGE_BYTES]]
    return found


def _memory(pid: int) -> mmap.mmap:
    """Map the memory of a QEMU's guest."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if link.readlink().name.startswith("memfd:memory-backend-memfd"):
            with link.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    raise AssertionError(f"QEMU {pid} has no memory")


class Guest(AbstractContextManager["Guest"]):
    """A guest that has booted and answers commands. Leaving the context ends it."""

    def __init__(
        self,
        image: Image,
        options: Sequence[str],
        folder: Path,
        *,
        processors: int = 2,
        append: str = "",
        accelerator: str = "tcg,thread=multi",
        cpu: str = "max",
    ) -> None:
        """Boot with the QEMU options given (memory and network card) and wait until its shell answers.

        `append`: words for the kernel's command line. `accelerator`, `cpu`: QEMU's options of these names.
        """
        self._count = 0
        self._image = image
        self._machine = ["-accel", accelerator, "-cpu", cpu, "-smp", str(processors)]
        self._append = f"console=ttyS0 quiet panic=-1 {append}".strip()
        self.console = folder / "console.log"
        self._qmp = folder / QMP_SOCKET
        self.qemu = self._start(options, folder)
        try:
            self._await_boot()
        except BaseException:
            self.qemu.end()
            raise

    def _start(self, options: Sequence[str], folder: Path) -> Child:
        """Start a QEMU for this guest, whose files go to a directory that has none of them yet."""
        image = self._image
        machine = [*self._machine, "-nodefaults", "-no-user-config"]
        machine += ["-qmp", f"unix:{folder / QMP_SOCKET},server=on,wait=off"]
        boot = ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", self._append]
        console = folder / "console.log"
        lines = ["-serial", f"file:{console}", "-chardev", "stdio,id=shell,signal=off", "-serial", "chardev:shell"]
        return Child(
            [PROGRAM, *machine, *options, *boot, *lines, "-display", "none", "-no-reboot"],
            folder / "qemu.log",
            grace=2.0,
        )

    def migrate(
        self, options: Sequence[str], folder: Path, *, postcopy: Callable[[], None] | None = None
    ) -> Mapping[str, Any]:
        """Move to another QEMU with other options while everything in the guest goes on; the old one is ended.

        Before it goes on its memory here and there is compared, all of it: what a device had written and not logged
        would be found. With `postcopy` it goes on there at once, and its memory follows, most of it after that was
        called. Returns what the old QEMU says of the migration. AssertionError when it fails.
        """
        uri = f"unix:{folder / 'migration.sock'}"
        old = self.qemu
        target = self._start([*options, "-incoming", uri, *([] if postcopy else ["-S"])], folder)

        def arrived() -> None:
            """Talk to the guest where it is now."""
            self.qemu, self._qmp, self.console = target, folder / QMP_SOCKET, folder / "console.log"

        try:
            wait_until((folder / "migration.sock").exists, PATIENCE, "the other QEMU to listen")
            with self.monitor() as source, Monitor(folder / QMP_SOCKET) as control:
                if postcopy is not None:
                    report = migrate_postcopy(source, control, uri, [arrived, postcopy])
                else:
                    report = migrate(source, control, uri)
                    stale = differences(old.pid, target.pid)
                    assert not stale, f"{len(stale)} pages did not arrive as they were: {list(map(hex, stale[:20]))}"
                    control.execute("cont")
                    arrived()
        except BaseException as error:
            logs = "".join(f"\n{child.describe('')}" for child in (old, target))
            (target if self.qemu is old else old).end()
            if isinstance(error, AssertionError):
                raise AssertionError(f"{error}{logs}") from error
            raise
        old.end()
        return report

    def _await_boot(self) -> None:
        """Wait until init listens: what is sent to the serial line earlier would be lost."""
        try:
            self.qemu.expect("^guest is up$", BOOT_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._console()}") from error

    def _console(self) -> str:
        """Return the end of what the kernel said, for an error."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return f"guest console: {text[-2000:]}"

    def attempt(self, command: str, timeout: float = PATIENCE) -> tuple[int, str]:
        """Run a shell command in the guest; return its exit status and all it printed."""
        self._count += 1
        begin, end = f"[{self._count}", f"{self._count}]"
        self.qemu.send(f"echo '{begin}'; {{ {command}\n}} 2>&1; echo '{end}' $?\n")
        try:
            found = self.qemu.expect(rf"^{re.escape(begin)}\n((?:.*\n)*?)(.*){re.escape(end)} (\d+)\n", timeout)
        except AssertionError as error:
            raise AssertionError(f"in the guest: {command}\n{error}\n{self._console()}") from error
        return int(found[3]), found[1] + found[2]

    def run(self, command: str, timeout: float = PATIENCE) -> str:
        """Run a shell command in the guest and return what it printed; AssertionError when it fails."""
        status, output = self.attempt(command, timeout)
        assert status == 0, f"exit status {status} in the guest: {command}\n{output}"
        return output

    def start(self, *command: str) -> Job:
        """Start a command that goes on in the guest."""
        output = f"/tmp/job{self._count}"
        # The file is there before the job is: whoever looks at once finds it.
        pid = self.run(f": >{output}; {shlex.join(command)} >{output} 2>&1 & echo $!")
        return Job(int(pid), output)

    def join(self, job: Job, timeout: float = PATIENCE) -> tuple[int, str]:
        """Wait for the end of a job; return its exit status and all it printed."""
        status, _ = self.attempt(f"wait {job.pid}", timeout)
        return status, self.run(f"cat {job.output}")

    def monitor(self) -> Monitor:
        """Connect to QEMU's monitor; one connection at a time."""
        return Monitor(self._qmp)

    def bring_up(self, address: str = GUEST_ADDRESS) -> None:
        """Give the network card its address and take it up."""
        self.run(f"ip address add {address}/{PREFIX_LENGTH} dev {CARD} && ip link set {CARD} up")

    def offloads(self) -> dict[str, str]:
        """Return what ``ethtool -k`` says of the card: the name of an offload -> "on", "off", "on [fixed]"..."""
        return dict(re.findall(r"^\s*([\w-]+): (.+?)\s*$", self.run(f"ethtool -k {CARD}"), re.MULTILINE))

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End QEMU; the guest has nothing to save."""
        self.qemu.end()
