"""The work queue of a worker: the data thread's loop.

Theory of operation. A *ring* is in one of four states: queued (there is or may be work), polled (nothing to do, but the
driver is not asked for kicks yet: busy polling), armed (the driver kicks when there is more), or waiting for its
back-end. An event (kick, back-end descriptor, nudge) only ever queues rings. A *work item* takes the first ring of the
queue, makes sure that the ring is set up for the published generation of its device, and runs the handler for at most
one budget. It is one read-side section: `section_pass` ends it where anybody waits for that, and what an item has
read the next one does not use; where nobody waits the next one goes on inside. Everything that a handler dereferences
was set up by the same item or by an earlier one of the same generation.

The thread runs without the GIL until it is told to stop; handlers of python back-ends take it for each batch. It blocks
only in epoll, outside any section, when no ring is queued or polled: an idle worker costs nothing, and grace periods do
not wait for it. Events are edge-triggered, so a kick on a ring that is not served costs one wake-up, not a spin.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.unistd cimport close, read, write

from vhostmp.shm._epoch cimport section_enter, section_exit, section_pass
from vhostmp.shm.atomics cimport (
    vmp_count_u64,
    vmp_load_acquire_u32,
    vmp_load_acquire_u64,
    vmp_load_relaxed_u32,
    vmp_now_ns,
    vmp_store_relaxed_u32,
    vmp_store_relaxed_u64,
    vmp_store_release_u32,
    vmp_store_release_u64,
)
from vhostmp.shm.build cimport VMP_CHECKS, VMP_COUNTERS, VMP_JOURNAL, VMP_KILL_POINTS, vmp_kill_point
from vhostmp.shm.layout cimport (
    VMP_BROKEN_MEMORY,
    VMP_DEVICES_MAX,
    VMP_DEVICES_OFFSET,
    VMP_KILL_KICK_READ,
    VMP_RINGS_MAX,
    VMP_RINGS_OFFSET,
    VMP_WORKERS_OFFSET,
    vmp_device,
    vmp_ring,
    vmp_worker,
)
from vhostmp.workers._config cimport DeviceConfig
from vhostmp.workers._iommu cimport NEVER, find_ring, find_rings, lose_ring, tell_misses, wake_stalled
from vhostmp.workers._journal cimport journal_half_done
from vhostmp.workers._pace cimport keep_pace, set_pace
from vhostmp.workers._patch cimport blame_nobody_else, blame_partner, tie, untie
from vhostmp.workers._signal cimport signal_eventfd
from vhostmp.workers._vring cimport (
    iovec,
    vring_disable_notify,
    vring_enable_notify,
    vring_has_more,
    vring_tell_log,
)
from vhostmp.workers._work cimport (
    BROKEN,
    DONE,
    EVENT_BACKEND,
    EVENT_BACKEND_DEVICE,
    EVENT_KICK,
    EVENT_NUDGE,
    MORE,
    WAIT,
    device_config,
    finish_resting,
    put_down,
    queue_ring,
    ring_config,
    take_up,
    wdevice,
    worker,
    wring,
)

import os

#: What the build does not have of what keeps it safe, and whether it has kill points (shm/build.h).
LEFT_OUT = tuple(
    name for name, there in (("journal", VMP_JOURNAL), ("checks", VMP_CHECKS), ("counters", VMP_COUNTERS)) if not there
)
HAS_KILL_POINTS = bool(VMP_KILL_POINTS)

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)
    int EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CLOEXEC
    uint32_t EPOLLIN, EPOLLOUT, EPOLLET, EPOLLHUP, EPOLLERR

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv2(int fd, const iovec *iov, int n, long offset, int flags)
    int RWF_NOWAIT

cdef enum:
    EVENTS = 64
    ITEMS_PER_LOOK = 8          # work items between two looks at epoll under load
    POLLS_PER_LOOK = 32         # empty polls between two looks at epoll
    QUEUE_MASK = VMP_RINGS_MAX - 1


cdef uint64_t ONE = 1


cdef void unpoll(worker *w, uint32_t i) noexcept nogil:
    w.polled[i].polled = 0
    w.n_polled -= 1
    w.polled[i] = w.polled[w.n_polled]


cdef void stop_broken(worker *w, wring *r) noexcept nogil:
    """Stop a ring whose driver broke the rules: count, tell the front-end by the err eventfd, have it logged."""
    r.active = 0
    if not r.vq.broken:
        r.vq.broken = VMP_BROKEN_MEMORY
    vmp_store_relaxed_u32(&r.vq.slot.broken, r.vq.broken)
    if r.partner.waits_for_output:
        r.partner.waits_for_output = 0
        queue_ring(w, r.partner)
    if r.err_fd >= 0:
        signal_eventfd(r.err_fd)
    write(w.notice_fd, &ONE, sizeof(ONE))


cdef void apply(worker *w, wdevice *dev, uint64_t generation) noexcept nogil:
    """Set the device's rings up for a generation that was published since the last work item.

    Inside a read-side section. Each ring that is served from now on is queued once unasked, so that no kick that came
    in between is lost.
    """
    cdef device_config *config = dev.configs[generation & 1]
    cdef ring_config *rc
    cdef wring *r
    cdef uint32_t i
    cdef int k
    cdef int old_call_fd
    cdef uint64_t now
    cdef bint prepared = config is not NULL and config.generation == generation
    cdef wdevice *other = dev.other_end
    dev.generation = generation
    untie(w, dev)
    # The rings of the generation before this one, another device's where the slot has changed hands, unless they are
    # somebody else's by now, who was looked at before this one.
    for i in range(dev.n_rings):
        r = &w.rings[dev.first_ring + i]
        if r.dev == dev and (not prepared or config.first_ring != dev.first_ring or i >= config.n_rings):
            put_down(r)
            r.resting = 0
            r.partner = r
    if prepared:
        dev.first_ring = config.first_ring
        dev.n_rings = config.n_rings
        dev.features = config.features
        dev.header_len = config.header_len
        dev.link = config.link
        dev.iotlb = config.space.iotlb
        dev.memory = config.memory
        dev.miss_fd = config.miss_fd
    else:
        dev.link = 0
        dev.n_rings = 0
        dev.iotlb = NULL
        dev.memory = NULL
    for i in range(dev.n_rings):
        r = &w.rings[dev.first_ring + i]
        if r.dev is not NULL and r.dev != dev:
            untie(w, r.dev)     # of a device that is gone, and was not looked at yet
        r.dev = dev
        r.number = dev.first_ring + i
        r.index = i
        r.waits_for_output = 0
        rc = &config.rings[i] if prepared and i < config.n_rings else NULL
        r.partner = r if rc is NULL else &w.rings[dev.first_ring + rc.partner]
        r.link = 0 if rc is NULL else rc.link
        r.started = rc is not NULL and rc.started
        r.resting = rc is not NULL and rc.resting
        r.vq.slot = <vmp_ring *> (w.segment + VMP_RINGS_OFFSET) + r.number
        # One that is disabled is to be whole all the same: whoever stops it is told where it stands, and another
        # back-end goes on from there. So what a death has left half done on it is finished.
        if rc is NULL or not rc.active and not (
            rc.resting and journal_half_done(r.vq.slot, config.features >> 34 & 1, False)
        ):
            put_down(r)
            continue
        # What touches guest memory from here on may be this worker's death (memory that was truncated): `doing` names
        # the ring, and the control process marks it broken, so that the replacement does not die of it too.
        vmp_store_relaxed_u32(&w.slot.doing, r.number + 1)
        old_call_fd = r.vq.call_fd
        r.handler = rc.handler
        r.backend = rc.backend
        r.kick_fd = rc.kick_fd
        r.err_fd = rc.err_fd
        r.busyloop_ns = rc.busyloop_ns
        r.vq.call_fd = rc.call_fd
        r.vq.desc = rc.desc
        r.vq.avail = <uint16_t *> rc.avail
        r.vq.used = <uint16_t *> rc.used
        r.vq.num = rc.num
        r.vq.mask = rc.num - 1
        r.vq.mem = config.mem
        r.vq.log = config.log
        r.vq.log_fd = config.log_fd
        r.vq.log_used = rc.log_used
        r.vq.log_used_gpa = rc.log_used_gpa
        r.vq.region = rc.region
        r.vq.region_entries = rc.region_entries
        r.vq.cache.size = 0
        r.vq.packed = config.features >> 34 & 1
        r.vq.device_event = 0xFFFFFFFFU         # unknown: the ring may lie elsewhere now
        r.vq.notify_on_empty = config.features >> 24 & 1
        r.vq.indirect = config.features >> 28 & 1
        r.vq.event_idx = config.features >> 29 & 1
        if vmp_load_relaxed_u32(&r.vq.slot.broken):
            r.active = 0
            r.start_id = rc.start_id
            r.vq.broken = <uint8_t> vmp_load_relaxed_u32(&r.vq.slot.broken)
            continue
        r.translated = dev.iotlb is not NULL
        r.unmapped = 0
        r.stalled = 0
        if r.translated:
            # Its work item finds out where it lies.
            if r.start_id != rc.start_id:
                r.start_id = rc.start_id
                r.attached = 0
                r.vq.broken = 0
            elif old_call_fd != rc.call_fd and rc.call_fd >= 0:
                signal_eventfd(rc.call_fd)
            for k in range(3):
                r.parts[k] = rc.parts[k]
            r.iotlb_version = NEVER
            r.reported_version = NEVER
            lose_ring(r)
            queue_ring(w, r)
            continue
        if r.resting:
            finish_resting(w, r)
            continue
        if r.start_id != rc.start_id:
            r.start_id = rc.start_id
            take_up(w, r)
        elif old_call_fd != rc.call_fd and rc.call_fd >= 0:
            signal_eventfd(rc.call_fd)      # an interrupt may have gone to the old one while it was moved
        r.active = r.vq.broken == 0
        if r.active:
            vring_disable_notify(&r.vq)
            queue_ring(w, r)
    vmp_store_relaxed_u32(&w.slot.doing, 0)
    tie(w, dev)
    if other is not NULL and other.other_end is NULL:
        tie(w, other)       # to another device of the same name that was looked at before this one was gone
    now = vmp_now_ns()
    vmp_store_relaxed_u64(&w.slot.switch_ns, now - w.last_ns)
    vmp_count_u64(&w.slot.switches, 1)


cdef inline void refresh(worker *w, wdevice *dev) noexcept nogil:
    """Inside a section: make sure that the device's rings are set up for the published generation."""
    # ORDER G2 (reader): load device.generation, then use what it stands for        [acquire]
    #   pairs with  G1 (_epoch.pyx publish: the prepared configuration, then device.generation)
    #   without it  we may read the place of the configuration as it was before it was prepared.
    #   done twice  in an item about rings of two devices (_patch.pxd), each load after R1's fence: else the barrier of
    #               the other one's verbs would be early for this item
    #               (tests/adversity/test_patched.py::test_a_barrier_counts_for_the_other_ends_items).
    #   shown by    tests/integration/test_swap.py
    cdef uint64_t generation = vmp_load_acquire_u64(&dev.slot.generation)
    if generation != dev.generation:
        apply(w, dev, generation)


