"""QEMU's monitor: one command after the other, as JSON lines on a UNIX socket.

Rules: a command that QEMU refuses is an AssertionError with QEMU's words; events are passed over.
Source: QEMU docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.helpers import wait_until
from tests.peers.processes import PATIENCE

TRICKLE = 4 << 20
"""Bytes a second at which a guest's memory goes when it should take its time."""


class Monitor(AbstractContextManager["Monitor"]):
    """A connection to the monitor of a QEMU that was started with ``-qmp unix:PATH,server=on,wait=off``."""

    def __init__(self, path: Path) -> None:
        """Connect and agree on the protocol."""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(PATIENCE)
            self._socket.connect(str(path))
            self._lines = self._socket.makefile("r")
            greeting = json.loads(self._lines.readline())
            assert "QMP" in greeting, greeting
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def execute(self, command: str, **arguments: Any) -> Any:
        """Carry out a command; `arguments` have the names of QEMU, with _ for -."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": words}).encode() + b"\n")
        while True:
            line = self._lines.readline()
            assert line, f"QEMU hung up instead of answering {command}"
            answer = json.loads(line)
            assert "error" not in answer, f"{command}: {answer['error']}"
            if "return" in answer:
                return answer["return"]

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()


def migrate(source: Monitor, target: Monitor, uri: str) -> Mapping[str, Any]:
    """Move a guest while it runs, to a QEMU that waits at `uri`; return what the source says of it.

    The target has been started with ``-S``: the guest has arrived there and stands still.
    """
    source.execute("migrate", uri=uri)
    state: dict[str, Any] = {}

    def ended() -> bool:
        state.update(source.execute("query-migrate"))
        return state.get("status") in ("completed", "failed", "cancelled")

    wait_until(ended, PATIENCE, "the migration to end")
    assert state["status"] == "completed", state
    wait_until(lambda: target.execute("query-status")["status"] == "paused", PATIENCE, "the guest to arrive")
    return state


def migrate_postcopy(
    source: Monitor, target: Monitor, uri: str, meanwhile: Sequence[Callable[[], None]]
) -> Mapping[str, Any]:
    """Move a guest that goes on at the target at once, with its memory to follow; return what the source says of it.

    `meanwhile` are called when the guest goes on; until they return hardly any memory follows but what is asked for.
    """
    for monitor in (source, target):
        monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}])
    source.execute("migrate-set-parameters", max_bandwidth=TRICKLE, max_postcopy_bandwidth=TRICKLE)
    source.execute("migrate", uri=uri)
    state: dict[str, Any] = {}

    def reached(*wanted: str) -> bool:
        state.update(source.execute("query-migrate"))
        assert state.get("status") not in ("failed", "cancelled"), state
        return state.get("status") in wanted

    wait_until(lambda: reached("active"), PATIENCE, "the migration to begin")
    source.execute("migrate-start-postcopy")
    wait_until(lambda: reached("postcopy-active"), PATIENCE, "the guest to move")
    wait_until(lambda: target.execute("query-status")["status"] == "running", PATIENCE, "the guest to go on")
    for step in meanwhile:
        step()
    source.execute("migrate-set-parameters", max_postcopy_bandwidth=0)  # no limit
    wait_until(lambda: reached("completed"), PATIENCE, "its memory to follow")
    return state
