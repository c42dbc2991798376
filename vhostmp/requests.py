"""Devices whose requests are served in Python, control side: over the generic Device, for any class of device.

Rules: the class that serves the requests is never imported here: a worker does that, and says what the class says of
itself. Whatever needs a name or a permission is opened here, and workers get descriptors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import attrs

from vhostmp.consts import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_VERSION_1,
    mask,
)
from vhostmp.device import Device
from vhostmp.errors import LocalError
from vhostmp.kept_device import KeptDevice
from vhostmp.parts import BackendPart, new_id
from vhostmp.shm.records import Plain
from vhostmp.workers.channel import close_all

if TYPE_CHECKING:
    from vhostmp.supervisor import Pool

RING_FEATURES: Final = mask(
    (VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1, VIRTIO_F_RING_PACKED, VIRTIO_F_IN_ORDER)
)
QUEUES_MAX: Final = 256
CONFIG_MAX: Final = 256


@attrs.define(eq=False)
class RequestSetup:
    """What serves requests: the class that `reference` names, made from `fds` (owned) and the arguments for a guest.

    `reopened`: see BackendPart.
    """

    spec: str
    reference: str
    fds: list[int] = attrs.field(factory=list[int])
    arguments: Callable[[int], Mapping[str, Any]] = lambda features: {}
    id: int = attrs.field(factory=new_id)
    reopened: ClassVar[frozenset[int]] = frozenset()

    def part(self, features: int) -> BackendPart:
        """Return the part from which workers make an object of the class, for a guest that acked `features`."""
        options = {"reference": self.reference, "arguments": dict(self.arguments(features))}
        return BackendPart(
            setup=self,
            kind="requests",
            options=options,
            fds=tuple(self.fds),
            borrowed=True,
            shared=True,
            reopened=self.reopened,
        )

    def close(self) -> None:
        """Close its descriptors."""
        close_all(self.fds)
        self.fds = []


class RequestDevice(Device):
    """A device of some class whose queues hold requests; base of those that come with us."""

    def __init__(
        self,
        pool: Pool,
        *,
        setup: RequestSetup,
        name: str,
        num_queues: int,
        features: int,
        queues_together: int = 1,
        kept: KeptDevice | None = None,
    ) -> None:
        """Take `setup` over and register with the pool; `features` are those of the class of device alone."""
        if not 1 <= num_queues <= QUEUES_MAX:
            setup.close()
            raise LocalError(f"{num_queues} queues: choose 1 to {QUEUES_MAX}")
        super().__init__(
            pool,
            num_queues=num_queues,
            setup=setup,
            name=name,
            offered=RING_FEATURES | features,
            group_size=queues_together,
            kept=kept,
        )


class PythonDevice(RequestDevice):
    """A device of a class that a user wrote: `python:MODULE:CLASS` or `python:FILE.py:CLASS` (workers/devices/api.py).

    A swap takes another such class that offers the same.
    """

    device_class = "python"

    def __init__(self, pool: Pool, *, backend: str, name: str = "0", kept: KeptDevice | None = None) -> None:
        """Have a worker look at the class, and register with the pool; or go on with the device that was found.

        Raises LocalError in one line that says what is wrong; nothing is left then.
        """
        reference = _reference(backend)
        self._described: Final = pool.describe_device(reference) if kept is None else kept.own["described"]
        super().__init__(
            pool,
            setup=RequestSetup(backend, reference) if kept is None else requests_of(kept),
            name=name,
            num_queues=self._described["num_queues"],
            features=self._described["features"],
            queues_together=self._described["queues_together"],
            kept=kept,
        )
        self.config = bytes.fromhex(self._described["config"]) or None

    def _own_record(self) -> Plain:
        return {"described": self._described}

    def _open(self, spec: str) -> RequestSetup:
        reference = _reference(spec)
        described = self._pool.describe_device(reference)
        if changed := [name for name, value in described.items() if value != self._described[name]]:
            raise LocalError(f"{spec} is another device than {self.backend}: {' '.join(changed)} differ")
        return RequestSetup(spec, reference)


def requests_of(kept: KeptDevice) -> RequestSetup:
    """Return the back-end of a device that was found."""
    assert isinstance(kept.setup, RequestSetup)
    return kept.setup


def _reference(spec: str) -> str:
    """Return MODULE:CLASS or /path/to/FILE.py:CLASS of a specification."""
    kind, _, reference = spec.partition(":")
    where, _, name = reference.rpartition(":")
    if kind != "python" or not where or not name:
        raise LocalError(f"no device {spec!r}: use python:MODULE:CLASS or python:FILE.py:CLASS")
    return f"{os.path.abspath(where) if where.endswith('.py') else where}:{name}"
