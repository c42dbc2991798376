"""A missing peer skips a test, and fails it where the peers are required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TEST = "tests/peers/test_testpmd.py::test_null_takes_every_packet"


def run_without_peers(folder: Path, required: str | None) -> subprocess.CompletedProcess[str]:
    """Run one peer test with a PATH on which there is only what makes namespaces."""
    for name in ("setpriv", "nsenter", "unshare", "stdbuf"):
        found = shutil.which(name)
        if found:
            (folder / name).symlink_to(found)
    environment = {name: value for name, value in os.environ.items() if name != "VHOSTMP_PEERS"}
    environment["PATH"] = str(folder)
    if required is not None:
        environment["VHOSTMP_PEERS"] = required
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", TEST]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_missing_peer_skips_and_says_so(tmp_path: Path) -> None:
    """Without DPDK the test is skipped, with a reason, and pytest is content."""
    done = run_without_peers(tmp_path, None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout
    assert "SKIPPED" in done.stdout


def test_missing_peer_fails_where_peers_are_required(tmp_path: Path) -> None:
    """The same skip is a failure with VHOSTMP_PEERS=require, and the reason is still to be read."""
    done = run_without_peers(tmp_path, "require")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout or "1 error" in done.stdout
    assert "VHOSTMP_PEERS=require" in done.stdout
