"""The journal of a ring: what its worker has taken, done and not yet published, for whoever comes after its death.

Every ring that is served has one, in its slot of the control segment, whoever its front-end is: it is ours alone, so it
is believed, and it is what a worker's replacement goes by. (The region that a front-end may keep of the same, for the
day on which all of us have died, is guest-side memory and a copy: `_inflight`.)

Its layout and the order of its stores are those of vhost-user's region ("Inflight I/O tracking"), split or packed. A
chain's mark is there before anything is done with the chain; chains that are given back are entered as a batch; the
ring's used index follows; then the marks go; then the journal's used index. So a replacement knows what was *taken*
(marked), what was *done* (entered) and what was *published* (the journal's used index is not the ring's any more).

Two things are ours. There are as many entries as one burst has chains, not as many as the ring has descriptors: that is
all that can ever be under way, since what a burst leaves is put back before it is published. Entry k is the k-th chain
after the last one that was published, so an entry names its chain's head (a packed one has the field, in a split one it
stands in the padding), and the journal of a busy ring stays within a few cache lines. And the padding has a byte
that says what dying with the chain costs (the KIND_ numbers):

    split   16 bytes    inflight u8, kind u8, head u16, padding u16, next u16, counter u64
    packed  32 bytes    inflight u8, kind u8, next u16, last u16, num u16, counter u64, id u16, flags u16, len u32, addr

A packed ring's entries are also what its batch is published from (`_packed`): id, num (descriptors) and len.

A back-end may be handed more than a burst at once (`backends/_batch.pyx`). What it was handed is then not marked in
entries but counted, of each burst, in one word of the slot; bursts are given back and published one after the other,
each as if it were the only one, and each takes its count away. Of later ones the slot's indices know nothing: for
whoever finds it so they are not taken yet.

When a worker has died the control process says so in the slot (`died`), and `journal_settle`, called by the replacement
when it takes the ring up, counts: of marked chains that were not published, those that are done again (`slot.repeated`)
and the packets that went with the worker (`slot.lost`, with those that waited in its own memory, `slot.waiting`). Then
the ring is served from where its used index stands: transmit at least once, receive at most once, each descriptor back.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from vhostmp.shm.atomics cimport (
    vmp_fence_own_death,
    vmp_store_relaxed_u16,
    vmp_store_relaxed_u32,
    vmp_store_relaxed_u64,
    vmp_store_release_u16,
    vmp_store_release_u64,
)
from vhostmp.shm.build cimport VMP_JOURNAL, vmp_kill_point
from vhostmp.shm.layout cimport VMP_KILL_BEGUN, VMP_KILL_UNMARKED, vmp_ring
from vhostmp.workers._vring cimport BURST, POSITION_OFFSET, burst, vring


cdef enum:
    # What it costs when a worker dies with a chain, between its mark and its publication.
    KIND_NOTHING = 0            # nothing that anybody notices
    KIND_REPEATED = 1           # what was done with it is done again: a frame may be sent twice
    KIND_LOST = 2               # the packet that was read into it, or was going to be, is gone
    KIND_HELD = 3               # as KIND_LOST, unless it is among those that wait already (slot.waiting)

    JOURNAL_VERSION = 1
    JOURNAL_MARK = 1
    JOURNAL_SHIFT_KIND = 8
    JOURNAL_KIND = 0xFF00
    # The first 8 bytes of an entry.
    JOURNAL_SHIFT_HEAD = 16     # split
    JOURNAL_SHIFT_NEXT = 48
    JOURNAL_SHIFT_PACKED_NEXT = 16      # packed, in a front-end's region too
    JOURNAL_SHIFT_LAST = 32
    JOURNAL_SHIFT_NUM = 48
    # Bytes 16 to 23 of a packed one: id, flags, len.
    JOURNAL_SHIFT_FLAGS = 16
    JOURNAL_SHIFT_LEN = 32
    # Bytes 16 to 23 of a packed header: used_idx, old_used_idx, the two wrap counters.
    JOURNAL_SHIFT_OLD = 16
    JOURNAL_SHIFT_WRAP = 32
    JOURNAL_SHIFT_OLD_WRAP = 40
    # In 8-byte words.
    SPLIT_WORDS = 2
    PACKED_WORDS = 4
    COUNTER = 1
    BUFFER = 2
    PACKED_USED = 2             # of the header
    # In 2-byte ones.
    SPLIT_LAST_BATCH_HEAD = 6   # of the header
    SPLIT_USED = 7
    # Bits of slot.begun_bursts that a burst has.
    BURST_BITS = 16
    BURST_MASK = 0xFFFF

    EFFECT_PACKED = 0x80000000  # in slot.effect_ring: of a packed ring


cdef void journal_settle(vring *vq) noexcept nogil
cdef bint journal_half_done(const vmp_ring *slot, bint packed, bint asking) noexcept nogil


cdef inline uint64_t *journal_entry(vmp_ring *slot, bint packed, uint32_t k) noexcept nogil:
    """Return entry `k`; its header stands where entry -1 would."""
    cdef uint32_t words = PACKED_WORDS if packed else SPLIT_WORDS
    return &slot.journal[words * (k + 1)]


cdef inline uint64_t journal_used_words(uint16_t position, uint16_t old) noexcept nogil:
    """Bytes 16 to 23 of a packed region's header, ours or a front-end's, for two positions."""
    return (
        <uint64_t> (position & POSITION_OFFSET)
        | <uint64_t> (old & POSITION_OFFSET) << JOURNAL_SHIFT_OLD
        | <uint64_t> (position >> 15) << JOURNAL_SHIFT_WRAP
        | <uint64_t> (old >> 15) << JOURNAL_SHIFT_OLD_WRAP
    )


cdef inline void journal_begin(vring *vq, uint32_t i, int kind) noexcept nogil:
    """Mark chain `i` of the burst: something will be done with it now. At most BURST chains between two publications.

    Entries are written by plain stores: nobody looks at them while we live. What is done comes after the mark for who
    finds out about it: it is a system call, a call into Python, or an index stored with release.
    """
    cdef uint32_t k = vq.staged + i
    cdef uint64_t *entry
    if VMP_JOURNAL:
        entry = journal_entry(vq.slot, vq.packed, k)
        entry[COUNTER] = vq.counter + k
        entry[0] = JOURNAL_MARK | <uint64_t> kind << JOURNAL_SHIFT_KIND
        if k >= vq.begun:
            vq.begun = <uint16_t> (k + 1)
    vmp_kill_point(vq.slot, VMP_KILL_BEGUN)


cdef inline void journal_begin_bursts(vring *vq, uint64_t counts) noexcept nogil:
    """Note that something will be done now with so many chains of each burst, KIND_REPEATED: slot.begun_bursts."""
    if VMP_JOURNAL:
        vq.begun_bursts = counts
        vmp_store_relaxed_u64(&vq.slot.begun_bursts, counts)        # plain, as marks are
    vmp_kill_point(vq.slot, VMP_KILL_BEGUN)


cdef inline void journal_next_burst(vring *vq) noexcept nogil:
    """After a burst of several was published: the next one is."""
    if VMP_JOURNAL and vq.begun_bursts:
        vq.begun_bursts >>= BURST_BITS
        vmp_store_relaxed_u64(&vq.slot.begun_bursts, vq.begun_bursts)


cdef inline void journal_effect(vring *vq, const vring *peer, uint32_t number) noexcept nogil:
    """Note where the ring stands, in slot `number`, that is to show what is begun from here on, before it is begun.

    While it stands there nothing has come of that: it does not count as repeated.
    """
    vmp_store_relaxed_u32(&vq.slot.effect_ring, number | (EFFECT_PACKED if peer.packed else 0))
    vmp_store_relaxed_u16(&vq.slot.effect_idx, peer.used_idx)
    vmp_store_relaxed_u16(&vq.slot.effect_valid, 1)


cdef inline void journal_drop(vring *vq, uint32_t i) noexcept nogil:
    """Take the marks of chain `i` of the burst, and of those after it, away: nothing came of what was done."""
    cdef uint32_t k = vq.staged + i
    if VMP_JOURNAL:
        while vq.begun > k:
            vq.begun -= 1
            journal_entry(vq.slot, vq.packed, vq.begun)[0] = 0


cdef inline uint64_t journal_split_word(const burst *b, uint32_t i, uint32_t k) noexcept nogil:
    """Return the first 8 bytes of entry `k` for chain `i` of a split ring, of the batch that is published next."""
    return (
        JOURNAL_MARK
        | <uint64_t> <uint16_t> b.used[i].id << JOURNAL_SHIFT_HEAD
        | <uint64_t> <uint16_t> (k - 1) << JOURNAL_SHIFT_NEXT
    )


cdef inline void journal_split(vring *vq, const burst *b, uint32_t first, uint32_t n) noexcept nogil:
    """Enter chains of a split ring that were given back: they are of the batch that is published next."""
    cdef uint32_t k = vq.staged
    cdef uint32_t begun = vq.begun
    cdef uint64_t counter = vq.counter
    cdef uint32_t i = first
    cdef uint32_t end
    cdef uint64_t *entry
    if VMP_JOURNAL:
        if n > BURST - k:
            n = BURST - k       # more than any handler gives back
        end = first + n
        entry = journal_entry(vq.slot, False, k)
        while k < begun and i < end:        # those have a mark, and their counter
            entry[0] = journal_split_word(b, i, k) | entry[0] & JOURNAL_KIND
            entry += SPLIT_WORDS
            i += 1
            k += 1
        while i < end:
            entry[0] = journal_split_word(b, i, k)
            entry[COUNTER] = counter + k
            entry += SPLIT_WORDS
            i += 1
            k += 1
        vq.staged = <uint16_t> k
        if k > begun:
            vq.begun = <uint16_t> k
        vmp_store_relaxed_u16(<uint16_t *> vq.slot.journal + SPLIT_LAST_BATCH_HEAD, <uint16_t> (k - 1))


cdef inline void journal_packed(vring *vq, const burst *b, uint32_t i) noexcept nogil:
    """Enter a chain of a packed ring that was given back, of the batch that is published next."""
    cdef uint64_t k = vq.staged
    cdef uint64_t *entry = journal_entry(vq.slot, True, <uint32_t> k)
    cdef uint64_t word = (
        JOURNAL_MARK
        | (k + 1) << JOURNAL_SHIFT_PACKED_NEXT
        | k << JOURNAL_SHIFT_LAST
        | <uint64_t> b.chains[i].n_descriptors << JOURNAL_SHIFT_NUM
    )
    if VMP_JOURNAL:
        if k < vq.begun:
            word |= entry[0] & JOURNAL_KIND
        else:
            vq.begun = <uint16_t> (k + 1)
        entry[COUNTER] = vq.counter + k
    entry[0] = word
    entry[BUFFER] = <uint64_t> b.used[i].len << JOURNAL_SHIFT_LEN | <uint16_t> b.used[i].id
    vq.staged += 1


cdef inline uint16_t journal_descriptors(const vmp_ring *slot, uint32_t k) noexcept nogil:
    """How many descriptors the chain of entry `k` of a packed ring takes."""
    return <uint16_t> (slot.journal[PACKED_WORDS * (k + 1)] >> JOURNAL_SHIFT_NUM)


cdef inline void journal_stage(vring *vq, uint16_t end, uint16_t start) noexcept nogil:
    """Before a packed ring's batch, from position `start` to `end`, is written to the ring."""
    if VMP_JOURNAL:
        vmp_store_relaxed_u64(&vq.slot.journal[PACKED_USED], journal_used_words(end, start))