cdef void wait_for_driver(worker *w, wring *r, uint64_t now) noexcept nogil:
    """The ring needs the driver: poll it for a while, else have it kick."""
    if w.moved:
        r.poll_until_ns = now + r.busyloop_ns
    if r.kick_fd < 0 or (r.busyloop_ns and now < r.poll_until_ns):     # no kick will ever come: poll for good
        if not r.polled:
            r.polled = 1
            w.polled[w.n_polled] = r
            w.n_polled += 1
    elif vring_enable_notify(&r.vq):
        vring_disable_notify(&r.vq)
        queue_ring(w, r)


cdef void run_item(worker *w, wring *r) noexcept nogil:
    """Run one work item: one virtqueue handler, inside one read-side section."""
    cdef uint64_t kicks = 0
    cdef iovec kicks_iov        # never blocks: O_NONBLOCK is the front-end's to clear, so it is not relied on
    cdef uint64_t now
    cdef int result
    kicks_iov.iov_base = &kicks
    kicks_iov.iov_len = sizeof(kicks)
    r.queued = 0
    w.moved = 0
    if r.dev is not NULL:
        refresh(w, r.dev)
        if r.partner.dev != r.dev:
            refresh(w, r.partner.dev)       # after this it is no partner of ours any more, or what that says of it
        if r.translated or r.partner.translated:
            find_rings(w, r)
    if r.active:
        vmp_store_relaxed_u32(&w.slot.doing, r.number + 1)
        if r.kicked:
            r.kicked = 0
            if r.kick_fd >= 0 and preadv2(r.kick_fd, &kicks_iov, 1, -1, RWF_NOWAIT) == sizeof(kicks):
                vmp_count_u64(&r.vq.slot.kicks, kicks)
            vmp_kill_point(r.vq.slot, VMP_KILL_KICK_READ)
            vring_disable_notify(&r.vq)     # they were asked for when the ring was armed, and are when it is again
        if r.partner.dev != r.dev:
            blame_partner(r)
            result = r.handler(r, w)
            blame_nobody_else()
        else:
            result = r.handler(r, w)
        now = vmp_now_ns()
        if r.translated or r.partner.translated:
            if r.vq.cache.missed and result == DONE:
                result = WAIT       # for the IOTLB, not for the driver
            tell_misses(w, r)
        if result == MORE:
            queue_ring(w, r)
        elif result == DONE:
            wait_for_driver(w, r, now)
        elif result == BROKEN:
            stop_broken(w, r)
        if r.partner.active and r.partner.vq.broken:
            stop_broken(w, r.partner)   # found by this handler: nothing is to work on it before its own item comes
        if r.vq.log is not NULL or r.partner.vq.log is not NULL:
            vring_tell_log(&r.vq)
            vring_tell_log(&r.partner.vq)
        if w.moved:
            set_pace(w, r)
            vmp_count_u64(&w.slot.busy_ns, now - w.last_ns)
        w.last_ns = now
    vmp_store_relaxed_u32(&w.slot.doing, 0)
    section_pass(w.slot)
    vmp_count_u64(&w.slot.items, 1)


