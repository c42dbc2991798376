"""The event loop: callbacks, timers, signals, and not one wake-up more than needed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tests.helpers import PATIENCE, wait_until
from vhostmp.eventloop import END_SIGNALS, EventLoop


class End:
    """One end of a pipe."""

    def __init__(self, fd: int) -> None:
        """Take over a descriptor."""
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    """A loop."""
    with EventLoop() as loop:
        yield loop


@pytest.fixture
def pipe() -> Iterator[tuple[End, End]]:
    """Both ends of a pipe."""
    read, write = os.pipe()
    yield End(read), End(write)
    os.close(read)
    os.close(write)


def test_readable_and_writable(loop: EventLoop, pipe: tuple[End, End]) -> None:
    """A callback is called while its descriptor is ready, the one last given, until it is unwatched."""
    read, write = pipe
    seen: list[str] = []
    loop.watch(read, lambda: seen.append("old"))
    loop.watch(read, lambda: seen.append(os.read(read.fileno(), 1).decode()))
    assert not loop.turn(0)
    os.write(write.fileno(), b"ab")
    assert loop.turn(0)
    assert loop.turn(0)
    assert not loop.turn(0)
    assert seen == ["a", "b"]
    loop.unwatch(read)
    loop.unwatch(read)
    os.write(write.fileno(), b"c")
    assert not loop.turn(0)
    loop.watch(write, lambda: seen.append("room"), write=True)
    assert loop.turn(0)
    assert seen[-1] == "room"
    loop.unwatch(write)


def test_a_callback_may_unwatch_another(loop: EventLoop, pipe: tuple[End, End]) -> None:
    """A descriptor that was ready too, but is no longer watched, is left alone."""
    read, write = pipe
    os.write(write.fileno(), b"x")
    other = End(os.dup(read.fileno()))
    seen: list[int] = []
    for mine, its in ((read, other), (other, read)):

        def callback(mine: End = mine, its: End = its) -> None:
            seen.append(mine.fileno())
            loop.unwatch(its)

        loop.watch(mine, callback)
    loop.turn(0)
    assert len(seen) == 1
    os.close(other.fileno())


def test_timers_run_in_order_and_once(loop: EventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timers run when they are due, the earlier first; a cancelled one never."""
    seen: list[str] = []
    now = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", lambda: now)  # however long this thread waits in between
        loop.call_later(0.002, lambda: seen.append("second"))
        loop.call_later(0.001, lambda: seen.append("first"))
        loop.call_later(0.0015, lambda: seen.append("never")).cancel()
        loop.call_later(0.003, loop.stop)
    loop.run()
    assert seen == ["first", "second"]


def test_idle_costs_nothing(loop: EventLoop) -> None:
    """With nothing to do the loop never wakes up: the only wake-up is the one that ends it."""
    begun = threading.Event()
    loop.call_later(3600, lambda: None).cancel()
    loop.call_later(0, begun.set)
    thread = threading.Thread(target=loop.run)
    thread.start()
    assert begun.wait(PATIENCE)
    threading.Event().wait(0.1)  # not for something to happen: for nothing to happen
    assert loop.wakeups == 1
    loop.stop()
    thread.join()
    assert loop.wakeups <= 1 + 1


def test_stop_before_run(loop: EventLoop) -> None:
    """A loop that is stopped before it runs does not run."""
    loop.stop()
    loop.run()
    assert loop.stopped


@pytest.mark.parametrize("number", END_SIGNALS)
def test_signals_end_the_loop(loop: EventLoop, number: signal.Signals) -> None:
    """A signal, even one that arrives while the loop sleeps, ends it; handlers are put back afterwards."""
    before = signal.getsignal(number)
    main = threading.get_native_id()

    def kill() -> None:
        wait_until(lambda: blocked(main))
        os.kill(os.getpid(), number)

    killer = threading.Thread(target=kill)
    with loop.ending_on_signals():
        killer.start()
        loop.run()
    killer.join()
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def blocked(thread: int) -> bool:
    """Whether a thread of this process sleeps in a system call."""
    with open(f"/proc/self/task/{thread}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"


def test_many_signals_do_not_block(loop: EventLoop) -> None:
    """More wake-ups than the pipe holds are as good as one."""
    for _ in range(100_000):
        loop.stop()
    loop.run()


def test_close_twice(loop: EventLoop) -> None:
    """Closing twice is harmless."""
    loop.close()
    loop.close()
