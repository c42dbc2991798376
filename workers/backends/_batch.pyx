"""Batches of frames for `transmit_batch` of back-ends in Python: what to look at first is an array, the rest is views.

A view costs some 100 ns to make and to release, and reading a field of it through Python as much again; an array of all
headers costs a copy of 64 bytes a frame and is looked at by a few operations for all of them. What was copied does not
change under the reader, so it may be decided upon.
"""

from cpython.buffer cimport PyBUF_READ, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset

from vhostmp.workers._net cimport gather


cdef void batch_head(const iovec *out, uint32_t n, uint32_t skip, uint8_t *to, uint32_t size) noexcept nogil:
    """Copy the first HEAD bytes of a frame; of a shorter one the rest is 0."""
    if size >= HEAD and out.iov_len >= skip + HEAD:
        memcpy(to, <const uint8_t *> out.iov_base + skip, HEAD)
        return
    if size < HEAD:
        memset(to + size, 0, HEAD - size)
    else:
        size = HEAD
    gather(out, n, skip, to, size)


cdef object view_frame(const iovec *out, uint32_t n, uint32_t header_len, uint32_t size, bint *copied):
    """Return a read-only view of a frame: of guest memory in place, or, where it lies in pieces, of a copy."""
    cdef bytearray copy
    copied[0] = False
    if out.iov_len >= header_len + size:
        return PyMemoryView_FromMemory(<char *> out.iov_base + header_len, size, PyBUF_READ)
    if out.iov_len == header_len and n == 2:
        return PyMemoryView_FromMemory(<char *> out[1].iov_base, size, PyBUF_READ)
    copy = bytearray(size)
    gather(out, n, header_len, copy, size)
    copied[0] = True
    return memoryview(copy).toreadonly()


cdef class Batch:
    """Frames that the guest sent, oldest first: `headers`, `lengths`, and each as a view by its number.

    `headers` is a NumPy array (n, 64) of uint8 with the first bytes of each frame, copied: the Ethernet header first,
    zeros behind a shorter frame. `lengths` has n numbers of type uint32, bytes of each frame. `batch[k]` is a read-only
    view of frame k in guest memory, made when it is asked for; `len(batch)` is n, 1 to 64.

    All of it is valid until transmit_batch returns: views are released, and the arrays are of the next batch then. Copy
    what you keep.
    """

    def __cinit__(self):
        self.at = NULL
        self.sizes = NULL

    def __init__(self):
        """Have room for a burst. The module of the back-end has imported numpy (python_api.make)."""
        import numpy
        self.all_headers = numpy.zeros((BURST, HEAD), numpy.uint8)
        self.all_lengths = numpy.zeros(BURST, numpy.uint32)
        PyObject_GetBuffer(self.all_headers, &self.headers_buffer, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.at = <uint8_t *> self.headers_buffer.buf
        PyObject_GetBuffer(self.all_lengths, &self.lengths_buffer, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.sizes = <uint32_t *> self.lengths_buffer.buf
        self.all_headers.flags.writeable = False
        self.all_lengths.flags.writeable = False
        self.headers_of = [self.all_headers[:n] for n in range(BURST + 1)]
        self.lengths_of = [self.all_lengths[:n] for n in range(BURST + 1)]
        self.views = []
        self.n = 0
        self.show()

    def __dealloc__(self):
        if self.sizes is not NULL:
            PyBuffer_Release(&self.lengths_buffer)
        if self.at is not NULL:
            PyBuffer_Release(&self.headers_buffer)

    cdef void begin(self, const burst *b, uint32_t header_len):
        """Be about to get frames of a burst; the one before has ended."""
        self.b = b
        self.header_len = header_len

    cdef void show(self):
        """All frames are there."""
        self.headers = self.headers_of[self.n]
        self.lengths = self.lengths_of[self.n]

    cdef bint end(self):
        """The burst goes back to the guest: no view of it may be used any more. Whether somebody still does."""
        cdef bint kept = False
        for view in self.views:
            try:
                view.release()
            except BufferError:
                kept = True
        self.views.clear()
        self.n = 0
        self.show()
        return kept

    def __len__(self):
        return self.n

    def __iter__(self):
        for k in range(self.n):
            yield self[k]

    def __getitem__(self, Py_ssize_t k):
        cdef const iovec *out
        cdef uint32_t i
        cdef bint copied
        if k < 0:
            k += self.n
        if not 0 <= k < self.n:
            raise IndexError(f"frame {k} of a batch of {self.n}")
        i = self.chains[k]
        out = &self.b.segments[self.b.chains[i].first]
        view = view_frame(out, self.b.chains[i].n_readable, self.header_len, self.sizes[k], &copied)
        self.views.append(view)
        return view
