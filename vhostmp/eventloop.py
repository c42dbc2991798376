"""A single-threaded event loop: callbacks for descriptors, timers, a clean end on SIGTERM and SIGINT.

Rules: callbacks run one at a time and to their end; whoever is watched must never be read from or written to in a way
that blocks. Without a timer the loop sleeps without a time limit: an idle server costs no wake-up. A signal reaches the
loop as a byte in a pipe, so it is noticed although no Python code ran in between.
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final, Protocol, Self

Callback = Callable[[], None]

END_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that end the program cleanly."""

_DRAIN_BYTES: Final = 4096


class HasFileno(Protocol):
    """Anything with a descriptor."""

    def fileno(self) -> int:
        """Return the descriptor."""
        ...


class Timer:
    """A callback that is due once, unless it is cancelled before."""

    def __init__(self, when: float, callback: Callback) -> None:
        """Due at `when` seconds of time.monotonic()."""
        self.when = when
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Never call it; harmless when it has been called."""
        self.callback = None


class EventLoop:
    """Watches descriptors and timers until `stop`."""

    def __init__(self) -> None:
        """Open the selector and the pipe that wakes it."""
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._drain)
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._stopped = False
        self.wakeups = 0
        """How often the loop has woken up, for whatever reason."""

    def watch(self, target: HasFileno, on_ready: Callback, *, write: bool = False) -> None:
        """Call `on_ready` whenever `target` can be read (or, with `write`, written); replaces an earlier watch."""
        events = selectors.EVENT_WRITE if write else selectors.EVENT_READ
        try:
            self._selector.modify(target.fileno(), events, on_ready)
        except KeyError:
            self._selector.register(target.fileno(), events, on_ready)

    def unwatch(self, target: HasFileno) -> None:
        """Stop watching `target`, which must still be open; harmless when it is not watched."""
        with suppress(KeyError):
            self._selector.unregister(target.fileno())

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Call `callback` once, in `seconds`."""
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def stop(self) -> None:
        """Make `run` return soon; may be called before it, from any thread, and from a signal handler."""
        self._stopped = True
        with suppress(BlockingIOError):  # a full pipe wakes the loop just as well
            os.write(self._wake_write, b"\0")

    def run(self) -> None:
        """Serve until `stop`. Exceptions of callbacks pass through."""
        while not self._stopped:
            self.turn(None)

    def turn(self, limit: float | None) -> bool:
        """Wait for at most `limit` seconds (None: for as long as it takes), then call what is ready or due.

        Returns: whether anything was ready.
        """
        due = self.time_limit()
        ready = self._selector.select(due if limit is None or (due is not None and due < limit) else limit)
        self.wakeups += 1
        for key, _events in ready:
            if self._stopped:
                break
            # a callback before this one may have ended the watch
            if self._selector.get_map().get(key.fd) is key:
                key.data()
        self._run_timers()
        return bool(ready)

    def time_limit(self) -> float | None:
        """Return the seconds until the next timer is due; None when there is none: then only descriptors wake us."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now and not self._stopped:
            timer = heapq.heappop(self._timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            while os.read(self._wake_read, _DRAIN_BYTES):
                pass

    @contextmanager
    def ending_on_signals(self) -> Generator[None, None, None]:
        """Let SIGTERM, SIGINT and SIGHUP stop the loop while inside; main thread only."""

        def on_signal(_number: int, _frame: FrameType | None) -> None:
            self.stop()

        old_handlers = {number: signal.signal(number, on_signal) for number in END_SIGNALS}
        old_fd = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in old_handlers.items():
                signal.signal(number, handler)

    @property
    def stopped(self) -> bool:
        """Whether `stop` has been called."""
        return self._stopped

    def close(self) -> None:
        """Close the loop's own descriptors; may be called twice."""
        if self._wake_read >= 0:
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()
