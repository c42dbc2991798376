"""Compiles a test's own Cython file, which cimports vhostmp's, when a test needs it.

For tests that must call compiled functions Python does not see: inlined ones (the read side of a section) and those of
the data path. The result is kept in build/tests under a name that hashes every source it is made from: built once,
never stale. Cython and a C compiler are there, since the package itself was built with them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def load(source: Path) -> ModuleType:
    """Build a .pyx file if need be, import it and return it.

    Raises RuntimeError with the compiler's words when it cannot be built.
    """
    layers = [ROOT / name for name in ("shm", "workers", "workers/backends")] + [source.parent]
    declarations = [path for layer in layers for path in sorted(layer.glob("*.[ph]*"))]
    sources = [source, *(path for path in declarations if path.suffix in (".pxd", ".h"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = ROOT / "build" / "tests" / digest
    library = folder / f"{source.stem}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        code, partial = folder / f"{source.stem}.c", library.with_suffix(".partial")
        _run(sys.executable, "-m", "cython", "-3", "-X", "cdivision=True", "-I", ROOT, "-o", code, source)
        include = [f"-I{path}" for path in (sysconfig.get_paths()["include"], ROOT / "shm", ROOT / "workers")]
        flags = ["-shared", "-fPIC", "-O3", "-fno-strict-aliasing", *include]
        _run(*str(sysconfig.get_config_var("CC")).split(), *flags, code, "-o", partial)
        partial.rename(library)
    spec = importlib.util.spec_from_file_location(source.stem, library)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"cannot import {library}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
