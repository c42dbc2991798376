"""The software guest: the driver side of a network device's two virtqueues, at full speed, without the GIL.

What it is for: it sends numbered packets, takes them back from a device that loops them, and counts what the device
lost, repeated, reordered or damaged. Nothing is assumed: each frame carries a sequence number, the generation of guest
memory it was written in and a pattern that follows from both: every byte that comes back can be told right or wrong.

How memory moves under load. There are two pools of packet buffers, the same guest-physical range, only one of them in
the memory table at a time. DUAL: from now on each packet is written to both, each receive buffer is cleared in both,
and a completed one is looked for in both. Then the control process changes the table. MOVED: what was completed up to
now may still lie in the old pool, what is completed later may not; the guest never looks there again, and the control
process has poisoned it. A worker that reads the old pool sends poison, one that writes to it leaves a cleared buffer
behind.

Pauses. The control process makes board.swap_seq odd before a swap, even after it. A pause is the longest gap between
two completions that touches that window, the guest's own absences included.

Rules: one guest a queue pair and a process. Rings are in _driver.pxd and _packed_driver.pxd, frames in _frame.pxd,
orders and counters in _board.pxd.
Source: virtio 1.3, 2.7 (split virtqueues), 2.8 (packed virtqueues), 5.1.6 (network device operation).
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int16_t, uint16_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from vhostmp.shm.atomics cimport (
    vmp_cpu_relax,
    vmp_load_acquire_u32,
    vmp_load_acquire_u64,
    vmp_load_relaxed_u64,
    vmp_now_ns,
    vmp_store_relaxed_u64,
    vmp_store_release_u64,
)
from vhostmp.tools._board cimport (
    BINS_MAX,
    COMMAND_DRAIN,
    COMMAND_DUAL,
    COMMAND_KILL,
    COMMAND_MOVED,
    COMMAND_RUN,
    COMMAND_STOP,
    PAUSES_MAX,
    board_t,
)
from vhostmp.tools._driver cimport (
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    completed,
    expose,
    give_head,
    listen,
    offer,
    ring_t,
    silence,
    take_head,
    used_now,
    vring_desc,
    vring_used_elem,
)
from vhostmp.tools._packed_driver cimport (
    packed_expose,
    packed_listen,
    packed_offer,
    packed_silence,
    packed_take,
    packed_used,
    packed_used_now,
)
from vhostmp.tools._frame cimport FLAG_HOLD, FRAME_MAX, FRAME_MIN, frame_good, frame_make, pattern_of

from vhostmp.errors import LocalError

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLIN
    int poll(pollfd *fds, unsigned long nfds, int timeout)

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "unistd.h" nogil:
    ssize_t read(int fd, void *buf, size_t count)

cdef enum:
    BURST = 64
    SLEEP_MS = 1
    YIELD_NS = 50000    # whoever else needs this processor gets it so soon: with two of them the control process does

SLOT = SLOT_BYTES
F_INDIRECT, F_EVENT_IDX, F_VERSION_1, F_RING_PACKED, F_IN_ORDER = 28, 29, 32, 34, 35


# -- a ring of either format -----------------------------------------------------------------------------------------

cdef inline void ring_offer(ring_t *r, uint64_t addr, uint32_t length, uint16_t flags, uint16_t head) noexcept nogil:
    if r.packed:
        packed_offer(r, addr, length, flags, head)
    else:
        offer(r, addr, length, flags, head)


cdef inline void ring_expose(ring_t *r, bint event_idx) noexcept nogil:
    if r.packed:
        packed_expose(r, event_idx)
    else:
        expose(r, event_idx)


cdef inline void ring_silence(ring_t *r, bint event_idx) noexcept nogil:
    if r.packed:
        packed_silence(r)
    else:
        silence(r, event_idx)


cdef inline bint ring_listen(ring_t *r, bint event_idx) noexcept nogil:
    return packed_listen(r, event_idx) if r.packed else listen(r, event_idx)


cdef inline int ring_completed(ring_t *r) noexcept nogil:
    """How many used entries there may be to take, `ring_next` says when they end; -1: as no correct device has it."""
    return r.num - r.free_count if r.packed else completed(r)


cdef inline bint ring_next(ring_t *r, int left, vring_used_elem *elem) noexcept nogil:
    """Read the used entry at `last_used`, of `left` that there may be; False when there is none."""
    if not left:
        return False
    if not r.packed:
        elem[0] = (<vring_used_elem *> (r.used + 2))[r.last_used & r.mask]
        return True
    if not packed_used(r, r.last_used):
        return False
    packed_take(r, elem)
    return True


cdef inline uint32_t size_of(guest_t *g, uint64_t seq) noexcept nogil:
    """Length of frame number `seq`: fixed, or one that the number determines."""
    return g.size if g.size_max == g.size else g.size + <uint32_t> (pattern_of(seq, 0, 0) % (g.size_max - g.size + 1))


# -- counting --------------------------------------------------------------------------------------------------------

cdef inline void mark(guest_t *g, uint64_t seq, bint value) noexcept nogil:
    cdef uint64_t *word = g.seen + ((seq & (WINDOW_BITS - 1)) >> 6)
    cdef uint64_t bit = <uint64_t> 1 << (seq & 63)
    word[0] = word[0] | bit if value else word[0] & ~bit


cdef void missing(guest_t *g, uint64_t end) noexcept nogil:
    """Count the numbers from `high` to `end` as lost, to the kill's account from its boundary on."""
    while g.high < end:
        mark(g, g.high, False)
        if g.killing and g.high >= g.boundary:
            g.board.kill_lost += 1
        else:
            g.board.lost += 1
        g.high += 1


