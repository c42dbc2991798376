"""Checks an installed vhostmp: run by `make testinstalled` in an environment that holds the wheel and nothing of ours.

Rules: it knows the checkout only through its own path, which is not on sys.path (`python -I`); every check is made on
what is installed. It prints one line a check and ends at the first that fails.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
WANTED = {".py", ".pyi", ".pxd", ".h", ".so", ".typed", ".md"}


def check(condition: bool, what: str) -> None:
    """Print what holds; end with status 1 where it does not."""
    print(f"{'ok' if condition else 'NOT OK'}: {what}")
    if not condition:
        sys.exit(1)


def check_files() -> None:
    """One top-level name, all kinds of files in it, nothing that only the checkout needs."""
    files = importlib.metadata.files("vhostmp") or []
    inside = [file for file in files if ".." not in file.parts]
    names = {file.parts[0] for file in inside if not file.parts[0].endswith(".dist-info")}
    check(names == {"vhostmp"}, f"top-level names: {sorted(names)}")
    suffixes = {Path(file.name).suffix for file in inside}
    check(suffixes >= WANTED, f"kinds of files: {sorted(suffixes)}")
    stems = {file.name.split(".")[0] for file in inside if file.parts[:2] == ("vhostmp", "tools")}
    check(not stems & {"gen_layout", "check_order", "check_installed"}, "no checkers among the installed tools")
    sources = {path.stem for folder in ("shm", "workers", "tools") for path in (CHECKOUT / folder).rglob("*.pyx")}
    compiled = {file.name.split(".")[0] for file in inside if file.suffix == ".so"}
    check(sources == compiled, f"compiled modules: {sorted(compiled)}")


def check_imports() -> None:
    """Every module imports, from the installed place; the checkout's folders are no modules."""
    for name in ("shm", "workers", "tools", "tests"):
        check(importlib.util.find_spec(name) is None, f"no module called {name}")
    package = importlib.import_module("vhostmp")
    check(CHECKOUT not in Path(str(package.__file__)).parents or "site-packages" in str(package.__file__), "not ours")
    modules = [module.name for module in pkgutil.walk_packages(package.__path__, "vhostmp.")]
    for name in modules:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    check(len(modules) > len(WANTED), f"all of {len(modules)} modules import")


def check_program() -> None:
    """The program is there, says its version, and its demo loses nothing."""
    program = str(Path(sys.executable).parent / "vhostmp")
    version = importlib.metadata.version("vhostmp")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    check(version in said, f"vhostmp --version says {said.strip()}")
    demo = [program, "demo", "--seconds", "2", "--json"]
    result = json.loads(subprocess.run(demo, capture_output=True, text=True, timeout=120, check=True).stdout)
    counted = {name: result[name] for name in ("packets", "lost", "duplicated", "reordered", "swaps")}
    check(counted["packets"] > 0 and counted["swaps"] > 0, f"vhostmp demo ran: {counted}")
    check(not counted["lost"] + counted["duplicated"] + counted["reordered"], "nothing lost, duplicated or reordered")


if __name__ == "__main__":
    check_files()
    check_imports()
    check_program()
