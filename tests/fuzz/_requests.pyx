"""Fuzz target "requests": devices whose requests are served in Python, disk and random numbers, and a hostile driver.

What is run is what a worker runs for a work item of such a device: chains become views of guest memory, the object
serves them, what it wrote is logged and given back. What must hold: no request makes the device complain, raise, or
keep a view; a disk stays as long as it is and, read-only, as it was; what was written is in the dirty log.

Coverage of the devices' Python lines is counted here, into what libFuzzer looks at besides its own counters.
"""

from cpython.object cimport PyObject
from cpython.pystate cimport PyFrameObject, PyTrace_LINE
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from tests.fuzz._guest cimport (
    DEVICE,
    LOG_BYTES,
    PLAIN,
    PLAIN_GPA,
    PLAIN_SIZE,
    RTLD_DEFAULT,
    attach_ring,
    check_logged,
    choose_descriptor,
    dlsym,
    free_guest,
    guest,
    guest_looked,
    guest_write,
    hook_looks,
    make_guest,
    make_memory,
    make_ring,
    must,
    offer_chain,
    offer_head,
    offer_position,
    put_descriptor,
    put_entry,
    scribble,
    take_u8,
    take_u16,
    take_u64,
)
from tests.fuzz._report cimport report, report_exception
from vhostmp.shm._log cimport vmp_log
from vhostmp.shm._memory cimport MemoryMap
from vhostmp.shm.layout cimport VMP_RINGS_MAX
from vhostmp.workers._config cimport Backend
from vhostmp.workers._vring cimport DESC_F_NEXT, DESC_F_WRITE, POSITION_WRAP, vring_desc
from vhostmp.workers._work cimport BROKEN, MORE, ring_config, wdevice, worker, wring

import logging
import os

from vhostmp.workers.backends._requests import RequestBackend
from vhostmp.workers.devices import blk, rng
from vhostmp.workers.devices.flusher import new_note

cdef extern from "Python.h":
    ctypedef struct PyCodeObject:
        PyObject *co_filename
    ctypedef int (*tracer_t)(PyObject *self, PyFrameObject *frame, int what, PyObject *arg) noexcept
    void PyEval_SetTrace(tracer_t function, PyObject *self)
    int PyFrame_GetLineNumber(PyFrameObject *frame)
    PyCodeObject *PyFrame_GetCode(PyFrameObject *frame)
    void Py_DECREF(PyObject *o)

cdef enum:
    STEPS_MAX = 64
    ITEMS_MAX = 4
    SECTORS = 64
    SECTOR = 512
    LINES = 4096                # counters in engine.c
    F_INDIRECT = 28

cdef struct rig:
    guest g
    wdevice dev
    wring ring
    vmp_log log

cdef rig *current
cdef worker *work = <worker *> calloc(1, sizeof(worker))
cdef wring **queue = <wring **> calloc(VMP_RINGS_MAX, sizeof(wring *))
cdef uint8_t *lines = NULL
cdef uint32_t last_line = 0
cdef PyObject *traced[2]
traced[0] = <PyObject *> blk.Blk.process.__code__.co_filename
traced[1] = <PyObject *> rng.Rng.process.__code__.co_filename


cdef void looked(const void *at, size_t size) noexcept nogil:
    if current is not NULL:
        guest_looked(&current.g, at, size)


cdef int count_line(PyObject *self, PyFrameObject *frame, int what, PyObject *arg) noexcept:
    """Count a line of a device together with the line before it."""
    global last_line
    cdef PyCodeObject *code
    cdef uint32_t line
    if what != PyTrace_LINE:
        return 0
    code = PyFrame_GetCode(frame)
    if code.co_filename == traced[0] or code.co_filename == traced[1]:
        line = <uint32_t> PyFrame_GetLineNumber(frame)
        lines[(line * 7 + last_line) % LINES] += 1
        last_line = line
    Py_DECREF(<PyObject *> code)
    return 0


class Complaints(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self):
        """Begin with none."""
        super().__init__(logging.ERROR)
        self.found = []

    def emit(self, record):
        """Keep a record."""
        self.found.append(self.format(record))


class SlowFlusher:
    """A flush without a thread, which is done when it is looked at a second time."""

    def __init__(self):
        """Begin with none."""
        self.waiting = {}

    def begin(self, who):
        """Ask for a flush."""
        self.waiting[who] = 1

    def forget(self, who):
        """Forget a flush that nobody will take."""
        self.waiting.pop(who, None)

    def begun(self, who):
        """Whether somebody has asked for one and not taken its outcome."""
        return who in self.waiting

    def take(self, who):
        """Return that it went well; None, once, that it is not done."""
        self.waiting[who] -= 1
        if self.waiting[who] >= 0:
            return None
        del self.waiting[who]
        return 0

    def close(self):
        """End."""
        self.waiting.clear()


