"""A packed ring's region of what is in flight: what `_packed` calls for a ring whose front-end keeps one."""

from libc.stdint cimport uint16_t, uint32_t

from vhostmp.workers._vring cimport vring


cdef void region_note(vring *vq, uint16_t n) noexcept nogil
cdef void region_stage(vring *vq, uint16_t start, uint16_t end) noexcept nogil
cdef void region_commit(vring *vq, uint16_t end, uint32_t n) noexcept nogil
cdef void region_begin(vring *vq, uint16_t position) noexcept nogil
cdef void region_settle(vring *vq, uint16_t position) noexcept nogil
cdef int region_recover(vring *vq, uint16_t *position) noexcept nogil
