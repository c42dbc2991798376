"""The compiled virtqueue, device side: the calls of both formats, and the split one (virtio 1.3, 2.7).

A ring that negotiated RING_PACKED is `_packed`'s: each call looks once, per burst, and goes there. What follows is
about split rings.

Theory of operation. The data path takes a burst of chains (`vring_fetch`: first the heads, then the descriptors, each
descriptor by two 8-byte loads), acts on them, gives them back in order (`vring_give_back`, one or two spans of the
used ring), publishes once (`vring_publish`) and looks once whether the driver wants to be told (`vring_call`).

`vring_fetch` checks everything: head and next below the table's length, the number of descriptors of a chain, one
level of indirection, addresses inside guest memory, order of readable and writable, sums below 2**32. A chain that
breaks a rule breaks the ring, `vq.broken` says which rule; chains before it in the same burst are still returned.

A worker may be killed at any instruction. `vring_publish` therefore writes to the ring's slot what the indices will be
before it publishes and what they are afterwards, and `vring_attach` in the replacement finds out by the used index in
the ring which of the two holds.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

from vhostmp.shm._log cimport log_order
from vhostmp.shm._memory cimport MemoryMap, vmp_region_cache
from vhostmp.shm.atomics cimport (
    vmp_count_u64,
    vmp_fence_full,
    vmp_fence_own_death,
    vmp_load_acquire_u16,
    vmp_load_relaxed_u16,
    vmp_prefetch_read,
    vmp_prefetch_write,
    vmp_store_relaxed_u16,
    vmp_store_release_u16,
)
from vhostmp.shm.build cimport VMP_CHECKS, vmp_kill_point
from vhostmp.shm.layout cimport (
    VMP_BROKEN_ADDRESS,
    VMP_BROKEN_AVAIL_IDX,
    VMP_BROKEN_HEAD,
    VMP_BROKEN_INDIRECT,
    VMP_BROKEN_INDIRECT_LEN,
    VMP_BROKEN_LOOP,
    VMP_BROKEN_NEXT,
    VMP_BROKEN_SEGMENTS,
    VMP_KILL_ASKED,
    VMP_KILL_AVAIL_NOTED,
    VMP_KILL_CALLED,
    VMP_KILL_CALLING,
    VMP_KILL_FETCHED,
    VMP_KILL_HUSHED,
    VMP_KILL_NOTED,
    VMP_KILL_PUBLISHED,
    VMP_KILL_RETURNED,
    VMP_KILL_RETURNING,
    VMP_KILL_SHOWN,
    VMP_KILL_USED_NOTED,
    vmp_ring,
)
from vhostmp.workers._chain cimport FOUND_MAX, add_plain, add_segments, load_desc, table_entry
from vhostmp.workers._dirty cimport dirty_chains, dirty_own, dirty_used
from vhostmp.workers._journal cimport journal_commit, journal_settle, journal_split
from vhostmp.workers._packed cimport (
    packed_attach,
    packed_disable_notify,
    packed_enable_notify,
    packed_fetch,
    packed_give_back,
    packed_publish,
    packed_room,
    packed_wants_call,
)
from vhostmp.workers._signal cimport signal_eventfd

from typing import NamedTuple

from vhostmp.errors import LocalError, QueueBroken
from vhostmp.shm.layout import BROKEN_REASONS

cdef enum:
    USED_PER_LINE = 8           # elements in a cache line
    USED_F_NO_NOTIFY = 1
    AVAIL_F_NO_INTERRUPT = 1


cdef int walk_indirect(vring *vq, burst *b, chain *c, const vring_desc *table, int direction) noexcept nogil:
    """Walk an indirect table (2.7.5.3): its entries are found one by one, so it may span adjacent regions."""
    cdef vring_desc d
    cdef uint32_t entries = table.len // 16
    cdef uint32_t found = 0
    cdef uint32_t index = 0
    cdef const void *at
    cdef uint64_t room[2]
    cdef int reason
    if table.len == 0 or table.len % 16 or entries > 65536:
        return VMP_BROKEN_INDIRECT_LEN
    if table.addr + (table.len - 1) < table.addr:
        return VMP_BROKEN_ADDRESS
    while True:
        at = table_entry(vq, table.addr + <uint64_t> index * 16, room)
        if at is NULL:
            return VMP_BROKEN_ADDRESS
        load_desc(<const vring_desc *> at, &d)
        if d.flags & DESC_F_INDIRECT:
            return VMP_BROKEN_INDIRECT
        reason = add_segments(vq, b, c, &d, direction)
        if reason:
            return reason
        if not d.flags & DESC_F_NEXT:
            return 0
        found += 1
        if found == entries:
            return VMP_BROKEN_LOOP
        if found == FOUND_MAX:
            return VMP_BROKEN_SEGMENTS
        if d.next >= entries:
            return VMP_BROKEN_NEXT
        index = d.next


cdef int walk_chain(vring *vq, burst *b, chain *c, uint16_t head, int direction) noexcept nogil:
    """Walk the chain that starts at `head`, in whatever form it has. 0 or a BROKEN_ reason."""
    cdef vring_desc d
    cdef uint32_t found = 0
    cdef uint16_t index = head
    cdef int reason
    while True:
        load_desc(&vq.desc[index], &d)
        if d.flags & DESC_F_INDIRECT:
            # Direct descriptors followed by one indirect table are legal; WRITE on it is to be ignored (2.7.5.3.2).
            if not vq.indirect or d.flags & DESC_F_NEXT:
                return VMP_BROKEN_INDIRECT
            return walk_indirect(vq, b, c, &d, direction)
        reason = add_segments(vq, b, c, &d, direction)
        if reason:
            return reason
        if not d.flags & DESC_F_NEXT:
            return 0
        found += 1
        if found == vq.num:
            return VMP_BROKEN_LOOP
        if found == FOUND_MAX:
            return VMP_BROKEN_SEGMENTS
        if d.next >= vq.num:
            return VMP_BROKEN_NEXT
        index = d.next


cdef int vring_fetch(vring *vq, burst *b, uint32_t most, int direction) noexcept nogil:
    """Take up to `most` (at most BURST) chains. Returns how many, or -1 when the driver broke the ring.

    Inside a read-side section. A broken ring stays broken: -1 each time. `last_avail_idx` moves past what is returned.
    """
    cdef uint16_t heads[BURST]
    cdef uint16_t last = vq.last_avail_idx
    cdef uint16_t mask = vq.mask
    cdef uint16_t num = vq.num
    cdef bint touch = direction & TOUCH != 0
    cdef uint16_t plain = DESC_F_WRITE if direction & EITHER == WRITABLE else 0
    cdef uint32_t n = <uint16_t> (vq.avail_idx - last)
    cdef uint32_t i
    cdef uint32_t segment = 0
    cdef vring_desc d
    cdef vring_desc *desc = vq.desc
    cdef uint16_t *ring = vq.avail + 2
    cdef vring_used_elem *used = <vring_used_elem *> (vq.used + 2)
    cdef vmp_region_cache cache = vq.cache
    cdef chain *c
    cdef int reason
    if vq.packed:
        return packed_fetch(vq, b, most, direction)
    b.n = 0
    b.n_segments = 0
    vq.cache.missed = 0
    if vq.broken:
        return -1
    if n <= most:       # as many too: vring_drained would not know that there is more
        # ORDER V1 (device): load avail->idx, then load avail->ring and descriptors     [acquire]
        #   pairs with  the driver's barrier before it stores avail->idx (virtio 1.3, 2.7.13.3; tools/stress/split.py)
        #   without it  entries of the ring may be read before the driver filled them.
        #   shown by    tests/oracle/test_agree.py
        vq.avail_idx = vmp_load_acquire_u16(&vq.avail[1])
        n = <uint16_t> (vq.avail_idx - last)
        vmp_store_relaxed_u16(&vq.slot.avail_idx, vq.avail_idx)     # for `show` alone: no order
        if VMP_CHECKS and n > num:
            vq.broken = VMP_BROKEN_AVAIL_IDX
            return -1
        if n == 0:
            return 0
    if n > most:
        n = most
    # Where they will be given back: to own those lines takes as long as to get the descriptors, and goes on meanwhile.
    i = 0
    while i < n:
        vmp_prefetch_write(&used[<uint16_t> (vq.used_idx + i) & mask])
        i += USED_PER_LINE
    for i in range(n):
        heads[i] = vmp_load_relaxed_u16(&ring[<uint16_t> (last + i) & mask])     # ordered by V1
        if VMP_CHECKS and heads[i] >= num:
            if i == 0:
                vq.broken = VMP_BROKEN_HEAD
                return -1
            n = i
            break
        vmp_prefetch_read(&desc[heads[i]])
    for i in range(n):
        c = &b.chains[i]
        load_desc(&desc[heads[i]], &d)
        c.first = segment
        b.used[i].id = heads[i]
        b.used[i].len = 0
        if (
            segment < BURST_SEGMENTS_MAX
            and d.flags == plain
            and direction & EITHER != EITHER
            and add_plain(b, c, &cache, &d, segment, plain != 0, touch)
        ):
            segment += 1
            continue
        if segment + CHAIN_SEGMENTS_MAX > BURST_SEGMENTS_MAX:
            n = i       # never at i == 0
            break
        memset(c, 0, sizeof(chain))
        c.first = segment
        b.n_segments = segment
        reason = walk_chain(vq, b, c, heads[i], direction)
        if reason:
            if vq.cache.missed:
                # Behind an IOMMU, and not a mistake: the chain waits. It was all looked at: nobody is to look again
                # before the driver adds something or the IOTLB changes.
                # ORDER V1 (device): as above
                vq.avail_idx = vmp_load_acquire_u16(&vq.avail[1])
                vmp_store_relaxed_u16(&vq.slot.avail_idx, vq.avail_idx)     # for `show` alone: no order
                reason = VMP_BROKEN_AVAIL_IDX if <uint16_t> (vq.avail_idx - last) > num else 0
            if i == 0 and reason:
                vq.broken = reason
                return -1
            n = i       # what came before it is good; the next fetch meets it first
            break
        segment = b.n_segments
        cache = vq.cache
    b.n = n
    b.n_segments = segment
    vq.last_avail_idx = <uint16_t> (last + n)
    vmp_kill_point(vq.slot, VMP_KILL_FETCHED)
    return <int> n


cdef void vring_give_back(vring *vq, const burst *b, uint32_t first, uint32_t n) noexcept nogil:
    """Give back chains `first` to `first + n - 1` of a burst, in its order: ids and lengths are those in `b.used`.

    After those not yet published; the driver does not see them before vring_publish. At most BURST chains between two
    publications.
    """
    cdef const vring_used_elem *elems = &b.used[first]
    cdef uint32_t start = vq.used_idx & vq.mask
    cdef uint32_t span = vq.num - start
    cdef vring_used_elem *ring = <vring_used_elem *> (vq.used + 2)
    vmp_kill_point(vq.slot, VMP_KILL_RETURNING)
    if vq.packed:
        packed_give_back(vq, b, first, n)
        vmp_kill_point(vq.slot, VMP_KILL_RETURNED)
        return
    if span > n:
        span = n
    journal_split(vq, b, first, n)
    # Two spans without a mask in the loop: plain stores, ordered before used->idx by V2.
    memcpy(&ring[start], elems, span * sizeof(vring_used_elem))
    if span < n:
        memcpy(&ring[0], elems + span, (n - span) * sizeof(vring_used_elem))
    vq.used_idx = <uint16_t> (vq.used_idx + n)
    if vq.log is not NULL:
        # ORDER W2 (writer): buffers and used elements written, their bits set, then used->idx         [release, V2]
        #   pairs with  W3 (vring_publish in this worker, vring_attach in its replacement: the bit of used->idx)
        #   without it  a worker killed in between has told the driver of a buffer whose bits nobody sets any more.
        #               Killed before used->idx it has told nothing: the chain is taken again, and until then what is in
        #               its buffer is nobody's to rely on.
        #   shown by    tests/integration/test_dirty_log.py::test_nothing_is_unlogged_when_workers_die
        log_order()
        dirty_chains(vq, b, first, n)
        dirty_used(vq, 4 + start * sizeof(vring_used_elem), span * sizeof(vring_used_elem))
        dirty_used(vq, 4, (n - span) * sizeof(vring_used_elem))
    vmp_kill_point(vq.slot, VMP_KILL_RETURNED)


cdef void vring_publish(vring *vq) noexcept nogil:
    """Let the driver see what was given back. Chains taken but not given back have been put back (vring_unfetch).

    Or `last_avail_idx` stands before them meanwhile: they are then of bursts that are published afterwards.
    """
    cdef vmp_ring *slot = vq.slot
    if vq.packed:
        packed_publish(vq)
        return
    # ORDER J1 (worker): slot.batch_*, then used->idx, then slot.last_avail_idx, then slot.used_idx   [release each]
    #   pairs with  J2 (vring_attach in a replacement: used->idx compared with slot.used_idx and slot.batch_used_idx)
    #   without it  a worker killed in between leaves a slot from which the replacement takes chains a second time, or
    #               leaves some out.
    #   shown by    tests/integration/test_spawner.py
    vmp_store_relaxed_u16(&slot.batch_avail_idx, vq.last_avail_idx)
    vmp_store_relaxed_u16(&slot.batch_used_idx, vq.used_idx)
    vmp_kill_point(slot, VMP_KILL_NOTED)
    # ORDER V2 (device): used elements and the buffers they stand for, then store used->idx            [release]
    #   pairs with  the driver's barrier after it loads used->idx (virtio 1.3, 2.7.14; tools/stress/split.py)
    #   without it  the driver may read an element, or a packet, that is not there yet.
    #   shown by    tests/oracle/test_agree.py
    vmp_store_release_u16(&vq.used[1], vq.used_idx)
    vmp_kill_point(slot, VMP_KILL_SHOWN)
    if vq.log is not NULL:
        # ORDER W3 (writer): used->idx, then its bit                                                   [full fence, W1]
        #   pairs with  W2 (vring_give_back: the bits of what used->idx stands for)
        #   without it  where the bit comes before the index, the front-end may clear it and copy the page in between. A
        #               worker killed after the index leaves the bit to its replacement (vring_attach).
        #   shown by    tests/integration/test_dirty_log.py::test_nothing_is_unlogged_when_workers_die
        log_order()
        dirty_used(vq, 2, 2)
    vmp_store_release_u16(&slot.last_avail_idx, vq.last_avail_idx)      # ORDER J1: as above
    vmp_kill_point(slot, VMP_KILL_AVAIL_NOTED)
    vmp_store_release_u16(&slot.used_idx, vq.used_idx)
    vmp_kill_point(slot, VMP_KILL_USED_NOTED)
    journal_commit(vq)
    # ORDER J1 (worker): as above; and all of it before anything that is noted of the next batch        [for our death]
    vmp_fence_own_death()
    vmp_count_u64(&slot.batches, 1)
    vmp_kill_point(slot, VMP_KILL_PUBLISHED)


cdef inline bint split_wants_call(vring *vq) noexcept nogil:
    """vring_wants_call of a split ring (2.7.7.2, 2.7.10)."""
    cdef uint16_t old = vq.signalled_used
    cdef uint16_t new = vq.used_idx
    cdef uint16_t used_event
    cdef bint valid = vq.signalled_valid
    # ORDER V3 (device): store used->idx, then load avail->flags or used_event                 [full fence between]
    #   pairs with  the driver: used_event stored, full barrier, used->idx looked at again (virtio 1.3, 2.7.7.1)
    #   without it  the load may pass the store: we see the old wish, the driver sees the old index and sleeps.
    #   shown by    tests/integration/test_swap.py
    vmp_fence_full()
    if not vq.event_idx:
        return vmp_load_relaxed_u16(&vq.avail[0]) & AVAIL_F_NO_INTERRUPT == 0
    used_event = vmp_load_relaxed_u16(&vq.avail[2 + <uint32_t> vq.num])
    vq.signalled_used = new
    vq.signalled_valid = 1
    return not valid or <uint16_t> (new - used_event - 1) < <uint16_t> (new - old)


cdef bint vring_wants_call(vring *vq) noexcept nogil:
    """After vring_publish: whether the driver asked to be told, now or when nothing more is available (feature 24)."""
    cdef bint wants = packed_wants_call(vq) if vq.packed else split_wants_call(vq)
    return wants or (vq.notify_on_empty and vq.last_avail_idx == vq.avail_idx)


cdef void vring_call(vring *vq) noexcept nogil:
    """After vring_publish: interrupt the driver if it wants that."""
    vmp_kill_point(vq.slot, VMP_KILL_CALLING)
    if vring_wants_call(vq) and vq.call_fd >= 0:
        signal_eventfd(vq.call_fd)
        vmp_kill_point(vq.slot, VMP_KILL_CALLED)
        vmp_count_u64(&vq.slot.calls, 1)
    else:
        vmp_count_u64(&vq.slot.calls_suppressed, 1)


cdef inline void write_event_word(vring *vq, uint32_t place, uint16_t value) noexcept nogil:
    """Write used->flags (place 0) or avail_event, and log that. No order beside: that is the caller's."""
    vmp_store_relaxed_u16(&vq.used[place], value)
    if vq.log is not NULL:
        log_order()
        dirty_used(vq, 2 * place, 2)


