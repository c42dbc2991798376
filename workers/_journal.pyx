"""What a death has cost a ring, and the journal made ready for who serves it next: `_journal.pxd` has the theory.

A replacement may die here too. What it has found is therefore written down before it is counted (`slot.slips_known`),
and counted by storing the sums: its own replacement stores the same ones.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhostmp.shm.atomics cimport (
    vmp_fence_own_death,
    vmp_load_acquire_u16,
    vmp_load_relaxed_u64,
    vmp_store_relaxed_u16,
    vmp_store_relaxed_u32,
    vmp_store_relaxed_u64,
    vmp_store_release_u16,
)
from vhostmp.shm.build cimport vmp_kill_point
from vhostmp.shm.layout cimport VMP_KILL_SETTLED, VMP_KILL_SETTLING, vmp_ring
from vhostmp.workers._vring cimport BURST, vring


cdef uint16_t journal_used(const vring *vq) noexcept nogil:
    """The journal's used index: where the batch began that may have been published."""
    cdef uint64_t words = vmp_load_relaxed_u64(&vq.slot.journal[PACKED_USED])
    if not vq.packed:
        return (<const uint16_t *> vq.slot.journal)[SPLIT_USED]
    return <uint16_t> (words >> JOURNAL_SHIFT_OLD & POSITION_OFFSET | (words >> JOURNAL_SHIFT_OLD_WRAP & 1) << 15)


cdef bint came_of(const vring *vq) noexcept nogil:
    """Whether anything may have come of what was begun: not while the partner's ring stands where it stood then.

    Its slot says where it stands, whether anybody has taken it up since or not, unless a batch of it is half done.
    """
    cdef const vmp_ring *peer = vq.peer
    if not vq.slot.effect_valid or peer is NULL or peer.used_idx != vq.slot.effect_idx:
        return True
    if vq.slot.effect_ring & EFFECT_PACKED:
        return peer.batch_n != 0
    return not peer.used_valid or peer.batch_used_idx != peer.used_idx


cdef void find_slips(vring *vq) noexcept nogil:
    """Find out what the death of who served the ring has cost. Its slot says where it stands."""
    cdef vmp_ring *slot = vq.slot
    cdef bint published = journal_used(vq) != slot.used_idx
    cdef uint32_t waiting = slot.waiting
    cdef uint64_t[4] cost       # by kind
    cdef uint64_t bursts = slot.begun_bursts
    cdef uint64_t word
    cdef uint32_t k
    for k in range(4):
        cost[k] = 0
    if published and slot.batch_waiting:
        waiting = slot.batch_waiting - 1
    if published:
        bursts &= ~<uint64_t> BURST_MASK
    else:
        for k in range(<uint32_t> BURST):
            word = vmp_load_relaxed_u64(journal_entry(slot, vq.packed, k))
            if word & JOURNAL_MARK:
                cost[word >> JOURNAL_SHIFT_KIND & 3] += 1
    while bursts:
        cost[KIND_REPEATED] += bursts & BURST_MASK
        bursts >>= BURST_BITS
    if waiting > cost[KIND_HELD]:
        cost[KIND_HELD] = waiting
    if not came_of(vq):
        cost[KIND_REPEATED] = 0
    vmp_store_relaxed_u64(&slot.repeated_next, slot.repeated + cost[KIND_REPEATED])
    vmp_store_relaxed_u64(&slot.lost_next, slot.lost + cost[KIND_LOST] + cost[KIND_HELD])


cdef void journal_settle(vring *vq) noexcept nogil:
    """Count what a death has cost, if there was one, and begin a clean journal. Of vring_attach, once it is known where

    the ring stands. A ring that was moved to this worker, or is started, has lost nothing.
    """
    cdef vmp_ring *slot = vq.slot
    cdef uint64_t *entry
    cdef uint32_t k
    vq.begun = 0
    vq.staged = 0
    vq.counter = 0
    vq.begun_bursts = 0
    # ORDER J6 (replacement): load slot.slips_known, then the sums                                    [acquire]
    #   pairs with  J5 (the sums, then slips_known, in the replacement before this one; the journal, in the worker)
    #   shown by    tests/adversity/test_kill_points.py::test_second_death
    if slot.died or vmp_load_acquire_u16(&slot.slips_known):
        if not slot.slips_known:
            find_slips(vq)
            # ORDER J5 (replacement): the sums, then slips_known, then all that they were found from     [release each]
            vmp_store_release_u16(&slot.slips_known, 1)
        vmp_kill_point(slot, VMP_KILL_SETTLING)
        # ORDER J5 (replacement): as above: slips_known before what follows                            [for our death]
        vmp_fence_own_death()
        vmp_store_relaxed_u64(&slot.repeated, slot.repeated_next)
        vmp_store_relaxed_u64(&slot.lost, slot.lost_next)
        vmp_kill_point(slot, VMP_KILL_SETTLED)
        vmp_fence_own_death()       # ORDER J5: as above: counted before anything is forgotten
        vmp_store_relaxed_u32(&slot.waiting, 0)
    vmp_store_relaxed_u32(&slot.batch_waiting, 0)
    vmp_store_relaxed_u16(&slot.effect_valid, 0)
    vmp_store_relaxed_u64(&slot.begun_bursts, 0)
    for k in range(<uint32_t> BURST):
        entry = journal_entry(slot, vq.packed, k)
        vmp_store_relaxed_u64(entry, 0)
        vmp_store_relaxed_u64(entry + COUNTER, 0)
    vmp_store_relaxed_u64(&slot.journal[0], 0)
    vmp_store_relaxed_u64(&slot.journal[1], JOURNAL_VERSION | <uint64_t> BURST << 16)
    store_journal_used(vq, vq.used_idx)
    vmp_store_relaxed_u16(&slot.died, 0)
    # ORDER J5 (replacement): as above
    vmp_store_release_u16(&slot.slips_known, 0)


cdef bint journal_half_done(const vmp_ring *slot, bint packed, bint asking) noexcept nogil:
    """Whether a death has left something to a ring's next worker: StateInForce.unfinished asks the same.

    Who serves the ring takes it up anyway; this is for who does not. `asking`: so that it is worth asking a front-end
    where the ring lies, as it is not to count what a death has cost. No order: that is vring_attach's, J2 and J4.
    """
    if slot.broken:
        return False
    if slot.died and not asking:
        return True
    if packed:
        return slot.batch_n != 0
    return slot.used_valid and slot.batch_used_idx != slot.used_idx
