"""What a device's configuration is made of, control side: immutable states, and the parts they name.

A *part* is something that workers hold too (a memory table mapped, a back-end made, a descriptor): it has an id that is
never used again, it is sent to a worker once, and it owns its descriptors here until no state in force names it.
A *state* is everything that a device's front-end and its back-end have set. Verbs make a new state from the old one;
the flush puts it in force (flush.py).
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from vhostmp.errors import LocalError, SysError
from vhostmp.shm import inflight
from vhostmp.shm.memory import ADDRESS_END, MemoryTable
from vhostmp.workers.channel import close_all

if TYPE_CHECKING:
    from vhostmp.workers.processes import WorkerProcess

LOG_ALL: Final = 1 << 26

#: More ids than are given out between two records: those that a dead control process gave since.
IDS_SINCE: Final = 1 << 16


class _Ids:
    """The count of ids: one in a process."""

    def __init__(self) -> None:
        self.count = itertools.count(1)
        self.last = 0


_ids: Final = _Ids()


def new_id() -> int:
    """Return a number that nothing had before."""
    _ids.last = number = next(_ids.count)
    return number


def last_id() -> int:
    """Return about the last number given out (another thread may be about to get the next), for `skip_ids`."""
    return _ids.last


def skip_ids(last: int) -> None:
    """Give out none any more that a control process before us, which once said `last`, may have given out."""
    _ids.count = itertools.count(max(last + IDS_SINCE, next(_ids.count)))


def duplicate(fd: int) -> int:
    """Duplicate a descriptor, close-on-exec. OSError when it is not open."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


@attrs.frozen(eq=False)
class Part:
    """A part; equal to itself alone. `fds` are owned unless `borrowed`."""

    fds: tuple[int, ...] = ()
    borrowed: bool = False
    id: int = attrs.field(factory=new_id)

    def close(self) -> None:
        """Close what it owns. No state in force names it any more."""
        if not self.borrowed:
            close_all(self.fds)


class Pages(Protocol):
    """What brings the pages of a memory table in post-copy (postcopy.py)."""

    @property
    def active(self) -> bool:
        """Whether it still does: faults in what is mapped now have to be relayed."""
        ...

    def userfault_fds(self) -> list[int]:
        """Return what a process needs to make a userfaultfd, if anything; borrowed."""
        ...

    def add(self, worker: WorkerProcess, table: int, mappings: Any, fds: list[int], /) -> None:
        """Relay a worker's faults in memory table `table`, as it answered: where its regions are, and a userfaultfd."""
        ...

    def drop(self, table: int, /) -> None:
        """Forget a memory table."""
        ...


@attrs.frozen(eq=False)
class MemoryPart(Part):
    """A memory table; `table`'s descriptors are the part's."""

    table: MemoryTable = attrs.field(factory=MemoryTable)
    #: What a worker is to call the descriptors, which it has but until it has mapped the regions.
    fd_ids: tuple[int, ...] = ()
    #: In post-copy: who brings its pages.
    pages: Pages | None = None

    @classmethod
    def keep(cls, table: MemoryTable, pages: Pages | None = None) -> MemoryPart:
        """Make a part of a table with borrowed descriptors, which it duplicates. OSError when there are too many."""
        fds: list[int] = []
        try:
            for region in table:
                fds.append(duplicate(region.fd))
        except OSError:
            close_all(fds)
            raise
        regions = tuple(attrs.evolve(region, fd=fd) for region, fd in zip(table, fds, strict=True))
        return cls(fds=tuple(fds), table=MemoryTable(regions), fd_ids=tuple(new_id() for _ in fds), pages=pages)

    @property
    def paged(self) -> bool:
        """Whether pages of it may still be missing."""
        return self.pages is not None and self.pages.active

    def describe(self) -> dict[str, Any]:
        """Return what a worker needs beside the descriptors, which it has been sent by their ids before."""
        regions = [
            (fd_id, r.gpa, r.size, r.uva, r.mmap_offset) for fd_id, r in zip(self.fd_ids, self.table, strict=True)
        ]
        return {"id": self.id, "paged": self.paged, "regions": regions}

    def userfault_fds(self) -> list[int]:
        """Return what a worker needs to make a userfaultfd, if anything; borrowed."""
        return self.pages.userfault_fds() if self.pages is not None and self.paged else []

    def mapped(self, worker: WorkerProcess, answer: dict[str, Any], fds: list[int]) -> None:
        """Take up what a worker answered that has mapped it; `fds` are taken over. WorkerDied: it makes no sense."""
        if self.pages is None or not self.paged:
            close_all(fds)
        else:
            self.pages.add(worker, self.id, answer.get("mappings"), fds)

    def close(self) -> None:
        """Close what it owns, and forget the faults of workers in it."""
        if self.pages is not None:
            self.pages.drop(self.id)
        super().close()


