"""The small back-end's process: `python -m tests.flawed.backend SOCKET [FLAW]`, one front-end after the other.

It prints "ready" once front-ends can connect. It speaks what a small back-end speaks: REPLY_ACK, LOG_SHMFD, one pair of
rings. Each message must have the size and the descriptors that it is defined to have, and is refused else: with an
acknowledgement where one is asked for, by hanging up where not.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Final

from tests.flawed.device import F_LOG_ALL, F_PROTOCOL, F_RING_PACKED, FEATURES, FLAWS, RINGS, Device
from tests.flawed.memory import Refused, Region, map_file, parse_table, unmap

VERSION: Final = 1
REPLY: Final = 4
NEED_REPLY: Final = 8
REPLY_ACK: Final = 3
LOG_SHMFD: Final = 1
PROTOCOL: Final = 1 << REPLY_ACK | 1 << LOG_SHMFD
HEADER: Final = struct.Struct("=III")
NOFD: Final = 1 << 8
QUEUE_MAX: Final = 32768
INDEX: Final = 0xFFFF  # a split ring's base
OFFSET: Final = 0x7FFF  # a packed ring's, without its wrap counter
PAYLOAD_MAX: Final = 4096
LATE: Final = 0.2
IDLE: Final = 0.05
SIZES: Final = {
    1: 0,
    2: 8,
    3: 0,
    4: 0,
    6: 16,
    7: 0,
    8: 8,
    9: 40,
    10: 8,
    11: 8,
    12: 8,
    13: 8,
    14: 8,
    15: 0,
    16: 8,
    18: 8,
}
"""Bytes of each request's payload; SET_MEM_TABLE, 5, has any number of regions."""
WITH_FDS: Final = (5, 6, 7, 12, 13, 14)


