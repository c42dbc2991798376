"""Cython's view of build.h: what a build has in it or not."""

from libc.stdint cimport uint32_t

from vhostmp.shm.layout cimport vmp_ring


cdef extern from "build.h" nogil:
    enum:
        VMP_JOURNAL
        VMP_CHECKS
        VMP_COUNTERS
        VMP_KILL_POINTS
    void vmp_kill_point(vmp_ring *slot, uint32_t point)
