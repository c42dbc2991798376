"""A hostile guest made from a fuzzer's bytes: its memory, the driver's side of its rings, and what the device saw.

What it is for: the fuzz targets whose device side is compiled (`_ring.pyx`, `_net.pyx`, `_requests.pyx`). All of it is
inlined into them.

Theory of operation. Bytes are read one after the other (`take_u8` ...), zeros where they end, so that any input means
something. Guest memory is regions of their own, each allocated with its exact size: what goes one byte too far is
found by the address sanitizer. `shadow` is what a region ought to hold: the driver writes both, the device the first
only, and the two are compared at the end.

In the build for libFuzzer each look at guest memory calls `looked` (looks.h): a guest that `flips` changes there what
was read just now, so that whoever reads it again reads something else. That is a double fetch found in one thread, and
found again by the same bytes.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport abort, calloc, free
from libc.string cimport memcmp, memcpy, memset

from vhostmp.shm._log cimport vmp_log
from vhostmp.shm._memory cimport vmp_memory, vmp_region
from vhostmp.shm.layout cimport vmp_ring
from vhostmp.workers._vring cimport (
    DESC_F_AVAIL,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_USED,
    DESC_F_WRITE,
    POSITION_OFFSET,
    POSITION_WRAP,
    burst,
    packed_desc,
    packed_forward,
    vring,
    vring_attach,
    vring_desc,
)


cdef extern from "dlfcn.h" nogil:
    void *dlsym(void *handle, const char *symbol)
    void *RTLD_DEFAULT


ctypedef void (*looked_t)(const void *at, size_t size) noexcept nogil


cdef enum:
    RINGS = 2
    PARTS = 3                       # of a ring: descriptors, the driver's part, the device's part
    PLAIN = PARTS * RINGS           # the first region of plain memory
    REGIONS = PLAIN + 3
    DESC = 0
    DRIVER = 1
    DEVICE = 2

    RING_GPA = 0x10000              # of part p of ring r: so many times 1 + 3 * r + p
    PLAIN_GPA = 0x100000
    PLAIN_SIZE = 0x4000
    NEXT_SIZE = 0x1000              # a region that follows it in the guest, and not in our memory
    TOP_SIZE = 0x1000               # a region that ends where addresses do
    UVA = 0x700000000000
    TABLES = 8                      # places of indirect tables, at the start of plain memory
    TABLE_BYTES = 256
    LOG_BYTES = 40                  # of a dirty log of all memory but the topmost


cdef struct region:
    uint8_t *mem
    uint8_t *shadow
    uint64_t gpa
    uint64_t size


cdef struct driver:
    # The driver's side of one ring.
    uint32_t num
    uint16_t avail                  # next available index; packed: position
    bint packed


cdef struct guest:
    const uint8_t *at               # the input that is left
    const uint8_t *end
    const char *wrong               # what did not hold; NULL: all did
    region regions[REGIONS]
    vmp_region by_gpa[REGIONS]
    vmp_region by_uva[REGIONS]
    vmp_memory mem
    driver drivers[RINGS]
    vmp_ring slots[RINGS]
    bint flips
    uint64_t pattern                # which looks are followed by a change
    uint64_t looks


# ---- the input

cdef inline uint8_t take_u8(guest *g) noexcept nogil:
    cdef uint8_t value = 0
    if g.at < g.end:
        value = g.at[0]
        g.at += 1
    return value


cdef inline uint16_t take_u16(guest *g) noexcept nogil:
    cdef uint16_t low = take_u8(g)
    return low | <uint16_t> (take_u8(g) << 8)


cdef inline uint32_t take_u32(guest *g) noexcept nogil:
    cdef uint32_t low = take_u16(g)
    return low | <uint32_t> take_u16(g) << 16


cdef inline uint64_t take_u64(guest *g) noexcept nogil:
    cdef uint64_t low = take_u32(g)
    return low | <uint64_t> take_u32(g) << 32


cdef inline bint must(guest *g, bint holds, const char *what) noexcept nogil:
    """Note the first thing that does not hold."""
    if not holds and g.wrong is NULL:
        g.wrong = what
    return holds


# ---- memory

cdef inline void set_region(guest *g, uint32_t i, uint64_t gpa, uint64_t size) noexcept nogil:
    g.regions[i].gpa = gpa
    g.regions[i].size = size
    g.regions[i].mem = <uint8_t *> calloc(1, size)
    g.regions[i].shadow = <uint8_t *> calloc(1, size)
    if g.regions[i].mem is NULL or g.regions[i].shadow is NULL:
        abort()


cdef inline void make_guest(guest *g, const uint8_t *data, size_t size) noexcept nogil:
    """Begin. Rings are made by `make_ring`, memory is complete after `make_memory`."""
    memset(g, 0, sizeof(guest))
    g.at = data
    g.end = data + size


cdef inline void make_ring(guest *g, uint32_t r, uint32_t num, bint packed, uint16_t start) noexcept nogil:
    """Make memory for a ring of `num` descriptors, both sides of which stand at `start`."""
    cdef uint64_t gpa = RING_GPA * (1 + PARTS * <uint64_t> r)
    g.drivers[r].num = num
    g.drivers[r].packed = packed
    g.drivers[r].avail = start
    set_region(g, PARTS * r + DESC, gpa, 16 * <uint64_t> num)
    set_region(g, PARTS * r + DRIVER, gpa + RING_GPA, 4 if packed else 6 + 2 * <uint64_t> num)
    set_region(g, PARTS * r + DEVICE, gpa + 2 * RING_GPA, 4 if packed else 6 + 8 * <uint64_t> num)
    g.slots[r].last_avail_idx = start
    g.slots[r].used_idx = start
    if not packed:
        guest_write(g, PARTS * r + DRIVER, 2, &start, 2)
        guest_write(g, PARTS * r + DEVICE, 2, &start, 2)


cdef inline void make_memory(guest *g) noexcept nogil:
    """Make plain memory, and the table of all regions that there are."""
    cdef uint32_t i
    cdef uint32_t n = 0
    set_region(g, PLAIN, PLAIN_GPA, PLAIN_SIZE)
    set_region(g, PLAIN + 1, PLAIN_GPA + PLAIN_SIZE, NEXT_SIZE)
    set_region(g, PLAIN + 2, <uint64_t> 0 - TOP_SIZE, TOP_SIZE)
    for i in range(REGIONS):
        if g.regions[i].mem is not NULL:
            g.by_gpa[n].gpa = g.regions[i].gpa
            g.by_gpa[n].size = g.regions[i].size
            g.by_gpa[n].uva = UVA + (REGIONS - <uint64_t> i) * RING_GPA     # in the other order
            g.by_gpa[n].hva = g.regions[i].mem
            n += 1
    for i in range(n):
        g.by_uva[i] = g.by_gpa[n - 1 - i]
    g.mem.n = n
    g.mem.regions = g.by_gpa
    g.mem.by_uva = g.by_uva


cdef inline void free_guest(guest *g) noexcept nogil:
    cdef uint32_t i
    for i in range(REGIONS):
        free(g.regions[i].mem)
        free(g.regions[i].shadow)


cdef inline void guest_write(guest *g, uint32_t i, uint64_t offset, const void *data, uint64_t size) noexcept nogil:
    """Write to a region as the guest does; what does not fit is left out."""
    if offset < g.regions[i].size and size <= g.regions[i].size - offset:
        memcpy(g.regions[i].mem + offset, data, size)
        memcpy(g.regions[i].shadow + offset, data, size)


cdef inline void expect(guest *g, uint32_t i, uint64_t offset, const void *data, uint64_t size) noexcept nogil:
    """The device ought to have written this to a region by the end."""
    if must(g, offset <= g.regions[i].size and size <= g.regions[i].size - offset, "a place that is not in the region"):
        memcpy(g.regions[i].shadow + offset, data, size)


cdef inline void accept(guest *g, uint32_t i, uint64_t offset, uint64_t size) noexcept nogil:
    """The device may write what it likes there."""
    if offset <= g.regions[i].size and size <= g.regions[i].size - offset:
        memcpy(g.regions[i].shadow + offset, g.regions[i].mem + offset, size)


cdef inline int32_t region_of(guest *g, const void *hva, uint64_t size) noexcept nogil:
    """Which region holds `size` bytes at our address `hva`; -1: none."""
    cdef uint64_t offset
    cdef int32_t i
    for i in range(REGIONS):
        offset = <uintptr_t> hva - <uintptr_t> g.regions[i].mem
        if g.regions[i].mem is not NULL and offset < g.regions[i].size and size <= g.regions[i].size - offset:
            return i
    return -1


cdef inline void compare_memory(guest *g, const char *what) noexcept nogil:
    """Nothing was written but what was expected."""
    cdef uint32_t i
    for i in range(REGIONS):
        if g.regions[i].mem is not NULL:
            must(g, memcmp(g.regions[i].mem, g.regions[i].shadow, g.regions[i].size) == 0, what)


cdef inline void guest_looked(guest *g, const void *at, size_t size) noexcept nogil:
    """The device has read `size` bytes just now: a guest that flips makes them others."""
    cdef int32_t i
    cdef uint64_t offset
    if not g.flips:
        return
    i = region_of(g, at, size)
    if i < 0:
        return
    g.looks += 1
    if g.pattern >> (g.looks & 63) & 1:
        offset = (<uintptr_t> at - <uintptr_t> g.regions[i].mem) + (g.looks >> 1) % size
        g.regions[i].mem[offset] ^= <uint8_t> (g.pattern >> (g.looks % 57) | 1)
        g.regions[i].shadow[offset] = g.regions[i].mem[offset]


cdef inline void hook_looks(looked_t looked) noexcept nogil:
    """Have each look at guest memory told to `looked`, where the build is one that tells."""
    cdef looked_t *hook = <looked_t *> dlsym(RTLD_DEFAULT, "vmp_fuzz_looked")
    if hook is not NULL:
        hook[0] = looked


# ---- what a driver may write, sensible and not

cdef inline uint64_t choose_address(guest *g) noexcept nogil:
    cdef uint8_t kind = take_u8(g)
    cdef region *where = &g.regions[(kind >> 3) % REGIONS]
    cdef uint8_t shape = kind & 7
    if shape < 4:
        return PLAIN_GPA + take_u16(g) % PLAIN_SIZE
    if shape == 4:
        return where.gpa + where.size - take_u8(g)
    if shape == 5:
        return where.gpa + 16 * <uint64_t> take_u8(g)
    if shape == 6:
        return PLAIN_GPA + TABLE_BYTES * (kind >> 3) % TABLES
    return take_u64(g)


cdef inline uint32_t choose_length(guest *g) noexcept nogil:
    cdef uint8_t kind = take_u8(g)
    if kind < 0x80:
        return kind
    if kind < 0xC0:
        return 16 * <uint32_t> (kind & 0x3F)
    if kind < 0xE0:
        return (<uint32_t> 1 << (kind & 0x1F)) - (take_u8(g) & 1)
    if kind < 0xF0:
        return take_u16(g)
    return take_u32(g)


cdef inline void choose_descriptor(guest *g, vring_desc *d) noexcept nogil:
    """A split ring's descriptor, or an entry of a table of either format."""
    d.addr = choose_address(g)
    d.len = choose_length(g)
    d.flags = take_u8(g)
    if d.flags < 0xF0:
        d.flags &= DESC_F_NEXT | DESC_F_WRITE | DESC_F_INDIRECT
    d.next = take_u8(g)
    if d.next > 0xF0:
        d.next = take_u16(g)


