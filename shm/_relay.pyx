"""The relay of a device in post-copy: faults of the workers become faults of the pager, which the front-end is told of.

Why. A front-end reads faults from *one* userfaultfd and wakes who waits by it; guest memory is mapped by several
workers, each in an address space of its own. So the one that the front-end is given belongs to another process, the
*pager* (workers/pager.py), which maps guest memory too and does nothing but touch pages that it is asked to.

A page's way: a worker touches it and waits; its userfaultfd, which we hold, says where; we look up which place of the
pager's mapping that is and ask the pager; one of its threads touches it, the front-end is told by the pager's
userfaultfd, puts the page into the shared file and wakes that thread; the pager says so; we wake every worker's mapping
of that page, and a worker that tries again finds it. A page that is there already takes the same way without waiting.

Rules:

- One thread, without the GIL, which waits for nothing but events; Python threads come in only to `add`, `drop` and ask.
- A page is asked for once, however many wait for it. So many can be asked for at once as there may be workers: the
  pager has a thread for each, and one that is never answered keeps nobody else waiting.
- A userfaultfd that is handed over has its faults kept by the kernel until it is read: none is lost in between.
- Addresses that a worker names are its own affair, nothing is read or written there: they are looked up among the
  ranges that it said it has, and only places inside of the regions are asked for. One that breaks this is killed.
- A worker that waits for a page which will not come is killed, never released: what it was doing with the page (a frame
  half sent, a block half written) must not be done with zeroes. It is replaced as after any death. See `abandon`.
- The lock is never held during a system call that could wait, however a worker has left the mode of its descriptor.
"""

cimport cython
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset, strerror
from posix.unistd cimport close, read, write

import fcntl
import os

from vhostmp.errors import LocalError, SysError

cdef extern from *:
    """
    #include <linux/userfaultfd.h>
    #include <signal.h>
    #include <sys/ioctl.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    static inline int vmp_kill(int pidfd) {
        return (int) syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, (void *) 0, 0);
    }
    static inline uint64_t vmp_fault_address(const struct uffd_msg *msg) {
        return msg->arg.pagefault.address;
    }
    """
    struct uffd_msg:
        uint8_t event
    struct uffdio_range:
        uint64_t start
        uint64_t len
    unsigned long UFFDIO_WAKE
    uint8_t UFFD_EVENT_PAGEFAULT
    int ioctl(int fd, unsigned long request, ...) nogil
    int vmp_kill(int pidfd) nogil
    uint64_t vmp_fault_address(const uffd_msg *msg) nogil
    int MSG_DONTWAIT, MSG_NOSIGNAL
    ssize_t send(int fd, const void *data, size_t size, int flags) nogil
    ssize_t recv(int fd, void *data, size_t size, int flags) nogil

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *lock, const void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *lock)
    int pthread_mutex_lock(pthread_mutex_t *lock)
    int pthread_mutex_unlock(pthread_mutex_t *lock)

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint32_t u32
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)
    int EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CLOEXEC
    uint32_t EPOLLIN

cdef enum:
    PAGE_BYTES = 4096           # the kernel names a missing huge page by its first 4 KiB
    WORKERS = 64                # as many as a pool may have: a bit each in request.workers
    REQUESTS_MAX = 128          # several threads of each worker; above that somebody means harm
    EVENTS = 16
    PAGER = 0xFFFFFFFF          # what an event is of: a source by its place, or one of these
    QUIT = 0xFFFFFFFE


cdef struct vmp_range:          # a mapping of a worker
    uint64_t start              # where the worker has it
    uint64_t first              # offsets from there, bytes: from which on,
    uint64_t end                # and up to which, a guest may use it
    uint64_t target             # the pager's address of what the worker has at `start`


cdef struct vmp_source:
    int uffd                    # of a worker, ours; -1: the place is free
    int pidfd                   # of that worker, ours
    uint32_t worker
    uint32_t pid                # of that worker
    uint32_t n
    uint64_t key                # the memory table
    vmp_range *ranges
    bint busy                   # the thread reads from it, without the lock
    bint gone                   # it was dropped meanwhile: the thread closes it


cdef struct vmp_request:
    uint64_t address            # of the pager: what it was asked to touch
    uint64_t workers            # who waits, a bit each


