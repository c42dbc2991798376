"""One descriptor of a chain, of either ring format: its copy out of guest memory, and its bytes as segments of a burst.

Each byte is loaded once, by one access; what is checked is the copy.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

from vhostmp.shm._iotlb cimport ACCESS_READ, ACCESS_WRITE
from vhostmp.shm._memory cimport memory_find, memory_translate, vmp_region_cache
from vhostmp.shm.atomics cimport (
    vmp_load_relaxed_u8,
    vmp_load_relaxed_u64,
    vmp_prefetch_read,
    vmp_prefetch_write,
)
from vhostmp.shm.build cimport VMP_CHECKS
from vhostmp.shm.layout cimport (
    VMP_BROKEN_ADDRESS,
    VMP_BROKEN_DIRECTION,
    VMP_BROKEN_LENGTH,
    VMP_BROKEN_ORDER,
    VMP_BROKEN_SEGMENTS,
)
from vhostmp.workers._vring cimport (
    CHAIN_SEGMENTS_MAX,
    DESC_F_WRITE,
    READABLE,
    TOUCH,
    TOUCHED_BYTES,
    WRITABLE,
    burst,
    chain,
    packed_desc,
    vring,
    vring_desc,
)


cdef enum:
    # Descriptors of one chain, those of length 0 included: they cost time and hold nothing.
    FOUND_MAX = 2048            # 2 * CHAIN_SEGMENTS_MAX
    HEADER_BYTES = 12           # of virtio_net_hdr
    CACHE_LINE = 64

    # The second half of a descriptor as one number: length, and two more fields.
    SHIFT_THIRD = 32
    SHIFT_FOURTH = 48


cdef inline void load_desc(const vring_desc *at, vring_desc *copy) noexcept nogil:
    """Copy one descriptor out of guest memory, each byte once. The ring is little-endian, and so are we (setup.py)."""
    cdef uint64_t rest
    copy.addr = vmp_load_relaxed_u64(&at.addr)
    rest = vmp_load_relaxed_u64(<const uint64_t *> &at.len)
    copy.len = <uint32_t> rest
    copy.flags = <uint16_t> (rest >> SHIFT_THIRD)
    copy.next = <uint16_t> (rest >> SHIFT_FOURTH)


cdef inline void load_packed_desc(const packed_desc *at, vring_desc *copy) noexcept nogil:
    """The same for a packed ring. There is no next: `copy.next` is the buffer id."""
    cdef uint64_t rest
    copy.addr = vmp_load_relaxed_u64(&at.addr)
    rest = vmp_load_relaxed_u64(<const uint64_t *> &at.len)
    copy.len = <uint32_t> rest
    copy.next = <uint16_t> (rest >> SHIFT_THIRD)
    copy.flags = <uint16_t> (rest >> SHIFT_FOURTH)


cdef inline const void *table_entry(vring *vq, uint64_t gpa, uint64_t *room) noexcept nogil:
    """Return where an entry of an indirect table can be loaded from: NULL when that is not guest memory.

    A table has no alignment (virtio 1.3, 2.7.5.3 and 2.8.7): an entry that begins in one region and ends in the next is
    copied, each byte once, into `room`, which has two numbers.
    """
    cdef const uint8_t *at = memory_translate(vq.mem, &vq.cache, gpa, 16)
    cdef uint32_t i
    if at is not NULL:
        return at
    for i in range(16):
        at = memory_translate(vq.mem, &vq.cache, gpa + i, 1)
        if at is NULL:
            return NULL
        (<uint8_t *> room)[i] = vmp_load_relaxed_u8(at)
    return room


cdef inline void touch_start(const uint8_t *hva, uint64_t size, bint writable) noexcept nogil:
    """Ask for the first lines of a segment that will be read or written."""
    if not writable:
        vmp_prefetch_read(hva)
        if size > TOUCHED_BYTES // 2:
            vmp_prefetch_read(hva + TOUCHED_BYTES // 2)
        return
    # A header that ends a cache line is looked at, and hardly ever written to (put_header): to own its line would take
    # it from a driver that reads all headers.
    if (<uintptr_t> hva ^ (<uintptr_t> hva + HEADER_BYTES)) >= CACHE_LINE:
        vmp_prefetch_read(hva)
    else:
        vmp_prefetch_write(hva)
    if size > TOUCHED_BYTES // 2:
        vmp_prefetch_write(hva + TOUCHED_BYTES // 2)


cdef inline bint add_plain(
    burst *b, chain *c, const vmp_region_cache *cache, const vring_desc *d, uint32_t segment, bint writable, bint touch
) noexcept nogil:
    """Make one descriptor that lies in the region used last a whole chain, of one segment: `segment`. Else False.

    The short cut of both formats. The caller has looked at the flags, and that there is a segment left.
    """
    cdef uint64_t offset = d.addr - cache.gpa
    cdef uint8_t *hva
    if VMP_CHECKS and (offset >= cache.size or d.len > cache.size - offset or not d.len):
        return False
    if not VMP_CHECKS and cache.size == 0:
        return False            # nothing was looked up yet
    hva = cache.hva + offset
    b.segments[segment].iov_base = hva
    b.segments[segment].iov_len = d.len
    if touch:
        touch_start(hva, d.len, writable)
    if writable:
        c.n_readable = 0
        c.readable = 0
        c.n_writable = 1
        c.writable = d.len
    else:
        c.n_readable = 1
        c.readable = d.len
        c.n_writable = 0
        c.writable = 0
    return True


cdef inline int add_segments(vring *vq, burst *b, chain *c, const vring_desc *d, int direction) noexcept nogil:
    """Append one descriptor's bytes to the chain: one segment a region that they touch. 0 or a BROKEN_ reason."""
    cdef uint64_t gpa = d.addr
    cdef uint64_t left = d.len
    cdef uint64_t run
    cdef uint8_t *hva
    cdef bint writable = d.flags & DESC_F_WRITE != 0
    cdef uint32_t *bytes_ = &c.writable if writable else &c.readable
    cdef uint32_t *segments = &c.n_writable if writable else &c.n_readable
    if not writable and (c.n_writable or c.writable):
        return VMP_BROKEN_ORDER
    if not direction & (WRITABLE if writable else READABLE):
        return VMP_BROKEN_DIRECTION
    if <uint64_t> c.readable + c.writable + left > 0xFFFFFFFFULL:
        return VMP_BROKEN_LENGTH
    if left and gpa + (left - 1) < gpa:
        return VMP_BROKEN_ADDRESS
    while left:
        if c.n_readable + c.n_writable == CHAIN_SEGMENTS_MAX:
            return VMP_BROKEN_SEGMENTS
        hva = memory_find(vq.mem, &vq.cache, gpa, ACCESS_WRITE if writable else ACCESS_READ, &run)
        if hva is NULL:
            return VMP_BROKEN_ADDRESS
        if run > left:
            run = left
        if direction & TOUCH:
            touch_start(hva, run, writable)
        b.segments[b.n_segments].iov_base = hva
        b.segments[b.n_segments].iov_len = run
        b.n_segments += 1
        segments[0] += 1
        bytes_[0] += <uint32_t> run
        gpa += run
        left -= run
    return 0
