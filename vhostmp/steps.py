"""Changes that take two generations: a queue pair moves to another worker; an old back-end is drained.

**One consumer.** A ring belongs to one worker at a time: who serves it keeps its indices, and two that served it at
once would both take the same chains. One published generation cannot move a ring. `publish` is one store, but workers
load it when they begin a work item: the new worker may begin one, and take the ring up, while the old one is still
inside its last work item of the generation before, which takes chains from the same ring.

So a move is two flushes (flush.py):

1. N -> N+1: the pair is *held*: assigned to the new worker, served by nobody. The new worker prepares all that it will
   need (memory, back-end port, descriptors), so a refusal comes now, when nothing has changed yet.
2. N+1 -> N+2: the new worker serves it.

Why no two serve it. A worker serves the pair in a work item only when the generation that it loads inside the item's
read-side section says so: N or before for the old worker, N+2 for the new one; and so it is with a ring that is
disabled, on which a worker finishes what a death has left half done. Let a be an item of the old worker that loaded N,
and b one of the new worker that loaded N+2. N+2 is stored after step 1's synchronize() has returned. That
waits for every section which was open when N+1 had become visible (R1, R2 in shm/ORDERING.md); a section that begins
later loads N+1 or more. So a's section has ended before N+2 was stored, and b loads N+2 after it was stored: a before
b. What a wrote of the ring and its slot is visible to b: section_exit (release) -> synchronize (acquire, R3 and R4) ->
publish N+2 (release) -> load of the generation (acquire, G1 and G2). If the old worker died instead, the pidfd proves
that nothing of it runs any more, and the journal in the slot says where the ring stands (J1, J2).

What b starts from. The pair's rings get a new start id with N+2, as if they were started anew, so the new worker reads
the indices from the slots. That holds for a worker that served the pair before, too, and has slept through all
generations in between: it would otherwise go on with the indices of that time.

Kicks. The kick eventfd is one, held by both workers while step 1 lasts. Only who serves a ring reads it. A kick that
comes while nobody does makes both look, to no effect, and is not lost: a ring is scanned once unasked when a worker
takes it up. Interrupts: taking up forgets what was signalled, so the next batch signals.

Frames. What the old worker's back-end port had taken from its descriptor and could not deliver yet (it keeps one frame
that found too few buffers) comes back with step 1's retire, and goes to the new port in step 2.

When step 1 times out, the new worker must not begin. The pair goes back to the old worker, which needs no proof that it
has left: it is the one consumer either way. When step 2 is refused (by a want of memory, for everything else was made
ready), it goes back as well. In both cases the verb raises and what was in force before is in force again.

**Draining.** Frames wait in a tap's or packet socket's queue. A swap away from it publishes first a generation in which
transmit rings have the new back-end and receive rings still the old one; when the old queue is empty, or after
DRAIN_SECONDS, the second one gives receive rings the new back-end too. Only then is the old one closed; what is left
in it, because the guest has no receive buffers, is dropped and counted. Frames for the new back-end wait in its queue
meanwhile; those of the old come first. Both are served by the same worker, one handler after the other: there is no
question of two consumers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import attrs

from vhostmp.errors import SynchronizeTimeout, VhostError
from vhostmp.flush import FlushResult
from vhostmp.parts import BackendPart, DeviceState

log = logging.getLogger(__name__)

#: How long a swap waits for the old back-end's queue to empty, seconds: a queue of 1,000 frames takes one or two
#: milliseconds, unless the guest has no buffers.
DRAIN_SECONDS: Final = 0.05
_LOOK_SECONDS: Final = 0.0002
#: Frames left in a queue that are counted: more than a queue holds, so that a busy network does not keep us counting.
COUNTED_MAX: Final = 4096
_FRONT_BYTES: Final = 64  # enough for any header, so that a tap gives the frame up; the rest of it is cut off


class Steppable(Protocol):
    """What the steps need of a device."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def state(self) -> DeviceState:
        """The state in force."""
        ...

    def put(self, new: DeviceState, *, measure: bool = False) -> FlushResult:
        """Put a state in force as it stands."""
        ...

    def next_start(self) -> int:
        """Return a start id that no ring had before."""
        ...


