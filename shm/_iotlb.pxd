"""The compiled IOTLB: what a device behind an IOMMU may reach, from I/O virtual to front-end addresses.

Shared memory of its own: written by the control process, read by workers inside their read-side sections.
"""

from libc.stdint cimport uint32_t, uint64_t


cdef enum:
    IOTLB_ENTRIES_MAX = 2048

    # What an entry allows, and what an access needs: the bits of vhost's VHOST_ACCESS_.
    ACCESS_READ = 1
    ACCESS_WRITE = 2
    ACCESS_BOTH = 3

    # What a look-up found out.
    IOTLB_HIT = 0
    IOTLB_MISS = 1          # nothing there, or it does not allow the access: the front-end is to be asked
    IOTLB_UNUSABLE = 2      # an entry, but what it names is not in guest memory
    IOTLB_BUSY = 3          # the table changed again and again: try later


cdef struct vmp_iotlb_entry:
    uint64_t iova
    uint64_t last           # the last byte, so that the topmost entry has no end that wraps
    uint64_t uva
    uint64_t access


cdef struct vmp_iotlb:
    uint32_t seq            # odd while the table is written; it names the table's content otherwise
    uint32_t n
    uint64_t reserved[7]
    vmp_iotlb_entry entries[IOTLB_ENTRIES_MAX]      # by ascending iova, not overlapping


cdef int iotlb_find(const vmp_iotlb *table, uint64_t iova, uint64_t access, vmp_iotlb_entry *found) noexcept nogil
cdef uint32_t iotlb_version(const vmp_iotlb *table) noexcept nogil


cdef class IotlbTable:
    cdef vmp_iotlb *table
    cdef readonly int fd
    cdef uint64_t ages[IOTLB_ENTRIES_MAX]
    cdef uint64_t age
    cdef readonly uint64_t evicted
    cdef void _begin(self) noexcept nogil
    cdef void _end(self) noexcept nogil
    cdef void _put(self, uint32_t at, const vmp_iotlb_entry *entry, uint64_t age) noexcept nogil
    cdef uint32_t _remove(self, uint64_t first, uint64_t last) noexcept nogil
    cdef void _insert(self, const vmp_iotlb_entry *entry) noexcept nogil
    cdef void _evict(self) noexcept nogil
