"""The unit file in docs/: systemd has nothing against it, and what it says our program understands."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from vhostmp.cli import make_parser
from vhostmp.systemd_store import FDSTORE, ROOM_MAX

UNIT: Final = Path(__file__).parents[2] / "docs" / "vhostmp@.service"
PROGRAM: Final = "/usr/bin/vhostmp"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze: apt-get install systemd")
def test_systemd_understands_it(tmp_path: Path) -> None:
    """No setting is unknown, in the wrong section, or out of use; those that are commented out neither."""
    text = UNIT.read_text()
    assert text.count(PROGRAM) == 1
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"^#(?=[A-Z]\w+=)", "", text, flags=re.M).replace(PROGRAM, "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_program_understands_it() -> None:
    """Its command line is one of ours, and the store that it offers is not larger than what can be passed on."""
    text = UNIT.read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", text, re.M)
    program, command, *options = line.replace("%i", "tap0").split()
    assert (program, command) == (PROGRAM, "serve")
    args = make_parser("serve").parse_args(["serve", *options])
    assert (args.socket_path, args.control_path) == (["/run/vhostmp/tap0/sock"], "/run/vhostmp/tap0/ctl")
    (room,) = re.findall(r"^#FileDescriptorStoreMax=(\d+)$", text, re.M)
    assert re.findall(rf"^#Environment={FDSTORE}=(\d+)$", text, re.M) == [room]
    assert int(room) < ROOM_MAX
