"""Handlers of the source back-end."""

from libc.stdint cimport uint8_t, uint32_t

from vhostmp.workers._work cimport worker, wring


cdef enum:
    SOURCE_TEMPLATES = 32


cdef struct source_frames:
    uint32_t size               # of a frame, bytes
    uint8_t frames[1]           # SOURCE_TEMPLATES of them


cdef source_frames *source_new(uint32_t size) except NULL
cdef void source_free(source_frames *source) noexcept nogil
cdef int source_receive(wring *r, worker *w) noexcept nogil
