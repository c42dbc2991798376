"""The table of fuzz targets, and their seeds.

The seeds of a target are a file of text, corpus/TARGET.txt: one input a line, in hexadecimal. Those that once broke a
promise have `found`, and what it was, before it; run.py makes the others (`--merge`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import attrs

CORPUS: Final = Path(__file__).parent / "corpus"
FOUND: Final = "found"


@attrs.frozen
class Target:
    """Something that takes bytes and keeps its promises.

    Attributes:
        name: what it is called.
        module: where it is, in this folder. A compiled one (`_*.pyx`) has `entry` and `replay`; one in Python has
            `one`, which takes the bytes and raises when a promise is broken.
        covers: the files whose coverage is told, in part or all of what is fuzzed.
        lines: whether these are Python, so that lines are counted, not edges.
        counted: of a target in Python, the modules that atheris counts the coverage of, with what is below them.
    """

    name: str
    module: str
    covers: tuple[str, ...]
    lines: bool = False
    counted: tuple[str, ...] = ()

    @property
    def native(self) -> bool:
        """Whether it is compiled: run by libFuzzer and not by atheris."""
        return self.module.startswith("_")

    @property
    def corpus(self) -> Path:
        """The file of its seeds."""
        return CORPUS / f"{self.name}.txt"

    def seeds(self) -> dict[str, bytes]:
        """Return its inputs by name: "1", "2" ..., or what they once found."""
        found: dict[str, bytes] = {}
        for line in self.corpus.read_text().splitlines() if self.corpus.exists() else ():
            words = line.split()
            name = words[1] if words[0] == FOUND else str(len(found) + 1)
            found[name] = bytes.fromhex(words[-1])
        return found

    def unpack(self, to: Path) -> Path:
        """Write its inputs to a folder of their own, as a fuzzer wants them, and return that."""
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir(parents=True)
        for name, data in self.seeds().items():
            (to / name).write_bytes(data)
        return to

    def keep(self, inputs: Iterable[bytes]) -> int:
        """Make these its seeds, beside what once found something. Returns how many bytes the file has."""
        found = [f"{FOUND} {name} {data.hex()}" for name, data in self.seeds().items() if not name.isdigit()]
        lines = [*found, *sorted((data.hex() for data in inputs if data), key=lambda text: (len(text), text))]
        return self.corpus.write_text("".join(f"{line}\n" for line in lines))


SESSION: Final = tuple(
    f"vhostmp.{name}" for name in ("session", "handlers", "protocol", "inband", "backchannel", "statetransfer")
)

TARGETS: Final[Mapping[str, Target]] = {
    target.name: target
    for target in (
        Target("codec", "codec", ("vhostmp/protocol/*.py",), lines=True, counted=("vhostmp.protocol",)),
        Target("session", "session", ("vhostmp/session.py", "vhostmp/handlers/*.py"), lines=True, counted=SESSION),
        Target("split", "_ring", ("workers/_vring",)),
        Target("packed", "_ring", ("workers/_packed",)),
        Target("memory", "_memory", ("shm/_iotlb", "shm/_log", "shm/_memory")),
        Target("net", "_net", ("workers/backends/_fd", "workers/backends/_loopback")),
        Target("requests", "_requests", ("workers/devices/blk.py", "workers/devices/rng.py"), lines=True),
    )
}

INPUT_BYTES_MAX: Final = 512
