"""Builds what the compiled fuzz targets need: the ring and its neighbours, instrumented, in a copy below build/fuzz.

What it is for: clang compiles the harnesses and the extension modules that they need with the address and
undefined-behaviour sanitizers and libFuzzer's counters, and `engine.c` with libFuzzer itself. Only Cython's C functions
are counted (their names begin with __pyx_f_): what wraps them for Python is not what is fuzzed.

Rules: the copy is named after a hash of all that it is made from: it is never stale, and made once. An older one is
removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
BUILT: Final = ROOT / "build" / "fuzz"
COPIED: Final = ("vhostmp", "shm", "workers", "tests/__init__.py", "tests/fuzz")
#: Of tests/fuzz: what runs in the copy.
OF_FUZZ: Final = re.compile(r"_.*\.(pyx|pxd)|__init__\.py|build\.py|engine\.c|looks\.h|one\.py|targets\.py")
HARNESSES: Final = ("tests/fuzz/_ring", "tests/fuzz/_memory", "tests/fuzz/_net", "tests/fuzz/_requests")
#: What a source imports of ours, for Python or for Cython.
IMPORTS: Final = re.compile(r"^ *(?:from|import|cimport) (vhostmp[\w.]*)(?: c?import \(?([\w, ]*))?", re.MULTILINE)
ADDRESS: Final = ("-fsanitize=address", "-shared-libasan")
#: As in `make sanitize`: a guest may put a table at any address, and each field is one load.
UNDEFINED: Final = (
    "-fsanitize=undefined",
    "-fno-sanitize=alignment,function",
    "-fno-sanitize-recover=undefined",
    "-fsanitize-ignorelist=ignored",
)
#: What coverage counts: functions that Cython compiled from `cdef`.
COUNTED: Final = "src:*\nfun:__pyx_f_*\n"
#: What Cython's own code may do: 0 added to NULL, where a function has no arguments.
IGNORED: Final = "[pointer-overflow]\nfun:__pyx_pw_*\nfun:__Pyx_*\n"
COMPILE: Final = ("-shared", "-fPIC", "-O2", "-gline-tables-only", "-fno-strict-aliasing", "-w")
DIRECTIVES: Final = ("language_level=3", "binding=True", "boundscheck=False", "wraparound=False", "cdivision=True")


class BuildError(Exception):
    """A target cannot be built; the text says what to do."""


def _run(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def _find(clang: str, name: str) -> Path:
    """Return a library of clang's runtime."""
    found = subprocess.run([clang, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        raise BuildError(
            f"clang has no {name}: as root: make peers, or apt-get install clang libclang-rt-14-dev llvm-14"
        )
    return path


def _extensions() -> list[str]:
    """List the compiled modules that the harnesses import, and those that these import, and so on."""
    todo = list(HARNESSES)
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for suffix in (".py", ".pyx", ".pxd"):
            path = ROOT / f"{name}{suffix}"
            for module, names in IMPORTS.findall(path.read_text()) if path.exists() else ():
                todo += [_place(module), *(_place(f"{module}.{word.strip()}") for word in names.split(","))]
    return sorted(name for name in seen if (ROOT / f"{name}.pyx").exists() and name not in HARNESSES)


def _place(module: str) -> str:
    """Return where a module of ours lies: layers are installed below vhostmp."""
    path = module.replace(".", "/")
    return path.removeprefix("vhostmp/") if path.startswith(("vhostmp/shm/", "vhostmp/workers/")) else path


def _sources() -> list[Path]:
    """List what goes into the copy, without anything compiled."""
    found: list[Path] = []
    for name in COPIED:
        start = ROOT / name
        found += [start] if start.is_file() else sorted(start.rglob("*"))
    fuzz = ROOT / "tests" / "fuzz"
    return [
        path
        for path in found
        if (path.is_symlink() or path.is_file())
        and path.suffix not in (".so", ".pyc")
        and (fuzz not in path.parents or (path.parent == fuzz and OF_FUZZ.fullmatch(path.name)))
    ]


def _digest(sources: list[Path], more: str) -> str:
    """Hash names and contents."""
    state = hashlib.sha256(more.encode())
    for path in sources:
        state.update(str(path.relative_to(ROOT)).encode())
        state.update(os.readlink(path).encode() if path.is_symlink() else path.read_bytes())
    return state.hexdigest()[:16]


class Build:
    """The instrumented copy.

    Attributes:
        tree: where it is; Python runs there.
        preload: libraries that are preloaded into Python: `engine` and the sanitizers'.
        symbolizer: the program that tells lines from addresses.
        engine: libFuzzer as a library.
    """

    def __init__(self, *, checked: bool = True) -> None:
        """Find the compiler, and out where the copy is. Raises: BuildError: there is no compiler.

        Not `checked` for undefined behaviour, only what is our own is counted, not those checks: to tell the coverage.
        """
        clang = shutil.which("clang")
        if clang is None:
            raise BuildError("no clang: as root: make peers, or apt-get install clang libclang-rt-14-dev llvm-14")
        self._clang = clang
        version = subprocess.run([clang, "--version"], capture_output=True, text=True, check=True).stdout
        self._sources = _sources()
        self._sanitizers = (*ADDRESS, *UNDEFINED) if checked else ADDRESS
        self._place = BUILT / ("checked" if checked else "counted")
        self.tree = self._place / _digest(self._sources, version + sys.version)
        self.engine = self.tree / "engine.so"
        self.preload = (self.engine, _find(clang, "libclang_rt.asan-x86_64.so"))
        self.symbolizer = Path(clang).resolve().with_name("llvm-symbolizer")

    @property
    def complete(self) -> bool:
        """Whether there is nothing to be done."""
        return self.engine.exists()

    def make(self, jobs: int) -> None:
        """Make the copy, compiling `jobs` modules at once. Raises: BuildError: with the compiler's words."""
        if self.complete:
            return
        shutil.rmtree(self._place, ignore_errors=True)
        for path in self._sources:
            to = self.tree / path.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to, follow_symlinks=False)
        (self.tree / "counted").write_text(COUNTED)
        (self.tree / "ignored").write_text(IGNORED)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(self._compile, (*_extensions(), *HARNESSES)))
        self._link_engine()

    def _compile(self, name: str) -> None:
        module = Path(name if name.startswith("tests") else f"vhostmp/{name}")
        code = module.with_suffix(".c")
        directives = [word for directive in DIRECTIVES for word in ("-X", directive)]
        _run(sys.executable, "-m", "cython", *directives, "-I", ".", "-o", code, f"{module}.pyx", cwd=self.tree)
        includes = [f"-I{path}" for path in (sysconfig.get_paths()["include"], "shm", "workers")]
        looks = [] if name in HARNESSES else ["-include", "tests/fuzz/looks.h"]
        counted = [] if name in HARNESSES else ["-fsanitize=fuzzer-no-link", "-fsanitize-coverage-allowlist=counted"]
        to = f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"
        _run(self._clang, *COMPILE, *self._sanitizers, *counted, *looks, *includes, code, "-o", to, cwd=self.tree)

    def _link_engine(self) -> None:
        archive = _find(self._clang, "libclang_rt.fuzzer_no_main-x86_64.a")
        words = ("-shared", "-fPIC", "-O2", "tests/fuzz/engine.c", "-Wl,--whole-archive", archive)
        partial = self.engine.with_suffix(".partial")
        end = ("-Wl,--no-whole-archive", "-lstdc++", "-lpthread", "-ldl", "-lm")
        _run(self._clang, *words, *end, "-o", partial, cwd=self.tree)
        partial.rename(self.engine)
