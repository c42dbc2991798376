"""The update side of the read-copy-update domain: publish a generation, wait for a grace period.

Theory of operation. A generation number in the device's slot says which configuration is in force. The update side
stores a new one (`publish`) and then waits until each worker that was inside a read-side section has left it once
(`synchronize`): whoever enters later reads the new generation. A worker outside a section costs nothing, however long
it sleeps. A worker that died is proved dead by its data thread's mark (_life.pyx) or its pidfd and ends its section
with it. A worker that stays inside beyond the time limit is an error that names it; the caller then keeps the old
configuration.

The sequence number is a 32-bit futex word. When it wraps between two looks of one waiter the waiter may think the
section has not ended: it waits for the next change. A wrap makes the barrier late, never early.

What this does not promise: synchronize() does not wait for sections that start after it was called, and it is no lock.
"""

from cpython.buffer cimport Py_buffer, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vhostmp.shm._epoch cimport READER_STUCK, begin_scan, section_enter, section_exit, wait_for_reader
from vhostmp.shm.atomics cimport (
    vmp_load_acquire_u64,
    vmp_load_relaxed_u32,
    vmp_now_ns,
    vmp_store_release_u32,
    vmp_store_release_u64,
)
from vhostmp.shm.layout cimport (
    VMP_DEVICES_MAX,
    VMP_DEVICES_OFFSET,
    VMP_WORKERS_MAX,
    VMP_WORKERS_OFFSET,
    vmp_device,
    vmp_worker,
)

from vhostmp.errors import LocalError, SynchronizeTimeout


cdef class _View:
    """A control segment's buffer, held for the duration of one call."""

    cdef Py_buffer view

    def __cinit__(self, buf):
        PyObject_GetBuffer(buf, &self.view, PyBUF_SIMPLE | PyBUF_WRITABLE)

    def __dealloc__(self):
        PyBuffer_Release(&self.view)

    cdef vmp_worker *worker(self, int index) except NULL:
        if index < 0 or index >= VMP_WORKERS_MAX:
            raise LocalError(f"worker slot {index} is not one of {VMP_WORKERS_MAX}")
        return <vmp_worker *> (<uint8_t *> self.view.buf + VMP_WORKERS_OFFSET) + index

    cdef vmp_device *device(self, int index) except NULL:
        if index < 0 or index >= VMP_DEVICES_MAX:
            raise LocalError(f"device slot {index} is not one of {VMP_DEVICES_MAX}")
        return <vmp_device *> (<uint8_t *> self.view.buf + VMP_DEVICES_OFFSET) + index


def publish(buf, int device, uint64_t generation):
    """Put a device's configuration `generation` in force for every work item that starts from now on.

    Control side. Every worker concerned has acknowledged the preparation of that generation. Cannot fail on a good
    device number (LocalError otherwise).
    """
    cdef _View view = _View(buf)
    # ORDER G1 (updater): the prepared configuration, then store device.generation   [release]
    #   pairs with  G2 (_loop.pyx current_config: load-acquire of device.generation)
    #   without it  a worker may see the number before what it stands for. (The preparation was acknowledged over a
    #               socket, which orders it too; the release makes the argument local.)
    #   shown by    tests/integration/test_swap.py
    vmp_store_release_u64(&view.device(device).generation, generation)


def published(buf, int device):
    """Return the generation in force for a device; 0 when there is none."""
    cdef _View view = _View(buf)
    # ORDER G2 (reader): load device.generation, then use what it stands for        [acquire]
    #   pairs with  G1 (publish)
    return vmp_load_acquire_u64(&view.device(device).generation)


def synchronize(buf, readers, uint64_t timeout_ns):
    """Wait until every worker in `readers` that is inside a read-side section has left it, or is dead.

    Control side, not from inside a section. `readers` is a sequence of (worker slot, pidfd); a pidfd of -1 means that
    nobody can be proved dead. Releases the GIL while it waits.

    Returns: the length of the grace period in nanoseconds.
    Raises: SynchronizeTimeout when a worker is still inside after `timeout_ns`; it names the worker's pid and the ring
    it serves. What it may use must then be kept.
    """
    cdef _View view = _View(buf)
    cdef uint64_t start = vmp_now_ns()
    cdef uint64_t deadline = start + timeout_ns
    cdef vmp_worker *slot
    cdef int pidfd
    cdef int result
    begin_scan()
    for index, reader_pidfd in readers:
        slot = view.worker(index)
        pidfd = reader_pidfd
        with nogil:
            result = wait_for_reader(slot, pidfd, deadline)
        if result == READER_STUCK:
            raise SynchronizeTimeout(
                f"worker {index} (pid {vmp_load_relaxed_u32(&slot.pid)}) is still serving ring "
                f"{<int64_t> vmp_load_relaxed_u32(&slot.doing) - 1}"
                f" after {timeout_ns / 1e9:g} s"
            )
    return vmp_now_ns() - start


def end_section_of_dead(buf, int index):
    """Close the section that a dead worker left open, so that its slot can be used again.

    Control side, after the worker's pidfd proved it dead and before another gets the slot.
    """
    cdef _View view = _View(buf)
    cdef vmp_worker *slot = view.worker(index)
    cdef uint32_t seq = vmp_load_relaxed_u32(&slot.seq)
    if seq & 1:
        # ORDER R3 (updater for a dead reader): its accesses ended with it; the release is for scanners of other threads
        vmp_store_release_u32(&slot.seq, seq + 1)


cdef class ReaderSlot:
    """The read side as a Python object, for tests and for readers other than workers. One thread at a time."""

    cdef _View view
    cdef vmp_worker *slot

    def __init__(self, buf, int index):
        """Use worker slot `index` of the control segment `buf`. LocalError when there is no such slot."""
        self.view = _View(buf)
        self.slot = self.view.worker(index)

    def enter(self):
        """Begin a read-side section."""
        section_enter(self.slot)

    def exit(self):
        """End it."""
        section_exit(self.slot)

    def published(self, int device):
        """Return the generation in force, inside a section: what it stands for is usable until `exit`."""
        # ORDER G2 (reader): as in published()
        return vmp_load_acquire_u64(&self.view.device(device).generation)
