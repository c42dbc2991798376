"""Tries random cases until the time is up; the first one that fails is made small and told, with its seed.

Rules: a case is a list of operations that follow from its seed alone. The first case of a clause has the clause's own
seed: what fails is repeated at once by `--clause ID --seed THAT`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from vhostmp.tools.stress.clause import Context
from vhostmp.tools.stress.ring import DeviceError
from vhostmp.tools.stress.shrink import shrink
from vhostmp.tools.stress.verdict import Failure

Op = TypeVar("Op")
SHRINKING = 120.0
"""For how long a case is made smaller: with a back-end that hangs each try takes seconds."""
SHOWN = 12
"""How many operations of a case are told."""


def explore(
    ctx: Context,
    make: Callable[[random.Random], list[Op]],
    run: Callable[[Context, list[Op]], None],
    smaller: Callable[[Op], Iterable[Op]],
) -> None:
    """Try cases for `ctx.seconds`. `run` raises what a clause may raise. Failure: the smallest case, and its seed."""
    until = time.monotonic() + ctx.seconds
    seed = ctx.seed
    while True:
        case = make(random.Random(seed))
        why = _judge(ctx, run, case)
        if why is not None:
            raise Failure(_told(ctx, run, case, why, smaller), seed)
        if time.monotonic() >= until:
            return
        seed = ctx.rng.randrange(1 << 31)


def _judge(ctx: Context, run: Callable[[Context, list[Op]], None], case: list[Op]) -> str | None:
    """Run a case in a context of its own; return what is wrong."""
    try:
        with Context(ctx.target, ctx.facts, ctx.seed, packed=ctx.packed, process=ctx.process) as own:
            run(own, case)
        with Context(ctx.target, ctx.facts) as well:
            well.machine().probe()
    except (Failure, DeviceError, EOFError, ConnectionError, TimeoutError) as error:
        return str(error) or type(error).__name__
    return None


def _told(
    ctx: Context,
    run: Callable[[Context, list[Op]], None],
    case: list[Op],
    why: str,
    smaller: Callable[[Op], Iterable[Op]],
) -> str:
    """Make a case small, and return what is to be said of it."""
    text, until = why, time.monotonic() + SHRINKING

    def fails(smaller_case: list[Op]) -> bool:
        nonlocal text
        if time.monotonic() > until or not _there(ctx):
            return False  # nobody can say any more
        found = _judge(ctx, run, smaller_case)
        if found is not None:
            text = found
        return found is not None

    small = shrink(case, fails, smaller)
    listed = "; ".join(str(one) for one in small[:SHOWN]) + ("; ..." if len(small) > SHOWN else "")
    return f"{text}; smallest case ({len(small)} of {len(case)} steps): {listed}"


def _there(ctx: Context) -> bool:
    """Whether the back-end is there, or comes back within seconds."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            with Context(ctx.target, ctx.facts) as own:
                own.machine().probe()
        except (Failure, DeviceError, EOFError, OSError):
            time.sleep(0.2)
        else:
            return True
    return False
