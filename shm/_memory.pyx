"""Guest memory mapped into this process.

A MemoryMap is made by a worker's channel thread when a memory table is prepared and closed when it is retired, a
grace period after the table was replaced. In between the data thread reads `mem` (immutable) without any lock.
"""

cimport cython
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, strerror

from vhostmp.shm._iotlb cimport ACCESS_BOTH, IOTLB_HIT, IOTLB_UNUSABLE, iotlb_find, vmp_iotlb_entry

import os

from vhostmp.errors import LocalError, SysError

cdef extern from "sys/mman.h" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int madvise(void *addr, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_NORESERVE, MADV_DONTDUMP
    void *MAP_FAILED


cdef const vmp_region *find_uva(const vmp_memory *mem, uint64_t uva) noexcept nogil:
    """The region of a front-end address; NULL: none."""
    cdef uint32_t low = 0
    cdef uint32_t high = mem.n
    cdef uint32_t middle
    cdef const vmp_region *region
    while low < high:
        middle = (low + high) // 2
        region = &mem.by_uva[middle]
        if uva < region.uva:
            high = middle
        elif uva - region.uva >= region.size:
            low = middle + 1
        else:
            return region
    return NULL


cdef uint8_t *iotlb_translate(
    const vmp_memory *mem, vmp_region_cache *cache, uint64_t iova, uint64_t access, uint64_t *run
) noexcept nogil:
    """memory_find behind an IOMMU. NULL: `cache.missed` says why, and at which address."""
    cdef vmp_iotlb_entry entry
    cdef const vmp_region *region = NULL
    cdef uint64_t before, after, uva
    cdef int result = iotlb_find(mem.iotlb, iova, access, &entry)
    if result == IOTLB_HIT:
        uva = entry.uva + (iova - entry.iova)
        region = find_uva(mem, uva)
        if region is NULL:
            result = IOTLB_UNUSABLE
    if result != IOTLB_HIT:
        cache.missed = <uint8_t> result
        cache.missed_iova = iova
        cache.missed_access = <uint8_t> access
        return NULL
    # What of the entry lies in the same region: so many bytes before the address, so many after it.
    before = iova - entry.iova
    if before > uva - region.uva:
        before = uva - region.uva
    after = entry.last - iova
    if after > region.size - 1 - (uva - region.uva):
        after = region.size - 1 - (uva - region.uva)
    cache.hits += 1
    if entry.access == ACCESS_BOTH:
        # Others are not remembered: whoever uses the memory does not ask again what is allowed.
        cache.gpa = iova - before
        cache.size = before + after + 1
        cache.hva = region.hva + (uva - region.uva) - before
    run[0] = after + 1
    return region.hva + (uva - region.uva)


cdef uint8_t *memory_span(
    const vmp_memory *mem, vmp_region_cache *cache, uint64_t gpa, uint64_t access, uint64_t size
) noexcept nogil:
    """Our address of `size` bytes at `gpa` when they follow each other in our memory, in whatever pieces. Else NULL.

    For the rings of a device behind an IOMMU, which are entered page by page. `cache.missed` is 0 when all pieces were
    found and do not follow each other.
    """
    cdef uint64_t run
    cdef uint8_t *start = NULL
    cdef uint8_t *hva
    cdef uint64_t found = 0
    if size == 0 or gpa + (size - 1) < gpa:
        return NULL
    while found < size:
        hva = memory_find(mem, cache, gpa + found, access, &run)
        if hva is NULL:
            return NULL
        if start is NULL:
            start = hva
        elif hva != start + found:
            return NULL
        found += run
    return start


cdef uint8_t *memory_find(
    const vmp_memory *mem, vmp_region_cache *cache, uint64_t gpa, uint64_t access, uint64_t *run
) noexcept nogil:
    """Find the region of `gpa` (binary search), remember it in `cache`, set `run` to the bytes from gpa to its end.

    NULL when no region holds `gpa`; what the cache says of regions is then untouched. `access` (ACCESS_ bits) counts
    behind an IOMMU alone: guest-physical memory may always be read and written.
    """
    cdef uint32_t low = 0
    cdef uint32_t high = mem.n
    cdef uint32_t middle
    cdef const vmp_region *region
    if mem.iotlb is not NULL:
        return iotlb_translate(mem, cache, gpa, access, run)
    while low < high:
        middle = (low + high) // 2
        region = &mem.regions[middle]
        if gpa < region.gpa:
            high = middle
        elif gpa - region.gpa >= region.size:
            low = middle + 1
        else:
            cache.gpa = region.gpa
            cache.size = region.size
            cache.hva = region.hva
            run[0] = region.size - (gpa - region.gpa)
            return region.hva + (gpa - region.gpa)
    return NULL


cdef bint memory_reverse(const vmp_memory *mem, const uint8_t *hva, uint64_t *gpa) noexcept nogil:
    """Set `gpa` to the guest's address of our address `hva`; False when no region holds it.

    Regions lie in our address space in no order, so each is looked at: for the dirty log, not for the data path.
    """
    cdef uint32_t i
    for i in range(mem.n):
        if <uint64_t> (hva - mem.regions[i].hva) < mem.regions[i].size:
            gpa[0] = mem.regions[i].gpa + <uint64_t> (hva - mem.regions[i].hva)
            return True
    return False


@cython.no_gc_clear     # __dealloc__ unmaps what `_maps` lists
cdef class MemoryMap:
    """The regions of a memory table, mapped."""

    def __cinit__(self):
        self.mem.n = 0
        self.mem.regions = NULL
        self.mem.by_uva = NULL
        self.mem.iotlb = NULL
        self._maps = []
        self._closed = False

    def __init__(self, regions):
        """Map each MemoryRegion of `regions` (checked and not overlapping), sorted here by gpa.

        Each file is mapped from its start to the region's end: mmap_offset need not be a multiple of the page size
        that way, nor of a huge page. Descriptors stay the caller's and may be closed at once.
        Raises SysError when a mapping fails; nothing stays mapped then.
        """
        cdef void *base
        cdef size_t length, block
        ordered = sorted(regions, key=lambda region: region.gpa)
        self.mem.regions = <vmp_region *> calloc(max(1, len(ordered)), sizeof(vmp_region))
        self.mem.by_uva = <vmp_region *> calloc(max(1, len(ordered)), sizeof(vmp_region))
        if self.mem.regions is NULL or self.mem.by_uva is NULL:
            raise MemoryError
        for region in ordered:
            block = max(4096, os.fstat(region.fd).st_blksize)
            length = (region.mmap_offset + region.size + block - 1) // block * block
            base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, region.fd, 0)
            if base == MAP_FAILED:
                reason = strerror(errno).decode()
                number = errno
                self.close()
                raise SysError(f"cannot map {length} bytes of guest memory at gpa {region.gpa:#x}: {reason}", number)
            madvise(base, length, MADV_DONTDUMP)
            self._maps.append((<uintptr_t> base, length))
            self.mem.regions[self.mem.n].gpa = region.gpa
            self.mem.regions[self.mem.n].size = region.size
            self.mem.regions[self.mem.n].uva = region.uva
            self.mem.regions[self.mem.n].hva = <uint8_t *> base + <uint64_t> region.mmap_offset
            self.mem.n += 1
        by_uva = sorted(range(self.mem.n), key=lambda i: ordered[i].uva)
        for place in range(self.mem.n):
            self.mem.by_uva[place] = self.mem.regions[<int> by_uva[place]]

    def __dealloc__(self):
        self._unmap()

    cdef _unmap(self):
        if self._closed:
            return
        self._closed = True
        for base, length in self._maps:
            munmap(<void *> <uintptr_t> base, length)
        self.mem.n = 0
        free(self.mem.regions)
        free(self.mem.by_uva)
        self.mem.regions = NULL
        self.mem.by_uva = NULL

    def close(self):
        """Unmap everything, with the last view that is held. Idempotent.

        The caller has made sure that nobody else uses an address of it.
        """
        self._closing = True
        if not self._held:
            self._unmap()

    cdef hold(self):
        """Keep it mapped until `let_go`, whoever closes it."""
        self._held += 1

    cdef let_go(self):
        """Undo one `hold`."""
        self._held -= 1
        if self._closing and not self._held:
            self._unmap()

    def mappings(self):
        """Return where each region's file is mapped, from its first byte on: (our address, bytes), by ascending gpa."""
        return list(self._maps)

    def translate(self, uint64_t gpa, uint64_t size):
        """Return our address of `size` bytes at guest-physical `gpa`, None unless they lie in one region."""
        cdef vmp_region_cache cache = vmp_region_cache(0, 0, NULL, 0, 0, 0, 0)
        cdef uint8_t *hva = memory_translate(&self.mem, &cache, gpa, size)
        return None if hva is NULL else <uintptr_t> hva

    def translate_uva(self, uint64_t uva, uint64_t size):
        """Return our address of `size` bytes at front-end address `uva`, None unless they lie in one region."""
        cdef uint64_t offset
        for i in range(self.mem.n):
            offset = uva - self.mem.regions[i].uva
            if offset < self.mem.regions[i].size and size <= self.mem.regions[i].size - offset:
                return <uintptr_t> (self.mem.regions[i].hva + offset)
        return None

    def read(self, uint64_t gpa, uint64_t size):
        """Copy `size` bytes out of guest memory; LocalError unless they lie in one region."""
        address = self.translate(gpa, size)
        if address is None:
            raise LocalError(f"gpa {gpa:#x} + {size} is not in one memory region")
        return (<char *> <uintptr_t> address)[:size]

    def write(self, uint64_t gpa, bytes data):
        """Copy `data` into guest memory; LocalError unless it fits in one region."""
        address = self.translate(gpa, len(data))
        if address is None:
            raise LocalError(f"gpa {gpa:#x} + {len(data)} is not in one memory region")
        memcpy(<void *> <uintptr_t> address, <const char *> data, len(data))
