"""A device's configuration as this worker has prepared it."""

from vhostmp.workers._work cimport device_config, handler_t


cdef class Backend:
    cdef readonly str kind
    cdef readonly object instance       # the Python object of a python back-end
    cdef handler_t transmit
    cdef handler_t receive
    cdef dict ports                     # queue pair -> PythonPort, or the address of an fd_port

    cdef void *port(self, int pair) except? NULL


cdef class DeviceConfig:
    cdef device_config c
    cdef readonly object memory         # MemoryMap; kept alive as long as the configuration
    cdef readonly Backend backend
