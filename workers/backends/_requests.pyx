"""The data path of devices whose requests are served in Python: chains as lists of views of guest memory.

Runs on the data thread inside a work item, with the GIL. A request's views show guest memory in place; they are
released when `process` returns, so that none of them outlives the read-side section. All of them are views of one
`_Lender`, which counts who looks: a slice that is still held afterwards is found and complained of, and the memory that
it shows stays mapped in this worker until it is let go.
"""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, Py_buffer, PyBuffer_FillInfo
from cpython.memoryview cimport PyMemoryView_FromObject
from libc.stdint cimport uint32_t, uint64_t

from vhostmp.shm._memory cimport MemoryMap
from vhostmp.shm.build cimport vmp_kill_point
from vhostmp.shm.layout cimport VMP_DROP_BACKEND_ERROR, VMP_KILL_PROCESSED
from vhostmp.workers._config cimport Backend
from vhostmp.workers._dirty cimport dirty_segments
from vhostmp.workers._journal cimport KIND_REPEATED, journal_begin, journal_drop
from vhostmp.workers._vring cimport (
    BURST,
    EITHER,
    burst,
    chain,
    iovec,
    vring_call,
    vring_disable_notify,
    vring_drained,
    vring_fetch,
    vring_give_back,
    vring_publish,
    vring_unfetch,
)
from vhostmp.workers._work cimport (
    BROKEN,
    BUDGET_BYTES,
    BUDGET_PACKETS,
    DONE,
    MORE,
    WAIT,
    count_drop,
    count_packets,
    queue_ring,
    ring_config,
    worker,
    wring,
)

from vhostmp.workers.backends import python_api
from vhostmp.workers.backends.complaints import Complaints

cdef char NOTHING = 0


@cython.no_gc_clear     # views may be cleared after it: `memory` must still be there
cdef class _Lender:
    """What the views of requests are views of. `held` is how many of them, and of their slices' owners, there are."""

    cdef MemoryMap memory
    cdef void *at
    cdef Py_ssize_t size
    cdef bint writable
    cdef Py_ssize_t held

    def __cinit__(self, MemoryMap memory not None):
        self.memory = memory
        self.at = &NOTHING
        self.size = 0
        self.held = 0

    def __getbuffer__(self, Py_buffer *view, int flags):
        if flags & PyBUF_WRITABLE and not self.writable:
            raise BufferError("the driver gave this memory to be read")
        PyBuffer_FillInfo(view, self, self.at, self.size, not self.writable, flags)
        self.held += 1
        self.memory.hold()

    def __releasebuffer__(self, Py_buffer *view):
        self.held -= 1
        self.memory.let_go()

    cdef object lend(self, const iovec *segment, bint writable):
        """Return a view of one segment. Afterwards there is nothing to be seen through the lender itself."""
        self.at = segment.iov_base
        self.size = <Py_ssize_t> segment.iov_len
        self.writable = writable
        view = PyMemoryView_FromObject(self)
        self.at = &NOTHING
        self.size = 0
        self.writable = False
        return view


cdef class Request:
    """One request of the driver: what it gave to be read, and where the device may write. Valid inside `process`."""

    cdef readonly list readable
    cdef readonly list writable
    cdef public object written
    cdef readonly uint64_t readable_bytes
    cdef readonly uint64_t writable_bytes
    cdef readonly bint again

    def __init__(self):
        """Requests are made by the worker alone."""
        self.readable = []
        self.writable = []
        self.written = 0
        self.again = False

    def read(self, Py_ssize_t start=0, Py_ssize_t size=-1):
        """Return a copy of `size` readable bytes from `start` on; -1: of all that follow. Fewer where it ends."""
        cdef list parts = []
        cdef Py_ssize_t length
        if start < 0:
            raise ValueError("start is negative")
        for view in self.readable:
            if size == 0:
                break
            length = len(view)
            if start >= length:
                start -= length
                continue
            part = bytes(view[start:] if size < 0 else view[start : start + size])
            parts.append(part)
            start = 0
            if size > 0:
                size -= len(part)
        return b"".join(parts)

    def write(self, data):
        """Write after what `written` says is written already, and move `written` on. Returns how many bytes fitted."""
        cdef Py_ssize_t at = self.written
        cdef Py_ssize_t done = 0
        cdef Py_ssize_t length, part
        with memoryview(data).cast("B") as source:
            for view in self.writable:
                length = len(view)
                if at >= length:
                    at -= length
                    continue
                part = min(length - at, len(source) - done)
                view[at : at + part] = source[done : done + part]
                done += part
                at = 0
                if done == len(source):
                    break
        self.written += done
        return done


cdef class RequestBackend(Backend):
    """An object that serves requests, as one worker has it."""

    cdef _Lender lender
    cdef object complaints

    def __init__(self, fds=(), *, str reference, arguments=None, device=""):
        """Make an object of the class that `reference` names, from `fds` (borrowed) and keyword `arguments`.

        `device` is the name in log lines. LocalError when there is no such class, or it does not start.
        """
        self.instance = python_api.make(reference, ("process",), *fds, **(arguments or {}))
        self.lender = None
        self.complaints = Complaints(self.instance, device)

    cdef int serve(self, ring_config *rc, int index, bint enabled) except -1:
        rc.backend = <void *> self
        rc.handler = process_requests
        rc.active = enabled
        return 0


