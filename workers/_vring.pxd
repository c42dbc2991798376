"""The compiled virtqueue, device side, of either format: structs, and what is small enough to inline.

One `vring` is one virtqueue as its worker sees it. The first lines hold what the data path reads for each burst;
nothing in it is shared with another process. What survives the worker is in the ring's slot of the control segment
(`slot`). Pointers into guest memory are valid inside one read-side section only.

Everything in guest memory is hostile: each field is loaded once, by one access, into a local; then checked; then used.
Nothing that we wrote there is ever read back.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vhostmp.shm._log cimport vmp_log
from vhostmp.shm._memory cimport vmp_memory, vmp_region_cache
from vhostmp.shm.atomics cimport vmp_load_relaxed_u16
from vhostmp.shm.layout cimport vmp_ring


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len


cdef enum:
    BURST = 64                  # chains taken at once
    CHAIN_SEGMENTS_MAX = 1024   # segments of one chain: UIO_MAXIOV, so that a chain is one readv or writev
    BURST_SEGMENTS_MAX = 1280   # a burst takes a further chain of several segments while 1024 are free

    DESC_F_NEXT = 1
    DESC_F_WRITE = 2
    DESC_F_INDIRECT = 4
    DESC_F_AVAIL = 0x80         # of packed rings
    DESC_F_USED = 0x8000

    # A position in a packed ring, as vhost-user's vring base has it.
    POSITION_OFFSET = 0x7FFF
    POSITION_WRAP = 0x8000

    READABLE = 1                # what a chain may hold: a transmit queue's chains are device-readable,
    WRITABLE = 2                # a receive queue's are device-writable
    EITHER = 3
    TOUCH = 4                   # added: the caller will read or write the first bytes of each chain: prefetch them
    TOUCHED_BYTES = 128         # how many: a header that ends a cache line, and the first line of the frame after it


cdef struct vring_desc:
    uint64_t addr
    uint32_t len
    uint16_t flags
    uint16_t next


cdef struct packed_desc:
    uint64_t addr
    uint32_t len
    uint16_t id
    uint16_t flags


cdef struct vring_used_elem:
    uint32_t id
    uint32_t len


cdef struct chain:
    uint32_t first              # index of its first segment in burst.segments, readable ones before writable ones
    uint32_t n_readable         # segments
    uint32_t n_writable
    uint32_t readable           # bytes
    uint32_t writable
    uint16_t n_descriptors      # of a packed ring that it takes; a chain of a split ring leaves this alone


cdef struct burst:
    uint32_t n
    uint32_t n_segments
    chain chains[BURST]
    vring_used_elem used[BURST]     # of each chain: id filled in when it is taken, len = 0 until it is written to
    iovec segments[BURST_SEGMENTS_MAX]


cdef struct desc_state:
    # An entry of a packed ring's region of what is in flight (vu "Inflight I/O tracking", DescStatePacked).
    uint8_t inflight            # 1: the head of a chain that was taken and not given back
    uint8_t padding
    uint16_t next               # entry: of the chain, or of the list of free ones
    uint16_t last               # entry: the chain's last one
    uint16_t num                # entries of the chain
    uint64_t counter            # chains taken before it
    uint16_t id                 # and the rest of the descriptor, as it was
    uint16_t flags
    uint32_t len
    uint64_t addr


cdef struct queue_region:
    # QueueRegionPacked
    uint64_t features
    uint16_t version            # 0: nobody has begun it
    uint16_t desc_num
    uint16_t free_head
    uint16_t old_free_head
    uint16_t used_idx
    uint16_t old_used_idx
    uint8_t used_wrap_counter
    uint8_t old_used_wrap_counter
    uint8_t padding[10]
    desc_state desc[1]          # desc_num of them


cdef struct vring:
    # The ring in guest memory. NULL: it may not be touched.
    vring_desc *desc
    uint16_t *avail             # flags, idx, ring[num], used_event; packed: the driver's event suppression, 4 bytes
    uint16_t *used              # flags, idx, elements of 8 bytes each [num], avail_event; packed: the device's
    uint16_t num
    uint16_t mask               # split: num is a power of two
    # Indices; positions in a packed ring (_packed.pyx).
    uint16_t last_avail_idx     # next entry to take
    uint16_t used_idx           # next entry to give back; our own, the one in guest memory is write-only to us
    uint16_t avail_idx          # the driver's idx when last read; packed: behind the last chain seen
    uint16_t signalled_used     # used_idx when the driver was last told, if signalled_valid
    uint8_t signalled_valid
    uint8_t event_idx           # negotiated EVENT_IDX
    uint8_t indirect            # negotiated INDIRECT_DESC
    uint8_t broken              # a BROKEN_ reason
    uint8_t packed              # negotiated RING_PACKED
    uint8_t notify_on_empty     # negotiated NOTIFY_ON_EMPTY
    # The journal (_journal.pxd).
    uint16_t staged             # chains given back and not published: entries of the batch
    uint16_t begun              # entries from the first on of which any may be marked
    uint64_t counter            # chains entered before the first of those
    uint64_t begun_bursts       # slot.begun_bursts
    const vmp_ring *peer        # the slot that slot.effect_idx is about
    # Packed rings only.
    uint8_t drained             # the last fetch took all that there was
    uint8_t stocked             # the driver has made something available, ever
    uint16_t published_idx      # used_idx when last published
    uint32_t device_event       # what we wrote into the device's event suppression
    const vmp_memory *mem
    const vmp_log *log          # NULL: writes are not logged
    vmp_region_cache cache
    vmp_ring *slot
    int call_fd                 # eventfd, -1: none
    int log_fd                  # eventfd, -1: none
    uint32_t logged             # bits set in the log since log_fd was signalled
    uint64_t log_used_gpa       # the used ring's guest-physical address
    uint8_t log_used            # writes to the used ring are logged too
    # Packed rings whose front-end keeps what is in flight (_inflight.pyx).
    queue_region *region        # NULL: it does not
    uint16_t region_entries     # of `region`
    uint16_t noted              # entries in flight: those of the slot's batch
    uint64_t noted_counter      # chains noted, ever


cdef int vring_fetch(vring *vq, burst *b, uint32_t most, int direction) noexcept nogil
cdef void vring_give_back(vring *vq, const burst *b, uint32_t first, uint32_t n) noexcept nogil
cdef void vring_publish(vring *vq) noexcept nogil
cdef bint vring_wants_call(vring *vq) noexcept nogil
cdef void vring_call(vring *vq) noexcept nogil
cdef bint vring_enable_notify(vring *vq) noexcept nogil
cdef void vring_disable_notify(vring *vq) noexcept nogil
cdef bint vring_attach(vring *vq) noexcept nogil
cdef uint32_t vring_room(vring *vq) noexcept nogil
cdef void vring_tell_log(vring *vq) noexcept nogil


cdef inline bint packed_available(uint16_t flags, uint16_t position) noexcept nogil:
    """Whether a descriptor with these flags, at this position, is available to us (virtio 1.3, 2.8.1)."""
    return flags & (DESC_F_AVAIL | DESC_F_USED) == (DESC_F_AVAIL if position & POSITION_WRAP else DESC_F_USED)


cdef inline uint16_t packed_forward(uint16_t position, uint32_t n, uint32_t num) noexcept nogil:
    """The position `n` descriptors further on, at most one round."""
    cdef uint32_t offset = (position & POSITION_OFFSET) + n
    if offset >= num:
        return <uint16_t> ((position & POSITION_WRAP ^ POSITION_WRAP) | (offset - num))
    return <uint16_t> (position & POSITION_WRAP | offset)


cdef inline uint16_t packed_backward(uint16_t position, uint32_t n, uint32_t num) noexcept nogil:
    """The position `n` descriptors before, at most one round."""
    cdef uint32_t offset = position & POSITION_OFFSET
    if offset < n:
        return <uint16_t> ((position & POSITION_WRAP ^ POSITION_WRAP) | (offset + num - n))
    return <uint16_t> (position & POSITION_WRAP | (offset - n))


cdef inline uint32_t packed_distance(uint16_t start, uint16_t end, uint32_t num) noexcept nogil:
    """How many descriptors from one position on to another, which is at most one round further on."""
    cdef uint32_t ahead = num if (start ^ end) & POSITION_WRAP else 0
    return (end & POSITION_OFFSET) + ahead - (start & POSITION_OFFSET)


cdef inline bint packed_has_more(vring *vq) noexcept nogil:
    """vring_has_more of a packed ring."""
    cdef const packed_desc *desc = <const packed_desc *> vq.desc
    cdef uint16_t position = vq.avail_idx
    if packed_distance(vq.published_idx, position, vq.num) == vq.num:
        return False            # all descriptors are ours: what their flags say is not looked at
    return packed_available(vmp_load_relaxed_u16(&desc[position & POSITION_OFFSET].flags), position)


cdef inline void vring_unfetch(vring *vq, burst *b, uint32_t n) noexcept nogil:
    """Put the last `n` chains of the burst back: they are taken again later. Only before they are given back.

    Only the burst fetched last from this ring, which then ends before them.
    """
    cdef uint32_t descriptors = 0
    cdef uint32_t i
    b.n -= n
    if not vq.packed:
        vq.last_avail_idx -= n
        return
    for i in range(b.n, b.n + n):
        descriptors += b.chains[i].n_descriptors
    vq.last_avail_idx = packed_backward(vq.last_avail_idx, descriptors, vq.num)


cdef inline bint vring_has_more(vring *vq) noexcept nogil:
    """Whether the driver has made more available than we have seen. Nothing is taken from it, so no order.

    Not the same as "there is something to take": a ring may have too few buffers for the packet that waits.
    """
    if vq.packed:
        return packed_has_more(vq)
    return vmp_load_relaxed_u16(&vq.avail[1]) != vq.avail_idx


cdef inline bint vring_drained(vring *vq) noexcept nogil:
    """After a fetch: whether it took all that the driver had made available, or all before one whose address is missing

    (behind an IOMMU). False when the burst was full instead, by number of chains or of segments.
    """
    if vq.packed:
        return vq.drained or vq.cache.missed
    return vq.last_avail_idx == vq.avail_idx or vq.cache.missed


cdef inline bint vring_was_stocked(vring *vq) noexcept nogil:
    """Whether the driver has ever made anything available on this ring."""
    if vq.packed:
        return vq.stocked or packed_has_more(vq)
    return vq.last_avail_idx != 0 or vmp_load_relaxed_u16(&vq.avail[1]) != 0
