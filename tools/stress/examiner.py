"""Asks one clause after the other of one socket, and after each whether the back-end is still well.

The liveness oracle, after every clause, whatever its verdict:

1. the back-end's process is there, and it is the same one; unless the clause may kill, so are those that it started;
2. a new connection can be made, goes through its handshake, and ordinary requests come back right;
3. once that connection is closed too, no more descriptors are open than when the run began.

1 and 3 need `--pid`. Without it the process that listens is known by SO_PEERCRED, as far as the kernel says. Where
other jobs ask the same back-end meanwhile, only that it is there and the same one is looked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from vhostmp.tools.stress.clause import CLAUSES, Clause, Context
from vhostmp.tools.stress.consts import Feature
from vhostmp.tools.stress.result import Result
from vhostmp.tools.stress.ring import DeviceError
from vhostmp.tools.stress.target import Facts, Target, doubting, peer_pid
from vhostmp.tools.stress.verdict import Failure, NotApplicable, Verdict
from vhostmp.tools.stress.watch import Process

LETTING_GO: Final = 3.0
"""How long a back-end may take to close what it was given, after the connection has ended, seconds."""
REPLACED: Final = 4
"""How many descriptors more a process that was replaced may cost, once."""
STEADY: Final = 0.2
"""For how long the number of descriptors has to be the same before it is what is compared with, seconds."""
RETURN: Final = 15.0
"""How long one that ended may take to be there again, seconds."""


class Examiner:
    """Asks clauses of one back-end."""

    def __init__(self, target: Target, process: Process | None, seconds: float, *, alone: bool = True) -> None:
        """Learn what the back-end offers. `seconds`: how long each random clause goes on. Raises: Failure.

        `alone`: nobody else asks it meanwhile.
        """
        self.target: Final = target
        self._there: Final = process
        self.process: Final = process if alone else None
        self.seconds: Final = seconds
        self.facts: Final[Facts] = target.learn()
        with doubting(target.device):
            self._well()  # what is opened once and kept is open now
        self._descriptors = steady(self._count)
        self._family = set(self.process.family()) if self.process else set[int]()
        self._listener_pid = self._peer_pid()

    def ask(self, clause: Clause, seed: int) -> Result:
        """Ask a clause."""
        began = time.monotonic()
        verdict, detail = Verdict.PASS, ""
        try:
            if self.target.device not in clause.devices:
                raise NotApplicable(f"is asked of {', '.join(clause.devices)}")
            with Context(
                self.target, self.facts, seed, packed=clause.packed, seconds=self.seconds, process=self.process
            ) as context:
                if clause.packed:
                    context.need(Feature.RING_PACKED)
                clause.ask(context)
        except NotApplicable as why:
            verdict, detail = Verdict.NOT_APPLICABLE, str(why)
        except (Failure, DeviceError) as why:
            verdict, detail = Verdict.FAIL, str(why)
            if isinstance(why, Failure) and why.seed is not None:
                seed = why.seed
        except (EOFError, ConnectionError, TimeoutError) as why:
            verdict, detail = Verdict.FAIL, f"the connection: {why or type(why).__name__}"
        except Exception as why:  # an answer that nobody thought of
            verdict, detail = Verdict.FAIL, f"unforeseen {type(why).__name__}: {why}"
        if verdict is not Verdict.NOT_APPLICABLE:
            try:
                self._oracle(clause)
            except (Failure, DeviceError, EOFError, OSError) as why:
                detail = f"{detail}; " if verdict is Verdict.FAIL else ""
                verdict, detail = Verdict.FAIL, f"{detail}afterwards: {why or type(why).__name__}"
        return Result.of(clause, verdict, detail, seed=seed, seconds=time.monotonic() - began)

    def gone(self) -> bool:
        """Whether the back-end cannot be reached any more, and does not come back. One that does is taken as it is."""
        until = time.monotonic() + RETURN
        while True:
            try:
                self._listener_pid = self._peer_pid()
            except Failure:
                if time.monotonic() > until:
                    return True
                time.sleep(0.2)
            else:
                return False

    def _oracle(self, clause: Clause) -> None:
        if self._there and not self._there.alive():
            raise Failure(f"process {self._there.pid} has ended")
        if self.process:
            ended = self._renew_family(self.process)
            if ended and not clause.may_kill:
                raise Failure(f"a process that the back-end had started has ended: {sorted(ended)}")
        self._well()
        if self.process and clause.may_kill:
            process = self.process
            steady(lambda: hash(tuple(process.family())))  # one that dies late is gone by then
            self._renew_family(process)
        pid = self._peer_pid()
        if pid != self._listener_pid:
            before, self._listener_pid = self._listener_pid, pid
            raise Failure(f"process {pid} listens, it was {before}")
        if self.process:
            self._let_go()

    def _renew_family(self, process: Process) -> set[int]:
        """Return who has ended since the last time. Who came instead may have opened something more."""
        family = set(process.family())
        ended, self._family = self._family - family, family
        self._descriptors += REPLACED * len(ended)
        return ended

    def _let_go(self) -> None:
        until = time.monotonic() + LETTING_GO
        while (now := self._count()) > self._descriptors:
            if time.monotonic() > until:
                before, self._descriptors = self._descriptors, now
                raise Failure(f"{now - before} descriptors more are open than before ({now})")
            time.sleep(0.01)

    def _count(self) -> int:
        return sum(self.process.descriptors().values()) if self.process else 0

    def _well(self) -> None:
        with Context(self.target, self.facts) as context:
            context.machine().probe()

    def _peer_pid(self) -> int:
        """The process that listens, or that connected to us; 0 when nobody can say."""
        link = self.target.connect()
        try:
            return peer_pid(link)
        finally:
            link.close()


def steady(count: Callable[[], int], limit: float = LETTING_GO) -> int:
    """Count until it has been the same for STEADY seconds: a back-end that has just started may still be at it.

    Or for as long as `limit` says, in seconds, and then return the last count.
    """
    found, since = count(), time.monotonic()
    until = since + limit
    while since + STEADY > time.monotonic() and time.monotonic() < until:
        time.sleep(0.01)
        if (now := count()) != found:
            found, since = now, time.monotonic()
    return found


def asked(profiles: Sequence[str], ids: Sequence[str]) -> list[Clause]:
    """Return the clauses of these profiles, or those that are named. A name without its format means all formats.

    KeyError for a name that no clause has.
    """
    if not ids:
        return [one for one in CLAUSES.values() if one.profile in profiles]
    found: dict[str, Clause] = {}
    for wanted in ids:
        named = {key: one for key, one in CLAUSES.items() if key == wanted or key.rpartition(".")[0] == wanted}
        if not named:
            raise KeyError(wanted)
        found |= named
    return list(found.values())
