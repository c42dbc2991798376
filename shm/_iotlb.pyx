"""The IOTLB of one device: a sorted table in shared memory, one writer, any number of readers.

What it is for: with ACCESS_PLATFORM a guest's addresses are I/O virtual. The front-end, which knows the guest's IOMMU,
tells us piece by piece what they stand for (vhost-user, "IOMMU support"). A guest may map and unmap each buffer, so an
entry has to come and go in microseconds: the table is no part of a configuration but is written in place.

Theory of operation. The table is a sequence lock: the writer makes `seq` odd, writes, makes it even again; who reads
and sees another number afterwards than before looks again. Readers never write. A reader is a worker inside a read-side
section; what it has found it may use until the section ends. So the writer removes an entry and then waits a grace
period (_epoch.synchronize): after it nobody uses what the entry named, which is what the front-end waits for.

Rules: entries do not overlap: a new one replaces whatever it overlaps, whole. There is a bound; beyond it the oldest
entry is forgotten, which costs whoever needs it a question to the front-end.
"""

from cpython.buffer cimport Py_buffer, PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport strerror

import os

from vhostmp.shm.atomics cimport (
    vmp_cpu_relax,
    vmp_load_acquire_u32,
    vmp_load_acquire_u64,
    vmp_load_relaxed_u32,
    vmp_store_relaxed_u32,
    vmp_store_release_u32,
    vmp_store_release_u64,
)

from vhostmp.shm.layout cimport vmp_ring

from vhostmp.errors import LocalError, SysError

cdef extern from "sys/mman.h" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int PROT_READ, PROT_WRITE, MAP_SHARED
    void *MAP_FAILED

cdef enum:
    TRIES = 64              # of a look-up while the table changes; a writer is done in a few microseconds

IOTLB_SIZE = (sizeof(vmp_iotlb) + 4095) // 4096 * 4096
ENTRIES_MAX = IOTLB_ENTRIES_MAX
READ = ACCESS_READ
WRITE = ACCESS_WRITE


cdef uint32_t iotlb_version(const vmp_iotlb *table) noexcept nogil:
    """The number of the table's content. As long as it stays the same, so does what was found; odd: it is changing."""
    # ORDER I2 (reader): as in iotlb_find
    return vmp_load_acquire_u32(&table.seq)


cdef int iotlb_find(const vmp_iotlb *table, uint64_t iova, uint64_t access, vmp_iotlb_entry *found) noexcept nogil:
    """Find the entry that holds `iova` and allows `access`. IOTLB_HIT, IOTLB_MISS or IOTLB_BUSY.

    `found` is written to in any case, and means something after a hit only.
    """
    cdef uint32_t seq
    cdef uint32_t low, high, middle
    cdef int _i
    cdef int result
    for _i in range(TRIES):
        # ORDER I2 (reader): load seq, then the entries, then seq again                      [acquire each but the last]
        #   pairs with  I1 (the writer: seq odd, then the entries, then seq even)
        #   without it  parts of two entries may be taken for one: an address that nobody has named.
        #   shown by    tests/unit/shm/test_iotlb.py::test_no_entry_is_torn
        seq = vmp_load_acquire_u32(&table.seq)
        if seq & 1:
            vmp_cpu_relax()
            continue
        low = 0
        # ORDER I2 (reader): as above
        high = vmp_load_acquire_u32(&table.n)
        if high > IOTLB_ENTRIES_MAX:
            high = IOTLB_ENTRIES_MAX
        result = IOTLB_MISS
        while low < high:
            middle = (low + high) // 2
            # ORDER I2 (reader): as above, so that none of these loads comes after the second one of seq
            found.iova = vmp_load_acquire_u64(&table.entries[middle].iova)
            if iova < found.iova:
                high = middle
                continue
            found.last = vmp_load_acquire_u64(&table.entries[middle].last)
            if iova > found.last:
                low = middle + 1
                continue
            found.uva = vmp_load_acquire_u64(&table.entries[middle].uva)
            found.access = vmp_load_acquire_u64(&table.entries[middle].access)
            result = IOTLB_HIT if found.access & access == access else IOTLB_MISS
            break
        if vmp_load_relaxed_u32(&table.seq) == seq:
            return result
    return IOTLB_BUSY


