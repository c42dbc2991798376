"""The compiled packed virtqueue, device side (virtio 1.3, 2.8). Called through `_vring`, by those who serve rings.

Theory of operation. There is one ring of descriptors, written by both sides. A *position* in it is what vhost-user's
vring base has for each direction: the offset in bits 0 to 14, the wrap counter in bit 15. The ring knows four:
`used_idx`, where the next chain is given back, `last_avail_idx`, where the next one is taken, `avail_idx`, behind the
last one ever seen (a chain that was put back has been seen), and `published_idx`, up to where the driver was told. All
of them lie within one ring's length from `published_idx` on, so that a difference says how many descriptors are ours:
no more than that are ever looked at, whatever their flags say.

Chains are given back in the order in which they were taken (that is the interface of `vring_give_back`), so the
used descriptor of a chain is written over its first descriptor, and nothing has to be remembered between two bursts but
the positions. A buffer id is the driver's: any 16 bits, handed back as they are.

What is given back is first staged: a *batch* of at most BURST chains in the journal (`_journal.pxd`). Publishing
writes the batch's used descriptors, each by one store of 8 bytes (length, id and flags; the address stays), the
first one last: the driver looks at that one only, so the whole batch appears to it at once (2.8.9), which a receiver
of packets in several buffers needs.

A worker may be killed at any instruction. A used descriptor destroys what it is written over, so a batch that was begun
cannot be taken back: it is finished instead, by the replacement, from the journal (ORDER J3, J4). Nothing
is read from the descriptors for that but the flags of the first: while they say "available" the driver has seen
nothing of the batch, and every used descriptor may be written again; once they do not, the batch was published, the
descriptors may be the driver's again and are left alone. The driver cannot make the first one available again before
it was used, and one that does so all the same has its own descriptors overwritten with used ones: nobody else's memory,
and nothing that it could not write itself.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from vhostmp.shm._log cimport log_order
from vhostmp.shm._memory cimport vmp_region_cache
from vhostmp.shm.atomics cimport (
    vmp_count_u64,
    vmp_fence_full,
    vmp_fence_own_death,
    vmp_load_acquire_u16,
    vmp_load_relaxed_u16,
    vmp_load_relaxed_u32,
    vmp_store_relaxed_u16,
    vmp_store_relaxed_u32,
    vmp_store_release_u16,
    vmp_store_release_u64,
)
from vhostmp.shm.build cimport vmp_kill_point
from vhostmp.shm.layout cimport (
    VMP_BROKEN_ADDRESS,
    VMP_BROKEN_INDIRECT,
    VMP_BROKEN_INDIRECT_LEN,
    VMP_BROKEN_LOOP,
    VMP_BROKEN_SEGMENTS,
    VMP_KILL_AVAIL_NOTED,
    VMP_KILL_FETCHED,
    VMP_KILL_HALF_SHOWN,
    VMP_KILL_NOTED,
    VMP_KILL_PUBLISHED,
    VMP_KILL_SHOWN,
    VMP_KILL_USED_NOTED,
    vmp_ring,
)
from vhostmp.workers._chain cimport FOUND_MAX, add_plain, add_segments, load_packed_desc, table_entry
from vhostmp.workers._dirty cimport dirty_chains, dirty_own
from vhostmp.workers._inflight cimport (
    region_begin,
    region_commit,
    region_note,
    region_recover,
    region_settle,
    region_stage,
)
from vhostmp.workers._journal cimport (
    BUFFER,
    JOURNAL_SHIFT_LEN,
    journal_commit,
    journal_descriptors,
    journal_entry,
    journal_packed,
    journal_stage,
)
from vhostmp.workers._vring cimport (
    BURST,
    BURST_SEGMENTS_MAX,
    CHAIN_SEGMENTS_MAX,
    DESC_F_AVAIL,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_USED,
    DESC_F_WRITE,
    EITHER,
    POSITION_OFFSET,
    POSITION_WRAP,
    READABLE,
    TOUCH,
    WRITABLE,
    burst,
    chain,
    packed_available,
    packed_desc,
    packed_distance,
    packed_forward,
    vring,
    vring_desc,
)

cdef enum:
    # The flags of an event suppression structure (2.8.10), which is in the upper half of its 32 bits.
    EVENT_ENABLE = 0
    EVENT_DISABLE = 1
    EVENT_DESC = 2
    EVENT_FLAGS = 3
    EVENT_SHIFT = 16

    KIND = DESC_F_NEXT | DESC_F_WRITE | DESC_F_INDIRECT

    USED_SHIFT_ID = 32
    USED_SHIFT_FLAGS = 48

    ROOM_LOOK = 4 * BURST       # descriptors that packed_room looks at


cdef int walk_table(vring *vq, burst *b, chain *c, const vring_desc *table, int direction) noexcept nogil:
    """Walk an indirect table (2.8.7): all of its entries in order; only the WRITE flag means anything in them.

    And that not in a queue whose chains are read only: DPDK's driver sets it in the header of what it transmits.
    """
    cdef vring_desc d
    cdef uint32_t entries = table.len // 16
    cdef uint32_t index
    cdef const void *at
    cdef uint64_t room[2]
    cdef int reason
    if table.len == 0 or table.len % 16 or entries > 65536:
        return VMP_BROKEN_INDIRECT_LEN
    if table.addr + (table.len - 1) < table.addr:
        return VMP_BROKEN_ADDRESS
    for index in range(entries):
        if index == FOUND_MAX:
            return VMP_BROKEN_SEGMENTS
        # One by one, so that the table may span adjacent regions.
        at = table_entry(vq, table.addr + <uint64_t> index * 16, room)
        if at is NULL:
            return VMP_BROKEN_ADDRESS
        load_packed_desc(<const packed_desc *> at, &d)
        if direction & EITHER == READABLE:
            d.flags = 0
        reason = add_segments(vq, b, c, &d, direction)
        if reason:
            return reason
    return 0


cdef int walk_chain(
    vring *vq, burst *b, chain *c, vring_desc *d, uint32_t offset, uint32_t ours, int direction
) noexcept nogil:
    """Walk the chain whose first descriptor is `d`, from `offset`; at most `ours` descriptors. 0 or a BROKEN_ reason.

    Afterwards `d` is its last descriptor, the one with the id.
    """
    cdef const packed_desc *desc = <const packed_desc *> vq.desc
    cdef uint32_t found = 1
    cdef int reason
    if d.flags & DESC_F_INDIRECT:
        # One table is the whole chain (2.8.7); WRITE on it is to be ignored.
        if not vq.indirect or d.flags & DESC_F_NEXT:
            return VMP_BROKEN_INDIRECT
        c.n_descriptors = 1
        return walk_table(vq, b, c, d, direction)
    while True:
        reason = add_segments(vq, b, c, d, direction)
        if reason:
            return reason
        if not d.flags & DESC_F_NEXT:
            c.n_descriptors = <uint16_t> found
            return 0
        if found == ours:
            return VMP_BROKEN_LOOP      # the driver has no more descriptors than that
        if found == FOUND_MAX:
            return VMP_BROKEN_SEGMENTS
        found += 1
        offset += 1
        if offset == vq.num:
            offset = 0
        load_packed_desc(&desc[offset], d)       # ordered by V5 of the first
        if d.flags & DESC_F_INDIRECT:
            return VMP_BROKEN_INDIRECT


cdef int packed_fetch(vring *vq, burst *b, uint32_t most, int direction) noexcept nogil:
    """vring_fetch of a packed ring."""
    cdef uint16_t position = vq.last_avail_idx
    cdef uint32_t offset = position & POSITION_OFFSET
    cdef uint32_t num = vq.num
    cdef uint32_t ours = num - packed_distance(vq.published_idx, position, num)
    cdef bint writable = direction & EITHER == WRITABLE
    cdef bint either = direction & EITHER == EITHER
    cdef bint touch = direction & TOUCH != 0
    cdef uint16_t plain = DESC_F_WRITE if writable else 0
    cdef uint32_t i = 0
    cdef uint32_t segment = 0
    cdef vring_desc d
    cdef const packed_desc *desc = <const packed_desc *> vq.desc
    cdef vmp_region_cache cache = vq.cache
    cdef chain *c
    cdef int reason
    b.n = 0
    b.n_segments = 0
    vq.cache.missed = 0
    if vq.broken:
        return -1
    vq.drained = 0
    while True:
        # ORDER V5 (device): load the first descriptor's flags, then the rest of it and of its chain     [acquire]
        #   pairs with  the driver's barrier before it stores the flags of a chain's first descriptor (virtio 1.3,
        #               2.8.21.1; tools/stress/packed.py)
        #   without it  an address or a length may be read before the driver wrote it.
        #   shown by    tests/oracle/test_packed.py
        if ours == 0 or not packed_available(vmp_load_acquire_u16(&desc[offset].flags), position):
            vq.drained = 1
            break
        if i == most:
            break
        c = &b.chains[i]
        load_packed_desc(&desc[offset], &d)
        c.first = segment
        if (
            d.flags & KIND == plain
            and not either
            and segment < BURST_SEGMENTS_MAX
            and add_plain(b, c, &cache, &d, segment, writable, touch)
        ):
            c.n_descriptors = 1
            segment += 1
        else:
            if segment + CHAIN_SEGMENTS_MAX > BURST_SEGMENTS_MAX:
                break       # never at i == 0
            memset(c, 0, sizeof(chain))
            c.first = segment
            b.n_segments = segment
            reason = walk_chain(vq, b, c, &d, offset, ours, direction)
            if reason:
                if i == 0 and not vq.cache.missed:      # behind an IOMMU it may have to wait: no mistake
                    vq.broken = <uint8_t> reason
                    return -1
                break       # what came before it is good; the next fetch meets it first
            segment = b.n_segments
            cache = vq.cache
        b.used[i].id = d.next       # the place of the id
        b.used[i].len = 0
        ours -= c.n_descriptors
        position = packed_forward(position, c.n_descriptors, num)
        offset = position & POSITION_OFFSET
        i += 1
    b.n = i
    b.n_segments = segment
    vq.last_avail_idx = position
    if packed_distance(vq.published_idx, position, num) > packed_distance(vq.published_idx, vq.avail_idx, num):
        vq.avail_idx = position
        vq.stocked = 1
        vmp_store_relaxed_u16(&vq.slot.avail_idx, position)     # for `show` alone: no order
    if i:
        vmp_kill_point(vq.slot, VMP_KILL_FETCHED)
    return <int> i


cdef uint32_t packed_room(vring *vq) noexcept nogil:
    """vring_room of a packed ring: chains are counted, so it looks at a few descriptors only; 0 is exact."""
    cdef const packed_desc *desc = <const packed_desc *> vq.desc
    cdef uint16_t position = vq.last_avail_idx
    cdef uint32_t ours = vq.num - packed_distance(vq.published_idx, position, vq.num)
    cdef uint32_t chains = 0
    cdef uint32_t looked = 0
    cdef uint16_t flags = 0
    cdef bint in_chain
    while looked < ours and looked < ROOM_LOOK:
        in_chain = flags & DESC_F_NEXT
        flags = vmp_load_relaxed_u16(&desc[position & POSITION_OFFSET].flags)      # nothing is taken, so no order
        if not in_chain and not packed_available(flags, position):
            break
        looked += 1
        if not flags & DESC_F_NEXT:
            chains += 1
        position = packed_forward(position, 1, vq.num)
    return chains if chains or not looked else 1


cdef void packed_give_back(vring *vq, const burst *b, uint32_t first, uint32_t n) noexcept nogil:
    """vring_give_back of a packed ring: into the batch. At most BURST chains between two publications."""
    cdef uint32_t i
    for i in range(first, first + n):
        if vq.staged == BURST:
            packed_publish(vq)
        if vq.region is not NULL:
            region_note(vq, b.chains[i].n_descriptors)
        journal_packed(vq, b, i)
        vq.used_idx = packed_forward(vq.used_idx, b.chains[i].n_descriptors, vq.num)
    if vq.log is not NULL:
        # ORDER W2 (writer): buffers written, their bits set, then the batch published                  [release, V6]
        #   pairs with  W3 (packed_publish in this worker, packed_attach in its replacement: the bits of descriptors)
        #   without it  as in vring_give_back.
        #   shown by    tests/integration/test_dirty_log.py::test_nothing_is_unlogged_when_workers_die
        log_order()
        dirty_chains(vq, b, first, n)


cdef inline void write_used(vring *vq, uint16_t position, uint32_t k) noexcept nogil:
    """Write one used descriptor: length, id and flags by one store, after everything before it (V6, J3)."""
    cdef uint64_t element = journal_entry(vq.slot, True, k)[BUFFER]
    cdef uint64_t length = element >> JOURNAL_SHIFT_LEN
    cdef uint64_t flags = DESC_F_AVAIL | DESC_F_USED if position & POSITION_WRAP else 0
    if length:
        flags |= DESC_F_WRITE
    # ORDER V6 (device): the buffers, and all of the batch but its first descriptor, then that one       [release]
    #   pairs with  the driver's barrier after it loads the flags of a used descriptor (virtio 1.3, 2.8.22;
    #               tools/stress/packed.py)
    #   without it  the driver may read a packet, or the descriptor after the first, that is not there yet.
    #   shown by    tests/oracle/test_packed.py
    vmp_store_release_u64(
        <uint64_t *> &vq.desc[position & POSITION_OFFSET].len,      # and what follows it
        length | (element & 0xFFFF) << USED_SHIFT_ID | flags << USED_SHIFT_FLAGS,
    )


cdef void write_batch(vring *vq, uint16_t start, uint32_t n) noexcept nogil:
    """Write the used descriptors of the slot's batch, which begins at position `start`: the first one last (2.8.9)."""
    cdef uint16_t position = start
    cdef uint32_t i
    for i in range(n):
        if i:
            write_used(vq, position, i)
        position = packed_forward(position, journal_descriptors(vq.slot, i), vq.num)
    vmp_kill_point(vq.slot, VMP_KILL_HALF_SHOWN)
    if n:
        write_used(vq, start, 0)


