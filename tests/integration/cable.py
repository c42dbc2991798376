"""A thread that keeps two patched guests as busy as they get; frames have sequence numbers and checksums, each way.

Neither guest ever polls: it sleeps on both guests' interrupts after it asked for them, and fails when none comes though
a device has something. A kick or an interrupt that gets lost between the two ends is an error, not a delay.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from tests.frames import make_frame, read_frame
from tests.helpers import PATIENCE, wait_until
from tests.integration.driven import Driven
from tests.integration.traffic import Tally
from tests.net_driver import Pair
from vhostmp.tools.stress.ring import DeviceError


class Cable(Driven):
    """Traffic between two pairs until `finish`; `tallies[i]` is of what pair i sends and the other one receives."""

    def __init__(
        self, ends: Sequence[Pair], *, sizes: tuple[int, ...] = (60, 61, 590, 1514), window: int | None = None
    ) -> None:
        """Start. `window`: at most this many frames are under way each way."""
        super().__init__("cable")
        self.ends: Final = tuple(ends)
        self.tallies: Final = (Tally(), Tally())
        self._sizes: Final = sizes
        self._window: Final = window
        #: The ways on which what is sent need not arrive, as while an end is disabled.
        self.lossy: set[int] = set()
        self._begin()

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

    def _wait(self, also: Sequence[int]) -> None:
        if any([driver.want_interrupts() for pair in self.ends for driver in (pair.rx, pair.tx)]):
            return
        poll = select.poll()
        for fd in (*also, *self.ends[0].calls, *self.ends[1].calls):
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

    def finish(self) -> tuple[Tally, Tally]:
        """Stop sending, wait for what is under way, and return what was counted."""
        self._finish()
        return self.tallies

    def check_whole(self) -> None:
        """Finish, and check that every frame arrived once, in order, both ways."""
        for tally in self.finish():
            tally.check_whole()
