"""The benchmarks' front-end: a driver that does as little as a driver may, so that the back-end is what is measured.

What it does for each packet it sends: descriptor, available entry and the packet's first line (header, addresses,
sequence number) are written anew. For each packet it receives: the used entry is read and checked (the buffer that is
due, the length that is due), header and first bytes are looked at; in a loop the sequence number must be the next one.
Of the buffers that a back-end fills by itself every 64th is overwritten before it is given, and must have been
written when it comes back. What is wrong is counted as bad and shown with the result. For the rest of a payload the
demo's guest is there (_guest.pyx), which checks each byte.

Rules: it needs a device that works in order (VIRTIO_F_IN_ORDER): a buffer's place in the ring is its number. One thread
drives all flows of a process. Rings are in _driver.pxd and _packed_driver.pxd; a flow's own loops write entries, for
those of the demo's guest keep books that are not needed here.
Source: virtio 1.3, 2.7 (split virtqueues), 2.8 (packed virtqueues), 5.1.6 (network device operation).
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint16_t
from libc.string cimport memcpy, memset

from vhostmp.shm.atomics cimport (
    vmp_cpu_relax,
    vmp_load_relaxed_u64,
    vmp_now_ns,
    vmp_prefetch_read,
    vmp_store_relaxed_u16,
    vmp_store_relaxed_u64,
)
from vhostmp.tools._driver cimport DESC_WRITE, expose, listen, ring_t, silence, used_now, vring_desc, vring_used_elem
from vhostmp.tools._packed_driver cimport (
    DESC_AVAIL,
    DESC_USED,
    packed_at,
    packed_desc,
    packed_expose,
    packed_listen,
    packed_silence,
    packed_used,
    packed_wrap,
)

from vhostmp.errors import LocalError

cdef extern from "unistd.h" nogil:
    ssize_t read(int fd, void *buf, size_t count)
    ssize_t write(int fd, const void *buf, size_t count)

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLIN
    int poll(pollfd *fds, unsigned long nfds, int timeout)

cdef enum:
    BURST = 64
    SAMPLE = 63             # of these buffers one is looked at closely
    POISON = 0xa5
    PATIENCE_ROUNDS = 1 << 22       # without a packet back: what is under way is lost
    LOOK_MS = 50            # asleep, so often it is looked whether it is time to stop
    SUB = 1 << TIMES_SUB_BITS

BOARD_BYTES = BOARD_WORDS * 8
STATE_WORD, STOP_WORD, FLOWS_WORD, TIMES_WORD = BOARD_STATE, BOARD_STOP, BOARD_FLOWS, BOARD_TIMES
WORDS_PER_FLOW, MOST_FLOWS, TIMES_COUNT = FLOW_WORDS, FLOWS_MAX, TIMES


# -- times -----------------------------------------------------------------------------------------------------------

cdef inline uint32_t time_slot(uint64_t ns) noexcept nogil:
    """Where a time is counted: powers of two, each in SUB parts (the layout of HdrHistogram)."""
    cdef uint32_t shift = 0
    while ns >> shift >= 2 * SUB:
        shift += 1
    cdef uint64_t slot = (<uint64_t> shift << TIMES_SUB_BITS) + (ns >> shift)
    return <uint32_t> min(slot, <uint64_t> (TIMES - 1))


cdef inline void note(uint64_t *times, uint64_t ns) noexcept nogil:
    # Relaxed: a count that the harness reads while it goes on.
    cdef uint64_t *word = times + time_slot(ns)
    vmp_store_relaxed_u64(word, word[0] + 1)


def slot_of(uint64_t nanoseconds):
    """Return in which word of the board's times a time is counted."""
    return time_slot(nanoseconds)


def value_of(uint32_t slot):
    """Return the time that a word stands for, nanoseconds: the middle of its part."""
    if slot < 2 * SUB:
        return float(slot)
    shift = (slot >> TIMES_SUB_BITS) - 1
    return (((slot & (SUB - 1)) + SUB) + 0.5) * 2.0 ** shift


# -- a ring of either format, in order -------------------------------------------------------------------------------

cdef inline uint16_t under_way(ring_t *r) noexcept nogil:
    return <uint16_t> (r.next_avail - r.last_used)


