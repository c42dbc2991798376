"""The control process's view of a software guest: its board, and frames as it makes and checks them.

Rules: whoever holds a Board holds the buffer it was made on. One order at a time, the next after its acknowledgement.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vhostmp.shm.atomics cimport (
    vmp_load_acquire_u64,
    vmp_load_relaxed_u64,
    vmp_store_release_u32,
    vmp_store_release_u64,
)
from vhostmp.tools._frame cimport FRAME_MAX, FRAME_MIN, frame_good, frame_make

from vhostmp.errors import LocalError

RUN, DUAL, MOVED = COMMAND_RUN, COMMAND_DUAL, COMMAND_MOVED
KILL, DRAIN, STOP = COMMAND_KILL, COMMAND_DRAIN, COMMAND_STOP
BOARD_BYTES, BINS = sizeof(board_t), BINS_MAX


def make_frame(uint64_t seq, uint32_t generation, uint32_t flags, uint32_t size):
    """Return the frame a guest sends as number `seq`, `size` bytes (FRAME_MIN to FRAME_MAX), without virtio header."""
    cdef uint8_t frame[FRAME_MAX]
    if not FRAME_MIN <= size <= FRAME_MAX:
        raise LocalError(f"frame size {size} is not {FRAME_MIN} to {FRAME_MAX}")
    frame_make(frame, seq, generation, flags, size)
    return (<char *> frame)[:size]


def check_frame(bytes frame):
    """Return (sequence number, generation) of a frame every byte of which is right, None otherwise."""
    cdef uint64_t seq
    cdef uint32_t generation
    cdef const uint8_t *data = <const uint8_t *> <const char *> frame
    fits = FRAME_MIN <= len(frame) <= FRAME_MAX
    return (seq, generation) if fits and frame_good(data, <uint32_t> len(frame), &seq, &generation) else None


cdef class Board:
    """The control process's view of one guest's board: orders to it, counters from it."""

    cdef Py_buffer view
    cdef board_t *board
    cdef bint held

    def __cinit__(self):
        self.held = False

    def __init__(self, buf, size_t offset=0):
        """Use the board at byte `offset` of `buf` (BOARD_BYTES long). LocalError when `buf` is too short."""
        if self.held:
            raise LocalError("a board stays on its buffer")
        PyObject_GetBuffer(buf, &self.view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.held = True
        if <size_t> self.view.len < offset + sizeof(board_t):
            raise LocalError(f"buffer has {self.view.len} bytes, {offset + sizeof(board_t)} are needed")
        self.board = <board_t *> (<uint8_t *> self.view.buf + offset)

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    def clock(self, uint64_t start_ns, uint64_t bin_ns):
        """Set where (CLOCK_MONOTONIC) the histogram starts and how wide its bins are. Before RUN."""
        if bin_ns == 0:
            raise LocalError("bin width is 0 ns")
        self.board.start_ns = start_ns
        self.board.bin_ns = bin_ns

    def order(self, int code):
        """Give the order `code` (RUN, DUAL, ...); returns what `acknowledged` waits for. One order at a time."""
        cdef uint64_t command = ((self.board.command >> 8) + 1) << 8 | <uint64_t> code
        # ORDER D6 (control): what the order speaks of, then store board.command       [release]
        #   pairs with  D5 (obey: load-acquire of command)
        vmp_store_release_u64(&self.board.command, command)
        return command

    def acknowledged(self, uint64_t command):
        """Whether the guest has done what `order` returned `command` for."""
        # ORDER D10 (control): load board.ack, then use what the order was about       [acquire]
        #   pairs with  D9 (obey: store-release of ack)
        return vmp_load_acquire_u64(&self.board.ack) == command

    def swap_mark(self):
        """Begin the window of a swap, or end it. Returns True at the beginning."""
        cdef uint32_t value = self.board.swap_seq + 1
        # ORDER D8 (control): what was done before, then store board.swap_seq          [release]
        #   pairs with  D7 (note_time: load-acquire of swap_seq)
        vmp_store_release_u32(&self.board.swap_seq, value)
        return value & 1 == 1

    def counters(self):
        """Return the counters by name. Exact once the order that ended the counting is acknowledged."""
        return {
            "sent": self.board.sent, "received": self.board.received,
            "lost": self.board.lost, "duplicated": self.board.duplicated, "reordered": self.board.reordered,
            "corrupted": self.board.corrupted, "violations": self.board.violations,
            "kill_lost": self.board.kill_lost, "kill_duplicated": self.board.kill_duplicated,
            "kicks": self.board.kicks, "calls": self.board.calls, "sleeps": self.board.sleeps,
            "pauses": self.board.pauses, "moves": self.board.moves,
            "tx_held": self.board.tx_held, "rx_held": self.board.rx_held,
        }

    def pauses_ns(self):
        """Return the pause of each swap, nanoseconds, the last PAUSES_MAX of them."""
        cdef uint64_t n = min(vmp_load_relaxed_u64(&self.board.pauses), <uint64_t> PAUSES_MAX)
        return [self.board.pause_ns[i] for i in range(n)]

    def bins(self, uint32_t n):
        """Return the first `n` bins of the histogram: packets that came back in each."""
        return [self.board.bins[i] for i in range(min(n, <uint32_t> BINS_MAX))]
