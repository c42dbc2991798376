"""What a back-end written in Python looks like, and how a worker finds it by name.

A back-end runs in the worker process, on its data thread. It is a plain class; deriving from `Backend` is convenient,
not needed.

What its code may do. A worker imports the module before it gives up its rights (workers/sandbox): so a module may open
files and sockets, and import what it needs, *while it is imported*. Afterwards, in `__init__` too, it computes, sleeps,
starts threads, and uses what it has open; opening, connecting and starting programs raise PermissionError, importing
something that was not imported before ModuleNotFoundError. `--sandbox off` lifts that.

A worker imports a module once: the second instance of a class finds the module as the first has left it, so `close`
leaves alone what the module has opened. When a file that was imported has changed since, a swap takes up what is new,
in new processes (vhostmp/renewal.py). Where a module reads other files while it is imported, `touch` its own one.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import itertools
import linecache
import sys
import weakref
from collections.abc import Generator, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from vhostmp.errors import LocalError
from vhostmp.workers import imported

_numbers = itertools.count()
_OWN: Final = "vhostmp_backend_"  # how the names of modules begin that were made of files
#: What `preload` has imported, or why it could not, by the module's name or file.
_preloaded: Final[dict[str, ModuleType | LocalError]] = {}

Frame = bytes | bytearray | memoryview


class Backend:
    """Base of a back-end in Python: drops everything, delivers nothing. Override what you need.

    Frames start with the Ethernet header; the virtio header is dealt with (a guest served by such a back-end is offered
    no offloads, so frames have their checksums and fit the MTU). `queue` is the number of the queue pair, from 0.
    Each worker has an instance of its own, made with no arguments, which serves the worker's queue pairs.

    A class that has `transmit_batch(queue, batch)` is called by that instead of `transmit`, with a `Batch`
    (workers/backends/_batch.pyx): the headers of all frames, copied, in a NumPy array, their lengths in another, and
    each frame as a view when it is asked for. A view in a list costs some 100 ns, a row of the array a few. Up to 256
    frames come at once, or `batch_size`, a number from 1 to 256, where the class has one: a worker that dies in
    `transmit_batch` has its successor hand over the whole batch again.
    """

    def transmit(self, queue: int, packets: list[memoryview]) -> None:
        """Take a batch of frames that the guest sent.

        The views are read-only and show guest memory in place: they die when this returns, and the guest can change
        what they show at any time, so copy (`bytes(view)`) what you keep or decide upon. An exception drops what was
        not looked at; it is logged and counted (backend_error).
        """

    def receive(self, queue: int, budget: int) -> Iterable[Frame]:
        """Return at most `budget` frames for the guest, oldest first; none when there are none.

        Called after each `transmit` of the same queue pair, when the guest has made room after it had none, and when
        `fileno()` becomes readable. What is returned is delivered in order, waiting for room if need be.
        """
        return ()

    def fileno(self) -> int:
        """Return a descriptor whose readability means that `receive` has something; -1: none.

        It is watched edge-triggered: read it until it is empty.
        """
        return -1

    def announce(self, mac: bytes) -> None:
        """Tell the network behind the back-end that the guest of this Ethernet address is reached here now.

        After a migration and after a swap, in one worker. Optional; called in a thread of its own, beside the others.
        """

    def close(self) -> None:
        """End: the back-end was replaced, or its worker ends in good order. Not called when the worker is killed."""


NET_METHODS: Final = ("transmit|transmit_batch", "receive")
"""What a class must have to be a back-end of a network device: of several names one."""


BATCH_MOST: Final = 256
"""Frames of a batch, at most (BATCH in workers/backends/_batch.pxd)."""


def preload(reference: str) -> None:
    """Import the module of a reference, for as long as this process lives. Whoever uses it hears of what is wrong."""
    where = reference.rpartition(":")[0]
    if where in _preloaded:
        return
    try:
        with imported.noting():
            module = _preloaded[where] = _import(reference)
    except LocalError as error:
        _preloaded[where] = error
        return
    if file := getattr(module, "__file__", None):
        # So that tracebacks show its lines, when the file cannot be looked at any more.
        lines = linecache.getlines(file)
        linecache.cache[file] = (sum(map(len, lines)), None, lines, file)


def make(reference: str, methods: Iterable[str], *args: Any, **arguments: Any) -> Any:
    """Make an object of the class that `MODULE:CLASS` or `/path/to/file.py:CLASS` names; it must have these methods.

    Raises LocalError, in one line, when the module or the class is not there, the module does not import or the class
    does not start. The module of a file goes with the object; it stays where nobody can be told that the object goes.
    """
    found, module = _find(reference, methods)
    try:
        instance = found(*args, **arguments)
    except Exception as error:
        _forget(module)
        hint = sandbox_hint(found, error)
        raise LocalError(
            f"python back-end {reference!r} does not start: {type(error).__name__}: {error}{hint}"
        ) from error
    with contextlib.suppress(TypeError):  # a class with slots may have none for weak references
        weakref.finalize(instance, _forget, module).atexit = False
    return instance


def sandbox_hint(found: Any, error: object) -> str:
    """Return what to add to an exception that a class, or an object of it, has raised, where it may be the sandbox's.

    What comes with us asks for nothing that it may not do: of that nothing is said.
    """
    denied = isinstance(error, PermissionError) and error.errno in (errno.EPERM, errno.EACCES)
    if not _preloaded or not (denied or isinstance(error, ImportError)) or found.__module__.startswith("vhostmp."):
        return ""
    return " (sandbox: open or import it at the top of the module, or --sandbox off)"


@contextlib.contextmanager
def load(reference: str, methods: Iterable[str]) -> Generator[type[Any]]:
    """Lend the class that a reference names, to look at. Raises LocalError as `make` does."""
    found, module = _find(reference, methods)
    try:
        yield found
    finally:
        _forget(module)


def _forget(module: Any) -> None:
    """Let go of the module of a file. One that was imported by its name stays, as imported modules do."""
    if module.__name__.startswith(_OWN) and module not in _preloaded.values():
        sys.modules.pop(module.__name__, None)


def _find(reference: str, methods: Iterable[str]) -> tuple[type[Any], Any]:
    """Return the class, and the module it was found in."""
    where, separator, name = reference.rpartition(":")
    if not separator or not where or not name:
        raise LocalError(
            f"python back-end {reference!r} is not of the form python:MODULE:CLASS or python:FILE.py:CLASS"
        )
    module = _preloaded.get(where) or _import(reference)
    if isinstance(module, LocalError):
        raise LocalError(str(module), module.errno)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        _forget(module)
        raise LocalError(f"python back-end {reference!r}: there is no class {name} in {where}")
    for method in methods:
        if not any(callable(getattr(found, one, None)) for one in method.split("|")):
            _forget(module)
            raise LocalError(f"python back-end {reference!r}: class {name} has no method {method.replace('|', ' or ')}")
    if "transmit|transmit_batch" in methods and takes_batches(found) and "numpy" not in sys.modules:
        _forget(module)
        raise LocalError(
            f"python back-end {reference!r}: transmit_batch is given NumPy arrays: import numpy in {where}"
        )
    if "transmit|transmit_batch" in methods and takes_batches(found):
        size = batch_size(found)
        if not isinstance(size, int) or not 0 < size <= BATCH_MOST:
            _forget(module)
            raise LocalError(
                f"python back-end {reference!r}: batch_size is {size!r}, not a number from 1 to {BATCH_MOST}"
            )
    return found, module


def takes_batches(found: Any) -> bool:
    """Whether a class, or an object, has its frames in arrays rather than as a list of views."""
    return callable(getattr(found, "transmit_batch", None))


def batch_size(found: Any) -> Any:
    """Return how many frames a class wants at once, at most."""
    return getattr(found, "batch_size", BATCH_MOST)


def _import(reference: str) -> ModuleType:
    """Import the module of a reference. LocalError when it does not import."""
    where = reference.rpartition(":")[0]
    try:
        return _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except LocalError:
        raise
    except Exception as error:
        advice = ""
        if isinstance(error, ModuleNotFoundError):
            advice = f": is it installed for {sys.executable}, or in PYTHONPATH?"
        raise LocalError(
            f"python back-end {reference!r} does not import: {type(error).__name__}: {error}{advice}"
        ) from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise LocalError(f"python back-end file {path} does not exist")
    # A module of its own each time: a swap to the same file takes up what has changed in it.
    name = f"{_OWN}{path.stem}_{next(_numbers)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LocalError(f"python back-end file {path} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
