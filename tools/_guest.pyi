SLOT: int
F_INDIRECT: int
F_EVENT_IDX: int
F_VERSION_1: int
F_RING_PACKED: int
F_IN_ORDER: int

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
