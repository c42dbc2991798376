"""Batches of frames for `transmit_batch` of back-ends in Python: what to look at first is an array, the rest is views.

A view costs some 100 ns to make and to release, and reading a field of it through Python as much again; an array of all
headers costs a copy of 64 bytes a frame and is looked at by a few operations for all of them. What was copied does not
change under the reader, so it may be decided upon.

What NumPy's functions cost hardly depends on how many rows there are, up to some hundreds, so a batch is up to four
bursts: taken one after the other, handed over together, given back one after the other, each published before the next.
So nothing else has to know of more than a burst: not the journal, but for a word (`journal_begin_bursts`), nor the
batch of a packed ring, nor a front-end's region. A worker that dies in between leaves later bursts as if they had not
been taken.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from vhostmp.shm.build cimport vmp_kill_point
from vhostmp.shm.layout cimport VMP_DROP_BACKEND_ERROR, VMP_KILL_TRANSMITTED
from vhostmp.workers._journal cimport BURST_BITS, journal_begin_bursts, journal_next_burst
from vhostmp.workers._net cimport gather
from vhostmp.workers._vring cimport (
    BURST,
    READABLE,
    TOUCH,
    burst,
    chain,
    iovec,
    vring_call,
    vring_drained,
    vring_fetch,
    vring_give_back,
    vring_publish,
)
from vhostmp.workers._work cimport (
    BROKEN,
    BUDGET_PACKETS,
    DONE,
    MORE,
    WAIT,
    count_drop,
    count_packets,
    note_source,
    queue_ring,
    worker,
    wring,
)
from vhostmp.workers.backends._python cimport PythonPort, frame_size, receive_batch, room_for_answers, view_frame

from vhostmp.workers.backends.python_api import batch_size


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


cdef class Batch:
    """Frames that the guest sent, oldest first: `headers`, `lengths`, and each as a view by its number.

    `headers` is a NumPy array (n, 64) of uint8 with the first bytes of each frame, copied: the Ethernet header first,
    zeros behind a shorter frame. `lengths` has n numbers of type uint32, bytes of each frame. `batch[k]` is a read-only
    view of frame k in guest memory, made when it is asked for; `len(batch)` is n, 1 to 256, or
    to the class's `batch_size`.

    All of it is valid until transmit_batch returns: views are released, and the arrays are of the next batch then. Copy
    what you keep.
    """

    def __cinit__(self):
        memset(&self.f, 0, sizeof(self.f))

    def __init__(self, int most=BATCH):
        """Have room for `most` frames, 1 to 256. The module of the back-end has imported numpy (python_api.make)."""
        import numpy
        if not 0 < most <= BATCH or self.f.bursts is not NULL:
            raise ValueError(most)
        self.f.bursts = <burst *> malloc((most + BURST - 1) // BURST * sizeof(burst))
        if self.f.bursts is NULL:
            raise MemoryError
        self.f.most = most
        self.all_headers = numpy.zeros((most, HEAD), numpy.uint8)
        self.all_lengths = numpy.zeros(most, numpy.uint32)
        PyObject_GetBuffer(self.all_headers, &self.headers_buffer, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.f.heads = <uint8_t *> self.headers_buffer.buf
        PyObject_GetBuffer(self.all_lengths, &self.lengths_buffer, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.f.sizes = <uint32_t *> self.lengths_buffer.buf
        self.all_headers.flags.writeable = False
        self.all_lengths.flags.writeable = False
        self.headers_of = [None] * (most + 1)
        self.lengths_of = [None] * (most + 1)
        self.views = []
        self.show()

    def __dealloc__(self):
        if self.f.sizes is not NULL:
            PyBuffer_Release(&self.lengths_buffer)
        if self.f.heads is not NULL:
            PyBuffer_Release(&self.headers_buffer)
        free(self.f.bursts)

    cdef int show(self) except -1:
        """All frames are there."""
        cdef uint32_t n = self.f.n
        if self.headers_of[n] is None:
            self.lengths_of[n] = self.all_lengths[:n]
            self.headers_of[n] = self.all_headers[:n]
        self.headers = self.headers_of[n]
        self.lengths = self.lengths_of[n]
        return 0

    cdef bint end(self):
        """The frames go back to the guest: no view of them may be used any more. Whether somebody still does."""
        cdef bint kept = False
        for view in self.views:
            try:
                view.release()
            except BufferError:
                kept = True
        self.views.clear()
        self.f.n = 0
        self.headers = self.headers_of[0]
        self.lengths = self.lengths_of[0]
        return kept

    def __len__(self):
        return self.f.n

    def __iter__(self):
        for k in range(self.f.n):
            yield self[k]

    def __getitem__(self, Py_ssize_t k):
        cdef const burst *b
        cdef const chain *c
        cdef bint copied
        if k < 0:
            k += self.f.n
        if not 0 <= k < self.f.n:
            raise IndexError(f"frame {k} of a batch of {self.f.n}")
        b = &self.f.bursts[self.f.chains[k] // BURST]
        c = &b.chains[self.f.chains[k] % BURST]
        view = view_frame(&b.segments[c.first], c.n_readable, self.f.header_len, self.f.sizes[k], &copied)
        self.views.append(view)
        return view


cdef class BatchPort(PythonPort):
    """One queue pair of a back-end written in Python that takes batches."""

    def __init__(self, backend, int queue, complaints):
        """Serve queue pair `queue` with the instance `backend`."""
        PythonPort.__init__(self, backend, queue, complaints)
        self.batch = Batch(batch_size(type(backend)))
        self.f = &self.batch.f


cdef void add_frames(wring *r, frames *f, const burst *b) noexcept nogil:
    """Add the frames of burst `n_bursts`, which is `b`, to the batch; what cannot be one is dropped, and counted."""
    cdef uint32_t first = f.n
    cdef const iovec *out
    cdef const chain *c
    cdef uint32_t i
    cdef int size
    for i in range(b.n):
        c = &b.chains[i]
        out = &b.segments[c.first]
        size = frame_size(r, c, out)
        if size < 0:
            continue
        batch_head(out, c.n_readable, f.header_len, f.heads + f.n * HEAD, <uint32_t> size)
        f.sizes[f.n] = <uint32_t> size
        f.chains[f.n] = <uint16_t> (f.n_bursts * BURST + i)
        f.bytes_ += <uint32_t> size
        f.n += 1
    f.begun |= <uint64_t> (f.n - first) << f.n_bursts * BURST_BITS


cdef int fetch_frames(wring *r, frames *f, uint32_t most) noexcept nogil:
    """Take up to `most` chains, and their frames into the batch. Returns how many, as vring_fetch does."""
    cdef uint32_t total = 0
    cdef burst *b
    cdef int n
    f.n = 0
    f.n_bursts = 0
    f.bytes_ = 0
    f.begun = 0
    f.header_len = r.dev.header_len
    while total < most and f.n_bursts < (f.most + BURST - 1) // BURST:
        b = &f.bursts[f.n_bursts]
        n = vring_fetch(&r.vq, b, min(most - total, <uint32_t> BURST), READABLE | TOUCH)
        if n <= 0:
            return <int> total if total else n      # a driver that broke the ring is still found out by the next fetch
        f.ends[f.n_bursts] = r.vq.last_avail_idx
        add_frames(r, f, b)
        f.n_bursts += 1
        total += <uint32_t> n
        if vring_drained(&r.vq):
            break
    return <int> total


cdef void hand_over(wring *r, worker *w, BatchPort port) noexcept:
    """Hand the batch to the back-end. Whatever is raised: the caller gives all of it back."""
    cdef frames *f = port.f
    cdef uint32_t packets = f.n
    note_source(r, f.heads)
    try:
        port.batch.show()
        port.backend.transmit_batch(port.queue, port.batch)
        vmp_kill_point(r.vq.slot, VMP_KILL_TRANSMITTED)
        count_packets(w, r, packets, f.bytes_)
    except BaseException:       # SystemExit too: a back-end does not end the worker
        port.complaints.failed("transmit")
        count_drop(r, VMP_DROP_BACKEND_ERROR, packets)
        w.moved += packets
    if port.batch.end():
        port.tell_kept()


cdef int batch_transmit(wring *r, worker *w) noexcept nogil:
    """Give what the driver made available to the back-end's transmit_batch."""
    cdef frames *f = (<BatchPort> r.backend).f
    cdef wring *peer = r.partner
    cdef uint32_t done = 0
    cdef uint32_t most, i
    cdef int n
    while done < BUDGET_PACKETS:
        most = room_for_answers(r, w, min(f.most, BUDGET_PACKETS - done))
        if most == 0:
            return WAIT
        n = fetch_frames(r, f, most)
        if n <= 0:
            return BROKEN if n < 0 else DONE
        done += <uint32_t> n
        if f.n:
            journal_begin_bursts(&r.vq, f.begun)
            with gil:
                hand_over(r, w, <BatchPort> r.backend)
        for i in range(f.n_bursts):
            r.vq.last_avail_idx = f.ends[i]     # what comes after it is not taken, for who finds the slot so
            vring_give_back(&r.vq, &f.bursts[i], 0, f.bursts[i].n)
            vring_publish(&r.vq)
            journal_next_burst(&r.vq)
        vring_call(&r.vq)
        if peer.active:
            # As often as there are bursts: answers to all of a batch go with it, not into the next swap.
            n = MORE
            i = f.n_bursts
            with gil:
                while n == MORE and i:
                    n = receive_batch(peer, w, <PythonPort> r.backend)
                    i -= 1
            if n == BROKEN:
                return MORE     # the loop stops the broken ring
            if n != WAIT:
                queue_ring(w, peer)
    return MORE
