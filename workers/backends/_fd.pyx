"""The tap and packet-socket data path: one system call a frame, to and from guest memory in place.

Transmit. The header is checked from a private copy, then the kernel is given the frame where it lies. Header and frame
stay in guest memory, so the guest can change them in between: the kernel takes one copy of its own and checks that
(virtio_net_hdr_to_skb), which is why no second copy is made here. What the check is for is to count a bad packet by its
reason and not to spend a system call on it.

Receive. Buffers are taken from the ring until they hold any frame that may come (`want`), one readv fills them, what
was not needed is put back. When the ring holds less, the frame goes on into a private buffer; a frame that did not fit
then waits there, and is delivered first once the driver makes more available. So no frame is read that is not delivered
or counted.

The descriptors are registered edge-triggered: each is read until it is empty, or until the ring is.
"""

from libc.errno cimport EAGAIN, EFAULT, EINTR, ENOBUFS, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove, memset

from vhostmp.shm.atomics cimport vmp_store_relaxed_u32
from vhostmp.shm.build cimport vmp_kill_point
from vhostmp.shm.layout cimport (
    VMP_DROP_BACKEND_ERROR,
    VMP_DROP_BACKEND_FULL,
    VMP_DROP_NO_ROOM,
    VMP_DROP_OVERSIZE,
    VMP_DROP_SHORT,
    VMP_KILL_HELD,
    VMP_KILL_RECEIVED,
    VMP_KILL_SENT,
)
from vhostmp.workers._dirty cimport dirty_segments
from vhostmp.workers._fetch cimport fetch_readable
from vhostmp.workers._journal cimport KIND_HELD, KIND_LOST, KIND_REPEATED, journal_begin, journal_drop
from vhostmp.workers._net cimport (
    F_GUEST_CSUM,
    F_MRG_RXBUF,
    HDR_F_NEEDS_CSUM,
    complete_checksum,
    gather,
    has,
    header_check,
    header_is_plain,
    net_offloads,
    receive_offloads,
    scatter,
    spread,
    transmit_offloads,
    write_num_buffers,
)
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
    vring_unfetch,
)
from vhostmp.workers._work cimport (
    BROKEN,
    BUDGET_BYTES,
    BUDGET_PACKETS,
    DONE,
    ETHERNET_HEADER,
    FRAME_MAX,
    MORE,
    SCRATCH_SIZE,
    WAIT,
    count_copied,
    count_drop,
    count_packets,
    note_source,
    worker,
    wring,
)

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLOUT
    int poll(pollfd *fds, unsigned long nfds, int timeout)

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_write

cdef extern from "<sys/uio.h>" nogil:
    ssize_t writev(int fd, const iovec *iov, int n)
    ssize_t readv(int fd, const iovec *iov, int n)

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    int MSG_TRUNC, MSG_DONTWAIT

cdef enum:
    IOV_MAX = 1024


cdef fd_port *fd_port_new(int fd, uint32_t header_len, uint32_t want, bint is_packet) except NULL:
    """Make the state of one queue pair. The descriptor stays the caller's and is non-blocking."""
    cdef fd_port *port = <fd_port *> calloc(1, sizeof(fd_port))
    if port is NULL:
        raise MemoryError
    port.pending = <uint8_t *> calloc(1, SCRATCH_SIZE)
    if port.pending is NULL:
        free(port)
        raise MemoryError
    port.fd = fd
    port.header_len = header_len
    port.want = want
    port.is_packet = is_packet
    return port


cdef void fd_port_free(fd_port *port) noexcept nogil:
    """Free it, a grace period after its configuration was replaced."""
    if port is not NULL:
        free(port.pending)
        free(port)


cdef list fd_port_left(fd_port *port):
    """The frame that waits for receive buffers, in a list, if there is one. The port is no longer used."""
    return [(<char *> port.pending)[: port.pending_len]] if port.pending_len else []


cdef fd_port_put_back(fd_port *port, bytes frame, uint32_t header_len):
    """Have a port that is not used yet deliver `frame` first, which is of fd_port_left, with a header of so many bytes.

    Whoever wrote it may be a worker that a guest has taken over: what cannot be a frame is dropped.
    """
    if header_len + ETHERNET_HEADER <= len(frame) <= header_len + FRAME_MAX:
        memcpy(port.pending, <const char *> frame, <size_t> len(frame))
        port.pending_len = <uint32_t> len(frame)