cdef bint vring_enable_notify(vring *vq) noexcept nogil:
    """Ask the driver for kicks. True when it made more available meanwhile: then no kick may come for it."""
    if vq.packed:
        packed_enable_notify(vq)
    elif vq.event_idx:
        # The entry after those that we have seen: some of them may still wait to be taken.
        write_event_word(vq, 2 + <uint32_t> vq.num * 4, vq.avail_idx)
    else:
        write_event_word(vq, 0, 0)
    # ORDER V4 (device): store avail_event, used->flags or the device's event suppression, then load avail->idx or the
    #               next descriptor's flags                                                [full fence between]
    #   pairs with  the driver: avail->idx (or flags) stored, full barrier, avail_event or flags loaded (virtio 1.3,
    #               2.7.13.4, 2.8.21.3)
    #   without it  the load may pass the store: we see the old index and sleep, the driver sees the old wish and does
    #               not kick.
    #   shown by    tests/integration/test_swap.py
    vmp_fence_full()
    vmp_kill_point(vq.slot, VMP_KILL_ASKED)
    return vring_has_more(vq)


cdef void vring_disable_notify(vring *vq) noexcept nogil:
    """Tell the driver that kicks are not needed. A hint: a late kick does no harm, so no order."""
    if vq.packed:
        packed_disable_notify(vq)
    elif not vq.event_idx:
        write_event_word(vq, 0, USED_F_NO_NOTIFY)
    vmp_kill_point(vq.slot, VMP_KILL_HUSHED)