cdef inline void put(ring_t *r, uint64_t addr, uint32_t length, uint16_t flags) noexcept nogil:
    """Write the next descriptor, and its available entry."""
    cdef uint16_t at = r.next_avail & r.mask
    cdef packed_desc *d
    if r.packed:
        d = packed_at(r, r.next_avail)
        flags |= DESC_AVAIL if packed_wrap(r, r.next_avail) else DESC_USED
        d.addr = addr
        d.length = length
        d.id = at
        if r.next_avail == r.kicked:
            r.held_flags = flags
        else:
            vmp_store_relaxed_u16(&d.flags, flags)      # behind the first one, which the device has to see before
    else:
        r.desc[at] = vring_desc(addr, length, flags, 0)
        r.avail[2 + at] = at
    r.next_avail += 1


cdef inline void show(flow_t *f, ring_t *r) noexcept nogil:
    if r.packed:
        packed_expose(r, f.event_idx)
    else:
        expose(r, f.event_idx)


cdef inline void hush(flow_t *f, ring_t *r) noexcept nogil:
    if r.packed:
        packed_silence(r)
    else:
        silence(r, f.event_idx)


cdef inline bint await_call(flow_t *f, ring_t *r) noexcept nogil:
    """Ask for a call with the next used entry. True when one is there already."""
    r.free_count = r.num - under_way(r)
    return packed_listen(r, f.event_idx) if r.packed else listen(r, f.event_idx)


# -- sending ---------------------------------------------------------------------------------------------------------

cdef void reap(flow_t *f) noexcept nogil:
    """Take back what was sent."""
    cdef ring_t *r = &f.tx
    cdef uint16_t n, used
    if not r.packed:
        used = used_now(r)
        n = <uint16_t> (used - r.last_used)
        if n == 0:
            return
        # Of a batch the last entry alone need be written (virtio 1.3, 2.7.9).
        if n > under_way(r) or (<vring_used_elem *> (r.used + 2))[(used - 1) & r.mask].id != ((used - 1) & r.mask):
            f.bad += 1
            n = min(n, under_way(r))
        r.last_used += n
        return
    while under_way(r) and packed_used(r, r.last_used):
        n = <uint16_t> ((packed_at(r, r.last_used).id - r.last_used) & r.mask) + 1      # the last of a batch (2.8.8)
        if n > under_way(r):
            f.bad += 1
            n = 1
        r.last_used += n


cdef uint32_t send(flow_t *f, uint32_t most) noexcept nogil:
    """Send up to `most` packets, each of them due a gap after the last one; returns how many it came to."""
    cdef ring_t *r = &f.tx
    cdef uint32_t n = min(most, <uint32_t> (r.num - under_way(r)))
    cdef uint64_t there = f.sent - f.received - f.lost
    cdef uint32_t i
    cdef uint16_t at
    cdef uint8_t *slot
    if f.receives:
        n = min(n, <uint32_t> (f.rx.num - there) if there < f.rx.num else 0)
    for i in range(n):
        at = r.next_avail & r.mask
        slot = f.tx_slots + <size_t> at * f.tx_stride
        memcpy(slot, f.template, LINE)
        (<uint64_t *> (slot + NUMBER_AT))[0] = f.sent + i
        (<uint64_t *> (slot + TIME_AT))[0] = f.due_ns
        f.due_ns += f.gap_ns
        put(r, f.tx_gpa + <uint64_t> at * f.tx_stride, HEADER + f.size, 0)
    if n:
        f.sent += n
        show(f, r)
        vmp_store_relaxed_u64(&f.words[0], f.sent)      # counters: no order, the harness takes differences
        vmp_store_relaxed_u64(&f.words[4], r.kicks + f.rx.kicks)
    return n


# -- receiving -------------------------------------------------------------------------------------------------------