cdef int split_header(iovec *to, const iovec *segments, uint32_t n, uint32_t guest_len, uint32_t fd_len) noexcept nogil:
    """Copy a list of segments without bytes [fd_len, guest_len) of its header. Returns the new length, -1: too long."""
    cdef uint32_t at = 0
    cdef uint32_t i
    cdef size_t before, after, length
    cdef int count = 0
    for i in range(n):
        length = segments[i].iov_len
        before = 0 if at >= fd_len else fd_len - at
        if before > length:
            before = length
        after = 0 if at >= guest_len else guest_len - at
        if after > length:
            after = length
        if count + 2 > IOV_MAX:
            return -1
        if before:
            to[count].iov_base = segments[i].iov_base
            to[count].iov_len = before
            count += 1
        if length > after:
            to[count].iov_base = <uint8_t *> segments[i].iov_base + after
            to[count].iov_len = length - after
            count += 1
        at = at + <uint32_t> length if length < 65536 else 65536
    return count


cdef ssize_t send_split(fd_port *port, const iovec *segments, uint32_t n, uint32_t header_len) noexcept nogil:
    """Give one frame without what its header is longer than the descriptor's. Bytes taken, or -1 with errno."""
    cdef iovec iov[IOV_MAX]
    return writev(port.fd, iov, split_header(iov, segments, n, header_len, port.header_len))


cdef inline ssize_t send_frame(fd_port *port, const iovec *segments, uint32_t n, uint32_t header_len) noexcept nogil:
    """Give one frame with its header to the descriptor. Bytes taken, or -errno."""
    cdef ssize_t sent
    while True:
        if port.header_len != header_len:
            sent = send_split(port, segments, n, header_len)
        elif n == 1:
            # Not write(): that is a cancellation point, which costs a process of several threads locked instructions.
            sent = syscall(SYS_write, port.fd, segments.iov_base, segments.iov_len)
        else:
            sent = writev(port.fd, segments, <int> n)
        if sent >= 0:
            return sent
        if errno != EINTR:
            return -errno


cdef bint is_writable(int fd) noexcept nogil:
    """Whether a descriptor that was full has room. If not, EPOLLOUT will tell: a tap does so only to who has looked.

    A look is what the kernel's tun_chr_poll takes for the wish to be told (SOCKWQ_ASYNC_NOSPACE); a write that found no
    room is none.
    """
    cdef pollfd p
    p.fd = fd
    p.events = POLLOUT
    p.revents = 0
    return poll(&p, 1, 0) == 1 and p.revents & POLLOUT != 0


cdef int fd_transmit(wring *r, worker *w) noexcept nogil:
    """Send what the driver made available."""
    cdef fd_port *port = <fd_port *> r.backend
    cdef burst *b = &w.tx
    cdef uint32_t header_len = r.dev.header_len
    cdef net_offloads offloads = transmit_offloads(r.dev.features)
    cdef uint32_t done = 0
    cdef uint32_t packets
    cdef uint64_t bytes_ = 0
    cdef uint64_t burst_bytes
    cdef uint8_t[32] front
    cdef const iovec *out
    cdef chain *c
    cdef ssize_t sent
    cdef int n, i, reason
    cdef bint full = False
    r.waits_for_output = 0
    while done < BUDGET_PACKETS and bytes_ < BUDGET_BYTES:
        n = vring_fetch(&r.vq, b, BURST, READABLE | TOUCH)
        if n <= 0:
            return BROKEN if n < 0 else DONE
        packets = 0
        burst_bytes = 0
        i = 0
        while i < n:
            c = &b.chains[i]
            if c.readable < header_len + ETHERNET_HEADER:
                count_drop(r, VMP_DROP_SHORT, 1)
                i += 1
                continue
            if c.readable > header_len + FRAME_MAX:
                count_drop(r, VMP_DROP_OVERSIZE, 1)
                i += 1
                continue
            out = &b.segments[c.first]
            if out.iov_len >= sizeof(front):
                memcpy(front, out.iov_base, sizeof(front))      # more than is looked at, in two loads and no call
            else:
                gather(out, c.n_readable, 0, front, header_len + ETHERNET_HEADER)
            reason = header_check(front, c.readable - header_len, offloads)
            if reason >= 0:
                count_drop(r, reason, 1)
                i += 1
                continue
            fetch_readable(b, <uint32_t> i + 1)
            journal_begin(&r.vq, <uint32_t> i, KIND_REPEATED)
            sent = send_frame(port, out, c.n_readable, header_len)
            if sent == -EAGAIN:
                journal_drop(&r.vq, <uint32_t> i)
                full = True     # it waits in the ring; EPOLLOUT queues us
                break
            if sent < 0:
                journal_drop(&r.vq, <uint32_t> i)
                count_drop(r, VMP_DROP_BACKEND_FULL if sent == -ENOBUFS else VMP_DROP_BACKEND_ERROR, 1)
            else:
                vmp_kill_point(r.vq.slot, VMP_KILL_SENT)
                if packets == 0:
                    note_source(r, front + header_len)
                packets += 1
                burst_bytes += c.readable - header_len
            i += 1
        vring_unfetch(&r.vq, b, <uint32_t> (n - i))
        if i:
            vring_give_back(&r.vq, b, 0, <uint32_t> i)
            vring_publish(&r.vq)
            vring_call(&r.vq)
            count_packets(w, r, packets, burst_bytes)
        done += <uint32_t> i
        bytes_ += burst_bytes
        if full:
            if is_writable(port.fd):
                return MORE     # there is room since
            r.waits_for_output = 1
            return WAIT
    return MORE


