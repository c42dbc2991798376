"""The data path of back-ends written in Python: batches of zero-copy views out, frames in.

Runs on the data thread inside a work item, with the GIL. The views handed out show guest memory; they are released
when the call returns, so that none of them outlives the read-side section. A back-end that keeps one from being
released (it still exports its buffer) is told so by the log. Slices of a view are not found that way: what they show
after the call is memory that may be unmapped.
"""

from cpython.buffer cimport PyBUF_READ, PyBUF_SIMPLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from vhostmp.shm.atomics cimport vmp_store_relaxed_u32
from vhostmp.shm.build cimport vmp_kill_point
from vhostmp.shm.layout cimport (
    VMP_DROP_BACKEND_ERROR,
    VMP_DROP_NO_ROOM,
    VMP_DROP_OFFLOAD,
    VMP_DROP_OVERSIZE,
    VMP_DROP_SHORT,
    VMP_KILL_ANSWERED,
    VMP_KILL_TRANSMITTED,
)
from vhostmp.workers._journal cimport KIND_REPEATED, journal_begin
from vhostmp.workers._net cimport F_MRG_RXBUF, gather, has, header_is_plain, scatter, spread
from vhostmp.workers._vring cimport (
    BURST,
    READABLE,
    TOUCH,
    WRITABLE,
    burst,
    chain,
    iovec,
    vring_call,
    vring_disable_notify,
    vring_drained,
    vring_fetch,
    vring_give_back,
    vring_publish,
    vring_room,
    vring_unfetch,
    vring_was_stocked,
)
from vhostmp.workers._work cimport (
    BROKEN,
    BUDGET_PACKETS,
    DONE,
    ETHERNET_HEADER,
    FRAME_MAX,
    MORE,
    WAIT,
    count_copied,
    count_drop,
    count_packets,
    note_source,
    queue_ring,
    worker,
    wring,
)


cdef class PythonPort:
    """One queue pair of a back-end written in Python."""

    def __init__(self, backend, int queue, complaints):
        """Serve queue pair `queue` with the instance `backend`, which `complaints` are of (complaints.py)."""
        self.backend = backend
        self.queue = queue
        self.complaints = complaints
        self.pending = []
        self.waits = False

    cdef void tell_kept(self) noexcept:
        """Log that the back-end keeps a view, which is released only once it lets go."""
        self.complaints.warn("keeps a view of a packet after transmit: copy what you keep")

    cdef list left(self):
        """Frames that wait for receive buffers, oldest first. The port is no longer used."""
        cdef list frames = []
        for frame in reversed(self.pending):
            try:
                frames.append(bytes(frame))
            except Exception:
                self.complaints.failed("a frame returned by receive")
        return frames

    cdef void put_back(self, list frames):
        """Deliver `frames` first, which are of `left` in another worker. The port is not used yet."""
        self.pending = frames[::-1]
        self.waits = len(frames) != 0


cdef void transmit_burst(wring *r, worker *w, PythonPort port, int n) noexcept:
    """Hand `n` chains of the transmit burst to the back-end. Whatever is raised: the caller gives all of them back."""
    cdef list views = []
    cdef bytes addresses
    cdef uint32_t packets = 0
    cdef uint64_t bytes_ = 0
    cdef bint kept = False
    try:
        show_frames(r, &w.tx, n, views, &packets, &bytes_)
        if packets:
            addresses = bytes(views[0][:12])
            note_source(r, <const uint8_t *> <const char *> addresses)
            port.backend.transmit(port.queue, views)
            vmp_kill_point(r.vq.slot, VMP_KILL_TRANSMITTED)
        count_packets(w, r, packets, bytes_)
    except BaseException:       # SystemExit too: a back-end does not end the worker
        port.complaints.failed("transmit")
        count_drop(r, VMP_DROP_BACKEND_ERROR, packets)
        w.moved += packets
    for view in views:
        try:
            view.release()
        except BaseException:
            kept = True
    if kept:
        port.tell_kept()


