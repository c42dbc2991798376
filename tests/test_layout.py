"""The layout of the checkout: links in place of folders, guards against a second copy, generated files up to date.

`vhostmp/shm`, `vhostmp/workers` and `vhostmp/tools` are links to the top-level folders of those names. A module
imported under both names would exist twice, each with its own state; the guards make that an error.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("shm", "tools", "workers")
LINES_MAX = 600


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter whose path holds the checkout."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", LINKS)
def test_link(name: str) -> None:
    """The package folder is a relative link to the top-level folder, which is a real one."""
    link = ROOT / "vhostmp" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()


def test_links_are_committed_as_links() -> None:
    """Git holds the links with mode 120000: a checkout that turned them into text files would be noticed."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, or no git to ask")
    paths = [f"vhostmp/{name}" for name in LINKS]
    listed = subprocess.run(["git", "ls-files", "-s", *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    modes = {line.split("\t")[1]: line.split()[0] for line in listed.stdout.splitlines()}
    assert modes == dict.fromkeys(paths, "120000")


@pytest.mark.slow
@pytest.mark.parametrize("name", LINKS)
def test_guard(name: str) -> None:
    """Importing a folder under its bare name fails, and the message says the right one."""
    done = run_python(f"import {name}")
    assert done.returncode == 1
    assert f"ImportError: imported as '{name}': use 'import vhostmp.{name}'" in done.stderr


@pytest.mark.slow
def test_workers_do_not_load_the_control_plane() -> None:
    """What a worker process imports holds no module of the control plane or of the tools."""
    done = run_python(
        "import sys, vhostmp.workers.pool, vhostmp.workers.main, vhostmp.workers.spawner\n"
        "print(*sorted(name for name in sys.modules if name.split('.')[0] == 'vhostmp'))"
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "vhostmp.workers.pool" in loaded
    allowed = ("vhostmp.shm", "vhostmp.workers", "vhostmp.errors", "vhostmp.consts")
    assert [name for name in loaded if name != "vhostmp" and not name.startswith(allowed)] == []


@pytest.mark.slow
def test_vhostmp_comes_from_this_checkout() -> None:
    """The modules under test are those of the checkout, imported through the links, not an installed copy."""
    done = run_python("import vhostmp.shm.layout as m; print(m.__file__)")
    assert done.stdout.strip() == str(ROOT / "vhostmp/shm/layout.py"), done.stderr


@pytest.mark.slow
def test_generated_layout_is_up_to_date() -> None:
    """layout.h and layout.pxd are what layout.py says."""
    done = run_python("import sys; from vhostmp.tools.gen_layout import main; sys.exit(main(['--check']))")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_ordered_access_has_its_argument() -> None:
    """Acquires, releases and fences stand under ORDER blocks whose pairs, tests and table rows exist."""
    done = run_python("import sys; from vhostmp.tools.check_order import main; sys.exit(main([]))")
    assert done.returncode == 0, done.stderr


def test_files_are_short_and_open_with_their_purpose() -> None:
    """No source file is longer than 600 lines, and each opens with a docstring or comment (generated ones too)."""
    faults: list[str] = []
    for folder in ("shm", "workers", "vhostmp", "tools", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in {".py", ".pyx", ".pxd", ".h"} or any(parent.is_symlink() for parent in path.parents):
                continue
            text = path.read_text()
            if len(text.splitlines()) > LINES_MAX:
                faults.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
            if text and not text.startswith(('"""', 'r"""', "/*", "#")):
                faults.append(f"{path.relative_to(ROOT)}: does not say what it is for")
    assert faults == []
