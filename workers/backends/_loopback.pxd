"""Handlers of the loopback back-end."""

from vhostmp.workers._work cimport worker, wring


cdef int loopback_transmit(wring *r, worker *w) noexcept nogil
cdef int loopback_receive(wring *r, worker *w) noexcept nogil
