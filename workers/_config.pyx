"""Configurations and back-ends, prepared by the channel thread for the data thread.

Both are immutable once the configuration is published, and freed by Python's reference counts when the channel thread
drops them: a grace period after a later configuration was published. The data thread holds no references.
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from vhostmp.shm._filemap cimport FileMap
from vhostmp.shm._iotlb cimport ACCESS_BOTH, ACCESS_READ, IotlbTable
from vhostmp.shm._log cimport LogMap
from vhostmp.shm._memory cimport MemoryMap
from vhostmp.workers._vring cimport queue_region, vring_desc
from vhostmp.workers._work cimport device_config, ring_config, ring_part

import errno

from vhostmp.errors import LocalError


cdef class Backend:
    """A back-end as one worker has it. Each class of device has its own: what handlers its rings get is decided here.

    Base of `workers/backends/_pairs.pyx` (network) and `workers/backends/_requests.pyx` (requests served in Python).
    """

    cdef int configure(self, device_config *c) except -1:
        """Set what the handlers find in the device's configuration."""
        return 0

    cdef int partner(self, int index):
        """Return the ring that the handler of ring `index` works on too; itself if there is none."""
        return index

    cdef int serve(self, ring_config *rc, int index, bint enabled) except -1:
        """Set handler, back-end and `active` of a ring that is started."""
        raise NotImplementedError

    cdef bint drains(self, int index):
        """Whether a swap away from this back-end leaves it ring `index` until its queue is empty."""
        return False

    def add(self, int group, int fd):
        """Get ready to serve a group of rings that is new to this worker. `fd`: its descriptor, the caller's; -1: none.

        Lists (ring, descriptor): what becomes readable queues that ring, what becomes writable its partner.
        """
        return []

    def drop(self, int group):
        """Forget a group that `add` was called for, a grace period after the last configuration that needs it.

        Lists, oldest first, packets that were taken from somewhere for the group and not delivered.
        """
        return []

    def put_back(self, int group, packets):
        """Deliver first what `drop` listed in another worker. Right after `add`."""

    def fileno(self):
        """Return the descriptor by which the Python object has the device's rings queued; -1: none."""
        fileno = getattr(self.instance, "fileno", None)
        return -1 if fileno is None else int(fileno())

    def close(self):
        """Tell the Python object that it has been replaced. Its errors are the caller's to log."""
        close = getattr(self.instance, "close", None)
        if close is not None:
            close()


cdef class DeviceConfig:
    """One generation of one device, for one worker."""

    def __cinit__(self):
        self.c.rings = NULL

    def __init__(
        self,
        uint64_t generation,
        int first_ring,
        int n_rings,
        uint64_t features,
        MemoryMap memory,
        Backend backend,
        rings,
        LogMap dirty_log=None,
        int log_fd=-1,
        Backend draining=None,
        IotlbTable iotlb=None,
        int miss_fd=-1,
        FileMap inflight=None,
    ):
        """Prepare generation `generation` of a device with `n_rings` rings, in slots from `first_ring` on.

        `rings` are those that this worker serves: mappings with index, num, desc, avail, used (front-end addresses),
        log (the used ring's guest-physical address or None), enabled, held (everything is made ready, but the ring is
        not served), start_id, busyloop_us, and kick, call, err (descriptors or -1). With a `dirty_log` every write is
        logged, and the eventfd `log_fd` (-1: none) signalled. `draining` is a back-end that rings are left to until its
        queues are empty. With an `iotlb` all addresses are I/O virtual, and the eventfd `miss_fd` is signalled when one
        is missing; where a ring lies is then looked up by whoever serves it. Without, LocalError is raised when a
        ring's addresses are not in guest memory. `inflight` is the region of what packed rings have in flight; a
        ring's `region` is where its part begins there and how many entries that has, or None.
        """
        cdef ring_config *rc
        cdef ring_part *part
        cdef Backend behind
        self.c.rings = <ring_config *> calloc(max(1, n_rings), sizeof(ring_config))
        if self.c.rings is NULL:
            raise MemoryError
        self.c.generation = generation
        self.c.features = features
        self.c.first_ring = first_ring
        self.c.n_rings = n_rings
        self.memory = memory
        self.backend = backend
        self.dirty_log = dirty_log
        self.draining = draining
        self.inflight = inflight
        self.c.memory = <void *> memory if memory is not None else NULL
        self.c.log = &dirty_log.log if dirty_log is not None else NULL
        self.c.log_fd = log_fd
        self.iotlb = iotlb
        self.c.mem = NULL
        self.c.miss_fd = miss_fd
        if memory is not None:
            self.c.space = memory.mem
            self.c.mem = &self.c.space
        self.c.space.iotlb = iotlb.table if iotlb is not None else NULL
        for index in range(n_rings):
            self.c.rings[index].partner = <uint32_t> (index if backend is None else backend.partner(index))
        if backend is not None:
            self.c.link = backend.link
            backend.configure(&self.c)
        event = 2 if features >> 29 & 1 else 0
        packed = features >> 34 & 1
        for ring in rings:
            index, num = ring["index"], ring["num"]
            rc = &self.c.rings[index]
            addresses = []
            for place, (name, size, alignment) in enumerate((
                ("desc", 16 * num, 16),
                ("avail", 4 if packed else 4 + 2 * num + event, 4 if packed else 2),
                ("used", 4 if packed else 4 + 8 * num + event, 4),
            )):
                if iotlb is not None:
                    part = &rc.parts[<int> place]
                    part.iova, part.size, part.alignment = ring[name], size, alignment
                    part.access = ACCESS_BOTH if name == "used" or (packed and name == "desc") else ACCESS_READ
                    addresses.append(0)
                    continue
                address = memory.translate_uva(ring[name], size)
                if address is None or address % alignment:
                    raise LocalError(
                        f"ring {index}: {name} at {ring[name]:#x}, {size} bytes, is not in guest memory", errno.EFAULT
                    )
                addresses.append(address)
            rc.desc = <vring_desc *> <uintptr_t> addresses[0]
            rc.avail = <void *> <uintptr_t> addresses[1]
            rc.used = <void *> <uintptr_t> addresses[2]
            rc.log_used = ring["log"] is not None
            rc.log_used_gpa = ring["log"] or 0
            rc.num = num
            rc.start_id = ring["start_id"]
            if inflight is not None and packed and ring["region"] is not None:
                start, entries = ring["region"]
                rc.region = <queue_region *> (inflight.at + <uint64_t> start)
                rc.region_entries = entries
            rc.busyloop_ns = <uint64_t> ring["busyloop_us"] * 1000
            rc.kick_fd = ring["kick"]
            rc.call_fd = ring["call"]
            rc.err_fd = ring["err"]
            behind = draining if draining is not None and draining.drains(index) else backend
            behind.serve(rc, index, ring["enabled"])
            rc.link = behind.link
            rc.started = True
            if ring["held"]:
                rc.active = False       # and somebody else may be about to give its last batch back
            else:
                rc.resting = not rc.active

    def __dealloc__(self):
        free(self.c.rings)
