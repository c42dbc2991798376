"""What a frame costs Linux's vhost-net and ours, in a guest whose clock counts instructions: `vhostmp bench`.

    python -m tests.kernel.rates FOLDER [--rounds N] [--against-itself] ...

FOLDER is an empty directory; what follows is for `vhostmp.tools.bench.vhost_net`, which runs in the guest and whose
lines are printed. Exit status 1 with a line that says why there are none.

Rules: the guest has one processor, and each of its instructions takes a nanosecond of its time (-icount): what comes
out does not depend on what else this machine does. An instruction that works on a string counts once for each round of
its own; without ERMS the kernel copies eight bytes in each and not one.
Source: QEMU, "-icount" in qemu-options; Linux, arch/x86/lib/copy_user_64.S.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.kernel.host import DRIVERS, MEMORY, MOUNTS
from tests.peers import image, python_root
from tests.peers.guest import PROGRAM, Guest

COUNTING: Final = ("-icount", "shift=0,sleep=off")
MODULE: Final = "vhostmp.tools.bench.vhost_net"
PATIENCE: Final = 900.0


def missing() -> str | None:
    """Say what a guest needs and this machine lacks; None when all is there."""
    for name in (PROGRAM, "mksquashfs", "setpriv"):
        if shutil.which(name) is None:
            return f"no {name} (make peers)"
    return image.missing()


def run(folder: Path, *runs: Sequence[str]) -> list[list[str]]:
    """Boot a guest, run the program in it with each list of arguments; returns the lines of each run.

    AssertionError when the guest, or the program in it, does not do what it should.
    """
    built = image.build(folder, DRIVERS)
    root = python_root.build(folder, ["vhostmp"], {})
    options = ["-m", MEMORY, "-drive", f"file={root},if=virtio,format=raw,readonly=on", *COUNTING]
    with Guest(
        *(built, options, folder),
        processors=1,
        append="mitigations=off",
        accelerator="tcg,thread=single",
        cpu="max,-erms,-fsrm",
    ) as guest:
        guest.run(MOUNTS)
        return [guest.run(python_root.command("/oracle", MODULE, *one), PATIENCE).splitlines() for one in runs]


def main(arguments: Sequence[str]) -> int:
    """Run it once; returns the exit status."""
    try:
        if reason := missing():
            raise AssertionError(reason)
        (lines,) = run(Path(arguments[0]), arguments[1:])
    except AssertionError as error:
        print(*str(error).split(), file=sys.stderr)
        return 1
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
