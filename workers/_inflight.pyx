"""What a packed ring has in flight, noted where the front-end keeps it over our death (vu "Inflight I/O tracking").

The slot in the control segment serves a worker's replacement (`_packed.pyx`). The region serves the back-end that comes
after this whole one, ours or another's: it may find used descriptors written over available ones, of which the driver
has seen nothing yet. So the region has what stood there.

Theory of operation. We give chains back in the order in which we took them. Until then all that we took lies in the
ring from the used position on, untouched, and a back-end that begins there takes it again: no note says more. So a
chain is noted when it is given back, not when it is fetched; what is put back never was. To whoever reads the region,
that is a back-end which takes its chains late. The notes are those of the slot's batch, then, and all of them end with
its publication: entries are taken from 0 on and are free again from 0 on, the list of free ones never changes (each
leads to the next), and nothing on this path is ever read from the region.

Order of stores, as in the document: entries, `free_head` and `old_free_head` (region_note); `free_head` and `used_idx`
(region_stage); the used descriptors; `inflight`, then the `old_` fields (region_commit). Fields that are to change
together lie within 4 or 8 aligned bytes and do, by one store: the document's back-end can die between an index and its
wrap counter, ours cannot.

Everything in the region is the front-end's. `region_recover` copies each number once and checks the copies; what it
finds to be in flight it writes back into the ring, from the used position on, in the order in which it was taken. All
of those descriptors are the device's, and the driver looks at none before it is used; so afterwards the ring is one
that nobody took anything from, whether we died or a back-end that gives back in any order, and what writes the ring
checks nothing twice. Dying in the middle of this does no harm: notes are cleared from the last one on, and those that
are left say where the ring's first chains stand.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, qsort

from vhostmp.shm._log cimport log_order
from vhostmp.shm.atomics cimport (
    vmp_load_acquire_u16,
    vmp_load_relaxed_u16,
    vmp_load_relaxed_u32,
    vmp_load_relaxed_u64,
    vmp_store_relaxed_u16,
    vmp_store_relaxed_u64,
    vmp_store_release_u16,
    vmp_store_release_u32,
    vmp_store_release_u64,
)
from vhostmp.shm.layout cimport (
    VMP_REGION_CHAIN,
    VMP_REGION_COUNTER,
    VMP_REGION_DESC_NUM,
    VMP_REGION_FREE_HEAD,
    VMP_REGION_FREE_LIST,
    VMP_REGION_INFLIGHT,
    VMP_REGION_MEMORY,
    VMP_REGION_USED_IDX,
    VMP_REGION_VERSION,
)
from vhostmp.workers._dirty cimport dirty_own
from vhostmp.workers._journal cimport (
    JOURNAL_SHIFT_FLAGS,
    JOURNAL_SHIFT_LAST,
    JOURNAL_SHIFT_LEN,
    JOURNAL_SHIFT_NUM,
    JOURNAL_SHIFT_OLD,
    JOURNAL_SHIFT_OLD_WRAP,
    JOURNAL_SHIFT_PACKED_NEXT,
    JOURNAL_SHIFT_WRAP,
    journal_descriptors,
    journal_used_words,
)
from vhostmp.workers._vring cimport (
    DESC_F_AVAIL,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_USED,
    DESC_F_WRITE,
    POSITION_OFFSET,
    POSITION_WRAP,
    desc_state,
    packed_available,
    packed_desc,
    packed_distance,
    packed_forward,
    queue_region,
    vring,
)

cdef enum:
    VERSION = 1

    # The second half of a descriptor: len, id, flags. What is in the region: as in the journal.
    DESC_SHIFT_ID = 32
    DESC_SHIFT_FLAGS = 48

    KIND = DESC_F_NEXT | DESC_F_WRITE | DESC_F_INDIRECT

    # What an entry was found to be.
    FREE = 1
    TAKEN = 2


cdef struct noted_chain:
    uint64_t counter
    uint16_t head
    uint16_t last
    uint16_t n


cdef struct findings:
    # What region_recover has copied and checked.
    uint8_t *entries        # FREE or TAKEN, of each entry
    noted_chain *chains     # in the order in which they were taken
    uint32_t n_chains
    packed_desc *desc       # their descriptors
    uint32_t n_desc


cdef inline void store_heads(queue_region *region, uint16_t free_head, uint16_t old) noexcept nogil:
    """Store `free_head` and `old_free_head` by one store, after everything before it."""
    # ORDER N1 (worker): a chain's entries, then free_head and old_free_head; free_head, used_idx and its wrap counter,
    #               then the used descriptors; inflight, then old_free_head, then old_used_idx           [release each]
    #   pairs with  N2 (region_recover in a back-end that comes after us: what was in flight when this one died)
    #   without it  that one may take a chain for whole whose entries are not there, or give a batch back twice, or
    #               forget it.
    #   shown by    tests/unit/workers/test_packed_inflight.py
    vmp_store_release_u32(<uint32_t *> &region.free_head, free_head | <uint32_t> old << 16)


cdef inline void store_used(queue_region *region, uint16_t position, uint16_t old) noexcept nogil:
    """Store `used_idx`, `old_used_idx` and their wrap counters by one store, after everything before it."""
    # ORDER N1 (worker): as above
    vmp_store_release_u64(<uint64_t *> &region.used_idx, journal_used_words(position, old))


cdef inline void unmark(queue_region *region, uint32_t head) noexcept nogil:
    """Clear the mark of a chain that has become free, after everything before it."""
    # ORDER N1 (worker): as above
    vmp_store_release_u16(<uint16_t *> &region.desc[head].inflight, 0)


cdef void region_note(vring *vq, uint16_t n) noexcept nogil:
    """Note the chain of `n` descriptors that stands at `vq.used_idx`, as being in flight."""
    cdef const packed_desc *desc = <const packed_desc *> vq.desc
    cdef queue_region *region = vq.region
    cdef uint16_t head = vq.noted
    cdef uint32_t at = vq.used_idx & POSITION_OFFSET
    cdef uint64_t rest
    cdef desc_state *entry = &region.desc[head]
    vmp_store_relaxed_u64(&entry.counter, vq.noted_counter)
    vq.noted_counter += 1
    vmp_store_relaxed_u64(
        <uint64_t *> entry,
        1
        | <uint64_t> (head + 1) << JOURNAL_SHIFT_PACKED_NEXT
        | <uint64_t> (head + n - 1) << JOURNAL_SHIFT_LAST
        | <uint64_t> n << JOURNAL_SHIFT_NUM,
    )
    for _ in range(n):
        # Whatever the driver has put there by now: who takes it from the region checks it as we checked what was there.
        vmp_store_relaxed_u64(&entry.addr, vmp_load_relaxed_u64(&desc[at].addr))
        rest = vmp_load_relaxed_u64(<const uint64_t *> &desc[at].len)
        vmp_store_relaxed_u64(<uint64_t *> &entry.id, rest >> DESC_SHIFT_ID | rest << JOURNAL_SHIFT_LEN)
        entry += 1
        at += 1
        if at == vq.num:
            at = 0
    vq.noted = head + n
    store_heads(region, vq.noted, vq.noted)


cdef void region_stage(vring *vq, uint16_t start, uint16_t end) noexcept nogil:
    """Before the slot's batch, from position `start` to `end`, is written to the ring: its entries become free.

    For good once the first used descriptor is there.
    """
    store_heads(vq.region, 0, <uint16_t> packed_distance(start, end, vq.num))
    store_used(vq.region, end, start)


cdef void region_commit(vring *vq, uint16_t end, uint32_t n) noexcept nogil:
    """After the slot's batch of `n` chains was written to the ring, up to position `end`."""
    cdef queue_region *region = vq.region
    cdef uint32_t head = 0
    cdef uint32_t i
    for i in range(n):
        vmp_store_relaxed_u16(<uint16_t *> &region.desc[head].inflight, 0)
        head += journal_descriptors(vq.slot, i)
    store_heads(region, 0, 0)
    store_used(region, end, end)
    vq.noted = 0


