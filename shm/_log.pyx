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

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vhostmp.shm._filemap cimport FileMap
from vhostmp.shm._memory cimport memory_reverse
from vhostmp.shm.atomics cimport vmp_load_relaxed_u8, vmp_or_full_u8

cdef enum:
    PAGE_SHIFT = 12     # of the log, whatever the machine's (vhost-user, "Migration")


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


cdef class LogMap(FileMap):
    """A dirty log, mapped; or one without any bit, when there is none to map."""

    def __cinit__(self):
        self.log.bits = NULL
        self.log.pages = 0

    def __init__(self, int fd=-1, uint64_t size=0, uint64_t offset=0):
        """Map `size` bytes from byte `offset` of the file; without a descriptor every address is outside the log.

        As FileMap otherwise.
        """
        if fd < 0:
            return
        FileMap.__init__(self, fd, size, offset, "a dirty log")
        self.log.bits = self.at
        self.log.pages = size * 8

    def close(self):
        """Unmap. Idempotent. The caller has made sure that nobody writes to it."""
        self.log.bits = NULL
        self.log.pages = 0
        FileMap.close(self)

    def mark(self, uint64_t gpa, uint64_t size):
        """Set the bits of the pages that `size` bytes at `gpa` touch. Returns (bits that were clear, pages outside)."""
        cdef uint64_t outside = 0
        log_order()
        found = log_pages(&self.log, gpa, size, &outside)
        return found, outside
