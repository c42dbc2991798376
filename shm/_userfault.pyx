"""userfaultfd: who touches a page that is missing waits, and somebody else is told which page and wakes them.

A userfaultfd belongs to the address space of the process that made it, wherever its descriptor has gone: mappings are
registered with it, a fault in one of them is an event that is read from it. What waits is the thread that touched the
page, in user mode or in a system call of it. A page of a shared file (memfd, POSIX shm, hugetlbfs) is missing while the
file has none there; once somebody else has put one there a wake-up is enough, and the thread finds it.

It ends for all mappings of a process when the last descriptor of its userfaultfd is closed: who waits then goes on, and
what is missing reads as zeroes.

Source: userfaultfd(2), ioctl_userfaultfd(2); Linux fs/userfaultfd.c.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport strerror
from posix.unistd cimport close

from vhostmp.errors import LocalError, SysError

cdef extern from *:
    """
    #include <linux/userfaultfd.h>
    #include <sys/ioctl.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #ifndef USERFAULTFD_IOC_NEW
    #define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
    #endif
    static inline int vmp_new_userfaultfd(int device, int flags) {
        return device < 0 ? (int) syscall(SYS_userfaultfd, flags) : ioctl(device, USERFAULTFD_IOC_NEW, flags);
    }
    """
    struct uffdio_api:
        uint64_t api
        uint64_t features
    struct uffdio_range:
        uint64_t start
        uint64_t len
    struct uffdio_register:
        uffdio_range range
        uint64_t mode
    uint64_t UFFD_API, UFFD_FEATURE_MISSING_SHMEM, UFFDIO_REGISTER_MODE_MISSING
    unsigned long UFFDIO_API, UFFDIO_REGISTER
    int ioctl(int fd, unsigned long request, ...) nogil
    int vmp_new_userfaultfd(int device, int flags) nogil
    int MSG_NOSIGNAL
    ssize_t send(int fd, const void *data, size_t size, int flags) nogil
    ssize_t recv(int fd, void *data, size_t size, int flags) nogil

cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC, O_NONBLOCK


def new_userfaultfd(int device=-1):
    """Make a userfaultfd of this process: non-blocking, close-on-exec, told of faults in system calls too.

    `device`: a descriptor of /dev/userfaultfd, for a process that may not use the system call; -1: use that.
    Raises: SysError: EPERM when neither is allowed, ENOSYS when the kernel has none for shared memory.
    """
    cdef uffdio_api api = uffdio_api(UFFD_API, 0)
    cdef int number
    # Not USER_MODE_ONLY: a tap's readv into guest memory faults in the kernel.
    cdef int fd = vmp_new_userfaultfd(device, O_CLOEXEC | O_NONBLOCK)
    if fd < 0:
        number = errno
        raise SysError(f"cannot make a userfaultfd: {strerror(number).decode()}", number)
    if ioctl(fd, UFFDIO_API, &api) < 0 or not api.features & UFFD_FEATURE_MISSING_SHMEM:
        close(fd)
        raise SysError("the kernel has no userfaultfd for shared memory: Linux 4.11 has")
    return fd


def register_missing(int fd, uint64_t start, uint64_t length):
    """Have faults in a mapping of the userfaultfd's process wait, from now on, for a page that is missing.

    Bytes, both multiples of the page size. LocalError when the kernel cannot do it there: in a file of a file system.
    """
    cdef uffdio_register registered
    cdef int number
    registered.range.start = start
    registered.range.len = length
    registered.mode = UFFDIO_REGISTER_MODE_MISSING
    if ioctl(fd, UFFDIO_REGISTER, &registered) < 0:
        number = errno
        raise LocalError(
            f"guest memory cannot be paged in: {strerror(number).decode()}: use memfd, POSIX shm or hugetlbfs", number
        )


def serve_touches(int sock):
    """Touch the pages whose addresses come from `sock`, one after the other; send each address back when it is done.

    Any number of threads may do so on one SOCK_SEQPACKET socket: each takes the next address. A touch waits as long as
    the page is missing. Returns when the other end is closed. An address that is not mapped ends the process.
    """
    cdef uint64_t address
    cdef ssize_t got
    with nogil:
        while True:
            got = recv(sock, &address, sizeof(address), 0)
            if got < 0 and errno == EINTR:
                continue
            if got != sizeof(address):
                break
            (<volatile uint8_t *> address)[0]
            if send(sock, &address, sizeof(address), MSG_NOSIGNAL) != sizeof(address):
                break