cdef void count(guest_t *g, uint64_t seq) noexcept nogil:
    """Enter one good frame."""
    if seq >= g.high:
        missing(g, seq)
        mark(g, seq, True)
        g.high = seq + 1
        g.damaged = 0
        g.board.received += 1
    elif seq + WINDOW_BITS <= g.high or (g.seen[(seq & (WINDOW_BITS - 1)) >> 6] >> (seq & 63)) & 1:
        if g.killing:
            g.board.kill_duplicated += 1
        else:
            g.board.duplicated += 1
    else:
        # Missing until now: late, not lost.
        mark(g, seq, True)
        g.board.reordered += 1
        g.board.received += 1
        if g.killing and seq >= g.boundary:
            g.board.kill_lost -= 1
        else:
            g.board.lost -= 1


cdef void note_pause(guest_t *g, uint64_t gap) noexcept nogil:
    g.board.pause_ns[g.board.pauses & (PAUSES_MAX - 1)] = <uint32_t> min(gap, <uint64_t> 0xffffffff)
    vmp_store_relaxed_u64(&g.board.pauses, g.board.pauses + 1)


cdef void note_time(guest_t *g, uint32_t packets) noexcept nogil:
    """Enter a completion: the histogram, and the pause of every swap whose window the gap before it touches."""
    cdef uint64_t now = vmp_now_ns()
    cdef uint64_t gap = now - g.last_ns
    # ORDER D7 (guest): load board.swap_seq                                          [acquire]
    #   pairs with  D8 (Board.swap_mark: store-release of swap_seq)
    #   without it  the word might be older than the packets just taken: a pause counted for a window it lies before.
    #   shown by    tests/unit/tools/test_guest.py::test_pause_is_measured
    cdef uint32_t swap = vmp_load_acquire_u32(&g.board.swap_seq)
    cdef uint64_t bin = (now - g.board.start_ns) // g.board.bin_ns
    if g.swap_seen & 1:
        g.gap_max = max(g.gap_max, gap)
        if swap != g.swap_seen:
            note_pause(g, g.gap_max)
            g.swap_seen += 1
    while g.swap_seen != swap:
        g.swap_seen += 1
        g.gap_max = gap
        if g.swap_seen != swap:
            note_pause(g, gap)
            g.swap_seen += 1
    g.last_ns = now
    g.board.bins[min(bin, <uint64_t> BINS_MAX - 1)] += packets


# -- the two queues --------------------------------------------------------------------------------------------------

