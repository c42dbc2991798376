"""fallocate(2), which Python lacks: holes and zeros in a file, or in a block device, without writing them."""

from libc.errno cimport errno

import os

cdef extern from "<fcntl.h>" nogil:
    int c_fallocate "fallocate" (int fd, int mode, long offset, long length)

cdef enum:
    KEEP_SIZE = 1       # linux/falloc.h
    PUNCH = 2
    ZERO = 16


def punch_hole(int fd, long offset, long length):
    """Give the blocks of a range back: it reads as zeros. OSError (EOPNOTSUPP) where that cannot be done."""
    _fallocate(fd, PUNCH | KEEP_SIZE, offset, length)


def zero_range(int fd, long offset, long length):
    """Have a range read as zeros, its blocks kept. OSError (EOPNOTSUPP) where that cannot be done."""
    _fallocate(fd, ZERO | KEEP_SIZE, offset, length)


cdef _fallocate(int fd, int mode, long offset, long length):
    cdef int result
    cdef int number
    with nogil:
        result = c_fallocate(fd, mode, offset, length)
        number = errno
    if result != 0:
        raise OSError(number, os.strerror(number))
