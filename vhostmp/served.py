"""What a server needs of the devices that it serves, and of the workers behind them: tested with others than the real.

A `ServedDevice` has the verbs of a session (verbs.py) and what the control socket asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from vhostmp.verbs import DeviceVerbs


class SwapReport(Protocol):
    """What a swap of the back-end reports."""

    @property
    def generation(self) -> int:
        """Number of the configuration that is in force since."""
        ...

    @property
    def grace_us(self) -> float:
        """How long it took until no worker could use the old back-end any more, microseconds."""
        ...

    @property
    def pause_us(self) -> float:
        """Longest time in which no packet moved, microseconds."""
        ...

    @property
    def packets_crossed(self) -> int:
        """Packets that moved while the swap went on."""
        ...

    @property
    def frames_left(self) -> int:
        """Frames in the old back-end's queue that found no receive buffers and were dropped."""
        ...


class ServedDevice(DeviceVerbs, Protocol):
    """What a server needs of a device beyond the verbs of a session."""

    @property
    def backend(self) -> str:
        """Specification of the back-end."""
        ...

    def set_backend(self, spec: str, /) -> SwapReport:
        """Replace the back-end under load."""
        ...

    def attach_worker(self, group: int, worker: int, /) -> None:
        """Have a worker serve a queue pair."""
        ...

    def snapshot(self) -> Mapping[str, Any]:
        """Return the state of the device, as `vhostmp show --json` prints it."""
        ...

    def stop_all(self) -> None:
        """Forget the front-end: rings, memory, features, owner; keep the back-end."""
        ...

    def close(self) -> None:
        """End the device."""
        ...


class ServedPool(Protocol):
    """What a server needs of a pool of workers."""

    def snapshot(self) -> Mapping[str, Any]:
        """Return the state of the workers, as `vhostmp show --json` prints it."""
        ...

    def new_worker(self) -> int:
        """Start a worker and return its id."""
        ...

    def free_worker(self, index: int, /) -> None:
        """End a worker that serves nothing."""
        ...

    def changed(self) -> None:
        """Have what is recorded of the workers written once more."""
        ...

    def close(self) -> None:
        """End every worker."""
        ...


MakeDevice: TypeAlias = Callable[[int], ServedDevice]
