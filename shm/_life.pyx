"""The end of a worker, told by the kernel as it happens; and what the worker could still say of it.

Theory of operation. A process is dead for its pidfd when its address space has been taken apart. That takes tens of
milliseconds, for one that has an asynchronous I/O context (workers/_signal.pyx): the kernel waits for a grace period
of its own. Nobody needs to wait for that. What has to have ended before another process may serve the rings is the
data thread. It holds a *robust futex* in the worker's slot: when the thread ends, of whatever, the kernel marks the
word, after the thread's last instruction and its last system call, and before the address space is touched. `LifeWatch`
sleeps on these words of all workers.

A worker that dies of a fault of its own (a page that is gone, a null pointer, an abort) says so in its slot before it
does: its exit status comes too late for whoever replaces it. Where a work item is about memory of two guests, it also
says whose page is gone (`life_beside`).

Rules: `begin` is the data thread's. The words are the kernel's to mark; a worker that marks its own is killed for it,
as whoever sees the mark does before it replaces a worker. Where the kernel has no futex_waitv (before Linux 5.16) the
watch ends at once, and pidfds have to do.
Source: Linux Documentation/locking/robust-futex-ABI.rst; futex(2); sigaction(2).
"""

from cpython.buffer cimport Py_buffer, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EINTR, errno
from libc.signal cimport SIGABRT, SIGFPE, SIGILL, SIGSEGV, raise_
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.signal cimport SA_RESETHAND, SA_SIGINFO, sigaction, sigaction_t, siginfo_t
from posix.unistd cimport getpid

from vhostmp.shm.atomics cimport (
    VMP_FUTEX_U32,
    vmp_futex_wait_any,
    vmp_futex_waiter,
    vmp_futex_wake_all,
    vmp_load_acquire_u32,
    vmp_load_relaxed_u32,
    vmp_store_relaxed_u32,
    vmp_store_release_u32,
)
from vhostmp.shm.layout cimport VMP_WORKERS_MAX, VMP_WORKERS_OFFSET, vmp_worker

import os

from vhostmp.errors import LocalError

cdef extern from "<linux/futex.h>" nogil:
    struct robust_list:
        robust_list *next
    struct robust_list_head:
        robust_list list
        long futex_offset
        robust_list *list_op_pending
    uint32_t FUTEX_WAITERS, FUTEX_OWNER_DIED

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_set_robust_list, SYS_gettid

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from "<signal.h>" nogil:
    int SIGBUS

cdef enum:
    FAULT_OTHER_THREAD = 0x100  # in slot.fault: it was not the data thread's

OTHER_THREAD = FAULT_OTHER_THREAD

# Of the data thread, for as long as it lives: the kernel reads the list when the thread ends.
cdef robust_list_head held
cdef robust_list entry
cdef vmp_worker *own_slot = NULL
cdef long data_thread = 0
# Also of the data thread: what it works on beside what slot.doing names, and what slot.doing is to be if that is gone.
cdef owns_t beside_owns = NULL
cdef const void *beside = NULL
cdef uint32_t beside_doing = 0


cdef vmp_worker *slot_of(Py_buffer *view, int index) noexcept nogil:
    return <vmp_worker *> (<uint8_t *> view.buf + VMP_WORKERS_OFFSET) + index


cdef void life_beside(owns_t owns, const void *what, uint32_t doing) noexcept nogil:
    """Say that pages of `what` are touched too from now on, as `owns` knows them: slot.doing is `doing` if one is gone.

    The data thread's; NULL: no longer. What `owns` looks at stays as it is meanwhile.
    """
    global beside_owns, beside, beside_doing
    beside_owns = owns
    beside = what
    beside_doing = doing


cdef void note_fault(int number, siginfo_t *info, void *context) noexcept nogil:
    """Leave word of a fault and die of it. What another process sent is no fault of ours."""
    cdef bint ours
    if own_slot is not NULL and (info.si_code > 0 or info.si_pid == getpid()):
        ours = syscall(SYS_gettid) == data_thread
        if ours and number == SIGBUS and info.si_code > 0 and beside_owns is not NULL:
            if beside_owns(beside, info.si_addr):
                vmp_store_relaxed_u32(&own_slot.doing, beside_doing)
        vmp_store_relaxed_u32(&own_slot.fault, <uint32_t> number | (0 if ours else FAULT_OTHER_THREAD))
    # Its action is the default one again (SA_RESETHAND): a fault comes again when this returns, what was sent does not.
    if info.si_code <= 0:
        raise_(number)


def prepare():
    """Have the kernel note the end of this thread, and faults of this process be taken down: from `begin` on.

    Worker side, once, on the data thread, while it may still make such calls. OSError when the kernel refuses.
    """
    global data_thread
    cdef sigaction_t action
    data_thread = syscall(SYS_gettid)
    held.list.next = &held.list
    held.list_op_pending = NULL
    if syscall(SYS_set_robust_list, &held, <unsigned long> sizeof(held)) != 0:
        raise OSError(errno, os.strerror(errno))
    memset(&action, 0, sizeof(action))
    action.sa_sigaction = note_fault
    action.sa_flags = SA_SIGINFO | SA_RESETHAND
    for number in (SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGABRT):
        if sigaction(number, &action, NULL) != 0:
            raise OSError(errno, os.strerror(errno))


