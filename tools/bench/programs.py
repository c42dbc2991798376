"""The programs of a case, each pinned to one core: DPDK's testpmd at either end, `vhostmp serve` as the back-end.

Rules: everything started here dies with this process (setpriv --pdeathsig) and is ended by id; testpmd speaks on a
pseudo-terminal, for on a pipe its C library would keep its answers back. DPDK runs with --in-memory: no files of its
own, huge pages from the kernel's pool.
Source: DPDK 22.11, testpmd user guide ("set fwd", "show port stats", flowgen, txonly, macswap), vhost and virtio-user.
"""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from vhostmp.errors import LocalError
from vhostmp.tools.bench import placement

TESTPMD: Final = "dpdk-testpmd"
MEGABYTES: Final = 256
MBUFS: Final = 16384
PATIENCE: Final = 20.0
PROMPT: Final = "testpmd> "
#: Long enough at full load that the busiest thread is the poller, seconds.
SETTLE_SECONDS: Final = 0.3


class Program:
    """A child process that is pinned to one core with all its threads and children."""

    def __init__(self, command: Sequence[str], core: int, terminal: bool = False, pass_fds: Sequence[int] = ()) -> None:
        """Start `command` on `core`. LocalError when the program is not there."""
        self.name: Final = Path(command[0]).name
        self.core: Final = core
        self._output = ""
        self._terminal, child = pty.openpty() if terminal else (-1, subprocess.DEVNULL)
        words = ["setpriv", "--pdeathsig", "KILL", "--", "taskset", "-c", str(core), *command]
        try:
            self._process = subprocess.Popen(
                words,
                stdin=child,
                stdout=child if terminal else subprocess.DEVNULL,
                stderr=child if terminal else None,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        except OSError as error:
            raise LocalError(f"cannot start {self.name}: {error.strerror}") from error
        finally:
            if terminal:
                os.close(child)

    @property
    def pid(self) -> int:
        """Its process id: setpriv and taskset became the program."""
        return self._process.pid

    def pids(self) -> list[int]:
        """Return it and its descendants."""
        return [self.pid, *placement.children_of(self.pid)]

    def check(self) -> None:
        """Raise LocalError when it has ended."""
        if self._process.poll() is not None:
            raise LocalError(f"{self.name} ended with status {self._process.returncode}: {self.tail()}")

    def tail(self) -> str:
        """Return the last line of its output that says something."""
        lines = [line.strip() for line in self._output.splitlines() if line.strip() and PROMPT.strip() not in line]
        return lines[-1] if lines else "it said nothing"

    def read_until(self, pattern: str, timeout: float = PATIENCE) -> str:
        """Read its terminal until `pattern` matches, and return what was read. LocalError in time or at its end."""
        limit = time.monotonic() + timeout
        text = ""
        while not re.search(pattern, text):
            left = limit - time.monotonic()
            if left <= 0:
                raise LocalError(f"{self.name} did not print {pattern!r} within {timeout:g} s: {self.tail()}")
            if select.select([self._terminal], [], [], left)[0]:
                try:
                    text += os.read(self._terminal, 65536).decode(errors="replace")
                except OSError:  # the other end of the terminal is closed: it has ended
                    self._process.wait(timeout)
                    self._output = text
                    self.check()
            self._output = text
        return text

    def send(self, text: str) -> None:
        """Write to its terminal."""
        os.write(self._terminal, text.encode())

    def end(self, grace: float = 3.0) -> None:
        """SIGTERM, then SIGKILL for it and its whole group. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            limit = time.monotonic() + grace
            while self._process.poll() is None and time.monotonic() < limit:
                self._drain()
                time.sleep(0.005)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if self._terminal >= 0:
            os.close(self._terminal)
            self._terminal = -1

    def _drain(self) -> None:
        """Throw away what it says at its end, lest it blocks on a full terminal."""
        if self._terminal >= 0 and select.select([self._terminal], [], [], 0)[0]:
            with suppress(OSError):
                os.read(self._terminal, 65536)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.end()


class Testpmd(Program):
    """A testpmd with one port and one forwarding thread, taking commands."""

    __test__ = False  # not a test class, whatever its name

    def __init__(self, vdev: str, mode: str, core: int, *options: str) -> None:
        """Start it on `vdev` and wait until it takes commands; it forwards in `mode` once told to."""
        command = [
            *(TESTPMD, "--lcores", f"0@{core},1@{core}", "--in-memory", "--single-file-segments", "--no-pci"),
            *("--no-telemetry", "-m", str(MEGABYTES), "--vdev", vdev, "--", "-i", "--no-mlockall", "--nb-cores=1"),
            *(f"--total-num-mbufs={MBUFS}", f"--forward-mode={mode}", *options),
        ]
        super().__init__(command, core, terminal=True)
        try:
            self.read_until(PROMPT)
        except BaseException:
            self.end()
            raise

    @classmethod
    def front_end(cls, socket: Path, mode: str, ring: int, core: int, *, packed: bool = False) -> Testpmd:
        """Start a virtio-user front-end of the back-end that listens on `socket`."""
        return cls(f"net_virtio_user0,path={socket},queue_size={ring},packed_vq={packed:d}", mode, core)

    @classmethod
    def back_end(cls, socket: Path, mode: str, core: int) -> Testpmd:
        """Start a vhost back-end that listens on `socket` and forwards at once."""
        return cls(f"net_vhost0,iface={socket},queues=1", mode, core, "--auto-start")

    def command(self, text: str) -> str:
        """Carry out one command and return what it printed."""
        self.send(f"{text}\n")
        return self.read_until(rf"{re.escape(text)}[\s\S]*\n[\s\S]*{re.escape(PROMPT)}|{re.escape(text)}\s+{PROMPT}")

    def rates(self) -> dict[str, float]:
        """Return packets a second since the last call, by testpmd's own clock: {"Rx": ..., "Tx": ...}."""
        text = self.command("show port stats 0")
        found = dict(re.findall(r"(Rx|Tx)-pps:\s*(\d+)", text))
        if len(found) != len(("Rx", "Tx")):
            raise LocalError(f"testpmd's statistics are not understood: {self.tail()}")
        return {name: float(value) for name, value in found.items()}

    def end(self, grace: float = 3.0) -> None:
        """Have it close its port first: the other side of the socket sees an orderly end."""
        with suppress(OSError, LocalError):
            self.send("quit\n")
            limit = time.monotonic() + grace
            while self._process.poll() is None and time.monotonic() < limit:
                self._drain()
                time.sleep(0.005)
        super().end(grace)


class Serve(Program):
    """`vhostmp serve` with one device and one worker."""

    def __init__(self, socket: Path, backend: str, core: int) -> None:
        """Start it and wait until it listens."""
        ready, told = os.pipe()
        try:
            super().__init__(
                [
                    *(sys.executable, "-m", "vhostmp", "serve", "--socket-path", str(socket), "--backend", backend),
                    *("--busy-poll", "50", "--log-level", "error", "--ready-fd", str(told)),
                ],
                core,
                pass_fds=[told],
            )
            os.close(told)
            told = -1
            if not select.select([ready], [], [], PATIENCE)[0] or os.read(ready, 1) != b"\n":
                self.end()
                raise LocalError(f"vhostmp serve --backend {backend} did not get ready")
        finally:
            os.close(ready)
            if told >= 0:
                os.close(told)


def poller_of(program: Program) -> tuple[int, int]:
    """Return (pid, tid) of the program's busiest thread, watched for SETTLE_SECONDS."""
    before = placement.all_ticks(program.pids())
    time.sleep(SETTLE_SECONDS)
    program.check()
    return placement.busiest_thread(program.pids(), before)
