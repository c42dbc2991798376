"""A patch: two network devices of which each receives what the other one sends. How their rings find each other.

A ring of a patched device has its partner in the other device: what transmit ring i of the one has goes into receive
ring i of the other. Everything else of the two stays apart: each has its own generation, memory table, features, log,
IOTLB, eventfds and journal, each is changed by verbs of its own, and neither's verbs know of the other one.

*The link.* A configuration names the patch that its device is an end of by a number, which this worker gives it for
the names of both devices (vhostmp/patches.py) and which is the same in both. Rings find each other in the worker: those
of two devices, with the same link, of the same pair, are partners while this worker serves both. Who is not served here
(not started, another back-end, another worker, no front-end) has no ring with that link here, and the ring that is left
is its own partner: its packets wait. So no order of verbs on the two devices has to be kept, and none can be got wrong.

*Two generations in one work item.* Its handler works on rings of both devices, so an item begins by loading both
published generations and taking up what is new (`run_item`, G2). Both loads come after the section was entered (R1).
Let B's verb publish a generation and then wait for sections (R2). An item that entered its section before that is
waited for, whichever device's ring it is about, since its worker is one that serves B: it would not have B's rings
otherwise, and a flush waits for every worker that serves a ring in the old state or in the new one. An item that enters
later loads B's new generation before it looks at any ring of B's, and does what that says: other memory, rings that
are stopped or somebody else's, a device that is gone. So B's barrier is as early for A's items as it is for B's own,
and never earlier. What an item would remember of B from an earlier one is B's rings, which belong to the worker and
are never freed; all that they point to is set, or cleared, with the generation.

*One consumer.* A worker touches a ring of B's, in whichever item, only if B's generation as loaded in that item says
that it serves the ring: a ring that it does not serve is nobody's partner there. So the argument for moves between
workers (vhostmp/steps.py) holds for B's ring as it stands there, with no word about A. When the ends are moved one
after the other they are apart for that time, and packets wait.

*Who queues whom.* Whenever either end changes, all rings of both are queued: whoever waits looks again. While both are
there a transmit ring that finds too few buffers queues the receive ring, which waits for its driver and queues back
(`waits_for_output`), as in any pair.

*Deaths.* Both ends die with their worker, and what was under way between them is as in a loopback: the receive ring
shows a burst before the transmit ring gives it back, so packets may be sent twice and none is lost. Their replacement
is given one device after the other, in no order. Whether anything came of what A's ring had begun it asks of B's slot
(`came_of`, _journal.pyx), whether B is there yet or not. One thing the slot does not say: whether a burst that was
about to be shown was shown. Then it counts as repeated, though it may be sent for the first time.

*Whose fault.* A worker that dies because memory is gone (truncated by a front-end) says in `slot.doing` whose ring is
to be broken. In an item of A's that is B's where the address is of B's memory, log or region: `blame_partner`.
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from vhostmp.shm._life cimport life_beside
from vhostmp.shm.atomics cimport vmp_load_acquire_u32, vmp_load_acquire_u64
from vhostmp.workers._vring cimport desc_state, queue_region, vring
from vhostmp.workers._work cimport queue_ring, wdevice, worker, wring


cdef inline void queue_all(worker *w, wdevice *dev) noexcept nogil:
    """Queue the rings of a device that are served."""
    cdef uint32_t i
    for i in range(dev.n_rings):
        if w.rings[dev.first_ring + i].active:
            queue_ring(w, &w.rings[dev.first_ring + i])


cdef inline void tie_rings(worker *w, wdevice *dev, wdevice *other) noexcept nogil:
    """Make partners of the rings of two devices that belong together."""
    cdef uint32_t i
    cdef wring *mine
    cdef wring *its
    for i in range(dev.n_rings):
        if i ^ 1 < other.n_rings:
            mine = &w.rings[dev.first_ring + i]
            its = &w.rings[other.first_ring + (i ^ 1)]
            if mine.link and mine.link == its.link:
                mine.partner = its
                its.partner = mine


cdef inline void untie(worker *w, wdevice *dev) noexcept nogil:
    """Let the rings of a device and those of its other end be their own partners. No-op when there is none."""
    cdef wdevice *other = dev.other_end
    cdef uint32_t i
    cdef wring *mine
    if other is NULL:
        return
    dev.other_end = NULL
    other.other_end = NULL
    for i in range(dev.n_rings):
        mine = &w.rings[dev.first_ring + i]
        if mine.dev == dev and mine.partner.dev != dev:
            mine.partner.partner = mine.partner
            mine.partner.waits_for_output = 0
            mine.partner = mine
            mine.waits_for_output = 0
    queue_all(w, other)


cdef inline void tie(worker *w, wdevice *dev) noexcept nogil:
    """Find the other end of a device's patch among those that are served here, if it is one. Inside a section."""
    cdef wdevice *other
    # ORDER L1 (data thread): load n_devices, then the devices it counts              [acquire]
    #   pairs with  L1 (Loop.install)
    #   not needed  in truth: what is looked at here the data thread alone has written.
    cdef uint32_t n = vmp_load_acquire_u32(&w.n_devices)
    cdef uint32_t i
    if not dev.link:
        return
    for i in range(n):
        other = &w.devices[i]
        # ORDER G2 (reader): load device.generation, then use what it stands for        [acquire]
        #   pairs with  G1 (_epoch.pyx publish: the prepared configuration, then device.generation)
        #   without it  a work item may use what was retired: it looks at the published generation of its ring's device
        #               and of the other end, and not at that of a third, which is tied to while it does so. Whoever is
        #               not up to date ties itself once it is.
        #   shown by    tests/integration/test_slots.py::test_third_device
        if (
            other.link == dev.link
            and other != dev
            and vmp_load_acquire_u64(&other.slot.generation) == other.generation
        ):
            untie(w, other)     # from a device of the same name that is gone, which this worker has not looked at yet
            dev.other_end = other
            other.other_end = dev
            tie_rings(w, dev, other)
            queue_all(w, other)
            return


cdef inline bint lies_in(const void *address, const void *start, uint64_t size) noexcept nogil:
    return <uintptr_t> address - <uintptr_t> start < size


cdef inline bint ring_owns(const void *ring, const void *address) noexcept nogil:
    """Whether an address is in memory that a ring's front-end gave us. For a signal handler: it reads, no more."""
    cdef const vring *vq = <const vring *> ring
    cdef uint32_t i
    if vq.mem is not NULL:
        for i in range(vq.mem.n):
            if lies_in(address, vq.mem.regions[i].hva, vq.mem.regions[i].size):
                return True
    if vq.log is not NULL and lies_in(address, vq.log.bits, vq.log.pages // 8):
        return True
    return vq.region is not NULL and lies_in(
        address, vq.region, sizeof(queue_region) + vq.region_entries * sizeof(desc_state)
    )


cdef inline void blame_partner(wring *r) noexcept nogil:
    """Before the handler of a ring whose partner is another device's: have that one broken if its memory is gone."""
    life_beside(ring_owns, &r.partner.vq, r.partner.number + 1)


cdef inline void blame_nobody_else() noexcept nogil:
    """After it."""
    life_beside(NULL, NULL, 0)