cdef void write_packet(
    guest_t *g, uint8_t *slot, uint64_t slot_gpa, uint64_t seq, uint32_t size, bint indirect
) noexcept nogil:
    """Header, frame and, where wanted, the indirect table of one transmit slot in one pool."""
    cdef vring_desc *table = <vring_desc *> (slot + TABLE_AT)
    cdef uint16_t linked = 0 if g.tx.packed else 1
    memset(slot + HEADER_AT, 0, HEADER_BYTES)
    frame_make(slot + FRAME_AT, seq, g.generation, FLAG_HOLD if g.dual else 0, size)
    if indirect:
        # In a packed ring's table one entry follows the other without links, flags stand last, and are 0 (2.8.7).
        table[0] = vring_desc(slot_gpa + HEADER_AT, HEADER_BYTES, linked * DESC_NEXT, linked)
        table[1] = vring_desc(slot_gpa + FRAME_AT, 32, linked * DESC_NEXT, linked * 2)
        table[2] = vring_desc(slot_gpa + FRAME_AT + 32, size - 32, 0, 0)


cdef uint32_t send(guest_t *g) noexcept nogil:
    """Fill the transmit ring, as far as there are receive buffers for what is under way: nothing need be dropped."""
    cdef uint32_t n = 0
    cdef uint32_t size
    cdef uint16_t head
    cdef uint64_t gpa
    cdef bint indirect
    while n < BURST and g.tx.free_count > 0 and g.next_seq - g.high < g.rx.num + g.damaged:
        head = take_head(&g.tx)
        gpa = g.pool_gpa + <uint64_t> head * SLOT_BYTES
        size = size_of(g, g.next_seq)
        indirect = g.indirect and g.next_seq % g.indirect_every == 0
        write_packet(g, g.pools[g.current].tx + <size_t> head * SLOT_BYTES, gpa, g.next_seq, size, indirect)
        if g.dual:
            write_packet(g, g.pools[1 - g.current].tx + <size_t> head * SLOT_BYTES, gpa, g.next_seq, size, indirect)
        if indirect:
            ring_offer(&g.tx, gpa + TABLE_AT, 3 * sizeof(vring_desc), DESC_INDIRECT, head)
        else:
            ring_offer(&g.tx, gpa + HEADER_AT, HEADER_BYTES + size, 0, head)
        g.next_seq += 1
        n += 1
    if n:
        vmp_store_relaxed_u64(&g.board.sent, g.next_seq)
        ring_expose(&g.tx, g.event_idx)
    return n


cdef uint32_t reap_sent(guest_t *g) noexcept nogil:
    """Take back transmit slots."""
    cdef ring_t *r = &g.tx
    cdef int left = ring_completed(r)
    cdef uint32_t n = 0
    cdef uint16_t head
    cdef uint32_t id
    cdef vring_used_elem elem
    if left < 0:
        g.board.violations += 1
        return 0
    while ring_next(r, left, &elem):
        id = elem.id
        if id >= r.num or not r.out[id]:
            g.board.violations += 1
            id = r.order[r.last_used & r.mask]
        # A device in order may write one entry for a batch: the id of its last (virtio 1.3, 2.7.9 and 2.8.8).
        while left > 1 and g.in_order and r.order[r.last_used & r.mask] != id:
            head = r.order[r.last_used & r.mask]
            give_head(r, head)
            r.last_used += 1
            left -= 1
            n += 1
        give_head(r, <uint16_t> id)
        r.last_used += 1
        left -= 1
        n += 1
    if n:
        ring_silence(r, g.event_idx)
    return n


cdef inline void clear_slot(pool_t *pool, uint16_t head) noexcept nogil:
    """Make a receive buffer one that holds no frame: zeros carry a wrong type and a wrong pattern."""
    memset(pool.rx + <size_t> head * SLOT_BYTES + HEADER_AT, 0, FRAME_AT - HEADER_AT + 32)


cdef inline bint is_clear(pool_t *pool, uint16_t head) noexcept nogil:
    cdef uint64_t words[4]
    memcpy(words, pool.rx + <size_t> head * SLOT_BYTES + FRAME_AT, 32)
    return (words[0] | words[1] | words[2] | words[3]) == 0


