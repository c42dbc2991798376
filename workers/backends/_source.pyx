"""The source back-end: fills each receive buffer that the guest offers, as fast as it offers them. What it sends is
dropped, as by null.

The load for the receive side of a driver, and the measure of ours: no descriptor, no system call, one copy. Frames have
one size, a locally administered unicast address that nobody has as their destination, the EtherType for local
experiments (IEEE 802, 88B5), and one of 32 source addresses, which makes as many flows. After the Ethernet header
stands, in 8 bytes, big-endian, a number that rises by one from each frame of a queue to the next; a worker that dies
may leave its replacement to use the numbers of a burst a second time.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from vhostmp.shm.atomics cimport vmp_store_relaxed_u32
from vhostmp.shm.layout cimport VMP_DROP_NO_ROOM
from vhostmp.workers._fetch cimport fetch_writable
from vhostmp.workers._net cimport F_MRG_RXBUF, has, put_header, scatter, spread
from vhostmp.workers._vring cimport (
    BURST,
    TOUCH,
    WRITABLE,
    burst,
    iovec,
    vring_call,
    vring_drained,
    vring_enable_notify,
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
    MORE,
    WAIT,
    count_copied,
    count_drop,
    count_packets,
    worker,
    wring,
)

cdef extern from *:
    uint64_t big_endian "__builtin_bswap64" (uint64_t x) nogil

cdef enum:
    NUMBER_SIZE = 8
    HEADER_MAX = 12


cdef source_frames *source_new(uint32_t size) except NULL:
    """Make the frames, of `size` bytes each. MemoryError."""
    cdef source_frames *source = <source_frames *> malloc(sizeof(source_frames) + SOURCE_TEMPLATES * <size_t> size)
    cdef uint8_t *frame
    cdef uint32_t i
    cdef uint32_t k
    if source is NULL:
        raise MemoryError
    source.size = size
    for i in range(<uint32_t> SOURCE_TEMPLATES):
        frame = source.frames + <size_t> i * size
        memset(frame, 0, ETHERNET_HEADER + NUMBER_SIZE)
        frame[0] = frame[6] = 0x02
        frame[5] = 0xFF
        frame[11] = <uint8_t> i
        frame[12] = 0x88
        frame[13] = 0xB5
        for k in range(ETHERNET_HEADER + NUMBER_SIZE, size):
            frame[k] = <uint8_t> k
    return source


cdef void source_free(source_frames *source) noexcept nogil:
    """Give the frames back; NULL: there are none."""
    free(source)


cdef inline void put_frame(
    const iovec *to, uint32_t n, uint32_t header_len, const uint8_t *frame, uint32_t size, uint64_t number
) noexcept nogil:
    """Write a frame behind the header into segments that together have the room."""
    cdef uint8_t *at = <uint8_t *> to.iov_base + header_len
    number = big_endian(number)
    if to.iov_len >= <size_t> header_len + size:
        memcpy(at, frame, size)
        memcpy(at + ETHERNET_HEADER, &number, NUMBER_SIZE)
        return
    scatter(to, n, header_len, frame, size)
    scatter(to, n, header_len + ETHERNET_HEADER, <const uint8_t *> &number, NUMBER_SIZE)


cdef int source_receive(wring *r, worker *w) noexcept nogil:
    """Fill receive buffers until there are no more, or the budget is used up."""
    cdef const source_frames *source = <const source_frames *> r.backend
    cdef burst *b = &w.rx
    cdef uint32_t header_len = r.dev.header_len
    cdef uint32_t size = source.size
    cdef uint32_t total = header_len + size
    cdef bint mergeable = has(r.dev.features, F_MRG_RXBUF)
    cdef bint drained
    cdef uint32_t packets = 0
    cdef uint32_t done, taken, made
    cdef uint64_t room              # of chains whose lengths the guest chose: a sum that must not wrap
    cdef uint64_t number
    cdef uint8_t[HEADER_MAX] header
    cdef const iovec *to
    cdef uint32_t n_segments
    cdef int n
    memset(header, 0, sizeof(header))
    vmp_store_relaxed_u32(&r.vq.slot.waiting, 0)    # what a back-end before this one held was dropped with it
    while packets < BUDGET_PACKETS and <uint64_t> packets * size < BUDGET_BYTES:
        n = vring_fetch(&r.vq, b, BURST, WRITABLE | TOUCH)
        if n <= 0:
            return BROKEN if n < 0 else DONE
        drained = vring_drained(&r.vq)
        number = r.vq.slot.packets
        done = 0
        made = 0
        while done < <uint32_t> n:
            room = 0
            taken = 0
            while done + taken < <uint32_t> n and room < total and (taken == 0 or mergeable):
                room += b.chains[done + taken].writable
                taken += 1
            if room < total:
                break
            header[10] = <uint8_t> taken
            to = &b.segments[b.chains[done].first]
            n_segments = b.n_segments - b.chains[done].first
            put_header(to, n_segments, header, header_len)
            fetch_writable(b, done + taken, total)
            put_frame(
                to, n_segments, header_len,
                source.frames + <size_t> (number % SOURCE_TEMPLATES) * size, size, number,
            )
            done += spread(b, done, total)
            made += 1
            number += 1
        vring_unfetch(&r.vq, b, <uint32_t> n - done)
        if done:
            vring_give_back(&r.vq, b, 0, done)
            vring_publish(&r.vq)
            vring_call(&r.vq)
            count_packets(w, r, made, <uint64_t> made * size)
            count_copied(r, <uint64_t> made * size)
            packets += made
            continue
        # Too little for one frame. The driver is asked to say when there is more, where that can make a difference;
        # else it is counted, once a kick: of a packed ring we may not have seen all, and would look again and again.
        if mergeable and drained:
            return DONE
        count_drop(r, VMP_DROP_NO_ROOM, 1)
        vring_enable_notify(&r.vq)
        return WAIT
    return MORE
