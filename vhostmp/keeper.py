"""The keeper: what a control process puts into its store, so that the next one can go on.

Rules: *everything is said before it is so*. A record names descriptors; they are in the store before the record that
names them, and leave it after the one that no longer does. So a record that is found always has its descriptors.
Records are one a device (with its connection), and one of the pool; each is whole by itself (records.py).

Who may call: any thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from vhostmp import __version__, fdstore
from vhostmp.errors import LocalError, VhostError
from vhostmp.fdstore import FdStore
from vhostmp.holder import end_held
from vhostmp.shm.records import Plain, Record
from vhostmp.systemd_store import end_unread, open_systemd_store
from vhostmp.workers.channel import close_all

log = logging.getLogger(__name__)

RECORD: Final = "record."
POOL: Final = "pool"
"""The record of the pool of workers."""
WHOLE: Final = "whole"
"""In it: whether the server was ready once, and no record lacks something; else there is nothing that could go on."""
SCHEMA: Final = 1
"""What records say and how: to be raised with any change that a program of the number before would not understand, or
that one of the new number would not find: fields of records (tests/integration/test_schema.py knows those of each class
of device), and, which no test knows, what their values mean, words of kept_transport.py, names of descriptors, messages
that workers of the program before are to understand."""
_SCHEMA_FIELD: Final = "schema"
_PROGRAM_FIELD: Final = "program"


class Keeper:
    """Records and their descriptors, in a store.

    `found`: the records of the control process before us, by name; empty: there was none, or it ended in order.
    """

    def __init__(
        self, store: FdStore, fds: Mapping[str, int] | None = None, again: Callable[[], FdStore] | None = None
    ) -> None:
        """Begin with what the store holds; `fds` are taken over. `again` makes a new store when this one is gone.

        Raises: LocalError: a record is of another version, or schema; nothing is closed in the store then.
        """
        self.store = store
        self._again = again
        self._lock = threading.RLock()
        self._records: dict[str, Record] = {}
        self._names: dict[str, set[str]] = {}
        self._unput: set[str] = set()  # records that were made and that the store has not got yet
        self._behind: set[str] = set()  # records that could not be written as things are
        self._pool: Plain | None = None  # what was last to be written of the pool
        self._kept: dict[str, int] = {}  # ours: what was put, so that a store that dies can be made anew
        self._settled: tuple[float, Sequence[str]] = (0.0, ())
        self._closed = False
        #: Called with a store before it is let go of (False), and once there is a new one (True).
        self.on_store: Callable[[FdStore, bool], None] = lambda store, begins: None
        #: Whether we end in order: what is killed from now on has nothing that could go on.
        self.is_ending = False
        #: Whether nothing is kept any more, though we are served by a store: it is too small, or gone.
        self.is_lost = False
        #: Whether what was found is being taken up: until then, a failure leaves all of it to another one.
        self.is_adopting = False
        self._fds: dict[str, int] = dict(fds or {})
        self.found: dict[str, Plain] = {}
        try:
            for name in [name for name in self._fds if name.startswith(RECORD)]:
                record = self._records[name.removeprefix(RECORD)] = Record(self._fds.pop(name))
                plain = record.read()
                if plain is not None:
                    _check_schema(plain)
                    self.found[name.removeprefix(RECORD)] = plain
        except BaseException:
            self._close()
            raise
        self.is_claimed = False
        self._unclaimed: set[str] = set(self._fds)
        self.is_adopting = bool(self.found)

    def take(self, name: str) -> int:
        """Return a descriptor that was found, the caller's from now on. LocalError: there is none of that name."""
        with self._lock:
            if name not in self._fds:
                raise LocalError(
                    f"{name} of what waits to be served on was not kept, and it cannot go on without: "
                    "use --adopt-timeout 0 to end it"
                )
            return self._fds.pop(name)

    def write(self, name: str, plain: Plain, fds: Mapping[str, int]) -> None:
        """Replace a record, which names these descriptors (borrowed, open until the next write of this record).

        Never fails: without a store, which is logged, everything else goes on, but our death would be the end of it.
        """
        with self._lock:
            if self._closed or self.is_lost:
                return
            before, self._names[name] = self._names.get(name, set()), set(fds)
            try:
                if name not in self._records:
                    self._make(name)
                if name in self._unput:
                    self._put({RECORD + name: self._records[name].fd})
                    self._unput.discard(name)
                self._put({key: fd for key, fd in fds.items() if key not in self._kept})
                said = {_SCHEMA_FIELD: SCHEMA, _PROGRAM_FIELD: __version__, **plain}
                if name == POOL and self._behind - {POOL}:
                    said[WHOLE] = False  # at once: whoever dies between two writes has said the first one
                self._records[name].write(said)
                self._drop(before - fds.keys())
            except (VhostError, OSError) as error:
                self._names[name] |= before
                self._is_behind(name, plain)
                self._has_failed(error)
            else:
                self._is_level(name, plain)

    def _make(self, name: str) -> None:
        """Make a record, which the store is to be given. Raises: SysError."""
        self._records[name] = Record()
        self._unput.add(name)

    def _is_behind(self, name: str, plain: Plain) -> None:
        """Take note that a record says less than is so, and say in that of the pool that nobody is to go on by it.

        For which nothing is needed but what there is. The next start begins anew, instead of being refused.
        """
        self._behind.add(name)
        if name == POOL:
            self._pool = plain
        self._say_whole()

    def _is_level(self, name: str, plain: Plain) -> None:
        if name == POOL:
            self._pool = plain
            self._behind.discard(POOL)
        elif name in self._behind:
            self._behind.discard(name)
            self._say_whole()

    def _say_whole(self) -> None:
        """Write in the record of the pool whether all records can be gone on by."""
        record = self._records.get(POOL)
        if record is not None and self._pool is not None:
            is_whole = bool(self._pool.get(WHOLE)) and not self._behind
            with contextlib.suppress(VhostError):
                record.write({_SCHEMA_FIELD: SCHEMA, _PROGRAM_FIELD: __version__, **self._pool, WHOLE: is_whole})

    def _has_failed(self, error: Exception) -> None:
        """Take note that something could not be kept."""
        log.error("what is served is not kept over a death of this process: %s", error)
        if self._again is None:
            self._give_up()

    def _give_up(self) -> None:
        """Keep nothing any more, where there can be no other store: a record that lacks something is worse than none.

        It could not be adopted, nor anything be started in its place. Records stay as they are, for their words.
        """
        self.is_lost = True
        self.store.goodbye()

    def _put(self, fds: Mapping[str, int]) -> None:
        """Duplicate descriptors and put them in the store; those that it has already are only duplicated."""
        new: dict[str, int] = {}
        try:
            for name, fd in fds.items():
                was_found = name in self._unclaimed
                self._unclaimed.discard(name)
                if fd < 0:  # closed meanwhile, as the log of a worker that has just died: the store's will do
                    continue
                self._kept[name] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
                if not was_found:
                    new[name] = self._kept[name]
            if new:
                self._do(lambda: self.store.put(new))
        except (VhostError, OSError):
            close_all([self._kept.pop(name) for name in new])  # the store has not got them: the next write tries again
            raise

    def _drop(self, names: Iterable[str]) -> None:
        gone = set(names)
        close_all([self._kept.pop(name) for name in gone if name in self._kept])
        self._unclaimed -= gone
        if gone:
            self._do(lambda: self.store.drop(gone))

    def record(self, name: str) -> Record:
        """Return a record, which is made if there is none: for its words."""
        with self._lock:
            if name not in self._records:
                self.write(name, {}, {})
            if name not in self._records:  # nothing is kept any more
                self._make(name)
            return self._records[name]

    def put(self, fds: Mapping[str, int]) -> None:
        """Keep descriptors that the words of a record speak of, and no record; also those just taken.

        Never fails: as `write`.
        """
        with self._lock:
            if self._closed or self.is_lost:
                return
            try:
                self._put(fds)
            except (VhostError, OSError) as error:
                self._has_failed(error)

    def drop(self, names: Sequence[str]) -> None:
        """Drop such descriptors. Never fails."""
        with self._lock, contextlib.suppress(VhostError):
            self._drop(names)

    def forget(self, name: str) -> None:
        """Drop a record and what it names."""
        with self._lock:
            record = self._records.pop(name, None)
            self._unput.discard(name)
            self._behind.discard(name)
            names = self._names.pop(name, set[str]())
            if record is not None:
                record.close()
            if not self._closed:
                self.drop([RECORD + name, *names])

    def sync(self) -> None:
        """Wait until what was dropped is closed, so that somebody else can have it. Never fails."""
        with self._lock, contextlib.suppress(VhostError):
            if not self._closed:
                self._do(self.store.sync)

    def claimed(self) -> None:
        """Take note that everything that was found is taken up: close and drop the rest."""
        with self._lock:
            close_all(self._fds.values())
            self.is_adopting = False
            self.is_claimed = True
            rest = [*self._fds.keys() | self._unclaimed]
            self._fds.clear()
            self._unclaimed = set()
            if rest:
                self.drop(rest)

    def settle(self, timeout: float, paths: Sequence[str]) -> None:
        """Say how long to wait for the next control process, and which sockets to remove when none comes."""
        with self._lock:
            self._settled = timeout, paths
            with contextlib.suppress(VhostError):
                self._do(lambda: self.store.settle(timeout, paths))

    def goodbye(self) -> None:
        """Keep nothing: we end in order. Idempotent."""
        with self._lock:
            if not self._closed:
                self._close()
                self.store.goodbye()

    def detach(self) -> None:
        """Leave everything as it is, for the next control process. Idempotent."""
        with self._lock:
            if not self._closed:
                self._close()
                self.store.detach()

    def begin_anew(self) -> None:
        """Drop everything that was found."""
        with self._lock:
            for name in list(self._records):
                self.forget(name)
            self.found.clear()
            self.claimed()
            self.is_claimed = False

    def close(self) -> None:
        """Let go of the store, and of what was found and not taken; the same as `detach`."""
        self.detach()

    def renew(self) -> None:
        """Make a new store in place of one that is gone, and put everything into it. Never fails."""
        with self._lock:
            if self._closed or self._again is None:
                return
            try:
                self.on_store(self.store, False)
                self.store.kill()
                self.store = self._again()
                self.on_store(self.store, True)
                self.store.put({**self._kept, **{RECORD + name: record.fd for name, record in self._records.items()}})
                self._unput.clear()
                self.store.settle(*self._settled)
            except VhostError as error:
                log.error("what is served is not kept over a death of this process: %s", error)
            else:
                log.warning("the holder of descriptors has died: there is a new one")

    def _do(self, action: Callable[[], None]) -> None:
        """Ask the store; when it is gone, make a new one, into which goes all that is kept."""
        if self.is_lost:
            return
        try:
            action()
        except VhostError:
            if self._again is None:
                raise
            self.renew()

    def _close(self) -> None:
        self._closed = True
        for record in self._records.values():
            record.close()
        close_all([*self._fds.values(), *self._kept.values()])
        self._fds.clear()
        self._kept.clear()


