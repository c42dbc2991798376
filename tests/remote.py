"""A device at the other end of a vhost-user socket, with the verbs of a NetDevice: for guests that do not mind which.

`tests/net_driver.Guest` drives a device through its verbs; given a RemoteDevice it is the guest of a front-end. Every
message wants an acknowledgement, so a verb's return is the barrier here as it is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from vhostmp.consts import Request
from vhostmp.net import NetDevice
from vhostmp.shm.memory import MemoryRegion
from vhostmp.tools.stress.frontend import (
    PROTOCOL_FEATURES,
    REPLY_ACK,
    Frontend,
    inflight,
    log_area,
    mem_table,
    region,
    single_region,
    u64,
    vring,
    vring_addr,
)

NO_FD = 1 << 8


class Refused(AssertionError):
    """The back-end answered a message with an error."""


class RemoteDevice:
    """The verbs, as messages."""

    def __init__(self, path: str | Path | Frontend, protocol_features: int = REPLY_ACK) -> None:
        """Connect, unless that is done, and negotiate protocol features as QEMU does, before the owner."""
        self.frontend = path if isinstance(path, Frontend) else Frontend.connect(path)
        self._kicks: dict[int, int | None] = {}
        try:
            assert self.frontend.ask(Request.GET_FEATURES).u64 & PROTOCOL_FEATURES
            assert self.frontend.ask(Request.GET_PROTOCOL_FEATURES).u64 & REPLY_ACK
            self.frontend.send(Request.SET_PROTOCOL_FEATURES, u64(protocol_features))
        except BaseException:
            self.frontend.close()
            raise

    def as_net_device(self) -> NetDevice:
        """Return self, for those who ask for a NetDevice and use the verbs below."""
        return cast("NetDevice", self)

    def _do(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        if status := self.frontend.do(request, payload, fds):
            raise Refused(f"{request.name}: {status}")

    def set_owner(self) -> None:
        """SET_OWNER."""
        self._do(Request.SET_OWNER)

    def set_features(self, bits: int) -> None:
        """SET_FEATURES, with bit 30."""
        self._do(Request.SET_FEATURES, u64(bits | PROTOCOL_FEATURES))

    def set_mem_table(self, regions: Sequence[MemoryRegion]) -> None:
        """SET_MEM_TABLE."""
        table = mem_table(*(region(item.gpa, item.size, item.uva, item.mmap_offset) for item in regions))
        self._do(Request.SET_MEM_TABLE, table, [item.fd for item in regions])

    def add_mem_region(self, item: MemoryRegion) -> None:
        """ADD_MEM_REG."""
        packed = single_region(region(item.gpa, item.size, item.uva, item.mmap_offset))
        self._do(Request.ADD_MEM_REG, packed, [item.fd])

    def remove_mem_region(self, item: MemoryRegion) -> None:
        """REM_MEM_REG."""
        self._do(Request.REM_MEM_REG, single_region(region(item.gpa, item.size, item.uva, item.mmap_offset)))

    def set_vring_num(self, index: int, num: int) -> None:
        """SET_VRING_NUM."""
        self._do(Request.SET_VRING_NUM, vring(index, num))

    def set_vring_addr(self, index: int, *, desc: int, avail: int, used: int, flags: int = 0, log: int = 0) -> None:
        """SET_VRING_ADDR."""
        self._do(Request.SET_VRING_ADDR, vring_addr(index, flags, desc=desc, avail=avail, used=used, log=log))

    def set_log_base(self, fd: int, size: int, offset: int = 0) -> None:
        """SET_LOG_BASE."""
        self._do(Request.SET_LOG_BASE, log_area(size, offset), [fd])

    def set_log_fd(self, fd: int) -> None:
        """SET_LOG_FD."""
        self._do(Request.SET_LOG_FD, b"", [fd])

    def get_inflight(self, queues: int, queue_size: int) -> tuple[int, int]:
        """GET_INFLIGHT_FD. Returns: the region's descriptor, the caller's, and its bytes."""
        reply, fds = self.frontend.ask_fds(Request.GET_INFLIGHT_FD, inflight(0, 0, queues, queue_size))
        return fds[0], int.from_bytes(reply.payload[:8], "little")

    def set_inflight(self, fd: int, offset: int, size: int, queues: int, queue_size: int) -> None:
        """SET_INFLIGHT_FD."""
        self._do(Request.SET_INFLIGHT_FD, inflight(size, offset, queues, queue_size), [fd])

    def set_vring_base(self, index: int, base: int) -> None:
        """SET_VRING_BASE."""
        self._do(Request.SET_VRING_BASE, vring(index, base))

    def set_vring_call(self, index: int, fd: int | None) -> None:
        """SET_VRING_CALL."""
        self._do(Request.SET_VRING_CALL, u64(index if fd is not None else index | NO_FD), [] if fd is None else [fd])

    def set_vring_err(self, index: int, fd: int) -> None:
        """SET_VRING_ERR."""
        self._do(Request.SET_VRING_ERR, u64(index), [fd])

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        """Keep the descriptor for `start_vring`, whose message it is."""
        self._kicks[index] = fd

    def start_vring(self, index: int) -> None:
        """SET_VRING_KICK: its arrival starts the ring."""
        fd = self._kicks[index]
        self._do(Request.SET_VRING_KICK, u64(index if fd is not None else index | NO_FD), [] if fd is None else [fd])

    def stop_vring(self, index: int) -> int:
        """GET_VRING_BASE: its reply comes when the ring is stopped."""
        reply = self.frontend.ask(Request.GET_VRING_BASE, vring(index, 0))
        return int.from_bytes(reply.payload[4:], "little")

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """SET_VRING_ENABLE."""
        self._do(Request.SET_VRING_ENABLE, vring(index, int(enable)))

    def stop_all(self) -> None:
        """Stop every ring, so that its memory may go, and hang up."""
        with contextlib.suppress(OSError, EOFError):
            for index in self._kicks:
                self.stop_vring(index)
        self.frontend.close()