cdef inline void check(flow_t *f, uint8_t *slot, uint32_t length, bint sample, uint64_t now) noexcept nogil:
    """Look at a packet that came, at `now` if it is timed."""
    cdef uint64_t number
    cdef uint16_t buffers
    memcpy(&buffers, slot + 10, 2)
    if length != HEADER + f.size or buffers != 1:
        f.bad += 1
    elif f.sends:
        number = (<uint64_t *> (slot + NUMBER_AT))[0]
        if number < f.expected or number >= f.sent:
            f.bad += 1
        else:
            f.lost += number - f.expected
            f.expected = number + 1
            if now:
                note(f.times, now - (<uint64_t *> (slot + TIME_AT))[0])
    elif sample and slot[HEADER] == POISON and slot[LINE - 1] == POISON:
        f.bad += 1


cdef inline void stock(flow_t *f) noexcept nogil:
    """Give the next receive buffer."""
    cdef uint16_t at = f.rx.next_avail & f.rx.mask
    if not f.sends and at & SAMPLE == 0:
        memset(f.rx_slots + <size_t> at * f.rx_stride, POISON, LINE)
    put(&f.rx, f.rx_gpa + <uint64_t> at * f.rx_stride, f.rx_stride, DESC_WRITE)


cdef uint32_t receive(flow_t *f) noexcept nogil:
    """Take what has come, check it, give the buffers again; returns how many."""
    cdef ring_t *r = &f.rx
    cdef uint32_t n = 0
    cdef uint32_t most = BURST
    cdef uint16_t at
    cdef uint64_t now = 0
    cdef vring_used_elem elem
    if not r.packed:
        most = <uint16_t> (used_now(r) - r.last_used)
        if most > under_way(r):
            f.bad += 1
            most = under_way(r)
        most = min(most, <uint32_t> BURST)
        for at in range(<uint16_t> most):
            vmp_prefetch_read(f.rx_slots + <size_t> ((r.last_used + at) & r.mask) * f.rx_stride)
    while n < most and under_way(r):
        at = r.last_used & r.mask
        if r.packed:
            if not packed_used(r, r.last_used):
                break
            elem.id, elem.length = packed_at(r, r.last_used).id, packed_at(r, r.last_used).length
        else:
            elem = (<vring_used_elem *> (r.used + 2))[at]
        if f.gap_ns and n == 0:
            now = vmp_now_ns()
        if elem.id != at:
            f.bad += 1
        else:
            check(f, f.rx_slots + <size_t> at * f.rx_stride, elem.length, at & SAMPLE == 0, now)
        r.last_used += 1
        n += 1
    if n == 0:
        return 0
    f.received += n
    for _ in range(n):
        stock(f)
    show(f, r)
    vmp_store_relaxed_u64(&f.words[1], f.received)      # counters, as above
    vmp_store_relaxed_u64(&f.words[2], f.bad)
    vmp_store_relaxed_u64(&f.words[3], f.lost)
    return n


cdef void begin(flow_t *f) noexcept nogil:
    """Ask for no calls, give all receive buffers."""
    hush(f, &f.tx)
    hush(f, &f.rx)
    if f.receives:
        while under_way(&f.rx) < f.rx.num:
            stock(f)
        show(f, &f.rx)


cdef void give_up(flow_t *f) noexcept nogil:
    """Nothing has come back for long: what is under way is lost."""
    if f.sends and f.sent != f.received + f.lost:
        f.lost = f.sent - f.received
        f.expected = f.sent
        vmp_store_relaxed_u64(&f.words[3], f.lost)      # a counter, as above


# -- the Python side -------------------------------------------------------------------------------------------------

