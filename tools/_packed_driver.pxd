"""The driver's side of one packed virtqueue, written from virtio 1.3, as _driver.pxd has it of a split one.

Rules: those of _driver.pxd. Each buffer takes one descriptor, an indirect table where it has several pieces, so that
both formats count entries alike. Entry `n`, counted in 16 bits, stands at offset `n & mask`; the wrap counter there is
1 in the first round of the ring, 0 in the second, and so on (2.8.1). A buffer's id is its head: a number of its own.
Source: virtio 1.3, 2.8.1 (wrap counters), 2.8.10 (event suppression), 2.8.13 (descriptors), 2.8.21 and 2.8.22 (both
operations).
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhostmp.shm.atomics cimport (
    vmp_fence_full,
    vmp_load_acquire_u16,
    vmp_load_relaxed_u32,
    vmp_store_relaxed_u16,
    vmp_store_relaxed_u32,
    vmp_store_release_u16,
)
from vhostmp.tools._driver cimport ring_t, vring_used_elem, write

cdef enum:
    DESC_AVAIL = 0x80
    DESC_USED = 0x8000

    # Event suppression: offset and wrap counter in the lower half, flags in the upper one.
    EVENT_ENABLE = 0
    EVENT_DISABLE = 1
    EVENT_DESC = 2
    EVENT_SHIFT = 16
    EVENT_WRAP = 0x8000


cdef struct packed_desc:
    uint64_t addr
    uint32_t length
    uint16_t id
    uint16_t flags


cdef inline packed_desc *packed_at(ring_t *r, uint16_t n) noexcept nogil:
    return <packed_desc *> r.desc + (n & r.mask)


cdef inline bint packed_wrap(ring_t *r, uint16_t n) noexcept nogil:
    """The wrap counter at entry `n`."""
    return n & r.num == 0


cdef inline void packed_offer(ring_t *r, uint64_t addr, uint32_t length, uint16_t flags, uint16_t id) noexcept nogil:
    """Write one descriptor; `packed_expose` shows the device those written since the last time, all at once."""
    cdef packed_desc *d = packed_at(r, r.next_avail)
    flags |= DESC_AVAIL if packed_wrap(r, r.next_avail) else DESC_USED
    d.addr = addr
    d.length = length
    d.id = id
    if r.next_avail == r.kicked:
        r.held_flags = flags
    else:
        vmp_store_relaxed_u16(&d.flags, flags)      # behind the first one, which the device has to see before
    r.order[r.next_avail & r.mask] = id
    r.out[id] = 1
    r.next_avail += 1


cdef inline void packed_expose(ring_t *r, bint event_idx) noexcept nogil:
    """Publish the offered descriptors and kick if the device wants it."""
    cdef uint16_t new = r.next_avail
    cdef uint16_t old = r.kicked
    cdef uint64_t one = 1
    cdef uint32_t event, at
    if new == old:
        return
    # ORDER D11 (driver): descriptors and buffers, then store the flags of the first of them         [release]
    #   pairs with  the device's barrier after it loads a first descriptor's flags (virtio 1.3, 2.8.21.1;
    #               workers/_packed.pyx)
    #   without it  the device follows a descriptor that is not written yet.
    #   shown by    tests/unit/tools/test_guest.py::test_loop_counts_every_packet
    vmp_store_release_u16(&packed_at(r, old).flags, r.held_flags)
    # ORDER D12 (driver): store the flags, then load the device's event suppression     [full fence between]
    #   pairs with  the device: its event suppression stored, full barrier, the next descriptor's flags looked at again
    #               (virtio 1.3, 2.8.21.3; workers/_vring.pyx)
    #   without it  the load may pass the store: we see kicks unwanted, the device sees nothing new, both sleep.
    #   shown by    tests/unit/tools/test_guest.py::test_kick_only_when_asked
    vmp_fence_full()
    r.kicked = new
    event = vmp_load_relaxed_u32(<const uint32_t *> r.used)
    if event >> EVENT_SHIFT == EVENT_DISABLE:
        return
    if event >> EVENT_SHIFT == EVENT_DESC and event_idx:
        # Counted in two rounds of the ring: is the entry that it waits for among the new ones?
        at = (event & r.mask) + (0 if event & EVENT_WRAP else r.num)
        if ((at - old) & (2 * <uint32_t> r.num - 1)) >= <uint16_t> (new - old):
            return
    write(r.kick_fd, &one, 8)
    r.kicks += 1


cdef inline bint packed_used(ring_t *r, uint16_t n) noexcept nogil:
    """Whether entry `n` is one that the device has used."""
    # ORDER D13 (driver): load the flags of a used descriptor, then the rest of it and buffers         [acquire]
    #   pairs with  the device's barrier before it stores them (virtio 1.3, 2.8.22; workers/_packed.pyx)
    #   without it  an id or a packet is read before the device wrote it: stale data taken for a packet.
    #   shown by    tests/unit/tools/test_guest.py::test_loop_counts_every_packet
    cdef uint16_t flags = vmp_load_acquire_u16(&packed_at(r, n).flags) & (DESC_AVAIL | DESC_USED)
    return flags == (DESC_AVAIL | DESC_USED if packed_wrap(r, n) else 0)


cdef inline void packed_take(ring_t *r, vring_used_elem *elem) noexcept nogil:
    """Read the used descriptor at `last_used`, after `packed_used` said that it is one."""
    elem.id = packed_at(r, r.last_used).id
    elem.length = packed_at(r, r.last_used).length


cdef inline uint16_t packed_used_now(ring_t *r) noexcept nogil:
    """Behind the last entry that the device has used, one after the other."""
    cdef uint16_t n = r.last_used
    cdef uint16_t left = r.num - r.free_count
    while left and packed_used(r, n):
        n += 1
        left -= 1
    return n


cdef inline void packed_silence(ring_t *r) noexcept nogil:
    """Ask for no interrupts. A hint: no order is needed, a late one costs a needless interrupt."""
    vmp_store_relaxed_u32(<uint32_t *> r.avail, <uint32_t> EVENT_DISABLE << EVENT_SHIFT)


cdef inline bint packed_listen(ring_t *r, bint event_idx) noexcept nogil:
    """Ask for an interrupt with the next used descriptor. True when one is there already."""
    cdef uint32_t at = r.last_used & r.mask | (EVENT_WRAP if packed_wrap(r, r.last_used) else 0)
    if event_idx:
        vmp_store_relaxed_u32(<uint32_t *> r.avail, <uint32_t> EVENT_DESC << EVENT_SHIFT | at)
    else:
        vmp_store_relaxed_u32(<uint32_t *> r.avail, EVENT_ENABLE)
    # ORDER D14 (driver): store the driver's event suppression, then load the next used descriptor's flags [full fence]
    #   pairs with  the device: used descriptors stored, full barrier, our event suppression loaded (virtio 1.3, 2.8.10;
    #               workers/_packed.pyx)
    #   without it  the device sees interrupts unwanted, we see nothing used, we sleep on a packet that is there.
    #   shown by    tests/unit/tools/test_guest.py::test_sleeps_and_is_woken
    vmp_fence_full()
    return r.free_count != r.num and packed_used(r, r.last_used)
