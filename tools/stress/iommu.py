"""A guest's IOMMU, and the front-end's part of it: what the driver's addresses stand for, told to the device on demand.

With ACCESS_PLATFORM every address in a ring, and of a ring, is an I/O virtual one. The back-end asks for what it does
not know, on a channel of its own (SET_BACKEND_REQ_FD), and is answered by IOTLB_MSG on the connection; what is taken
back it must not use any more once IOTLB_MSG has been acknowledged. Source: vhost-user, "IOMMU support".

Rules: `Memory.regions` are known by I/O virtual addresses then, and the device is told others as guest-physical, so
that it fails at once if it takes the one for the other. Nothing is answered behind the clause's back: questions wait
until somebody waits for a ring (Ring.take, Ring.quiet) or calls `serve`.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from vhostmp.tools.stress.consts import Feature, ProtocolFeature, Request, has
from vhostmp.tools.stress.frontend import HEADER, NEED_REPLY, REPLY, VERSION, message, u64
from vhostmp.tools.stress.link import Link, Outcome
from vhostmp.tools.stress.memory import Memory, Region
from vhostmp.tools.stress.verdict import Failure

SHIFT: Final = 16 << 30
"""From an I/O virtual address to what the device is told as guest-physical."""
PAGE: Final = 4096
READ: Final = 1
WRITE: Final = 2
RW: Final = READ | WRITE
MISS: Final = 1  # types of struct vhost_iotlb_msg
UPDATE: Final = 2
INVALIDATE: Final = 3
ACCESS_FAIL: Final = 4
BACKEND_IOTLB_MSG: Final = 1  # on the channel
LARGEST: Final = 4096  # bytes of a message on the channel that can be one
_ENTRY: Final = struct.Struct("=QQQBB6x")


def iotlb(iova: int, size: int, uaddr: int = 0, perm: int = RW, kind: int = UPDATE) -> bytes:
    """Pack an IOTLB message. Source: vhost-user, "An IOTLB message"."""
    return _ENTRY.pack(iova, size, uaddr, perm, kind)


class Iommu:
    """What is mapped, page by page, and the channel on which the device asks."""

    def __init__(self, memory: Memory) -> None:
        """Map nothing."""
        self._memory: Final = memory
        self._access: dict[int, int] = {}
        self._link: Link | None = None
        self.channel: socket.socket | None = None
        self.theirs: socket.socket | None = None
        """The device's end of the channel, for those who want to spoil it."""
        self._input = b""
        self.eager = True
        """Whether the device is told of all memory before it asks."""
        self.deaf = False
        """Whether questions are read and not answered."""
        self.blind = False
        """Whether they are not even read."""
        self.asked: list[tuple[int, int]] = []
        """Address and access of every question that was read."""

    def open(self, link: Link) -> None:
        """Answer on this connection from now on, and give the device a channel if it can have one."""
        self._link = link
        self.hang_up()
        if not has(link.protocol, ProtocolFeature.BACKEND_REQ):
            return
        self.channel, self.theirs = socket.socketpair()
        self.channel.setblocking(False)
        link.must(Request.SET_BACKEND_REQ_FD, fds=[self.theirs.fileno()])

    def hang_up(self) -> None:
        """Close the channel."""
        self._input = b""
        for end in (self.channel, self.theirs):
            if end is not None:
                end.close()
        self.channel = self.theirs = None

    @property
    def waits(self) -> list[int]:
        """Descriptors that are readable when the device asks."""
        return [self.channel.fileno()] if self.channel is not None and not self.blind else []

    def allow(self, gpa: int, size: int, access: int = RW) -> None:
        """Have whole pages stand for themselves from now on, for these accesses; the device is not told."""
        for at in range(gpa // PAGE * PAGE, gpa + size, PAGE):
            self._access[at] = access

    def forbid(self, gpa: int, size: int) -> None:
        """Have whole pages stand for nothing from now on; the device is not told."""
        for at in range(gpa // PAGE * PAGE, gpa + size, PAGE):
            self._access.pop(at, None)

    def allow_all(self) -> None:
        """Allow all memory, and tell the device of it, a region at a time, unless it is to ask.

        What may be left of other entries is taken back first: whether a new one replaces them is written nowhere.
        """
        for one in self._memory.regions:
            if self.eager:
                self.renew(one)
            else:
                self.allow(one.gpa, one.size)

    def renew(self, one: Region, access: int = RW) -> None:
        """Have a region stand for itself, in one entry that allows these accesses and no other; tell the device."""
        self.take_back(one.gpa, one.size)
        self.allow(one.gpa, one.size, access)
        self.update(one.gpa, one.size, one.uva, access)

    def update(self, iova: int, size: int, uva: int, access: int = RW) -> None:
        """Enter an entry that a back-end has no reason to refuse."""
        self._tell(iotlb(iova, size, uva, access))

    def take_back(self, iova: int, size: int) -> None:
        """Unmap whole pages, and tell the device: it uses them no more when this returns."""
        self.forbid(iova, size)
        self._tell(iotlb(iova, size, kind=INVALIDATE))

    def _tell(self, payload: bytes) -> None:
        assert self._link is not None
        self._link.must(Request.IOTLB_MSG, payload)

    def serve(self) -> None:
        """Answer all that has been asked. What stands for nothing has no answer. Failure for what is no question."""
        for iova, access in self.questions():
            page = iova // PAGE * PAGE
            allowed = self._access.get(page, 0)
            if not self.deaf and allowed & access == access:
                self.update(page, PAGE, self._memory.uva(page), allowed)

    def questions(self) -> list[tuple[int, int]]:
        """Read what has been asked; other messages of the device's are passed over. Failure for what is none."""
        found: list[tuple[int, int]] = []
        while self.channel is not None and not self.blind and (got := self._receive()) is not None:
            request, flags, payload = got
            if request != BACKEND_IOTLB_MSG:
                continue
            if len(payload) != _ENTRY.size:
                raise Failure(f"an IOTLB message of {len(payload)} bytes came on the back-end's channel")
            iova, _, _, access, kind = _ENTRY.unpack(payload)
            if flags & NEED_REPLY:
                self.channel.send(message(request, u64(0), flags=VERSION | REPLY))
            if kind == MISS and access in (READ, WRITE, RW):
                found.append((iova, access))
            elif kind != ACCESS_FAIL:
                raise Failure(f"an IOTLB message of type {kind} and access {access} came on the back-end's channel")
        self.asked += found
        return found

    def _receive(self) -> tuple[int, int, bytes] | None:
        """Return one message, or None when no whole one is there."""
        assert self.channel is not None
        while True:
            if len(self._input) >= HEADER.size:
                request, flags, size = HEADER.unpack_from(self._input)
                if size > LARGEST:
                    raise Failure(f"a message of {size} bytes came on the back-end's channel")
                if len(self._input) >= HEADER.size + size:
                    payload = self._input[HEADER.size : HEADER.size + size]
                    self._input = self._input[HEADER.size + size :]
                    return request, flags, payload
            try:
                data = self.channel.recv(1 << 16)
            except BlockingIOError:
                return None
            if not data:  # the device has closed it, and `theirs` too: nobody asks any more
                return None
            self._input += data

    def try_(self, payload: bytes) -> Outcome:
        """Send an IOTLB message that may be refused."""
        assert self._link is not None
        return self._link.try_(Request.IOTLB_MSG, payload)


def is_behind(features: int) -> bool:
    """Whether a machine with these features is behind an IOMMU."""
    return has(features, Feature.ACCESS_PLATFORM)