cdef class _View:
    """A buffer, held as long as the object lives."""

    cdef Py_buffer view

    def __cinit__(self, buf, size_t needed):
        PyObject_GetBuffer(buf, &self.view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        if <size_t> self.view.len < needed:
            raise LocalError(f"buffer has {self.view.len} bytes, {needed} are needed")

    def __dealloc__(self):
        PyBuffer_Release(&self.view)

    cdef uint8_t *at(self, size_t offset):
        return <uint8_t *> self.view.buf + offset


cdef class Flow:
    """One queue pair and its packets."""

    cdef flow_t f
    cdef list views

    def __init__(self, memory, board, uint32_t number, *, uint64_t gpa, tx, rx, size_t slots, strides, uint32_t size,
                 bytes header, bint sends, bint receives, bint packed, bint event_idx, uint64_t gap_ns):
        """Map everything out; nothing is written before it is driven.

        `memory` is guest memory, at guest-physical `gpa`. `tx` and `rx` are (entries, desc, avail, used, kick fd, call
        fd), offsets in bytes of `memory`; at `slots` are the transmit slots, then the receive slots, `strides` bytes
        each. `size` is that of the frames, `header` the virtio header before each, `gap_ns` the time between two of
        them, 0 for full speed. `number` is which flow of `board` it is. Raises LocalError where something does not fit.
        """
        self.f.tx_stride, self.f.rx_stride = strides
        if size < LINE - HEADER or HEADER + size > self.f.tx_stride or (receives and HEADER + size > self.f.rx_stride):
            raise LocalError(f"a frame of {size} bytes does not fit")
        if len(header) != HEADER or number >= FLOWS_MAX:
            raise LocalError(f"flow {number} or its header of {len(header)} bytes is none")
        end = slots + <size_t> tx[0] * self.f.tx_stride + <size_t> rx[0] * self.f.rx_stride
        view, words = _View(memory, end), _View(board, BOARD_WORDS * 8)
        self.views = [view, words]
        self.f.words = <uint64_t *> (<_View> words).at(0) + BOARD_FLOWS + number * FLOW_WORDS
        self.f.times = <uint64_t *> (<_View> words).at(0) + BOARD_TIMES
        self.f.gap_ns = gap_ns
        self._ring(&self.f.tx, view, tx, packed)
        self._ring(&self.f.rx, view, rx, packed)
        self.f.tx_slots = (<_View> view).at(slots)
        self.f.rx_slots = self.f.tx_slots + <size_t> self.f.tx.num * self.f.tx_stride
        self.f.tx_gpa = gpa + slots
        self.f.rx_gpa = self.f.tx_gpa + <uint64_t> self.f.tx.num * self.f.tx_stride
        self.f.size = size
        self.f.sends, self.f.receives, self.f.event_idx = sends, receives, event_idx
        self.preset(bytes(header) + b"\x02\0\0\0\0\x02\x02\0\0\0\0\x01\x88\xb5")

    def preset(self, bytes packet):
        """Have every packet begin with the bytes of `packet`, header included; those behind the first line once."""
        head = packet[:NUMBER_AT] if self.f.receives else packet[:LINE]
        if len(packet) > HEADER + self.f.size:
            raise LocalError(f"{len(packet)} bytes are more than a packet")
        memset(self.f.template, 0, LINE)
        memcpy(self.f.template, <const char *> head, len(head))
        for at in range(self.f.tx.num):
            memcpy(self.f.tx_slots + <size_t> at * self.f.tx_stride, <const char *> packet, len(packet))

    cdef _ring(self, ring_t *r, _View view, numbers, bint packed):
        num, desc, avail, used, kick_fd, call_fd = numbers
        if num < BURST or num > 32768 or num & (num - 1):
            raise LocalError(f"ring size {num} is not a power of two from {BURST} to 32768")
        if max(desc + 16 * num, avail + 6 + 2 * num, used + 6 + 8 * num) > view.view.len:
            raise LocalError("a ring does not lie in memory")
        r.num, r.mask, r.packed = num, num - 1, packed
        r.desc = <vring_desc *> view.at(desc)
        r.avail = <uint16_t *> view.at(avail)
        r.used = <uint16_t *> view.at(used)
        r.kick_fd, r.call_fd = kick_fd, call_fd


cdef inline uint32_t due(flow_t *f) noexcept nogil:
    """How many packets are to be sent now."""
    cdef uint64_t now
    if not f.gap_ns:
        return BURST
    now = vmp_now_ns()
    return <uint32_t> min((now - f.due_ns) // f.gap_ns + 1, <uint64_t> BURST) if now >= f.due_ns else 0


def flood(list flows, board):
    """Drive the flows until the board says stop, each at full speed or with its gap between packets.

    Without the GIL, and without a look at signals. With a gap, times are noted: from when a packet was to be sent,
    not from when it could be.
    """
    cdef flow_t *all_flows[FLOWS_MAX]
    cdef flow_t *f
    cdef Py_ssize_t count = len(flows)
    cdef Py_ssize_t i
    cdef uint32_t done
    cdef _View view = _View(board, BOARD_WORDS * 8)
    cdef uint64_t *words = <uint64_t *> view.at(0)
    if not 0 < count <= FLOWS_MAX:
        raise LocalError(f"{count} flows are not 1 to {FLOWS_MAX}")
    for i in range(count):
        all_flows[i] = &(<Flow?> flows[i]).f
    with nogil:
        for i in range(count):
            begin(all_flows[i])
            all_flows[i].due_ns = vmp_now_ns()
        vmp_store_relaxed_u64(&words[BOARD_STATE], 1)       # a hint that measuring makes sense
        # Relaxed: stop speaks of nothing else.
        while not vmp_load_relaxed_u64(&words[BOARD_STOP]):
            for i in range(count):
                f = all_flows[i]
                done = receive(f) if f.receives else 0
                if f.sends:
                    reap(f)
                    done += send(f, due(f))
                if done:
                    f.idle = 0
                    continue
                vmp_cpu_relax()
                vmp_cpu_relax()
                f.idle += 1
                if f.idle == PATIENCE_ROUNDS:
                    f.idle = 0
                    give_up(f)


cdef bint sleep_until_called(int fd, uint64_t *words) noexcept nogil:
    """Block until an eventfd is written to; False when it is time to stop."""
    cdef uint64_t value
    cdef pollfd one = pollfd(fd, POLLIN, 0)
    # The back-end may make its end of the eventfd one that does not block, and ours with it: read() alone will not do.
    while not vmp_load_relaxed_u64(&words[BOARD_STOP]):
        if poll(&one, 1, LOOK_MS) > 0 and read(fd, &value, 8) == 8:
            return True
    return False


def ping(Flow flow, board):
    """Send one packet at a time and sleep until it is back; the next one its gap after the last one was sent.

    In event mode, then, the front-end's side too. Until the board says stop.
    """
    cdef flow_t *f = &flow.f
    cdef _View view = _View(board, BOARD_WORDS * 8)
    cdef uint64_t *words = <uint64_t *> view.at(0)
    cdef uint64_t began
    with nogil:
        begin(f)
        vmp_store_relaxed_u64(&words[BOARD_STATE], 1)       # as in flood()
        while not vmp_load_relaxed_u64(&words[BOARD_STOP]):
            reap(f)
            f.due_ns = began = vmp_now_ns()
            send(f, 1)
            while f.received + f.lost < f.sent:
                if not await_call(f, &f.rx) and not sleep_until_called(f.rx.call_fd, words):
                    break
                receive(f)
            while vmp_now_ns() - began < f.gap_ns and not vmp_load_relaxed_u64(&words[BOARD_STOP]):
                vmp_cpu_relax()


def ping_eventfd(int ask_fd, int answer_fd, board, uint64_t gap_ns):
    """Do the same with nothing but two eventfds, whose other ends `answer_eventfd` has: what a wake-up costs."""
    cdef _View view = _View(board, BOARD_WORDS * 8)
    cdef uint64_t *words = <uint64_t *> view.at(0)
    cdef uint64_t began
    cdef uint64_t one = 1
    with nogil:
        vmp_store_relaxed_u64(&words[BOARD_STATE], 1)       # as in flood()
        while not vmp_load_relaxed_u64(&words[BOARD_STOP]):
            began = vmp_now_ns()
            if write(ask_fd, &one, 8) != 8 or not sleep_until_called(answer_fd, words):
                break
            note(words + BOARD_TIMES, vmp_now_ns() - began)
            vmp_store_relaxed_u64(&words[BOARD_FLOWS + 1], words[BOARD_FLOWS + 1] + 1)      # a counter
            while vmp_now_ns() - began < gap_ns and not vmp_load_relaxed_u64(&words[BOARD_STOP]):
                vmp_cpu_relax()


def answer_eventfd(int ask_fd, int answer_fd, board):
    """Answer each question of `ping_eventfd`, until the board says stop."""
    cdef _View view = _View(board, BOARD_WORDS * 8)
    cdef uint64_t *words = <uint64_t *> view.at(0)
    cdef uint64_t one = 1
    with nogil:
        vmp_store_relaxed_u64(&words[BOARD_STATE], 1)       # as in flood()
        while sleep_until_called(ask_fd, words) and write(answer_fd, &one, 8) == 8:
            pass
