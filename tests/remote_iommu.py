"""A guest behind an IOMMU whose device is at the other end of a vhost-user socket.

The front-end's part: questions come on a channel of the back-end's (SET_BACKEND_REQ_FD), answers go as IOTLB_MSG, and
what is unmapped is taken back before its memory is anybody else's. For `tests/iommu_guest.StrictGuest`, which has them
from a device in this process otherwise.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

from tests.remote import RemoteDevice
from vhostmp.consts import BackendRequest, IotlbType, ProtocolFeature, Request
from vhostmp.iotlb import DeviceIotlb, Miss
from vhostmp.net import NetDevice
from vhostmp.tools.stress.frontend import HEADER, REPLY_ACK, Frontend, Reply

_ENTRY: Final = struct.Struct("=QQQBB6x")


class SharedFrontend(Frontend):
    """A connection on which several threads ask, one at a time."""

    def __init__(self, sock: socket.socket, patience: float) -> None:
        """Take over a connected socket."""
        super().__init__(sock, patience)
        self.lock: Final = threading.RLock()

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Reply:
        """Send a message that has a reply of its own, and read it."""
        with self.lock:
            return super().ask(request, payload, fds)

    def do(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a message with NEED_REPLY, and return the acknowledgement: 0 for success."""
        with self.lock:
            return super().do(request, payload, fds)


class RemoteIotlb:
    """The device's IOTLB, as messages."""

    def __init__(self, frontend: Frontend, channel: socket.socket) -> None:
        """Answer on a connection what is asked on a channel; both are borrowed."""
        self._frontend: Final = frontend
        self._channel: Final = channel
        self._input = b""

    def fileno(self) -> int:
        """Return what is readable when there are questions."""
        return self._channel.fileno()

    def misses(self) -> list[Miss]:
        """Return the questions that have come; their ring is not known. EOFError: the back-end has closed the channel.

        Other messages of the back-end's are passed over.
        """
        with contextlib.suppress(BlockingIOError):
            data = self._channel.recv(4096, socket.MSG_DONTWAIT)
            if not data:
                raise EOFError("the back-end's channel is closed")
            self._input += data
        found: list[Miss] = []
        while len(self._input) >= HEADER.size:
            request, _, size = HEADER.unpack_from(self._input)
            if len(self._input) < HEADER.size + size:
                break
            payload, self._input = self._input[HEADER.size : HEADER.size + size], self._input[HEADER.size + size :]
            if request == BackendRequest.IOTLB_MSG:
                iova, _, _, access, kind = _ENTRY.unpack(payload)
                found.append(Miss(0, iova, access, kind == IotlbType.ACCESS_FAIL))
        return found

    def update(self, iova: int, size: int, uva: int, access: int) -> None:
        """IOTLB_MSG, an entry."""
        self._tell(iova, size, uva, access, IotlbType.UPDATE)

    def invalidate(self, iova: int, size: int) -> None:
        """IOTLB_MSG, taken back."""
        self._tell(iova, size, 0, 0, IotlbType.INVALIDATE)

    def _tell(self, *fields: int) -> None:
        status = self._frontend.do(Request.IOTLB_MSG, _ENTRY.pack(*fields))
        assert not status, f"IOTLB_MSG {fields}: {status}"


class RemoteDeviceBehindIommu(RemoteDevice):
    """The verbs as messages, with a channel for the back-end's questions."""

    def __init__(self, path: str | Path, protocol_features: int = 0) -> None:
        """Connect, and give the back-end its channel; `protocol_features` beside those for that."""
        wanted = REPLY_ACK | ProtocolFeature.BACKEND_REQ.mask | protocol_features
        super().__init__(SharedFrontend.connect(path), wanted)
        self.channel, theirs = socket.socketpair()
        with theirs:
            self._do(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        self.iotlb: Final = cast("DeviceIotlb", RemoteIotlb(self.frontend, self.channel))

    def as_net_device(self) -> NetDevice:
        """Return self, for those who ask for a NetDevice and use the verbs."""
        return cast("NetDevice", cast("Any", self))

    def close(self) -> None:
        """Close the channel; the connection was ended by `stop_all`."""
        self.frontend.close()
        self.channel.close()
