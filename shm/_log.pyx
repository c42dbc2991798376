"""The dirty log mapped into this process, and setting bits in it.

What it is for: a front-end that migrates a guest copies its memory while the guest runs, and again the pages that were
written meanwhile. What a device writes it cannot see, so we say: one bit a page of 4096 bytes in shared memory that the
front-end gave us, the bit of page `n` being bit `n % 8` of byte `n // 8`, whatever pages the guest itself uses.

Rules:
- Addresses are guest-physical. The log's length is the front-end's to choose: an address beyond it is counted by the
  caller's counter and otherwise ignored; nothing is ever written past the end.
- A bit that is set already is only looked at: the front-end clears bits seldom, and a write to the line would take it
  away from the other workers that log. `log_order` says why that is safe.
- A LogMap is made by a worker's channel thread when a log is prepared, and closed when it is retired, a grace period
  after it was replaced or logging ended. In between the data thread writes through `log` without any lock.
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport strerror

import os

from vhostmp.shm._memory cimport memory_reverse
from vhostmp.shm.atomics cimport vmp_load_relaxed_u8, vmp_or_full_u8

from vhostmp.errors import SysError

cdef extern from "sys/mman.h" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int madvise(void *addr, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MADV_DONTDUMP
    void *MAP_FAILED

cdef enum:
    PAGE_SHIFT = 12     # of the log, whatever the machine's (vhost-user, "Migration")
    MAPPING_UNIT = 4096


cdef uint32_t log_pages(const vmp_log *log, uint64_t gpa, uint64_t size, uint64_t *outside) noexcept nogil:
    """Set the bits of the pages that `size` bytes at `gpa` touch, after `log_order`. Returns how many were clear.

    Pages without a bit are added to `outside`; so is, as one, a range that wraps.
    """
    cdef uint64_t page, last
    cdef uint32_t found = 0
    cdef uint8_t bit
    cdef uint8_t *at
    if size == 0:
        return 0
    if gpa + (size - 1) < gpa:
        outside[0] += 1
        return 0
    page = gpa >> PAGE_SHIFT
    last = (gpa + (size - 1)) >> PAGE_SHIFT
    if last >= log.pages:
        outside[0] += last - max(page, log.pages) + 1
        if page >= log.pages:
            return 0
        last = log.pages - 1
    while page <= last:
        at = log.bits + (page >> 3)
        bit = <uint8_t> (1 << (page & 7))
        if not vmp_load_relaxed_u8(at) & bit:
            # ORDER W1 (writer): as in log_order. The fence before it is what orders; the operation is atomic because
            # other workers set, and the front-end clears, other bits of the same byte.
            vmp_or_full_u8(at, bit)
            found += 1
        page += 1
    return found


cdef uint32_t log_bytes(
    const vmp_log *log, const vmp_memory *mem, const uint8_t *hva, uint64_t size, uint64_t *outside
) noexcept nogil:
    """`log_pages` for `size` bytes at our own address `hva`, which lie in one region of `mem`."""
    cdef uint64_t gpa
    if not memory_reverse(mem, hva, &gpa):
        outside[0] += 1
        return 0
    return log_pages(log, gpa, size, outside)


cdef class LogMap:
    """A dirty log, mapped; or one without any bit, when there is none to map."""

    def __cinit__(self):
        self._base = NULL
        self._length = 0
        self.log.bits = NULL
        self.log.pages = 0

    def __init__(self, int fd=-1, uint64_t size=0, uint64_t offset=0):
        """Map `size` bytes from byte `offset` of the file, which need not be a multiple of the page size.

        The caller has checked that the file is that long; the descriptor stays the caller's and may be closed at once.
        Without a descriptor every address is outside the log. Raises SysError when it cannot be mapped.
        """
        cdef uint64_t block, start
        cdef void *base
        if fd < 0:
            return
        block = max(MAPPING_UNIT, os.fstat(fd).st_blksize)
        start = offset // block * block
        self._length = (offset - start + size + block - 1) // block * block
        base = mmap(NULL, self._length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, <long> start)
        if base == MAP_FAILED:
            raise SysError(f"cannot map a dirty log of {size} bytes at {offset:#x}: {strerror(errno).decode()}", errno)
        self._base = base
        madvise(base, self._length, MADV_DONTDUMP)
        self.log.bits = <uint8_t *> base + (offset - start)
        self.log.pages = size * 8

    def __dealloc__(self):
        self.close()

    def close(self):
        """Unmap. Idempotent. The caller has made sure that nobody writes to it."""
        if self._base is not NULL:
            munmap(self._base, self._length)
        self._base = NULL
        self.log.bits = NULL
        self.log.pages = 0

    def mark(self, uint64_t gpa, uint64_t size):
        """Set the bits of the pages that `size` bytes at `gpa` touch. Returns (bits that were clear, pages outside)."""
        cdef uint64_t outside = 0
        log_order()
        found = log_pages(&self.log, gpa, size, &outside)
        return found, outside
