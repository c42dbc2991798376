"""Structs of the software guest: its part of a pool, itself. Nothing here is shared but what the pointers point to."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vhostmp.tools._board cimport board_t
from vhostmp.tools._driver cimport ring_t

cdef enum:
    SLOT_BYTES = 2048       # one buffer slot in a pool
    HEADER_AT = 4           # virtio_net_hdr in a slot; the frame behind it is 16-byte aligned
    HEADER_BYTES = 12       # virtio_net_hdr with num_buffers (virtio 1.3, 5.1.6)
    FRAME_AT = 16
    TABLE_AT = 1920         # indirect table of a transmit slot, three entries
    RX_BYTES = 1900         # length of a receive buffer, header included
    WINDOW_BITS = 1 << 20   # sequence numbers looked back on


cdef struct pool_t:
    uint8_t *tx
    uint8_t *rx

cdef struct guest_t:
    ring_t tx
    ring_t rx
    board_t *board
    pool_t pools[2]
    int current             # the pool the memory table names, as far as the guest knows
    bint dual               # both pools are valid: every packet is written to both, looked for in both
    uint64_t pool_gpa       # of the guest's part of the pool: transmit slots, then receive slots
    bint event_idx
    bint indirect
    bint in_order
    uint32_t size
    uint32_t size_max
    uint32_t indirect_every
    uint32_t generation     # memory moves so far, in every packet
    uint64_t spin_ns
    uint64_t quiet_ns
    bint sending
    bint killing
    uint64_t boundary       # first sequence number that the kill may cost
    uint64_t next_seq
    uint64_t high           # every number below has come or is counted missing
    uint64_t damaged        # bad frames that came since high moved: they are under way no more
    uint64_t *seen          # a bit each of the last WINDOW_BITS numbers below high
    uint64_t last_ns        # of the last completion
    uint32_t swap_seen
    uint64_t gap_max
    uint64_t done           # the command last acknowledged
    uint64_t command_ns     # when the command under way was first seen
    uint64_t under_way
