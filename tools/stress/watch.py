"""The back-end's processes, watched through /proc: is it still the same one, does it keep what it should let go?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import attrs

from vhostmp.errors import LocalError


@attrs.frozen
class Process:
    """A process and those that it started, as /proc shows them."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Self:
        """Find it. LocalError when there is no such process, or its descriptors cannot be seen."""
        try:
            os.listdir(f"/proc/{pid}/fd")
            return cls(pid, _started(pid))
        except (FileNotFoundError, ProcessLookupError):
            raise LocalError(f"there is no process {pid}: give the back-end's --pid") from None
        except PermissionError:
            raise LocalError(f"cannot look into process {pid}: run as its user, or without --pid") from None

    def alive(self) -> bool:
        """Whether it is there, and the same."""
        try:
            return _started(self.pid) == self.started
        except OSError:
            return False

    def may_serve(self, listener: int) -> bool:
        """Whether a socket is this process's: it listens itself, or was handed what `listener` listened on.

        That one has ended, or is its ancestor, or is a process of another container, 0.
        """
        if not listener or _ended(listener):
            return True
        pid = self.pid
        try:
            while pid not in (listener, 0):
                pid = int(_stat(pid)[1])
        except OSError:
            return True  # nobody can say any more
        return pid == listener

    def family(self) -> list[int]:
        """Return its pid and those of its descendants; not of those that have ended, and nobody has waited for yet."""
        found = [self.pid]
        for pid in found:
            try:
                for task in os.listdir(f"/proc/{pid}/task"):
                    found += [int(word) for word in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
            except OSError:
                continue
        return [pid for pid in found if pid == self.pid or not _ended(pid)]

    def descriptors(self) -> dict[int, int]:
        """Return how many descriptors each process of the family has open."""
        counts: dict[int, int] = {}
        for pid in self.family():
            try:
                counts[pid] = len(os.listdir(f"/proc/{pid}/fd"))
            except OSError:
                continue
        return counts

    def resident(self) -> int:
        """Return the memory of the family's own, bytes: anonymous pages, without the guest's, which are shared."""
        total = 0
        for pid in self.family():
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))
        return total


def _started(pid: int) -> str:
    """When a process was started, in ticks since boot: with the pid, who it is (proc(5))."""
    return _stat(pid)[19]


def _ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie."""
    try:
        return _stat(pid)[0] in "ZX"
    except OSError:
        return True


def _stat(pid: int) -> list[str]:
    """Return what /proc says of a process, from its state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
