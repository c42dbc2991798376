"""The processes that ask the clauses of `vhostmp stress`: replaced when they die, not for ever; nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import pytest

from tests import helpers
from vhostmp.errors import LocalError
from vhostmp.tools.stress import runner
from vhostmp.tools.stress.clause import CLAUSES
from vhostmp.tools.stress.clauses import load_all
from vhostmp.tools.stress.frontend import Frontend
from vhostmp.tools.stress.result import Result
from vhostmp.tools.stress.runner import Plan, Runner
from vhostmp.tools.stress.target import Facts, Listener
from vhostmp.tools.stress.verdict import Verdict

FACTS: Final = Facts(0, 0, 2, 0, echoes=False)
IDS: Final = ("queue-num", "mtu", "rarp")
BY_SIGNAL: Final = 128
Body = Callable[[Connection, Plan, Path, Listener | None], None]


def plan(path: Path, *, listen: bool = False, patience: float = 5.0) -> Plan:
    """Return a plan of a few clauses."""
    load_all()
    return Plan((path,), "net", listen, None, tuple(CLAUSES[one] for one in IDS), 1, 1.0, patience)


def verdicts(the_plan: Plan) -> list[tuple[str, Verdict]]:
    """Run a plan; return what became of its clauses."""
    return [(one.id, one.verdict) for one in Runner(the_plan).run()]


def test_a_back_end_that_takes_nobody_in(tmp_path: Path) -> None:
    """A connection is not waited for longer than a reply."""
    path = tmp_path / "s"
    waiting: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen(0)
        try:
            for _ in range(8):
                waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                waiting[-1].setblocking(False)
                waiting[-1].connect(str(path))
        except BlockingIOError:
            pass
        with pytest.raises(TimeoutError, match="nobody takes a connection"):
            Frontend.connect(path, 0.05)
        for one in waiting:
            one.close()


def test_jobs_that_die_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the asking process dies before it has heard of the back-end, that is said, and no other one is started."""

    def dies(*_: object) -> None:
        os._exit(3)

    monkeypatch.setattr(runner, "_job", dies)
    with pytest.raises(LocalError, match="ended with status 3"):
        verdicts(plan(tmp_path / "s"))


def dying(marker: Path) -> Body:
    """Return the body of a job that dies of its first clause, and again as soon as another one took its place."""

    def body(pipe: Connection, the_plan: Plan, path: Path, listener: Listener | None) -> None:
        if marker.exists():
            os._exit(1)
        pipe.send(FACTS)
        pipe.recv()
        marker.touch()
        os._exit(1)

    return body


def test_jobs_that_die_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clause that was asked has failed, the others are not asked; the run ends."""
    monkeypatch.setattr(runner, "_job", dying(tmp_path / "died"))
    assert verdicts(plan(tmp_path / "s")) == [
        (IDS[0], Verdict.FAIL),
        (IDS[1], Verdict.NOT_APPLICABLE),
        (IDS[2], Verdict.NOT_APPLICABLE),
    ]


def listening(pipe: Connection, the_plan: Plan, path: Path, listener: Listener | None) -> None:
    """Body of a job that dies of the first clause, and passes the others as long as the socket is there."""
    pipe.send(FACTS)
    while (word := pipe.recv()) is not None:
        if word == IDS[0]:
            os._exit(1)
        there = listener is not None and path.is_socket()
        pipe.send((Result.of(CLAUSES[word], Verdict.PASS if there else Verdict.FAIL), False))


def test_the_socket_outlives_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --listen the next job waits where the one before did; in the end the socket is gone."""
    path = tmp_path / "s"
    monkeypatch.setattr(runner, "_job", listening)
    assert verdicts(plan(path, listen=True)) == [
        (IDS[0], Verdict.FAIL),
        (IDS[1], Verdict.PASS),
        (IDS[2], Verdict.PASS),
    ]
    assert not path.exists()


def test_patience_stretches_a_clauses_time(tmp_path: Path) -> None:
    """A back-end that is given more time to answer is given more for a clause, and so is one that is asked longer."""
    usual, patient = (plan(tmp_path / "s", patience=seconds) for seconds in (5.0, 60.0))
    one = usual.clauses[0]
    assert patient.longest(one) > 10 * usual.longest(one)
    assert usual.longest(one) > one.seconds + usual.seconds


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM end it with no word of Python's, and leave no socket; that of a killed one is replaced."""
    path = tmp_path / "s"
    words = [sys.executable, "-m", "vhostmp", "stress", "--listen", "--socket-path", str(path), "--patience", "60"]
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
        left = path.stat().st_ctime_ns
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as child:
        try:
            helpers.wait_until(lambda: path.exists() and path.stat().st_ctime_ns != left, what="the socket")
            (os.killpg if number == signal.SIGINT else os.kill)(child.pid, number)
            _, said = child.communicate(timeout=helpers.PATIENCE)
        finally:
            child.kill()
    assert child.returncode == BY_SIGNAL + number
    assert "Traceback" not in said
    assert not path.exists()