cdef void poll_rings(worker *w) noexcept nogil:
    """Look once at each polled ring, inside one read-side section: queue it, or arm it when its time is over."""
    cdef uint64_t now
    cdef uint32_t i = 0
    cdef wring *r
    w.moved = 0
    now = vmp_now_ns()
    while i < w.n_polled:
        r = w.polled[i]
        refresh(w, r.dev)
        vmp_store_relaxed_u32(&w.slot.doing, r.number + 1)
        if r.translated:
            find_ring(w, r.dev, r)
        if r.active and not r.queued:
            if vring_has_more(&r.vq):
                queue_ring(w, r)
            elif r.kick_fd < 0 or now < r.poll_until_ns:
                i += 1
                continue
            else:
                wait_for_driver(w, r, now)
                vring_tell_log(&r.vq)
        unpoll(w, i)
    w.last_ns = now
    vmp_store_relaxed_u32(&w.slot.doing, 0)
    section_pass(w.slot)
    vmp_count_u64(&w.slot.polls, 1)


cdef void look_everywhere(worker *w) noexcept nogil:
    """A nudge came: take up what was published, on every device."""
    cdef uint64_t count
    # ORDER L1 (data thread): load n_devices, then the devices it counts              [acquire]
    #   pairs with  L1 (Loop.install: device filled in, then n_devices stored with release)
    #   without it  a device may be looked at before its slot pointer is there.
    #   shown by    tests/integration/test_swap.py
    cdef uint32_t n = vmp_load_acquire_u32(&w.n_devices)
    cdef uint32_t i
    read(w.nudge_fd, &count, sizeof(count))
    for i in range(n):
        # ORDER L1 (data thread): as above: a device below the last one may have been filled in later
        if vmp_load_acquire_u64(<const uint64_t *> &w.devices[i].slot):
            refresh(w, &w.devices[i])
            if w.devices[i].iotlb is not NULL:
                wake_stalled(w, &w.devices[i])
            section_exit(w.slot)        # waited for or not: each of many devices is a sign of life (watchdog.py)
            section_enter(w.slot)


