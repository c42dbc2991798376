"""`vhostmp serve` as a process of its own, ready when the context is entered; and the commands that talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from tests import helpers
from tests.peers.processes import Child
from vhostmp import transport

PROGRAM = (sys.executable, "-m", "vhostmp")
STARTS = iter(range(1 << 30))


class Served(Child):
    """The server's process."""

    def terminate_in_time(self) -> int:
        """Send SIGTERM, which has to be enough, and return the exit status; AssertionError when it takes too long."""
        self.terminate()
        helpers.wait_until(lambda: not self.running, what="the end after SIGTERM")
        return self.wait()

    def descriptors(self) -> int:
        """Return how many descriptors it has open; while a spare worker is under way, that changes."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def lines(self, text: str) -> list[str]:
        """Return the lines it has logged that hold `text`."""
        return [line for line in self.output.splitlines() if text in line]


@contextlib.contextmanager
def serving(folder: Path, *options: str, fds: Sequence[int] = ()) -> Generator[Served, None, None]:
    """Run `vhostmp serve OPTIONS` with `fds` inherited, until the block ends."""
    ready, ready_at_server = os.pipe()
    try:
        try:
            words = [*PROGRAM, "serve", *options, "--ready-fd", str(ready_at_server)]
            child = Served(words, folder / f"serve.{next(STARTS)}.log", pass_fds=[ready_at_server, *fds])
        finally:
            os.close(ready_at_server)
        with child:
            readable, _, _ = select.select([ready], [], [], helpers.PATIENCE)
            assert readable, child.describe("not ready in time")
            assert os.read(ready, 10) == b"\n", child.describe("did not get ready")
            assert os.read(ready, 10) == b"", "the ready descriptor is left open"
            yield child
    finally:
        os.close(ready)


def quieten(control: Path) -> None:
    """Wait until a server has hung up on everybody who has asked it something and is gone: its descriptors are its own.

    It is one thread: who comes later is answered later, and is told with the end of the connection that it is closed.
    """
    with transport.dial(str(control)) as sock:
        sock.settimeout(helpers.PATIENCE)
        with sock.makefile("rwb") as stream:
            stream.write(b'{"cmd": "show"}\n')
            stream.flush()
            assert stream.readline()
            sock.shutdown(socket.SHUT_WR)
            assert stream.read() == b""


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """Run another command to its end."""
    return subprocess.run([*PROGRAM, *words], capture_output=True, text=True, timeout=60, check=False)


def ask(verb: str, control: Path, *words: str) -> Any:
    """Run `vhostmp show|swap --json` and return what it printed."""
    done = command(verb, "--control-path", str(control), "--json", *words)
    assert (done.returncode, done.stderr) == (0, ""), done
    return json.loads(done.stdout)