cdef void log_batch(vring *vq, uint16_t start, uint32_t n) noexcept nogil:
    """Log the used descriptors of the slot's batch, written from position `start` on."""
    cdef uint16_t position = start
    cdef uint32_t i
    # ORDER W3 (writer): used descriptors, then their bits, then slot.batch_n = 0                   [full fence, W1, J3]
    #   pairs with  W2 (packed_give_back: the bits of what they stand for)
    #   without it  as in vring_publish; a worker killed in between leaves the bits to its replacement.
    #   shown by    tests/integration/test_dirty_log.py::test_nothing_is_unlogged_when_workers_die
    log_order()
    for i in range(n):
        dirty_own(vq, <const uint8_t *> &vq.desc[position & POSITION_OFFSET], sizeof(vring_desc))
        position = packed_forward(position, journal_descriptors(vq.slot, i), vq.num)


cdef void packed_publish(vring *vq) noexcept nogil:
    """vring_publish of a packed ring."""
    cdef vmp_ring *slot = vq.slot
    cdef uint32_t n = vq.staged
    vmp_store_relaxed_u16(&slot.batch_start_idx, vq.published_idx)
    vmp_store_relaxed_u16(&slot.batch_avail_idx, vq.last_avail_idx)
    vmp_store_relaxed_u16(&slot.batch_used_idx, vq.used_idx)
    # ORDER J3 (worker): the batch and slot.batch_*, then slot.batch_n, then used descriptors, the first one last, then
    #               slot.last_avail_idx and slot.used_idx, then slot.batch_n = 0                 [release each]
    #   pairs with  J4 (packed_attach in a replacement: slot.batch_n, then the flags of the batch's first descriptor)
    #   without it  a replacement may find used descriptors among available ones and nothing that tells them apart, or
    #               finish a batch that is not the one begun.
    #   shown by    tests/unit/workers/test_packed_attach.py
    vmp_store_release_u16(&slot.batch_n, <uint16_t> n)
    journal_stage(vq, vq.used_idx, vq.published_idx)
    if vq.region is not NULL:
        region_stage(vq, vq.published_idx, vq.used_idx)
    vmp_kill_point(slot, VMP_KILL_NOTED)
    write_batch(vq, vq.published_idx, n)
    vmp_kill_point(slot, VMP_KILL_SHOWN)
    if vq.region is not NULL:
        region_commit(vq, vq.used_idx, n)
    if vq.log is not NULL:
        log_batch(vq, vq.published_idx, n)
    # ORDER J3 (worker): as above
    vmp_store_release_u16(&slot.last_avail_idx, vq.last_avail_idx)
    vmp_kill_point(slot, VMP_KILL_AVAIL_NOTED)
    vmp_store_release_u16(&slot.used_idx, vq.used_idx)
    vmp_kill_point(slot, VMP_KILL_USED_NOTED)
    vmp_store_release_u16(&slot.batch_n, 0)
    vq.published_idx = vq.used_idx
    journal_commit(vq)
    # ORDER J3 (worker): as above; and all of it before anything that is noted of the next batch        [for our death]
    vmp_fence_own_death()
    vmp_count_u64(&slot.batches, 1)
    vmp_kill_point(slot, VMP_KILL_PUBLISHED)


