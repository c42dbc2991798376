"""Where buffers lie: pieces of guest memory are taken from an arena, and given back to it."""

from __future__ import annotations

from typing import Final


class Arena:
    """Hands out pieces of a span of guest memory."""

    def __init__(self, start: int, size: int, *, align: int = 16) -> None:
        """Begin with all of it free. Pieces begin at multiples of `align`, or with 1 where the one before ended."""
        self.align: Final = align
        self._start = start
        self._end = start + size
        self._sizes: dict[int, int] = {}
        self._free: dict[int, list[int]] = {}
        self.clear()

    def clear(self) -> None:
        """Begin anew: nobody uses any of it."""
        self._next = self._start
        self._sizes.clear()
        self._free.clear()

    def take(self, size: int) -> int:
        """Return the address of `size` free bytes. MemoryError when there are none."""
        free = self._free.get(size)
        if free:
            return free.pop()
        at = self._place(size)
        self._sizes[at] = size
        return at

    def _place(self, size: int) -> int:
        at = -(-self._next // self.align) * self.align
        if at + size > self._end:
            raise MemoryError(f"the guest has no {size} bytes left for a buffer")
        self._next = at + size
        return at

    def owns(self, gpa: int) -> bool:
        """Whether a piece was taken from here."""
        return gpa in self._sizes

    def give(self, gpa: int) -> None:
        """Free a piece."""
        self._free.setdefault(self._sizes[gpa], []).append(gpa)


class TopArena(Arena):
    """Hands out pieces from the end of its span, each right before the one taken last: they end where memory ends."""

    def _place(self, size: int) -> int:
        if self._end - size < self._next:
            raise MemoryError(f"the guest has no {size} bytes left for a buffer")
        self._end -= size
        return self._end


class Arenas(Arena):
    """Two arenas: takes from the first, gives to the one that a piece is from."""

    def __init__(self, first: Arena, second: Arena) -> None:
        """Join them."""
        super().__init__(0, 0)
        self._both: Final = (first, second)

    def take(self, size: int) -> int:
        """Take from the first."""
        return self._both[0].take(size)

    def give(self, gpa: int) -> None:
        """Give to the owner."""
        self._both[self._both[1].owns(gpa)].give(gpa)
