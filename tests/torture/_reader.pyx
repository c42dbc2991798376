"""Readers for tests/torture/test_epoch.py: tight loops around the read side that the workers use.

Built by tests/torture/build.py when the tests run; never installed. `mode` chooses the read side:

    0  vhostmp.shm._epoch.section_enter as it is
    1  broken: the generation is loaded before the slot is made odd (what a missing fence allows, every time)
    2  broken: no fence between the store of the slot and the load of the generation
    3  broken: the slot is made even before the element is read for the last time
    4  section after section by vhostmp.shm._epoch.section_pass, as a worker goes from one work item to the next
    5  broken: the same, and what was read before is still used after it

`update` is an updater as tight: publish, fence, scan, poison, in the order of synchronize() without its sleeps. Only
it is fast enough to meet a reader whose store is still on its way, which is what the fences are about.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from cpython.buffer cimport Py_buffer, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

from vhostmp.shm._epoch cimport section_enter, section_exit, section_pass
from vhostmp.shm.atomics cimport (
    vmp_fence_full,
    vmp_futex_wait,
    vmp_load_acquire_u32,
    vmp_load_acquire_u64,
    vmp_load_relaxed_u32,
    vmp_load_relaxed_u64,
    vmp_store_relaxed_u32,
    vmp_store_relaxed_u64,
    vmp_store_release_u64,
)
from vhostmp.shm.layout cimport VMP_DEVICES_OFFSET, VMP_WORKERS_OFFSET, vmp_device, vmp_worker

cdef uint64_t POISON = 0xDEADBEEFDEADBEEF

cdef enum:
    ELEMENTS = 4
    WORDS = 8


cdef inline bint poisoned(const uint64_t *element, uint64_t generation) noexcept nogil:
    cdef int i
    for i in range(WORDS):
        if vmp_load_relaxed_u64(&element[i]) != generation:
            return True
    return False


cdef void read_for_ever(vmp_worker *slot, vmp_device *device, const uint64_t *elements, uint64_t *result,
                        const uint64_t *stop, int mode, int looks) noexcept nogil:
    """result: sections, poisoned elements seen, sections by age of the element at their end (0, 1, 2 and more)."""
    cdef uint64_t generation, age
    cdef const uint64_t *element
    cdef bint bad
    cdef int _look
    if mode >= 4:
        section_enter(slot)
    while vmp_load_relaxed_u64(stop) == 0:
        generation = 0
        if mode == 1:
            generation = vmp_load_acquire_u64(&device.generation)
        if mode == 2:
            vmp_store_relaxed_u32(&slot.seq, vmp_load_relaxed_u32(&slot.seq) + 1)
        elif mode < 4:
            section_enter(slot)
        if mode != 1:
            generation = vmp_load_acquire_u64(&device.generation)
        element = elements + WORDS * (generation % ELEMENTS)
        bad = False
        for _look in range(looks):
            bad = bad or poisoned(element, generation)
        age = vmp_load_acquire_u64(&device.generation) - generation
        if mode == 3:
            section_exit(slot)
            bad = bad or poisoned(element, generation)
        elif mode >= 4:
            section_pass(slot)
            if mode == 5:
                bad = bad or poisoned(element, generation)
        else:
            section_exit(slot)
        vmp_store_relaxed_u64(&result[0], result[0] + 1)
        if bad:
            vmp_store_relaxed_u64(&result[1], result[1] + 1)
        age = 2 if age > 2 else age
        vmp_store_relaxed_u64(&result[2 + age], result[2 + age] + 1)
    if mode >= 4:
        section_exit(slot)


def run(control, int slot, data, int first_word, int result_word, int stop_word, int mode, int looks):
    """Read until the stop word of `data` is not 0. Word numbers count 8-byte words of `data`."""
    cdef Py_buffer c, d
    cdef uint64_t *words
    PyObject_GetBuffer(control, &c, PyBUF_SIMPLE | PyBUF_WRITABLE)
    PyObject_GetBuffer(data, &d, PyBUF_SIMPLE | PyBUF_WRITABLE)
    words = <uint64_t *> d.buf
    with nogil:
        read_for_ever(
            <vmp_worker *> (<uint8_t *> c.buf + VMP_WORKERS_OFFSET) + slot,
            <vmp_device *> (<uint8_t *> c.buf + VMP_DEVICES_OFFSET),
            words + first_word, words + result_word, words + stop_word, mode, looks,
        )
    PyBuffer_Release(&c)
    PyBuffer_Release(&d)


def sleep(control, int slot):
    """Sleep as long as the section of a slot lasts that has one, until somebody wakes us: never of ourselves."""
    cdef Py_buffer c
    cdef uint32_t *seq
    cdef uint32_t seen
    PyObject_GetBuffer(control, &c, PyBUF_SIMPLE | PyBUF_WRITABLE)
    seq = &(<vmp_worker *> (<uint8_t *> c.buf + VMP_WORKERS_OFFSET) + slot).seq
    seen = vmp_load_relaxed_u32(seq)
    with nogil:
        while vmp_load_relaxed_u32(seq) == seen:
            vmp_futex_wait(seq, seen, <uint64_t> 1000 * 1000000000)
    PyBuffer_Release(&c)


cdef uint64_t update_for_a_while(vmp_worker *slots, int n, vmp_device *device, uint64_t *elements,
                                 uint64_t generation, uint64_t turns, bint fenced) noexcept nogil:
    cdef uint64_t *element
    cdef uint32_t seen
    cdef uint64_t last = generation + turns
    cdef int i, k
    while generation < last:
        generation += 1
        element = elements + WORDS * (generation % ELEMENTS)
        for i in range(WORDS):
            vmp_store_relaxed_u64(&element[i], generation)
        vmp_store_release_u64(&device.generation, generation)
        if fenced:
            vmp_fence_full()
        for k in range(n):
            seen = vmp_load_acquire_u32(&slots[k].seq)
            while seen & 1 and vmp_load_acquire_u32(&slots[k].seq) == seen:
                pass
        element = elements + WORDS * ((generation - 1) % ELEMENTS)
        for i in range(WORDS):
            vmp_store_relaxed_u64(&element[i], POISON)
    return generation


def update(control, int n, data, int first_word, uint64_t generation, uint64_t turns, bint fenced):
    """Publish, wait for the first `n` slots, poison, `turns` times from `generation` on; return the last generation."""
    cdef Py_buffer c, d
    PyObject_GetBuffer(control, &c, PyBUF_SIMPLE | PyBUF_WRITABLE)
    PyObject_GetBuffer(data, &d, PyBUF_SIMPLE | PyBUF_WRITABLE)
    with nogil:
        generation = update_for_a_while(
            <vmp_worker *> (<uint8_t *> c.buf + VMP_WORKERS_OFFSET), n,
            <vmp_device *> (<uint8_t *> c.buf + VMP_DEVICES_OFFSET),
            <uint64_t *> d.buf + first_word, generation, turns, fenced,
        )
    PyBuffer_Release(&c)
    PyBuffer_Release(&d)
    return generation
