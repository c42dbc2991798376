"""Cases come from their seeds alone, go through JSON unchanged, and shrink to what matters."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import attrs
import pytest

from tests.kernel.case import DATA, FAR_DATA, RX, TX, Case, Step
from tests.kernel.compare import judge
from tests.kernel.examples import PLANS, SETTLE, add, sent, started
from tests.kernel.generate import generate
from tests.kernel.play import Seen
from tests.kernel.rules import RULES
from tests.kernel.shrink import shrink

SEEDS = [f"unit/{number}" for number in range(60)]


def test_a_seed_makes_one_case() -> None:
    """The same seed makes the same case, another one another; JSON brings it back as it was."""
    cases = [generate(seed) for seed in SEEDS]
    assert cases == [generate(seed) for seed in SEEDS]
    assert len({str(case.steps) for case in cases}) == len(cases)
    assert [Case.load(json.loads(json.dumps(case.dump()))) for case in cases] == cases


def test_cases_are_of_every_kind() -> None:
    """Every verb and every kind of traffic turns up."""
    names = Counter(step.name for seed in SEEDS for step in generate(seed).steps)
    missing = {"add", "frames", "suppress", "settle", "start", "stop", "reset_owner", "get_vring_base"} - set(names)
    assert not missing
    assert any(
        "bad" in chain for seed in SEEDS for step in generate(seed).steps if step.name == "add" for chain in step.value
    )


@pytest.mark.parametrize(("ring", "key"), [(RX, "i"), (TX, "o")])
def test_no_buffers_overlap(ring: int, key: str) -> None:
    """Each byte of buffer memory belongs to one chain of a case: else what is in it would depend on the order."""
    for seed in SEEDS:
        chains = [
            chain for step in generate(seed).steps if (step.name, step.ring) == ("add", ring) for chain in step.value
        ]
        placed = sorted((gpa, length) for chain in chains for gpa, length in chain[key] if length)
        assert all(gpa in DATA[ring] or gpa in FAR_DATA[ring] for gpa, _ in placed)
        assert all(gpa + length <= following for (gpa, length), (following, _) in itertools.pairwise(placed))


def test_shrinks_to_what_matters() -> None:
    """All that a difference does not need goes: steps, chains, and the form of a chain."""
    bad = sent(frame=77)
    steps = [
        *started(),
        *(add(TX, sent(), sent()) for _ in range(5)),
        SETTLE,
        add(TX, sent(), bad, sent()),
        SETTLE,
        SETTLE,
    ]
    tries: list[Case] = []

    def differs(case: Case) -> int | None:
        tries.append(case)
        for index, step in enumerate(case.steps):
            if (
                step.name == "add"
                and bad in step.value
                and any(before.name == "start" for before in case.steps[:index])
            ):
                return index
        return None

    small = shrink(Case(PLANS, 0, tuple(steps)), differs)
    assert [step.name for step in small.steps] == ["start", "add"]
    assert small.steps[1].value == [bad]
    assert len(tries) <= 150  # noqa: PLR2004 - what `shrink` promises


def test_a_difference_is_told() -> None:
    """What no rule explains is reported, with step and field; what a rule that ends a case explains hides the rest."""
    case = Case(PLANS, 0, (Step("set_owner"), Step("start", TX), Step("get_vring_base", TX)))
    kernel = [Seen({"error": None}), Seen({"error": None}), Seen({"error": None, "result": 3})]
    same = judge(case, kernel, kernel)
    assert (same.unexplained, same.rules, same.compared) == (None, (), 3)
    other = attrs.evolve(kernel[2], what={"error": None, "result": 4})
    found = judge(case, kernel, [*kernel[:2], other]).unexplained
    assert found is not None
    assert (found.index, found.field, found.kernel, found.ours) == (2, "result", 3, 4)
    explained = judge(case, kernel, [kernel[0], Seen({"error": "EINVAL"}), other])
    assert (explained.unexplained, explained.rules, explained.compared) == (None, ("start-without-num",), 2)


def test_rules_have_names_of_their_own() -> None:
    """No two rules have the same name."""
    assert len({rule.name for rule in RULES}) == len(RULES)
