"""A thread that keeps two patched guests as busy as they get; frames have sequence numbers and checksums, each way.

Neither guest ever polls: it sleeps on both guests' interrupts after it asked for them, and fails when none comes though
a device has something. A kick or an interrupt that gets lost between the two ends is an error, not a delay.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from tests.frames import make_frame, read_frame
from tests.helpers import PATIENCE, wait_until
from tests.integration.traffic import Tally
from tests.net_driver import Pair
from vhostmp.tools.stress.ring import DeviceError


class Cable:
    """Traffic between two pairs until `finish`; `tallies[i]` is of what pair i sends and the other one receives."""

    def __init__(
        self, ends: Sequence[Pair], *, sizes: tuple[int, ...] = (60, 61, 590, 1514), window: int | None = None
    ) -> None:
        """Start. `window`: at most this many frames are under way each way."""
        self.ends: Final = tuple(ends)
        self.tallies: Final = (Tally(), Tally())
        self.error: BaseException | None = None
        self._sizes: Final = sizes
        self._window: Final = window
        self._paused: Final = threading.Event()
        self._resume: Final = threading.Event()
        self._want_pause = False
        self._stop = False
        self._abandoned = False
        #: The ways on which what is sent need not arrive, as while an end is disabled.
        self.lossy: set[int] = set()
        self._wake: Final = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread: Final = threading.Thread(target=self._run, name="cable")
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop:
                if self._want_pause:
                    self._paused.set()
                    self._resume.wait()
                elif not self._turn(sending=True):
                    self._wait()
            while not self._abandoned and not self._done:
                if not self._turn(sending=False):
                    self._wait()
        except BaseException as error:
            self.error = error
        finally:
            self._paused.set()

    @property
    def _done(self) -> bool:
        idle = not any(pair.tx.in_flight for pair in self.ends)
        return idle and not any(tally.missing for way, tally in enumerate(self.tallies) if way not in self.lossy)

    def _turn(self, *, sending: bool) -> bool:
        moved = 0
        for pair, sent, got in zip(self.ends, self.tallies, reversed(self.tallies), strict=True):
            moved += pair.reap()
            frames = pair.receive()
            for frame in frames:
                got.take(read_frame(frame))
            moved += len(frames) + pair.post()
            while sending and (self._window is None or sent.missing < self._window):
                if not pair.send(make_frame(sent.sent, self._sizes[sent.sent % len(self._sizes)])):
                    break
                sent.sent += 1
                moved += 1
            pair.kick()
        return moved > 0

    def _wait(self) -> None:
        """Sleep until a device has something, or somebody wants something of us."""
        if any([driver.want_interrupts() for pair in self.ends for driver in (pair.rx, pair.tx)]):
            return
        poll = select.poll()
        for fd in (self._wake, *self.ends[0].calls, *self.ends[1].calls):
            poll.register(fd, select.POLLIN)
        if not poll.poll(PATIENCE * 1000):
            if any(driver.pending() for pair in self.ends for driver in (pair.rx, pair.tx)):
                raise DeviceError(f"used elements and no interrupt: {self}")
            raise AssertionError(f"nothing from the devices in {PATIENCE:g} s: {self}")
        for fd in (*self.ends[0].calls, *self.ends[1].calls):
            with suppress(BlockingIOError):
                os.eventfd_read(fd)

    def __str__(self) -> str:
        """Say where all rings stand."""
        return f"{self.tallies}; " + "; ".join(pair.describe() for pair in self.ends)

    def check(self) -> None:
        """Raise what the thread died of."""
        if self.error is not None:
            raise self.error

    def progress(self, count: int = 100, ways: Sequence[int] = (0, 1)) -> None:
        """Wait until that many more frames have arrived, each way."""
        before = [tally.received for tally in self.tallies]

        def moved() -> bool:
            self.check()
            return all(self.tallies[way].received - before[way] >= count for way in ways)

        wait_until(moved, what=f"{count} more frames; {self}")

    def progress_sent(self, count: int, way: int = 0) -> None:
        """Wait until that many more frames were sent, wherever they go."""
        before = self.tallies[way].sent

        def moved() -> bool:
            self.check()
            return self.tallies[way].sent - before >= count

        wait_until(moved, what=f"{count} more frames to be sent; {self}")

    def pause(self) -> None:
        """Have the thread stand still between two turns: whatever is under way stays under way."""
        self._paused.clear()
        self._resume.clear()
        self._want_pause = True
        os.eventfd_write(self._wake, 1)
        assert self._paused.wait(PATIENCE)
        self.check()

    def resume(self) -> None:
        """Have it go on."""
        os.eventfd_read(self._wake)
        self._want_pause = False
        self._paused.clear()
        self._resume.set()

    def abandon(self) -> None:
        """End the thread without waiting for what is under way."""
        self._abandoned = True
        self._stop = True
        os.eventfd_write(self._wake, 1)
        self._resume.set()
        self._thread.join(3 * PATIENCE)
        assert not self._thread.is_alive()

    def finish(self) -> tuple[Tally, Tally]:
        """Stop sending, wait for what is under way, and return what was counted."""
        self._stop = True
        os.eventfd_write(self._wake, 1)
        self._resume.set()
        self._thread.join(6 * PATIENCE)
        self.check()
        assert not self._thread.is_alive()
        return self.tallies

    def check_whole(self) -> None:
        """Finish, and check that every frame arrived once, in order, both ways."""
        for tally in self.finish():
            tally.check_whole()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread, however the test went."""
        if self._thread.is_alive():
            self.abandon()
        os.close(self._wake)
