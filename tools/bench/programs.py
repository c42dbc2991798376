"""The programs of a case, each pinned to one core: DPDK's testpmd at either end, `vhostmp serve` as the back-end.

Rules: everything started here dies with this process (setpriv --pdeathsig) and is ended by id; testpmd speaks on a
socket, its output by lines (stdbuf): what it says on a pseudo-terminal is handed on by a thread of the kernel, which
gets no processor while pollers have real-time priority on both. DPDK runs with --in-memory: no files of its
own, huge pages from the kernel's pool.
Source: DPDK 22.11, testpmd user guide ("set fwd", "show port stats", flowgen, txonly, macswap), vhost and virtio-user.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
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
    """A child process that is pinned with all its threads and children."""

    def __init__(
        self, command: Sequence[str], core: int | Sequence[int], dialogue: bool = False, pass_fds: Sequence[int] = ()
    ) -> None:
        """Start `command` on `core`, or on any of several; with a `dialogue` it reads and writes a socket of ours.

        LocalError when the program is not there.
        """
        self.name: Final = Path(command[0]).name
        cores = ",".join(map(str, [core] if isinstance(core, int) else core))
        self._output = ""
        # What it says on stderr, unless in a dialogue; closed by end().
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        ours, its = socket.socketpair() if dialogue else (None, None)
        child = subprocess.DEVNULL if its is None else its.fileno()
        self._dialogue = ours
        if dialogue:
            command = ["stdbuf", "-oL", *command]
        words = ["setpriv", "--pdeathsig", "KILL", "--", "taskset", "-c", cores, *command]
        try:
            self._process = subprocess.Popen(
                words,
                stdin=child,
                stdout=child,
                stderr=self._errors if its is None else child,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        except OSError as error:
            self._errors.close()
            if ours is not None:
                ours.close()
            raise LocalError(f"cannot start {self.name}: {error.strerror}") from error
        finally:
            if its is not None:
                its.close()

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
        self._errors.seek(0)
        said = self._output or self._errors.read()
        lines = [line.strip() for line in said.splitlines() if line.strip() and PROMPT.strip() not in line]
        return lines[-1] if lines else "it said nothing"

    def read_until(self, pattern: str, timeout: float = PATIENCE) -> str:
        """Read what it says until `pattern` matches, and return what was read. LocalError in time or at its end."""
        assert self._dialogue is not None
        limit = time.monotonic() + timeout
        text = ""
        while not re.search(pattern, text):
            left = limit - time.monotonic()
            if left <= 0:
                raise LocalError(f"{self.name} did not print {pattern!r} within {timeout:g} s: {self.tail()}")
            if select.select([self._dialogue], [], [], left)[0]:
                try:
                    data = self._dialogue.recv(65536)
                except ConnectionResetError:
                    data = b""
                if not data:  # it has ended
                    self._process.wait(timeout)
                    self._output = text
                    self.check()
                text += data.decode(errors="replace")
            self._output = text
        return text

    def send(self, text: str) -> None:
        """Say something to it."""
        assert self._dialogue is not None
        self._dialogue.sendall(text.encode())

    def end(self, grace: float = 3.0) -> None:
        """SIGTERM, then SIGKILL for it and its whole group. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            self._wait_for_end(grace)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()
        if self._dialogue is not None:
            self._dialogue.close()

    def _wait_for_end(self, seconds: float) -> None:
        """Give it so long to end by itself."""
        limit = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < limit:
            self._drain()
            time.sleep(0.005)

    def _drain(self) -> None:
        """Throw away what it says at its end, lest it blocks."""
        if self._dialogue is not None and select.select([self._dialogue], [], [], 0)[0]:
            with suppress(OSError):
                self._dialogue.recv(65536)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.end()


