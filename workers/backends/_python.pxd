"""Handlers of back-ends written in Python."""

from libc.stdint cimport uint64_t

from vhostmp.workers._work cimport worker, wring
from vhostmp.workers.backends._batch cimport Batch


cdef class PythonPort:
    cdef readonly object backend
    cdef readonly int queue
    cdef list pending           # frames that receive() returned and that wait for room, newest first
    cdef Batch batch            # None: transmit gets a list of views
    cdef uint64_t complained    # exceptions so far: they are logged at 1, 2, 4, 8, ...

    cdef void complain(self, str what) noexcept
    cdef list left(self)
    cdef void put_back(self, list frames)


cdef int python_transmit(wring *r, worker *w) noexcept nogil
cdef int python_receive(wring *r, worker *w) noexcept nogil
