"""The models do not outlive what they are models of."""

from __future__ import annotations

import pytest

from tests.model.adopt import Adopt
from tests.model.checker import Model, exists, missing_functions, stands_for
from tests.model.order import PROGRAMS
from tests.model.swap import Swap


@pytest.mark.parametrize("model", [Swap, Adopt])
def test_every_function_exists(model: type[Model[object]]) -> None:
    """What an action stands for is defined where the model says."""
    assert missing_functions(model) == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_function_of_a_program_exists(name: str) -> None:
    """What a program on the weak memory is taken from is defined where it says."""
    assert [function for function in PROGRAMS[name]().functions if not exists(function)] == []


def test_a_missing_function_is_noticed() -> None:
    """A function that was renamed is: its model has to be looked at again."""

    class Old(Model[int]):
        """A model of what is gone."""

        @stands_for("vhostmp/flush.py:flush", "vhostmp/flush.py:swap_everything", "vhostmp/gone.py:flush")
        def act(self, state: int) -> None:
            """Nothing."""

    assert missing_functions(Old) == ["vhostmp/flush.py:swap_everything", "vhostmp/gone.py:flush"]
