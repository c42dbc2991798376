"""What a process of ours says of itself to the kernel: its name, and that it is to end with its parent."""

from __future__ import annotations

import os
import signal

from vhostmp.workers.sandbox import kernel


def set_name(name: str) -> None:
    """Name this process as ps and top show it (at most 15 bytes)."""
    kernel.prctl(kernel.PR_SET_NAME, name.encode()[:15])


def die_with(parent: int) -> None:
    """Have this process killed when its parent, which is process `parent`, ends; end at once if it has already."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
