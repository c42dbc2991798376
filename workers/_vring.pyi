from typing import Final, NamedTuple

from vhostmp.shm._memory import MemoryMap

BROKEN_REASONS: Final[tuple[str, ...]]

class Chain(NamedTuple):
    head: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]

class Vring:
    def __init__(
        self,
        mem: MemoryMap,
        num: int,
        desc_gpa: int,
        avail_gpa: int,
        used_gpa: int,
        *,
        features: int = 0,
        last_avail_idx: int = 0,
    ) -> None: ...
    def pop(self) -> Chain | None: ...
    def push(self, head: int, length: int) -> None: ...
    def publish(self) -> bool: ...
    def enable_notify(self) -> bool: ...
    def disable_notify(self) -> None: ...
    @property
    def last_avail_idx(self) -> int: ...
    @property
    def used_idx(self) -> int: ...
    @property
    def broken(self) -> str | None: ...
