"""The compiled memory table: mapped regions and the translation of guest addresses to ours."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vhostmp.shm._iotlb cimport ACCESS_READ, vmp_iotlb


cdef struct vmp_region:
    uint64_t gpa
    uint64_t size
    uint64_t uva
    uint8_t *hva            # our address of its first byte


cdef struct vmp_memory:
    uint32_t n
    vmp_region *regions     # by ascending gpa, not overlapping
    vmp_region *by_uva      # the same by ascending uva
    const vmp_iotlb *iotlb  # NULL: addresses are guest-physical; else they are translated by it first


cdef struct vmp_region_cache:
    # The last region that a ring's addresses fell into. Zeroed (size 0) whenever the ring gets another table. Behind an
    # IOMMU: the last entry that may be read and written, zeroed whenever the IOTLB has changed.
    uint64_t gpa
    uint64_t size
    uint8_t *hva
    # Behind an IOMMU only: what was missed, until the caller looks, and how many look-ups hit.
    uint64_t missed_iova
    uint64_t hits
    uint8_t missed_access
    uint8_t missed              # IOTLB_MISS, IOTLB_UNUSABLE or IOTLB_BUSY; 0: nothing was


cdef bint memory_reverse(const vmp_memory *mem, const uint8_t *hva, uint64_t *gpa) noexcept nogil
cdef uint8_t *memory_find(
    const vmp_memory *mem, vmp_region_cache *cache, uint64_t gpa, uint64_t access, uint64_t *run
) noexcept nogil
cdef uint8_t *memory_span(
    const vmp_memory *mem, vmp_region_cache *cache, uint64_t gpa, uint64_t access, uint64_t size
) noexcept nogil


cdef inline uint8_t *memory_translate(
    const vmp_memory *mem, vmp_region_cache *cache, uint64_t gpa, uint64_t size
) noexcept nogil:
    """Our address of `size` bytes to read at `gpa` when they lie in one region, else NULL. No sum can wrap."""
    cdef uint64_t offset = gpa - cache.gpa
    cdef uint64_t run
    cdef uint8_t *hva
    if offset < cache.size and size <= cache.size - offset:
        return cache.hva + offset
    hva = memory_find(mem, cache, gpa, ACCESS_READ, &run)
    if hva is NULL or run < size:
        return NULL
    return hva


cdef class MemoryMap:
    cdef vmp_memory mem
    cdef list _maps
    cdef bint _closed
    cdef Py_ssize_t _held       # views of it that Python code still has
    cdef bint _closing          # to be unmapped with the last of them
    cdef hold(self)
    cdef let_go(self)
    cdef _unmap(self)
