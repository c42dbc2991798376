"""What the data thread says ahead of a fault: whose memory else it works on (_life.pyx)."""

from libc.stdint cimport uint32_t

#: Whether an address is in what belongs to something. Called in a signal handler, on the thread that faulted.
ctypedef bint (*owns_t)(const void *what, const void *address) noexcept nogil


cdef void life_beside(owns_t owns, const void *what, uint32_t doing) noexcept nogil