cdef ssize_t receive_frame(fd_port *port, iovec *iov, int n) noexcept nogil:
    """Read one frame. Its bytes, which may be more than there was room for, or -errno."""
    cdef msghdr message
    cdef ssize_t got
    while True:
        if port.is_packet:
            memset(&message, 0, sizeof(message))
            message.msg_iov = iov
            message.msg_iovlen = <size_t> n
            got = recvmsg(port.fd, &message, MSG_TRUNC | MSG_DONTWAIT)
        else:
            got = readv(port.fd, iov, n)
        if got >= 0:
            return got
        if errno != EINTR:
            return -errno


cdef uint32_t finish_frame(wring *r, burst *b, uint32_t first, uint32_t total) noexcept nogil:
    """Fill in used lengths and num_buffers for a frame of `total` bytes, header included, in chains from `first` on.

    Returns how many chains it takes. The frame itself is in place.
    """
    cdef uint32_t n = spread(b, first, total)
    cdef uint32_t segment = b.chains[first].first
    if r.dev.header_len == 12:
        write_num_buffers(&b.segments[segment], b.n_segments - segment, <uint16_t> n)
    return n


cdef int suit_frame(wring *r, uint8_t *frame, uint32_t size) noexcept nogil:
    """Make a frame from a packet socket, header first, fit what the guest accepts. -1, or a DROP_ reason.

    A tap does this for us in the kernel; a packet socket hands on whatever offloads the frame was sent with.
    """
    cdef uint32_t header_len = r.dev.header_len
    cdef net_offloads offloads = receive_offloads(r.dev.features)
    cdef bint accepts_csum = offloads.csum
    cdef uint16_t start, offset
    cdef int reason
    frame[0] &= HDR_F_NEEDS_CSUM    # DATA_VALID and the like are hints that not every guest knows
    offloads.csum = True
    reason = header_check(frame, size - header_len, offloads)
    if reason >= 0:
        return reason
    if frame[0] and not accepts_csum:
        memcpy(&start, frame + 6, 2)
        memcpy(&offset, frame + 8, 2)
        complete_checksum(frame + header_len, size - header_len, start, offset)
        memset(frame, 0, header_len)
    return -1


cdef int suit_guest(wring *r, const iovec *segments, uint32_t n, uint32_t size, uint8_t *copy) noexcept nogil:
    """suit_frame for a frame that lies in guest memory; `copy` has room for it.

    What is read here was just written there: a guest that changes it meanwhile fools itself, and nobody else.
    """
    cdef int reason
    gather(segments, n, 0, copy, r.dev.header_len)
    if header_is_plain(copy):
        return -1
    if has(r.dev.features, F_GUEST_CSUM):
        return header_check(copy, size - r.dev.header_len, receive_offloads(r.dev.features))    # nothing to fill in
    gather(segments, n, 0, copy, size)
    reason = suit_frame(r, copy, size)
    if reason < 0:
        scatter(segments, n, 0, copy, size)
        count_copied(r, 2 * <uint64_t> (size - r.dev.header_len))
    return reason


