"""A device's configuration as this worker has prepared it."""

from libc.stdint cimport uint64_t

from vhostmp.shm._iotlb cimport IotlbTable
from vhostmp.workers._work cimport device_config, ring_config


cdef class Backend:
    cdef readonly object instance       # the Python object behind it; None: there is none
    cdef readonly uint64_t link         # the patch that its rings are ends of (_patch.pxd); 0: none

    cdef int configure(self, device_config *c) except -1
    cdef int partner(self, int index)
    cdef int serve(self, ring_config *rc, int index, bint enabled) except -1
    cdef bint drains(self, int index)


cdef class DeviceConfig:
    cdef device_config c
    cdef readonly object memory         # MemoryMap; kept alive as long as the configuration
    cdef readonly object dirty_log      # LogMap, None: nothing is logged
    cdef readonly Backend backend
    cdef readonly Backend draining
    cdef readonly object inflight       # FileMap, None: the front-end does not keep it. Kept alive like the memory
    cdef readonly IotlbTable iotlb      # None: no IOMMU. Kept alive like the memory
