"""Handlers of back-ends written in Python."""

from libc.stdint cimport uint32_t

from vhostmp.workers._vring cimport chain, iovec
from vhostmp.workers._work cimport worker, wring


cdef class PythonPort:
    cdef readonly object backend
    cdef readonly int queue
    cdef readonly object complaints
    cdef list pending           # frames that receive() returned and that wait for room, newest first
    cdef bint waits             # whether there are any: for who has no GIL

    cdef void tell_kept(self) noexcept
    cdef list left(self)
    cdef void put_back(self, list frames)


cdef int frame_size(wring *r, const chain *c, const iovec *out) noexcept nogil
cdef object view_frame(const iovec *out, uint32_t n, uint32_t header_len, uint32_t size, bint *copied)
cdef uint32_t room_for_answers(wring *r, worker *w, uint32_t most) noexcept nogil
cdef int receive_batch(wring *r, worker *w, PythonPort port) noexcept
cdef int python_transmit(wring *r, worker *w) noexcept nogil
cdef int python_receive(wring *r, worker *w) noexcept nogil
