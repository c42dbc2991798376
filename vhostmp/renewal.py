"""Workers that import a module of a user's: each is replaced by a new process, while what it serves goes on elsewhere.

A worker imports the modules of back-ends in Python before it gives up its rights (workers/sandbox); one that runs can
open nothing any more, and import nothing. So a reference that is new, or of which a file has changed since, takes new
processes. First a *spare* worker is started, which imports: a mistake in the module shows there, and nothing has
changed. Then each worker's groups of rings move to the spare, a new process takes the worker's slot, and they move
back: moves lose, repeat and reorder nothing (steps.py).

Locks: the pool's lock is held around every call.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Collection
from typing import Any, Final, Protocol

import attrs

from vhostmp.errors import LocalError, VhostError, WorkerDied
from vhostmp.workers.channel import Message
from vhostmp.workers.imported import are_current
from vhostmp.workers.pool import WorkerPool
from vhostmp.workers.processes import WorkerProcess

log = logging.getLogger(__name__)


class Movable(Protocol):
    """What is needed of a device."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def placement(self) -> tuple[int, ...]:
        """The worker that each group of rings is attached to."""
        ...

    @property
    def modules(self) -> set[str]:
        """References of the classes that its back-ends are made from."""
        ...

    def attach_worker(self, group: int, worker: int, /) -> None:
        """Have a worker serve a group of rings."""
        ...


def ask(worker: WorkerProcess, question: Message, reference: str) -> Message:
    """Have a worker answer something of a class. LocalError: a refusal, or the worker died of it."""
    try:
        worker.ask(question)
        return worker.answer()
    except WorkerDied as error:
        raise LocalError(f"{error}, while it imported {reference!r}") from error


@attrs.frozen
class Imported:
    """What all workers have imported, and what was answered about it by one that served nobody yet.

    Those that serve may be dead, or a guest's.
    """

    files: Any  # each with its stamp (workers/imported.py)
    answers: dict[str, tuple[Message, Message]]  # by reference: a question and its answer

    def answer(self, pool: WorkerPool, question: Message) -> Message | None:
        """Return the answer to a question; None: it is not known, or files are not what they were."""
        asked, answer = self.answers.get(question["reference"], (None, None))
        current = asked == question and question["reference"] in pool.modules and are_current(self.files)
        return answer if current else None


NOTHING: Final = Imported(None, {})


def renew_for(pool: WorkerPool, devices: Collection[Movable], question: Message, known: Imported) -> Imported:
    """Make all workers processes that have imported what the question's reference names; the answer is in the result.

    What `known` has of other references that are in use is asked again.

    LocalError, in one line, when it cannot be imported or the question is refused, and when a worker cannot be renewed
    now; what is served goes on in any case.
    """
    before, reference = pool.modules, question["reference"]
    pool.modules = sorted({reference}.union(*(device.modules for device in devices)))
    pool.renounce_spare()
    try:
        spare = pool.add()
    except LocalError as error:
        pool.modules = before
        raise LocalError(f"{error}: free one, importing {reference!r} takes a worker more", errno.ENOSPC) from error
    except BaseException:
        pool.modules = before
        raise
    try:
        try:
            answer = ask(spare, question, reference)
        except BaseException:
            pool.modules = before
            raise
        answers = {reference: (question, answer)}
        for other, (asked, _) in known.answers.items():
            if other in pool.modules and other not in answers:
                with contextlib.suppress(VhostError):
                    answers[other] = asked, ask(spare, asked, other)
        for index in sorted(pool.workers.keys() - {spare.index}):
            _renew(pool, devices, index, spare.index)
    finally:
        if any(spare.index in device.placement for device in devices):
            log.error("worker %d stays: not everything that it serves could be moved back", spare.index)
        else:
            pool.remove(spare.index)
    return Imported(answer.get("files"), answers)  # a file that has changed since is not what it was


def _renew(pool: WorkerPool, devices: Collection[Movable], index: int, spare: int) -> None:
    """Put a new process in the place of worker `index`; `spare` serves its groups meanwhile."""
    moved: list[tuple[Movable, int]] = []
    try:
        for device in devices:
            for group in [group for group, serves in enumerate(device.placement) if serves == index]:
                device.attach_worker(group, spare)
                moved.append((device, group))
        pool.renew(index)
    except BaseException:
        for device, group in moved:
            if index in pool.workers:
                with contextlib.suppress(VhostError):
                    device.attach_worker(group, index)
        raise
    for device, group in moved:
        device.attach_worker(group, index)
