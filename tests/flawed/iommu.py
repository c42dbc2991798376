"""`vhostmp` with a flaw planted in its IOTLB: `python -m tests.flawed.iommu FLAW serve ...`.

The small back-end of this folder has no IOMMU; these flaws are in the control process of ours, which is where entries
come and go.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

from vhostmp.backchannel import BackendChannel
from vhostmp.cli import main
from vhostmp.iotlb import DeviceIotlb
from vhostmp.protocol.payloads import Iotlb


def _plant(owner: type, name: str, flaw: Callable[..., object]) -> None:
    setattr(owner, name, flaw)


def _kept() -> None:
    def invalidate(_self: DeviceIotlb, _iova: int, _size: int) -> None:
        return

    _plant(DeviceIotlb, "invalidate", invalidate)


def _wider() -> None:
    update = DeviceIotlb.update

    def wide(self: DeviceIotlb, iova: int, size: int, uva: int, _access: int) -> None:
        update(self, iova, size, uva, 3)

    _plant(DeviceIotlb, "update", wide)


def _unheard() -> None:
    def nudge(_self: DeviceIotlb, _rings: Iterable[int]) -> None:
        return

    _plant(DeviceIotlb, "_nudge", nudge)


def _waits() -> None:
    def flush(channel: Any) -> None:
        while channel._output:
            channel._sock.sendall(channel._output.popleft().data)

    _plant(BackendChannel, "_flush", flush)


def _padded() -> None:
    size = Iotlb.STRUCT.size

    def unpack(data: bytes) -> Iotlb:
        return Iotlb(*Iotlb.STRUCT.unpack(data[:size].ljust(size, b"\0")))

    _plant(Iotlb, "unpack", unpack)


def _hoards() -> None:
    update, hoard = DeviceIotlb.update, list[bytes]()

    def hoarding(self: DeviceIotlb, iova: int, size: int, uva: int, access: int) -> None:
        hoard.append(bytes(1 << 12))
        update(self, iova, size, uva, access)

    _plant(DeviceIotlb, "update", hoarding)


FLAWS: Final[dict[str, Callable[[], None]]] = {
    "kept": _kept,  # what is taken back stays
    "wider": _wider,  # entries allow everything
    "unheard": _unheard,  # a ring that waits for an entry is not told that it has come
    "waits": _waits,  # a question waits until the channel takes it
    "padded": _padded,  # messages may have any size
    "hoards": _hoards,  # something is kept of every entry
}

if __name__ == "__main__":
    FLAWS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