cdef int frame_size(wring *r, const chain *c, const iovec *out) noexcept nogil:
    """Return how many bytes a chain's frame has, without its header; -1: it was dropped, and counted."""
    cdef uint32_t header_len = r.dev.header_len
    cdef uint32_t size = c.readable
    cdef uint8_t[16] header
    if size < header_len + ETHERNET_HEADER:
        count_drop(r, VMP_DROP_SHORT, 1)
        return -1
    size -= header_len
    if size > FRAME_MAX:
        count_drop(r, VMP_DROP_OVERSIZE, 1)
        return -1
    gather(out, c.n_readable, 0, header, header_len)
    if not header_is_plain(header):
        count_drop(r, VMP_DROP_OFFLOAD, 1)
        return -1
    return <int> size


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


cdef int show_frames(wring *r, burst *b, int n, list views, uint32_t *packets, uint64_t *bytes_) except -1:
    """List views of the frames of a burst, read-only, without their headers; count them, and what is dropped."""
    cdef const iovec *out
    cdef bint copied
    cdef int i
    cdef int size
    for i in range(n):
        out = &b.segments[b.chains[i].first]
        size = frame_size(r, &b.chains[i], out)
        if size < 0:
            continue
        views.append(view_frame(out, b.chains[i].n_readable, r.dev.header_len, <uint32_t> size, &copied))
        if copied:                      # a frame in pieces: the one case in which all of it is
            count_copied(r, <uint32_t> size)
        packets[0] += 1
        bytes_[0] += <uint32_t> size
        journal_begin(&r.vq, <uint32_t> i, KIND_REPEATED)
    return 0


cdef uint32_t room_for_answers(wring *r, worker *w, uint32_t most) noexcept nogil:
    """How many chains, at most `most`, there may be in a batch. 0: the ring waits, and has its partner queued.

    As many as there is room for answers, so that these do not pile up where a swap or a death would lose them; none
    while earlier ones wait for receive buffers. A driver that never made receive buffers available does not want any.
    """
    cdef wring *peer = r.partner
    cdef uint32_t room = most
    if not peer.active:
        return most
    if (<PythonPort> r.backend).waits:
        room = 0
    elif vring_was_stocked(&peer.vq):
        room = vring_room(&peer.vq)
    if room == 0:
        r.waits_for_output = 1
        queue_ring(w, peer)
    return room if room < most else most


cdef int python_transmit(wring *r, worker *w) noexcept nogil:
    """Give what the driver made available to the back-end's transmit, a burst at a time."""
    cdef wring *peer = r.partner
    cdef uint32_t done = 0
    cdef uint32_t most
    cdef int n
    while done < BUDGET_PACKETS:
        most = room_for_answers(r, w, BURST)
        if most == 0:
            return WAIT
        n = vring_fetch(&r.vq, &w.tx, most, READABLE | TOUCH)
        if n <= 0:
            return BROKEN if n < 0 else DONE
        with gil:
            transmit_burst(r, w, <PythonPort> r.backend, n)
        vring_give_back(&r.vq, &w.tx, 0, <uint32_t> n)
        vring_publish(&r.vq)
        vring_call(&r.vq)
        done += <uint32_t> n
        if peer.active:
            with gil:
                n = receive_batch(peer, w, <PythonPort> r.backend)
            if n == BROKEN:
                return MORE     # the loop stops the broken ring
            if n != WAIT:
                queue_ring(w, peer)
    return MORE


cdef struct delivery:
    uint32_t done               # chains of the burst that are filled
    uint32_t packets
    uint32_t dropped
    uint64_t bytes_


