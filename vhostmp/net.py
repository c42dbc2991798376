"""The virtio-net device: which features it offers, over the generic Device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vhostmp.backends import OFFLOADS
from vhostmp.consts import mask
from vhostmp.device import Device
from vhostmp.errors import LocalError

if TYPE_CHECKING:
    from vhostmp.supervisor import Pool

MRG_RXBUF, MQ, INDIRECT_DESC, EVENT_IDX, VERSION_1, IN_ORDER = 15, 22, 28, 29, 32, 35
BASE_FEATURES: Final = mask((MRG_RXBUF, INDIRECT_DESC, EVENT_IDX, VERSION_1, IN_ORDER))
QUEUE_PAIRS_MAX: Final = 128
MTU_MIN: Final = 68
MTU_MAX: Final = 65535


class NetDevice(Device):
    """A network device with `queue_pairs` pairs of a receive (even) and a transmit (odd) ring (virtio 1.3, 5.1.2)."""

    def __init__(
        self,
        pool: Pool,
        *,
        queue_pairs: int = 1,
        backend: str = "null",
        name: str = "0",
        offloads: bool | None = None,
    ) -> None:
        """Open the back-end and register with the pool.

        `offloads`: offer checksum and segmentation offloads: True, False, or None for "when the back-end carries them".
        What is offered stays the same for the device's life, so it decides to what one can swap: a tap or a packet
        socket carries them, null and loopback carry whatever there is, a back-end in Python carries none.

        Raises LocalError or SysError in one line that says what to do; nothing is left then.
        """
        if not 1 <= queue_pairs <= QUEUE_PAIRS_MAX:
            raise LocalError(f"{queue_pairs} queue pairs: choose 1 to {QUEUE_PAIRS_MAX}")
        features = BASE_FEATURES | (1 << MQ if queue_pairs > 1 else 0)
        super().__init__(pool, num_queues=2 * queue_pairs, backend=backend, name=name, offered=features)
        carried = self._setup.offloads
        if offloads and not carried:
            self.close()
            raise LocalError(f"back-end {backend} carries no offloads: serve with --offloads off or auto")
        if offloads is not False:
            self._offered |= carried & OFFLOADS

    def set_mtu(self, mtu: int) -> None:
        """Take the MTU that the guest was given (68 to 65,535 bytes). The back-end's own link decides what fits."""
        if not MTU_MIN <= mtu <= MTU_MAX:
            raise LocalError(f"an MTU has {MTU_MIN} to {MTU_MAX} bytes, not {mtu}")