cdef void vring_tell_log(vring *vq) noexcept nogil:
    """Signal the log's eventfd if bits were set since it was signalled: once a work item, not once a page."""
    if vq.logged:
        vq.logged = 0
        if vq.log_fd >= 0:
            signal_eventfd(vq.log_fd)


cdef uint32_t vring_room(vring *vq) noexcept nogil:
    """How many chains the driver has made available and we have not taken: a number to plan with, nothing is taken.

    0 is exact; for a packed ring, where it takes a look at each descriptor, a larger number may be too small.
    """
    if vq.packed:
        return packed_room(vq)
    return <uint16_t> (vmp_load_relaxed_u16(&vq.avail[1]) - vq.last_avail_idx)


cdef bint vring_attach(vring *vq) noexcept nogil:
    """Take up the ring where its slot says that it stands: after a start, a move to this worker, or a death.

    Inside a read-side section, ring pointers set. True when the ring was served before, so that somebody may have died
    between publishing something and telling the driver.
    """
    cdef bint taken_over = vq.slot.used_valid != 0 or vq.slot.recover != 0
    if vq.packed:
        packed_attach(vq)
        vq.slot.used_valid = 1      # no order: nothing depends on it but the answer
    else:
        split_attach(vq)
    vq.avail_idx = vq.last_avail_idx
    vq.signalled_valid = 0
    vq.broken = <uint8_t> vq.slot.broken
    vq.cache.size = 0
    journal_settle(vq)
    # ORDER J1, J3 (replacement): what was repaired, then anything that is noted of the next batch       [for our death]
    vmp_fence_own_death()
    if vq.log is not NULL and taken_over:
        # ORDER W3 (replacement): the worker before us may have died between used->idx, or the word by which kicks are
        # asked for, and its bit.
        log_order()
        if vq.packed:
            dirty_own(vq, <const uint8_t *> vq.used, 4)
        else:
            dirty_used(vq, 0, 4)
            dirty_used(vq, 4 + <uint64_t> vq.num * sizeof(vring_used_elem), 2 if vq.event_idx else 0)
    return taken_over


