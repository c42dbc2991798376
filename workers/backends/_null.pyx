"""The null back-end: counts what the guest sends and drops it. Nothing is ever received.

Also the handler of a transmit ring that is started but disabled: vhost-user has it process and discard.
"""

from libc.stdint cimport uint32_t, uint64_t

from vhostmp.shm.atomics cimport vmp_store_relaxed_u32
from vhostmp.shm.layout cimport VMP_DROP_DISABLED, VMP_DROP_NULL, VMP_DROP_SHORT
from vhostmp.workers._vring cimport (
    BURST,
    READABLE,
    burst,
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
    count_drop,
    count_packets,
    worker,
    wring,
)


cdef inline int discard(wring *r, worker *w, int reason) noexcept nogil:
    cdef burst *b = &w.tx
    cdef uint32_t header_len = r.dev.header_len
    cdef uint32_t packets = 0
    cdef uint32_t short = 0
    cdef uint64_t bytes_ = 0
    cdef int n
    cdef int i
    while packets < BUDGET_PACKETS and bytes_ < BUDGET_BYTES:
        n = vring_fetch(&r.vq, b, BURST, READABLE)
        if n <= 0:
            break
        for i in range(n):
            if b.chains[i].readable < header_len:
                short += 1
            else:
                bytes_ += b.chains[i].readable - header_len
        packets += <uint32_t> n
        vring_give_back(&r.vq, b, 0, <uint32_t> n)
        vring_publish(&r.vq)
        vring_call(&r.vq)
    else:
        n = 1
    if packets:
        count_packets(w, r, packets - short, bytes_)
        count_drop(r, reason, packets - short)
        if short:
            count_drop(r, VMP_DROP_SHORT, short)
    return BROKEN if n < 0 else DONE if n == 0 else MORE


cdef int null_transmit(wring *r, worker *w) noexcept nogil:
    """Count and drop."""
    return discard(r, w, VMP_DROP_NULL)


cdef int disabled_transmit(wring *r, worker *w) noexcept nogil:
    """Drop: the ring is disabled (vhost-user, "Ring states")."""
    return discard(r, w, VMP_DROP_DISABLED)


cdef int idle_receive(wring *r, worker *w) noexcept nogil:
    """Leave the buffers where they are: nothing will ever be received."""
    vmp_store_relaxed_u32(&r.vq.slot.waiting, 0)    # what a back-end before this one held was dropped with it
    vring_disable_notify(&r.vq)
    return WAIT
