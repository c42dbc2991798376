"""Fuzz targets "split" and "packed": the compiled ring against a driver that does anything.

The device side takes chains, puts some back, gives some back, publishes, asks for kicks, dies and is replaced; with and
without EVENT_IDX, INDIRECT_DESC, NOTIFY_ON_EMPTY, a dirty log and an IOTLB, and with a guest that changes what was read
(_guest.pxd). What must hold: chains lie in guest memory and add up; nothing is written but used elements and the words
for notifications, each where it belongs; a ring that is broken stays broken and moves no index; the log has the bits of
what was written, and no others.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from tests.fuzz._guest cimport (
    DESC,
    DEVICE,
    PLAIN_GPA,
    accept,
    attach_ring,
    check_burst,
    choose_address,
    choose_descriptor,
    compare_memory,
    expect,
    free_guest,
    guest,
    guest_looked,
    hook_looks,
    make_guest,
    make_memory,
    make_ring,
    must,
    offer_chain,
    offer_head,
    put_descriptor,
    put_entry,
    region_of,
    scribble,
    show_avail,
    take_u8,
    take_u16,
    take_u64,
)
from tests.fuzz._report cimport report
from vhostmp.shm._iotlb cimport vmp_iotlb
from vhostmp.shm._log cimport vmp_log
from vhostmp.shm.layout cimport vmp_ring
from vhostmp.workers._vring cimport (
    BURST,
    DESC_F_AVAIL,
    DESC_F_USED,
    DESC_F_WRITE,
    POSITION_OFFSET,
    POSITION_WRAP,
    TOUCH,
    burst,
    packed_distance,
    packed_forward,
    vring,
    vring_desc,
    vring_disable_notify,
    vring_drained,
    vring_enable_notify,
    vring_fetch,
    vring_give_back,
    vring_has_more,
    vring_publish,
    vring_room,
    vring_tell_log,
    vring_unfetch,
    vring_used_elem,
    vring_wants_call,
    vring_was_stocked,
)

cdef enum:
    STEPS_MAX = 512
    LOG_BYTES_MAX = 40          # a bit for each page up to the end of plain memory, and some more
    BURST_GUARD = 4096          # bytes behind the burst
    PATTERN = 0xA5

    F_EVENT_IDX = 29
    F_INDIRECT = 28
    F_NOTIFY_ON_EMPTY = 24

cdef struct pending:
    # A chain that was given back and not published, of a packed ring.
    uint16_t position
    uint16_t id
    uint32_t length

cdef struct rig:
    guest g
    vring vq
    uint64_t features
    vmp_log log
    uint8_t want[LOG_BYTES_MAX]         # bits that have to be set
    uint8_t may[LOG_BYTES_MAX]          # and those that may be
    uint32_t n_pending
    pending pendings[BURST]
    uint16_t packed_used                # where the next chain is given back
    bint behind_iommu

cdef rig *current                       # what `looked` belongs to
cdef burst *shared_burst = <burst *> calloc(1, sizeof(burst) + BURST_GUARD)
cdef vmp_iotlb *iotlb = <vmp_iotlb *> calloc(1, sizeof(vmp_iotlb))


cdef void looked(const void *at, size_t size) noexcept nogil:
    if current is not NULL:
        guest_looked(&current.g, at, size)


cdef void note(rig *t, uint8_t *bits, uint64_t gpa, uint64_t size) noexcept nogil:
    """Set bits by the book: page by page."""
    cdef uint64_t page
    if size == 0 or gpa + (size - 1) < gpa:
        return
    page = gpa >> 12
    while page <= (gpa + (size - 1)) >> 12 and page < t.log.pages:
        bits[page >> 3] |= <uint8_t> (1 << (page & 7))
        page += 1


cdef void note_used(rig *t, uint8_t *bits, uint64_t offset, uint64_t size) noexcept nogil:
    """The same for a part of the used ring, if that is logged."""
    cdef uint64_t start = t.g.regions[DEVICE].gpa if t.behind_iommu else t.vq.log_used_gpa
    if t.vq.log is not NULL and t.vq.log_used and start + offset >= start:
        note(t, bits, start + offset, size)


cdef void note_own(rig *t, uint8_t *bits, uint32_t part, uint64_t offset, uint64_t size) noexcept nogil:
    if t.vq.log is not NULL and t.vq.log_used:
        note(t, bits, t.g.regions[part].gpa + offset, size)


cdef void note_buffers(rig *t, const burst *b, uint32_t i) noexcept nogil:
    """What was written to a chain that is given back: its used length, from the first writable segment on."""
    cdef uint64_t left = b.used[i].len
    cdef uint32_t segment = b.chains[i].first + b.chains[i].n_readable
    cdef uint64_t part
    cdef int32_t k
    while t.vq.log is not NULL and left:
        part = b.segments[segment].iov_len
        if part > left:
            part = left
        k = region_of(&t.g, b.segments[segment].iov_base, part)
        if k >= 0:
            note(t, t.want, t.g.regions[k].gpa + (<uintptr_t> b.segments[segment].iov_base
                                                  - <uintptr_t> t.g.regions[k].mem), part)
        left -= part
        segment += 1


cdef void give_back(rig *t, burst *b, uint32_t first, uint32_t n) noexcept nogil:
    """Give chains back, having foreseen what that writes."""
    cdef vring_used_elem element
    cdef uint32_t i
    cdef uint64_t place
    for i in range(first, first + n):
        note_buffers(t, b, i)
        if t.vq.packed:
            t.pendings[t.n_pending] = pending(t.packed_used, <uint16_t> b.used[i].id, b.used[i].len)
            t.packed_used = packed_forward(t.packed_used, b.chains[i].n_descriptors, t.vq.num)
        else:
            element = b.used[i]
            place = 4 + 8 * <uint64_t> (<uint16_t> (t.vq.used_idx + i - first) % t.vq.num)
            expect(&t.g, DEVICE, place, &element, 8)
            note_used(t, t.want, place, 8)
        t.n_pending += 1
    vring_give_back(&t.vq, b, first, n)


cdef void publish(rig *t) noexcept nogil:
    """Publish, having foreseen what that writes."""
    cdef uint32_t i
    cdef pending *p
    cdef uint16_t flags
    cdef uint64_t place
    if t.vq.packed:
        for i in range(t.n_pending):
            p = &t.pendings[i]
            place = 16 * <uint64_t> (p.position & POSITION_OFFSET)
            flags = DESC_F_AVAIL | DESC_F_USED if p.position & POSITION_WRAP else 0
            if p.length:
                flags |= DESC_F_WRITE
            expect(&t.g, DESC, place + 8, &p.length, 4)
            expect(&t.g, DESC, place + 12, &p.id, 2)
            expect(&t.g, DESC, place + 14, &flags, 2)
            note_own(t, t.want, DESC, place, 16)
    else:
        expect(&t.g, DEVICE, 2, &t.vq.used_idx, 2)
        note_used(t, t.want, 2, 2)
    vring_publish(&t.vq)
    t.n_pending = 0
    must(&t.g, t.g.slots[0].used_idx == t.vq.used_idx, "the slot has another used index")
    must(&t.g, t.g.slots[0].last_avail_idx == t.vq.last_avail_idx, "the slot has another available index")
    must(&t.g, t.g.slots[0].batch_n == 0, "a batch that is left over")
    must(&t.g, not t.vq.packed or t.packed_used == t.vq.used_idx, "the used position is another one")


cdef void fetch(rig *t) noexcept nogil:
    """Take chains, put some of them back, give the others back."""
    cdef burst *b = shared_burst
    cdef guest *g = &t.g
    cdef uint16_t before = t.vq.last_avail_idx
    cdef uint8_t how = take_u8(g)
    cdef int direction = 1 + how % 3 | (TOUCH if how & 0x40 else 0)
    cdef uint32_t most = 1 + take_u8(g) % BURST
    cdef bint was_broken = t.vq.broken != 0
    cdef int n = vring_fetch(&t.vq, b, most, direction)
    cdef uint32_t i, keep
    cdef uint32_t taken = 0
    for i in range(BURST_GUARD):
        if (<uint8_t *> b)[sizeof(burst) + i] != PATTERN:
            must(g, False, "written behind the burst")
    if n < 0:
        must(g, t.vq.broken, "no chain, and not broken")
        must(g, t.vq.last_avail_idx == before, "an index moved though the ring broke")
        return
    must(g, not was_broken, "a broken ring gave chains")
    must(g, <uint32_t> n == b.n, "another number of chains than it says")
    check_burst(g, &t.vq, b, most, direction)
    if t.vq.packed:
        for i in range(b.n):
            must(g, b.chains[i].n_descriptors, "a chain without descriptors")
            taken += b.chains[i].n_descriptors
        must(g, packed_distance(before, t.vq.last_avail_idx, t.vq.num) == taken, "the position moved otherwise")
        must(g, packed_distance(t.packed_used, t.vq.last_avail_idx, t.vq.num) <= t.vq.num, "more than the ring has")
        must(g, (t.vq.last_avail_idx & POSITION_OFFSET) < t.vq.num, "a position outside the ring")
    else:
        must(g, <uint16_t> (before + n) == t.vq.last_avail_idx, "the index moved otherwise")
    vring_drained(&t.vq)
    if g.wrong is not NULL or n == 0:
        return
    keep = take_u8(g)
    keep = <uint32_t> n if keep & 0x80 else keep % <uint32_t> (n + 1)
    vring_unfetch(&t.vq, b, <uint32_t> n - keep)
    if t.n_pending + keep > BURST:
        publish(t)
    for i in range(keep):
        b.used[i].len = 0
        if b.chains[i].writable:
            b.used[i].len = take_u8(g) if how & 0x80 else b.chains[i].writable
            b.used[i].len %= 1 + <uint64_t> b.chains[i].writable
    give_back(t, b, 0, keep // 2)
    give_back(t, b, keep // 2, keep - keep // 2)


cdef void notify(rig *t, uint8_t how) noexcept nogil:
    """Ask for kicks or not, and look around. What that writes is known by its place."""
    cdef uint64_t at = 4 + 8 * <uint64_t> t.vq.num if t.vq.event_idx else 0
    if how & 1:
        vring_disable_notify(&t.vq)
    else:
        vring_enable_notify(&t.vq)
    if t.vq.packed:
        accept(&t.g, DEVICE, 0, 4)
        note_own(t, t.may, DEVICE, 0, 4)
    else:
        accept(&t.g, DEVICE, at, 2)
        note_used(t, t.may, at, 2)
    vring_has_more(&t.vq)
    vring_room(&t.vq)
    vring_was_stocked(&t.vq)
    vring_tell_log(&t.vq)


cdef void replace_worker(rig *t, uint8_t how) noexcept nogil:
    """Another worker takes the ring up, after the death of the first: at rest, within a publication, or before one."""
    cdef vmp_ring *slot = &t.g.slots[0]
    cdef uint16_t last_avail_idx = slot.last_avail_idx
    cdef uint16_t used_idx = slot.used_idx
    cdef uint16_t start = t.vq.published_idx
    cdef uint32_t n = t.n_pending
    cdef uint32_t i
    cdef vmp_ring before
    cdef bint within = how & 3 == 1
    if within:
        # The driver has been shown everything, and the slot does not say so yet.
        memcpy(&before, slot, sizeof(vmp_ring))
        publish(t)
        memcpy(slot.journal, before.journal, sizeof(before.journal))
        last_avail_idx, slot.last_avail_idx = slot.last_avail_idx, last_avail_idx
        used_idx, slot.used_idx = slot.used_idx, used_idx
        slot.batch_n = <uint16_t> n if t.vq.packed else 0
    elif how & 3 == 2 and t.vq.packed and n:
        # Nothing of the batch has been written, and the slot says that it is about to be.
        slot.batch_start_idx = start
        slot.batch_avail_idx = t.vq.last_avail_idx
        slot.batch_used_idx = t.vq.used_idx
        slot.batch_n = <uint16_t> n
    attach_ring(&t.g, 0, &t.vq, t.features)
    must(&t.g, slot.batch_n == 0, "a batch that the replacement left over")
    must(&t.g, not within or t.vq.used_idx == used_idx, "the replacement stands at another used index")
    must(&t.g, not within or t.vq.last_avail_idx == last_avail_idx, "the replacement stands at another available index")
    for i in range(n if t.vq.packed else 0):
        accept(&t.g, DESC, 16 * <uint64_t> (t.pendings[i].position & POSITION_OFFSET) + 8, 8)
        note_own(t, t.may, DESC, 16 * <uint64_t> (t.pendings[i].position & POSITION_OFFSET), 16)
    t.n_pending = 0
    t.packed_used = t.vq.used_idx
    if t.vq.packed:
        note_own(t, t.may, DEVICE, 0, 4)
    else:
        note_used(t, t.may, 0, 4)
        note_used(t, t.may, 4 + 8 * <uint64_t> t.vq.num, 2)


cdef void enter(rig *t) noexcept nogil:
    """The front-end enters something into the IOTLB, behind all that it has entered; or it begins anew."""
    cdef guest *g = &t.g
    cdef uint8_t what = take_u8(g)
    cdef uint32_t n = iotlb.n
    cdef uint64_t start = PLAIN_GPA - 0x100
    iotlb.seq += 2
    if what & 0xF0 == 0:
        n = 0
    if n:
        start = iotlb.entries[n - 1].last + 1
    if n < 64 and start:
        start += take_u8(g)
        iotlb.entries[n].iova = start
        iotlb.entries[n].last = start + take_u16(g)
        iotlb.entries[n].uva = g.by_gpa[take_u8(g) % g.mem.n].uva + take_u16(g) % 0x1000
        iotlb.entries[n].access = 1 + what % 3
        n += 1
    iotlb.n = n
    t.vq.cache.size = 0         # as find_ring does


cdef void step(rig *t) noexcept nogil:
    """One thing that the driver, the device or the front-end does."""
    cdef guest *g = &t.g
    cdef uint8_t kind = take_u8(g)
    cdef uint8_t what = kind & 0x0F
    cdef uint8_t i
    cdef vring_desc d
    if what < 4:
        i = take_u8(g)
        offer_chain(g, 0, 1 + (kind >> 4), i, take_u8(g) % 17)
    elif what < 7:
        fetch(t)
    elif what == 7:
        i = take_u8(g)
        choose_descriptor(g, &d)
        put_entry(g, 0, kind >> 4, i, &d)
    elif what == 8:
        i = take_u8(g)
        choose_descriptor(g, &d)
        put_descriptor(g, 0, i, &d)
    elif what == 9:
        if not t.vq.packed:
            offer_head(g, 0, take_u8(g) if kind & 0x80 else take_u16(g))
    elif what == 10:
        if not t.vq.packed:
            g.drivers[0].avail += <uint16_t> (take_u8(g) - 8)
            show_avail(g, 0)
        else:
            g.drivers[0].avail = packed_forward(g.drivers[0].avail, take_u8(g) % g.drivers[0].num, g.drivers[0].num)
    elif what == 11:
        scribble(g)
    elif what == 12:
        notify(t, kind >> 4)
    elif what == 13:
        publish(t)
        vring_wants_call(&t.vq)
    elif what == 14:
        if t.behind_iommu and kind & 0x80:
            enter(t)
        else:
            replace_worker(t, kind >> 4)
    else:
        # Many chains at once, each one descriptor of plain memory: the way that most packets go.
        for i in range(1 + (kind >> 4)):
            offer_chain(g, 0, 1, i, 0 if take_u8(g) & 1 else 1)


cdef void check_log(rig *t) noexcept nogil:
    """The log says what was written."""
    cdef uint64_t i
    for i in range(t.log.pages // 8):
        must(&t.g, not t.want[i] & ~t.log.bits[i], "a page was written and not logged")
        must(&t.g, not t.log.bits[i] & ~(t.want[i] | t.may[i]), "a page was logged and not written")


cdef const char *run(const uint8_t *data, size_t size, bint packed) noexcept nogil:
    """One execution. What did not hold, NULL: everything did."""
    cdef rig t
    cdef guest *g = &t.g
    cdef uint8_t options
    cdef uint16_t start
    cdef uint32_t num
    cdef int _i
    memset(&t, 0, sizeof(rig))
    make_guest(g, data, size)
    options = take_u8(g)
    num = take_u8(g)
    start = take_u16(g)
    if packed:
        num = 1 + num
        start = <uint16_t> (start % num) | (start & POSITION_WRAP)
    else:
        num = <uint32_t> 1 << num % 9
    make_ring(g, 0, num, packed, start)
    make_memory(g)
    g.flips = options & 1
    t.behind_iommu = options & 2
    t.features = (
        <uint64_t> (options >> 2 & 1) << F_EVENT_IDX
        | <uint64_t> (options >> 3 & 1) << F_INDIRECT
        | <uint64_t> (options >> 4 & 1) << F_NOTIFY_ON_EMPTY
    )
    g.pattern = take_u64(g) if g.flips else 0
    if t.behind_iommu:
        iotlb.n = 0
        iotlb.seq = 2
        g.mem.iotlb = iotlb
    if options & 0x20:
        t.log.pages = 8 * (<uint64_t> take_u8(g) % (LOG_BYTES_MAX + 1))
        t.log.bits = <uint8_t *> calloc(1, t.log.pages // 8 + (t.log.pages == 0))
        t.vq.log = &t.log
        t.vq.log_used = options & 0x40 != 0
        t.vq.log_used_gpa = choose_address(g) if options & 0x80 else g.regions[DEVICE].gpa
    memset(<uint8_t *> shared_burst + sizeof(burst), PATTERN, BURST_GUARD)
    global current
    current = &t
    attach_ring(g, 0, &t.vq, t.features)
    t.packed_used = t.vq.used_idx
    for _i in range(STEPS_MAX):
        if g.at >= g.end or g.wrong is not NULL:
            break
        step(&t)
    publish(&t)
    current = NULL
    if g.wrong is NULL:
        compare_memory(g, "guest memory is not what it ought to be")
        check_log(&t)
    free(t.log.bits)
    free_guest(g)
    return g.wrong


cdef int fuzz_split(const uint8_t *data, size_t size) noexcept nogil:
    return report(run(data, size, False))


cdef int fuzz_packed(const uint8_t *data, size_t size) noexcept nogil:
    return report(run(data, size, True))


def entry(str target):
    """Return the address of a target's function for libFuzzer."""
    hook_looks(looked)
    return <uintptr_t> <void *> (fuzz_packed if target == "packed" else fuzz_split)


def replay(str target, bytes data):
    """Run one input. Returns what did not hold, None: everything did."""
    cdef const char *wrong = run(data, len(data), target == "packed")
    return None if wrong is NULL else wrong.decode()
