"""Bugs for the oracle to find: a compiled module of ours with one line changed, which goes into the guest only."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parents[2]
MODULE: Final = "vhostmp/workers/_vring.pyx"
INCLUDED: Final = ("vhostmp/shm", "vhostmp/workers")
DIRECTIVES: Final = ("boundscheck=False", "wraparound=False", "cdivision=True", "initializedcheck=False")
#: name -> what stands in the source, and what stands there instead.
BUGS: Final = {
    "interrupt one late": (
        "(new - used_event - 1) < <uint16_t> (new - old)",
        "(new - used_event) < <uint16_t> (new - old)",
    ),
    "used ring wraps wrong": ("memcpy(&ring[0], elems + span,", "memcpy(&ring[0], elems,"),
    "buffers not logged": ("        dirty_chains(vq, b, first, n)\n", ""),
}


def build(bug: str, folder: Path) -> dict[str, Path]:
    """Compile the module with a bug, in `folder`; returns it under its name. RuntimeError: it does not compile."""
    before, after = BUGS[bug]
    source = (PROJECT / MODULE).read_text()
    assert source.count(before) == 1, f"{bug}: the line to change is not there any more"
    changed, code = folder / "planted.pyx", folder / "planted.c"
    changed.write_text(source.replace(before, after))
    name = MODULE.removesuffix(".pyx").replace("/", ".")
    directives = [word for directive in DIRECTIVES for word in ("-X", directive)]
    _run(sys.executable, "-m", "cython", "-3", *directives, "-I", ".", "--module-name", name, "-o", code, changed)
    library = folder / f"planted{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [f"-I{path}" for path in (sysconfig.get_paths()["include"], *INCLUDED)]
    compiler = str(sysconfig.get_config_var("CC")).split()
    _run(*compiler, "-shared", "-fPIC", "-O1", "-fno-strict-aliasing", *include, code, "-o", library)
    return {MODULE.removesuffix(".pyx"): library}


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
