"""How `vhostmp stress` finds the back-end: one that is just starting, one that is another's, one of another class."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Never

import pytest

from tests.flawed.running import flawed
from vhostmp.cli import main
from vhostmp.errors import LocalError
from vhostmp.tools.stress.link import Link
from vhostmp.tools.stress.target import Target
from vhostmp.tools.stress.watch import Process

UNUSABLE = 2


@contextmanager
def child() -> Generator[subprocess.Popen[bytes]]:
    """Lend a process that does nothing until it is let go."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process


def test_waits_for_a_back_end_that_is_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a socket that is not there yet nor one on which nobody listens yet is an error; the listener is told."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        steps: list[Callable[[], None]] = [server.listen, lambda: server.bind(str(path))]

        def step(_seconds: float) -> None:
            steps.pop()()

        monkeypatch.setattr(time, "sleep", step)
        assert Target(path, "net").check() == os.getpid()
    assert not steps


def test_does_not_wait_for_long(tmp_path: Path) -> None:
    """After its patience it says what is the matter: no socket, or nobody who listens on it."""
    path = tmp_path / "s"
    with pytest.raises(LocalError, match=r"there is no socket .*: start the back-end first"):
        Target(path, "net", patience=0.05).check()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        with pytest.raises(LocalError, match=r"nobody listens on .*: start the back-end first"):
            Target(path, "net", patience=0.05).check()


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that this user may not use is no back-end that does not run, and is not waited for."""

    def connect(*_: object) -> Never:
        raise PermissionError(13, "Permission denied")

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(tmp_path / "s"))
        monkeypatch.setattr(Link, "connect", connect)
        with pytest.raises(LocalError, match=r"no permission to use .*: run as its owner"):
            Target(tmp_path / "s", "net", patience=3600).check()


def test_whose_a_socket_may_be() -> None:
    """A process serves what it listens on, and what was handed down to it by an ancestor or by one that has ended."""
    own = Process.of(os.getpid())
    with child() as other:
        assert own.may_serve(own.pid)
        assert own.may_serve(0)
        assert own.may_serve(os.getppid())
        assert Process.of(other.pid).may_serve(own.pid)
        assert not own.may_serve(other.pid)
    assert own.may_serve(other.pid)


def test_the_wrong_process_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--pid` of somebody else is said at once, with the right one: else what they do would be held against it."""
    path = tmp_path / "s"
    with flawed(path) as backend:
        words = ["--socket-path", str(path), "--pid", str(os.getpid()), "--clause", "mtu"]
        assert main(["stress", *words]) == UNUSABLE
        said = capsys.readouterr().err
        assert f"process {os.getpid()} does not serve {path}, process {backend.pid} does: give that --pid" in said
        words[3] = str(backend.pid)
        assert main(["stress", *words]) == 0


@pytest.mark.slow
def test_the_wrong_class_is_asked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the first request of a class is not served, the one line asks whether that is its class."""
    path = tmp_path / "s"
    with flawed(path):
        words = ["--socket-path", str(path), "--device", "blk", "--patience", "0.5", "--clause", "mtu"]
        assert main(["stress", *words]) == UNUSABLE
    assert "is its class of device blk? (--device)" in capsys.readouterr().err