cdef inline void as_packed(const vring_desc *d, packed_desc *p) noexcept nogil:
    p.addr = d.addr
    p.len = d.len
    p.id = d.next
    p.flags = d.flags


cdef inline void put_descriptor(guest *g, uint32_t r, uint32_t i, const vring_desc *d) noexcept nogil:
    """Write descriptor `i` of a ring, whatever it is."""
    cdef packed_desc p
    i %= g.drivers[r].num
    if g.drivers[r].packed:
        as_packed(d, &p)
        guest_write(g, PARTS * r + DESC, 16 * <uint64_t> i, &p, 16)
    else:
        guest_write(g, PARTS * r + DESC, 16 * <uint64_t> i, d, 16)


cdef inline void put_entry(guest *g, uint32_t r, uint8_t table, uint8_t i, const vring_desc *d) noexcept nogil:
    """Write an entry of an indirect table."""
    cdef uint64_t offset = TABLE_BYTES * <uint64_t> (table % TABLES) + 16 * <uint64_t> (i % (TABLE_BYTES // 16))
    cdef packed_desc p
    if g.drivers[r].packed:
        as_packed(d, &p)
        guest_write(g, PLAIN, offset, &p, 16)
    else:
        guest_write(g, PLAIN, offset, d, 16)


cdef inline void show_avail(guest *g, uint32_t r) noexcept nogil:
    """Store avail->idx of a split ring."""
    guest_write(g, PARTS * r + DRIVER, 2, &g.drivers[r].avail, 2)


cdef inline void offer_head(guest *g, uint32_t r, uint16_t head) noexcept nogil:
    """Make a chain of a split ring available, which was written before."""
    cdef driver *d = &g.drivers[r]
    guest_write(g, PARTS * r + DRIVER, 4 + 2 * <uint64_t> (d.avail % d.num), &head, 2)
    d.avail += 1
    show_avail(g, r)


cdef inline void offer_position(guest *g, uint32_t r, vring_desc *made, uint32_t n) noexcept nogil:
    """Make a chain of `n` descriptors of a packed ring available at the driver's position."""
    cdef driver *d = &g.drivers[r]
    cdef packed_desc p
    cdef uint32_t i
    for i in range(n):
        as_packed(&made[i], &p)
        p.flags &= ~<uint16_t> (DESC_F_AVAIL | DESC_F_USED)
        p.flags |= DESC_F_AVAIL if d.avail & POSITION_WRAP else DESC_F_USED
        guest_write(g, PARTS * r + DESC, 16 * <uint64_t> (d.avail & POSITION_OFFSET), &p, 16)
        d.avail = packed_forward(d.avail, 1, d.num)


cdef inline void offer_chain(guest *g, uint32_t r, uint32_t n, uint32_t first, uint16_t write_from) noexcept nogil:
    """Write a chain of `n` descriptors with sensible links, those from `write_from` on writable; make it available."""
    cdef vring_desc made[16]
    cdef uint32_t num = g.drivers[r].num
    cdef uint32_t i
    n = 1 + (n - 1) % (16 if num > 16 else num)
    for i in range(n):
        made[i].addr = choose_address(g)
        made[i].len = choose_length(g)
        made[i].flags = (DESC_F_NEXT if i + 1 < n else 0) | (DESC_F_WRITE if i >= write_from else 0)
        made[i].next = <uint16_t> ((first + i + 1) % num)
    if g.drivers[r].packed:
        offer_position(g, r, made, n)
        return
    for i in range(n):
        put_descriptor(g, r, first + i, &made[i])
    offer_head(g, r, <uint16_t> (first % num))


cdef inline void scribble(guest *g) noexcept nogil:
    """Write any bytes anywhere."""
    cdef uint32_t i = take_u8(g) % REGIONS
    cdef uint64_t value
    cdef uint16_t offset = take_u16(g)
    cdef uint8_t size = take_u8(g)
    if g.regions[i].mem is NULL:
        return
    value = take_u64(g) if size & 8 else take_u16(g)
    guest_write(g, i, offset % g.regions[i].size, &value, 1 + size % 8)


# ---- the device

cdef inline void check_logged(guest *g, const vmp_log *log) noexcept nogil:
    """Each page that the device has written has its bit in a log of LOG_BYTES."""
    cdef uint64_t offset, page
    cdef uint32_t i
    for i in range(REGIONS - 1):        # the topmost has no place in the log
        for offset in range(g.regions[i].size):
            if g.regions[i].mem[offset] != g.regions[i].shadow[offset]:
                page = (g.regions[i].gpa + offset) >> 12
                must(g, log.bits[page >> 3] >> (page & 7) & 1, "a page was written and not logged")


cdef inline void attach_ring(guest *g, uint32_t r, vring *vq, uint64_t features) noexcept nogil:
    """Serve a ring from where its slot says that it stands, as a worker that begins, or one that replaces another."""
    cdef vring old = vq[0]
    memset(vq, 0, sizeof(vring))
    vq.desc = <vring_desc *> g.regions[PARTS * r + DESC].mem
    vq.avail = <uint16_t *> g.regions[PARTS * r + DRIVER].mem
    vq.used = <uint16_t *> g.regions[PARTS * r + DEVICE].mem
    vq.num = <uint16_t> g.drivers[r].num
    vq.mask = <uint16_t> (g.drivers[r].num - 1)
    vq.mem = &g.mem
    vq.slot = &g.slots[r]
    vq.packed = g.drivers[r].packed
    vq.call_fd = vq.log_fd = -1
    vq.indirect = features >> 28 & 1
    vq.event_idx = features >> 29 & 1
    vq.notify_on_empty = features >> 24 & 1
    vq.log = old.log
    vq.log_used = old.log_used
    vq.log_used_gpa = old.log_used_gpa
    vring_attach(vq)


cdef inline void check_burst(guest *g, const vring *vq, const burst *b, uint32_t most, int direction) noexcept nogil:
    """What holds of every burst that was fetched, whatever the guest does."""
    cdef uint32_t i, k
    cdef uint32_t segment = 0
    cdef uint64_t sums[2]
    must(g, b.n <= most, "more chains than asked for")
    for i in range(b.n):
        must(g, b.chains[i].first == segment, "chains do not follow each other")
        must(g, vq.packed or b.used[i].id < vq.num, "a head that is no descriptor")
        must(g, b.used[i].len == 0, "a used length before anything was written")
        must(g, b.chains[i].n_readable + b.chains[i].n_writable <= 1024, "more segments than readv takes")
        must(g, direction & 1 or not b.chains[i].readable, "a readable buffer where none may be")
        must(g, direction & 2 or not b.chains[i].writable, "a writable buffer where none may be")
        sums[0] = sums[1] = 0
        for k in range(b.chains[i].n_readable + b.chains[i].n_writable):
            sums[k >= b.chains[i].n_readable] += b.segments[segment].iov_len
            must(g, b.segments[segment].iov_len != 0, "an empty segment")
            must(
                g,
                region_of(g, b.segments[segment].iov_base, b.segments[segment].iov_len) >= 0,
                "a segment outside guest memory",
            )
            segment += 1
        must(g, sums[0] == b.chains[i].readable and sums[1] == b.chains[i].writable, "a sum that is wrong")
    must(g, segment == b.n_segments, "segments of no chain")