cdef int deliver_pending(wring *r, worker *w, fd_port *port, bint mergeable) noexcept nogil:
    """Deliver the frame that waits. 1: done or dropped; 0: still too few buffers; -1: ring broken."""
    cdef burst *b = &w.rx
    cdef uint64_t room = 0
    cdef uint32_t taken = 0
    cdef int n = vring_fetch(&r.vq, b, BURST, WRITABLE)
    cdef bint drained = vring_drained(&r.vq)
    if n <= 0:
        return n
    while taken < <uint32_t> n and room < port.pending_len and (taken == 0 or mergeable):
        room += b.chains[taken].writable
        taken += 1
    if room < port.pending_len:
        vring_unfetch(&r.vq, b, <uint32_t> n)
        if not mergeable or not drained or <uint32_t> n == r.vq.num:
            count_drop(r, VMP_DROP_NO_ROOM, 1)
            port.pending_len = 0
            vmp_store_relaxed_u32(&r.vq.slot.waiting, 0)
            return 1
        return 0
    # The segments of one burst follow each other, so several chains are filled like one.
    scatter(b.segments, b.n_segments, 0, port.pending, port.pending_len)
    count_copied(r, port.pending_len - r.dev.header_len)
    taken = finish_frame(r, b, 0, port.pending_len)
    vring_unfetch(&r.vq, b, <uint32_t> n - taken)
    vring_give_back(&r.vq, b, 0, taken)
    vmp_store_relaxed_u32(&r.vq.slot.batch_waiting, 1)      # none any more
    vring_publish(&r.vq)
    vring_call(&r.vq)
    count_packets(w, r, 1, port.pending_len - r.dev.header_len)
    port.pending_len = 0
    return 1


cdef inline void note_unused(wring *r, burst *b, uint32_t first, uint64_t size) noexcept nogil:
    """Log `size` bytes that were written to chains from `first` on and do not reach the driver as a frame."""
    if r.vq.log is not NULL:
        dirty_segments(&r.vq, &b.segments[b.chains[first].first], size)


cdef int fd_receive(wring *r, worker *w) noexcept nogil:
    """Receive until the descriptor is empty, the ring has no buffers, or the budget is used up."""
    cdef fd_port *port = <fd_port *> r.backend
    cdef int result = receive_frames(r, w, port)
    vmp_store_relaxed_u32(&r.vq.slot.waiting, port.pending_len != 0)   # a swap waits until the port is empty
    return result


