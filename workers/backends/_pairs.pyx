"""The back-ends of a network device: its rings come in pairs, an even one receives, the odd one behind it transmits.

Source: virtio 1.3, 5.1.2.
"""

from libc.stdint cimport uint32_t, uintptr_t
from libc.stdlib cimport free, malloc

from vhostmp.workers._config cimport Backend
from vhostmp.workers._work cimport device_config, ring_config, handler_t
from vhostmp.workers.backends._batch cimport BatchPort, batch_transmit
from vhostmp.workers.backends._fd cimport (
    fd_port,
    fd_port_free,
    fd_port_left,
    fd_port_new,
    fd_port_put_back,
    fd_receive,
    fd_transmit,
)
from vhostmp.workers.backends._loopback cimport loopback_receive, loopback_transmit
from vhostmp.workers.backends._null cimport (
    COPIES_SIZE,
    copying_transmit,
    disabled_transmit,
    idle_receive,
    null_transmit,
)
from vhostmp.workers.backends._python cimport PythonPort, python_receive, python_transmit
from vhostmp.workers.backends._source cimport source_free, source_frames, source_new, source_receive

from vhostmp.errors import LocalError
from vhostmp.workers.backends import python_api
from vhostmp.workers.backends.complaints import Complaints

#: The number of each patch that this worker was ever told of, by its ends.
cdef dict links = {}


cdef class NetBackend(Backend):
    """A back-end as one worker has it: its handlers, and a port for each queue pair that the worker serves.

    Ports come and go as pairs are moved between workers. All methods are the channel thread's.
    """

    cdef readonly str kind
    cdef object complaints          # of the instance
    cdef handler_t transmit
    cdef handler_t receive
    cdef uint32_t guest_header      # bytes of virtio_net_hdr in the guest's buffers
    cdef uint32_t header_len        # bytes of it that the descriptors speak
    cdef uint32_t want
    cdef bint is_packet
    cdef source_frames *source
    cdef void *copies               # room for those of a burst, each overwritten by the next
    cdef dict ports                 # queue pair -> PythonPort, or the address of an fd_port

    def __cinit__(self):
        self.ports = {}

    def __init__(
        self,
        str kind,
        *,
        int guest_header=12,
        int header_len=12,
        int want=0,
        bint is_packet=False,
        reference="",
        uint32_t size=0,
        ends=(),
        device="",
    ):
        """Prepare back-end `kind`; `add` gives it queue pairs.

        `guest_header` is the length of the guest's virtio_net_hdr. `fd`: each pair has a non-blocking descriptor (the
        caller's, open as long as the pair is used), `header_len` is the virtio_net_hdr it speaks, `want` the receive
        room for its largest frame. `python`: `reference` names the class, of which one instance is made. `source`:
        frames have `size` bytes. `patch`: `ends` are the names of its devices, the same from both. `device` is the name
        in log lines. Raises LocalError or MemoryError; nothing is left then.
        """
        self.kind = kind
        self.guest_header = guest_header
        self.header_len = header_len
        self.want = want
        self.is_packet = is_packet
        if kind == "null":
            self.transmit = null_transmit
            self.receive = idle_receive
        elif kind == "null-copy":
            self.transmit = copying_transmit
            self.receive = idle_receive
            self.copies = malloc(COPIES_SIZE)
            if self.copies is NULL:
                raise MemoryError
        elif kind == "source":
            self.transmit = null_transmit
            self.receive = source_receive
            self.source = source_new(size)
        elif kind in ("loopback", "patch"):
            if kind == "patch":
                self.link = links.setdefault(tuple(ends), len(links) + 1)
            self.transmit = loopback_transmit
            self.receive = loopback_receive
        elif kind == "fd":
            self.transmit = fd_transmit
            self.receive = fd_receive
        elif kind == "python":
            self.instance = python_api.make(reference, python_api.NET_METHODS)
            self.complaints = Complaints(self.instance, device)
            self.transmit = batch_transmit if python_api.takes_batches(self.instance) else python_transmit
            self.receive = python_receive
        else:
            raise LocalError(f"no back-end of kind {kind!r}")

    def __dealloc__(self):
        source_free(self.source)
        free(self.copies)
        if self.kind == "fd" and self.ports is not None:
            for address in self.ports.values():
                fd_port_free(<fd_port *> <uintptr_t> address)

    cdef int configure(self, device_config *c) except -1:
        c.header_len = self.guest_header
        return 0

    cdef int partner(self, int index):
        return index if self.link else index ^ 1    # of another device: it is found once both are served

    cdef int serve(self, ring_config *rc, int index, bint enabled) except -1:
        if self.kind == "fd":
            rc.backend = <void *> <uintptr_t> self.ports[index // 2]
        elif self.kind == "python":
            rc.backend = <void *> self.ports[index // 2]
        elif self.kind == "source":
            rc.backend = self.source
        elif self.kind == "null-copy":
            rc.backend = self.copies
        if index % 2:
            rc.handler = self.transmit if enabled else disabled_transmit
            rc.active = True
        else:
            rc.handler = self.receive
            rc.active = enabled
        return 0

    cdef bint drains(self, int index):
        return index % 2 == 0

    def add(self, int group, int fd):
        """Make a port for a queue pair. Lists its descriptor: it queues the receive ring, or the other if writable."""
        if self.kind == "fd":
            self.ports[group] = <uintptr_t> fd_port_new(fd, self.header_len, self.want, self.is_packet)
            return [(2 * group, fd)]
        if self.kind == "python":
            port = BatchPort if self.transmit == batch_transmit else PythonPort     # what the handler takes it for
            self.ports[group] = port(self.instance, group, self.complaints)
        return []

    def drop(self, int group):
        """Free a pair's port, if it has one. Lists the frames that it had taken and not delivered, oldest first."""
        port = self.ports.pop(group, None)
        if port is None:
            return []
        if self.kind == "python":
            return (<PythonPort> port).left()
        left = fd_port_left(<fd_port *> <uintptr_t> port)
        fd_port_free(<fd_port *> <uintptr_t> port)
        return left

    def put_back(self, int group, packets):
        """Have a new port deliver first what `drop` listed for the pair in another worker."""
        if self.kind == "fd":
            for frame in packets:
                fd_port_put_back(<fd_port *> <uintptr_t> self.ports[group], frame, self.guest_header)
        elif self.kind == "python":
            (<PythonPort> self.ports[group]).put_back(packets)