cdef void stock(guest_t *g) noexcept nogil:
    """Give every free receive buffer to the device, cleared."""
    cdef uint16_t head
    cdef uint64_t gpa
    if g.rx.free_count == 0:
        return
    while g.rx.free_count:
        head = take_head(&g.rx)
        clear_slot(&g.pools[g.current], head)
        if g.dual:
            clear_slot(&g.pools[1 - g.current], head)
        gpa = g.pool_gpa + (<uint64_t> g.tx.num + head) * SLOT_BYTES + HEADER_AT
        ring_offer(&g.rx, gpa, RX_BYTES, DESC_WRITE, head)
    ring_expose(&g.rx, g.event_idx)


cdef void check_received(guest_t *g, uint16_t head, uint32_t length) noexcept nogil:
    """Look at one completed receive buffer and count what is in it."""
    cdef pool_t *pool = &g.pools[g.current]
    cdef uint8_t *slot
    cdef uint64_t seq
    cdef uint32_t generation
    cdef uint16_t buffers
    if g.dual and not is_clear(&g.pools[1 - g.current], head):
        pool = &g.pools[1 - g.current]
    slot = pool.rx + <size_t> head * SLOT_BYTES
    memcpy(&buffers, slot + HEADER_AT + 10, 2)
    if (
        HEADER_BYTES + FRAME_MIN <= length <= HEADER_BYTES + FRAME_MAX
        and buffers == 1
        and frame_good(slot + FRAME_AT, length - HEADER_BYTES, &seq, &generation)
        and seq < g.next_seq
        and length - HEADER_BYTES == size_of(g, seq)
        and g.generation - generation <= 1
    ):
        count(g, seq)
    else:
        g.board.corrupted += 1
        g.damaged += 1


cdef uint32_t receive(guest_t *g) noexcept nogil:
    """Take completed receive buffers, check them, give them back."""
    cdef ring_t *r = &g.rx
    cdef int left = min(ring_completed(r), <int> BURST)
    cdef uint32_t n = 0
    cdef vring_used_elem elem
    if left < 0:
        g.board.violations += 1
        return 0
    while ring_next(r, left, &elem):
        r.last_used += 1
        left -= 1
        n += 1
        if elem.id >= r.num or not r.out[elem.id]:
            g.board.violations += 1
            continue
        check_received(g, <uint16_t> elem.id, elem.length)
        give_head(r, <uint16_t> elem.id)
    if n:
        note_time(g, n)
        ring_silence(r, g.event_idx)
        stock(g)
    return n


# -- orders from the control process ---------------------------------------------------------------------------------

cdef void begin_dual(guest_t *g) noexcept nogil:
    """Make the other pool as good as this one: what the device holds is copied, receive buffers are cleared there."""
    cdef pool_t *here = &g.pools[g.current]
    cdef pool_t *there = &g.pools[1 - g.current]
    cdef uint16_t head
    for head in range(g.rx.num):
        clear_slot(there, head)
    for head in range(g.tx.num):
        if g.tx.out[head]:
            memcpy(there.tx + <size_t> head * SLOT_BYTES, here.tx + <size_t> head * SLOT_BYTES, SLOT_BYTES)
    g.dual = True
    g.generation += 1


cdef void end_dual(guest_t *g) noexcept nogil:
    """The table has changed. What is completed now may lie in either pool; nothing that comes later in the old one."""
    cdef uint16_t end = packed_used_now(&g.rx) if g.rx.packed else used_now(&g.rx)
    while <int16_t> (end - g.rx.last_used) > 0 and receive(g):
        pass
    g.current = 1 - g.current
    g.dual = False
    g.board.moves += 1