cdef void take_event(worker *w, uint64_t data, uint32_t events) noexcept nogil:
    cdef uint32_t number = <uint32_t> data
    cdef uint32_t i
    cdef wdevice *dev
    cdef wring *r
    cdef wring *partner
    if data >> 32 == EVENT_NUDGE:
        look_everywhere(w)
    elif data >> 32 == EVENT_KICK:
        r = &w.rings[number]
        r.kicked = 1
        queue_ring(w, r)
    elif data >> 32 == EVENT_BACKEND:
        r = &w.rings[number]
        if events & (EPOLLIN | EPOLLHUP | EPOLLERR):
            queue_ring(w, r)
        partner = r.partner
        if events & EPOLLOUT and partner is not NULL and partner.waits_for_output:
            queue_ring(w, partner)
    elif data >> 32 == EVENT_BACKEND_DEVICE:
        dev = &w.devices[number]
        for i in range(dev.n_rings):
            queue_ring(w, &w.rings[dev.first_ring + i])


cdef void look(worker *w, bint block) noexcept nogil:
    """Take what epoll has; sleep until there is something where `block` says so."""
    cdef epoll_event[EVENTS] events
    cdef int n
    cdef int i
    if block:
        section_exit(w.slot)
        vmp_store_relaxed_u32(&w.slot.asleep, 1)
    n = epoll_wait(w.epoll_fd, events, EVENTS, -1 if block else 0)
    if block:
        vmp_store_relaxed_u32(&w.slot.asleep, 0)
        section_enter(w.slot)
        vmp_count_u64(&w.slot.wakeups, 1)
        w.last_ns = vmp_now_ns()
    for i in range(n):
        take_event(w, events[i].data.u64, events[i].events)


