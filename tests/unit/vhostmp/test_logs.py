"""Log lines: one each, levelled as the journal wants them, never a flood."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostmp import logs, systemd

log = logging.getLogger("vhostmp.test")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What was logged."""
    stream = io.StringIO()
    with logs.writing_to(stream):
        yield stream


def test_one_line(stream: io.StringIO) -> None:
    """A record is one line with its level, even one with line breaks or a traceback in it."""
    log.info("hello\nworld")
    log.debug("not shown")
    try:
        raise ZeroDivisionError("oops")
    except ZeroDivisionError:
        log.exception("failed")
    first, second = stream.getvalue().splitlines()
    assert first == "vhostmp: info: hello | world"
    assert second.startswith("vhostmp: error: failed | Traceback")
    assert second.endswith("ZeroDivisionError: oops")


def test_it_ends(stream: io.StringIO) -> None:
    """Afterwards handlers, level and all are as before."""
    root = logging.getLogger("vhostmp")
    before = (list(root.handlers), root.level, logging.raiseExceptions)
    other = io.StringIO()
    with logs.writing_to(other, "debug"):
        log.debug("x")
    log.debug("y")
    assert other.getvalue() == "vhostmp: debug: x\n"
    assert (list(root.handlers), root.level, logging.raiseExceptions) == before


def test_a_flood_is_cut(stream: io.StringIO) -> None:
    """Of one kind of message only the first few pass, whatever their values; other kinds are not concerned."""
    for number in range(1000):
        log.warning("bad thing %d", number)
    log.warning("another thing")
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "vhostmp: warning: another thing"
    assert lines[:-1] == [f"vhostmp: warning: bad thing {number}" for number in range(logs.BURST)]


def test_debugging_is_not_cut() -> None:
    """Debug lines pass, however many there are."""
    stream = io.StringIO()
    with logs.writing_to(stream, "debug"):
        for number in range(1000):
            log.debug("detail %d", number)
    assert stream.getvalue().splitlines()[-1] == "vhostmp: debug: detail 999"
    assert stream.getvalue().count("\n") == len(range(1000))


def test_a_flood_is_counted(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line after a silence says how many were not written."""
    now = 100.0
    monkeypatch.setattr("vhostmp.logs.time.monotonic", lambda: now)
    for _ in range(logs.BURST + 7):
        log.warning("bad")
    now += logs.WINDOW_SECONDS
    log.warning("bad")
    log.warning("bad")
    assert stream.getvalue().splitlines()[logs.BURST :] == [
        "vhostmp: warning: bad (and 7 more like it in 5 s)",
        "vhostmp: warning: bad",
    ]


def test_one_line_for_all_workers(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a back-end in Python raises in each worker alike is one line, and the next one says how many there were."""
    now = 100.0
    monkeypatch.setattr("vhostmp.logs.time.monotonic", lambda: now)
    for _ in range(4):
        logging.getLogger("vhostmp.backend").error("device 0: Flaky: transmit: KeyError: 3")
    now += logs.WINDOW_SECONDS
    logging.getLogger("vhostmp.backend").error("device 0: Flaky: transmit: KeyError: 3")
    assert stream.getvalue().splitlines() == [
        "vhostmp: error: device 0: Flaky: transmit: KeyError: 3",
        "vhostmp: error: device 0: Flaky: transmit: KeyError: 3 (and 3 more like it in 5 s)",
    ]


def test_journal_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the journal reads the stream, lines begin with their priority."""
    path = tmp_path / "log"
    with path.open("w") as file:
        status = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert systemd.writes_to_journal(file.fileno())
        with logs.writing_to(file, "debug"):
            for write in (log.debug, log.info, log.warning, log.error, log.critical):
                write("x")
    assert path.read_text().splitlines() == [f"<{level}>vhostmp: x" for level in (7, 6, 4, 3, 2)]


@pytest.mark.parametrize("value", ["", "1", "x:y", "1:2:3", "1:1"])
def test_no_journal(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything but this very stream in JOURNAL_STREAM means that the journal does not read it."""
    monkeypatch.setenv("JOURNAL_STREAM", value)
    assert not systemd.writes_to_journal(0)
    assert not systemd.writes_to_journal(-1)
