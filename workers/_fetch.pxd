"""Getting a frame's cache lines while the frame before it is copied.

Where a guest receives lies in another processor's cache, or far away. A copy waits for each line that it writes:
stores leave a processor in order, a few dozen at a time. Asked for a frame ahead, as many are on their way as the
processor can ask for. With lines to read it finds out by itself what comes next; to ask for them is worth it beside
lines to write, or where a system call copies. `vring_fetch` asks for the first TOUCHED_BYTES of each chain (TOUCH);
this is about the rest.

Only lines of segments, which have been checked. Nothing is loaded or stored, so nothing is decided by what is there.
"""

from libc.stdint cimport uint8_t, uint32_t, uintptr_t

from vhostmp.shm.atomics cimport vmp_prefetch_read, vmp_prefetch_write
from vhostmp.workers._vring cimport TOUCHED_BYTES, burst, iovec


cdef enum:
    FETCH_MAX = 2048            # bytes of a frame: more would push out what was asked for before
    LINE = 64


cdef inline void fetch_lines(const burst *b, uint32_t first, uint32_t size, bint to_write) noexcept nogil:
    """Ask for the lines of `size` bytes, from segment `first` of the burst on, but for those that were touched."""
    cdef const iovec *segment = &b.segments[first]
    cdef const iovec *end = &b.segments[b.n_segments]
    cdef size_t left = size if size < FETCH_MAX else FETCH_MAX
    cdef size_t part
    cdef uintptr_t at = <uintptr_t> segment.iov_base + TOUCHED_BYTES
    cdef uintptr_t stop
    while True:
        part = segment.iov_len if segment.iov_len < left else left
        stop = <uintptr_t> segment.iov_base + part
        at &= ~<uintptr_t> (LINE - 1)
        while at < stop:
            if to_write:
                vmp_prefetch_write(<const uint8_t *> at)
            else:
                vmp_prefetch_read(<const uint8_t *> at)
            at += LINE
        left -= part
        segment += 1
        if left == 0 or segment == end:
            return
        at = <uintptr_t> segment.iov_base


cdef inline void fetch_readable(const burst *b, uint32_t i) noexcept nogil:
    """Ask for what chain `i` of a burst has for us to read, if there is such a chain."""
    if i < b.n and b.chains[i].readable > TOUCHED_BYTES:
        fetch_lines(b, b.chains[i].first, b.chains[i].readable, False)


cdef inline void fetch_writable(const burst *b, uint32_t i, uint32_t size) noexcept nogil:
    """Ask for where `size` bytes will be written, chain `i` and what follows, if there is such a chain."""
    if i < b.n and size > TOUCHED_BYTES:
        fetch_lines(b, b.chains[i].first, size, True)
