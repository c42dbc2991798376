"""Frames as a back-end in Python gets them in one piece: copied headers in an array, the frames as views beside it."""

from cpython.buffer cimport Py_buffer
from libc.stdint cimport uint8_t, uint16_t, uint32_t

from vhostmp.workers._vring cimport BURST, burst, iovec


cdef enum:
    HEAD = 64                   # bytes of a frame that are copied


cdef class Batch:
    cdef readonly object headers    # ndarray (n, 64) of uint8
    cdef readonly object lengths    # ndarray (n,) of uint32
    cdef list headers_of            # both by n
    cdef list lengths_of
    cdef object all_headers
    cdef object all_lengths
    cdef Py_buffer headers_buffer
    cdef Py_buffer lengths_buffer
    cdef uint8_t *at                # of all_headers
    cdef uint32_t *sizes            # of all_lengths
    cdef const burst *b
    cdef uint32_t header_len        # of the virtio header, which stands before each frame in its chain
    cdef uint32_t n
    cdef uint16_t[BURST] chains     # of each frame, its number in the burst
    cdef list views

    cdef void begin(self, const burst *b, uint32_t header_len)
    cdef void show(self)
    cdef bint end(self)


cdef inline void batch_add(Batch batch, uint32_t i, uint32_t size) noexcept:
    """Add the frame of chain `i`, which has `size` bytes, at least an Ethernet header."""
    cdef const iovec *out = &batch.b.segments[batch.b.chains[i].first]
    cdef uint8_t *to = batch.at + batch.n * HEAD
    batch_head(out, batch.b.chains[i].n_readable, batch.header_len, to, size)
    batch.sizes[batch.n] = size
    batch.chains[batch.n] = <uint16_t> i
    batch.n += 1


cdef void batch_head(const iovec *out, uint32_t n, uint32_t skip, uint8_t *to, uint32_t size) noexcept nogil
cdef object view_frame(const iovec *out, uint32_t n, uint32_t header_len, uint32_t size, bint *copied)