cdef void link_free(vring *vq) noexcept nogil:
    """Make every entry free, and lead to the next one. None is in flight."""
    cdef uint32_t i
    for i in range(vq.region_entries):
        vmp_store_relaxed_u64(<uint64_t *> &vq.region.desc[i], <uint64_t> (i + 1) << JOURNAL_SHIFT_PACKED_NEXT)


cdef void region_begin(vring *vq, uint16_t position) noexcept nogil:
    """Begin the region anew, for a ring that stands at `position`."""
    cdef queue_region *region = vq.region
    # ORDER N1 (worker): version 0, then all else, then version 1: who finds less begins the region itself
    vmp_store_release_u16(&region.version, 0)
    link_free(vq)
    vmp_store_relaxed_u64(&region.features, 0)
    vmp_store_relaxed_u16(&region.desc_num, vq.region_entries)
    store_heads(region, 0, 0)
    store_used(region, position, position)
    vmp_store_release_u16(&region.version, VERSION)     # ORDER N1: as above


cdef void region_settle(vring *vq, uint16_t position) noexcept nogil:
    """A worker has left the ring, or has died, with nothing published behind `position`: forget what it had noted.

    From the last chain on; and the ring has them all.
    """
    cdef queue_region *region = vq.region
    cdef uint32_t i = vq.num
    while i:
        i -= 1
        if vmp_load_relaxed_u16(<const uint16_t *> &region.desc[i].inflight):
            store_heads(region, <uint16_t> i, <uint16_t> i)
            unmark(region, i)
    store_heads(region, 0, 0)
    store_used(region, position, position)


