"""Fuzz target "net": a queue pair of a network device, whose driver and whose network are both hostile.

What is run is what a worker runs for each work item: the handlers of the loopback back-end, and of one that is a
descriptor (here one end of a socket pair that keeps messages apart). The driver sends frames with any header, cut into
descriptors anywhere, and gives any receive buffers; the network sends frames of any length with any header. What must
hold: each transmit chain that is given back was counted, as a packet or as a drop; what the device wrote is in the
dirty log; and, as everywhere, no access outside guest memory and the worker's own.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.unistd cimport read, write

from tests.fuzz._guest cimport (
    DEVICE,
    LOG_BYTES,
    PARTS,
    PLAIN,
    PLAIN_GPA,
    PLAIN_SIZE,
    RINGS,
    attach_ring,
    check_logged,
    choose_descriptor,
    free_guest,
    guest,
    guest_looked,
    guest_write,
    hook_looks,
    make_guest,
    make_memory,
    make_ring,
    must,
    offer_chain,
    offer_head,
    offer_position,
    put_descriptor,
    put_entry,
    scribble,
    take_u8,
    take_u16,
    take_u32,
    take_u64,
)
from tests.fuzz._report cimport report
from vhostmp.shm._log cimport vmp_log
from vhostmp.shm.layout cimport VMP_RINGS_MAX
from vhostmp.workers._net cimport F_CSUM, F_MRG_RXBUF, has
from vhostmp.workers._vring cimport DESC_F_NEXT, POSITION_WRAP, vring_desc
from vhostmp.workers._work cimport BROKEN, queue_ring, wdevice, worker, wring
from vhostmp.workers.backends._fd cimport fd_port, fd_port_free, fd_port_new, fd_receive, fd_transmit
from vhostmp.workers.backends._loopback cimport loopback_receive, loopback_transmit

import os
import socket

cdef enum:
    STEPS_MAX = 256
    ITEMS_MAX = 16              # work items after each step
    RX = 0
    TX = 1
    NUM_MAX = 64
    DROPS = 16
    FRAME_BYTES = 70000         # longer than any frame may be

    F_VERSION_1 = 32
    F_EVENT_IDX = 29
    F_INDIRECT = 28

    MTU = 1500

cdef struct rig:
    guest g
    wdevice dev
    wdevice other               # the receiver's, where that is not `dev`
    wring *rings
    vmp_log log
    uint64_t features
    uint16_t first_used

cdef rig *current
cdef worker *work = <worker *> calloc(1, sizeof(worker))
cdef wring **queue = <wring **> calloc(VMP_RINGS_MAX, sizeof(wring *))
cdef uint8_t *frame = <uint8_t *> calloc(1, FRAME_BYTES)
cdef int near_end = -1          # the back-end's end of the pair of sockets
cdef int far_end = -1
cdef int call_fd = -1           # which interrupts the driver
cdef fd_port *port = NULL


cdef void looked(const void *at, size_t size) noexcept nogil:
    if current is not NULL:
        guest_looked(&current.g, at, size)


cdef void send_packet(rig *t, uint8_t kind) noexcept nogil:
    """Offer a frame with a header of its own, in up to 8 descriptors cut anywhere."""
    cdef guest *g = &t.g
    cdef vring_desc made[8]
    cdef uint8_t header[12]
    cdef uint16_t at = take_u16(g) % (PLAIN_SIZE - 64)
    cdef uint8_t n = 1 + kind % 8
    cdef uint8_t first = take_u8(g)
    cdef uint32_t length
    cdef uint8_t i
    if kind & 8:
        memset(header, 0, 12)
    else:
        for i in range(10):
            header[i] = take_u8(g)
    if n > g.drivers[TX].num:
        n = <uint8_t> g.drivers[TX].num
    guest_write(g, PLAIN, at, header, 12)
    for i in range(n):
        length = take_u8(g)
        if length >= 0xF0:
            length = take_u16(g)
        made[i].addr = PLAIN_GPA + at
        made[i].len = length
        made[i].flags = DESC_F_NEXT if i + 1 < n else 0
        made[i].next = <uint16_t> ((first + i + 1) % g.drivers[TX].num)
        at = <uint16_t> ((at + length) % PLAIN_SIZE)
    if g.drivers[TX].packed:
        offer_position(g, TX, made, n)
        return
    for i in range(n):
        put_descriptor(g, TX, first + i, &made[i])
    offer_head(g, TX, <uint16_t> (first % g.drivers[TX].num))


cdef void receive_packet(rig *t, uint8_t kind) noexcept nogil:
    """The network sends a frame, with the header that the kernel would put before it."""
    cdef guest *g = &t.g
    cdef uint32_t length = take_u8(g) if kind & 1 else take_u32(g) % FRAME_BYTES
    cdef uint8_t i
    memset(frame, 0, 12)
    if kind & 2:
        for i in range(10):
            frame[i] = take_u8(g)
    if near_end >= 0:
        write(far_end, frame, length)


cdef void drain() noexcept nogil:
    """The network takes what was sent to it."""
    while read(far_end, frame, FRAME_BYTES) > 0:
        pass


cdef void run_items(rig *t, uint32_t r) noexcept nogil:
    """Run a ring's work item, and those that it queues."""
    cdef wring *ring
    cdef int _i
    queue_ring(work, &t.rings[r])
    for _i in range(ITEMS_MAX):
        if work.queue_head == work.queue_tail:
            return
        ring = work.queue[work.queue_head & (VMP_RINGS_MAX - 1)]
        work.queue_head += 1
        ring.queued = 0
        if not ring.active:
            continue
        if ring.handler(ring, work) == BROKEN:
            must(&t.g, ring.vq.broken, "a whole ring is called broken")
            ring.active = 0


