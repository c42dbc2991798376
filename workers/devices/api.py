"""What a device in Python looks like: a plain class; deriving from `Device` is convenient, not needed.

It runs in the worker processes, on the data thread. Each worker that serves a queue of the device has an object of its
own. A new object takes over after a swap, after the guest negotiated features, and when a worker was replaced, so that
what must survive those belongs into a file.
"""

from __future__ import annotations

from typing import Any, Protocol

from vhostmp.errors import LocalError
from vhostmp.workers.backends import python_api

#: Feature bits that are the device's own (virtio 1.3, 2.2); the others are the ring's and the transport's.
OWN_FEATURES = (1 << 24) - 1 | ((1 << 64) - (1 << 50))
CONFIG_MAX = 256
QUEUES_MAX = 256


class Request(Protocol):
    """One request: a descriptor chain (virtio 1.3, 2.7.4). It and its views are valid until `process` returns.

    The views show guest memory in place, which the guest can change at any time: copy what you decide upon.
    """

    @property
    def readable(self) -> list[memoryview]:
        """What the driver gave to be read, in pieces as it likes; read-only. None of them is empty."""
        ...

    @property
    def writable(self) -> list[memoryview]:
        """Where the device may write, in pieces as the driver likes. None of them is empty."""
        ...

    @property
    def readable_bytes(self) -> int:
        """Length of `readable`."""
        ...

    @property
    def writable_bytes(self) -> int:
        """Length of `writable`."""
        ...

    @property
    def again(self) -> bool:
        """Whether this is the first of those that the last call for this queue left over.

        What was begun for it then, by this object or another one, has this very request for its reason.
        """
        ...

    written: int
    """How many bytes were written, from the start of `writable` on: 0 until set, here or by `write`."""

    def read(self, start: int = 0, size: int = -1) -> bytes:
        """Return a copy of `size` readable bytes from `start` on; -1: all that follow. Fewer when there are fewer."""
        ...

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write after what is written already and move `written` on. Returns how many bytes there was room for."""
        ...


class Device:
    """Base of a device in Python. The attributes are read from the class, once, when the device is made."""

    device_id: int = 0
    """Type of the device (virtio 1.3, 5); for whoever attaches a guest, nothing here depends on it."""
    num_queues: int = 1
    queues_together: int = 1
    """So many queues, from a multiple of it on, are served by the same object: 2 where they come in pairs."""
    features: int = 0
    """Feature bits of the device's own: bits 0 to 23 and 50 to 63."""
    config: bytes = b""
    """Configuration space, at most 256 bytes; read-only for the driver."""

    def process(self, queue: int, requests: list[Any]) -> int | None:
        """Serve a batch of requests (`Request`), oldest first.

        Returns how many of them are finished; None: all. The rest is offered again, with what has come in between:
        after a kick, when `fileno()` is readable, and when another queue of this object has finished a request. An
        exception finishes the batch: each request goes back with the length written that it has by then.
        """
        raise NotImplementedError

    def fileno(self) -> int:
        """Return a descriptor whose readability has every queue looked at; -1: none. Edge-triggered: read all."""
        return -1

    def close(self) -> None:
        """End: another object has taken over, or the worker ends in good order. Not called when it is killed."""


def describe(reference: str) -> dict[str, Any]:
    """Return what the control process must know of the class that `reference` names.

    Raises LocalError, in one line, when there is no such class or an attribute of it makes no sense.
    """
    with python_api.load(reference, ("process",)) as found:
        return _described(reference, found)


def _described(reference: str, found: type[Any]) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for name, most in (
        ("device_id", (1 << 16) - 1),
        ("num_queues", QUEUES_MAX),
        ("queues_together", QUEUES_MAX),
        ("features", OWN_FEATURES),
    ):
        value = getattr(found, name, getattr(Device, name))
        least = 1 if "queues" in name else 0
        if not isinstance(value, int) or not least <= value <= most or (name == "features" and value & ~most):
            raise LocalError(f"device {reference!r}: {name} = {value!r} is not right")
        described[name] = value
    config = getattr(found, "config", b"")
    if not isinstance(config, bytes) or len(config) > CONFIG_MAX:
        raise LocalError(f"device {reference!r}: config is not a bytes object of at most {CONFIG_MAX} bytes")
    return {**described, "config": config.hex()}