cdef inline void store_journal_used(vring *vq, uint16_t position) noexcept nogil:
    """Store the journal's used index, after everything before it."""
    # ORDER J5 (worker): slot.used_idx, then marks cleared and slot.waiting, then the journal's used index     [release]
    #   pairs with  J6 (journal_settle in a replacement: the journal's used index compared with slot.used_idx, then the
    #               marks)
    #   without it  a replacement may count what was published as done again or lost, or may not count what was not.
    #   shown by    tests/adversity/test_kill_points.py::test_kill_point
    if vq.packed:
        vmp_store_release_u64(&vq.slot.journal[PACKED_USED], journal_used_words(position, position))
    else:
        vmp_store_release_u16(<uint16_t *> vq.slot.journal + SPLIT_USED, position)


cdef inline void journal_commit(vring *vq) noexcept nogil:
    """After a batch was published, and slot.used_idx says so: forget it, and what was marked and put back."""
    cdef vmp_ring *slot = vq.slot
    cdef uint32_t words = PACKED_WORDS if vq.packed else SPLIT_WORDS
    # ORDER J5 (worker): slot.used_idx, then the marks and slot.waiting                                [for our death]
    #   pairs with  J6 (journal_settle in a replacement)
    #   without it  as in store_journal_used.
    #   shown by    tests/adversity/test_kill_points.py::test_kill_point
    vmp_fence_own_death()
    if VMP_JOURNAL:
        memset(&slot.journal[words], 0, vq.begun * words * sizeof(uint64_t))
        vq.counter += vq.begun
        if vq.begun_bursts:
            vq.begun_bursts &= ~<uint64_t> BURST_MASK
            vmp_store_relaxed_u64(&slot.begun_bursts, vq.begun_bursts)
    if slot.batch_waiting:
        vmp_store_relaxed_u32(&slot.waiting, slot.batch_waiting - 1)
        vmp_store_relaxed_u32(&slot.batch_waiting, 0)
    if VMP_JOURNAL:
        vmp_store_relaxed_u16(&slot.effect_valid, 0)
        vmp_kill_point(slot, VMP_KILL_UNMARKED)
        store_journal_used(vq, vq.used_idx)
    vq.begun = 0
    vq.staged = 0