cdef void step(rig *t) noexcept nogil:
    """One thing that the driver, the network or the worker does."""
    cdef guest *g = &t.g
    cdef uint8_t kind = take_u8(g)
    cdef uint8_t what = kind & 0x0F
    cdef uint32_t r = kind >> 4 & 1
    cdef uint8_t i
    cdef vring_desc d
    if what < 4:
        send_packet(t, kind >> 4)
    elif what < 7:
        i = take_u8(g)
        offer_chain(g, RX, 1 + (kind >> 4), i, 0)
    elif what < 9:
        run_items(t, r)
    elif what == 9:
        receive_packet(t, kind >> 4)
    elif what == 10:
        i = take_u8(g)
        choose_descriptor(g, &d)
        put_entry(g, r, kind >> 5, i, &d)
    elif what == 11:
        i = take_u8(g)
        choose_descriptor(g, &d)
        put_descriptor(g, r, i, &d)
        if not g.drivers[r].packed:
            offer_head(g, r, i)
    elif what == 12:
        scribble(g)
    elif what == 13:
        if near_end >= 0:
            drain()
    elif what == 14:
        # The front-end enables or disables the receive ring, which may have been stopped.
        t.rings[RX].active = kind >> 4 & 1 if not t.rings[RX].vq.broken else 0
        t.rings[RX].started = kind >> 5 & 1 | t.rings[RX].active
        t.rings[RX].resting = t.rings[RX].started and not t.rings[RX].active
    else:
        for i in range(1 + (kind >> 4)):
            offer_chain(g, RX, 1, i, 0)
        run_items(t, TX)


cdef uint64_t choose_features(guest *g) noexcept nogil:
    """What was negotiated: offloads, mergeable buffers, and of the ring."""
    cdef uint64_t features = take_u32(g) & 0x0000FFFF
    features |= <uint64_t> (take_u8(g) & 7) << 54
    features |= <uint64_t> (take_u8(g) & 3) << F_INDIRECT
    if take_u8(g) & 3:
        features |= <uint64_t> 1 << F_VERSION_1 | <uint64_t> 1 << F_CSUM
    return features


