"""Linux's own vhost-net and ours are given the same random cases in a guest (tests/kernel), and agree.

`SEED=7 CASES=5000` in the environment for others, or more; the seed is printed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

from tests.kernel import host, plant
from tests.kernel.examples import EXAMPLES, TIMED
from tests.kernel.generate import generate
from tests.kernel.guest import Request
from tests.kernel.rules import RULES
from tests.peers import image

CASES: Final = int(os.environ.get("CASES", "2000"))
SEED: Final = os.environ.get("SEED", "12")
#: Enough to meet each of the planted bugs, whatever the seed.
CASES_TO_FIND: Final = 400
TRIES: Final = 40

pytestmark = [pytest.mark.peer, pytest.mark.slow]


@pytest.fixture(scope="session")
def built(guest_image: image.Image) -> None:
    """Skip where a guest cannot be built."""
    del guest_image


def test_every_rule_has_an_example() -> None:
    """No difference is excused that nobody has shown, and each is told of in the documentation."""
    told = Path(__file__).parents[2].joinpath("docs", "kernel-differences.md").read_text()
    assert set(EXAMPLES) ^ set(TIMED) == {rule.name for rule in RULES}
    assert [rule.name for rule in RULES if f"`{rule.name}`" not in told] == []


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("built")
def test_agrees_with_linux(tmp_path: Path) -> None:
    """Thousands of random cases: the same errors, used rings, logs, frames and signals, or a rule says why not."""
    print(f"SEED={SEED} CASES={CASES}")
    report = host.run(tmp_path, host.shares(SEED, CASES, os.cpu_count() or 1))
    print(report)
    assert report.good, str(report)
    assert report.cases == CASES


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("bug", plant.BUGS)
def test_finds_a_planted_bug(tmp_path: Path, bug: str) -> None:
    """With one line of our ring changed the two differ, and the case that shows it is made smaller."""
    request = Request(seed="planted", cases=CASES_TO_FIND, shrink=TRIES, most=1)
    report = host.run(tmp_path, [request], plant=plant.build(bug, tmp_path))
    (found,) = report.differences
    assert len(found["case"]["steps"]) < len(generate(found["seed"]).steps), str(report)
