"""What the README files say is so: their examples run, their tables name every file and every command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES: list[str] = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
EXAMPLE_LINES_MAX = 20
FOLDERS = ("shm", "workers", "vhostmp", "tools")
#: Made by tools or by use, and so not listed.
UNLISTED = {"build", "dist", "vhostmp.egg-info"}


def example(word: str) -> str:
    """The one Python example that holds a word."""
    (found,) = (text for text in EXAMPLES if word in text)
    return found


def run(*command: str, cwd: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def named(readme: Path) -> set[str]:
    """The names in backquotes in the first cells of a file's tables, without trailing slashes."""
    cells = re.findall(r"^\| *(`.*?) \|", readme.read_text(), re.M)
    return {name.rstrip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_two_commands_stand_on_top() -> None:
    """The first thing below the title is how to see it run and how to test it; both are targets of the Makefile."""
    first, second = README.split("\n\n")[1].splitlines()
    assert first.split("#")[0].strip() == "make demo"
    assert second.split("#")[0].strip() == "make test"
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake (\w+)", README)) <= targets | {"PYTHON"}


def test_every_file_in_the_root_is_listed() -> None:
    """The index in the README names every file and folder of the checkout's root, and no other."""
    present = {path.name for path in ROOT.iterdir()} - UNLISTED
    present = {name for name in present if not name.startswith(".")} | {".ci/run", ".pre-commit-config.yaml"}
    index = ROOT / "README.md"
    listed = {name for name in named(index) if (ROOT / name).exists()}
    assert present - listed == {"README.md"}
    assert all((ROOT / name).exists() for name in re.findall(r"^\| `([^`]+)/?` \|", README.split("## Files")[1], re.M))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_is_listed(folder: str) -> None:
    """The README of a folder names each of its modules, subfolders and documents, and nothing that is not there."""
    here = ROOT / folder
    paths = [path for path in here.iterdir() if not path.is_symlink() and not path.name.startswith(("__init__", "."))]
    modules = {path.name for path in paths if path.suffix in {".py", ".pyx", ".sh"}}
    modules |= {path.name for path in paths if path.is_dir() and path.name != "__pycache__" and any(path.iterdir())}
    listed = named(here / "README.md")
    assert modules - listed == set()
    assert {name for name in listed if not (here / name).exists() and " " not in name} == set()


def test_python_back_end_is_short() -> None:
    """A back-end in Python takes at most 20 lines."""
    assert len(example("class Mirror").splitlines()) <= EXAMPLE_LINES_MAX


@pytest.mark.slow
def test_hypervisor_example_runs() -> None:
    """The example of device verbs runs as it stands, and ends."""
    done = run(sys.executable, "-c", example("NetDevice"), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"0x[0-9a-f]+\n[\d.]+ us until .*\n", done.stdout)


@pytest.mark.slow
def test_commands_exist() -> None:
    """Each command that the README shows is one of the program's, and so is each option it is shown with."""
    lines = re.findall(r"^ +vhostmp .*|`vhostmp [^`]*`", README, re.M)
    shown = {match[1] for line in lines if (match := re.search(r"vhostmp ([a-z-]+)", line))}
    assert {"serve", "swap", "show", "qemu-args", "demo"} <= shown
    for command in sorted(shown):
        done = run(sys.executable, "-m", "vhostmp", command, "--help", cwd=ROOT)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        options = {o for line in lines if f"vhostmp {command}" in line for o in re.findall(r"--[a-z-]+", line)}
        assert {option for option in options if option not in done.stdout} == set(), command
