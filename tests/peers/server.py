"""``vhostmp serve`` as its users start it, and the commands that talk to it.

Rules: everything goes through the command line, run with this Python and the vhostmp that the tests import; nothing of
the product runs inside the test process.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import vhostmp
from tests.peers.processes import PATIENCE, Child, run

Inside = Callable[..., list[str | Path]]
"""Makes of a command one that runs somewhere else, such as in a network namespace."""


def program(*words: str) -> list[str]:
    """Return the command line ``vhostmp WORDS...``."""
    return [sys.executable, "-m", "vhostmp", *words]


def environment() -> dict[str, str]:
    """Return what `program` needs in the environment to find the same vhostmp as the tests."""
    assert vhostmp.__file__ is not None
    return {"PYTHONPATH": str(Path(vhostmp.__file__).resolve().parents[1])}


class Server(AbstractContextManager["Server"]):
    """A running back-end with one device. Leaving the context sends it SIGTERM, on which it must end well."""

    def __init__(
        self,
        backend: str,
        folder: Path,
        *,
        inside: Inside | None = None,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        name: str = "serve",
    ) -> None:
        """Start it and wait until it says that it is ready; `name` tells its log from an earlier one's in `folder`.

        `env` is for objects of a back-end in Python, which open the files that it names: without a sandbox then.
        """
        self.socket = folder / "net.sock"
        self._control = folder / "control.sock"
        self._killed = False
        self._ours = [self._control, *([] if "--connect" in options else [self.socket])]
        paths = ["--socket-path", str(self.socket), "--control-path", str(self._control)]
        ready, ready_at_server = os.pipe()
        try:
            sandbox = ["--sandbox", "off"] if env else []
            command = program(
                "serve", *paths, "--backend", backend, "--ready-fd", str(ready_at_server), *sandbox, *options
            )
            whole = inside(*command) if inside else command
            self._child = Child(
                whole, folder / f"{name}.log", env={**environment(), **(env or {})}, pass_fds=[ready_at_server]
            )
        except BaseException:
            os.close(ready)
            raise
        finally:
            os.close(ready_at_server)
        try:
            self._await_ready(ready)
        except BaseException:
            self._child.end()
            raise
        finally:
            os.close(ready)

    def _await_ready(self, ready: int) -> None:
        """Wait for the line on the descriptor that --ready-fd got; its end without a line means that serve failed."""
        readable, _, _ = select.select([ready], [], [], PATIENCE)
        line = os.read(ready, 1) if readable else b""
        assert line == b"\n", self._child.describe("vhostmp serve does not get ready")

    @property
    def pid(self) -> int:
        """The control process."""
        return self._child.pid

    @property
    def log(self) -> str:
        """All it has printed."""
        return self._child.output

    def kill(self) -> None:
        """Have the control process die without a chance to tidy up."""
        self._killed = True
        self._child.kill()

    def swap(self, backend: str) -> dict[str, Any]:
        """Swap the back-end and return what ``vhostmp swap --json`` reports."""
        return self._ask("swap", backend)

    def show(self) -> dict[str, Any]:
        """Return the one device of ``vhostmp show --json``."""
        devices: list[dict[str, Any]] = self._ask("show")["devices"]
        (device,) = devices
        return device

    def ring(self, index: int) -> dict[str, Any]:
        """Return the ring `index` of `show`."""
        queues: list[dict[str, Any]] = self.show()["queues"]
        (ring,) = [queue for queue in queues if queue["index"] == index]
        return ring

    def await_rings(self, count: int) -> None:
        """Wait until `count` rings move packets.

        A front-end does not wait for that: what it sends on a ring that is not enabled yet is dropped (vhost-user,
        "Ring states").
        """
        what = f"{count} rings are started and enabled"
        self.wait_for(lambda: sum(ring["started"] and ring["enabled"] for ring in self.show()["queues"]) == count, what)

    def _ask(self, verb: str, *words: str) -> dict[str, Any]:
        """Run ``vhostmp VERB --json`` and return the object it printed."""
        command = program(verb, "--control-path", str(self._control), "--json", *words)
        try:
            printed = run(command, env=environment())
        except AssertionError as error:
            raise AssertionError(self._child.describe(str(error))) from error
        answer: dict[str, Any] = json.loads(printed)
        return answer

    def wait_for(self, condition: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
        """Wait until `condition` holds; the error when it does not shows the server's log."""
        self._child.wait_for(condition, what, timeout)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End it; when the test has not failed otherwise, check that it ended well and took its sockets with it."""
        try:
            self._child.terminate()
            status = self._child.wait()
        finally:
            self._child.end()
        if exc is None and not self._killed:
            assert status == 0, self._child.describe("vhostmp serve did not end well on SIGTERM")
            left = [path for path in self._ours if path.exists()]
            assert not left, f"vhostmp serve left {left}"
