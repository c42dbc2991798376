"""The pager: the process whose page faults a front-end in post-copy is told of. One for each device, while it lasts.

Why a process of its own. The front-end is given the pager's userfaultfd, and with that may do to the pager's address
space what it likes: register any mapping there, fill any page that is missing with bytes of its choice, stop any
thread. So nothing else lives in it; the control process and the workers are out of its reach, and whatever waits in it
ends with it. The control process believes nothing that it says but which page has come (shm/_relay.pyx).

Contexts of execution. *Touching threads*: each takes an address, reads a byte there, which waits in the kernel until
the front-end has brought the page, and says so. *Main thread*: answers the control process. Mappings are only ever
added: nothing is unmapped under a thread that waits in it.

Messages (see channel.py): `{"op": "userfaultfd"}`, with a descriptor of /dev/userfaultfd where the system call is not
allowed -> `{}` with a userfaultfd, which tells of our faults unless another one is asked for before the first mapping;
`{"op": "map", "region": [gpa, size, uva, mmap_offset]}` with the region's file ->
`{"address": a}`, where the region's first byte is.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import Final

from vhostmp.errors import VhostError, WorkerDied
from vhostmp.shm import layout
from vhostmp.shm._memory import MemoryMap
from vhostmp.shm._userfault import new_userfaultfd, register_missing, serve_touches
from vhostmp.shm.memory import MemoryRegion
from vhostmp.workers import sandbox
from vhostmp.workers.channel import Channel, Message, close_all

#: As many pages can be waited for as there can be workers.
TOUCHING_THREADS: Final = layout.CONSTANTS["WORKERS_MAX"]
STACK_BYTES: Final = 128 * 1024


class Pager:
    """The main thread's state."""

    def __init__(self) -> None:
        """Have no userfaultfd yet."""
        self._userfaultfd = -1
        self._maps: list[MemoryMap] = []

    def answer(self, message: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Do what a message asks for; return the answer, and descriptors to go with it."""
        if message["op"] == "userfaultfd":
            fd = new_userfaultfd(fds[0] if fds else -1)
            if self._userfaultfd >= 0:
                os.close(self._userfaultfd)
            self._userfaultfd = os.dup(fd)
            return {}, [fd]
        gpa, size, uva, offset = message["region"]
        memory = MemoryMap([MemoryRegion(gpa, size, uva, fds[0], offset)])
        for start, length in memory.mappings():
            register_missing(self._userfaultfd, start, length)
        self._maps.append(memory)
        return {"address": memory.translate(gpa, size)}, []


def run(fds: list[int], *, sandboxed: bool) -> int:
    """Be a pager until the channel ends. Called in a process just forked by the spawner.

    `fds` are the channel and the socket of the touching threads. Returns the exit status.
    """
    channel_fd, touches = fds
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sandbox.keep_only(fds)
    channel = Channel(socket.socket(fileno=channel_fd))
    if sandboxed:
        sandbox.restrict()  # before there are threads, which would keep what they have
    threading.stack_size(STACK_BYTES)
    for number in range(TOUCHING_THREADS):
        threading.Thread(target=serve_touches, args=(touches,), name=f"touch{number}", daemon=True).start()
    pager = Pager()
    if sandboxed:
        sandbox.close("pager", channel_fd)
    while True:
        try:
            message, received = channel.receive()
            try:
                answer, sent = pager.answer(message, received)
            except (VhostError, OSError) as error:
                answer, sent = {"error": str(error), "errno": error.errno}, []
            finally:
                close_all(received)
            channel.send(answer, sent)
            close_all(sent)
        except WorkerDied:
            os._exit(0)  # the control process has closed it; threads that wait for pages go with us
