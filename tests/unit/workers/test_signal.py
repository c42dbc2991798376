"""Eventfds of a front-end's are signalled, whatever it does to them, and nobody sleeps in one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vhostmp.workers._signal import begin, signal

FULL = 0xFFFFFFFFFFFFFFFE  # an eventfd with this counter takes no more: eventfd(2)


@pytest.fixture
def event() -> Iterator[int]:
    """An eventfd that has its writer sleep when it is full."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def test_each_signal_counts(event: int) -> None:
    """The counter grows by one each time, however many there are."""
    for _ in range(1000):
        signal(event)
    assert os.eventfd_read(event) == len(range(1000))


def test_a_full_counter(event: int) -> None:
    """A counter that is full gets what there is room for, from the kernel itself, and nobody sleeps.

    So nothing was looked at before: a front-end that filled it in between would be too late as well.
    """
    if not begin():
        pytest.skip("this kernel, or a sandbox, has no io_setup")
    os.eventfd_write(event, FULL)
    for _ in range(3):
        signal(event)
    assert os.eventfd_read(event) == FULL + 1


def test_what_is_no_eventfd() -> None:
    """A pipe gets nothing; a number that is no descriptor is no error."""
    read, write = os.pipe2(os.O_NONBLOCK)
    signal(1 << 20)
    signal(write)
    os.close(write)
    os.close(read)


def test_a_child_signals_too(event: int) -> None:
    """After a fork the child signals as its parent does."""
    signal(event)
    if (pid := os.fork()) == 0:
        signal(event)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert os.eventfd_read(event) == len("12")
