"""A worker that sleeps, and finds kicks in an order of the test's: for tests that lead it through its work items."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from tests.helpers import process_state, wait_until
from vhostmp.shm import layout
from vhostmp.supervisor import Pool
from vhostmp.workers.channel import is_readable


def is_asleep(pool: Pool, kicks: Sequence[int] = ()) -> bool:
    """Whether the first worker has taken up what it was nudged for, has read these kicks, and sleeps again.

    The word in its slot alone may be of a sleep that is over, which the worker has yet to notice.
    """
    nudge = pool._pool.workers[0].nudge_fd  # pyright: ignore[reportPrivateUsage]
    unread = any(is_readable(fd) for fd in (nudge, *kicks))
    return not unread and layout.WORKER.read(pool.buf, layout.worker_offset(0), "asleep") == 1


def kick_in_order(pool: Pool, kicks: Sequence[int]) -> None:
    """Have the first worker, which sleeps, find all these kicks when it wakes up, in this order."""
    worker = pool.workers[0].pid
    os.kill(worker, signal.SIGSTOP)
    wait_until(lambda: process_state(worker) == "T", what="a worker that is stopped")
    for fd in kicks:  # epoll returns them in this order
        os.eventfd_write(fd, 1)
    os.kill(worker, signal.SIGCONT)
