"""Handlers of the null back-end and of disabled transmit rings."""

from vhostmp.workers._work cimport worker, wring


cdef enum:
    COPIES_SIZE = 262144        # bytes


cdef int null_transmit(wring *r, worker *w) noexcept nogil
cdef int copying_transmit(wring *r, worker *w) noexcept nogil
cdef int disabled_transmit(wring *r, worker *w) noexcept nogil
cdef int idle_receive(wring *r, worker *w) noexcept nogil
