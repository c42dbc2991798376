"""What the examiner counts before it asks anything."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

from vhostmp.tools.stress.examiner import steady
from vhostmp.tools.stress.watch import Process


def test_counts_until_it_is_steady() -> None:
    """A back-end that opens something while it is counted has it in the count that later ones are compared with."""
    early, late = 5, 6
    script = itertools.chain([early] * 8, itertools.repeat(late))
    assert steady(lambda: next(script)) == late


def test_does_not_wait_for_ever() -> None:
    """What changes all the time is counted too."""
    script = itertools.count()
    assert steady(lambda: next(script), limit=0.3) == next(script) - 1


def test_who_has_ended_is_not_of_the_family() -> None:
    """A process that has ended is gone, whether its parent has waited for it or not."""
    family = Process.of(os.getpid()).family
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in family()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert child.pid not in family()