def begin(buf, int index):
    """Have the end of this thread, and faults of this process, be seen in worker slot `index` of the control segment.

    Worker side, once, after `prepare`; the segment stays mapped as long as the thread lives. Makes no system call.
    """
    global own_slot
    cdef Py_buffer view
    if not 0 <= index < VMP_WORKERS_MAX:
        raise LocalError(f"worker slot {index} is not one of {VMP_WORKERS_MAX}")
    PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    own_slot = slot_of(&view, index)
    PyBuffer_Release(&view)
    held.futex_offset = <char *> &own_slot.life - <char *> &entry
    entry.next = &held.list
    held.list.next = &entry
    # ORDER K1 (data thread): everything before it, then store slot.life          [release]
    #   pairs with  K2 (has_ended, LifeWatch.wait: load-acquire of slot.life)
    #   without it  the mark, which the kernel adds to this word, could be seen before what the thread did.
    #   not needed  in truth: the kernel marks the word by a compare-and-swap that orders everything before it.
    #   shown by    tests/unit/shm/test_life.py
    vmp_store_release_u32(&own_slot.life, <uint32_t> data_thread | FUTEX_WAITERS)


def has_ended(buf, int index):
    """Whether the data thread that began in worker slot `index` has ended. False where none has begun.

    Control side. True means: it does nothing to guest memory and to its rings any more, ever.
    """
    cdef Py_buffer view
    cdef uint32_t life
    if not 0 <= index < VMP_WORKERS_MAX:
        raise LocalError(f"worker slot {index} is not one of {VMP_WORKERS_MAX}")
    PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE)
    # ORDER K2 (control): load slot.life, then whatever follows from the thread's end        [acquire]
    #   pairs with  K1 (begin: everything the thread did, then the word)
    #   shown by    tests/unit/shm/test_life.py
    life = vmp_load_acquire_u32(&slot_of(&view, index).life)
    PyBuffer_Release(&view)
    return life & FUTEX_OWNER_DIED != 0


cdef class LifeWatch:
    """Sleeps until a worker's data thread ends, whichever it is."""

    cdef Py_buffer view
    cdef bint held
    cdef uint32_t bell
    cdef uint32_t[VMP_WORKERS_MAX] told

    def __cinit__(self):
        self.held = False

    def __init__(self, buf):
        """Watch all worker slots of the control segment `buf`, which is held."""
        PyObject_GetBuffer(buf, &self.view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.held = True
        self.bell = 0
        memset(self.told, 0, sizeof(self.told))

    def __dealloc__(self):
        self.close()

    def close(self):
        """Let go of the segment. `wait` is not called any more. Idempotent."""
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)

    def wait(self):
        """Sleep until one has ended of which this has not returned yet. False: `stop` was called, or it cannot be told.

        One thread calls it, which is without the interpreter's lock meanwhile.
        """
        cdef bint news
        with nogil:
            news = self._wait()
        return news

    cdef bint _wait(self) noexcept nogil:
        cdef vmp_futex_waiter[VMP_WORKERS_MAX + 1] waiters
        cdef uint32_t life
        cdef uint32_t pid
        cdef bint news
        cdef int result
        cdef int i
        memset(waiters, 0, sizeof(waiters))
        for i in range(VMP_WORKERS_MAX):
            waiters[i].word = <uint64_t> &slot_of(&self.view, i).life
            waiters[i].flags = VMP_FUTEX_U32
        waiters[VMP_WORKERS_MAX].word = <uint64_t> &self.bell
        waiters[VMP_WORKERS_MAX].flags = VMP_FUTEX_U32
        while True:
            # ORDER K3 (watch): load bell, before it is slept on                          [acquire]
            #   pairs with  K4 (LifeWatch.stop: bell stored, then woken)
            #   without it  nothing breaks: the kernel compares the word again; it keeps the loop from being hoisted.
            #   shown by    tests/unit/shm/test_life.py
            if vmp_load_acquire_u32(&self.bell):
                return False
            news = False
            for i in range(VMP_WORKERS_MAX):
                # ORDER K2 (control): as above
                life = vmp_load_acquire_u32(&slot_of(&self.view, i).life)
                waiters[i].expected = life
                # The mark takes the place of the thread's id. Whoever ends before its pid was entered is missed here,
                # not by its pidfd.
                pid = vmp_load_relaxed_u32(&slot_of(&self.view, i).pid)
                if life & FUTEX_OWNER_DIED and self.told[i] != pid:
                    self.told[i] = pid
                    news = True
            if news:
                return True
            # A word that changed meanwhile is EAGAIN, a wake-up for nothing costs a look.
            result = vmp_futex_wait_any(waiters, VMP_WORKERS_MAX + 1)
            if result != 0 and result != -EAGAIN and result != -EINTR:
                return False

    def stop(self):
        """Have `wait` return, for good."""
        # ORDER K4 (control): store bell, then wake who sleeps on it                        [release]
        #   pairs with  K3 (LifeWatch.wait: load-acquire of bell)
        #   shown by    tests/unit/shm/test_life.py
        vmp_store_release_u32(&self.bell, 1)
        vmp_futex_wake_all(&self.bell)
