"""The read side of the read-copy-update domain, inlined into the worker's loop.

A read-side section is one work item of one worker. The worker's slot holds a sequence number: odd inside a section,
even outside. Nothing is nested: a worker runs one item at a time.
"""

from vhostmp.shm.atomics cimport (
    uint32_t,
    vmp_exchange_full_u32,
    vmp_fence_full,
    vmp_futex_wake_all,
    vmp_load_relaxed_u32,
    vmp_store_relaxed_u32,
)
from vhostmp.shm.layout cimport vmp_worker


cdef inline void section_enter(vmp_worker *slot) noexcept nogil:
    """Begin a read-side section. What is read from now on stays usable until section_exit."""
    # ORDER R1 (reader): store slot.seq odd, then load device.generation          [full fence between]
    #   pairs with  R2 (_epoch.pyx synchronize: generation published, fence, scan of slot.seq)
    #   without it  the load may pass the store: the scanner sees us idle while we hold the old configuration, it
    #               retires it, we use unmapped memory.
    #   not needed  for the load of slot.seq: only this thread writes it, so relaxed (no order) is enough.
    #   shown by    tests/torture/test_epoch.py::test_no_use_after_retire
    vmp_store_relaxed_u32(&slot.seq, vmp_load_relaxed_u32(&slot.seq) + 1)
    vmp_fence_full()


cdef inline void section_exit(vmp_worker *slot) noexcept nogil:
    """End the section: nothing read inside it may be used any more."""
    # ORDER R3 (reader): every access of the section, then store slot.seq even    [release, part of the exchange]
    #   pairs with  R4 (_epoch.pyx wait_for_reader: load-acquire of slot.seq)
    #   without it  an access of the section may be done after the store: the scanner sees the section ended and
    #               retires what the access still uses.
    #   shown by    tests/torture/test_epoch.py::test_no_use_after_retire
    # ORDER R5 (reader): store slot.seq even, then load slot.waiters               [full, part of the exchange]
    #   pairs with  R6 (_epoch.pyx wait_for_reader: waiters raised, then slot.seq looked at again)
    #   without it  both sides may read the old value: the waiter sleeps on a section that has ended, until its slice
    #               of time is over (late, never wrong).
    #   shown by    tests/torture/test_epoch.py::test_waiter_is_woken
    vmp_exchange_full_u32(&slot.seq, vmp_load_relaxed_u32(&slot.seq) + 1)
    if vmp_load_relaxed_u32(&slot.waiters) != 0:
        vmp_futex_wake_all(&slot.seq)