cdef void split_attach(vring *vq) noexcept nogil:
    """vring_attach of a split ring."""
    cdef vmp_ring *slot = vq.slot
    # ORDER J2 (replacement): load used->idx, then the slot's indices                          [acquire]
    #   pairs with  J1 (vring_publish in the worker before us; it is dead or has left: this is about its stores)
    #   shown by    tests/integration/test_spawner.py
    cdef uint16_t ring_used = vmp_load_acquire_u16(&vq.used[1])
    vq.last_avail_idx = slot.last_avail_idx
    # ORDER J1 (replacement): the slot is repaired in the order in which it is written, so that a second death in
    # between finds what the first left                                                                [release each]
    if not slot.used_valid:
        # A fresh start; somebody else may have served the ring before us. What that one took and had not given back is
        # to be taken again, since chains are given back in the order in which they were taken: so the ring's used->idx
        # counts, not the base, which is 0 from a front-end that could not ask (DPDK's virtio-user).
        vq.last_avail_idx = ring_used
        vq.used_idx = ring_used
        vmp_store_release_u16(&slot.last_avail_idx, ring_used)
        vmp_store_release_u16(&slot.used_idx, ring_used)
        vmp_store_release_u16(&slot.batch_used_idx, ring_used)
        vmp_store_release_u16(&slot.used_valid, 1)
    elif ring_used != slot.used_idx and ring_used == slot.batch_used_idx:
        # Killed after the publication and before the slot said so.
        # ORDER J1 (replacement): as above
        vq.last_avail_idx = slot.batch_avail_idx
        vq.used_idx = ring_used
        vmp_store_release_u16(&slot.last_avail_idx, vq.last_avail_idx)
        vmp_store_release_u16(&slot.used_idx, ring_used)
    else:
        # Killed before: what was noted is void. The control process sees by that word whether a ring is to be looked at
        # before it is stopped (vhostmp/unfinished.py).
        vq.used_idx = slot.used_idx
        vmp_store_release_u16(&slot.batch_used_idx, vq.used_idx)


