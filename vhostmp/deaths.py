"""What follows from the death of a worker: whether a ring is to blame, and when the next one may start.

Theory of operation. A worker that dies is replaced at once. What it died of may lie in the work itself: a page of guest
memory that is gone, a frame that a back-end in Python cannot stand. Then its replacement dies too, and the next. Its
slot names the ring in whose work item it died, and a ring that has had its share of deaths (`RestartLimit`) is to be
marked broken; the other rings of the worker go on.

What counts against a ring: every death by the worker's own doing (a fault, an abort), and any other, a SIGKILL say,
when the ring got nothing done since the death before it. Whoever kills workers from outside, however often, disturbs no
ring. An operator's kill cannot be told from the out-of-memory killer's; but it can be told what the ring got done.

A worker that dies before it has run one work item, again and again, is nobody's fault here: it is started again only
after a while.

Pure bookkeeping: no clock, no process, no lock. The supervisor (supervisor.py) tells it what happened and does what
follows.
"""

from __future__ import annotations

import os
import signal
from typing import Final, Self

import attrs

from vhostmp.errors import LocalError

#: A worker that ends this soon after its start, seconds, without a work item, so often in a row, is started again only
#: after a while.
EARLY_DEATH: Final = 0.05
EARLY_DEATHS_MAX: Final = 5
RESTART_DELAY: Final = 1.0


@attrs.frozen
class RestartLimit:
    """How many workers a ring may cost: `deaths` within `seconds`. With 0 deaths there is no limit."""

    deaths: int = 5
    seconds: float = 10.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `N/SECONDS`, or 0 for none. Raises: LocalError: it is neither."""
        deaths, slash, seconds = text.partition("/")
        try:
            limit = cls(int(deaths), float(seconds if slash else 0))
        except ValueError:
            limit = cls(-1)
        good = limit.deaths > 0 and 0 < limit.seconds < float("inf") if slash else limit.deaths == 0
        if not good:
            raise LocalError(f"{text!r} is no restart limit: write deaths and seconds as 5/10, or 0 for none")
        return limit


@attrs.frozen
class _Death:
    at: float
    own_doing: bool
    spent: float


@attrs.define
class _Record:
    progress: int = -1
    deaths: list[_Death] = attrs.field(factory=list[_Death])


class Deaths:
    """The record of deaths, by ring and by worker. Times are CLOCK_MONOTONIC, seconds."""

    def __init__(self, limit: RestartLimit) -> None:
        """Begin with a clean slate."""
        self._limit: Final = limit
        self._rings: dict[int, _Record] = {}
        self._started: dict[int, tuple[float, int]] = {}
        self._early: dict[int, int] = {}

    def started(self, worker: int, now: float, items: int) -> None:
        """A worker was started in slot `worker`, where `items` work items have been run so far."""
        self._started[worker] = (now, items)

    def new(self, worker: int) -> None:
        """The slot has another life: nothing is held against it."""
        self._early.pop(worker, None)

    def delay(self, worker: int, now: float, items: int) -> float:
        """Say how long to wait before the worker in this slot, which has died just now, is replaced. Seconds."""
        started, before = self._started.get(worker, (now, -1))
        early = now - started < EARLY_DEATH and items == before
        self._early[worker] = self._early.get(worker, 0) + 1 if early else 0
        return RESTART_DELAY if self._early[worker] >= EARLY_DEATHS_MAX else 0.0

    def blame(self, ring: int, now: float, progress: int, *, own_doing: bool, spent: float = 0.0) -> bool:
        """Enter a death in a work item of ring slot `ring`; whether it was one too many.

        `progress` is any number that changes when the ring gets something done. `spent`: for how long the worker had
        been standing still, seconds, which does not count as time in which it could have died.
        """
        if not self._limit.deaths:
            return False
        record = self._rings.setdefault(ring, _Record())
        if record.progress != progress:
            record.deaths = [death for death in record.deaths if death.own_doing]
        record.progress = progress
        record.deaths.append(_Death(now, own_doing, spent))
        idle = 0.0
        kept: list[_Death] = []
        for death in reversed(record.deaths):
            if now - death.at - idle > self._limit.seconds:
                break
            idle += death.spent
            kept.append(death)
        record.deaths = kept[::-1]
        return len(kept) >= self._limit.deaths

    def forgive(self, ring: int) -> None:
        """Forget what a ring has cost: it is started anew, or it is another one."""
        self._rings.pop(ring, None)


def how(status: int | None) -> str:
    """Say how a process ended, for the end of a sentence: its wait status, None when that is not known."""
    if status is None:
        return ""
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) == signal.SIGSYS:
            return " of SIGSYS: it made a system call that its sandbox forbids"
        return f" of {signal.Signals(os.WTERMSIG(status)).name}"
    return f" with exit status {os.waitstatus_to_exitcode(status)}"