cdef int by_counter(const void *one, const void *other) noexcept nogil:
    cdef uint64_t a = (<const noted_chain *> one).counter
    cdef uint64_t b = (<const noted_chain *> other).counter
    return (a > b) - (a < b)


cdef int find_free(vring *vq, uint32_t free_head, findings *f) noexcept nogil:
    """Follow the list of free entries. 0 or a REGION_ fault."""
    cdef uint32_t entries = vq.region_entries
    cdef uint32_t i = free_head
    if i > entries:
        return VMP_REGION_FREE_HEAD
    while i < entries:
        if f.entries[i]:
            return VMP_REGION_FREE_LIST
        f.entries[i] = FREE
        i = vmp_load_relaxed_u16(&vq.region.desc[i].next)
    return VMP_REGION_FREE_LIST if i > entries else 0


cdef int find_chain(vring *vq, noted_chain *c, findings *f) noexcept nogil:
    """Copy the descriptors of a chain that is in flight. 0 or a REGION_ fault."""
    cdef const desc_state *entry
    cdef uint64_t rest
    cdef uint16_t flags
    cdef uint32_t i = c.head
    cdef uint32_t left = c.n
    if not left or left > vq.num - f.n_desc:
        return VMP_REGION_CHAIN
    while True:
        if i >= vq.region_entries or f.entries[i]:
            return VMP_REGION_CHAIN
        f.entries[i] = TAKEN
        entry = &vq.region.desc[i]
        rest = vmp_load_relaxed_u64(<const uint64_t *> &entry.id)
        flags = <uint16_t> (rest >> JOURNAL_SHIFT_FLAGS) & KIND
        f.desc[f.n_desc].addr = vmp_load_relaxed_u64(&entry.addr)
        f.desc[f.n_desc].len = <uint32_t> (rest >> JOURNAL_SHIFT_LEN)
        f.desc[f.n_desc].id = <uint16_t> rest
        f.desc[f.n_desc].flags = flags
        f.n_desc += 1
        left -= 1
        if (flags & DESC_F_NEXT != 0) != (left != 0):
            return VMP_REGION_CHAIN
        if not left:
            return 0 if i == c.last else VMP_REGION_CHAIN
        i = vmp_load_relaxed_u16(&entry.next)


cdef int find_chains(vring *vq, uint16_t free_head, findings *f) noexcept nogil:
    """Find all that is in flight, in the order in which it was taken. 0 or a REGION_ fault."""
    cdef uint64_t state
    cdef uint32_t i
    cdef noted_chain *c
    cdef bint any_marked = False
    cdef int fault
    for i in range(vq.region_entries):
        any_marked |= vmp_load_relaxed_u16(<const uint16_t *> &vq.region.desc[i].inflight) != 0
    if not any_marked:
        return 0        # and the list of free entries may be in the middle of link_free
    fault = find_free(vq, free_head, f)
    if fault:
        return fault
    for i in range(vq.region_entries):
        if f.entries[i] == FREE:
            continue
        state = vmp_load_relaxed_u64(<const uint64_t *> &vq.region.desc[i])
        if <uint8_t> state == 0:
            continue
        if <uint8_t> state != 1:
            return VMP_REGION_INFLIGHT
        if f.n_chains == vq.num:
            return VMP_REGION_CHAIN
        c = &f.chains[f.n_chains]
        c.head = <uint16_t> i
        c.last = <uint16_t> (state >> JOURNAL_SHIFT_LAST)
        c.n = <uint16_t> (state >> JOURNAL_SHIFT_NUM)
        c.counter = vmp_load_relaxed_u64(&vq.region.desc[i].counter)
        f.n_chains += 1
    qsort(f.chains, f.n_chains, sizeof(noted_chain), by_counter)
    for i in range(f.n_chains):
        if i and f.chains[i].counter == f.chains[i - 1].counter:
            return VMP_REGION_COUNTER
        fault = find_chain(vq, &f.chains[i], f)
        if fault:
            return fault
    return 0