class Chain(NamedTuple):
    """A descriptor chain: its head, and (gpa, bytes) of each segment, device-readable ones first."""

    head: int
    readable: list
    writable: list


cdef class Vring:
    """One virtqueue, device side, as a Python object: the same compiled code, for tests against the oracle."""

    cdef vring vq
    cdef vmp_ring slot
    cdef burst b
    cdef MemoryMap memory
    cdef dict taken

    def __init__(self, MemoryMap mem not None, int num, desc_gpa, avail_gpa, used_gpa, *, features=0, last_avail_idx=0):
        """Serve the ring at these guest-physical addresses.

        `features` are virtio feature bits (24, 28, 29 and 34 matter here). The used index is read from the ring. Of a
        packed ring (34) `avail_gpa` and `used_gpa` are the driver's and the device's event suppression, and
        `last_avail_idx` is the position where it stands in both directions.

        Raises LocalError when num is not from 1 to 32,768 (split: a power of two), or a part is not in one region.
        """
        packed = features >> 34 & 1
        if not 0 < num <= 32768 or num & (num - 1) and not packed:
            raise LocalError(f"ring size {num} is not {'' if packed else 'a power of two '}from 1 to 32768")
        parts = []
        for name, gpa, size in (
            ("desc", desc_gpa, 16 * num),
            ("avail", avail_gpa, 4 if packed else 6 + 2 * num),
            ("used", used_gpa, 4 if packed else 6 + 8 * num),
        ):
            address = mem.translate(gpa, size)
            if address is None:
                raise LocalError(f"{name} ring at gpa {gpa:#x} is not in one memory region")
            parts.append(address)
        self.memory = mem
        self.taken = {}
        self.vq.desc = <vring_desc *> <uintptr_t> parts[0]
        self.vq.avail = <uint16_t *> <uintptr_t> parts[1]
        self.vq.used = <uint16_t *> <uintptr_t> parts[2]
        self.vq.num = num
        self.vq.mask = num - 1
        self.vq.mem = &mem.mem
        self.vq.slot = &self.slot
        self.vq.call_fd = -1
        self.vq.indirect = features >> 28 & 1
        self.vq.event_idx = features >> 29 & 1
        self.vq.packed = packed
        self.vq.notify_on_empty = features >> 24 & 1
        self.slot.last_avail_idx = last_avail_idx
        self.slot.used_idx = last_avail_idx     # of a split ring it is read from the ring
        vring_attach(&self.vq)

    def pop(self):
        """Take the next chain, None when there is none. QueueBroken when the driver broke a rule; no index moved."""
        cdef int n = vring_fetch(&self.vq, &self.b, 1, EITHER)
        if n < 0:
            raise QueueBroken(f"virtqueue broken: {self.broken}")
        if n == 0:
            return None
        readable = [self._gpa(i) for i in range(self.b.chains[0].n_readable)]
        writable = [self._gpa(self.b.chains[0].n_readable + i) for i in range(self.b.chains[0].n_writable)]
        if self.vq.packed:
            self.taken.setdefault(self.b.used[0].id, []).append(self.b.chains[0].n_descriptors)
        return Chain(self.b.used[0].id, readable, writable)

    def _gpa(self, int i):
        cdef uintptr_t hva = <uintptr_t> self.b.segments[i].iov_base
        for k in range(self.memory.mem.n):
            offset = hva - <uintptr_t> self.memory.mem.regions[k].hva
            if 0 <= offset < self.memory.mem.regions[k].size:
                return (self.memory.mem.regions[k].gpa + offset, self.b.segments[i].iov_len)
        raise AssertionError("segment outside guest memory")

    def push(self, uint32_t head, uint32_t length):
        """Stage one used element: `length` bytes were written to the chain that starts at `head` (packed: has that id).

        In a packed ring only what was taken can be given back (LookupError), and at most 64 chains at once.
        """
        if self.vq.packed:
            self.b.chains[0].n_descriptors = self.taken[head].pop(0)
        self.b.used[0].id = head
        self.b.used[0].len = length
        vring_give_back(&self.vq, &self.b, 0, 1)

    def publish(self):
        """Let the driver see the staged elements. True when it wants an interrupt."""
        vring_publish(&self.vq)
        return vring_wants_call(&self.vq)

    def enable_notify(self):
        """Ask for kicks. True when there is something to take."""
        self.vq.avail_idx = self.vq.last_avail_idx
        return vring_enable_notify(&self.vq)

    def disable_notify(self):
        """Ask for no kicks."""
        vring_disable_notify(&self.vq)

    @property
    def last_avail_idx(self):
        """The next available entry to take."""
        return self.vq.last_avail_idx

    @property
    def used_idx(self):
        """The next used entry to write."""
        return self.vq.used_idx

    @property
    def broken(self):
        """Why the ring is broken, None when it is whole."""
        return BROKEN_REASONS[self.vq.broken] or None
