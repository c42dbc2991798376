"""The compiled read-copy-update domain (epoch.h): the read side for the worker's loop, and what the update side needs.

A read-side section is one work item of one worker. The worker's slot holds a sequence number: odd inside a section,
even outside. Nothing is nested: a worker runs one item at a time. A worker that goes from one item to the next stays
inside until somebody waits for the section's end (`section_pass`): nobody pays for a boundary that nobody looks at.
"""

from libc.stdint cimport uint64_t

from vhostmp.shm.layout cimport vmp_worker


cdef extern from "epoch.h" nogil:
    void section_enter "vmp_section_enter" (vmp_worker *slot)
    void section_exit "vmp_section_exit" (vmp_worker *slot)
    void section_pass "vmp_section_pass" (vmp_worker *slot)
    void begin_scan "vmp_begin_scan" ()
    int wait_for_reader "vmp_wait_for_reader" (vmp_worker *slot, int pidfd, uint64_t deadline_ns)
    int READER_STUCK "VMP_READER_STUCK"
