"""The compiled ring as the data path drives it: bursts, one direction, chains put back. For tests/oracle/test_burst.py.

Built by tests/native.py. The burst has a guard behind it that must stay as it was, whatever the guest does.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uintptr_t
from libc.stdlib cimport calloc, free

from vhostmp.shm._memory cimport MemoryMap
from vhostmp.shm.layout cimport vmp_ring
from vhostmp.workers._vring cimport (
    BURST,
    burst,
    queue_region,
    vring,
    vring_attach,
    vring_desc,
    vring_drained,
    vring_fetch,
    vring_give_back,
    vring_has_more,
    vring_publish,
    vring_room,
    vring_unfetch,
    vring_wants_call,
    vring_was_stocked,
)

from vhostmp.errors import QueueBroken
from vhostmp.shm.layout import BROKEN_REASONS

cdef enum:
    GUARD = 65536
    PATTERN = 0xA5

BURST_MAX = BURST


cdef class BurstRing:
    """A ring that is fetched from in bursts."""

    cdef vring vq
    cdef vmp_ring own_slot
    cdef vmp_ring *slot
    cdef Py_buffer shared
    cdef Py_buffer shared_region
    cdef burst *b
    cdef burst out
    cdef uint8_t *guard
    cdef MemoryMap memory

    def __cinit__(self):
        self.b = <burst *> calloc(1, sizeof(burst) + GUARD)
        if self.b is NULL:
            raise MemoryError
        self.guard = <uint8_t *> self.b + sizeof(burst)
        for i in range(GUARD):
            self.guard[i] = PATTERN

    def __dealloc__(self):
        free(self.b)
        if self.shared.buf is not NULL:
            PyBuffer_Release(&self.shared)
        if self.shared_region.buf is not NULL:
            PyBuffer_Release(&self.shared_region)

    def __init__(
        self,
        MemoryMap mem,
        int num,
        desc_gpa,
        avail_gpa,
        used_gpa,
        *,
        features=0,
        last_avail_idx=0,
        slot=None,
        resume=False,
        region=None,
    ):
        """Serve a ring. `slot` is a buffer for its slot; with `resume` as the replacement of whoever used that.

        `region` is a buffer for what is in flight in a packed ring, with an entry for each descriptor.
        """
        cdef bint packed = features >> 34 & 1
        self.memory = mem
        self.slot = &self.own_slot
        if slot is not None:
            PyObject_GetBuffer(slot, &self.shared, PyBUF_SIMPLE | PyBUF_WRITABLE)
            self.slot = <vmp_ring *> self.shared.buf
        if region is not None:
            PyObject_GetBuffer(region, &self.shared_region, PyBUF_SIMPLE | PyBUF_WRITABLE)
            self.vq.region = <queue_region *> self.shared_region.buf
            self.vq.region_entries = num
        self.vq.desc = <vring_desc *> <uintptr_t> <object> mem.translate(desc_gpa, 16 * num)
        self.vq.avail = <uint16_t *> <uintptr_t> <object> mem.translate(avail_gpa, 4 if packed else 6 + 2 * num)
        self.vq.used = <uint16_t *> <uintptr_t> <object> mem.translate(used_gpa, 4 if packed else 6 + 8 * num)
        self.vq.num = num
        self.vq.mask = num - 1
        self.vq.mem = &mem.mem
        self.vq.slot = self.slot
        self.vq.packed = packed
        self.vq.call_fd = -1
        self.vq.indirect = features >> 28 & 1
        self.vq.event_idx = features >> 29 & 1
        if not resume:
            self.slot.last_avail_idx = last_avail_idx
            self.slot.used_idx = last_avail_idx
        vring_attach(&self.vq)

    def attach(self):
        """Take the ring up where its slot says that it stands, once more."""
        vring_attach(&self.vq)

    def fetch(self, uint32_t most, int direction):
        """Take up to `most` chains of a direction: (head, readable, writable) each, with (gpa, bytes) segments."""
        cdef int n = vring_fetch(&self.vq, self.b, most, direction)
        cdef int i
        for i in range(GUARD):
            if self.guard[i] != PATTERN:
                raise AssertionError(f"written {i} bytes behind the burst")
        if n < 0:
            raise QueueBroken(self.broken)
        taken = []
        for i in range(n):
            c = self.b.chains[i]
            segments = [self._gpa(c.first + k) for k in range(c.n_readable + c.n_writable)]
            readable, writable = segments[: c.n_readable], segments[c.n_readable:]
            if c.readable != sum(size for _, size in readable) or c.writable != sum(size for _, size in writable):
                raise AssertionError(f"chain {i} counts {c.readable} and {c.writable} bytes, has {readable} {writable}")
            if self.b.used[i].len != 0:
                raise AssertionError(f"chain {i} is {self.b.used[i].len} bytes long before anything was written")
            taken.append((self.b.used[i].id, readable, writable))
        return taken

    def _gpa(self, uint32_t i):
        cdef uintptr_t hva = <uintptr_t> self.b.segments[i].iov_base
        for k in range(self.memory.mem.n):
            offset = hva - <uintptr_t> self.memory.mem.regions[k].hva
            if 0 <= offset and offset + self.b.segments[i].iov_len <= self.memory.mem.regions[k].size:
                return (self.memory.mem.regions[k].gpa + offset, self.b.segments[i].iov_len)
        raise AssertionError(f"segment {i} is not in guest memory")

    def unfetch(self, uint32_t n):
        """Put the last `n` chains back."""
        vring_unfetch(&self.vq, self.b, n)

    def sizes(self):
        """How many descriptors of a packed ring each chain of the last burst took."""
        return [self.b.chains[i].n_descriptors for i in range(self.b.n)]

    def give_back(self, elements, sizes=()):
        """Give back (head, length) elements, at most a burst of them; of a packed ring `sizes` as it was told."""
        cdef uint32_t n = 0
        for head, length in elements:
            self.out.used[n].id = head
            self.out.used[n].len = length
            if self.vq.packed:
                self.out.chains[n].n_descriptors = sizes[n]
            n += 1
        vring_give_back(&self.vq, &self.out, 0, n)

    def publish(self):
        """Show the driver; whether it wants an interrupt."""
        vring_publish(&self.vq)
        return bool(vring_wants_call(&self.vq))

    def drained(self):
        """Whether the last fetch took all that there was."""
        return bool(vring_drained(&self.vq))

    def room(self):
        """How many chains there are to take, at least."""
        return vring_room(&self.vq)

    def has_more(self):
        """Whether there is more than was seen."""
        return bool(vring_has_more(&self.vq))

    def stocked(self):
        """Whether there ever was anything."""
        return bool(vring_was_stocked(&self.vq))

    @property
    def last_avail_idx(self):
        return self.vq.last_avail_idx

    @property
    def used_idx(self):
        return self.vq.used_idx

    @property
    def broken(self):
        return BROKEN_REASONS[self.vq.broken] or None