cdef struct vmp_relay:
    pthread_mutex_t lock
    int epoll
    int quit                    # eventfd that ends the thread
    int pager                   # socket to the pager
    int notice                  # eventfd that says that the pager is lost
    bint lost
    bint abandoned
    vmp_source *sources
    uint32_t n_sources
    vmp_request requests[REQUESTS_MAX]
    uint32_t n_requests
    uint64_t faults             # events of workers
    uint64_t pages              # touches of the pager that came back
    uint64_t killed             # workers, by us


cdef void free_source(vmp_source *source) noexcept nogil:
    """Closing the userfaultfd, whose last descriptor it is, releases who waits."""
    close(source.uffd)
    close(source.pidfd)
    free(source.ranges)
    memset(source, 0, sizeof(vmp_source))
    source.uffd = -1


cdef void kill_worker(vmp_relay *r, const vmp_source *source) noexcept nogil:
    vmp_kill(source.pidfd)
    r.killed += 1


cdef void lose_pager(vmp_relay *r) noexcept nogil:
    """The pager is gone, and with it what would bring pages: whoever watches `notice` has to end the post-copy."""
    cdef uint64_t one = 1
    if not r.lost:
        r.lost = True
        epoll_ctl(r.epoll, EPOLL_CTL_DEL, r.pager, NULL)
        write(r.notice, &one, sizeof(one))


cdef void ask(vmp_relay *r, const vmp_source *source, uint64_t fault) noexcept nogil:
    """Ask the pager for the page at a worker's address, unless that was done. Under the lock."""
    cdef uint64_t address = 0
    cdef uint64_t bit = <uint64_t> 1 << source.worker
    cdef uint64_t offset
    cdef uint32_t i
    r.faults += 1
    for i in range(source.n):
        offset = fault - source.ranges[i].start
        if source.ranges[i].first <= offset < source.ranges[i].end:
            address = (source.ranges[i].target + offset) & ~<uint64_t> (PAGE_BYTES - 1)
            break
    else:
        kill_worker(r, source)
        return
    for i in range(r.n_requests):
        if r.requests[i].address == address:
            r.requests[i].workers |= bit
            break
    else:
        if r.n_requests == REQUESTS_MAX:
            kill_worker(r, source)
            return
        r.requests[r.n_requests].address = address
        r.requests[r.n_requests].workers = bit
        r.n_requests += 1
        if not r.lost and send(r.pager, &address, sizeof(address), MSG_DONTWAIT | MSG_NOSIGNAL) != sizeof(address):
            lose_pager(r)
    if r.abandoned:
        kill_worker(r, source)


cdef void wake(vmp_relay *r, uint64_t address) noexcept nogil:
    """A page is there: wake every worker that may wait for it. Under the lock."""
    cdef uffdio_range woken
    cdef uint64_t offset
    cdef vmp_source *source
    cdef uint32_t i, k
    for i in range(r.n_requests):
        if r.requests[i].address == address:
            break
    else:
        return          # nobody asked for it
    r.pages += 1
    r.n_requests -= 1
    r.requests[i] = r.requests[r.n_requests]
    for i in range(r.n_sources):
        source = &r.sources[i]
        if source.uffd < 0 or source.gone:
            continue
        for k in range(source.n):
            # Targets are page-aligned where starts are: a page of ours is a page of theirs.
            offset = address - source.ranges[k].target
            if offset < source.ranges[k].end:
                woken.start = source.ranges[k].start + offset
                woken.len = PAGE_BYTES
                ioctl(source.uffd, UFFDIO_WAKE, &woken)


cdef void take_answers(vmp_relay *r) noexcept nogil:
    """Under the lock."""
    cdef uint64_t address
    cdef ssize_t got
    while not r.lost:
        got = recv(r.pager, &address, sizeof(address), MSG_DONTWAIT)
        if got == sizeof(address):
            wake(r, address)
        elif got < 0 and errno == EAGAIN:
            return
        elif got >= 0 or errno != EINTR:
            lose_pager(r)


cdef void take_fault(vmp_relay *r, uint32_t place) noexcept nogil:
    """Read one event of a source. Under the lock, but for the read: the worker could have made that one that waits."""
    cdef uffd_msg message
    cdef int fd
    cdef ssize_t got
    if place >= r.n_sources or r.sources[place].uffd < 0:
        return          # dropped since the event
    r.sources[place].busy = True
    fd = r.sources[place].uffd
    pthread_mutex_unlock(&r.lock)
    got = read(fd, &message, sizeof(message))
    pthread_mutex_lock(&r.lock)
    r.sources[place].busy = False
    if r.sources[place].gone:
        free_source(&r.sources[place])
    elif got == sizeof(message) and message.event == UFFD_EVENT_PAGEFAULT:
        ask(r, &r.sources[place], vmp_fault_address(&message))
    elif got == 0 or (got < 0 and errno != EAGAIN and errno != EINTR):
        epoll_ctl(r.epoll, EPOLL_CTL_DEL, fd, NULL)     # it will say nothing any more


