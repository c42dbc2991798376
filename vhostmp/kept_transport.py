"""A connection to a front-end that outlives its control process: no message is lost, and none is done twice.

The socket itself is in the store (keeper.py). What a death could lose or repeat is a message that was taken off it and
not acted upon, and a reply that was written or not. Both are decided by things that the kernel keeps for the *socket*,
and by words in the record's memory that are stored in the order of the program:

1. A part of a message is *peeked*, which also makes duplicates of its descriptors; those go to the store. SO_PEEK_OFF,
   which the socket keeps, now stands at the k bytes seen. (Linux also shows those of a later message, if this one has
   none: what came for certain is known in step 3, and until then from what the message is to have.)
2. The bytes are copied to the *inbox* in the record, and its word is set: n bytes, of which the last k are *being
   taken*.
3. The k bytes are read off the socket, by which the kernel puts SO_PEEK_OFF back to 0. Then the word says: none.
4. Once the message is complete it is handled.
5. The reply is written to the *outbox*, a pipe that is in the store as well.
6. The record of the device is written with this message's number as *done*: this one store decides.
7. The inbox is emptied, and the outbox is spliced to the socket: each byte of a reply is in one of them, never in both.

What a control process finds that goes on after a death in step...

- 1: nothing was taken; it is peeked again. The duplicates in the store are named by nothing and dropped.
- 2 before the word: the same. After it, or in 3: the word says k, and SO_PEEK_OFF, k or 0, whether they were taken.
- 4, 5: the inbox holds the message, whose number is not done. It is handled (again): device verbs set what is wanted,
  they do not change it by some amount, so doing one again, from whatever it had reached, ends in the same (for the two
  messages that count, ADD_MEM_REG and REM_MEM_REG, see handlers/memory.py). What is in the outbox belongs to the
  attempt that did not count, and is thrown away.
- 6: before the store as 5, after it as 7.
- 7: what is in the inbox has a number that is done, and is forgotten; what is in the outbox is sent on.

A reply with descriptors cannot go through a pipe. It is in the record with its file, and what is sent is the same file
opened once more: afterwards, whether it has another opener says whether it was sent (a lease can be had when not).

Not covered: a connection that was accepted, or dialled, and is not in the store yet. Nothing has been said on it.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import socket
import termios
from collections.abc import Sequence
from typing import Final, Protocol

from vhostmp import killpoints
from vhostmp.errors import LocalError
from vhostmp.keeper import Keeper
from vhostmp.parts import new_id
from vhostmp.protocol.codec import Message
from vhostmp.shm.records import WORD, Plain
from vhostmp.transport import Transport, socket_of

SO_PEEK_OFF: Final = 42
_SPLICE_F_NONBLOCK: Final = 2
_NUMBER, _PROGRESS, _FD_BASE, _FD_COUNT, _SENT, _FAULT_SIZE, _FAULT = 0, 8, 16, 24, 32, 40, 48
_FAULT_MAX: Final = 200
_DOUBT: Final = 248
_DATA: Final = 256


class Committer(Protocol):
    """Who writes the record of a device and its connection (adoption.py)."""

    def commit(self) -> None:
        """Write everything: what is recorded as done counts from now on."""
        ...


class KeptTransport(Transport):
    """One connection, with an inbox in a record and an outbox in the store."""

    def __init__(self, sock: socket.socket, keeper: Keeper, name: str, done: int, committer: Committer) -> None:
        """Take over a socket that has just been connected; `name` is its record's, `done` the last message's number."""
        super().__init__(sock)
        self._words: Final = keeper.record(name).words
        self._numbers: Final = keeper.record(name).numbers
        self._keeper: Final = keeper
        self._committer: Final = committer
        self.done = done
        self._inbox_names: list[str] = []
        self._again = b""
        self._again_fault: str | None = None
        self._staged = 0
        self._reply_fds: tuple[int, ...] = ()
        self._reply = b""
        sock.setblocking(False)  # splice() knows no other way; the socket is ours alone
        self._size = self._taking = 0  # bytes in the inbox; those of them that are still being taken
        self._is_doubtful = False
        self._id = new_id()
        self._outbox: tuple[int, int] = (-1, -1)

    @classmethod
    def connected(
        cls, sock: socket.socket, keeper: Keeper, name: str, done: int, committer: Committer
    ) -> KeptTransport:
        """Begin with a socket that has just been connected. OSError: no descriptors are left; it is closed then."""
        try:
            self = cls(sock, keeper, name, done, committer)
            self._outbox = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        except OSError:
            sock.close()
            raise
        self._begin_message()
        return self

    @classmethod
    def found(cls, plain: Plain, keeper: Keeper, name: str, committer: Committer) -> KeptTransport:
        """Go on with the connection of a control process before us: what `describe` returned."""
        words = keeper.record(name).words
        number, progress, base, count, sent, fault_size = (
            keeper.record(name).numbers[at // WORD]
            for at in (_NUMBER, _PROGRESS, _FD_BASE, _FD_COUNT, _SENT, _FAULT_SIZE)
        )
        fault = bytes(words[_FAULT : _FAULT + fault_size]).decode(errors="replace") if fault_size else None
        size, taking = progress & 0xFFFFFFFF, progress >> 32
        data = bytes(words[_DATA : _DATA + size])
        done = int(plain["done"])
        sock = socket_of(keeper.take(f"connection.{plain['id']}"))
        seen = sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
        self = cls(sock, keeper, name, done, committer)
        if not taking:
            sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)  # somebody may have peeked, and noted nothing
        killpoints.reach("found")
        if taking:
            self._size, self._taking = size, taking
            self._inbox_names = [f"inbox.{base}.{place}" for place in range(count)]
            came, late_fault = self._take(min(seen, taking))
            self.release()
            if seen >= taking:
                count, fault = len(came) if size == taking else count, late_fault
                self._taken(count, fault)
            else:
                self._set(_DOUBT, int(size == taking))
                self._taking = 0
                self._set(_PROGRESS, size)
        self._id = int(plain["id"])
        self._outbox = keeper.take(f"outbox.{self._id}.0"), keeper.take(f"outbox.{self._id}.1")
        if number > done and size:
            self._inbox_names = [f"inbox.{base}.{place}" for place in range(count)]
            fault = self._take_inbox_fds() or fault
            self._is_doubtful = bool(self._numbers[_DOUBT // WORD])
            self._again, self._again_fault, self._size = data, fault, size
            with contextlib.suppress(BlockingIOError):
                while os.read(self._outbox[0], 65536):
                    pass
        else:
            waiting = array.array("i", [0])
            fcntl.ioctl(self._outbox[0], termios.FIONREAD, waiting)
            self._staged = waiting[0]
            if plain["reply"] is not None:
                fds = tuple(keeper.take(known) for known in plain["reply"]["fds"])
                if sent == done or self._was_sent(fds[0]):
                    self._close_fds(fds)
                else:
                    self._reply, self._reply_fds = bytes.fromhex(plain["reply"]["data"]), fds
            self._begin_message()
        return self

    def _take_inbox_fds(self) -> str | None:
        """Take the descriptors that came with the message. Returns what is wrong with them, if anything.

        There may have been no descriptor left to keep one by: the message is refused then, and no start.
        """
        try:
            for known in self._inbox_names:
                self._fds.append(self._keeper.take(known))
        except LocalError:
            self._close_fds(self._fds)
            del self._fds[:]
            return "its fds were not kept when the control process died"
        self._keeper.put(dict(zip(self._inbox_names, self._fds, strict=True)))
        return None

    def describe(self, fds: dict[str, int]) -> Plain:
        """Return the connection as plain data, and add the descriptors that it names."""
        fds.update({f"connection.{self._id}": self.fileno()})
        fds.update({f"outbox.{self._id}.{end}": fd for end, fd in enumerate(self._outbox)})
        reply = None
        if self._reply_fds:
            names = {f"reply.{self._id}.{self.done}.{place}": fd for place, fd in enumerate(self._reply_fds)}
            fds.update(names)
            reply = {"data": self._reply.hex(), "fds": list(names)}
        return {"id": self._id, "done": self.done, "reply": reply}

    # --- in ---

    def _receive_part(self) -> Message | None:
        """Read once; see above. Raises: BlockingIOError, BadMessage, EOFError."""
        if self._again:
            size = self._decoder.wanted
            data, self._again = self._again[:size], self._again[size:]
            fds, fault = list(self._fds), self._again_fault
            if self._decoder.inside:
                fds, fault = [], None
            return self._decoder.feed(data, fds, fault, doubtful=self._is_doubtful)
        known = len(self._fds)
        data, seen, fault = self._read(socket.MSG_PEEK)
        killpoints.reach("peeked")
        if not data:
            self._decoder.end()
            raise EOFError("the front-end has hung up")
        base = 0
        if seen and not self._size:
            base = new_id()
            names = [f"inbox.{base}.{place}" for place in range(len(seen))]
            self._keeper.put(dict(zip(names, seen, strict=True)))
            self._inbox_names = names
        killpoints.reach("stored")
        self._note(data, base, len(seen), fault)
        del self._fds[known:]
        self._close_fds(seen)
        killpoints.reach("noted")
        fds, fault = self._take(len(data))
        killpoints.reach("taken")
        self._taken(len(fds), fault)
        killpoints.reach("inbox")
        return self._decoder.feed(data, fds, fault)

    def _take(self, size: int) -> tuple[list[int], str | None]:
        """Read bytes off the socket that are known to be there. Returns: what came with them, for certain."""
        fds: list[int] = []
        fault: str | None = None
        while size:
            data, more, wrong = self._read(0, size)
            size -= len(data)
            fds += more
            fault = fault or wrong
        return fds, fault

    def _taken(self, count: int, fault: str | None) -> None:
        """Note that all bytes in the inbox are off the socket, and how many descriptors came with the first of them."""
        if self._size == self._taking:
            self._set(_FD_COUNT, count)
            if not count:
                self._drop_inbox_fds()
        self._note_fault(fault)
        self._taking = 0
        self._set(_PROGRESS, self._size)

    def _note(self, data: bytes, base: int, count: int, fault: str | None) -> None:
        """Add bytes to the inbox that are still on the socket."""
        start = _DATA + self._size
        self._words[start : start + len(data)] = data
        if not self._size:
            self._set(_FD_BASE, base)
            self._set(_FD_COUNT, count)
            self._set(_FAULT_SIZE, 0)
            self._set(_DOUBT, 0)
        self._note_fault(fault)
        self._size += len(data)
        self._taking = len(data)
        self._set(_PROGRESS, self._size | self._taking << 32)

    def _note_fault(self, fault: str | None) -> None:
        if fault is not None:
            text = fault.encode()[:_FAULT_MAX]
            self._words[_FAULT : _FAULT + len(text)] = text
            self._set(_FAULT_SIZE, len(text))

    def _set(self, offset: int, value: int) -> None:
        """Set a word, in one store: struct.pack_into would clear it first."""
        self._numbers[offset // WORD] = value

    def _begin_message(self) -> None:
        """Empty the inbox: the next message begins."""
        self._size = 0
        self._is_doubtful = False
        self._set(_PROGRESS, 0)
        self._set(_NUMBER, self.done + 1)
        self._drop_inbox_fds()

    def _drop_inbox_fds(self) -> None:
        names, self._inbox_names = self._inbox_names, []
        if names:
            self._keeper.drop(names)

    # --- out ---

    @property
    def pending(self) -> bool:
        """Whether output waits for the front-end to read."""
        return bool(self._staged or self._reply_fds)

    def finish(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take note that a message is dealt with, and send the reply, if any; `fds` are taken over. EOFError."""
        killpoints.reach("handled")
        if fds:
            # Opened anew: one that memfd_create() made does not count as an opener (_is_ours_alone).
            self._reply, self._reply_fds = data, tuple(_reopened(fd) for fd in fds)
            self._close_fds(fds)
        elif data:
            os.write(self._outbox[1], data)  # it is empty: no message is handled while a reply waits
            self._staged = len(data)
        killpoints.reach("staged")
        self.done += 1
        self._committer.commit()
        killpoints.reach("committed")
        self._begin_message()
        killpoints.reach("emptied")
        self.flush()
        killpoints.reach("replied")

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it. Raises: EOFError: the front-end has hung up."""
        try:
            if self._reply_fds:
                self._send_fds()
            while self._staged:
                self._staged -= os.splice(self._outbox[0], self._sock.fileno(), self._staged, flags=_SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                raise
            raise EOFError("the front-end has hung up") from error

    def _send_fds(self) -> None:
        """Send a reply with its files, each opened once more. It is short, so it is sent whole or not at all."""
        opened: list[int] = []
        try:
            for fd in self._reply_fds:
                opened.append(_reopened(fd))
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", opened))]
            self._sock.sendmsg([self._reply], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        finally:
            self._close_fds(opened)
        killpoints.reach("sent")
        self._set(_SENT, self.done)
        self._close_fds(self._reply_fds)
        self._reply_fds = ()

    def _was_sent(self, fd: int) -> bool:
        """Whether a reply with a file was sent before us: it is still on its way, or somebody else has the file."""
        waiting = array.array("i", [0])
        fcntl.ioctl(self._sock, termios.TIOCOUTQ, waiting)
        return bool(waiting[0]) or not _is_ours_alone(fd)

    @staticmethod
    def _close_fds(fds: Sequence[int]) -> None:
        for fd in fds:
            os.close(fd)

    def close(self) -> None:
        """Close the socket, the outbox and every descriptor, also those that are kept; may be called twice."""
        super().close()
        self._drop_inbox_fds()
        for fd in (*self._outbox, *self._reply_fds):
            if fd >= 0:
                os.close(fd)
        self._outbox, self._reply_fds = (-1, -1), ()


def _reopened(fd: int) -> int:
    """Open the file of a descriptor once more; what has no file (a userfaultfd) is duplicated."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


def _is_ours_alone(fd: int) -> bool:
    """Whether a file has no other opener: then, and only then, there can be a lease on it."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True