cdef int deliver(wring *r, burst *b, PythonPort port, uint32_t n, bint drained, delivery *d) except -1:
    """Fill chains of the burst with the frames that wait in the port, and take those that are done with off it."""
    cdef uint32_t header_len = r.dev.header_len
    cdef bint mergeable = has(r.dev.features, F_MRG_RXBUF)
    cdef uint8_t[16] header
    cdef Py_buffer view
    cdef const iovec *to
    cdef uint32_t size, taken, n_segments
    cdef uint64_t room              # of chains whose lengths the guest chose: a sum that must not wrap
    cdef bint hopeless
    memset(header, 0, 16)
    while port.pending and d.done < n:
        try:
            PyObject_GetBuffer(port.pending[len(port.pending) - 1], &view, PyBUF_SIMPLE)
        except BaseException:
            port.complaints.failed("a frame returned by receive")
            count_drop(r, VMP_DROP_BACKEND_ERROR, 1)
            d.dropped += 1
            port.pending.pop()
            continue
        size = <uint32_t> min(view.len, <Py_ssize_t> (FRAME_MAX + 1)) + header_len
        room = 0
        taken = 0
        while d.done + taken < n and room < size and (taken == 0 or mergeable):
            room += b.chains[d.done + taken].writable
            taken += 1
        # Waiting helps where the driver can make more available to a packet that may use several buffers.
        hopeless = not mergeable or taken == r.vq.num or (not drained and d.done == 0)
        if room < size and hopeless or view.len > FRAME_MAX or view.len < ETHERNET_HEADER:
            if view.len < ETHERNET_HEADER:
                count_drop(r, VMP_DROP_SHORT, 1)
            elif view.len > FRAME_MAX:
                count_drop(r, VMP_DROP_OVERSIZE, 1)
            else:
                count_drop(r, VMP_DROP_NO_ROOM, 1)
            PyBuffer_Release(&view)
            port.pending.pop()
            d.dropped += 1
            continue
        if room < size:
            PyBuffer_Release(&view)
            break
        taken = spread(b, d.done, size)
        header[10] = <uint8_t> taken
        to = &b.segments[b.chains[d.done].first]
        n_segments = b.n_segments - b.chains[d.done].first
        scatter(to, n_segments, 0, header, header_len)
        scatter(to, n_segments, header_len, <const uint8_t *> view.buf, size - header_len)
        d.done += taken
        d.packets += 1
        d.bytes_ += size - header_len
        PyBuffer_Release(&view)
        port.pending.pop()
    return 0


cdef int receive_batch(wring *r, worker *w, PythonPort port) noexcept:
    """Ask the back-end for frames and deliver them. Returns what a handler returns.

    Whatever is raised: chains that hold a frame go to the driver, the others are put back.
    """
    cdef burst *b = &w.rx
    cdef delivery d
    cdef int n = vring_fetch(&r.vq, b, BURST, WRITABLE)
    cdef bint drained = vring_drained(&r.vq)
    if n <= 0:
        return BROKEN if n < 0 else DONE
    memset(&d, 0, sizeof(d))
    try:
        if not port.pending:
            port.pending = list(port.backend.receive(port.queue, n))
            port.pending.reverse()
            vmp_store_relaxed_u32(&r.vq.slot.waiting, <uint32_t> len(port.pending))
            if port.pending:
                vmp_kill_point(r.vq.slot, VMP_KILL_ANSWERED)
        deliver(r, b, port, <uint32_t> n, drained, &d)
    except BaseException:
        port.complaints.failed("receive")
    port.waits = len(port.pending) != 0
    vring_unfetch(&r.vq, b, <uint32_t> n - d.done)
    if not d.done:
        vmp_store_relaxed_u32(&r.vq.slot.waiting, <uint32_t> len(port.pending))
    else:
        vring_give_back(&r.vq, b, 0, d.done)
        vmp_store_relaxed_u32(&r.vq.slot.batch_waiting, 1 + <uint32_t> len(port.pending))
        vring_publish(&r.vq)
        vring_call(&r.vq)
        count_packets(w, r, d.packets, d.bytes_)
        count_copied(r, d.bytes_)
    if port.pending:
        return MORE if d.done and not drained else DONE
    w.moved += d.dropped
    return MORE if d.packets or d.dropped else WAIT


cdef int python_receive(wring *r, worker *w) noexcept nogil:
    """Deliver what the back-end has, after a kick, after a transmit, or when its descriptor is readable."""
    cdef int result = MORE
    vring_disable_notify(&r.vq)
    while result == MORE and w.moved < BUDGET_PACKETS:
        with gil:
            result = receive_batch(r, w, <PythonPort> r.backend)
    if r.partner.waits_for_output and (result == WAIT or result == MORE):
        r.partner.waits_for_output = 0
        queue_ring(w, r.partner)
    return result
