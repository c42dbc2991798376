"""A thread that keeps a queue pair as busy as it gets, with frames that have sequence numbers and checksums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from tests.frames import make_frame, read_frame
from tests.helpers import PATIENCE, wait_until
from tests.integration.driven import Driven
from tests.net_driver import Pair


@attrs.define
class Tally:
    """What became of the frames."""

    sent: int = 0
    received: int = 0
    duplicated: int = 0
    reordered: int = 0
    highest: int = -1
    seen: bytearray = attrs.field(factory=bytearray, repr=False)

    def take(self, sequence: int) -> None:
        """Count one that arrived."""
        if sequence >= len(self.seen):
            self.seen.extend(bytes(sequence + 1 - len(self.seen) + 4096))
        if self.seen[sequence]:
            self.duplicated += 1
            return
        self.seen[sequence] = 1
        self.received += 1
        if sequence < self.highest:
            self.reordered += 1
        self.highest = max(self.highest, sequence)

    @property
    def missing(self) -> int:
        """How many were sent and have not arrived."""
        return self.sent - self.received

    def check_whole(self) -> None:
        """Check that every frame came back once, in order."""
        assert self.sent > 0
        assert (self.missing, self.duplicated, self.reordered) == (0, 0, 0), self


class Traffic(Driven):
    """A thread that sends and receives on a pair until `finish`. The pair is the thread's meanwhile."""

    def __init__(
        self, pair: Pair, *, returns: bool = True, sizes: tuple[int, ...] = (60,), window: int | None = None
    ) -> None:
        """Start.

        `returns`: what is sent is expected back; `sizes` are gone through in turn, bytes; `window`: at most this many
        frames are under way (a back-end in Python that holds frames for lack of receive buffers takes them with it).
        """
        super().__init__("traffic")
        self.pair: Final = pair
        self.returns = returns
        self.tally = Tally()
        self._sizes: Final = sizes
        self._window: Final = window
        self._begin()

    def _turn(self, *, sending: bool) -> bool:
        pair, tally = self.pair, self.tally
        moved = pair.reap()
        frames = pair.receive()
        for frame in frames:
            tally.take(read_frame(frame))
        moved += len(frames) + pair.post()
        while sending and (self._window is None or tally.missing < self._window):
            size = self._sizes[tally.sent % len(self._sizes)]
            if not pair.send(make_frame(tally.sent, size)):
                break
            tally.sent += 1
            moved += 1
        pair.kick()
        return moved > 0

    def _wait(self, also: Sequence[int]) -> None:
        self.pair.wait(also)

    @property
    def _done(self) -> bool:
        return not self.pair.tx.in_flight and not (self.returns and self.tally.missing)

    def alive(self) -> bool:
        """Raise what the thread died of; true when it did not."""
        self.check()
        return True

    def progress(self, count: int = 200, timeout: float = PATIENCE) -> None:
        """Wait until that many more frames were sent and, if they return, received."""
        before = attrs.evolve(self.tally)

        def moved() -> bool:
            self.check()
            went = self.tally.sent - before.sent >= count
            return went and (not self.returns or self.tally.received - before.received >= count)

        wait_until(moved, timeout, f"{count} more frames; {self.tally}; {self.pair.describe()}")

    def progress_sent(self, count: int) -> None:
        """Wait until that many more frames were sent, wherever they go."""
        before = self.tally.sent

        def moved() -> bool:
            self.check()
            return self.tally.sent - before >= count

        wait_until(moved, what=f"{count} more frames to be sent; {self.pair.describe()}")

    def finish(self) -> Tally:
        """Stop sending, wait for what is under way, and return what was counted."""
        self._finish()
        return self.tally