def move(device: Steppable, group: int, worker: int) -> None:
    """Move a group of rings to another worker. Raises what `put` raises; the group then is where it was.

    Or, after a SynchronizeTimeout of the second step, where it was to go. After one of the first step the old worker is
    still inside a work item: nothing more can be published before it has left that, so nobody serves the group until
    then; the pool, which looks now and then, or the next verb, which waits for it first, has the group served again.
    """
    before = device.state.workers[group]
    if not running(device.state, group):
        device.put(served(device.state, group, worker, device.next_start()))
        return
    try:
        device.put(held(device.state, group, worker))
        device.put(served(device.state, group, worker, device.next_start()))
    except BaseException as error:
        # After a timeout the stuck worker would be waited for once more, with every other verb waiting behind.
        if group in device.state.held and not isinstance(error, SynchronizeTimeout):
            with contextlib.suppress(VhostError):
                device.put(served(device.state, group, before, device.next_start()))
        if group in device.state.held:
            log.error("device %s: nobody serves group %d of rings until worker %d lets go", device.name, group, before)
        raise


def replace_backend(
    device: Steppable,
    part: BackendPart,
    groups: Sequence[int],
    settle: Callable[[], object],
    waiting: Callable[[], bool],
) -> FlushResult:
    """Put another back-end in force; the old one's queues of `groups` are emptied first, where that can be done.

    `settle` and `waiting`: see `wait_until_drained`. Raises what `put` raises: the caller looks at which back-end is in
    force.
    """
    old = device.state.backend
    new = attrs.evolve(device.state, backend=part)
    if not groups:
        return device.put(new, measure=True)
    first = device.put(attrs.evolve(new, draining=old), measure=True)
    wait_until_drained([old.fds[group] for group in groups], settle, waiting)
    second = device.put(attrs.evolve(device.state, draining=None))
    return attrs.evolve(second, grace_us=first.grace_us + second.grace_us, pause_us=first.pause_us)


def held(state: DeviceState, group: int, worker: int) -> DeviceState:
    """Return the first half of a move: `group` is `worker`'s, and nobody serves it."""
    workers = list(state.workers)
    workers[group] = worker
    return attrs.evolve(state, workers=tuple(workers), held=state.held | {group})


def served(state: DeviceState, group: int, worker: int, start_id: int) -> DeviceState:
    """Return the second half: `worker` serves `group`, from where the rings' slots say that they stand."""
    workers = list(state.workers)
    workers[group] = worker
    new = attrs.evolve(state, workers=tuple(workers), held=state.held - {group})
    for index in state.rings_of(group):
        if new.rings[index].started:
            new = new.with_ring(index, start_id=start_id)
    return new


def running(state: DeviceState, group: int) -> bool:
    """Whether a ring of a group is started: then a move takes two steps."""
    return any(ring.started for ring in (state.rings[index] for index in state.rings_of(group)))


def wait_until_drained(fds: Sequence[int], settle: Callable[[], object], waiting: Callable[[], bool]) -> None:
    """Wait until no descriptor has a frame and no port keeps one, at most DRAIN_SECONDS.

    `settle` waits until every work item that runs has ended: whoever took the last frame has then delivered it, or says
    so in what `waiting` looks at.
    """
    deadline = time.monotonic() + DRAIN_SECONDS
    while time.monotonic() < deadline:
        if not any_readable(fds):
            settle()
            if not waiting() and not any_readable(fds):
                return
        time.sleep(_LOOK_SECONDS)


def any_readable(fds: Sequence[int]) -> bool:
    """Whether a descriptor has something to read."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def discard(fds: Sequence[int]) -> int:
    """Take what is left in the queues of a back-end that no worker uses any more. Returns how many frames."""
    count = 0
    for fd in fds:
        with contextlib.suppress(OSError):
            for _ in range(COUNTED_MAX):
                os.read(fd, _FRONT_BYTES)
                count += 1
    return count
