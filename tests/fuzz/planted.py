"""Plants bugs, one at a time, in a copy, and shows how long the fuzzer takes to find each: `make planted`.

A fuzzer that finds nothing says something only when it would have found something. Each bug is one of the kind that
back-ends have had: a bound left out, a field read twice, a descriptor not closed, an error path that keeps half of what
it did. Found or not is what counts; the seconds are told.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs

from tests.fuzz.build import BUILT, ROOT, Build, BuildError
from tests.fuzz.run import WRONG, Runner
from tests.fuzz.targets import INPUT_BYTES_MAX, TARGETS

SECONDS_MAX: Final = 120
COPIES: Final = BUILT / "planted"


@attrs.frozen
class Bug:
    """A bug: what it is, which target has to find it, and the edit that makes it."""

    name: str
    target: str
    path: str
    good: str
    bad: str


BUGS: Final = (
    Bug(
        "no bound on the next descriptor", "split", "workers/_vring.pyx",
        "        if d.next >= vq.num:\n            return VMP_BROKEN_NEXT\n", "",
    ),
    Bug(
        "a head that is read again after the check", "split", "workers/_vring.pyx",
        "        load_desc(&desc[heads[i]], &d)",
        "        load_desc(&desc[vmp_load_relaxed_u16(&ring[<uint16_t> (last + i) & mask])], &d)",
    ),
    Bug(
        "a chain longer than what is the device's", "packed", "workers/_packed.pyx",
        "        if found == ours:\n", "        if False:\n",
    ),
    Bug(
        "an indirect table that may end anywhere", "packed", "workers/_packed.pyx",
        "        at = memory_translate(vq.mem, &vq.cache, table.addr + <uint64_t> index * 16, 16)\n",
        "        at = memory_translate(vq.mem, &vq.cache, table.addr + <uint64_t> index * 16, 1)\n",
    ),
    Bug(
        "one page too many in the dirty log", "memory", "shm/_log.pyx",
        "    if last >= log.pages:", "    if last > log.pages:",
    ),
    Bug(
        "an entry of the IOTLB that outlives an overlap", "memory", "shm/_iotlb.pyx",
        "entry.iova <= last and entry.last >= first", "entry.iova <= last and entry.last > first",
    ),
    Bug(
        "a copy that is as long as the sender says", "net", "workers/backends/_loopback.pyx",
        "        if part > to.iov_len - to_at:\n            part = to.iov_len - to_at\n", "",
    ),
    Bug(
        "a transmit chain given back and not counted", "net", "workers/backends/_fd.pyx",
        "                count_drop(r, VMP_DROP_SHORT, 1)\n", "",
    ),
    Bug(
        "sectors behind the end of the disk", "requests", "workers/devices/blk.py",
        "            or length // SECTOR > self.sectors - sector\n", "",
    ),
    Bug(
        "a descriptor that nobody closes", "session", "vhostmp/session.py",
        "        if old is not None:\n            old.close()\n        if channel", "        if channel",
    ),
    Bug(
        "features kept before the device has taken them", "session", "vhostmp/handlers/negotiation.py",
        "    session.device.set_features(bits & ~BIT_30)\n    session.state.features = bits\n",
        "    session.state.features = bits\n    session.device.set_features(bits & ~BIT_30)\n",
    ),
    Bug(
        "a refused message whose bytes stay in the decoder", "codec", "vhostmp/protocol/codec.py",
        "        finally:\n            self._reset()\n", "        finally:\n            self._header = None\n",
    ),
)  # fmt: skip


class Copy(Build):
    """A copy of the instrumented build with a bug in it."""

    def __init__(self, number: int) -> None:
        """Say where it is."""
        super().__init__()
        built = self.tree
        self.tree = COPIES / str(number)
        shutil.copytree(built, self.tree, symlinks=True)
        self.engine = self.tree / "engine.so"
        self.preload = (self.engine, *self.preload[1:])

    def plant(self, bug: Bug) -> None:
        """Edit, and compile again what that concerns."""
        edit(self.tree, bug)
        if bug.path.endswith(".pyx"):
            self._compile(bug.path.removesuffix(".pyx"))


def edit(tree: Path, bug: Bug) -> None:
    """Put the bug into a tree."""
    path = tree / bug.path
    text = path.read_text()
    if text.count(bug.good) < 1:
        raise BuildError(f"{bug.path} is not as it was when '{bug.name}' was written")
    path.write_text(text.replace(bug.good, bug.bad, 1))


def find(number: int, bug: Bug) -> str | None:
    """Fuzz with the bug in place. Returns when and by what it was found, None: it was not."""
    target = TARGETS[bug.target]
    if target.native:
        build = Copy(number)
        build.plant(bug)
        runner = Runner(build)
        command, environment, where = runner.command(target)
    else:
        where = COPIES / str(number)
        for name in ("vhostmp", "shm", "workers", "tools", "tests"):
            shutil.copytree(ROOT / name, where / name, symlinks=True)
        edit(where, bug)
        command, environment, _ = Runner(None).command(target)
    folder = COPIES / f"{number}-found"
    corpus = COPIES / f"{number}-corpus"
    for made in (folder, corpus):
        made.mkdir(parents=True)
    words = [f"-max_total_time={SECONDS_MAX}", f"-max_len={INPUT_BYTES_MAX}", f"-artifact_prefix={folder}/"]
    start = time.monotonic()
    with (folder / "log").open("wb") as log:
        subprocess.run(
            [*command, *words, "-len_control=20", str(corpus), str(target.unpack(COPIES / f"{number}-seeds"))],
            env=environment, cwd=where, stdout=log, stderr=log, check=False,
        )  # fmt: skip
    seconds = time.monotonic() - start
    if not any(path.name != "log" for path in folder.iterdir()):
        return None
    found = WRONG.findall((folder / "log").read_text(errors="replace"))
    return f"{seconds:5.1f} s   {found[0].strip()[:80] if found else 'a crash'}"


def main(words: Sequence[str]) -> int:
    """Plant each bug, or those whose numbers are given."""
    Build().make(os.cpu_count() or 1)
    shutil.rmtree(COPIES, ignore_errors=True)
    missed = 0
    for number, bug in enumerate(BUGS):
        if words and str(number) not in words:
            continue
        found = find(number, bug)
        missed += found is None
        print(f"{number:2} {bug.target:9}{bug.name:50}{found or 'NOT FOUND'}", flush=True)
    shutil.rmtree(COPIES, ignore_errors=True)
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BuildError as error:
        sys.exit(f"planted: {error}")