cdef inline uint32_t turn(uint16_t position, uint32_t num) noexcept nogil:
    """A position as a number from 0 to 2 * num - 1, for differences: the wrap counter begins with 1."""
    return (position & POSITION_OFFSET) + (0 if position & POSITION_WRAP else num)


cdef bint packed_wants_call(vring *vq) noexcept nogil:
    """vring_wants_call of a packed ring (2.8.10)."""
    cdef uint32_t num = vq.num
    cdef uint32_t old = turn(vq.signalled_used, num)
    cdef uint32_t new = turn(vq.used_idx, num)
    cdef bint valid = vq.signalled_valid
    cdef uint32_t event, flags, at
    # ORDER V7 (device): store the used descriptors, then load the driver's event suppression     [full fence between]
    #   pairs with  the driver: its event suppression stored, full barrier, the next used descriptor's flags looked at
    #               again (virtio 1.3, 2.8.10)
    #   without it  the load may pass the store: we see the old wish, the driver sees nothing used and sleeps.
    #   shown by    tests/integration/test_packed.py
    vmp_fence_full()
    event = vmp_load_relaxed_u32(<const uint32_t *> vq.avail)       # offset and flags at once: they belong together
    vq.signalled_used = vq.used_idx
    vq.signalled_valid = 1
    flags = event >> EVENT_SHIFT & EVENT_FLAGS
    if flags == EVENT_DISABLE:
        return False
    if flags != EVENT_DESC or not vq.event_idx or not valid:
        return True
    at = event & POSITION_OFFSET
    if at >= num:
        return True     # no place of the ring: nothing that the driver could be waiting for is missed
    at = turn(<uint16_t> event, num)
    return (at + 2 * num - old) % (2 * num) < (new + 2 * num - old) % (2 * num)


