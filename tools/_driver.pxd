"""The driver's side of one virtqueue, written from virtio 1.3: offer, expose, listen, take back. Split; and the struct.

Rules: one thread uses a ring. Indices are private; what the device writes is checked before it is used. Heads are
offered in the order they came back, which is ring order with a device that works in order (VIRTIO_F_IN_ORDER).
Source: virtio 1.3, 2.7.5 (descriptors), 2.7.6 (available ring), 2.7.8 (used ring), 2.7.13 and 2.7.14 (both operations).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vhostmp.shm.atomics cimport (
    vmp_fence_full,
    vmp_load_acquire_u16,
    vmp_load_relaxed_u16,
    vmp_store_relaxed_u16,
    vmp_store_release_u16,
)

cdef extern from "unistd.h" nogil:
    ssize_t write(int fd, const void *buf, size_t count)

cdef enum:
    DESC_NEXT = 1
    DESC_WRITE = 2
    DESC_INDIRECT = 4
    NO_NOTIFY = 1           # in used->flags; NO_INTERRUPT in avail->flags has the same value


cdef struct vring_desc:
    uint64_t addr
    uint32_t length
    uint16_t flags
    uint16_t next

cdef struct vring_used_elem:
    uint32_t id
    uint32_t length

cdef struct ring_t:
    # Of either format. A packed ring's entries are descriptors: each buffer takes one.
    uint16_t num
    uint16_t mask
    uint16_t next_avail     # private: entries written so far
    uint16_t kicked         # private: next_avail when the device was last asked whether it wants a kick
    uint16_t last_used      # private: used entries taken so far
    uint16_t free_first     # private: queue of free heads, in order of return
    uint16_t free_count
    vring_desc *desc        # packed: packed_desc
    uint16_t *avail         # flags, idx, ring[num], used_event; packed: the driver's event suppression
    uint16_t *used          # flags, idx, {id, length}[num], avail_event; packed: the device's
    uint16_t *free_heads
    uint16_t *order         # order[n]: the head (packed: the buffer id) offered as entry n
    uint8_t *out            # out[head]: the device holds it
    int kick_fd
    int call_fd
    uint64_t kicks
    bint packed
    uint16_t held_flags     # packed, private: of the descriptor at `kicked`, written when it is exposed


cdef inline void offer(ring_t *r, uint64_t addr, uint32_t length, uint16_t flags, uint16_t head) noexcept nogil:
    """Write one descriptor and its available entry; `expose` shows it to the device."""
    r.desc[head].addr = addr
    r.desc[head].length = length
    r.desc[head].flags = flags
    r.desc[head].next = 0
    r.avail[2 + (r.next_avail & r.mask)] = head
    r.order[r.next_avail & r.mask] = head
    r.out[head] = 1
    r.next_avail += 1


cdef inline uint16_t take_head(ring_t *r) noexcept nogil:
    cdef uint16_t head = r.free_heads[r.free_first & r.mask]
    r.free_first += 1
    r.free_count -= 1
    return head


cdef inline void give_head(ring_t *r, uint16_t head) noexcept nogil:
    r.out[head] = 0
    r.free_heads[<uint16_t> (r.free_first + r.free_count) & r.mask] = head
    r.free_count += 1


cdef inline uint16_t used_now(ring_t *r) noexcept nogil:
    # ORDER D3 (driver): load used->idx, then used entries and buffers             [acquire]
    #   pairs with  the device's barrier before it stores used->idx (virtio 1.3, 2.7.8.2; workers/_vring.pyx)
    #   without it  an entry or a packet is read before the device wrote it: stale data taken for a packet.
    #   shown by    tests/unit/tools/test_guest.py::test_loop_counts_every_packet
    return vmp_load_acquire_u16(r.used + 1)


cdef inline void expose(ring_t *r, bint event_idx) noexcept nogil:
    """Publish the offered entries and kick if the device wants it."""
    cdef uint16_t event
    cdef uint16_t new = r.next_avail
    cdef uint16_t old = r.kicked
    cdef uint64_t one = 1
    if new == old:
        return
    # ORDER D1 (driver): descriptors, buffers and available entries, then store avail->idx   [release]
    #   pairs with  the device's barrier after it loads avail->idx (virtio 1.3, 2.7.13.3; workers/_vring.pyx)
    #   without it  the device follows an entry that is not written yet.
    #   shown by    tests/unit/tools/test_guest.py::test_loop_counts_every_packet
    vmp_store_release_u16(r.avail + 1, new)
    # ORDER D2 (driver): store avail->idx, then load avail_event (or used->flags)   [full fence between]
    #   pairs with  the device: avail_event stored, full barrier, avail->idx looked at again (virtio 1.3, 2.7.10;
    #               workers/_vring.pyx)
    #   without it  the load may pass the store: we see kicks unwanted, the device sees no new entry, both sleep.
    #   shown by    tests/unit/tools/test_guest.py::test_kick_only_when_asked
    vmp_fence_full()
    r.kicked = new
    if event_idx:
        event = vmp_load_relaxed_u16(r.used + 2 + 4 * <size_t> r.num)
        if <uint16_t> (new - event - 1) >= <uint16_t> (new - old):
            return
    elif vmp_load_relaxed_u16(r.used) & NO_NOTIFY:
        return
    write(r.kick_fd, &one, 8)
    r.kicks += 1


cdef inline void silence(ring_t *r, bint event_idx) noexcept nogil:
    """Ask for no interrupts. A hint: no order is needed, a late one costs a needless interrupt."""
    if event_idx:
        vmp_store_relaxed_u16(r.avail + 2 + r.num, <uint16_t> (r.last_used - 1))
    else:
        vmp_store_relaxed_u16(r.avail, NO_NOTIFY)


cdef inline bint listen(ring_t *r, bint event_idx) noexcept nogil:
    """Ask for an interrupt with the next used entry. True when one is there already."""
    if event_idx:
        vmp_store_relaxed_u16(r.avail + 2 + r.num, r.last_used)
    else:
        vmp_store_relaxed_u16(r.avail, 0)
    # ORDER D4 (driver): store used_event (or avail->flags), then load used->idx     [full fence between]
    #   pairs with  the device: used->idx stored, full barrier, used_event or flags loaded (virtio 1.3, 2.7.7.2;
    #               workers/_vring.pyx)
    #   without it  the device sees interrupts unwanted, we see nothing used, we sleep on a packet that is there.
    #   shown by    tests/unit/tools/test_guest.py::test_sleeps_and_is_woken
    vmp_fence_full()
    return used_now(r) != r.last_used


cdef inline int completed(ring_t *r) noexcept nogil:
    """How many used entries there are to take; -1 for a count that no correct device writes."""
    cdef uint16_t n = <uint16_t> (used_now(r) - r.last_used)
    if n > r.num - r.free_count:
        return -1
    return n
