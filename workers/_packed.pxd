"""The compiled packed virtqueue, device side: what `_vring` calls for a ring that negotiated RING_PACKED."""

from libc.stdint cimport uint32_t

from vhostmp.workers._vring cimport burst, vring


cdef int packed_fetch(vring *vq, burst *b, uint32_t most, int direction) noexcept nogil
cdef uint32_t packed_room(vring *vq) noexcept nogil
cdef void packed_give_back(vring *vq, const burst *b, uint32_t first, uint32_t n) noexcept nogil
cdef void packed_publish(vring *vq) noexcept nogil
cdef bint packed_wants_call(vring *vq) noexcept nogil
cdef void packed_enable_notify(vring *vq) noexcept nogil
cdef void packed_disable_notify(vring *vq) noexcept nogil
cdef void packed_attach(vring *vq) noexcept nogil
