"""Runs the small back-end in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def flawed(path: Path, flaw: str = "") -> Generator[subprocess.Popen[str]]:
    """Lend a back-end that listens on `path`, with a flaw or without one."""
    words = [sys.executable, "-m", "tests.flawed.backend", str(path), *([flaw] if flaw else [])]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
