"""What runs in the guest: cases on both sides, one after the other; what came of them goes out as lines of JSON.

    python -m tests.kernel.guest REQUEST

REQUEST is a file, or a block device, with JSON, `Request.dump`. The lines:

    {"progress": 25}                                    so many cases done
    {"difference": {"seed", "case", "step", "field", "kernel", "ours"}}     a case that no rule explains, made small
    {"example": {"rule", "case"}}                       an example that does not need its rule any more
    {"done": {"cases", "steps", "compared", "rules"}}   the end; `rules` counts the cases that each explained
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import attrs

from tests.kernel.arena import Arena
from tests.kernel.case import Case
from tests.kernel.compare import Verdict, judge
from tests.kernel.examples import AGREED, EXAMPLES
from tests.kernel.generate import generate
from tests.kernel.linux import Kernel
from tests.kernel.ours import Ours
from tests.kernel.play import play
from tests.kernel.rules import Difference
from tests.kernel.shrink import TRIES, shrink
from tests.kernel.verbs import Side
from vhostmp.supervisor import Pool

PROGRESS: Final = 25
DIFFERENCES_MOST: Final = 3
TEXT_MOST: Final = 80


@attrs.frozen
class Request:
    """Which cases: every `every`th of `cases` of `seed`, from `first` on; or those given. `examples` too, or not.

    `shrink`: how often to try to make one that differs smaller. `most`: so many of them are enough.
    """

    seed: str
    cases: int = 0
    first: int = 0
    every: int = 1
    given: list[dict[str, Any]] = attrs.field(factory=list[dict[str, Any]])
    examples: bool = False
    shrink: int = TRIES
    most: int = DIFFERENCES_MOST

    def dump(self) -> str:
        """Return it as JSON."""
        return json.dumps(attrs.asdict(self))

    def __iter__(self) -> Iterator[Case]:
        """Make the cases."""
        yield from (Case.load(dumped) for dumped in self.given)
        yield from (generate(f"{self.seed}/{number}") for number in range(self.first, self.cases, self.every))


class Oracle:
    """Both sides."""

    def __init__(self, pool: Pool) -> None:
        """Make them."""
        self._arena: Final = Arena()
        self._sides: Final[tuple[Side, Side]] = (Kernel(self._arena, "kernel0"), Ours(self._arena, pool, "ours0"))
        for side in self._sides:
            side.forget()

    def judge(self, case: Case) -> Verdict:
        """Run a case on both sides."""
        kernel, ours = (play(case, side, self._arena) for side in self._sides)
        return judge(case, kernel, ours)

    def differs(self, case: Case, field: str) -> int | None:
        """Return the step at which a case differs in a field, first of all, and no rule explains it."""
        difference = self.judge(case).unexplained
        return None if difference is None or difference.field != field else difference.index


def _tell(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def _short(value: object) -> object:
    """Cut what is too long to be read."""
    if isinstance(value, str) and len(value) > TEXT_MOST:
        return f"{value[:TEXT_MOST]}... {len(value)} characters"
    if isinstance(value, list):
        return [_short(item) for item in cast("list[object]", value)]
    return value


def _describe(difference: Difference) -> dict[str, Any]:
    """Return a difference for people."""
    kernel, ours = difference.kernel, difference.ours
    if isinstance(kernel, bytes) and isinstance(ours, bytes):
        differing = [at for at in range(min(len(kernel), len(ours))) if kernel[at] != ours[at]]
        start = differing[0] & ~15
        where = f"{len(differing)} bytes, from {start:#x} on: "
        kernel, ours = (where + side[start : start + 64].hex() for side in (kernel, ours))
    return {
        "step": f"{difference.index}: {_short(str(difference.step))}",
        "field": difference.field,
        "kernel": _short(kernel),
        "ours": _short(ours),
    }


def _examples(oracle: Oracle) -> None:
    """Check that each example needs its rule, and that what is agreed on is."""
    for rule, cases in (*EXAMPLES.items(), ("", AGREED)):
        for case in cases:
            verdict = oracle.judge(case)
            if verdict.unexplained is not None:
                _tell(difference={"seed": case.seed, "case": case.dump(), **_describe(verdict.unexplained)})
            elif rule and rule not in verdict.rules:
                _tell(example={"rule": rule, "case": case.dump()})


def _random(oracle: Oracle, request: Request) -> None:
    """Run the cases, and make those that differ small."""
    rules: Counter[str] = Counter()
    cases = steps = compared = differing = 0
    for case in request:
        verdict = oracle.judge(case)
        rules.update(verdict.rules)
        cases += 1
        steps += len(case.steps)
        compared += verdict.compared
        if verdict.unexplained is not None:
            differing += 1
            small = shrink(case, partial(oracle.differs, field=verdict.unexplained.field), request.shrink)
            again = oracle.judge(small).unexplained or verdict.unexplained
            _tell(difference={"seed": case.seed, "case": small.dump(), **_describe(again)})
        if cases % PROGRESS == 0:
            _tell(progress=cases)
        if differing == request.most:
            break
    _tell(done={"cases": cases, "steps": steps, "compared": compared, "rules": dict(rules)})


def main(arguments: list[str]) -> None:
    """Do what the request says."""
    logging.disable()  # broken rings are what cases are about
    asked: Mapping[str, Any] = json.loads(Path(arguments[0]).read_bytes())
    request = Request(**asked)
    with Pool() as pool:
        oracle = Oracle(pool)
        if request.examples:
            _examples(oracle)
        _random(oracle, request)


if __name__ == "__main__":
    main(sys.argv[1:])
