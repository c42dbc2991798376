"""Structs of the benchmarks' front-end. Its board is shared with the harness, which looks and asks it to stop."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vhostmp.tools._driver cimport ring_t

cdef enum:
    HEADER = 12             # virtio_net_hdr with num_buffers (virtio 1.3, 5.1.6)
    LINE = 64               # of a packet so much is written anew each time: header, addresses, number, time
    NUMBER_AT = 32          # sequence number in a slot
    TIME_AT = 40            # when it was to be sent, nanoseconds

    # Words of the board.
    BOARD_STATE = 0         # 0 starting, 1 running
    BOARD_STOP = 1          # set by the harness
    BOARD_FLOWS = 8         # FLOW_WORDS for each flow: sent, received, bad, lost, kicks
    FLOW_WORDS = 8
    FLOWS_MAX = 128
    BOARD_TIMES = BOARD_FLOWS + FLOW_WORDS * FLOWS_MAX
    TIMES_SUB_BITS = 6      # a power of two is cut into so many parts: 1.6 % and better
    TIMES = 40 << TIMES_SUB_BITS
    BOARD_WORDS = BOARD_TIMES + TIMES


cdef struct flow_t:
    ring_t tx
    ring_t rx
    uint64_t *words         # of the board
    uint64_t *times
    uint8_t *tx_slots
    uint8_t *rx_slots
    uint64_t tx_gpa
    uint64_t rx_gpa
    uint32_t tx_stride
    uint32_t rx_stride
    uint32_t size
    bint sends
    bint receives
    bint event_idx
    uint64_t gap_ns         # between two packets; 0: as fast as it goes
    uint64_t due_ns         # when the next one is to be sent
    uint64_t sent
    uint64_t received
    uint64_t lost
    uint64_t expected       # sequence number of the next packet that comes back
    uint64_t bad
    uint32_t idle
    uint8_t template[64]