cdef void run(worker *w) noexcept nogil:
    cdef uint32_t since_look = 0
    cdef wring *r
    w.last_ns = vmp_now_ns()
    section_enter(w.slot)
    # ORDER L2 (data thread): load stop                                               [acquire]
    #   pairs with  L2 (Loop.stop: store-release, then a nudge)
    #   without it  the loop may keep the old value in a register and never end.
    #   shown by    tests/integration/test_spawner.py
    while not vmp_load_acquire_u32(&w.stop):
        if w.queue_head != w.queue_tail:
            r = w.queue[w.queue_head & QUEUE_MASK]
            w.queue_head += 1
            run_item(w, r)
            since_look += POLLS_PER_LOOK // ITEMS_PER_LOOK
        elif w.n_polled:
            section_exit(w.slot)        # nothing to do for some time: the grace periods of others need not wait for it
            since_look += keep_pace(w)
            section_enter(w.slot)
            poll_rings(w)
        else:
            look(w, True)
            since_look = 0
            continue
        if w.n_polled and w.queue_head != w.queue_tail and since_look >= POLLS_PER_LOOK:
            poll_rings(w)       # busy rings do not starve polled ones
        if since_look >= POLLS_PER_LOOK:
            look(w, False)
            since_look = 0
    section_exit(w.slot)