@attrs.frozen(eq=False)
class BackendPart(Part):
    """A back-end: what a worker makes it from. `fds` has one descriptor a group of queues, or none.

    With `shared` every worker gets all of them. `reopened` are the places of those of which each gets an open file of
    its own: locks are between open files, and a worker cannot open one. `setup`: whose part it is, and whose
    descriptors these are.
    """

    setup: Setup | None = None
    kind: str = "null"
    options: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    shared: bool = False
    reopened: frozenset[int] = frozenset()

    def describe(
        self, groups: Iterable[int], made: list[int], *, known: bool = False
    ) -> tuple[dict[str, Any], list[int]]:
        """Return what a worker that is to serve these groups of queues too needs, and the descriptors for it.

        `known`: it has the back-end already, for other groups. To `made` are added those of the descriptors that are
        the caller's, to be closed. OSError: there are too many.
        """
        served = list(groups)
        if self.shared:
            fds = [] if known else list(self.fds)
            for place in self.reopened if fds else ():
                made.append(os.open(f"/proc/self/fd/{fds[place]}", os.O_RDWR | os.O_CLOEXEC))
                fds[place] = made[-1]
        else:
            fds = [self.fds[group] for group in served] if self.fds else []
        described = {
            "id": self.id,
            "kind": self.kind,
            "groups": served,
            "options": dict(self.options),
            "shared": self.shared,
            "fds": len(fds),
        }
        return described, fds


class Setup(Protocol):
    """An open back-end, as the control process has it. What it does with requests or packets is the workers'."""

    fds: list[int]

    @property
    def id(self) -> int:
        """A number that no other one has."""
        ...

    @property
    def spec(self) -> str:
        """What the user wrote to name it."""
        ...

    def part(self, features: int, /) -> BackendPart:
        """Set it up for the features that the guest acked; a new part, from which workers make theirs.

        Raises LocalError when the guest has acked what it cannot carry, SysError when the kernel refuses.
        """
        ...

    def close(self) -> None:
        """Close its descriptors. No worker uses them any more."""
        ...


@attrs.frozen(eq=False)
class LogPart(Part):
    """A dirty log: `size` bytes from byte `offset` of a file that the front-end reads and clears."""

    size: int = 0
    offset: int = 0

    @classmethod
    def keep(cls, fd: int, size: int, offset: int) -> LogPart:
        """Make a part of a borrowed descriptor, which it duplicates.

        EINVAL for an empty or wrapping range or what is no file, EBADF, EACCES when it cannot be written, EFAULT when
        the file is shorter: no worker could write there.
        """
        if size <= 0 or offset < 0 or offset + size > ADDRESS_END:
            raise LocalError(f"a dirty log of {size:#x} bytes at {offset:#x} is empty or wraps")
        try:
            status = os.fstat(fd)
            access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        except OSError as error:
            raise LocalError(f"dirty log: bad file descriptor {fd}", errno.EBADF) from error
        if not stat.S_ISREG(status.st_mode):
            raise LocalError("dirty log: descriptor is not a file that can be mapped")
        if access != os.O_RDWR:
            raise LocalError("dirty log: descriptor is not open for reading and writing", errno.EACCES)
        if status.st_size < offset + size:
            raise LocalError(
                f"dirty log: file has {status.st_size:#x} bytes, offset + size is {offset + size:#x}", errno.EFAULT
            )
        try:
            return cls(fds=(duplicate(fd),), size=size, offset=offset)
        except OSError as error:
            raise SysError.wrap("cannot keep the dirty log's descriptor", error) from error

    def describe(self) -> dict[str, Any]:
        """Return what a worker needs beside the descriptor."""
        return {"id": self.id, "size": self.size, "offset": self.offset}


