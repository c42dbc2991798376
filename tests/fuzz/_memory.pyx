"""Fuzz target "memory": the memory table, the IOTLB and the dirty log, each against the plainest way to do the same.

The plain way is a list that is searched from one end to the other, and a log that is marked page by page. What must
hold: both find the same, byte for byte of their answers; an IOTLB's entries are sorted and do not overlap, the oldest
goes when it is full; nothing is written beside the log's bits.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memset

from tests.fuzz._guest cimport guest, make_guest, must, take_u8, take_u16, take_u64
from tests.fuzz._report cimport report, report_exception
from vhostmp.shm._iotlb cimport (
    ACCESS_BOTH,
    ACCESS_READ,
    IOTLB_BUSY,
    IOTLB_ENTRIES_MAX,
    IOTLB_HIT,
    IOTLB_MISS,
    IotlbTable,
    iotlb_find,
    vmp_iotlb_entry,
)
from vhostmp.shm._log cimport log_bytes, log_pages, vmp_log
from vhostmp.shm._memory cimport (
    memory_find,
    memory_reverse,
    memory_span,
    memory_translate,
    vmp_memory,
    vmp_region,
    vmp_region_cache,
)

from vhostmp.errors import LocalError

cdef enum:
    REGIONS_MAX = 8
    STEPS_MAX = 64
    LOG_BYTES_MAX = 64
    UVA = 0x7000_0000_0000
    HVA = 0x1000_0000
    FULL = IOTLB_ENTRIES_MAX - 3

cdef struct known:
    # An entry of the IOTLB, in the order in which they came.
    vmp_iotlb_entry entry
    uint64_t age

cdef struct model:
    guest g                     # its input and its verdict
    vmp_memory mem
    vmp_region regions[REGIONS_MAX]
    vmp_region by_uva[REGIONS_MAX]
    vmp_region_cache cache
    vmp_log log
    uint8_t bits[LOG_BYTES_MAX]
    uint32_t n
    uint64_t age

cdef known *entries = <known *> calloc(IOTLB_ENTRIES_MAX + 1, sizeof(known))
cdef IotlbTable table = None


cdef inline bint is_same(const vmp_iotlb_entry *a, const vmp_iotlb_entry *b):
    return memcmp(a, b, sizeof(vmp_iotlb_entry)) == 0


# ---- the plain way

cdef const vmp_region *plain_region(model *m, uint64_t gpa):
    cdef uint32_t i
    for i in range(m.mem.n):
        if m.regions[i].gpa <= gpa and gpa - m.regions[i].gpa < m.regions[i].size:
            return &m.regions[i]
    return NULL


cdef const vmp_region *plain_region_by_uva(model *m, uint64_t uva):
    cdef uint32_t i
    for i in range(m.mem.n):
        if m.regions[i].uva <= uva and uva - m.regions[i].uva < m.regions[i].size:
            return &m.regions[i]
    return NULL


cdef int32_t plain_entry(model *m, uint64_t iova):
    cdef int32_t i
    for i in range(<int32_t> m.n):
        if entries[i].entry.iova <= iova <= entries[i].entry.last:
            return i
    return -1


cdef uint8_t *plain_find(model *m, uint64_t address, uint64_t access, uint64_t *run):
    """memory_find by the book."""
    cdef const vmp_region *where
    cdef const vmp_iotlb_entry *entry
    cdef uint64_t uva
    cdef int32_t i
    if m.mem.iotlb is NULL:
        where = plain_region(m, address)
        if where is NULL:
            return NULL
        run[0] = where.gpa + (where.size - 1) - address + 1
        return where.hva + (address - where.gpa)
    i = plain_entry(m, address)
    if i < 0 or entries[i].entry.access & access != access:
        return NULL
    entry = &entries[i].entry
    uva = entry.uva + (address - entry.iova)
    where = plain_region_by_uva(m, uva)
    if where is NULL:
        return NULL
    run[0] = min(entry.last - address, where.uva + (where.size - 1) - uva) + 1
    return where.hva + (uva - where.uva)


cdef uint8_t *plain_span(model *m, uint64_t address, uint64_t access, uint64_t size):
    """memory_span by the book."""
    cdef uint8_t *start = NULL
    cdef uint8_t *at
    cdef uint64_t found = 0
    cdef uint64_t run = 0
    if size == 0 or address > <uint64_t> 0 - size and address != <uint64_t> 0 - size:
        return NULL
    while found < size:
        at = plain_find(m, address + found, access, &run)
        if at is NULL or found and at != start + found:
            return NULL
        if found == 0:
            start = at
        found += run
    return start


cdef bint plain_remove(model *m, uint64_t first, uint64_t last):
    """Remove what overlaps; whether anything did."""
    cdef uint32_t i
    cdef uint32_t kept = 0
    for i in range(m.n):
        if entries[i].entry.last < first or entries[i].entry.iova > last:
            entries[kept] = entries[i]
            kept += 1
    i = m.n
    m.n = kept
    return i != kept


cdef void plain_mark(model *m, uint64_t gpa, uint64_t size, uint64_t *outside):
    """log_pages by the book."""
    cdef uint64_t page, last
    if size == 0:
        return
    if gpa + (size - 1) < gpa:
        outside[0] += 1
        return
    page = gpa >> 12
    last = (gpa + (size - 1)) >> 12
    while page <= last:
        if page >= m.log.pages:
            outside[0] += last - page + 1
            return
        m.bits[page >> 3] |= <uint8_t> (1 << (page & 7))
        page += 1


# ---- what is tried

cdef uint64_t choose(model *m):
    """An address near something, or any."""
    cdef uint8_t kind = take_u8(&m.g)
    cdef uint64_t near = take_u8(&m.g)
    cdef vmp_region *where = &m.regions[(kind >> 2) % m.mem.n]
    cdef vmp_iotlb_entry *entry = &entries[near % m.n].entry if m.n else NULL
    if kind & 3 == 0:
        return where.gpa + near - 4
    if kind & 3 == 1:
        return where.gpa + where.size + near - 4
    if kind & 3 == 2 and entry is not NULL:
        return (entry.iova if kind & 4 else entry.last) + (kind >> 3) % 5 - 2
    return take_u64(&m.g)


cdef uint64_t choose_size(model *m):
    cdef uint8_t kind = take_u8(&m.g)
    if kind < 0x80:
        return kind
    return take_u64(&m.g) if kind > 0xF8 else take_u16(&m.g)


cdef bint update(model *m) except -1:
    """Enter something, in both."""
    cdef guest *g = &m.g
    cdef uint64_t iova = choose(m)
    cdef uint64_t last = iova + choose_size(m) - 1
    cdef uint8_t how = take_u8(g)
    cdef uint64_t uva = m.regions[how % m.mem.n].uva + take_u16(g) if how & 0x80 else take_u64(g)
    cdef uint64_t access = how >> 3 & 7
    cdef bint good = last >= iova and uva + (last - iova) >= uva and 1 <= access <= 3
    cdef bint replaced, expected
    cdef uint32_t i
    cdef uint32_t oldest = 0
    cdef int32_t same = plain_entry(m, iova)
    cdef vmp_iotlb_entry entry
    try:
        replaced = table.update(iova, last, uva, access)
    except LocalError:
        must(g, not good, "a good entry was refused")
        return False
    if not must(g, good, "a bad entry was taken"):
        return False
    entry = vmp_iotlb_entry(iova, last, uva, access)
    if same >= 0 and is_same(&entries[same].entry, &entry):
        must(g, not replaced, "an entry replaced itself")
        return False
    expected = plain_remove(m, iova, last)
    must(g, replaced == expected, "another answer to whether something was replaced")
    if m.n == IOTLB_ENTRIES_MAX:
        for i in range(m.n):
            if entries[i].age < entries[oldest].age:
                oldest = i
        plain_remove(m, entries[oldest].entry.iova, entries[oldest].entry.last)
    m.age += 1
    entries[m.n] = known(entry, m.age)
    m.n += 1
    return True


cdef bint invalidate(model *m) except -1:
    cdef uint64_t first = choose(m)
    cdef uint64_t last = first + choose_size(m) - 1
    cdef uint32_t n = m.n
    cdef uint32_t removed
    try:
        removed = table.invalidate(first, last)
    except LocalError:
        must(&m.g, last < first, "a good range was refused")
        return False
    must(&m.g, last >= first, "a range that wraps was taken")
    plain_remove(m, first, last)
    must(&m.g, removed == n - m.n, "another number of entries went")
    return True


cdef void fill(model *m):
    """Make the table almost full, of entries far away."""
    cdef uint32_t i
    table._begin()
    table._remove(0, <uint64_t> -1)
    m.n = 0
    while m.n < FULL:
        m.age += 1
        i = m.n
        entries[i].entry = vmp_iotlb_entry((<uint64_t> 1 << 62) + 16 * <uint64_t> i, 0, UVA + i, ACCESS_BOTH)
        entries[i].entry.last = entries[i].entry.iova + i % 16
        entries[i].age = m.age
        table._insert(&entries[i].entry)
        m.n += 1
    table._end()


cdef void compare_table(model *m):
    """Everything about the IOTLB that can be seen."""
    cdef guest *g = &m.g
    cdef vmp_iotlb_entry found
    cdef uint64_t iova = choose(m)
    cdef uint64_t access = 1 + take_u8(g) % 3
    cdef int32_t at = plain_entry(m, iova)
    cdef int result = iotlb_find(table.table, iova, access, &found)
    cdef uint32_t i
    must(g, result != IOTLB_BUSY, "busy, and nobody writes")
    if at < 0 or entries[at].entry.access & access != access:
        must(g, result == IOTLB_MISS, "found what is not there, or not allowed")
    else:
        must(g, result == IOTLB_HIT and is_same(&found, &entries[at].entry), "did not find what is there")
    must(g, table.table.n == m.n, "another number of entries")
    for i in range(1, table.table.n):
        must(g, table.table.entries[i - 1].last < table.table.entries[i].iova, "entries out of order")


cdef void compare_memory(model *m):
    """Look-ups, through a cache that is kept."""
    cdef guest *g = &m.g
    cdef uint64_t address = choose(m)
    cdef uint64_t size = choose_size(m)
    cdef uint8_t how = take_u8(g)
    cdef uint64_t access = 1 + how % 3
    cdef uint64_t run = 0
    cdef uint64_t expected_run = 0
    cdef uint64_t gpa = 0
    cdef uint8_t *found
    cdef uint8_t *expected = plain_find(m, address, ACCESS_READ if how & 4 else access, &expected_run)
    cdef const vmp_region *where
    m.cache.missed = 0
    if how & 4:
        found = memory_translate(&m.mem, &m.cache, address, size)
        must(g, found == (expected if expected is not NULL and size <= expected_run else NULL), "memory_translate")
    else:
        found = memory_find(&m.mem, &m.cache, address, access, &run)
        must(g, found == expected, "memory_find")
        must(g, found is NULL or run == expected_run, "memory_find: another run")
        must(g, m.mem.iotlb is NULL or (found is NULL) == (m.cache.missed != 0), "a miss that is not said, or said")
    found = memory_span(&m.mem, &m.cache, address, access, size)
    must(g, found == plain_span(m, address, access, size), "memory_span")
    where = &m.regions[how % m.mem.n]
    found = where.hva + size % (where.size + 2) - 1
    expected = NULL
    for i in range(<int> m.mem.n):
        if m.regions[i].hva <= found and <uint64_t> (found - m.regions[i].hva) < m.regions[i].size:
            expected = found
            must(g, memory_reverse(&m.mem, found, &gpa), "memory_reverse: nothing")
            must(g, gpa == m.regions[i].gpa + <uint64_t> (found - m.regions[i].hva), "memory_reverse")
    must(g, expected is not NULL or not memory_reverse(&m.mem, found, &gpa), "memory_reverse: something")


cdef void mark(model *m):
    """Log something."""
    cdef guest *g = &m.g
    cdef uint64_t gpa = choose(m)
    cdef uint64_t size = choose_size(m)
    cdef uint64_t outside = 0
    cdef uint64_t expected = 0
    cdef uint8_t how = take_u8(g)
    cdef const vmp_region *where = &m.regions[how % m.mem.n]
    cdef uint32_t found, i
    cdef uint32_t before = 0
    cdef uint32_t after = 0
    if how & 0x80:
        gpa = where.gpa + gpa % where.size
        size %= where.gpa + (where.size - 1) - gpa + 2
    for i in range(8 * LOG_BYTES_MAX):
        before += m.bits[i >> 3] >> (i & 7) & 1
    plain_mark(m, gpa, size, &expected)
    for i in range(8 * LOG_BYTES_MAX):
        after += m.bits[i >> 3] >> (i & 7) & 1
    if how & 0x80:
        found = log_bytes(&m.log, &m.mem, where.hva + (gpa - where.gpa), size, &outside)
    else:
        found = log_pages(&m.log, gpa, size, &outside)
    must(g, found == after - before, "another number of bits was set")
    must(g, outside == expected, "another number of pages is outside")
    must(g, memcmp(m.log.bits, m.bits, m.log.pages // 8) == 0, "other bits were set")


cdef void make_regions(model *m):
    """Regions by ascending address, some of which follow each other."""
    cdef guest *g = &m.g
    cdef uint8_t key = take_u8(g)
    cdef uint64_t gpa = 0x1000 * (key >> 3)
    cdef uint64_t size
    cdef uint8_t *hva = <uint8_t *> <uintptr_t> HVA
    cdef uint32_t i, k
    m.mem.n = 1 + key % REGIONS_MAX
    key = take_u8(g)
    for i in range(m.mem.n):
        gpa += 0x100 * (take_u8(g) & 0x0F)
        size = 1 + take_u16(g)
        if i == m.mem.n - 1 and key & 0x80:
            gpa = <uint64_t> 0 - size       # ends where addresses do
        m.regions[i] = vmp_region(gpa, size, UVA + (<uint64_t> (i ^ key & 7) << 20), hva)
        if i == 0 and key & 0x40:
            m.regions[i].uva = <uint64_t> 0 - size
        gpa += size
        hva += size + 0x1000 * (take_u8(g) & 1)
    for i in range(m.mem.n):
        k = i
        while k and m.by_uva[k - 1].uva > m.regions[i].uva:
            m.by_uva[k] = m.by_uva[k - 1]
            k -= 1
        m.by_uva[k] = m.regions[i]
    m.mem.regions = m.regions
    m.mem.by_uva = m.by_uva


cdef const char *run(const uint8_t *data, size_t size) except? NULL:
    """One execution. What did not hold, NULL: everything did."""
    global table
    cdef model m
    cdef uint8_t what
    cdef int _i
    if table is None:
        table = IotlbTable()
    memset(&m, 0, sizeof(model))
    make_guest(&m.g, data, size)
    make_regions(&m)
    table.invalidate(0, <uint64_t> -1)
    what = take_u8(&m.g)
    if what & 1:
        m.mem.iotlb = table.table
        if what >= 0xE0:
            fill(&m)
    m.log.pages = 8 * <uint64_t> (take_u8(&m.g) % (LOG_BYTES_MAX + 1))
    m.log.bits = <uint8_t *> calloc(1, m.log.pages // 8 + (m.log.pages == 0))
    for _i in range(STEPS_MAX):
        if m.g.at >= m.g.end or m.g.wrong is not NULL:
            break
        what = take_u8(&m.g) & 7
        if what < 2 and m.mem.iotlb is not NULL:
            update(&m)
            m.cache.size = 0            # as whoever serves a ring does when the IOTLB has changed
        elif what == 2 and m.mem.iotlb is not NULL:
            invalidate(&m)
            m.cache.size = 0
        elif what < 4 and m.mem.iotlb is not NULL:
            compare_table(&m)
        elif what < 6:
            compare_memory(&m)
        else:
            mark(&m)
    free(m.log.bits)
    return m.g.wrong


cdef int fuzz(const uint8_t *data, size_t size) noexcept:
    try:
        return report(run(data, size))
    except BaseException as error:
        return report_exception(error)


def entry(str target):
    """Return the address of the target's function for libFuzzer, which calls it with the GIL."""
    return <uintptr_t> <void *> fuzz


def replay(str target, bytes data):
    """Run one input. Returns what did not hold, None: everything did."""
    global table
    cdef const char *wrong = run(data, len(data))
    table = None
    return None if wrong is NULL else wrong.decode()