cdef const char *run(const uint8_t *data, size_t size) noexcept nogil:
    """One execution. What did not hold, NULL: everything did."""
    cdef rig t
    cdef wring rings[RINGS]
    cdef guest *g = &t.g
    cdef uint8_t options
    cdef bint packed, with_port
    cdef uint64_t given, counted
    cdef uint32_t r, num
    cdef uint16_t start
    cdef int _i
    global current
    memset(&t, 0, sizeof(rig))
    memset(rings, 0, sizeof(rings))
    make_guest(g, data, size)
    options = take_u8(g)
    packed = options & 1
    with_port = options & 2
    g.flips = options & 4
    g.pattern = take_u64(g) if g.flips else 0
    t.features = choose_features(g)
    start = take_u8(g)
    start = <uint16_t> (0 - start)
    num = take_u8(g)
    for r in range(RINGS):
        if packed:
            make_ring(g, r, 1 + num % NUM_MAX, True, POSITION_WRAP)
        else:
            make_ring(g, r, <uint32_t> 1 << num % 7, False, start)
    make_memory(g)
    t.rings = rings
    t.dev.features = t.features
    t.dev.header_len = 12 if has(t.features, F_VERSION_1) or has(t.features, F_MRG_RXBUF) else 10
    t.dev.n_rings = RINGS
    t.other = t.dev
    if options & 0x10 and not with_port:
        # A patch: the receiver is another device, which negotiated something else.
        t.other.features = choose_features(g)
        t.other.header_len = 12 if has(t.other.features, F_VERSION_1) or has(t.other.features, F_MRG_RXBUF) else 10
    if options & 0x40:
        t.log.pages = 8 * LOG_BYTES
        t.log.bits = <uint8_t *> calloc(1, LOG_BYTES)
    current = &t
    for r in range(RINGS):
        rings[r].partner = &rings[r ^ 1]
        rings[r].dev = &t.dev if r == TX else &t.other
        rings[r].index = r
        rings[r].active = rings[r].started = 1
        if options & 0x40:
            rings[r].vq.log = &t.log
            rings[r].vq.log_used = 1
            rings[r].vq.log_used_gpa = g.regions[PARTS * r + DEVICE].gpa
        attach_ring(g, r, &rings[r].vq, t.features)
        rings[r].vq.call_fd = call_fd if options & 0x80 else -1
        rings[r].backend = port
        rings[r].handler = loopback_transmit if r == TX else loopback_receive
        if with_port and port is not NULL:
            rings[r].handler = fd_transmit if r == TX else fd_receive
    if port is not NULL:
        port.header_len = 10 if options & 0x10 else t.dev.header_len
        port.want = t.dev.header_len + (65562 if options & 0x20 else MTU + 18)
        port.is_packet = options >> 3 & 1
        port.pending_len = 0
    work.rings = rings
    work.queue = queue
    work.queue_head = work.queue_tail = 0
    t.first_used = rings[TX].vq.used_idx
    for _i in range(STEPS_MAX):
        if g.at >= g.end or g.wrong is not NULL:
            break
        step(&t)
    run_items(&t, TX)
    run_items(&t, RX)
    current = NULL
    if not packed:
        given = <uint16_t> (rings[TX].vq.used_idx - t.first_used)
        counted = g.slots[TX].packets
        for r in range(DROPS):
            counted += g.slots[TX].drops[r]
        must(g, given == <uint16_t> counted, "transmit chains went back that were not counted, or the other way")
    if options & 0x40 and g.wrong is NULL:
        check_logged(g, &t.log)
    if near_end >= 0:
        drain()
        while read(near_end, frame, FRAME_BYTES) > 0:
            pass
    free(t.log.bits)
    free_guest(g)
    return g.wrong


cdef int fuzz(const uint8_t *data, size_t size) noexcept nogil:
    return report(run(data, size))


def connect():
    """Make the pair of sockets, and an eventfd; returns the pair, to be kept as long as anything is run."""
    global near_end, far_end, port, call_fd
    call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        end.setblocking(False)
    near_end, far_end = (end.fileno() for end in pair)
    port = fd_port_new(near_end, 12, 0, False)
    return pair


def disconnect(pair):
    """Undo `connect`."""
    global near_end, far_end, port, call_fd
    os.close(call_fd)
    fd_port_free(port)
    port = NULL
    near_end = far_end = call_fd = -1
    for end in pair:
        end.close()


kept = []


def entry(str target):
    """Return the address of the target's function for libFuzzer."""
    kept.append(connect())
    hook_looks(looked)
    return <uintptr_t> <void *> fuzz


def replay(str target, bytes data):
    """Run one input. Returns what did not hold, None: everything did."""
    pair = connect()
    cdef const char *wrong = run(data, len(data))
    disconnect(pair)
    return None if wrong is NULL else wrong.decode()
