"""Handlers of back-ends that are a descriptor which carries one frame a call: tap and packet socket."""

from libc.stdint cimport uint8_t, uint32_t

from vhostmp.workers._work cimport worker, wring


cdef struct fd_port:
    # One queue pair's descriptor. Made by the channel thread, then the data thread's alone.
    int fd
    uint32_t header_len         # bytes of virtio_net_hdr that the descriptor takes and gives
    uint32_t want               # bytes of receive buffer for any frame that may come, header included
    uint32_t pending_len        # bytes of a frame that came without enough buffers for it; 0: none
    uint8_t *pending            # SCRATCH_SIZE bytes, contiguous, header of the guest's length first
    uint8_t is_packet           # a packet socket: recvmsg tells truncated frames


cdef int fd_transmit(wring *r, worker *w) noexcept nogil
cdef int fd_receive(wring *r, worker *w) noexcept nogil
cdef fd_port *fd_port_new(int fd, uint32_t header_len, uint32_t want, bint is_packet) except NULL
cdef void fd_port_free(fd_port *port) noexcept nogil
cdef list fd_port_left(fd_port *port)
cdef fd_port_put_back(fd_port *port, bytes frame, uint32_t header_len)
