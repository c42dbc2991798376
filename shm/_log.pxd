"""The compiled dirty log: bits that say which pages of guest memory were written.

Sequence, always: the writes, `log_order`, then the bits. One `log_order` is enough for any number of bits.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vhostmp.shm._filemap cimport FileMap
from vhostmp.shm._memory cimport vmp_memory
from vhostmp.shm.atomics cimport vmp_fence_full


cdef struct vmp_log:
    uint8_t *bits           # our address of the log's first byte; bit 0 of it is the page at guest-physical 0
    uint64_t pages          # how many pages have a bit: 8 a byte


cdef uint32_t log_pages(const vmp_log *log, uint64_t gpa, uint64_t size, uint64_t *outside) noexcept nogil
cdef uint32_t log_bytes(
    const vmp_log *log, const vmp_memory *mem, const uint8_t *hva, uint64_t size, uint64_t *outside
) noexcept nogil


cdef inline void log_order() noexcept nogil:
    """Between writes to guest memory and the bits of their pages."""
    # ORDER W1 (writer): store to guest memory, then load the page's bit               [full fence between]
    #   pairs with  the front-end: the bit cleared by an exchange, a full barrier, then the page copied (QEMU
    #               hw/virtio/vhost.c, vhost_dev_sync_region: qatomic_xchg; tests/unit/shm/_cleaner.pyx)
    #   without it  the load may pass the store. We see the bit set and leave it; the front-end has cleared it meanwhile
    #               and copies the page as it was before: the write is lost. With a fence on both sides one of the two
    #               sees the other: either we find the bit clear and set it again, or the copy has the write.
    #   not needed  between the loads of several bits, nor for what the kernel wrote for us: its system call is over.
    #   shown by    tests/unit/shm/test_log.py::test_no_write_is_lost_to_a_cleaner
    vmp_fence_full()


cdef class LogMap(FileMap):
    cdef vmp_log log
