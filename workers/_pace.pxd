"""How long a worker that polls leaves its drivers alone.

Each look takes a cache line from a driver that is about to write it, and a handful of packets costs as many of them as
a burst: who looks whenever he can takes what there is in small pieces, and slows both down, by a fifth where processors
are far apart. So after a work item that moved n packets nobody looks for n times PACE_NS. Where that many come in less
time bursts grow, to what PACE_MAX_NS allows; at lower rates it is next to nothing. A driver is not made to wait by it:
after a quarter of its ring in one item there is no pause.
"""

from libc.stdint cimport uint32_t, uint64_t

from vhostmp.shm.atomics cimport vmp_cpu_relax, vmp_now_ns
from vhostmp.workers._work cimport worker, wring


cdef enum:
    PACE_NS = 200               # a packet: it matters from 5 million packets a second on
    PACE_MAX_NS = 8000
    PACE_SHARE = 4
    POLL_NS = 256               # about what a look at the polled rings takes


cdef inline void set_pace(worker *w, const wring *r) noexcept nogil:
    """After an item of ring `r` that moved packets."""
    w.pace_ns = 0
    if w.moved < <uint32_t> r.vq.num // PACE_SHARE:
        w.pace_ns = min(<uint64_t> w.moved * <uint64_t> PACE_NS, <uint64_t> PACE_MAX_NS)


cdef inline uint32_t keep_pace(worker *w) noexcept nogil:
    """Wait until rings may be polled. Returns how many polls the time would have been good for, at least 1."""
    cdef uint64_t pace = w.pace_ns
    if pace == 0:
        vmp_cpu_relax()
        vmp_cpu_relax()
        vmp_cpu_relax()
        vmp_cpu_relax()
        return 1
    w.pace_ns = 0
    while vmp_now_ns() - w.last_ns < pace:
        vmp_cpu_relax()
    return 1 + <uint32_t> pace // POLL_NS