cdef int lend(
    wring *r, RequestBackend backend, burst *b, uint32_t n, bint again, list requests, list views
) except -1:
    """Make requests of the chains of the burst, and list the views that they hold. `again`: the first of them."""
    cdef chain *c
    cdef const iovec *segment
    cdef Request request
    cdef uint32_t i
    for i in range(n):
        c = &b.chains[i]
        segment = &b.segments[c.first]
        request = Request()
        for _ in range(c.n_readable):
            view = backend.lender.lend(segment, False)
            views.append(view)
            request.readable.append(view)
            segment += 1
        for _ in range(c.n_writable):
            view = backend.lender.lend(segment, True)
            views.append(view)
            request.writable.append(view)
            segment += 1
        request.readable_bytes = c.readable
        request.writable_bytes = c.writable
        request.again = again and i == 0
        requests.append(request)
        journal_begin(&r.vq, i, KIND_REPEATED)
    return 0


cdef int process_batch(wring *r, worker *w, RequestBackend backend, int n, bint again) noexcept:
    """Hand `n` chains of the burst to the object. Returns how many of them it has finished. `again`: see `lend`.

    Whatever is raised, and by whom: no chain is lost. All of them go back then, with what is known to be written.
    """
    cdef burst *b = &w.tx
    cdef Request request
    cdef list requests = []
    cdef list views = []
    cdef uint64_t bytes_ = 0
    cdef uint64_t length
    cdef uint32_t i
    cdef int finished = n
    cdef uint32_t failed = 0
    cdef MemoryMap memory = <MemoryMap> r.dev.memory
    try:
        if backend.lender is None or backend.lender.memory is not memory:
            backend.lender = _Lender(memory)
        lend(r, backend, b, <uint32_t> n, again, requests, views)
        result = backend.instance.process(r.index, list(requests))
        vmp_kill_point(r.vq.slot, VMP_KILL_PROCESSED)
        if result is not None:
            finished = int(result)
            if not 0 <= finished <= n:
                raise ValueError(f"process returned {finished}, of {n} requests")
    except BaseException:       # SystemExit too: a device does not end the worker
        backend.complaints.failed("process")
        finished = n
        failed = <uint32_t> n
    for i in range(<uint32_t> min(finished, <int> len(requests))):
        request = requests[i]
        length = 0
        try:
            length = <uint64_t> request.written
            if length > request.writable_bytes:
                raise ValueError(f"wrote {length} bytes where there was room for {request.writable_bytes}")
        except BaseException:
            backend.complaints.failed("the length written")
            length = 0
        b.used[i].len = <uint32_t> length
        bytes_ += request.readable_bytes + length
    for view in views:
        try:
            view.release()
        except BaseException:   # BufferError: counted as held
            pass
    if backend.lender is not None and backend.lender.held:
        backend.complaints.warn("keeps views of guest memory: copy what you keep")
        backend.lender = None
    if failed:
        count_drop(r, VMP_DROP_BACKEND_ERROR, failed)
    w.moved += failed
    count_packets(w, r, <uint32_t> finished - failed, bytes_ if not failed else 0)
    return finished


cdef void log_batch(wring *r, burst *b, uint32_t finished, uint32_t n) noexcept nogil:
    """Log what vring_give_back will not: writes beyond the length that a request goes back with, or to one that stays.

    A status byte at a buffer's end, say. Where the object wrote is not known, so it is all that it could write to.
    """
    cdef chain *c
    cdef uint32_t i
    for i in range(n):
        c = &b.chains[i]
        if i >= finished or b.used[i].len != c.writable:
            dirty_segments(&r.vq, &b.segments[c.first + c.n_readable], c.writable)


cdef int process_requests(wring *r, worker *w) noexcept nogil:
    """Serve what the driver has made available, a batch of up to 64 at a time.

    What the object leaves unfinished is put back; it is offered again after a kick, when its descriptor is readable,
    and when another ring of the device that this worker serves has finished something.
    """
    cdef uint32_t done = 0
    cdef uint64_t bytes_ = 0        # that the requests may move: what others wait for
    cdef uint32_t i
    cdef wring *other
    cdef int n
    cdef int fits
    cdef int finished
    cdef bint all_seen
    cdef bint again
    r.waits_for_output = 0
    vring_disable_notify(&r.vq)
    while done < BUDGET_PACKETS and bytes_ < BUDGET_BYTES:
        again = r.left_start == r.start_id and r.left_at == r.vq.last_avail_idx
        n = vring_fetch(&r.vq, &w.tx, BURST, EITHER)
        if n <= 0:
            return BROKEN if n < 0 else DONE
        all_seen = n < BURST and vring_drained(&r.vq)
        fits = 0
        while fits < n and bytes_ < BUDGET_BYTES:
            bytes_ += <uint64_t> w.tx.chains[fits].readable + w.tx.chains[fits].writable
            fits += 1
        if fits < n:
            vring_unfetch(&r.vq, &w.tx, <uint32_t> (n - fits))
            n = fits
            all_seen = False
        with gil:
            finished = process_batch(r, w, <RequestBackend> r.backend, n, again)
        if r.vq.log is not NULL:
            log_batch(r, &w.tx, <uint32_t> finished, <uint32_t> n)
        r.left_start = 0
        if finished < n:
            journal_drop(&r.vq, <uint32_t> finished)
            vring_unfetch(&r.vq, &w.tx, <uint32_t> (n - finished))
            r.left_start = r.start_id
            r.left_at = r.vq.last_avail_idx
        if finished:
            vring_give_back(&r.vq, &w.tx, 0, <uint32_t> finished)
            vring_publish(&r.vq)
            vring_call(&r.vq)
            done += <uint32_t> finished
            for i in range(r.dev.n_rings):
                other = &w.rings[r.dev.first_ring + i]
                if other is not r and other.waits_for_output:
                    other.waits_for_output = 0
                    queue_ring(w, other)
        if finished < n:
            r.waits_for_output = 1
            # What the driver adds behind a full batch would not be offered: no kick is of use then, and to arm for
            # one would find the ring has more, time and again.
            return DONE if all_seen else WAIT
    return MORE