cdef bint obey(guest_t *g) noexcept nogil:
    """Work on the command of the control process; acknowledge it once it is done. False: end."""
    # ORDER D5 (guest): load board.command, then whatever it speaks of               [acquire]
    #   pairs with  D6 (Board.order: store-release of command)
    #   without it  after MOVED the guest might look at used entries as they were before the table changed.
    #   shown by    tests/unit/tools/test_guest.py::test_move_under_load
    cdef uint64_t command = vmp_load_acquire_u64(&g.board.command)
    cdef uint64_t code = command & 0xff
    cdef uint64_t now
    if command != g.under_way:
        g.under_way = command
        g.command_ns = vmp_now_ns()
        if code == COMMAND_RUN:
            g.sending = True
            g.last_ns = g.command_ns
            # ORDER D7 (guest): as in note_time; windows before the first packet are nobody's
            g.swap_seen = vmp_load_acquire_u32(&g.board.swap_seq)
        elif code == COMMAND_DUAL:
            begin_dual(g)
        elif code == COMMAND_MOVED:
            end_dual(g)
        elif code == COMMAND_KILL:
            g.boundary = g.next_seq
        elif code == COMMAND_DRAIN:
            g.sending = False
    now = vmp_now_ns()
    if code == COMMAND_KILL and g.high < g.boundary:
        # Everything sent before the boundary is settled before the kill may have it.
        if now - g.command_ns < g.quiet_ns:
            return True
        missing(g, g.boundary)
    elif code == COMMAND_DRAIN and g.high < g.next_seq:
        if now - max(g.last_ns, g.command_ns) < g.quiet_ns:
            return True
        missing(g, g.next_seq)
    if code == COMMAND_KILL:
        g.killing = True
    g.done = command
    g.board.kicks = g.tx.kicks + g.rx.kicks
    # ORDER D9 (guest): everything the command asked for, then store board.ack       [release]
    #   pairs with  D10 (Board.acknowledged: load-acquire of ack)
    #   without it  the control process might poison a pool that is still being read.
    #   shown by    tests/unit/tools/test_guest.py::test_move_under_load
    vmp_store_release_u64(&g.board.ack, command)
    return code != COMMAND_STOP


cdef void sleep_a_little(guest_t *g) noexcept nogil:
    """Block until an interrupt, or a millisecond at most: orders come without one."""
    cdef pollfd fds[2]
    cdef uint64_t value
    if ring_listen(&g.rx, g.event_idx):
        ring_silence(&g.rx, g.event_idx)
        return
    fds[0] = pollfd(g.rx.call_fd, POLLIN, 0)
    fds[1] = pollfd(g.tx.call_fd, POLLIN, 0)
    g.board.sleeps += 1
    g.board.tx_held, g.board.rx_held = g.tx.num - g.tx.free_count, g.rx.num - g.rx.free_count
    if poll(fds, 2, SLEEP_MS) > 0:
        for i in range(2):
            if fds[i].revents & POLLIN and read(fds[i].fd, &value, 8) == 8:
                g.board.calls += value
    ring_silence(&g.rx, g.event_idx)


cdef void run(guest_t *g) noexcept nogil:
    """The guest's life, until STOP."""
    cdef uint64_t idle_since = 0
    cdef uint64_t yielded = 0
    cdef uint32_t idle = 0
    cdef uint32_t work
    ring_silence(&g.tx, g.event_idx)
    ring_silence(&g.rx, g.event_idx)
    stock(g)
    while True:
        # No order needed to see that there is a new command: obey() loads it again.
        if vmp_load_relaxed_u64(&g.board.command) != g.done and not obey(g):
            return
        work = reap_sent(g) + receive(g)
        if g.sending:
            work += send(g)
        if g.last_ns - yielded > YIELD_NS:
            yielded = g.last_ns
            sched_yield()
        if work:
            idle = 0
            continue
        vmp_cpu_relax()
        idle += 1
        if idle == 1:
            idle_since = vmp_now_ns()
        elif idle & 15 == 0 and vmp_now_ns() - idle_since > g.spin_ns:
            sleep_a_little(g)
            idle = 0


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


cdef void free_ring(ring_t *r):
    free(r.free_heads)
    free(r.order)
    free(r.out)


