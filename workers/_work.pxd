"""What a worker's data thread works on: its rings, its devices, and the interface of a back-end's handlers.

All of it is private to the worker process. Only the data thread writes it, save where a field says otherwise. The
arrays are allocated once and never moved or freed while the process lives, so a stale ring number in an event is
harmless.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.unistd cimport write

from vhostmp.shm._iotlb cimport vmp_iotlb
from vhostmp.shm._log cimport vmp_log
from vhostmp.shm._memory cimport vmp_memory
from vhostmp.shm.atomics cimport vmp_count_u64, vmp_load_relaxed_u32, vmp_store_relaxed_u64
from vhostmp.shm.layout cimport VMP_RINGS_MAX, VMP_RINGS_OFFSET, vmp_device, vmp_ring, vmp_worker
from vhostmp.workers._journal cimport EFFECT_PACKED
from vhostmp.workers._signal cimport signal_eventfd
from vhostmp.workers._vring cimport (
    burst,
    chain,
    iovec,
    queue_region,
    vring,
    vring_attach,
    vring_desc,
    vring_tell_log,
)


cdef enum:
    # What one run of a handler leaves behind.
    DONE = 0            # nothing more until the driver makes more available: the loop polls or arms notifications
    MORE = 1            # the budget is used up: queue it again
    WAIT = 2            # waits for something else, and the handler has seen to it that something will queue the ring
    BROKEN = 3          # the driver broke the ring; one that broke its partner's shows by that one's vq.broken

    # The budget of one work item, as the kernel's: then others get their turn (CVE-2019-3900).
    BUDGET_PACKETS = 256
    BUDGET_BYTES = 524288

    ETHERNET_HEADER = 14
    FRAME_MAX = 65562   # 65,535 of IP payload and header, Ethernet header, VLAN tags; what a tap carries at the most
    NET_HEADER_MAX = 12
    SCRATCH_SIZE = 66560

    # What an epoll event is about: the upper half of its data. The lower half is a ring or device number.
    EVENT_KICK = 0
    EVENT_BACKEND = 1           # the back-end's descriptor of one ring and its partner; number of the one that reads
    EVENT_BACKEND_DEVICE = 2    # a descriptor that serves a whole device; device number
    EVENT_NUDGE = 3


ctypedef int (*handler_t)(wring *r, worker *w) noexcept nogil


cdef struct ring_part:
    uint64_t iova
    uint64_t size
    uint64_t access             # ACCESS_ bits that it needs
    uint64_t alignment


cdef struct wring:
    vring vq
    handler_t handler           # runs one work item; NULL while there is nothing to do for the ring
    void *backend               # the back-end's state for this queue pair
    wring *partner              # the ring that its handler works on too: the other one of a pair; none: itself
    uint64_t link               # the patch that it is an end of: its partner is then of another device (_patch.pxd)
    wdevice *dev
    uint64_t start_id           # which start of the ring is attached; the configuration's differs after a restart
    uint64_t busyloop_ns        # how long to poll before asking for kicks
    uint64_t poll_until_ns
    uint32_t number             # slot in the control segment, and index in worker.rings
    uint32_t index              # queue index in the device
    int kick_fd
    int err_fd
    uint8_t active              # served by this worker: started, not broken, and enabled where that matters
    uint8_t started             # started, whether served or not
    uint8_t resting             # this worker's, started, and not served while it is disabled
    uint8_t queued              # in the run queue
    uint8_t polled              # in the poll set
    uint8_t kicked              # a kick came that was not read yet
    uint64_t left_start         # start_id when chains were put back by who serves requests; 0: none were since
    uint32_t left_at            # where the first of them stood
    uint8_t waits_for_output    # has chains that its back-end could not take yet, a transmit ring say
    # Behind an IOMMU only (_iommu.pxd).
    ring_part parts[3]          # where the ring lies: descriptors, driver's part, device's part
    uint32_t iotlb_version      # of the IOTLB when they were last looked up; odd: never
    uint32_t reported_version   # of the IOTLB when a miss was last reported, which was at
    uint64_t reported_iova
    uint64_t reported_ns
    uint8_t translated          # its addresses are I/O virtual; `active` says whether its parts are mapped
    uint8_t unmapped            # it would be active were its parts mapped
    uint8_t attached            # it was taken up since it was started
    uint8_t stalled             # something was missed: it waits for the IOTLB to change


cdef struct ring_config:
    # One ring as a configuration has it. Immutable once the configuration is published.
    handler_t handler
    void *backend
    vring_desc *desc
    void *avail
    void *used
    uint64_t start_id
    uint64_t link               # the patch that it is an end of; 0: none
    uint64_t busyloop_ns
    uint64_t log_used_gpa
    uint32_t num
    uint32_t partner            # queue index; set for every ring of the device
    int kick_fd
    int call_fd
    int err_fd
    uint8_t active
    uint8_t resting             # not active because it is disabled: nobody else's, so what a death left is finished
    uint8_t log_used            # writes to the used ring are logged, at log_used_gpa
    uint8_t started
    ring_part parts[3]          # behind an IOMMU, where the pointers above are NULL
    queue_region *region        # NULL: its front-end does not keep what is in flight
    uint16_t region_entries


cdef struct device_config:
    uint64_t generation
    uint64_t features
    const vmp_memory *mem       # NULL, or `space`
    vmp_memory space            # the memory table with the device's IOTLB, if it has one
    int miss_fd                 # eventfd: something was missed; -1 without an IOTLB
    void *memory                # the MemoryMap that holds it, a borrowed reference; NULL without memory
    uint32_t header_len         # of a network device's virtio_net_hdr, bytes: 10 or 12; else 0
    uint64_t link               # the patch that the device is an end of; 0: none
    const vmp_log *log          # NULL: nothing is logged
    int log_fd                  # eventfd, -1: none
    uint32_t first_ring
    uint32_t n_rings
    ring_config *rings


cdef struct wdevice:
    vmp_device *slot
    device_config *configs[2]   # by the lowest bit of the generation. Written by the channel thread, before publication
    uint64_t generation         # the one that the rings below are set up for
    uint64_t features
    uint32_t header_len
    uint32_t first_ring
    uint32_t n_rings
    uint64_t link               # that of its rings which have one
    wdevice *other_end          # the device at the other end of that patch, while both are served here; else NULL
    const vmp_iotlb *iotlb      # NULL: addresses are guest-physical
    void *memory                # the MemoryMap in force, a borrowed reference
    int miss_fd


cdef struct worker:
    vmp_worker *slot
    uint8_t *segment            # the control segment
    wring *rings                # RINGS_MAX
    wdevice *devices            # DEVICES_MAX
    wring **queue               # FIFO of rings with work; RINGS_MAX, so that it never overflows
    uint32_t queue_head
    uint32_t queue_tail
    wring **polled              # rings that are looked at instead of waiting for their kick
    uint32_t n_polled
    uint32_t n_devices          # highest device number in use + 1. Written by the channel thread
    uint32_t stop               # set by the channel thread, then a nudge
    uint64_t last_ns            # when the last work item ended, or the last sleep
    uint32_t moved              # packets that the running item moved
    uint64_t pace_ns            # after it: how long to leave the drivers alone before rings are polled again
    int epoll_fd
    int nudge_fd
    int notice_fd               # eventfd: the data thread tells the channel thread to look at the rings' state
    burst tx
    burst rx


cdef inline void queue_ring(worker *w, wring *r) noexcept nogil:
    """Queue a ring for a work item, once."""
    if r.queued:
        return
    r.queued = 1
    w.queue[w.queue_tail & (VMP_RINGS_MAX - 1)] = r
    w.queue_tail += 1


cdef inline void take_up(worker *w, wring *r) noexcept nogil:
    """Take a ring up where it stands, and tell whoever has to know of that. Inside a section, ring pointers set."""
    cdef uint64_t one = 1
    cdef uint32_t effect = vmp_load_relaxed_u32(&r.vq.slot.effect_ring)
    r.vq.peer = NULL
    if effect & ~<uint32_t> EFFECT_PACKED < VMP_RINGS_MAX:
        r.vq.peer = <vmp_ring *> (w.segment + VMP_RINGS_OFFSET) + (effect & ~<uint32_t> EFFECT_PACKED)
    if vring_attach(&r.vq) and r.vq.call_fd >= 0:
        signal_eventfd(r.vq.call_fd)        # whoever served it may have died before the interrupt
    if r.vq.slot.region_fault:
        write(w.notice_fd, &one, sizeof(one))


cdef inline void put_down(wring *r) noexcept nogil:
    """Touch the ring no more: it is not ours, or not running."""
    r.active = 0
    r.start_id = 0
    r.left_start = 0
    r.translated = 0
    r.unmapped = 0
    r.stalled = 0
    r.handler = NULL
    r.backend = NULL
    r.vq.desc = NULL
    r.vq.avail = NULL
    r.vq.used = NULL
    r.vq.mem = NULL
    r.vq.log = NULL
    r.vq.region = NULL
    r.vq.cache.size = 0


cdef inline void finish_resting(worker *w, wring *r) noexcept nogil:
    """Finish what a death left half done on a ring that is not served. Inside a section, ring pointers set."""
    take_up(w, r)
    if r.vq.log is not NULL:
        vring_tell_log(&r.vq)
    put_down(r)


cdef inline void count_drop(wring *r, int reason, uint64_t n) noexcept nogil:
    """Count packets that did not get through."""
    vmp_count_u64(&r.vq.slot.drops[reason], n)


cdef inline void count_packets(worker *w, wring *r, uint32_t packets, uint64_t bytes_) noexcept nogil:
    """Count packets that did, and their bytes without the virtio header."""
    vmp_count_u64(&r.vq.slot.packets, packets)
    vmp_count_u64(&r.vq.slot.bytes, bytes_)
    w.moved += packets


cdef inline void count_copied(wring *r, uint64_t bytes_) noexcept nogil:
    """Count bytes of frames that were copied in user space: what the kernel copies to and from guest memory is not."""
    vmp_count_u64(&r.vq.slot.copied, bytes_)


cdef inline void note_source(wring *r, const uint8_t *frame) noexcept nogil:
    """Remember the Ethernet source address of a frame that the guest sent, for the announcement after a swap."""
    cdef uint64_t mac = 0
    memcpy(&mac, frame + 6, 6)
    vmp_store_relaxed_u64(&r.vq.slot.source_mac, mac)
