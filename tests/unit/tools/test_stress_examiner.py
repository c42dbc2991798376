"""What the examiner counts before it asks anything."""

from __future__ import annotations

import itertools

from vhostmp.tools.stress.examiner import steady


def test_counts_until_it_is_steady() -> None:
    """A back-end that opens something while it is counted has it in the count that later ones are compared with."""
    early, late = 5, 6
    script = itertools.chain([early] * 8, itertools.repeat(late))
    assert steady(lambda: next(script)) == late


def test_does_not_wait_for_ever() -> None:
    """What changes all the time is counted too."""
    script = itertools.count()
    assert steady(lambda: next(script), limit=0.3) == next(script) - 1
