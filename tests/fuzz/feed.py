"""Numbers and choices out of a fuzzer's bytes, for the targets in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Feed:
    """Bytes that are read one after the other; zeros where they end, so that any input means something."""

    def __init__(self, data: bytes) -> None:
        """Begin at the first byte."""
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether anything is left."""
        return self._at < len(self._data)

    def bytes(self, size: int) -> bytes:
        """Take `size` bytes."""
        part = self._data[self._at : self._at + size]
        self._at += size
        return part.ljust(size, b"\0")

    def u8(self) -> int:
        """Take one byte."""
        return self.number(1)

    def number(self, size: int) -> int:
        """Take a number of `size` bytes."""
        return int.from_bytes(self.bytes(size), "little")

    def pick(self, choices: Sequence[T]) -> T:
        """Take one of up to 256 choices."""
        return choices[self.u8() % len(choices)]
