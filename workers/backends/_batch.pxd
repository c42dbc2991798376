"""Frames as a back-end in Python gets them in one piece: copied headers in an array, the frames as views beside it."""

from cpython.buffer cimport Py_buffer
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vhostmp.workers._vring cimport BURST, burst
from vhostmp.workers._work cimport worker, wring
from vhostmp.workers.backends._python cimport PythonPort


cdef enum:
    HEAD = 64                   # bytes of a frame that are copied
    BURSTS = 4                  # of a batch, at most
    BATCH = BURSTS * BURST      # frames


cdef struct frames:
    # A batch while nobody needs the GIL.
    burst *bursts               # as many as `most` needs
    uint8_t *heads              # HEAD bytes of each frame
    uint32_t *sizes             # bytes of each
    uint32_t most               # frames that the back-end wants at once
    uint32_t n
    uint32_t n_bursts
    uint32_t header_len         # of the virtio header, which stands before each frame in its chain
    uint64_t bytes_             # of all frames
    uint64_t begun              # how many frames each burst has: slot.begun_bursts
    uint16_t[BURSTS] ends       # vring.last_avail_idx behind each burst
    uint16_t[BATCH] chains      # of each frame, its number in its burst, and BURST times the number of that


cdef class Batch:
    cdef readonly object headers    # ndarray (n, 64) of uint8
    cdef readonly object lengths    # ndarray (n,) of uint32
    cdef list headers_of            # both by n, those that were needed so far
    cdef list lengths_of
    cdef object all_headers
    cdef object all_lengths
    cdef Py_buffer headers_buffer
    cdef Py_buffer lengths_buffer
    cdef frames f
    cdef list views

    cdef int show(self) except -1
    cdef bint end(self)


cdef class BatchPort(PythonPort):
    cdef Batch batch
    cdef frames *f              # of `batch`


cdef int batch_transmit(wring *r, worker *w) noexcept nogil