cdef void relay_run(vmp_relay *r) noexcept nogil:
    cdef epoll_event events[EVENTS]
    cdef int i, n
    cdef bint more = True
    while more:
        n = epoll_wait(r.epoll, events, EVENTS, -1)
        pthread_mutex_lock(&r.lock)
        for i in range(n):
            if events[i].data.u32 == QUIT:
                more = False
            elif events[i].data.u32 == PAGER:
                take_answers(r)
            else:
                take_fault(r, events[i].data.u32)
        pthread_mutex_unlock(&r.lock)


@cython.no_gc_clear
cdef class Relay:
    """The relay of one device, from the start of its post-copy to the end. Control side; any thread."""

    cdef vmp_relay r
    cdef bint _closed

    def __cinit__(self):
        self.r.epoll = self.r.quit = self.r.notice = self.r.pager = -1
        pthread_mutex_init(&self.r.lock, NULL)

    def __init__(self, int pager, int notice):
        """Begin, with a socket of which the pager has the other end, and an eventfd to signal when that is gone.

        Both are duplicated. OSError when that fails.
        """
        self.r.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.r.epoll < 0:
            raise SysError(f"cannot make an epoll descriptor: {strerror(errno).decode()}", errno)
        self.r.quit = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.r.notice = fcntl.fcntl(notice, fcntl.F_DUPFD_CLOEXEC, 3)
        self.r.pager = fcntl.fcntl(pager, fcntl.F_DUPFD_CLOEXEC, 3)
        self._watch(self.r.quit, QUIT)
        self._watch(self.r.pager, PAGER)

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.r.n_sources):
            if self.r.sources[i].uffd >= 0:
                free_source(&self.r.sources[i])
        free(self.r.sources)
        self._release()
        pthread_mutex_destroy(&self.r.lock)

    cdef _release(self):
        """Close our descriptors: the thread has ended, or never was."""
        for fd in (self.r.epoll, self.r.quit, self.r.notice, self.r.pager):
            if fd >= 0:
                close(fd)
        self.r.epoll = self.r.quit = self.r.notice = self.r.pager = -1

    cdef _watch(self, int fd, uint32_t place):
        cdef epoll_event event
        event.events = EPOLLIN
        event.data.u32 = place
        if epoll_ctl(self.r.epoll, EPOLL_CTL_ADD, fd, &event) < 0:
            raise SysError(f"cannot watch a descriptor: {strerror(errno).decode()}", errno)

    def run(self):
        """Be the relay's thread. Returns after `close`."""
        with nogil:
            relay_run(&self.r)
        self._release()

    @property
    def faults(self):
        """How many faults of workers were read."""
        return self.r.faults

    @property
    def pages(self):
        """How many pages were asked for and have come."""
        return self.r.pages

    @property
    def killed(self):
        """How many times a worker was killed: since its page will not come, or since it broke the rules above."""
        return self.r.killed

    @property
    def closed(self):
        """Whether it has ended."""
        return self._closed

    def waits(self, uint32_t worker):
        """Return whether a worker (its slot) waits for a page, as far as is known."""
        cdef bint found = False
        cdef uint32_t i
        with nogil:
            pthread_mutex_lock(&self.r.lock)
            for i in range(self.r.n_requests):
                if self.r.requests[i].workers >> worker & 1:
                    found = True
            pthread_mutex_unlock(&self.r.lock)
        return found

    def add(self, uint32_t worker, uint32_t pid, uint64_t key, int uffd, int pidfd, ranges):
        """Take up a worker's mappings of memory table `key`, in place of those that an earlier one in its slot had.

        `uffd` is taken over, whatever happens; `pidfd` is borrowed. `ranges`: of each mapping (start, first, end,
        target) as in vmp_range, bytes, all multiples of 4096.
        Raises: LocalError: it is not a userfaultfd, or there is no such slot; SysError, MemoryError.
        """
        cdef vmp_source source
        cdef vmp_source *grown
        cdef uint32_t place
        cdef uint32_t i
        cdef bint full
        cdef bint known = False
        memset(&source, 0, sizeof(source))
        source.uffd = uffd
        source.pidfd = -1
        try:
            if worker >= WORKERS:
                raise LocalError(f"worker slot {worker} is not one of {WORKERS}")
            if os.readlink(f"/proc/self/fd/{uffd}") != "anon_inode:[userfaultfd]":
                raise LocalError(f"what worker {worker} sent is not a userfaultfd")
            os.set_blocking(uffd, False)
            source.pidfd = fcntl.fcntl(pidfd, fcntl.F_DUPFD_CLOEXEC, 3)
            source.worker = worker
            source.pid = pid
            source.key = key
            source.ranges = <vmp_range *> calloc(max(1, len(ranges)), sizeof(vmp_range))
            if source.ranges is NULL:
                raise MemoryError
            for start, first, end, target in ranges:
                source.ranges[source.n] = vmp_range(start, first, end, target)
                source.n += 1
            with nogil:
                pthread_mutex_lock(&self.r.lock)
                for place in range(self.r.n_sources):
                    if self.r.sources[place].worker == worker and self.r.sources[place].pid == pid:
                        known = True
                if not known:                           # whoever had the slot and may have waited is dead
                    for i in range(self.r.n_requests):
                        self.r.requests[i].workers &= ~(<uint64_t> 1 << worker)
                pthread_mutex_unlock(&self.r.lock)
            self._drop(key, worker)
            with nogil:
                pthread_mutex_lock(&self.r.lock)
                for place in range(self.r.n_sources):
                    if self.r.sources[place].uffd < 0:
                        break
                else:
                    place = self.r.n_sources
                full = place == self.r.n_sources
                if full:
                    grown = <vmp_source *> realloc(self.r.sources, (place + 1) * sizeof(vmp_source))
                    if grown is not NULL:
                        self.r.sources = grown
                        self.r.n_sources += 1
                        full = False
                if not full:
                    self.r.sources[place] = source
                pthread_mutex_unlock(&self.r.lock)
            if full:
                raise MemoryError
        except BaseException:
            free_source(&source)
            raise
        self._watch(uffd, place)        # what waits in it already is an event now

    def drop(self, uint64_t key):
        """Forget memory table `key`: no worker uses it, or all its pages are there. Who waits in it goes on."""
        self._drop(key, -1)

    cdef _drop(self, uint64_t key, int worker):
        cdef vmp_source *source
        cdef uint32_t i
        with nogil:
            pthread_mutex_lock(&self.r.lock)
            for i in range(self.r.n_sources):
                source = &self.r.sources[i]
                if source.uffd < 0 or source.key != key or (worker >= 0 and source.worker != <uint32_t> worker):
                    continue
                epoll_ctl(self.r.epoll, EPOLL_CTL_DEL, source.uffd, NULL)
                if source.busy:
                    source.gone = True
                else:
                    free_source(source)
            pthread_mutex_unlock(&self.r.lock)

    def abandon(self):
        """The front-end will bring no more pages: kill every worker that waits for one, and every one that will."""
        cdef uint32_t i
        cdef uint64_t waiting = 0
        with nogil:
            pthread_mutex_lock(&self.r.lock)
            self.r.abandoned = True
            for i in range(self.r.n_requests):
                waiting |= self.r.requests[i].workers
            for i in range(self.r.n_sources):
                if self.r.sources[i].uffd >= 0 and waiting >> self.r.sources[i].worker & 1:
                    waiting &= ~(<uint64_t> 1 << self.r.sources[i].worker)
                    kill_worker(&self.r, &self.r.sources[i])
            pthread_mutex_unlock(&self.r.lock)

    def close(self):
        """Drop every source and have the thread end. Idempotent."""
        cdef uint64_t one = 1
        cdef vmp_source *source
        cdef uint32_t i
        if self._closed:
            return
        self._closed = True
        with nogil:
            pthread_mutex_lock(&self.r.lock)
            for i in range(self.r.n_sources):
                source = &self.r.sources[i]
                if source.uffd < 0:
                    continue
                epoll_ctl(self.r.epoll, EPOLL_CTL_DEL, source.uffd, NULL)
                if source.busy:
                    source.gone = True
                else:
                    free_source(source)
            self.r.n_requests = 0
            write(self.r.quit, &one, sizeof(one))
            pthread_mutex_unlock(&self.r.lock)
