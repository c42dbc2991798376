"""What runs on the host: guests that share the cases among them, and what they say put together.

One processor a guest and one guest a processor: emulated processors that share memory slow each other down.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import attrs

from tests.kernel.guest import Request
from tests.kernel.rules import RULES
from tests.peers import image, python_root
from tests.peers.guest import Guest

DRIVERS: Final = ("virtio_pci", "virtio_blk", "squashfs", "tun", "vhost_net")
PACKAGES: Final = ("vhostmp", "tests/kernel")
MEMORY: Final = "384M"
SECTOR: Final = 512
MOUNTS: Final = (
    "mkdir -p /oracle && mount -t squashfs /dev/vda /oracle && mount --bind /dev /oracle/dev"
    " && mkdir -p /dev/shm && mount -t tmpfs tmpfs /oracle/dev/shm && mount -t tmpfs tmpfs /oracle/tmp"
    " && mount -t proc proc /oracle/proc && mount -t sysfs sysfs /oracle/sys"
)
#: How long a guest may say nothing, while it makes a case smaller say, seconds.
SILENCE: Final = 600.0


@attrs.define
class Report:
    """What came of a run."""

    cases: int = 0
    steps: int = 0
    compared: int = 0
    rules: Counter[str] = attrs.field(factory=Counter[str])
    differences: list[dict[str, Any]] = attrs.field(factory=list[dict[str, Any]])
    needless: list[dict[str, Any]] = attrs.field(factory=list[dict[str, Any]])
    """Examples that do not need their rule any more."""

    @property
    def good(self) -> bool:
        """Whether all is explained, and every rule is needed."""
        return not self.differences and not self.needless

    def take(self, line: Mapping[str, Any]) -> None:
        """Take in what a guest said."""
        if "difference" in line:
            self.differences.append(line["difference"])
        elif "example" in line:
            self.needless.append(line["example"])
        elif "done" in line:
            done = line["done"]
            self.cases += done["cases"]
            self.steps += done["steps"]
            self.compared += done["compared"]
            self.rules.update(done["rules"])

    def __str__(self) -> str:
        """For people."""
        lines = [f"{self.cases} cases, {self.compared} of {self.steps} steps compared"]
        lines += [f"  {self.rules[rule.name]:6} {rule.name}" for rule in RULES if self.rules[rule.name]]
        for example in self.needless:
            lines.append(f"rule {example['rule']} is not needed any more by its example: {_again(example)}")
        for found in self.differences:
            lines.append(f"case {found['seed']} differs at step {found['step']}, {found['field']}")
            lines += [f"  Linux   {found['kernel']}", f"  vhostmp {found['ours']}", f"  {_again(found)}"]
        return "\n".join(lines)


def _again(found: Mapping[str, Any]) -> str:
    """Return the command that runs a case again."""
    return f"python -m tests.kernel --case '{json.dumps(found['case'], separators=(',', ':'))}'"


class _Teller:
    """A guest at work on its share of the cases."""

    def __init__(self, guest: Guest, request: Request) -> None:
        """Send it to work."""
        self._guest: Final = guest
        self._read = len(guest.qemu.output)
        self._said = time.monotonic()
        self.request: Final = request
        self.done = False
        self.count = 0
        guest.qemu.send(f"{python_root.command('/oracle', 'tests.kernel.guest', '/dev/vdb')}; echo ended $?\n")

    def listen(self) -> list[Mapping[str, Any]]:
        """Return what it has said since last asked. AssertionError when it ended before its time, or says nothing."""
        output = self._guest.qemu.output
        end = output.rfind("\n") + 1
        new, self._read = output[self._read : end].splitlines(), max(self._read, end)
        lines = [json.loads(line) for line in new if line.startswith("{")]
        for line in lines:
            self.count = line.get("progress", self.count)
            self.done = self.done or "done" in line
        failed = any(line.startswith("ended ") for line in new) and not self.done
        if new:
            self._said = time.monotonic()
        if failed or time.monotonic() - self._said > SILENCE or not self._guest.qemu.running:
            raise AssertionError(self._guest.qemu.describe(f"the guest with {self.request} ended, or says nothing"))
        return lines


def run(
    folder: Path,
    requests: Sequence[Request],
    *,
    plant: Mapping[str, Path] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Report:
    """Boot a guest for each request, in the empty directory `folder`, and wait for all of them.

    `plant`: compiled modules to put in the place of ours, by their names. `progress` is told how many cases are done.
    """
    built = image.build(folder, DRIVERS)
    root = python_root.build(folder, PACKAGES, plant or {})
    report = Report()
    with ExitStack() as stack:
        tellers: list[_Teller] = []
        for number, request in enumerate(requests):
            place = folder / str(number)
            place.mkdir()
            asked = request.dump().encode()
            (place / "request").write_bytes(asked + b" " * (-len(asked) % SECTOR))
            drives = [f"file={file},if=virtio,format=raw,readonly=on" for file in (root, place / "request")]
            options = ["-m", MEMORY, "-drive", drives[0], "-drive", drives[1]]
            guest = stack.enter_context(Guest(built, options, place, processors=1, append="mitigations=off"))
            guest.run(MOUNTS)
            tellers.append(_Teller(guest, request))
        while not all(teller.done for teller in tellers):
            for teller in tellers:
                for line in teller.listen():
                    report.take(line)
            progress(sum(teller.count for teller in tellers))
            time.sleep(0.1)
    return report


def shares(seed: str, cases: int, guests: int) -> list[Request]:
    """Share cases among guests; the first one has the examples too."""
    return [
        Request(seed=seed, cases=cases, first=number, every=guests, examples=number == 0) for number in range(guests)
    ]