def _check_schema(plain: Plain) -> None:
    """Refuse a record that a program of another schema wrote. LocalError, with both numbers and what to do."""
    schema = plain.get(_SCHEMA_FIELD, 0)
    if schema != SCHEMA:
        raise LocalError(
            f"what waits to be served on was recorded by version {plain.get(_PROGRAM_FIELD, 'unknown')} in schema "
            f"{schema}, and version {__version__} reads schema {SCHEMA}: "
            "use the program that started it, or --adopt-timeout 0 to end it"
        )


def open_keeper(control_path: str, timeout: float) -> Keeper:
    """Find what a control process of that path left, or begin anew.

    Raises: LocalError: another one runs; or what was left is of another version. SysError: no holder can be started.
    """

    def again() -> FdStore:
        return fdstore.start_holder(control_path)

    stored = open_systemd_store()
    if stored is not None:
        keeper = Keeper(*stored)
        if not keeper.found.get(POOL, {}).get(WHOLE):
            keeper.begin_anew()
        return keeper
    found = fdstore.find_holder(control_path)
    if found is not None:
        try:
            keeper = Keeper(*found, again)
        except BaseException:
            found[0].detach()
            raise
        if keeper.found.get(POOL, {}).get(WHOLE):
            return keeper
        keeper.detach()
        end_what_waits(control_path)
    keeper = Keeper(again(), {}, again)
    keeper.settle(timeout, [])
    return keeper


def end_what_waits(control_path: str) -> None:
    """End what a control process of that path left, if anything. Raises: LocalError: one runs."""
    try:
        stored = open_systemd_store()
    except LocalError as error:
        log.warning("what systemd keeps is ended unread: %s", error)
        end_unread()
    else:
        if stored is not None:
            end_held(stored[1], stored[0].drop)
            stored[0].goodbye()
    found = fdstore.find_holder(control_path)
    if found is None:
        return
    store, fds = found
    close_all(fds.values())
    store.end()
