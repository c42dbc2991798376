"""The board of a software guest: orders from the control process, counters and pauses from the guest.

Rules: it is shared between these two and never shown to the device; each field has one writer. A counter is exact once
the order that ended the counting is acknowledged.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    PAUSES_MAX = 65536      # pauses kept; one a swap
    BINS_MAX = 262144       # bins of the packets-over-time histogram
    COMMAND_RUN = 1         # send
    COMMAND_DUAL = 2        # memory: both pools are valid from now on
    COMMAND_MOVED = 3       # memory: only the other one is
    COMMAND_KILL = 4        # settle what was sent; what goes wrong from then on is the kill's
    COMMAND_DRAIN = 5       # stop sending, settle everything
    COMMAND_STOP = 6        # end


cdef struct board_t:
    # Written by the control process.
    uint64_t command        # serial << 8 | code: one order at a time, the next after its acknowledgement
    uint32_t swap_seq       # odd while a swap is under way
    uint32_t pad_12
    uint64_t start_ns       # CLOCK_MONOTONIC of bin 0
    uint64_t bin_ns         # width of a bin
    uint8_t pad_32[96]
    # Written by the guest.
    uint64_t ack            # the command last done
    uint64_t sent
    uint64_t received
    uint64_t lost
    uint64_t duplicated
    uint64_t reordered
    uint64_t corrupted
    uint64_t kill_lost
    uint64_t kill_duplicated
    uint64_t violations     # used entries that no correct device writes
    uint64_t kicks
    uint64_t calls
    uint64_t sleeps
    uint64_t pauses         # entries of pause_ns
    uint64_t moves
    uint64_t tx_held        # transmit chains that the device has, when the guest last had nothing to do
    uint64_t rx_held        # receive chains
    uint8_t pad_264[3832]
    uint32_t pause_ns[PAUSES_MAX]
    uint32_t bins[BINS_MAX]
