"""What the benchmarks measure with, compiled: the distance between two cores, and the cost of a bare write().

`PingPong` bounces one word between two threads, each on a core of its own: a round trip is two transfers of a cache
line, and tells whether the cores share a cache. `write_loop` is the yardstick of the tap case: nothing but write().

Rules: no affinity or priority is set here, the callers do that for their threads; no call into Python while measuring.
"""

from libc.errno cimport EAGAIN, EINTR, ENOBUFS, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from vhostmp.shm._epoch cimport section_enter, section_exit, section_pass
from vhostmp.shm.atomics cimport (
    vmp_cpu_relax,
    vmp_load_acquire_u32,
    vmp_now_ns,
    vmp_store_release_u32,
)
from vhostmp.shm.layout cimport vmp_worker

import os

cdef extern from "unistd.h" nogil:
    ssize_t write(int fd, const void *buf, size_t count)

cdef enum:
    LINE = 128
    WRITES_PER_LOOK = 32
    COPIES_PER_LOOK = 1024
    SPINS_PER_LOOK = 1023       # a mask: no look at the clock in a round trip that comes off


cdef class PingPong:
    """Two words on lines of their own. One thread calls `answer`, the other one `ask`, both with the same count."""

    cdef uint8_t memory[3 * LINE]

    cdef uint32_t *word(self, int index):
        return <uint32_t *> (<size_t> (self.memory + LINE - 1) // LINE * LINE + index * LINE)

    def __init__(self):
        """Start at round 0."""
        self.word(0)[0] = 0
        self.word(1)[0] = 0

    def answer(self, uint32_t rounds, double timeout_seconds):
        """Answer `rounds` rounds. Returns False when the other side did not come in time."""
        cdef uint32_t *question = self.word(0)
        cdef uint32_t *reply = self.word(1)
        cdef uint32_t n
        cdef uint32_t spins = 0
        cdef uint64_t limit = vmp_now_ns() + <uint64_t> (timeout_seconds * 1e9)
        with nogil:
            for n in range(1, rounds + 1):
                # ORDER P1 (answering thread): load question, then store reply           [acquire, release]
                #   pairs with  P2 (PingPong.ask: question stored with release, reply loaded with acquire)
                #   without it  nothing would break, for the words carry no data; the order keeps the round trip one.
                #   shown by    tests/unit/tools/test_bench.py::test_ping_pong
                while vmp_load_acquire_u32(question) != n:
                    vmp_cpu_relax()
                    spins += 1
                    if spins & SPINS_PER_LOOK == 0 and vmp_now_ns() > limit:
                        with gil:
                            return False
                vmp_store_release_u32(reply, n)
        return True

    def ask(self, uint32_t rounds, double timeout_seconds):
        """Ask `rounds` rounds. Returns the nanoseconds of a round trip, the best of 16 parts; 0.0 without an answer."""
        cdef uint32_t *question = self.word(0)
        cdef uint32_t *reply = self.word(1)
        cdef uint32_t part = max(1, rounds // 16)
        cdef uint32_t n
        cdef uint32_t spins = 0
        cdef uint64_t now = vmp_now_ns()
        cdef uint64_t limit = now + <uint64_t> (timeout_seconds * 1e9)
        cdef uint64_t start = 0
        cdef uint64_t best = 1 << 62
        with nogil:
            for n in range(1, rounds + 1):
                # ORDER P2 (asking thread): store question, then load reply              [release, acquire]
                #   pairs with  P1 (PingPong.answer: question loaded with acquire, reply stored with release)
                vmp_store_release_u32(question, n)
                while vmp_load_acquire_u32(reply) != n:
                    vmp_cpu_relax()
                    spins += 1
                    if spins & SPINS_PER_LOOK == 0 and vmp_now_ns() > limit:
                        with gil:
                            return 0.0
                if n % part == 0:
                    now = vmp_now_ns()
                    if start and now - start < best:
                        best = now - start
                    start = now
        return <double> best / part if best < 1 << 62 else 0.0


def write_loop(int fd, bytes frame, double seconds):
    """Write `frame` to `fd` for `seconds`. Returns (writes that went through, that found it full, nanoseconds)."""
    cdef const char *data = frame
    cdef size_t size = len(frame)
    cdef uint64_t start = vmp_now_ns()
    cdef uint64_t end = start + <uint64_t> (seconds * 1e9)
    cdef uint64_t now = start
    cdef uint64_t done = 0
    cdef uint64_t full = 0
    cdef int error = 0
    cdef int _i
    with nogil:
        while now < end and error == 0:
            for _i in range(WRITES_PER_LOOK):
                if write(fd, data, size) == <ssize_t> size:
                    done += 1
                elif errno == EAGAIN or errno == ENOBUFS or errno == EINTR:
                    full += 1
                else:
                    error = errno
                    break
            now = vmp_now_ns()
    if error:
        raise OSError(error, os.strerror(error))
    return done, full, now - start


def copy_loop(size_t size, size_t stride, size_t count, double seconds):
    """Copy `count` buffers of `size` bytes, `stride` bytes apart, over and over for `seconds`.

    Returns (copies, nanoseconds). Raises MemoryError.
    """
    cdef uint64_t start = vmp_now_ns()
    cdef uint64_t end = start + <uint64_t> (seconds * 1e9)
    cdef uint64_t now = start
    cdef uint64_t done = 0
    cdef uint8_t *memory
    cdef size_t at
    cdef int i
    if not 0 < size <= stride or count == 0:
        raise ValueError(f"{count} buffers of {size} bytes, {stride} bytes apart")
    memory = <uint8_t *> calloc(2 * count, stride)
    if memory is NULL:
        raise MemoryError
    with nogil:
        while now < end:
            for i in range(COPIES_PER_LOOK):
                at = (done + i) % count
                # The lengths of packets are not known when a copy is compiled; nor is this one.
                memcpy(memory + (count + at) * stride, memory + at * stride, size)
            done += COPIES_PER_LOOK
            now = vmp_now_ns()
    free(memory)
    return done, now - start


def section_loop(uint64_t count, bint waits):
    """Do `count` times what a worker does around a work item, on a slot that nobody waits for. Returns nanoseconds.

    `waits`: enter the section and leave it, as a worker that waits between its items; else go from one to the next.
    """
    cdef vmp_worker *slot = <vmp_worker *> calloc(1, sizeof(vmp_worker))
    cdef uint64_t start, _i
    if slot is NULL:
        raise MemoryError
    with nogil:
        start = vmp_now_ns()
        if waits:
            for _i in range(count):
                section_enter(slot)
                section_exit(slot)
        else:
            section_enter(slot)
            for _i in range(count):
                section_pass(slot)
            section_exit(slot)
        start = vmp_now_ns() - start
    free(slot)
    return start
