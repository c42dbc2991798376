BOARD_BYTES: int
STATE_WORD: int
STOP_WORD: int
FLOWS_WORD: int
TIMES_WORD: int
WORDS_PER_FLOW: int
MOST_FLOWS: int
TIMES_COUNT: int

class Flow:
    def __init__(
        self,
        memory: memoryview,
        board: memoryview,
        number: int,
        *,
        gpa: int,
        tx: tuple[int, int, int, int, int, int],
        rx: tuple[int, int, int, int, int, int],
        slots: int,
        strides: tuple[int, int],
        size: int,
        header: bytes,
        sends: bool,
        receives: bool,
        packed: bool,
        event_idx: bool,
        gap_ns: int,
    ) -> None: ...
    def preset(self, packet: bytes) -> None: ...

def flood(flows: list[Flow], board: memoryview) -> None: ...
def ping(flow: Flow, board: memoryview) -> None: ...
def ping_eventfd(ask_fd: int, answer_fd: int, board: memoryview, gap_ns: int) -> None: ...
def answer_eventfd(ask_fd: int, answer_fd: int, board: memoryview) -> None: ...
def slot_of(nanoseconds: int) -> int: ...
def value_of(slot: int) -> float: ...