@attrs.frozen(eq=False)
class InflightPart(Part):
    """A region of what packed rings have in flight (shm/inflight.py), a piece of a file of the front-end's."""

    size: int = 0
    offset: int = 0
    num_queues: int = 0
    queue_size: int = 0

    @classmethod
    def keep(cls, fd: int, offset: int, size: int, num_queues: int, queue_size: int) -> InflightPart:
        """Make a part of a borrowed descriptor, which it duplicates.

        EINVAL when it has no room for its queues, is not in shared memory or at an odd place, EACCES when it cannot be
        written.
        """
        try:
            inflight.check_place(fd, offset, size, num_queues, queue_size, packed=True)
            access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            if offset % inflight.ALIGNMENT:
                raise LocalError(f"the region's offset {offset:#x} is not a multiple of {inflight.ALIGNMENT}")
            if access != os.O_RDWR:
                raise LocalError("the region's file is not open for reading and writing", errno.EACCES)
            part = cls(fds=(duplicate(fd),), size=size, offset=offset, num_queues=num_queues, queue_size=queue_size)
        except OSError as error:
            raise SysError.wrap("cannot keep the region of what is in flight", error) from error
        return part

    def describe(self) -> dict[str, Any]:
        """Return what a worker needs beside the descriptor."""
        return {"id": self.id, "size": self.size, "offset": self.offset}

    def place(self, index: int, ring_size: int) -> tuple[int, int] | None:
        """Return where a ring's part begins, and its entries; None when there is none, or it is too small."""
        if index >= self.num_queues or self.queue_size < ring_size:
            return None
        return index * inflight.queue_bytes(self.queue_size, packed=True), self.queue_size


@attrs.frozen
class RingState:
    """One virtqueue as set by the front-end. Addresses are the front-end's (uva); size in entries, 0 until set.

    `log`: the guest-physical address of the used ring, where writes to it are logged; None: they are not.
    """

    size: int = 0
    desc: int | None = None
    avail: int = 0
    used: int = 0
    log: int | None = None
    base: int = 0
    kick: Part | None = None
    call: Part | None = None
    err: Part | None = None
    started: bool = False
    enabled: bool = False
    start_id: int = 0
    busyloop_us: int = 0
    #: A region of what is in flight came, and the ring was not started since.
    recover: bool = False

    def parts(self) -> list[Part]:
        """List the parts that it names."""
        return [part for part in (self.kick, self.call, self.err) if part is not None]