def read_miss(buf, size_t offset):
    """Return (report, iova, version) of the last miss in the ring's slot at `offset` of a control segment.

    What a worker is about to report, or has not reported to its end, is None: it signals when it has. ValueError when
    there is no slot there.
    """
    cdef Py_buffer view
    cdef const vmp_ring *slot
    cdef uint32_t report, version, begun
    cdef uint64_t iova
    PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE)
    cdef size_t size = view.len
    if size < sizeof(vmp_ring) or offset > size - sizeof(vmp_ring):
        PyBuffer_Release(&view)
        raise ValueError(f"there is no ring's slot at {offset} of {size} bytes")
    slot = <const vmp_ring *> (<const char *> view.buf + offset)
    # ORDER I4 (control process): miss, then miss_iova and miss_version, then miss_begun   [acquire each but the last]
    #   pairs with  I3 (the worker: the same in the opposite order)
    #   without it  as there
    #   shown by    tests/unit/vhostmp/test_iotlb.py::test_half_a_report_is_not_read
    report = vmp_load_acquire_u32(&slot.miss)
    # ORDER I4 (control process): as above
    iova = vmp_load_acquire_u64(&slot.miss_iova)
    # ORDER I4 (control process): as above
    version = vmp_load_acquire_u32(&slot.miss_version)
    begun = vmp_load_relaxed_u32(&slot.miss_begun)
    PyBuffer_Release(&view)
    return (report, iova, version) if begun == report else None


