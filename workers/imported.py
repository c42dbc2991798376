"""Which files a process has imported, and what each was then: would an import bring something else now?

A worker notes them while it may still look at files; the control process compares. A file is told by its change time,
size and inode: its modification time can be set to what it was, its change time cannot.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final, cast

#: Change times come from a clock that is behind by up to a tick of the kernel.
TICK_NS: Final = 20_000_000
#: More than these does not go into a message with something else (workers/channel.py).
BYTES_MAX: Final = 1 << 16

_files: Final[dict[str, list[int]]] = {}


def stamp(path: str) -> list[int]:
    """Return what tells a file from an earlier one under its path; nothing when it cannot be looked at."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return []
    return [found.st_ctime_ns, found.st_size, found.st_ino]


@contextlib.contextmanager
def noting() -> Generator[None]:
    """Note the files of the modules that are imported meanwhile.

    One that has changed since this began, or whose path leads elsewhere since, may have been read before it did: what
    it was is not known.
    """
    known = set(sys.modules)
    began = time.time_ns() - TICK_NS
    try:
        yield
    finally:
        for name in sys.modules.keys() - known:
            if file := getattr(sys.modules[name], "__file__", None):
                found = stamp(file)
                _files[file] = found if found and max(found[0], _link_changed(file)) < began else []


def _link_changed(path: str) -> float:
    """Return when a symbolic link on a path was last changed, in ns; 0: there is none; never: it cannot be seen."""
    changed = 0.0
    try:
        for part in (Path(path), *Path(path).parents):
            found = part.lstat()
            if stat.S_ISLNK(found.st_mode):
                changed = max(changed, found.st_ctime_ns)
    except OSError:
        return math.inf
    return changed


def noted() -> dict[str, list[int]] | None:
    """Return the files that were imported while they were noted, each with its stamp; None: they are too many."""
    return dict(_files) if len(json.dumps(_files)) <= BYTES_MAX else None


def are_current(files: Any) -> bool:
    """Whether these files are known, and all are what they were when another process noted them.

    `files`: what its `noted` returned. It may say anything.
    """
    if not isinstance(files, dict):
        return False
    return all(was and stamp(path) == was for path, was in cast("dict[str, Any]", files).items())
