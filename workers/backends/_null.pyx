"""The null back-end: counts what the guest sends and drops it. Nothing is ever received.

`null:copy` copies each frame to memory of its own first: what a back-end has to pay that cannot work on guest memory in
place.

Also the handler of a transmit ring that is started but disabled: vhost-user has it process and discard.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from vhostmp.shm.atomics cimport vmp_store_relaxed_u32
from vhostmp.shm.layout cimport VMP_DROP_DISABLED, VMP_DROP_NULL, VMP_DROP_SHORT
from vhostmp.workers._net cimport gather
from vhostmp.workers._vring cimport (
    BURST,
    READABLE,
    TOUCH,
    burst,
    chain,
    iovec,
    vring_call,
    vring_disable_notify,
    vring_fetch,
    vring_give_back,
    vring_publish,
)
from vhostmp.workers._work cimport (
    BROKEN,
    BUDGET_BYTES,
    BUDGET_PACKETS,
    DONE,
    MORE,
    WAIT,
    count_copied,
    count_drop,
    count_packets,
    worker,
    wring,
)


cdef inline uint64_t copy_out(const burst *b, const chain *c, uint32_t skip, uint8_t *to, uint64_t at) noexcept nogil:
    """Copy the frame of a chain, as much as there is room for, to `to + at`, or to `to`. Returns where it ends."""
    cdef uint32_t size = c.readable - skip
    cdef const iovec *segments = &b.segments[c.first]
    if size > COPIES_SIZE:
        size = COPIES_SIZE
    if at + size > COPIES_SIZE:
        at = 0
    if segments.iov_len == c.readable:
        memcpy(to + at, <const uint8_t *> segments.iov_base + skip, size)
    else:
        gather(segments, c.n_readable, skip, to + at, size)
    return at + size


cdef inline int discard(wring *r, worker *w, int reason, uint8_t *copies) noexcept nogil:
    """Take what is there and give it back; `copies` (NULL: none are made) has COPIES_SIZE bytes."""
    cdef burst *b = &w.tx
    cdef uint32_t header_len = r.dev.header_len
    cdef uint32_t packets = 0
    cdef uint32_t short = 0
    cdef uint64_t bytes_ = 0
    cdef uint64_t at
    cdef int direction = READABLE if copies is NULL else READABLE | TOUCH
    cdef int n
    cdef int i
    while packets < BUDGET_PACKETS and bytes_ < BUDGET_BYTES:
        n = vring_fetch(&r.vq, b, BURST, direction)
        if n <= 0:
            break
        at = 0
        for i in range(n):
            if b.chains[i].readable < header_len:
                short += 1
            else:
                bytes_ += b.chains[i].readable - header_len
                if copies is not NULL:
                    at = copy_out(b, &b.chains[i], header_len, copies, at)
        packets += <uint32_t> n
        vring_give_back(&r.vq, b, 0, <uint32_t> n)
        vring_publish(&r.vq)
        vring_call(&r.vq)
    else:
        n = 1
    if packets:
        count_packets(w, r, packets - short, bytes_)
        count_drop(r, reason, packets - short)
        if copies is not NULL:
            count_copied(r, bytes_)
        if short:
            count_drop(r, VMP_DROP_SHORT, short)
    return BROKEN if n < 0 else DONE if n == 0 else MORE


cdef int null_transmit(wring *r, worker *w) noexcept nogil:
    """Count and drop."""
    return discard(r, w, VMP_DROP_NULL, NULL)


cdef int copying_transmit(wring *r, worker *w) noexcept nogil:
    """Count, copy and drop."""
    return discard(r, w, VMP_DROP_NULL, <uint8_t *> r.backend)


cdef int disabled_transmit(wring *r, worker *w) noexcept nogil:
    """Drop: the ring is disabled (vhost-user, "Ring states")."""
    return discard(r, w, VMP_DROP_DISABLED, NULL)


cdef int idle_receive(wring *r, worker *w) noexcept nogil:
    """Leave the buffers where they are: nothing will ever be received."""
    vmp_store_relaxed_u32(&r.vq.slot.waiting, 0)    # what a back-end before this one held was dropped with it
    vring_disable_notify(&r.vq)
    return WAIT