class Testpmd(Program):
    """A testpmd with one forwarding thread, taking commands."""

    __test__ = False  # not a test class, whatever its name

    def __init__(self, vdevs: Sequence[str], mode: str, core: int, *options: str) -> None:
        """Start it on `vdevs`, a port each, and wait until it takes commands; it forwards in `mode` once told to."""
        command = [
            *(TESTPMD, "--lcores", f"0@{core},1@{core}", "--in-memory", "--single-file-segments", "--no-pci"),
            *("--no-telemetry", "-m", str(MEGABYTES), *(word for vdev in vdevs for word in ("--vdev", vdev))),
            *("--", "-i", "--no-mlockall", "--nb-cores=1"),
            *(f"--total-num-mbufs={MBUFS}", f"--forward-mode={mode}", *options),
        ]
        self.ports: Final = len(vdevs)
        super().__init__(command, core, dialogue=True)
        try:
            self.read_until(PROMPT)
        except BaseException:
            self.end()
            raise

    @classmethod
    def front_end(cls, sockets: Sequence[Path], mode: str, ring: int, core: int, *, packed: bool = False) -> Testpmd:
        """Start a virtio-user front-end of the back-ends that listen on `sockets`."""
        return cls(
            [
                f"net_virtio_user{number},path={socket},queue_size={ring},packed_vq={packed:d}"
                for number, socket in enumerate(sockets)
            ],
            mode,
            core,
        )

    @classmethod
    def back_end(
        cls, sockets: Sequence[Path], mode: str, core: int, *, size: int = 64, count: bool = False, beside: str = ""
    ) -> Testpmd:
        """Start a vhost back-end that listens on `sockets` and forwards at once.

        Where it sends of its own accord (txonly) it sends frames of `size` bytes; `count`: it counts its own cycles;
        `beside`: one port more, behind the others.
        """
        vdevs = [f"net_vhost{number},iface={socket},queues=1" for number, socket in enumerate(sockets)]
        options = ["--auto-start", f"--txpkts={size}", *(["--record-core-cycles"] if count else [])]
        return cls([*vdevs, *([beside] if beside else [])], mode, core, *options)

    def command(self, text: str) -> str:
        """Carry out one command and return what it printed."""
        self.send(f"{text}\n")
        return self.read_until(rf"{re.escape(text)}[\s\S]*\n[\s\S]*{re.escape(PROMPT)}|{re.escape(text)}\s+{PROMPT}")

    def rates(self) -> dict[str, float]:
        """Return packets a second since the last call, by testpmd's own clock, of all ports: {"Rx": ..., "Tx": ...}."""
        text = self.command("show port stats all" if self.ports > 1 else "show port stats 0")
        rates = {"Rx": 0.0, "Tx": 0.0}
        found = re.findall(r"(Rx|Tx)-pps:\s*(\d+)", text)
        if len(found) != 2 * self.ports:
            raise LocalError(f"testpmd's statistics are not understood: {self.tail()}")
        for name, value in found:
            rates[name] += float(value)
        return rates

    def ns_per_packet(self) -> float | None:
        """Return its busy time a packet since the last call, nanoseconds, when it counts cycles; None if it has none.

        Source: DPDK testpmd user guide, --record-core-cycles.
        """
        text = self.command("show fwd stats all")
        self.command("clear fwd stats all")
        found = re.search(r"CPU cycles/packet=([\d.]+)[\s\S]*? at (\d+) MHz", text)
        return float(found[1]) * 1e3 / float(found[2]) if found and float(found[1]) else None

    def end(self, grace: float = 3.0) -> None:
        """Have it close its port first: the other side of the socket sees an orderly end."""
        with suppress(OSError, LocalError):
            self.send("quit\n")
            self._wait_for_end(grace)
        super().end(grace)


class Serve(Program):
    """`vhostmp serve`, a device for each socket."""

    def __init__(
        self,
        sockets: Sequence[Path],
        backend: str | Sequence[str],
        core: int | Sequence[int],
        *,
        workers: int = 1,
        busy_poll: int = 50,
        options: Sequence[str] = (),
    ) -> None:
        """Start it, wait until it listens; `seconds` says how long that took. A back-end for all, or one for each."""
        backends = [backend] if isinstance(backend, str) else backend
        ready, told = os.pipe()
        began = time.monotonic()
        try:
            super().__init__(
                [
                    *(sys.executable, "-m", "vhostmp", "serve", "--workers", str(workers)),
                    *(word for spec in backends for word in ("--backend", spec)),
                    *(word for socket in sockets for word in ("--socket-path", str(socket))),
                    *("--busy-poll", str(busy_poll), "--log-level", "error", "--ready-fd", str(told), *options),
                ],
                core,
                pass_fds=[told],
            )
            os.close(told)
            told = -1
            if not select.select([ready], [], [], PATIENCE)[0] or os.read(ready, 1) != b"\n":
                self._wait_for_end(1.0)
                reason = self.tail()
                self.end()
                raise LocalError(f"vhostmp serve --backend {backends[0]} did not get ready: {reason}")
        finally:
            os.close(ready)
            if told >= 0:
                os.close(told)
        self.seconds: Final = time.monotonic() - began


def pollers_of(programs: Sequence[Program]) -> list[tuple[int, int]]:
    """Return (pid, tid) of each program's busiest thread, watched for SETTLE_SECONDS."""
    before = [placement.all_ticks(program.pids()) for program in programs]
    time.sleep(SETTLE_SECONDS)
    for program in programs:
        program.check()
    return [placement.busiest_thread(program.pids(), old) for program, old in zip(programs, before, strict=True)]
