"""A piece of a file of the front-end's, mapped into this process for reading and writing.

For what a front-end shares beside guest memory: the dirty log, and the region of what is in flight. A worker's channel
thread makes one when a configuration needs it and closes it a grace period after the last one that did; in between the
data thread uses it without any lock. The file is the front-end's: one that is made shorter kills who touches what is
gone (vhostmp/supervisor.py).
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport strerror

import os

from vhostmp.errors import SysError

cdef extern from "sys/mman.h" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int madvise(void *addr, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MADV_DONTDUMP
    void *MAP_FAILED

cdef enum:
    MAPPING_UNIT = 4096


cdef class FileMap:
    """Some bytes of a file, mapped."""

    def __cinit__(self):
        self.at = NULL
        self.size = 0
        self._base = NULL
        self._length = 0

    def __init__(self, int fd, uint64_t size, uint64_t offset, str what="a file"):
        """Map `size` bytes from byte `offset` of the file, which need not be a multiple of the page size.

        The caller has checked that the file is that long; the descriptor stays the caller's and may be closed at once.
        Raises SysError, which names it as `what`, when it cannot be mapped.
        """
        cdef uint64_t block, start
        cdef void *base
        block = max(MAPPING_UNIT, os.fstat(fd).st_blksize)
        start = offset // block * block
        self._length = (offset - start + size + block - 1) // block * block
        base = mmap(NULL, self._length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, <long> start)
        if base == MAP_FAILED:
            raise SysError(f"cannot map {what} of {size} bytes at {offset:#x}: {strerror(errno).decode()}", errno)
        self._base = base
        madvise(base, self._length, MADV_DONTDUMP)
        self.at = <uint8_t *> base + (offset - start)
        self.size = size

    def __dealloc__(self):
        if self._base is not NULL:
            munmap(self._base, self._length)

    def close(self):
        """Unmap. Idempotent. The caller has made sure that nobody uses it."""
        if self._base is not NULL:
            munmap(self._base, self._length)
        self._base = NULL
        self.at = NULL
