"""shm/atomics.h and shm/epoch.h under ThreadSanitizer: the C program atomics.c, as it is and with mistakes planted.

What it can see and what not: atomics.c has that. What fences are for is seen by tests/torture/test_epoch.py, on the
machine at hand, and by tests/model/test_order.py, on any.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Final

import pytest

from tests.helpers import TORTURE_SECONDS

pytestmark = pytest.mark.slow
SOURCE: Final = Path(__file__).with_name("atomics.c")
SHM: Final = SOURCE.parents[2] / "shm"
RACE: Final = 66  # ThreadSanitizer's exit status
WRONG: Final = 1
#: How long a planted mistake may take to show, seconds: each took less than one on a machine with two cores.
PATIENCE: Final = 90


def compiler() -> list[str]:
    """Return the command that compiles for ThreadSanitizer."""
    return [*str(sysconfig.get_config_var("CC")).split(), "-std=gnu11", "-O2", "-g", "-fsanitize=thread", "-Wall"]


@pytest.fixture(scope="module")
def reason_to_skip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return why nothing can be run here, "" when it can."""
    program = tmp_path_factory.mktemp("tsan") / "nothing"
    command = [*compiler(), "-x", "c", "-", "-o", str(program)]
    made = subprocess.run(command, input="int main(void) { return 0; }", text=True, capture_output=True, check=False)
    if made.returncode:
        return "the compiler has no ThreadSanitizer (gcc: libtsan)"
    return "" if run([str(program)]).returncode == 0 else "ThreadSanitizer does not run here"


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program with its memory where ThreadSanitizer wants it: with much randomness in addresses it gives up."""
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*fixed, *command],
        env={**os.environ, "TSAN_OPTIONS": f"halt_on_error=1:exitcode={RACE}"},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def built(tmp_path: Path, reason_to_skip: str, request: pytest.FixtureRequest) -> str:
    """Return the program with the mistake of the test's parameter `plant`, or none; skip without ThreadSanitizer."""
    if reason_to_skip:
        pytest.skip(reason_to_skip)
    plant = getattr(request, "param", "NONE")
    program = str(tmp_path / "atomics")
    options = ["-Wextra", "-Werror", f"-DPLANT={plant}", f"-I{SHM}"]
    subprocess.run([*compiler(), *options, str(SOURCE), "-o", program, "-lpthread"], check=True)
    return program


@pytest.mark.parametrize("pattern", ["epoch", "move", "ring", "seqlock"])
def test_nothing_is_reported(built: str, pattern: str) -> None:
    """No access to what is handed over races with another, and no value is wrong; every thread gets something done."""
    done = run([built, pattern, str(int(TORTURE_SECONDS * 1000))])
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [int(count) for count in re.findall(r" (\d+)", done.stdout)]
    assert len(counts) > 1, done.stdout
    assert all(counts), done.stdout


@pytest.mark.parametrize(
    ("built", "pattern", "status"),
    [
        ("RELAXED_EXIT", "epoch", RACE),
        ("RELAXED_EXIT", "move", RACE),
        ("RELAXED_LOOK", "epoch", RACE),
        ("NO_WAIT", "epoch", RACE),
        ("RELAXED_PUBLISH", "epoch", RACE),
        ("ONE_GENERATION", "move", RACE),
        ("RELAXED_AVAIL", "ring", RACE),
        ("RELAXED_USED", "ring", RACE),
        ("NO_LOOK_AGAIN", "ring", WRONG),
        ("NO_SECOND_LOOK", "seqlock", WRONG),
    ],
    indirect=["built"],
)
def test_planted_mistake_is_found(built: str, pattern: str, status: int) -> None:
    """Each mistake is reported: by ThreadSanitizer where an order is missing, by the threads where a value is wrong."""
    done = run([built, pattern, str(1000 * PATIENCE)])
    assert done.returncode == status, done.stdout + done.stderr