@attrs.frozen
class DeviceState:
    """One device. `workers` has the worker slot that serves each group of `group_size` rings (a queue pair, say).

    Two fields are for the first half of a change in two steps (steps.py), and empty otherwise: `held` are the groups
    that nobody serves, between two workers; `draining` is the back-end that receive rings still take frames from.
    """

    backend: BackendPart
    rings: tuple[RingState, ...]
    workers: tuple[int, ...]
    group_size: int = 1
    features: int = 0
    memory: MemoryPart | None = None
    log: LogPart | None = None
    log_fd: Part | None = None
    held: frozenset[int] = frozenset()
    draining: BackendPart | None = None
    iotlb: Part | None = None
    inflight: InflightPart | None = None

    @property
    def logging(self) -> bool:
        """Whether workers log what they write: with LOG_ALL acked, whether there is a log already or not."""
        return bool(self.features & LOG_ALL)

    @property
    def live(self) -> bool:
        """Whether any ring is started: then workers are concerned by every change."""
        return any(ring.started for ring in self.rings)

    def parts(self) -> set[Part]:
        """Return all parts that it names."""
        return self._own_parts().union(*(ring.parts() for ring in self.rings))

    def _own_parts(self) -> set[Part]:
        """Return the parts that it names and that are no ring's."""
        kept = (*self.backends(), self.memory, self.log, self.log_fd, self.iotlb, self.inflight)
        return {part for part in kept if part is not None}

    def common_parts(self) -> set[Part]:
        """Return the parts that every worker has that serves one of its rings."""
        return self._own_parts() if self.logging else self._own_parts() - {self.log, self.log_fd}

    def backends(self) -> list[BackendPart]:
        """List the back-ends that are in use: one, or two while the old one is drained."""
        return [self.backend] if self.draining is None else [self.backend, self.draining]

    def worker_of(self, index: int) -> int:
        """Return the worker slot that serves a ring: the rings of a group have the same."""
        return self.workers[index // self.group_size]

    def rings_of(self, group: int) -> range:
        """Return the rings of a group."""
        return range(group * self.group_size, min((group + 1) * self.group_size, len(self.rings)))

    def serving(self) -> set[int]:
        """Return the slots of the workers that serve a started ring."""
        return {self.worker_of(index) for index, ring in enumerate(self.rings) if ring.started}

    def holdings(self, worker: int) -> tuple[set[Part], set[int]]:
        """Return the parts that a worker needs to serve its rings, and its groups, for which it needs the back-end."""
        rings = [ring for index, ring in enumerate(self.rings) if ring.started and self.worker_of(index) == worker]
        if not rings:
            return set(), set()
        parts = self.common_parts().union(*(ring.parts() for ring in rings))
        return parts, {group for group, serves in enumerate(self.workers) if serves == worker}

    def differs_only_in_stopped_rings(self, other: DeviceState) -> bool:
        """Whether they differ, and workers could not tell: they know nothing of rings that are not started."""
        changes = self._changes(other)
        if not changes or any(mine.started or its.started for mine, its in changes):
            return False
        return attrs.evolve(self, rings=()) == attrs.evolve(other, rings=())

    def parts_without(self, other: DeviceState) -> set[Part]:
        """Return the parts that it names and another state does not. No two rings have a part in common."""
        changes = self._changes(other)
        mine = self._own_parts().union(*(ring.parts() for ring, _ in changes))
        return mine - other._own_parts().union(*(ring.parts() for _, ring in changes))

    def _changes(self, other: DeviceState) -> list[tuple[RingState, RingState]]:
        """List the rings that differ, mine and its."""
        return [both for both in zip(self.rings, other.rings, strict=True) if both[0] is not both[1]]

    def with_ring(self, index: int, **changes: Any) -> DeviceState:
        """Return the state with one ring changed."""
        rings = list(self.rings)
        rings[index] = attrs.evolve(rings[index], **changes)
        return attrs.evolve(self, rings=tuple(rings))


def is_eventfd(fd: int) -> bool:
    """Whether an open descriptor is an eventfd. OSError when it is not open."""
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"


def eventfd_part(fd: int, what: str) -> Part:
    """Make a part of a borrowed eventfd, which it duplicates. EBADF when it is not open, EINVAL when it is no eventfd.

    `what` names it in the error.
    """
    try:
        if not is_eventfd(fd):
            raise LocalError(f"{what} is not an eventfd")
        part = Part(fds=(duplicate(fd),))
    except OSError as error:
        raise LocalError(f"{what} {fd} is not open", errno.EBADF) from error
    os.set_blocking(part.fds[0], False)
    return part
