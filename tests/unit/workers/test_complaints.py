"""What is logged of back-ends in Python that fail: once, and then how often."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from vhostmp.workers.backends import python_api
from vhostmp.workers.backends.complaints import AGAIN_SECONDS, KINDS_MAX, Complaints


class Flaky:
    """Fails in several ways."""

    def divide(self) -> None:
        """Raise one thing."""
        _ = 1 // 0

    def look_up(self) -> None:
        """Raise another."""
        _ = dict[int, int]()[3]

    def open(self) -> None:
        """Raise what the kernel says within a sandbox."""
        raise PermissionError(1, "Operation not permitted")

    def refuse(self) -> None:
        """Raise the same, not from the kernel."""
        raise PermissionError("not you")

    def load(self) -> None:
        """Import what is not there."""
        importlib.import_module("nothing_of_that_name")


class Nameless(type):
    """A class whose name cannot be looked at."""

    def __getattribute__(cls, name: str) -> Any:
        """Return anything else."""
        if name == "__qualname__":
            raise KeyboardInterrupt
        return super().__getattribute__(name)


class Lost(metaclass=Nameless):
    """One of those."""


def fail(complaints: Complaints, method: Callable[[], None]) -> None:
    """Have it fail, and complain."""
    try:
        method()
    except BaseException:
        complaints.failed("transmit")


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what was logged since it was called last."""

    def take() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return take


def test_each_exception_once(messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception is logged when it first comes; when it goes on, after a while, with how often it came."""
    now = 100.0
    monkeypatch.setattr("vhostmp.workers.backends.complaints.time.monotonic", lambda: now)
    flaky = Flaky()
    complaints = Complaints(flaky, "0")
    for _ in range(1000):
        fail(complaints, flaky.divide)
        fail(complaints, flaky.look_up)
        complaints.warn("keeps a view")
    zero = "device 0: Flaky: transmit: ZeroDivisionError: integer division or modulo by zero"
    assert messages() == [zero, "device 0: Flaky: transmit: KeyError: 3", "device 0: Flaky keeps a view"]
    now += AGAIN_SECONDS
    fail(complaints, flaky.divide)
    assert messages() == [f"{zero} (1000 times in 60 s)"]


def test_the_first_has_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """Who wrote the class is shown the line that failed."""
    flaky = Flaky()
    fail(Complaints(flaky, "0"), flaky.divide)
    assert "_ = 1 // 0" in caplog.text
    assert caplog.records[0].levelno == logging.ERROR


def test_what_is_made_up_is_bounded(messages: Callable[[], list[str]]) -> None:
    """A back-end that makes up classes of exceptions does not fill the log, nor the memory."""
    complaints = Complaints(Flaky(), "0")

    def invent(number: int) -> NoReturn:
        raise type(f"Number{number}", (Exception,), {})

    for number in range(10 * KINDS_MAX):
        fail(complaints, lambda number=number: invent(number))  # type: ignore[misc]
    assert len(messages()) == KINDS_MAX + 1


def test_who_has_no_name_ends_nobody(messages: Callable[[], list[str]]) -> None:
    """Whatever is wrong with a class, complaining of it raises nothing."""
    complaints = Complaints(Lost(), "0")
    fail(complaints, Flaky().divide)
    complaints.warn("keeps a view")
    assert messages() == []


@pytest.mark.parametrize(
    ("method", "hints", "sandboxed"),
    [
        ("open", True, True),
        ("load", True, True),
        ("refuse", False, True),
        ("divide", False, True),
        ("open", False, False),
        ("load", False, False),
    ],
)
def test_sandbox_hint(
    method: str, hints: bool, sandboxed: bool, messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the sandbox forbids is told with what to do about it, in the same line; nothing else is."""
    monkeypatch.setattr(python_api, "_preloaded", {"flaky": python_api} if sandboxed else {})
    flaky = Flaky()
    fail(Complaints(flaky, "0"), getattr(flaky, method))
    (line,) = messages()
    assert line.endswith(" (sandbox: open or import it at the top of the module, or --sandbox off)") is hints


def test_no_hint_of_what_comes_with_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk that comes with us opens nothing: what its file refuses is none of the sandbox's doing."""
    monkeypatch.setattr(python_api, "_preloaded", {"flaky": python_api})
    monkeypatch.setattr(Flaky, "__module__", "vhostmp.workers.devices.blk")
    assert python_api.sandbox_hint(Flaky(), PermissionError(1, "Operation not permitted")) == ""