class Devices:
    """One device of each kind with its disk, and what they complain of."""

    def __init__(self):
        """Make them."""
        self.complaints = Complaints()
        self.log = logging.getLogger("vhostmp.backend")
        self.log.addHandler(self.complaints)
        self.propagate, self.log.propagate = self.log.propagate, False
        self.memory = MemoryMap([])
        self.disk = os.memfd_create("disk", os.MFD_CLOEXEC)
        self.content = bytes(range(256)) * (SECTORS * SECTOR // 256)
        os.pwrite(self.disk, self.content, 0)
        self.note = new_note()
        self.backends = [
            self.make_disk(read_only=False, discards=True),
            self.make_disk(read_only=False, write_through=False),
            self.make_disk(read_only=True, write_through=False),
            RequestBackend([], reference="vhostmp.workers.devices.rng:Rng", arguments={}),
        ]

    def make_disk(self, **arguments):
        """Make a disk."""
        arguments |= {"sectors": SECTORS, "serial": "a serial number"}
        fds = [self.disk, self.note]
        made = RequestBackend(fds, reference="vhostmp.workers.devices.blk:Blk", arguments=arguments)
        made.instance.flusher.close()
        made.instance.flusher = SlowFlusher()
        return made

    def verdict(self, kind):
        """Return what a device of a kind has done that it must not have, None: nothing."""
        if self.complaints.found:
            return "; ".join(self.complaints.found)
        if os.fstat(self.disk).st_size != len(self.content):
            return "the disk has another size"
        if kind > 1 and os.pread(self.disk, len(self.content), 0) != self.content:
            return "a read-only disk was written to"
        return None

    def reset(self):
        """Make the disk what it was, and forget what waits."""
        os.pwrite(self.disk, self.content, 0)
        for backend in self.backends[:-1]:
            backend.instance.flusher.close()

    def close(self):
        """Close everything."""
        for backend in self.backends:
            backend.close()
        self.memory.close()
        os.close(self.disk)
        os.close(self.note)
        self.log.removeHandler(self.complaints)
        self.log.propagate = self.propagate


devices = None


cdef void send_request(rig *t, uint8_t kind) noexcept nogil:
    """Offer a request for a disk: a header, data, a status; each with a length that is right or not."""
    cdef guest *g = &t.g
    cdef vring_desc made[8]
    cdef uint8_t what = take_u8(g)
    cdef uint8_t shape = take_u8(g)
    cdef uint8_t first = take_u8(g)
    cdef uint32_t type = what & 15
    cdef uint64_t sector = take_u8(g)
    cdef uint64_t at = 0x40 * <uint64_t> (shape & 15)
    cdef uint64_t word
    cdef uint32_t data
    cdef uint8_t n = 0
    cdef uint8_t i
    if sector >= 0xF8:
        sector = take_u64(g)
    guest_write(g, PLAIN, at, &type, 4)
    guest_write(g, PLAIN, at + 8, &sector, 8)
    made[n].addr = PLAIN_GPA + at
    made[n].len = 16
    if what & 0x10:         # cut in two
        made[n].len = what >> 5
        n += 1
        made[n].addr = PLAIN_GPA + at + (what >> 5)
        made[n].len = 16 - (what >> 5)
    for i in range(n + 1):
        made[i].flags = DESC_F_NEXT
    n += 1
    data = SECTOR * (kind & 7)
    if kind & 8:
        data = 16 * <uint32_t> (kind & 7)
        # The ranges of a discard, or of zeroes.
        for i in range(kind & 7):
            word = take_u8(g)
            guest_write(g, PLAIN, at + 16 + 16 * <uint64_t> i, &word, 8)
            word = take_u8(g) | <uint64_t> (take_u8(g) & 1) << 32
            if word & 0x80:
                word = take_u64(g)
            guest_write(g, PLAIN, at + 24 + 16 * <uint64_t> i, &word, 8)
    if shape & 0x20:
        data += take_u8(g)
    for i in range(1 + (shape >> 6)):
        made[n].addr = PLAIN_GPA + (at + 16 if kind & 8 else 0x400 * take_u8(g) % PLAIN_SIZE)
        made[n].len = data if i == 0 else take_u8(g)
        made[n].flags = DESC_F_NEXT | (DESC_F_WRITE if shape & 0x10 else 0)
        n += 1
    made[n].addr = PLAIN_GPA + take_u16(g) % PLAIN_SIZE
    made[n].len = 1 + (first >> 4) // 12
    made[n].flags = DESC_F_WRITE
    n += 1
    while n > t.ring.vq.num:
        n -= 1
    made[n - 1].flags &= ~<uint16_t> DESC_F_NEXT
    for i in range(n):
        made[i].next = <uint16_t> ((first + i + 1) % t.ring.vq.num)
    if t.ring.vq.packed:
        offer_position(g, 0, made, n)
        return
    for i in range(n):
        put_descriptor(g, 0, first + i, &made[i])
    offer_head(g, 0, <uint16_t> (first % t.ring.vq.num))


cdef void run_items(rig *t) noexcept nogil:
    """Run the ring's work item, again while it says that there is more."""
    cdef int _i
    cdef int result
    for _i in range(ITEMS_MAX):
        if not t.ring.active:
            return
        result = t.ring.handler(&t.ring, work)
        if result == BROKEN:
            must(&t.g, t.ring.vq.broken, "a whole ring is called broken")
            t.ring.active = 0
        if result != MORE:
            return


cdef void step(rig *t) noexcept nogil:
    """One thing that the driver or the worker does."""
    cdef guest *g = &t.g
    cdef uint8_t kind = take_u8(g)
    cdef uint8_t what = kind & 0x0F
    cdef uint8_t i
    cdef vring_desc d
    if what < 8:
        send_request(t, kind >> 4)
    elif what == 8:
        i = take_u8(g)
        offer_chain(g, 0, 1 + (kind >> 4), i, take_u8(g) % 17)
    elif what == 9:
        i = take_u8(g)
        choose_descriptor(g, &d)
        put_entry(g, 0, kind >> 4, i, &d)
    elif what == 10:
        i = take_u8(g)
        choose_descriptor(g, &d)
        put_descriptor(g, 0, i, &d)
        if not t.ring.vq.packed:
            offer_head(g, 0, i)
    elif what == 11:
        scribble(g)
    else:
        run_items(t)


cdef object run(const uint8_t *data, size_t size):
    """One execution. Returns what did not hold, None: everything did."""
    cdef rig t
    cdef guest *g = &t.g
    cdef ring_config config
    cdef uint8_t options, kind, num
    cdef bint packed
    cdef int _i
    global current
    memset(&t, 0, sizeof(rig))
    make_guest(g, data, size)
    options = take_u8(g)
    num = take_u8(g)
    kind = options & 3
    packed = options & 4
    g.flips = options & 8
    g.pattern = take_u64(g) if g.flips else 0
    make_ring(g, 0, 1 + num % 64 if packed else <uint32_t> 1 << num % 7, packed, POSITION_WRAP if packed else 0)
    make_memory(g)
    devices.reset()
    memset(&config, 0, sizeof(config))
    (<Backend> devices.backends[kind]).serve(&config, 0, True)
    t.ring.partner = &t.ring
    t.ring.start_id = 1
    t.ring.dev = &t.dev
    t.dev.memory = <void *> devices.memory
    t.ring.active = config.active
    t.ring.handler = config.handler
    t.ring.backend = config.backend
    work.rings = &t.ring
    work.queue = queue
    work.queue_head = work.queue_tail = 0
    t.log.pages = 8 * LOG_BYTES
    t.log.bits = <uint8_t *> calloc(1, LOG_BYTES)
    if options & 0x10:
        t.ring.vq.log = &t.log
        t.ring.vq.log_used = 1
        t.ring.vq.log_used_gpa = g.regions[DEVICE].gpa
    attach_ring(g, 0, &t.ring.vq, <uint64_t> (options >> 5 & 3) << F_INDIRECT)
    current = &t
    with nogil:
        for _i in range(STEPS_MAX):
            if g.at >= g.end or g.wrong is not NULL:
                break
            step(&t)
        run_items(&t)
    current = NULL
    if options & 0x10 and g.wrong is NULL:
        check_logged(g, &t.log)
    free(t.log.bits)
    free_guest(g)
    return devices.verdict(kind) if g.wrong is NULL else g.wrong.decode()


cdef int fuzz(const uint8_t *data, size_t size) noexcept:
    global last_line
    last_line = 0
    try:
        PyEval_SetTrace(count_line, NULL)
        wrong = run(data, size)
        PyEval_SetTrace(NULL, NULL)
        if wrong is not None:
            text = wrong.encode()
            return report(text)
    except BaseException as error:
        return report_exception(error)
    return 0


def entry(str target):
    """Return the address of the target's function for libFuzzer, which calls it with the GIL."""
    global devices, lines
    devices = Devices()
    hook_looks(looked)
    lines = <uint8_t *> dlsym(RTLD_DEFAULT, "vmp_fuzz_lines")
    return <uintptr_t> <void *> fuzz


def replay(str target, bytes data):
    """Run one input. Returns what did not hold, None: everything did."""
    global devices
    devices = Devices()
    try:
        return run(data, len(data))
    finally:
        devices.close()
        devices = None
