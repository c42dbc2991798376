"""A vhost-user front-end's end of a connection: sends messages, well-formed or not, and reads replies.

Written from the vhost-user document and not from our back-end: it packs with its own struct formats, so that a mistake
in ours shows.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Self

import attrs

VERSION = 1
REPLY = 4
NEED_REPLY = 8
PROTOCOL_FEATURES = 1 << 30
REPLY_ACK = 1 << 3
HEADER = struct.Struct("=III")
_TIMEVAL = struct.Struct("@ll")
U64_BYTES = 8
"""Bytes of a payload that is one number; of a vring state too."""
FDS_MAX = 8
"""Descriptors that come with one message at most."""
PATIENCE = 20.0
"""How long a reply is waited for, seconds, unless told otherwise."""


class ProtocolError(AssertionError):
    """The back-end's answer is not what the vhost-user document asks for."""


@attrs.frozen
class Reply:
    """What came back."""

    request: int
    flags: int
    payload: bytes

    @property
    def u64(self) -> int:
        """The payload as one number."""
        return int.from_bytes(self.payload, "little")


def message(request: int, payload: bytes = b"", *, flags: int = VERSION, size: int | None = None) -> bytes:
    """Return the bytes of a message; `size` lies about the payload's."""
    return HEADER.pack(request, flags, len(payload) if size is None else size) + payload


def u64(value: int) -> bytes:
    """Pack one number."""
    return struct.pack("=Q", value)


def vring(index: int, num: int) -> bytes:
    """Pack a vring state."""
    return struct.pack("=II", index, num)


def vring_addr(index: int, flags: int = 0, *, desc: int = 0, used: int = 0, avail: int = 0, log: int = 0) -> bytes:
    """Pack a vring address description."""
    return struct.pack("=IIQQQQ", index, flags, desc, used, avail, log)


def log_area(size: int, offset: int = 0) -> bytes:
    """Pack a log description."""
    return struct.pack("=QQ", size, offset)


def region(gpa: int, size: int, uva: int, offset: int = 0) -> bytes:
    """Pack a memory region."""
    return struct.pack("=QQQQ", gpa, size, uva, offset)


def mem_table(*regions: bytes, count: int | None = None) -> bytes:
    """Pack a memory table; `count` lies about the number of regions."""
    return struct.pack("=II", len(regions) if count is None else count, 0) + b"".join(regions)


def single_region(packed: bytes) -> bytes:
    """Pack the payload of ADD_MEM_REG and REM_MEM_REG."""
    return bytes(8) + packed


def config(offset: int, data: bytes, flags: int = 0, *, size: int | None = None) -> bytes:
    """Pack a part of the configuration space; `size` lies about its length."""
    return struct.pack("=III", offset, len(data) if size is None else size, flags) + data


def inflight(size: int, offset: int, queues: int, queue_size: int) -> bytes:
    """Pack an inflight description as front-ends in C do: padded."""
    return struct.pack("=QQHH4x", size, offset, queues, queue_size)


@contextlib.contextmanager
def memfd(size: int = 1 << 20) -> Generator[int, None, None]:
    """Lend guest memory."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def eventfds(count: int) -> Generator[list[int], None, None]:
    """Lend eventfds."""
    fds: list[int] = []
    try:
        for _ in range(count):
            fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


class Frontend:
    """The front-end's end of a connection."""

    def __init__(self, sock: socket.socket, patience: float = PATIENCE) -> None:
        """Take over a connected socket. A reply that takes longer than `patience` seconds is a TimeoutError."""
        self.sock = sock
        self.patience = patience
        sock.settimeout(patience)

    @classmethod
    def connect(cls, path: str | Path, patience: float = PATIENCE) -> Self:
        """Connect to a listening back-end. OSError when there is none; TimeoutError when it takes nobody in."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # While as many wait as may wait, connect() would for ever (unix(7)); settimeout() has it not wait at all.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(patience), 1))
            sock.connect(str(path))
        except BlockingIOError:
            sock.close()
            raise TimeoutError(f"nobody takes a connection to {path} in {patience:g} s") from None
        except BaseException:
            sock.close()
            raise
        return cls(sock, patience)

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes with descriptors, in one sendmsg()."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        sent = self.sock.sendmsg([data], rights)
        if sent < len(data):  # sending nothing would find out whether the peer has hung up since
            self.sock.sendall(data[sent:])

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, need_reply: bool = False) -> None:
        """Send a message."""
        self.send_raw(message(request, payload, flags=VERSION | (NEED_REPLY if need_reply else 0)), fds)

    def reply(self) -> Reply:
        """Read one reply; EOFError when the back-end has hung up."""
        request, flags, size = HEADER.unpack(self._exactly(HEADER.size))
        return Reply(request, flags, self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self.sock.recv(size - len(data))
            except ConnectionResetError:
                part = b""
            if not part:
                raise EOFError(f"hung up after {len(data)} of {size} bytes")
            data += part
        return data

    def ask_fds(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> tuple[Reply, list[int]]:
        """Send a message that is answered with descriptors, and read both. They are the caller's to close."""
        self.send(request, payload, fds)
        data, found, _, _ = socket.recv_fds(self.sock, HEADER.size, FDS_MAX)
        code, flags, size = HEADER.unpack(data + self._exactly(HEADER.size - len(data)))
        return Reply(code, flags, self._exactly(size)), found

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Reply:
        """Send a message that has a reply of its own, and read it."""
        self.send(request, payload, fds)
        return self.reply()

    def do(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a message with NEED_REPLY, and return the acknowledgement: 0 for success."""
        self.send(request, payload, fds, need_reply=True)
        reply = self.reply()
        if (reply.request, reply.flags, len(reply.payload)) != (request, VERSION | REPLY, U64_BYTES):
            raise ProtocolError(f"request {request} was acknowledged with {reply}")
        return reply.u64

    def hung_up(self) -> bool:
        """Whether the back-end closes the connection, without sending anything first; waits for it."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Hang up."""
        self.close()