cdef class Loop:
    """The data thread's state and its loop. `run` is the data thread's; everything else the channel thread's."""

    cdef worker w
    cdef Py_buffer view
    cdef bint opened

    def __cinit__(self):
        self.opened = False
        self.w.epoll_fd = -1

    def __init__(self, segment, int nudge_fd, int notice_fd):
        """Serve a worker slot of the control segment's buffer: `take` says which.

        A write to the eventfd `nudge_fd` makes the loop look at the published generations. The loop writes to the
        eventfd `notice_fd` when a ring broke. Both stay the caller's.
        """
        cdef uint32_t i
        PyObject_GetBuffer(segment, &self.view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.opened = True
        self.w.segment = <uint8_t *> self.view.buf
        self.w.slot = NULL
        self.w.nudge_fd = nudge_fd
        self.w.notice_fd = notice_fd
        self.w.rings = <wring *> calloc(VMP_RINGS_MAX, sizeof(wring))
        self.w.devices = <wdevice *> calloc(VMP_DEVICES_MAX, sizeof(wdevice))
        self.w.queue = <wring **> calloc(VMP_RINGS_MAX, sizeof(wring *))
        self.w.polled = <wring **> calloc(VMP_RINGS_MAX, sizeof(wring *))
        self.w.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self.w.rings is NULL or self.w.devices is NULL or self.w.queue is NULL or self.w.polled is NULL:
            raise MemoryError
        if self.w.epoll_fd < 0:
            raise OSError(errno, os.strerror(errno))
        for i in range(<uint32_t> VMP_RINGS_MAX):
            self.w.rings[i].number = i
        self._add(nudge_fd, <uint64_t> EVENT_NUDGE << 32, EPOLLIN | EPOLLET)

    def take(self, int index):
        """Serve worker slot `index`. Before `run`."""
        self.w.slot = <vmp_worker *> (self.w.segment + VMP_WORKERS_OFFSET) + index

    def __dealloc__(self):
        if self.w.epoll_fd >= 0:
            close(self.w.epoll_fd)
        free(self.w.rings)
        free(self.w.devices)
        free(self.w.queue)
        free(self.w.polled)
        if self.opened:
            PyBuffer_Release(&self.view)

    cdef _add(self, int fd, uint64_t data, uint32_t events):
        cdef epoll_event event
        event.events = events
        event.data.u64 = data
        if epoll_ctl(self.w.epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0:
            raise OSError(errno, f"cannot watch descriptor {fd}: {os.strerror(errno)}")

    def watch_kick(self, int ring, int fd):
        """Have the eventfd `fd` queue ring number `ring`. OSError when it cannot be watched."""
        self._add(fd, <uint64_t> EVENT_KICK << 32 | <uint32_t> ring, EPOLLIN | EPOLLET)

    def watch_backend(self, int ring, int fd):
        """Have a back-end's descriptor queue `ring` when it is readable, its partner when that waits to write."""
        self._add(fd, <uint64_t> EVENT_BACKEND << 32 | <uint32_t> ring, EPOLLIN | EPOLLOUT | EPOLLET)

    def watch_device(self, int device, int fd):
        """Have a descriptor queue all rings of a device."""
        self._add(fd, <uint64_t> EVENT_BACKEND_DEVICE << 32 | <uint32_t> device, EPOLLIN | EPOLLET)

    def unwatch(self, int fd):
        """Stop watching. Closing is not enough: the control process holds the same open file."""
        cdef epoll_event event
        epoll_ctl(self.w.epoll_fd, EPOLL_CTL_DEL, fd, &event)

    def install(self, int device, DeviceConfig config not None):
        """Put a prepared configuration where the data thread finds it once its generation is published.

        There are two places, used in turn: the one that this overwrites belonged to the generation before the one in
        force, which was retired.
        """
        cdef wdevice *dev = &self.w.devices[device]
        dev.configs[config.c.generation & 1] = &config.c
        # ORDER L1 (channel thread): the configuration, then the device's slot, then n_devices           [release each]
        #   pairs with  L1 (look_everywhere: load-acquire of n_devices and of the slot)
        #   without it  a worker that looks at a device for the first time may find nothing prepared for the generation
        #               in force, and not look again before the next one.
        #   shown by    tests/integration/test_swap.py
        vmp_store_release_u64(
            <uint64_t *> &dev.slot, <uint64_t> (self.w.segment + VMP_DEVICES_OFFSET + device * sizeof(vmp_device))
        )
        if <uint32_t> device >= self.w.n_devices:
            vmp_store_release_u32(&self.w.n_devices, <uint32_t> device + 1)

    def forget(self, int device, uint64_t generation, bint older=False):
        """Take away what `install` put in place for any generation but the one in force. The grace period is over.

        The data thread looks only at the place of the generation in force, so nobody reads what is cleared here. Were
        it left, a later generation that does not concern this worker would find a freed configuration in its place.
        """
        cdef wdevice *dev = &self.w.devices[device]
        cdef int i
        for i in range(2):
            if older and dev.configs[i] is not NULL and dev.configs[i].generation < generation:
                continue
            if dev.configs[i] is not NULL and dev.configs[i].generation != generation:
                dev.configs[i] = NULL

    def run(self):
        """Serve until `stop`. The data thread's; releases the GIL."""
        with nogil:
            run(&self.w)

    def stop(self):
        """Make `run` return."""
        # ORDER L2 (channel thread): store stop                                            [release]
        #   pairs with  L2 (run: load-acquire of stop)
        #   shown by    tests/integration/test_spawner.py
        vmp_store_release_u32(&self.w.stop, 1)
        write(self.w.nudge_fd, &ONE, sizeof(ONE))
