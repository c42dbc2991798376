"""Kicks, calls and errors as messages (vu "In-band notifications"): eventfds of our own between messages and workers.

Rules: workers know eventfds alone. What comes as VRING_KICK is written to the ring's kick eventfd; what a worker writes
to the call or err eventfd goes out on the back-end's channel, as a signal: one of a kind is under way, so a front-end
that reads slowly is told late, not often. A descriptor that the front-end has set is preferred, as the specification
wants it; setting none asks for polling, and nothing is sent.

All methods: the event loop's thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from vhostmp.consts import BackendRequest
from vhostmp.eventloop import EventLoop
from vhostmp.parts import new_id
from vhostmp.shm.records import Plain

CALL: Final = BackendRequest.VRING_CALL
ERR: Final = BackendRequest.VRING_ERR


class Event:
    """An eventfd that is closed with its object. `id`: a number that no other one has."""

    def __init__(self, found: tuple[int, int] | None = None) -> None:
        """Open it; or take over one that was found: number and descriptor."""
        self.id, self._fd = found or (new_id(), os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def write(self) -> None:
        """Signal it; a counter that is full is signalled already."""
        with suppress(BlockingIOError):
            os.eventfd_write(self._fd, 1)

    def read(self) -> None:
        """Take the signal back."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        """Close it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class InBand:
    """The eventfds of one session's rings."""

    def __init__(self, loop: EventLoop, tell: Callable[[BackendRequest, int], None]) -> None:
        """Begin without any. `tell` is called with VRING_CALL or VRING_ERR and a ring."""
        self._loop = loop
        self._tell = tell
        self._kicks: dict[int, Event] = {}
        self._watched: dict[tuple[BackendRequest, int], Event] = {}
        self._chosen: set[tuple[BackendRequest, int]] = set()

    def kick(self, index: int) -> int:
        """Signal the ring's kick eventfd, which is made if there is none, and return it."""
        event = self._kicks.get(index)
        if event is None:
            event = self._kicks[index] = Event()
        event.write()
        return event.fileno()

    def is_kicked(self, index: int) -> bool:
        """Whether a ring is kicked by message."""
        return index in self._kicks

    def kick_chosen(self, index: int) -> None:
        """Take note that the front-end has chosen how a ring is kicked: by its own descriptor, or that it be polled."""
        if (event := self._kicks.pop(index, None)) is not None:
            event.close()

    def watched(self, kind: BackendRequest, index: int) -> int | None:
        """Return the eventfd, watched from now on, to be made a ring's call or err; None: nothing is to be done."""
        key = (kind, index)
        if key in self._chosen or key in self._watched:
            return None
        event = Event()
        self._watch(key, event)
        return event.fileno()

    def _watch(self, key: tuple[BackendRequest, int], event: Event) -> None:
        kind, index = key
        self._watched[key] = event

        def ready() -> None:
            event.read()
            self._tell(kind, index)

        self._loop.watch(event, ready)

    def describe(self, fds: dict[str, int]) -> Plain:
        """Return everything as plain data, and add the descriptors that it names."""
        events = [*self._kicks.values(), *self._watched.values()]
        fds.update({f"event.{event.id}": event.fileno() for event in events})
        return {
            "kicks": [(index, event.id) for index, event in self._kicks.items()],
            "watched": [(kind.value, index, event.id) for (kind, index), event in self._watched.items()],
            "chosen": [(kind.value, index) for kind, index in self._chosen],
        }

    def go_on(self, plain: Plain, take: Callable[[str], int]) -> None:
        """Take over what `describe` returned. A signal may have been read and not passed on: each is raised again."""
        for index, number in plain["kicks"]:
            self._kicks[index] = Event((number, take(f"event.{number}")))
            self._kicks[index].write()
        for kind, index, number in plain["watched"]:
            event = Event((number, take(f"event.{number}")))
            self._watch((BackendRequest(kind), index), event)
            if kind == CALL.value:
                event.write()
        self._chosen = {(BackendRequest(kind), index) for kind, index in plain["chosen"]}

    def forget(self, kind: BackendRequest, index: int) -> None:
        """Close an eventfd that could not be made a ring's call or err."""
        self.chosen(kind, index)
        self._chosen.discard((kind, index))

    def chosen(self, kind: BackendRequest, index: int) -> None:
        """Take note that the front-end has set a ring's call or err itself."""
        self._chosen.add((kind, index))
        if (event := self._watched.pop((kind, index), None)) is not None:
            self._loop.unwatch(event)
            event.close()

    def close(self) -> None:
        """Close all eventfds and forget what was chosen; it may be used again."""
        for event in self._watched.values():
            self._loop.unwatch(event)
        for event in [*self._watched.values(), *self._kicks.values()]:
            event.close()
        self._watched.clear()
        self._kicks.clear()
        self._chosen.clear()