cdef class IotlbTable:
    """The table, mapped: by the control process, which makes and writes it, or by a worker, whose data thread reads it.

    One thread at a time writes: the caller's to see to.
    """

    def __cinit__(self):
        self.table = NULL
        self.fd = -1
        self.age = 0
        self.evicted = 0

    def __init__(self, int fd=-1, bint own=False):
        """Make an empty table; with the descriptor of one map it, to read. The descriptor stays the caller's then.

        With `own` the one is taken over, to be written: whoever wrote it has died. What he was in the middle of writing
        is forgotten, all of it.

        Raises SysError when there is no memory for it.
        """
        cdef void *base
        cdef int protection = PROT_READ
        if fd < 0:
            try:
                self.fd = fd = os.memfd_create("vhostmp-iotlb", os.MFD_CLOEXEC)
                os.ftruncate(fd, IOTLB_SIZE)
            except OSError as error:
                raise SysError.wrap("cannot make an IOTLB", error) from error
            protection = PROT_READ | PROT_WRITE
        elif own:
            self.fd = fd
            protection = PROT_READ | PROT_WRITE
        base = mmap(NULL, <size_t> IOTLB_SIZE, protection, MAP_SHARED, fd, 0)
        if base == MAP_FAILED:
            raise SysError(f"cannot map an IOTLB: {strerror(errno).decode()}", errno)
        self.table = <vmp_iotlb *> base
        if own and (self.table.seq & 1 or self.table.n > IOTLB_ENTRIES_MAX):
            # ORDER I1 (writer): as in _begin, which was the last that was done
            vmp_store_release_u32(&self.table.n, 0)
            vmp_store_release_u32(&self.table.seq, (self.table.seq | 1) + 1)

    def __dealloc__(self):
        self.close()

    def close(self):
        """Unmap it. Idempotent. The caller has made sure that nobody looks anything up."""
        if self.table is not NULL:
            munmap(self.table, <size_t> IOTLB_SIZE)
            self.table = NULL
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    cdef void _begin(self) noexcept nogil:
        # ORDER I1 (writer): seq odd, then the entries, then seq even                                  [release each]
        #   pairs with  I2 (iotlb_find: seq, the entries, seq again)
        #   without it  see there.
        #   shown by    tests/unit/shm/test_iotlb.py::test_no_entry_is_torn
        vmp_store_relaxed_u32(&self.table.seq, self.table.seq + 1)

    cdef void _end(self) noexcept nogil:
        # ORDER I1 (writer): as above
        vmp_store_release_u32(&self.table.seq, self.table.seq + 1)

    cdef void _put(self, uint32_t at, const vmp_iotlb_entry *entry, uint64_t age) noexcept nogil:
        cdef vmp_iotlb_entry *to = &self.table.entries[at]
        # ORDER I1 (writer): as above
        vmp_store_release_u64(&to.iova, entry.iova)
        vmp_store_release_u64(&to.last, entry.last)
        vmp_store_release_u64(&to.uva, entry.uva)
        vmp_store_release_u64(&to.access, entry.access)
        self.ages[at] = age

    cdef uint32_t _remove(self, uint64_t first, uint64_t last) noexcept nogil:
        """Remove every entry that overlaps. Between `_begin` and `_end`."""
        cdef uint32_t i
        cdef uint32_t kept = 0
        cdef uint32_t n = self.table.n
        cdef vmp_iotlb_entry entry
        for i in range(n):
            entry = self.table.entries[i]
            if entry.iova <= last and entry.last >= first:
                continue
            if kept != i:
                self._put(kept, &entry, self.ages[i])
            kept += 1
        # ORDER I1 (writer): as above
        vmp_store_release_u32(&self.table.n, kept)
        return n - kept

    cdef void _insert(self, const vmp_iotlb_entry *entry) noexcept nogil:
        """Insert an entry that overlaps none; there is room. Between `_begin` and `_end`."""
        cdef uint32_t at = self.table.n
        cdef vmp_iotlb_entry moved
        # ORDER I1 (writer): as above
        vmp_store_release_u32(&self.table.n, at + 1)
        while at and self.table.entries[at - 1].iova > entry.iova:
            moved = self.table.entries[at - 1]
            self._put(at, &moved, self.ages[at - 1])
            at -= 1
        self.age += 1
        self._put(at, entry, self.age)

    cdef void _evict(self) noexcept nogil:
        """Forget the oldest entry. It stays true, so nobody has to be waited for."""
        cdef uint32_t i
        cdef uint32_t oldest = 0
        for i in range(1, self.table.n):
            if self.ages[i] < self.ages[oldest]:
                oldest = i
        self._remove(self.table.entries[oldest].iova, self.table.entries[oldest].last)
        self.evicted += 1

    def update(self, uint64_t iova, uint64_t last, uint64_t uva, uint64_t access):
        """Enter that `iova` to `last`, the last byte, stand for front-end addresses from `uva` on.

        Returns whether another entry had to go that may have said something else: then the caller waits a grace period
        before it tells anybody. LocalError when the range or what it stands for wraps, or nothing is allowed.
        """
        cdef vmp_iotlb_entry entry
        cdef vmp_iotlb_entry known
        if last < iova or uva + (last - iova) < uva:
            raise LocalError(f"IOTLB entry {iova:#x} to {last:#x} for {uva:#x} wraps")
        if not access or access & ~<uint64_t> ACCESS_BOTH:
            raise LocalError(f"IOTLB entry {iova:#x}: access {access} is none of 1 to 3")
        if iotlb_find(self.table, iova, access, &known) == IOTLB_HIT and (
            known.iova == iova and known.last == last and known.uva == uva and known.access == access
        ):
            return False
        entry = vmp_iotlb_entry(iova, last, uva, access)
        self._begin()
        replaced = self._remove(iova, last)
        if self.table.n == IOTLB_ENTRIES_MAX:
            self._evict()
        self._insert(&entry)
        self._end()
        return replaced != 0

    def invalidate(self, uint64_t first, uint64_t last):
        """Remove every entry that overlaps `first` to `last`, the last byte. Returns how many went.

        The caller waits a grace period before it tells anybody, whatever is returned: an earlier one may have failed.
        """
        if last < first:
            raise LocalError(f"IOTLB range {first:#x} to {last:#x} wraps")
        self._begin()
        removed = self._remove(first, last)
        self._end()
        return removed

    def find(self, uint64_t iova):
        """Return (iova, last, uva, access) of the entry that holds `iova`; None: there is none."""
        cdef vmp_iotlb_entry entry
        if iotlb_find(self.table, iova, 0, &entry) != IOTLB_HIT:
            return None
        return entry.iova, entry.last, entry.uva, entry.access

    @property
    def version(self):
        """The number of the content."""
        return iotlb_version(self.table)

    def __len__(self):
        return vmp_load_relaxed_u32(&self.table.n)
