"""Fixtures of the tests of workers/."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest

from tests.oracle.rig import KINDS, SIZE, MakeRig, Rig


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Iterator[MakeRig]:
    """Return a function that makes a Rig of the device side under test; see Rig for its arguments."""
    with ExitStack() as stack:

        def build(
            num: int = 8,
            *,
            features: int = 0,
            first_idx: int = 0,
            size: int = SIZE,
            more: Sequence[tuple[int, int]] = (),
        ) -> Rig:
            rig = Rig(request.param, num, features=features, first_idx=first_idx, size=size, more=more)
            return stack.enter_context(rig)

        yield build
