"""What a ring has written, said to the dirty log: after the writes, and only while something is logged.

Callers look at `vq.log` first: NULL, one branch that is always taken the same way, is all that logging costs when it is
off. Data that is given back to the driver is logged by vring_give_back, the ring's own words by whoever writes them;
only what a back-end wrote into guest memory and does not give back is the back-end's to log (`dirty_segments`).
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from vhostmp.shm._log cimport log_bytes, log_order, log_pages
from vhostmp.shm.atomics cimport vmp_count_u64
from vhostmp.workers._vring cimport burst, chain, iovec, vring


cdef inline void dirty_count(vring *vq, uint32_t found, uint64_t outside) noexcept nogil:
    """Count bits that were set just now and pages that have none."""
    vq.logged += found
    vmp_count_u64(&vq.slot.log_pages, found)
    if outside:
        vmp_count_u64(&vq.slot.log_outside, outside)


cdef inline uint32_t dirty_bytes(vring *vq, const iovec *segments, uint64_t size, uint64_t *outside) noexcept nogil:
    """Log the first `size` bytes of segments that hold at least so many. After log_order."""
    cdef uint32_t found = 0
    cdef uint64_t part
    while size:
        part = segments.iov_len
        if part > size:
            part = size
        found += log_bytes(vq.log, vq.mem, <const uint8_t *> segments.iov_base, part, outside)
        size -= part
        segments += 1
    return found


cdef inline void dirty_segments(vring *vq, const iovec *segments, uint64_t size) noexcept nogil:
    """Log that the first `size` bytes of some segments were written, whether they are given back or not."""
    cdef uint64_t outside = 0
    cdef uint32_t found
    log_order()
    found = dirty_bytes(vq, segments, size, &outside)
    dirty_count(vq, found, outside)


cdef inline void dirty_chains(vring *vq, const burst *b, uint32_t first, uint32_t n) noexcept nogil:
    """Log what was written to `n` chains of a burst from `first` on, by their used lengths. After log_order."""
    cdef uint64_t outside = 0
    cdef uint32_t found = 0
    cdef uint32_t i, segment
    for i in range(first, first + n):
        if b.used[i].len:
            segment = b.chains[i].first + b.chains[i].n_readable
            found += dirty_bytes(vq, &b.segments[segment], b.used[i].len, &outside)
    dirty_count(vq, found, outside)


cdef inline void dirty_used(vring *vq, uint64_t offset, uint64_t size) noexcept nogil:
    """Log `size` bytes from byte `offset` of the used ring, if the front-end wants that. After log_order."""
    cdef uint64_t outside = 0
    cdef uint32_t found
    cdef uint64_t part
    if not vq.log_used:
        return
    if vq.mem.iotlb is not NULL:
        # Where the front-end says that the ring is to be logged is I/O virtual too: what counts is where it lies. Page
        # by page, for what follows each other in our memory need not in the guest's.
        found = 0
        while size:
            part = 4096 - (<uintptr_t> vq.used + offset) % 4096
            if part > size:
                part = size
            found += log_bytes(vq.log, vq.mem, <const uint8_t *> vq.used + offset, part, &outside)
            offset += part
            size -= part
        dirty_count(vq, found, outside)
        return
    if vq.log_used_gpa + offset < offset:
        dirty_count(vq, 0, 1)
        return
    found = log_pages(vq.log, vq.log_used_gpa + offset, size, &outside)
    dirty_count(vq, found, outside)


cdef inline void dirty_own(vring *vq, const uint8_t *hva, uint64_t size) noexcept nogil:
    """Log bytes of a packed ring by where they are, if the front-end wants its ring logged. After log_order.

    The front-end's address is for the used ring, and here that is the descriptors, which lie elsewhere.
    """
    cdef uint64_t outside = 0
    cdef uint32_t found
    if vq.log_used:
        found = log_bytes(vq.log, vq.mem, hva, size, &outside)
        dirty_count(vq, found, outside)