class Session:
    """A connection to a front-end."""

    def __init__(self, sock: socket.socket, flaw: str) -> None:
        """Take over a socket."""
        self.sock: Final = sock
        self.flaw: Final = flaw
        self.device: Final = Device(flaw)
        self.protocol = 0
        self.owned = False
        self._data = b""
        self._fds: list[int] = []
        self._old: list[Region] = []
        self._new: list[Region] = []
        self._late = 0.0
        self._handlers: Final[dict[int, Callable[[bytes, list[int]], bytes | None]]] = {
            1: lambda _payload, _fds: u64(FEATURES),
            2: self.set_features,
            3: self.set_owner,
            4: self.reset_owner,
            5: self.set_mem_table,
            6: self.set_log_base,
            7: self.set_log_fd,
            8: self.set_vring_num,
            9: self.set_vring_addr,
            10: self.set_vring_base,
            11: self.get_vring_base,
            12: self.set_vring_kick,
            13: self.set_vring_call,
            14: self.set_vring_err,
            15: lambda _payload, _fds: u64(PROTOCOL),
            16: self.set_protocol_features,
            18: self.set_vring_enable,
        }

    # ---- bytes and descriptors

    def receive(self) -> None:
        """Take what has arrived and handle whole messages. EOFError at the end, Refused when it must end."""
        try:
            data, rights, flags, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(4 * 64))
        except BlockingIOError:
            return
        except ConnectionError as error:
            raise EOFError from error
        for level, kind, raw in rights:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds += struct.unpack(f"={len(raw) // 4}i", raw[: len(raw) // 4 * 4])
        if not data:
            raise EOFError
        if flags & socket.MSG_CTRUNC:
            raise Refused("descriptors were lost")
        self._data += data
        while len(self._data) >= HEADER.size:
            request, flags, size = HEADER.unpack_from(self._data)
            if flags & 3 != VERSION or flags & REPLY or size > PAYLOAD_MAX or request not in (*SIZES, 5):
                raise Refused(f"request {request}, flags {flags:#x}, {size} bytes")
            if len(self._data) < HEADER.size + size:
                return
            payload = self._data[HEADER.size : HEADER.size + size]
            self._data = self._data[HEADER.size + size :]
            fds, self._fds = self._fds, []
            self.handle(request, flags, payload, fds)

    def handle(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        """Handle a message. Refused when it is wrong and nobody wants to know."""
        acked = bool(flags & NEED_REPLY) and bool(self.protocol >> REPLY_ACK & 1)
        try:
            if request in SIZES and len(payload) != SIZES[request]:
                raise Refused(f"request {request} with {len(payload)} bytes")
            if fds and request not in WITH_FDS:
                if self.flaw == "leaked_fd":
                    fds = []
                raise Refused(f"request {request} with descriptors")
            answer = self._handlers[request](payload, fds)
        except Refused:
            if not acked:
                raise
            self.reply(request, u64(1))
        else:
            if answer is not None:
                self.reply(request, answer)
            elif acked:
                self.reply(request, u64(0))
        finally:
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)

    def reply(self, request: int, payload: bytes) -> None:
        """Answer. A front-end that does not read is hung up on."""
        try:
            self.sock.send(HEADER.pack(request, VERSION | REPLY, len(payload)) + payload)
        except OSError as error:
            raise EOFError from error

    # ---- requests

    def set_features(self, payload: bytes, _fds: list[int]) -> None:
        """Take features."""
        features = number(payload)
        if features & ~FEATURES:
            raise Refused("features that are not offered")
        running = any(ring.vring for ring in self.device.rings)
        if running and (features ^ self.device.features) & ~(1 << F_LOG_ALL):
            raise Refused("features change while rings run")
        self.device.features = features
        for ring in self.device.rings:
            ring.enabled |= not features >> F_PROTOCOL & 1
        self.device.memory.logging = bool(features >> F_LOG_ALL & 1)

    def set_protocol_features(self, payload: bytes, _fds: list[int]) -> None:
        """Take protocol features."""
        if number(payload) & ~PROTOCOL:
            raise Refused("protocol features that are not offered")
        self.protocol = number(payload)

    def set_owner(self, _payload: bytes, _fds: list[int]) -> None:
        """Own the device."""
        if self.owned:
            raise Refused("has an owner")
        self.owned = True

    def reset_owner(self, _payload: bytes, _fds: list[int]) -> None:
        """Stop everything."""
        for index in range(RINGS):
            self.device.stop(index)
        self.owned = False

    def set_mem_table(self, payload: bytes, fds: list[int]) -> None:
        """Take a memory table."""
        table = parse_table(payload)
        if len(fds) != len(table):
            raise Refused(f"{len(table)} regions, {len(fds)} descriptors")
        memory = self.device.memory
        new = memory.load(table, fds)
        if self.flaw == "no_barrier" and memory.regions:
            self._new, self._late = new, time.monotonic() + LATE
            return
        self.device.detach()
        self._old, memory.regions = memory.regions, new
        unmap(self._old)
        self.attach_all()

    def finish_late(self) -> None:
        """Use the new memory, which should have been used when the table came (the flaw)."""
        if self._late and time.monotonic() > self._late:
            self._late = 0.0
            self.device.detach()
            unmap(self.device.memory.regions)
            self.device.memory.regions = self._new
            self.attach_all()

    def attach_all(self) -> None:
        """Start the rings that can be; those whose addresses have no memory any more stay stopped."""
        for index in range(RINGS):
            with contextlib.suppress(Refused):
                self.device.attach(index)

    def set_log_base(self, payload: bytes, fds: list[int]) -> bytes | None:
        """Take a log."""
        size, offset = struct.unpack("=QQ", payload)
        if not size or len(fds) != 1 or size + offset >= 1 << 40 or offset % 4096:
            raise Refused("no log")
        top = max((one.end for one in self.device.memory.regions), default=0)
        if size * 8 * 4096 < top:
            raise Refused("the log is too small")
        map_file(fds[0], size + offset).close()
        if self.device.memory.log is not None:
            self.device.memory.log.close()
        self.device.memory.log = mmap.mmap(fds[0], size, offset=offset)
        return u64(0)

    def set_log_fd(self, _payload: bytes, fds: list[int]) -> None:
        """Take what to tell by that something was logged: nobody listens, nothing is told."""
        if len(fds) != 1:
            raise Refused("no descriptor")

    def index(self, value: int) -> int:
        """Check a ring's number."""
        if value >= RINGS and self.flaw != "wild_index":
            raise Refused(f"ring {value}")
        return value

    def set_vring_num(self, payload: bytes, _fds: list[int]) -> None:
        """Take a ring's size."""
        index, num = struct.unpack("=II", payload)
        ring = self.device.rings[self.index(index)]
        packed = self.device.has(F_RING_PACKED)
        if self.flaw != "ring_size" and (not 0 < num <= QUEUE_MAX or (num & (num - 1) and not packed) or ring.vring):
            raise Refused(f"{num} entries")
        ring.num = num

    def set_vring_addr(self, payload: bytes, _fds: list[int]) -> None:
        """Take a ring's addresses."""
        index, flags, desc, used, avail, log = struct.unpack("=IIQQQQ", payload)
        ring = self.device.rings[self.index(index)]
        if flags & ~1 or desc % 16 or avail % 2 or used % 4:
            raise Refused("addresses")
        if ring.vring and ring.addresses and ring.addresses[1:4] != (desc, used, avail):
            raise Refused("a ring that runs moves")  # only its logging may change
        if self.device.memory.regions:
            for uva in (desc, used, avail):
                self.device.memory.gpa_of(uva)
        ring.addresses = (flags, desc, used, avail, log)

    def set_vring_base(self, payload: bytes, _fds: list[int]) -> None:
        """Take where a ring begins."""
        index, base = struct.unpack("=II", payload)
        ring = self.device.rings[self.index(index)]
        packed = self.device.has(F_RING_PACKED)
        if ring.vring or (base > INDEX and not packed) or (packed and ring.num and (base & OFFSET) >= ring.num):
            raise Refused("base")
        ring.base = base

    def get_vring_base(self, payload: bytes, _fds: list[int]) -> bytes:
        """Stop a ring."""
        index = struct.unpack("=II", payload)[0]
        return struct.pack("=II", index, self.device.stop(self.index(index)))

    def _eventfd(self, payload: bytes, fds: list[int]) -> tuple[int, int]:
        value = number(payload)
        if value >> 9 or bool(value & NOFD) == bool(fds) or len(fds) > 1:
            raise Refused("descriptors")
        index = self.index(value & 0xFF)
        if not fds:
            return index, -1
        if os.readlink(f"/proc/self/fd/{fds[0]}") != "anon_inode:[eventfd]":
            raise Refused("no eventfd")
        os.set_blocking(fds[0], False)
        return index, fds.pop()

    def set_vring_kick(self, payload: bytes, fds: list[int]) -> None:
        """Start a ring."""
        index, fd = self._eventfd(payload, fds)
        ring = self.device.rings[index]
        if ring.kick >= 0:
            os.close(ring.kick)
        ring.kick, ring.started = fd, True
        if self.flaw == "lost_first_kick":
            with contextlib.suppress(OSError):
                os.eventfd_read(fd)
        self.device.attach(index)

    def set_vring_call(self, payload: bytes, fds: list[int]) -> None:
        """Take what to interrupt by."""
        index, fd = self._eventfd(payload, fds)
        ring = self.device.rings[index]
        if ring.call >= 0:
            os.close(ring.call)
        ring.call = fd

    def set_vring_err(self, payload: bytes, fds: list[int]) -> None:
        """Take what to signal errors by."""
        index, fd = self._eventfd(payload, fds)
        ring = self.device.rings[index]
        if ring.err >= 0:
            os.close(ring.err)
        ring.err = fd

    def set_vring_enable(self, payload: bytes, _fds: list[int]) -> None:
        """Enable or disable a ring."""
        index, value = struct.unpack("=II", payload)
        if value > 1:
            raise Refused("neither on nor off")
        self.device.rings[self.index(index)].enabled = bool(value)

    # ---- the loop

    def run(self) -> None:
        """Serve until the front-end hangs up."""
        self.sock.setblocking(False)
        with selectors.PollSelector() as selector:
            selector.register(self.sock, selectors.EVENT_READ)
            more = False
            while True:
                kicked = self.poll(selector, 0.0 if more else IDLE)
                self.finish_late()
                if more or kicked:
                    more = any([self.device.work() for _ in range(16)])

    def poll(self, selector: selectors.BaseSelector, timeout: float) -> bool:
        """Wait for messages and kicks. Returns whether there is something to do."""
        known = {key.fd for key in selector.get_map().values()} - {self.sock.fileno()}
        wanted = {ring.kick for ring in self.device.rings if ring.kick >= 0}
        for fd in known - wanted:
            selector.unregister(fd)
        for fd in wanted - known:
            selector.register(fd, selectors.EVENT_READ)
        kicked = False
        for key, _ in selector.select(timeout):
            if key.fd == self.sock.fileno():
                self.receive()
            else:
                with contextlib.suppress(OSError):
                    os.eventfd_read(key.fd)
                kicked = True
        return kicked

    def close(self) -> None:
        """Let everything go."""
        self.device.close()
        for fd in self._fds:
            os.close(fd)
        self.sock.close()


def u64(value: int) -> bytes:
    """Pack a number."""
    return struct.pack("=Q", value)


def number(payload: bytes) -> int:
    """Unpack one."""
    return int(struct.unpack("=Q", payload)[0])


def main(path: str, flaw: str = "") -> None:
    """Serve for ever."""
    if flaw and flaw not in FLAWS:
        raise SystemExit(f"no flaw {flaw}; there are: {', '.join(FLAWS)}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while True:
            session = Session(listener.accept()[0], flaw)
            try:
                session.run()
            except (EOFError, Refused):
                session.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
