"""What the data thread does for a device behind an IOMMU, around each work item.

Theory of operation. Where a ring lies is looked up inside the section in which it is used, and again whenever the IOTLB
has changed (`find_ring`). What is not there is a *miss*: the ring is left as it is, nothing of it lost or taken, the
miss is written into the ring's slot, and the control process, woken by the device's eventfd, asks the front-end
(`tell_miss`). The answer changes the IOTLB, and a nudge queues the rings that stalled (`wake_stalled`). No ring waits
for another one's miss, but for the two of a pair where one's packets go into the other.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from posix.unistd cimport write

from vhostmp.shm._iotlb cimport IOTLB_BUSY, IOTLB_MISS, IOTLB_UNUSABLE, iotlb_version
from vhostmp.shm._memory cimport memory_span
from vhostmp.shm.atomics cimport (
    vmp_count_u64,
    vmp_now_ns,
    vmp_store_relaxed_u32,
    vmp_store_release_u32,
    vmp_store_release_u64,
)
from vhostmp.workers._journal cimport journal_half_done
from vhostmp.workers._vring cimport vring, vring_desc, vring_disable_notify
from vhostmp.workers._work cimport finish_resting, queue_ring, take_up, wdevice, worker, wring


cdef enum:
    NEVER = 1               # a version that no table has while it can be used
    REPEAT_NS = 1000000000  # the same miss is reported again after so long, if anything makes the ring look again


cdef inline void lose_ring(wring *r) noexcept nogil:
    """Take the ring's pointers away. It stands where it stood."""
    r.active = 0
    r.unmapped = not r.resting      # its partner waits for one that is to be served
    r.vq.desc = NULL
    r.vq.avail = NULL
    r.vq.used = NULL


cdef inline void tell_miss(worker *w, wdevice *dev, wring *r) noexcept nogil:
    """Report what a look-up for the ring missed, if it missed anything. The ring is then stalled. Inside a section."""
    cdef vring *vq = &r.vq
    cdef uint64_t one = 1
    cdef uint64_t now
    cdef uint32_t version
    cdef uint32_t report
    if not r.translated:
        return
    if vq.cache.hits:
        vmp_count_u64(&vq.slot.iotlb_hits, vq.cache.hits)
        vq.cache.hits = 0
    if not vq.cache.missed:
        return
    if vq.cache.missed == IOTLB_BUSY:
        vq.cache.missed = 0
        queue_ring(w, r)
        queue_ring(w, r.partner)        # which may wait for this one: see wake_stalled
        return
    r.stalled = 1
    version = iotlb_version(dev.iotlb)
    now = vmp_now_ns()
    if (
        r.reported_version == version
        and r.reported_iova == vq.cache.missed_iova
        and now - r.reported_ns < REPEAT_NS
    ):
        vq.cache.missed = 0
        return
    r.reported_ns = now
    r.reported_version = version
    r.reported_iova = vq.cache.missed_iova
    if vq.cache.missed == IOTLB_UNUSABLE:
        vmp_count_u64(&vq.slot.iotlb_unusable, 1)
        vq.cache.missed_access = 0      # nothing is asked for, but who changes the IOTLB has to know who waits for that
    else:
        vmp_count_u64(&vq.slot.iotlb_misses, 1)
    report = (vq.slot.miss & ~<uint32_t> 3) + 4 + vq.cache.missed_access
    vmp_store_relaxed_u32(&vq.slot.miss_begun, report)
    # ORDER I3 (worker): slot.miss_begun, then slot.miss_iova and slot.miss_version, then slot.miss   [release each]
    #   pairs with  I4 (the control process: the same in the opposite order)
    #   without it  the access of one miss is asked for at the address of another, and denied.
    #   shown by    tests/unit/vhostmp/test_iotlb.py::test_half_a_report_is_not_read
    vmp_store_release_u64(&vq.slot.miss_iova, vq.cache.missed_iova)
    # ORDER I3 (worker): as above
    vmp_store_release_u32(&vq.slot.miss_version, version)
    # ORDER I3 (worker): as above
    vmp_store_release_u32(&vq.slot.miss, report)
    write(dev.miss_fd, &one, sizeof(one))
    # If the entry came while this was found out, nobody may wake us any more: look again.
    if iotlb_version(dev.iotlb) != version:
        r.stalled = 0
        queue_ring(w, r)
        queue_ring(w, r.partner)
    vq.cache.missed = 0


cdef inline void find_ring(worker *w, wdevice *dev, wring *r) noexcept nogil:
    """Make sure that the ring's pointers are those of the IOTLB as it is now; without them it is not active.

    Inside a read-side section: what is found holds until its end.
    """
    cdef vring *vq = &r.vq
    cdef uint8_t *found[3]
    cdef uint32_t version
    cdef int i
    if not r.translated or vq.broken or vq.mem is NULL:
        return
    version = iotlb_version(dev.iotlb)
    if version == r.iotlb_version and version & 1 == 0:
        return
    vq.cache.size = 0
    vq.cache.missed = 0
    for i in range(3):
        found[i] = memory_span(vq.mem, &vq.cache, r.parts[i].iova, r.parts[i].access, r.parts[i].size)
        if found[i] is NULL or <uintptr_t> found[i] % r.parts[i].alignment:
            lose_ring(r)
            r.iotlb_version = NEVER
            if r.resting and not journal_half_done(vq.slot, vq.packed, True):
                vq.cache.missed = 0
                r.stalled = 1           # until somebody else has asked
                if iotlb_version(dev.iotlb) != version:
                    r.stalled = 0
                    queue_ring(w, r)
                return
            if not vq.cache.missed:
                # All of it is entered, but in pieces that do not follow each other, or askew.
                vq.cache.missed = IOTLB_UNUSABLE
                vq.cache.missed_iova = r.parts[i].iova
            tell_miss(w, dev, r)
            return
    r.iotlb_version = version
    vq.desc = <vring_desc *> found[0]
    vq.avail = <uint16_t *> found[1]
    vq.used = <uint16_t *> found[2]
    if r.resting:
        finish_resting(w, r)
        return
    if not r.attached:
        r.attached = 1
        take_up(w, r)
    if r.unmapped:
        r.unmapped = 0
        vring_disable_notify(vq)
    r.active = vq.broken == 0


cdef inline void find_rings(worker *w, wring *r) noexcept nogil:
    """find_ring for the two rings that one handler may work on."""
    vmp_store_relaxed_u32(&w.slot.doing, r.number + 1)
    find_ring(w, r.dev, r)
    if r.partner != r:
        vmp_store_relaxed_u32(&w.slot.doing, r.partner.number + 1)
        find_ring(w, r.partner.dev, r.partner)


cdef inline void tell_misses(worker *w, wring *r) noexcept nogil:
    """tell_miss for the two."""
    tell_miss(w, r.dev, r)
    if r.partner != r:
        tell_miss(w, r.partner.dev, r.partner)


cdef inline void wake_stalled(worker *w, wdevice *dev) noexcept nogil:
    """The IOTLB may have changed: queue what waits for that, and what may wait for it in turn. After a nudge.

    Nothing else ends a stall: which of two rings missed something is not known to the handler of the other one.
    """
    cdef uint32_t i
    cdef wring *r
    for i in range(dev.n_rings):
        r = &w.rings[dev.first_ring + i]
        if r.stalled:
            r.stalled = 0
            queue_ring(w, r)
            queue_ring(w, r.partner)
