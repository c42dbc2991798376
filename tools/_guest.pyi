RUN: int
DUAL: int
MOVED: int
KILL: int
DRAIN: int
STOP: int
BOARD_BYTES: int
BINS: int
SLOT: int
F_INDIRECT: int
F_EVENT_IDX: int
F_VERSION_1: int
F_IN_ORDER: int

def make_frame(seq: int, generation: int, flags: int, size: int) -> bytes: ...
def check_frame(frame: bytes) -> tuple[int, int] | None: ...

class Board:
    def __init__(self, buf: memoryview, offset: int = 0) -> None: ...
    def clock(self, start_ns: int, bin_ns: int) -> None: ...
    def order(self, code: int) -> int: ...
    def acknowledged(self, command: int) -> bool: ...
    def swap_mark(self) -> bool: ...
    def counters(self) -> dict[str, int]: ...
    def pauses_ns(self) -> list[int]: ...
    def bins(self, n: int) -> list[int]: ...

class Guest:
    def __init__(
        self,
        base: memoryview,
        pools: tuple[memoryview, memoryview],
        board: memoryview,
        *,
        board_offset: int,
        tx: tuple[int, int, int, int, int, int],
        rx: tuple[int, int, int, int, int, int],
        pool_offset: int,
        pool_gpa: int,
        sizes: tuple[int, int],
        features: int,
        indirect_every: int,
        spin_seconds: float,
        quiet_seconds: float,
    ) -> None: ...
    def run(self) -> None: ...