cdef void rewrite_ring(vring *vq, uint16_t position, const findings *f) noexcept nogil:
    """Make available again, from `position` on, what is in flight. The driver does not look: no order."""
    cdef packed_desc *desc = <packed_desc *> vq.desc
    cdef packed_desc *at
    cdef uint64_t flags
    cdef uint32_t i
    for i in range(f.n_desc):
        at = &desc[position & POSITION_OFFSET]
        flags = f.desc[i].flags | (DESC_F_AVAIL if position & POSITION_WRAP else DESC_F_USED)
        vmp_store_relaxed_u64(&at.addr, f.desc[i].addr)
        vmp_store_relaxed_u64(
            <uint64_t *> &at.len, f.desc[i].len | <uint64_t> f.desc[i].id << DESC_SHIFT_ID | flags << DESC_SHIFT_FLAGS
        )
        if vq.log is not NULL:
            log_order()
            dirty_own(vq, <const uint8_t *> at, sizeof(packed_desc))
        position = packed_forward(position, 1, vq.num)


cdef void forget_chains(vring *vq, uint16_t head, const findings *f) noexcept nogil:
    """Free what was in flight, the chain that was taken last first: the ring has it. `head` is the free list's."""
    cdef queue_region *region = vq.region
    cdef uint32_t i = vq.region_entries
    cdef noted_chain *c
    while i:
        i -= 1
        if f.entries[i] == FREE:
            vmp_store_relaxed_u16(<uint16_t *> &region.desc[i].inflight, 0)
    i = f.n_chains
    while i:
        i -= 1
        c = &f.chains[i]
        vmp_store_relaxed_u16(&region.desc[c.last].next, head)
        head = c.head
        store_heads(region, head, head)
        unmark(region, head)


cdef int region_recover(vring *vq, uint16_t *position) noexcept nogil:
    """Take up what a back-end before us left. Inside a read-side section; `position` is the base until then.

    Returns 0, and `position` is where the ring stands, with nothing taken; or a REGION_ fault: nothing was changed. A
    region that nobody has begun is begun, at the base.
    """
    cdef queue_region *region = vq.region
    cdef const packed_desc *desc = <const packed_desc *> vq.desc
    cdef findings f
    cdef uint64_t used
    cdef uint32_t heads
    cdef uint16_t version, new, old, free_head
    cdef int fault
    # ORDER N2 (the back-end after): load the region's version, then the rest of it and the ring             [acquire]
    #   pairs with  N1 (the one before; it is dead or has let go of the ring: this is about its stores)
    #   shown by    tests/unit/workers/test_packed_inflight.py
    version = vmp_load_acquire_u16(&region.version)
    if version == 0:
        region_begin(vq, position[0])
        return 0
    if version != VERSION or vmp_load_relaxed_u64(&region.features):
        return VMP_REGION_VERSION
    if vmp_load_relaxed_u16(&region.desc_num) != vq.region_entries:
        return VMP_REGION_DESC_NUM
    heads = vmp_load_relaxed_u32(<const uint32_t *> &region.free_head)
    used = vmp_load_relaxed_u64(<const uint64_t *> &region.used_idx)
    if (used >> JOURNAL_SHIFT_WRAP & 0xFF) > 1 or (used >> JOURNAL_SHIFT_OLD_WRAP & 0xFF) > 1:
        return VMP_REGION_USED_IDX
    if <uint16_t> used >= vq.num or <uint16_t> (used >> JOURNAL_SHIFT_OLD) >= vq.num:
        return VMP_REGION_USED_IDX
    new = <uint16_t> (<uint16_t> used | (used >> JOURNAL_SHIFT_WRAP & 1) << 15)
    old = <uint16_t> (<uint16_t> (used >> JOURNAL_SHIFT_OLD) | (used >> JOURNAL_SHIFT_OLD_WRAP & 1) << 15)
    free_head = <uint16_t> (heads >> 16)
    if new != old and not packed_available(vmp_load_relaxed_u16(&desc[old & POSITION_OFFSET].flags), old):
        old = new                       # the last batch was published: it is finished
        free_head = <uint16_t> heads
    f.entries = <uint8_t *> calloc(vq.region_entries, 1)
    f.chains = <noted_chain *> calloc(vq.num, sizeof(noted_chain))
    f.desc = <packed_desc *> calloc(vq.num, sizeof(packed_desc))
    f.n_chains = 0
    f.n_desc = 0
    if f.entries is NULL or f.chains is NULL or f.desc is NULL:
        fault = VMP_REGION_MEMORY
    else:
        fault = find_chains(vq, free_head, &f)
    if not fault:
        store_heads(region, free_head, free_head)
        store_used(region, old, old)
        rewrite_ring(vq, old, &f)
        forget_chains(vq, free_head, &f)
        link_free(vq)
        store_heads(region, 0, 0)
        position[0] = old
    free(f.entries)
    free(f.chains)
    free(f.desc)
    return fault