cdef int receive_frames(wring *r, worker *w, fd_port *port) noexcept nogil:
    """fd_receive but for what it tells the control process."""
    cdef burst *b = &w.rx
    cdef uint32_t header_len = r.dev.header_len
    cdef bint mergeable = has(r.dev.features, F_MRG_RXBUF)
    cdef uint32_t skipped = header_len - port.header_len
    cdef uint32_t seen = 0          # frames read, whatever became of them: the budget is of work, not of success
    cdef uint64_t seen_bytes = 0
    cdef uint64_t burst_bytes
    cdef uint64_t room              # of chains whose lengths the guest chose: a sum that must not wrap
    cdef uint32_t burst_packets, done, k, k_segments
    cdef iovec iov[IOV_MAX]
    cdef iovec *to
    cdef const iovec *chains
    cdef int count, reason
    cdef ssize_t got
    cdef int n
    cdef uint64_t zero = 0
    cdef uint64_t start
    vring_disable_notify(&r.vq)
    if port.pending_len:
        n = deliver_pending(r, w, port, mergeable)
        if n <= 0:
            return BROKEN if n < 0 else DONE
    while seen < BUDGET_PACKETS and seen_bytes < BUDGET_BYTES:
        n = vring_fetch(&r.vq, b, BURST, WRITABLE)
        if n <= 0:
            return BROKEN if n < 0 else DONE
        done = 0
        got = 0
        burst_bytes = 0
        burst_packets = 0
        while done < <uint32_t> n and seen < BUDGET_PACKETS and seen_bytes < BUDGET_BYTES:
            room = 0
            k = done
            k_segments = 0
            while (
                k < <uint32_t> n
                and room < port.want
                and (k == done or mergeable)
                and k_segments + b.chains[k].n_writable < IOV_MAX - 3
            ):
                room += b.chains[k].writable
                k_segments += b.chains[k].n_writable
                k += 1
            if room < header_len:
                room = 0            # not even the header: all of the frame goes to the private buffer
                k_segments = 0
            to = &b.segments[b.chains[done].first]
            count = <int> k_segments
            if skipped:
                count = split_header(iov, to, k_segments, header_len, port.header_len)
                to = iov
            if room < port.want:
                if to != iov:
                    memcpy(iov, to, <size_t> count * sizeof(iovec))
                    to = iov
                # Behind its place in `pending`, so that the whole frame can be put together there.
                start = room if room else skipped
                iov[count].iov_base = port.pending + start
                iov[count].iov_len = SCRATCH_SIZE - start
                count += 1
            elif not port.is_packet and count < IOV_MAX:
                # A tap does not tell that it cut a frame off: one byte more tells (the MTU was raised since).
                if to != iov:
                    memcpy(iov, to, <size_t> count * sizeof(iovec))
                    to = iov
                iov[count].iov_base = port.pending
                iov[count].iov_len = 1
                count += 1
            journal_begin(&r.vq, done, KIND_LOST)
            got = receive_frame(port, to, count)
            if got < 0:
                if got == -EFAULT:
                    note_unused(r, b, done, room)       # memory that ends short: nobody says how far it came
                break
            vmp_kill_point(r.vq.slot, VMP_KILL_RECEIVED)
            seen += 1
            seen_bytes += <uint64_t> got
            got += skipped
            if got < header_len + ETHERNET_HEADER:
                note_unused(r, b, done, min(<uint64_t> got, room))
                continue            # nothing that is a frame; the buffers are free for the next
            if got > header_len + FRAME_MAX:
                note_unused(r, b, done, min(<uint64_t> got, room))
                count_drop(r, VMP_DROP_OVERSIZE, 1)
                continue
            if <uint64_t> got <= room:
                if skipped:
                    chains = &b.segments[b.chains[done].first]
                    scatter(chains, k_segments, port.header_len, <const uint8_t *> &zero, skipped)
                if port.is_packet:
                    reason = suit_guest(r, &b.segments[b.chains[done].first], k_segments, <uint32_t> got, port.pending)
                    if reason >= 0:
                        note_unused(r, b, done, <uint64_t> got)
                        count_drop(r, reason, 1)
                        continue
                done += finish_frame(r, b, done, <uint32_t> got)
                burst_packets += 1
                burst_bytes += <uint64_t> got - header_len
                continue
            note_unused(r, b, done, room)
            if room >= port.want:
                count_drop(r, VMP_DROP_OVERSIZE, 1)     # longer than the link's MTU said: it was cut off
                continue
            if room == 0 and skipped:
                memmove(port.pending, port.pending + skipped, port.header_len)
            gather(&b.segments[b.chains[done].first], k_segments, 0, port.pending, <uint32_t> room)
            if room > header_len:
                count_copied(r, room - header_len)
            if skipped:
                memset(port.pending + port.header_len, 0, skipped)
            if port.is_packet:
                reason = suit_frame(r, port.pending, <uint32_t> got)
                if reason >= 0:
                    count_drop(r, reason, 1)
                    continue
            port.pending_len = <uint32_t> got
            journal_begin(&r.vq, done, KIND_HELD)
            vmp_store_relaxed_u32(&r.vq.slot.waiting, 1)
            break
        journal_drop(&r.vq, done)
        if port.pending_len:
            vmp_kill_point(r.vq.slot, VMP_KILL_HELD)
        vring_unfetch(&r.vq, b, <uint32_t> n - done)
        if done:
            vring_give_back(&r.vq, b, 0, done)
            vring_publish(&r.vq)
            vring_call(&r.vq)
            count_packets(w, r, burst_packets, burst_bytes)
        if got < 0:
            if got != -EAGAIN:
                count_drop(r, VMP_DROP_BACKEND_ERROR, 1)
            return WAIT
        if port.pending_len:
            n = deliver_pending(r, w, port, mergeable)
            if n <= 0:
                return BROKEN if n < 0 else DONE
    return MORE
