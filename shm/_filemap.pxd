"""A piece of a file of the front-end's, mapped."""

from libc.stdint cimport uint8_t, uint64_t


cdef class FileMap:
    cdef uint8_t *at            # our address of its first byte; NULL once it is closed
    cdef uint64_t size          # bytes
    cdef void *_base
    cdef size_t _length