cdef inline void write_device_event(vring *vq, uint32_t event) noexcept nogil:
    """Write the device's event suppression, when it changes: offset and flags by one store. And log that. No order."""
    if vq.device_event != event:
        vq.device_event = event
        vmp_store_relaxed_u32(<uint32_t *> vq.used, event)
        if vq.log is not NULL:
            log_order()
            dirty_own(vq, <const uint8_t *> vq.used, 4)


cdef void packed_enable_notify(vring *vq) noexcept nogil:
    """The first half of vring_enable_notify of a packed ring: the wish, without the look."""
    if vq.event_idx:
        # The descriptor after those that we have seen: some of them may still wait to be taken.
        write_device_event(vq, <uint32_t> EVENT_DESC << EVENT_SHIFT | vq.avail_idx)
    else:
        write_device_event(vq, <uint32_t> EVENT_ENABLE << EVENT_SHIFT)


cdef void packed_disable_notify(vring *vq) noexcept nogil:
    """vring_disable_notify of a packed ring."""
    write_device_event(vq, <uint32_t> EVENT_DISABLE << EVENT_SHIFT)


cdef void take_up_region(vring *vq) noexcept nogil:
    """Find out from the front-end's region where the ring stands, after a start; else bring the region up to the slot.

    The slot is what we know ourselves, so the region is believed only by a back-end that has no slot: one that was
    started anew. And only once, since the front-end knows the base of a ring that was stopped in due form.
    """
    cdef vmp_ring *slot = vq.slot
    cdef uint16_t position = slot.used_idx
    cdef int fault = 0
    if slot.used_valid:
        region_settle(vq, position)
        return
    if slot.recover:
        fault = region_recover(vq, &position)
        if not fault:
            slot.last_avail_idx = position      # nobody looks at the slot yet: no order
            slot.used_idx = position
    if fault or not slot.recover:
        region_begin(vq, position)
    slot.region_fault = <uint16_t> fault


