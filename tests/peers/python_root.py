"""A root for the guest that holds this Python, its libraries, and this checkout with its compiled modules: a squashfs.

Rules: what is copied is what runs here; nothing is downloaded. Byte code is made here, once: the guest's processor is
emulated. The guest mounts it read-only.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import re
import shutil
import sys
import sysconfig
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.peers.image import install_libraries
from tests.peers.processes import run

PROJECT: Final = Path(__file__).resolve().parents[2]
PYTHON: Final = "/python/bin/python3"
ENVIRONMENT: Final = "PYTHONHOME=/python PYTHONPATH=/project:/site PYTHONDONTWRITEBYTECODE=1"
MOUNTED: Final = ("dev", "proc", "sys", "tmp", "run")
UNWANTED: Final = shutil.ignore_patterns(
    "site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "turtledemo",
    "config-*", "*.a", "_tkinter*",
)  # fmt: skip


def command(mounted: str, module: str, *arguments: str) -> str:
    """Return the command by which a guest that has mounted the root somewhere runs a module."""
    return f"cd /; {ENVIRONMENT} chroot {mounted} {PYTHON} -m {module} {' '.join(arguments)}"


def build(folder: Path, packages: Sequence[str], instead: Mapping[str, Path]) -> Path:
    """Make the squashfs in `folder`, with the packages of this checkout named; returns it.

    `instead`: compiled modules to take in the place of ours, by their paths without an ending.
    """
    root = folder / "python-root"
    for name in (*MOUNTED, "python/bin", "project", "site"):
        (root / name).mkdir(parents=True)
    python = Path(sys.executable).resolve()
    shutil.copy(python, root / PYTHON.lstrip("/"))
    library = root / "python" / "lib" / f"python{sysconfig.get_python_version()}"
    shutil.copytree(sysconfig.get_path("stdlib"), library, ignore=UNWANTED)
    _install_dependencies(root / "site")
    for package in packages:
        target = root / "project" / package
        shutil.copytree(PROJECT / package, target, ignore=shutil.ignore_patterns("*.c", "__pycache__"))
    for module, library in instead.items():
        shutil.copy(library, root / "project" / f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}")
    compileall.compile_dir(root / "project", quiet=1)
    compileall.compile_dir(root / "site", quiet=1)
    modules = [path for where in ("python/lib", "site", "project") for path in (root / where).rglob("*.so")]
    install_libraries([python, *modules], root)
    squashed = folder / "python.squashfs"
    run(["mksquashfs", root, squashed, "-noI", "-noD", "-noF", "-noX", "-quiet", "-no-progress"])
    shutil.rmtree(root)
    return squashed


def _install_dependencies(site: Path) -> None:
    """Copy what the package needs of other people's, as it is installed here."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        found = re.match(r"[\w-]+", requirement)
        assert found, requirement
        for file in importlib.metadata.files(found[0]) or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), target)
