"""The entropy device: virtio 1.3, 5.4. Back-ends: `urandom` (the kernel's generator), `file:PATH` (say /dev/hwrng)."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final

from vhostmp.errors import LocalError, SysError
from vhostmp.kept_device import KeptDevice
from vhostmp.requests import RequestDevice, RequestSetup, requests_of

if TYPE_CHECKING:
    from vhostmp.supervisor import Pool

REFERENCE: Final = "vhostmp.workers.devices.rng:Rng"


class RngDevice(RequestDevice):
    """One queue of buffers to be filled with random bytes; no features, no configuration space."""

    device_class = "rng"

    def __init__(
        self, pool: Pool, *, backend: str = "urandom", name: str = "0", kept: KeptDevice | None = None
    ) -> None:
        """Open the source and register with the pool. LocalError or SysError in one line; nothing is left then.

        `kept`: go on with the device that was found.
        """
        setup = self._open(backend) if kept is None else requests_of(kept)
        super().__init__(pool, setup=setup, name=name, num_queues=1, features=0, kept=kept)

    def _open(self, spec: str) -> RequestSetup:
        kind, _, path = spec.partition(":")
        if spec == "urandom":
            return RequestSetup(spec, REFERENCE)
        if kind != "file" or not path:
            raise LocalError(f"no source of random bytes {spec!r}: use urandom or file:PATH, such as file:/dev/hwrng")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except FileNotFoundError as error:
            raise SysError(f"{spec}: there is no {path}: use urandom or another device", error.errno) from error
        except OSError as error:
            raise SysError.wrap(spec, error) from error
        if not stat.S_ISCHR(os.fstat(fd).st_mode):
            os.close(fd)
            raise LocalError(f"{spec}: not a character device, such as /dev/hwrng: it would come to its end")
        return RequestSetup(spec, REFERENCE, [fd])
