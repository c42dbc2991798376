"""A writer that logs and a front-end that clears, in rounds, as near to the same instant as two threads come.

At the start of a round the page's bit is set. The writer stores the round's number in the page and logs the page; the
front-end clears the bit and copies the page. Afterwards the copy has the number or the bit is set again, or the write
is lost: no later round of copying would know of it.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vhostmp.shm._log cimport log_order, log_pages, vmp_log
from vhostmp.shm.atomics cimport (
    vmp_cpu_relax,
    vmp_load_acquire_u32,
    vmp_load_relaxed_u32,
    vmp_load_relaxed_u64,
    vmp_store_relaxed_u64,
    vmp_store_release_u32,
)

cdef extern from "atomics.h" nogil:
    uint8_t vmp_exchange_full_u8(uint8_t *p, uint8_t v)

cdef enum:
    LINE = 128

cdef uint32_t OVER = 0xFFFFFFFF


cdef class Race:
    cdef uint8_t lines[6][LINE]     # one word each: page, log byte, round, writer's and cleaner's done, copy
    cdef bint ordered
    cdef readonly uint64_t lost
    cdef readonly uint64_t skipped

    def __init__(self, bint ordered):
        """Let the two meet, with the fence between the write and the look at the bit or without it."""
        self.ordered = ordered
        self.lost = 0
        self.skipped = 0

    def write(self, uint32_t rounds, uint64_t most_lost):
        """Be the writer for so many rounds, or until so many writes were lost."""
        cdef uint64_t *page = <uint64_t *> &self.lines[0][0]
        cdef uint8_t *byte = &self.lines[1][0]
        cdef uint32_t *turn = <uint32_t *> &self.lines[2][0]
        cdef uint32_t *cleaned = <uint32_t *> &self.lines[4][0]
        cdef uint64_t *copy = <uint64_t *> &self.lines[5][0]
        cdef vmp_log log
        cdef uint64_t outside = 0
        cdef uint32_t number
        log.bits = byte
        log.pages = 8
        with nogil:
            for number in range(1, rounds + 1):
                byte[0] = 1
                vmp_store_release_u32(turn, number)
                vmp_store_relaxed_u64(page, number)
                if self.ordered:
                    log_order()
                if log_pages(&log, 0, 1, &outside) == 0:
                    self.skipped += 1
                while vmp_load_acquire_u32(cleaned) != number:
                    vmp_cpu_relax()
                if not byte[0] and copy[0] != number:
                    self.lost += 1
                    if self.lost == most_lost:
                        break
            vmp_store_release_u32(turn, OVER)

    def clean(self):
        """Be the front-end until the writer ends."""
        cdef uint64_t *page = <uint64_t *> &self.lines[0][0]
        cdef uint8_t *byte = &self.lines[1][0]
        cdef uint32_t *turn = <uint32_t *> &self.lines[2][0]
        cdef uint32_t *cleaned = <uint32_t *> &self.lines[4][0]
        cdef uint64_t *copy = <uint64_t *> &self.lines[5][0]
        cdef uint32_t number = 0
        with nogil:
            while number != OVER:
                while vmp_load_relaxed_u32(turn) == number:
                    vmp_cpu_relax()
                number = vmp_load_acquire_u32(turn)
                vmp_exchange_full_u8(byte, 0)
                copy[0] = vmp_load_relaxed_u64(page)
                vmp_store_release_u32(cleaned, number)
