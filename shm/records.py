"""A record: plain data in a memory file that outlives who writes it, whole at every instant.

Rules: one writer. A record is written in place, without a system call: two slots, used in turn; a slot's number is
stored last. Whoever is killed while it writes leaves the other slot, which has the older number and is whole: a reader
takes the slot with the highest number whose checksum is right. SIGKILL stops a thread between two instructions, so a
store of one aligned word is done or not, and stores are seen in the order of the program by who reads after the death:
no fence is needed. (It is not meant to survive the machine.)

The format has a version of its own: it may be written by one version of the code and read by the next. What is in it
has another one (keeper.py, SCHEMA).
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from typing import Any, Final, cast

from vhostmp.errors import LocalError, SysError

VERSION: Final = 1
Plain = dict[str, Any]

_MAGIC: Final = int.from_bytes(b"vhostmpR", "little")
_PAGE: Final = 4096
#: The most that a record may have, bytes; what is not used takes no memory.
CAPACITY: Final = 8 << 20
SIZE: Final = _PAGE + 2 * CAPACITY
WORD: Final = 8
_SLOTS: Final = (64, 128)
#: Behind the slots' heads there is room for words of whoever owns the record (kept_transport.py).
WORDS: Final = 1024
WORDS_END: Final = _PAGE


class Record:
    """One record, mapped. `words` is room for the owner's own, `numbers` the same by 8 bytes."""

    def __init__(self, fd: int = -1) -> None:
        """Make an empty one; with the descriptor of one, which is taken over, map that.

        Raises: SysError: there is no memory for it. LocalError: it is of another version, or no record.
        """
        self._number = 0
        is_new = fd < 0
        try:
            if is_new:
                fd = os.memfd_create("vhostmp-record", os.MFD_CLOEXEC)
                os.ftruncate(fd, SIZE)
            self._map: Final = mmap.mmap(fd, SIZE)
        except (OSError, ValueError) as error:
            if fd >= 0:
                os.close(fd)
            raise SysError(f"cannot map a record: {error}") from error
        self.fd: Final = fd
        self._buf: Final = memoryview(self._map)
        self._words: Final = self._buf.cast("Q")
        self.words: Final = self._buf[WORDS:WORDS_END]
        self.numbers: Final = self.words.cast("Q")
        if is_new:
            self._store(8, VERSION)
            self._store(0, _MAGIC)
        elif (self._load(0), self._load(8)) != (_MAGIC, VERSION):
            version = self._load(8)
            self.close()
            raise LocalError(
                f"a record of the server before has format {version}, and this program reads format {VERSION}: "
                "use the program that started it, or --adopt-timeout 0 to end it"
            )

    def write(self, plain: Plain) -> None:
        """Replace the record. Raises: SysError: it is too long; the one before stays."""
        data = json.dumps(plain, separators=(",", ":")).encode()
        if len(data) > CAPACITY:
            raise SysError(f"a record of {len(data)} bytes is too long")
        number = self._number + 1
        slot = number % 2
        head, start = _SLOTS[slot], _PAGE + slot * CAPACITY
        self._store(head, 0)
        self._buf[start : start + len(data)] = data
        self._store(head + 8, len(data))
        self._store(head + 16, zlib.crc32(data))
        self._store(head, number)
        self._number = number

    def read(self) -> Plain | None:
        """Return what was written last; None when nothing was."""
        best: Plain | None = None
        for slot, head in enumerate(_SLOTS):
            number, size, checksum = (self._load(head + offset) for offset in (0, 8, 16))
            start = _PAGE + slot * CAPACITY
            if number <= self._number or size > CAPACITY:
                continue
            data = bytes(self._buf[start : start + size])
            if zlib.crc32(data) == checksum:
                best, self._number = cast("Plain", json.loads(data)), number
        return best

    def close(self) -> None:
        """Unmap and close. Idempotent."""
        if not self._map.closed:
            self.numbers.release()
            self.words.release()
            self._words.release()
            self._buf.release()
            self._map.close()
            os.close(self.fd)

    def _store(self, offset: int, value: int) -> None:
        self._words[offset // WORD] = value  # struct.pack_into would clear the word first

    def _load(self, offset: int) -> int:
        return self._words[offset // WORD]
