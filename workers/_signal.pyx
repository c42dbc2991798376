"""Signals to eventfds of the front-end's, without ever sleeping in one.

An eventfd whose counter is full puts who writes to it to sleep, unless its file has O_NONBLOCK. That flag and the
counter are the front-end's to change at any time, in another thread too: a look beforehand (poll, fcntl) settles
nothing, and eventfd takes no RWF_NOWAIT for writing. The kernel itself signals an eventfd without sleeping, up to a
full counter: so it is asked to do that, by an asynchronous request which names the eventfd as the one to be told of its
completion (io_submit(2), IOCB_FLAG_RESFD), and which is complete when it is submitted: a poll of an eventfd of our own
that is always readable. It costs about as much as a look and a write.

Where the kernel or a sandbox refuses that, a look and a write it is; a front-end that clears the flag and fills the
counter between the two then has its worker sleep until it reads.
"""

from libc.errno cimport EAGAIN, errno
from libc.stdint cimport int16_t, int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport getpid, write

import os

cdef extern from "<linux/aio_abi.h>" nogil:
    ctypedef unsigned long aio_context_t
    struct iocb:
        uint16_t aio_lio_opcode
        uint32_t aio_fildes
        uint64_t aio_buf
        uint32_t aio_flags
        uint32_t aio_resfd
    struct io_event:
        int64_t res
    int IOCB_FLAG_RESFD
    int IOCB_CMD_POLL

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_io_setup, SYS_io_submit, SYS_io_getevents

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        int16_t events
        int16_t revents
    int poll(pollfd *fds, unsigned long n, int timeout)
    int POLLIN, POLLOUT

cdef enum:
    COMPLETIONS = 64        # that are left lying until there are so many

cdef uint64_t ONE = 1
# Of this process, and nothing else is: it belongs to the address space, and a child made by fork has none.
cdef aio_context_t context = 0
cdef int always_readable = -1
cdef int owner = 0


def begin():
    """Get ready to signal in this process: a worker does before it serves rings.

    Returns whether the kernel signals for us; without that a look and a write have to do.
    """
    global context, always_readable, owner
    cdef aio_context_t made = 0
    if owner == getpid():
        return context != 0
    owner = getpid()
    context = 0
    if always_readable < 0:
        always_readable = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    if syscall(SYS_io_setup, COMPLETIONS, &made) == 0:
        context = made
    return context != 0


def signal(int fd):
    """Add 1 to an eventfd of the front-end's. Never sleeps; what is no eventfd is left alone."""
    begin()
    with nogil:
        signal_eventfd(fd)


cdef bint submit(int fd) noexcept nogil:
    """Have the kernel signal it. False when it does not."""
    cdef iocb request
    cdef iocb *requests = &request
    cdef io_event[COMPLETIONS] done
    cdef timespec at_once
    cdef int _i
    memset(&request, 0, sizeof(request))
    request.aio_lio_opcode = IOCB_CMD_POLL
    request.aio_fildes = <uint32_t> always_readable
    request.aio_buf = POLLIN
    request.aio_flags = IOCB_FLAG_RESFD
    request.aio_resfd = <uint32_t> fd
    at_once.tv_sec = at_once.tv_nsec = 0
    for _i in range(2):
        if syscall(SYS_io_submit, context, <long> 1, &requests) == 1:
            return True
        if errno != EAGAIN:
            return False
        # No room for more completions. Nobody wants them.
        while syscall(SYS_io_getevents, context, <long> 0, <long> COMPLETIONS, done, &at_once) == COMPLETIONS:
            pass
    return False


cdef void signal_eventfd(int fd) noexcept nogil:
    """Add 1 to an eventfd of the front-end's, whatever it has made of it."""
    cdef pollfd p
    if context and submit(fd):
        return
    p.fd = fd
    p.events = POLLOUT
    p.revents = 0
    if poll(&p, 1, 0) == 1 and p.revents & POLLOUT:
        write(fd, &ONE, sizeof(ONE))
