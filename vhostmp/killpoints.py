"""Places where a test has the control process killed: `VHOSTMP_KILL_AT=name:number`, the number-th time it is there.

Costs nothing that could be measured, and is nothing that a guest or a front-end could reach: who sets our environment
can end us anyway.
"""

from __future__ import annotations

import os
import signal
from typing import Final

VARIABLE: Final = "VHOSTMP_KILL_AT"

_name, _, _number = os.environ.get(VARIABLE, "").partition(":")
_left = [int(_number) if _number.isdigit() else 1]


def reach(name: str) -> None:
    """Take note that a place is reached."""
    if name == _name:
        _left[0] -= 1
        if not _left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