cdef void packed_attach(vring *vq) noexcept nogil:
    """vring_attach of a packed ring: finish the batch that a dead worker had begun to publish."""
    cdef vmp_ring *slot = vq.slot
    cdef const packed_desc *desc = <const packed_desc *> vq.desc
    cdef uint16_t n, start
    # ORDER J4 (replacement): load slot.batch_n, then the batch and the flags of its first descriptor      [acquire]
    #   pairs with  J3 (packed_publish in the worker before us; it is dead or has left: this is about its stores)
    #   shown by    tests/unit/workers/test_packed_attach.py
    n = vmp_load_acquire_u16(&slot.batch_n)
    if n > BURST:
        n = BURST
    vq.noted = 0
    vq.noted_counter = 0
    vq.device_event = 0xFFFFFFFFU       # unknown: no wish of ours looks like it
    if n:
        # ORDER J3 (replacement): in the order of packed_publish, so that a second death finds what the first left.
        start = slot.batch_start_idx
        if packed_available(vmp_load_acquire_u16(&desc[start & POSITION_OFFSET].flags), start):
            if vq.region is not NULL:
                region_stage(vq, start, slot.batch_used_idx)
            write_batch(vq, start, n)
        if vq.region is not NULL:
            region_commit(vq, slot.batch_used_idx, n)
        if vq.log is not NULL:
            log_batch(vq, start, n)
        vmp_store_release_u16(&slot.last_avail_idx, slot.batch_avail_idx)       # ORDER J3: as above
        vmp_store_release_u16(&slot.used_idx, slot.batch_used_idx)
        vmp_store_release_u16(&slot.batch_n, 0)
    elif vq.region is not NULL:
        take_up_region(vq)
    vq.last_avail_idx = slot.last_avail_idx
    vq.used_idx = slot.used_idx
    vq.published_idx = slot.used_idx
    vq.stocked = vq.last_avail_idx != POSITION_WRAP