cdef class Guest:
    """One software guest on one queue pair. `run` is its life."""

    cdef list views
    cdef guest_t g

    def __init__(self, base, pools, board, *, size_t board_offset, tx, rx, size_t pool_offset, uint64_t pool_gpa,
                 sizes, uint64_t features, uint32_t indirect_every, double spin_seconds, double quiet_seconds):
        """Map everything out; nothing is written before `run`.

        `base` holds the rings; `tx` and `rx` are (entries, desc, avail, used, kick fd, call fd), offsets in bytes of
        `base`. `pools` are the two places packet buffers may be in, each with this guest's slots (`tx` entries, then
        `rx` entries, SLOT bytes each) at `pool_offset`, guest-physical `pool_gpa`. `sizes` are the shortest and the
        longest frame. `features` are the negotiated ones. `quiet_seconds`: what has not come back so long after the
        last packet is lost. Raises LocalError where something does not fit.
        """
        cdef uint64_t low = 1
        self.g.size, self.g.size_max = sizes
        if not FRAME_MIN <= self.g.size <= self.g.size_max <= FRAME_MAX:
            raise LocalError(f"frame sizes {sizes} are not within {FRAME_MIN} to {FRAME_MAX}")
        if not features & low << F_VERSION_1:
            raise LocalError("the software guest speaks virtio 1 only")
        self.views = []
        packed = features & low << F_RING_PACKED != 0
        self._ring(&self.g.tx, base, tx, packed)
        self._ring(&self.g.rx, base, rx, packed)
        for i in range(2):
            view = _View(pools[i], pool_offset + (<size_t> self.g.tx.num + self.g.rx.num) * SLOT_BYTES)
            self.views.append(view)
            self.g.pools[i].tx = (<_View> view).at(pool_offset)
            self.g.pools[i].rx = self.g.pools[i].tx + <size_t> self.g.tx.num * SLOT_BYTES
        view = _View(board, board_offset + sizeof(board_t))
        self.views.append(view)
        self.g.board = <board_t *> (<_View> view).at(board_offset)
        self.g.board.bin_ns = self.g.board.bin_ns or 1000000
        self.g.pool_gpa = pool_gpa
        self.g.event_idx = features & low << F_EVENT_IDX != 0
        self.g.indirect = indirect_every > 0 and features & low << F_INDIRECT != 0
        self.g.in_order = features & low << F_IN_ORDER != 0
        self.g.indirect_every = max(1, indirect_every)
        self.g.spin_ns = <uint64_t> (spin_seconds * 1e9)
        self.g.quiet_ns = <uint64_t> (quiet_seconds * 1e9)
        self.g.seen = <uint64_t *> calloc(WINDOW_BITS // 64, 8)
        if self.g.seen is NULL:
            raise MemoryError

    cdef _ring(self, ring_t *r, base, numbers, bint packed):
        num, desc, avail, used, kick_fd, call_fd = numbers
        if num < 2 or num > 32768 or num & (num - 1):
            raise LocalError(f"ring size {num} is not a power of two from 2 to 32768")
        needed = max(desc + 16 * num, avail + (4 if packed else 6 + 2 * num), used + (4 if packed else 6 + 8 * num))
        view = _View(base, needed)
        self.views.append(view)
        r.num = num
        r.mask = num - 1
        r.packed = packed
        r.desc = <vring_desc *> (<_View> view).at(desc)
        r.avail = <uint16_t *> (<_View> view).at(avail)
        r.used = <uint16_t *> (<_View> view).at(used)
        r.kick_fd = kick_fd
        r.call_fd = call_fd
        r.free_heads = <uint16_t *> calloc(num, 2)
        r.order = <uint16_t *> calloc(num, 2)
        r.out = <uint8_t *> calloc(num, 1)
        if r.free_heads is NULL or r.order is NULL or r.out is NULL:
            raise MemoryError
        for i in range(num):
            r.free_heads[i] = i
        r.free_count = num

    def __dealloc__(self):
        free_ring(&self.g.tx)
        free_ring(&self.g.rx)
        free(self.g.seen)

    def run(self):
        """Work until STOP is ordered. Without the GIL, and without a look at signals."""
        with nogil:
            run(&self.g)
