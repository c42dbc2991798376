"""Configurations and back-ends, prepared by the channel thread for the data thread.

Both are immutable once the configuration is published, and freed by Python's reference counts when the channel thread
drops them: a grace period after a later configuration was published. The data thread holds no references.
"""

from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from vhostmp.shm._memory cimport MemoryMap
from vhostmp.workers._vring cimport vring_desc
from vhostmp.workers._work cimport ring_config
from vhostmp.workers.backends._fd cimport fd_port, fd_port_free, fd_port_new, fd_receive, fd_transmit
from vhostmp.workers.backends._loopback cimport loopback_receive, loopback_transmit
from vhostmp.workers.backends._null cimport disabled_transmit, idle_receive, null_transmit
from vhostmp.workers.backends._python cimport PythonPort, python_receive, python_transmit

import errno

from vhostmp.errors import LocalError
from vhostmp.workers.backends import python_api


cdef class Backend:
    """A back-end as one worker has it: its handlers, and a port for each queue pair that the worker serves."""

    def __cinit__(self):
        self.ports = {}

    def __init__(self, str kind, pairs, *, fds=None, int header_len=12, int want=0, bint is_packet=False, reference=""):
        """Prepare back-end `kind` for the queue pairs `pairs`.

        `fd`: `fds` maps each pair to its non-blocking descriptor (the caller's, open as long as the back-end is used),
        `header_len` is the virtio_net_hdr it speaks, `want` the receive room for its largest frame. `python`:
        `reference` names the class, of which one instance is made. Raises LocalError; nothing is left then.
        """
        self.kind = kind
        if kind == "null":
            self.transmit = null_transmit
            self.receive = idle_receive
            self.ports = dict.fromkeys(pairs)
        elif kind == "loopback":
            self.transmit = loopback_transmit
            self.receive = loopback_receive
            self.ports = dict.fromkeys(pairs)
        elif kind == "fd":
            self.transmit = fd_transmit
            self.receive = fd_receive
            for pair in pairs:
                self.ports[pair] = <uintptr_t> fd_port_new(fds[pair], header_len, want, is_packet)
        elif kind == "python":
            self.transmit = python_transmit
            self.receive = python_receive
            found = python_api.load(reference)
            try:
                self.instance = found()
            except Exception as error:
                raise LocalError(
                    f"python back-end {reference!r} does not start: {type(error).__name__}: {error}"
                ) from error
            self.ports = {pair: PythonPort(self.instance, pair) for pair in pairs}
        else:
            raise LocalError(f"no back-end of kind {kind!r}")

    def __dealloc__(self):
        if self.kind == "fd" and self.ports is not None:
            for address in self.ports.values():
                fd_port_free(<fd_port *> <uintptr_t> address)

    cdef void *port(self, int pair) except? NULL:
        if self.kind == "fd":
            return <void *> <uintptr_t> self.ports[pair]
        if self.kind == "python":
            return <void *> self.ports[pair]
        return NULL

    def close(self):
        """Tell a python back-end that it has been replaced. Its errors are the caller's to log."""
        close = getattr(self.instance, "close", None)
        if close is not None:
            close()


cdef class DeviceConfig:
    """One generation of one device, for one worker."""

    def __cinit__(self):
        self.c.rings = NULL

    def __init__(
        self,
        uint64_t generation,
        int first_ring,
        int n_rings,
        uint64_t features,
        int header_len,
        MemoryMap memory,
        Backend backend,
        rings,
    ):
        """Prepare generation `generation` of a device with `n_rings` rings, in slots from `first_ring` on.

        `rings` are those that this worker serves: mappings with index, num, desc, avail, used (front-end addresses),
        enabled, start_id, busyloop_us, and kick, call, err (descriptors or -1). Raises LocalError when a ring's
        addresses are not in guest memory.
        """
        cdef ring_config *rc
        self.c.rings = <ring_config *> calloc(max(1, n_rings), sizeof(ring_config))
        if self.c.rings is NULL:
            raise MemoryError
        self.c.generation = generation
        self.c.features = features
        self.c.header_len = header_len
        self.c.first_ring = first_ring
        self.c.n_rings = n_rings
        self.memory = memory
        self.backend = backend
        self.c.mem = &memory.mem if memory is not None else NULL
        event = 2 if features >> 29 & 1 else 0
        for ring in rings:
            index, num = ring["index"], ring["num"]
            rc = &self.c.rings[index]
            addresses = []
            for name, size, alignment in (
                ("desc", 16 * num, 16),
                ("avail", 4 + 2 * num + event, 2),
                ("used", 4 + 8 * num + event, 4),
            ):
                address = memory.translate_uva(ring[name], size)
                if address is None or address % alignment:
                    raise LocalError(
                        f"ring {index}: {name} at {ring[name]:#x}, {size} bytes, is not in guest memory", errno.EFAULT
                    )
                addresses.append(address)
            rc.desc = <vring_desc *> <uintptr_t> addresses[0]
            rc.avail = <void *> <uintptr_t> addresses[1]
            rc.used = <void *> <uintptr_t> addresses[2]
            rc.num = num
            rc.start_id = ring["start_id"]
            rc.busyloop_ns = <uint64_t> ring["busyloop_us"] * 1000
            rc.kick_fd = ring["kick"]
            rc.call_fd = ring["call"]
            rc.err_fd = ring["err"]
            rc.backend = backend.port(index // 2)
            if index % 2:
                rc.handler = backend.transmit if ring["enabled"] else disabled_transmit
                rc.active = True
            else:
                rc.handler = backend.receive
                rc.active = ring["enabled"]

    def __dealloc__(self):
        free(self.c.rings)
