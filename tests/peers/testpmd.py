"""DPDK's testpmd, as a foreign front-end (virtio-user) and as a foreign back-end (vhost), and the huge pages it needs.

Rules:
- Huge pages are asked of the kernel on top of what there is, and given back. Their mount is seen by the test's programs
  alone: it lives in a mount namespace held by a process, and goes away with the last one inside.
- Two testpmd at a time need folders of different names: the name tells their huge pages apart. What a testpmd keeps for
  itself (EAL's run-time directory) is in its folder as well, so nothing is left in /var/run.
- Numbers are read when testpmd has been stopped, or are lower bounds: its counters move all the time.
- ``--single-file-segments`` is a must for virtio-user: else each page is a region, and there may be 8 of them.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType

from tests.peers.processes import Child, run

PROGRAM = "dpdk-testpmd"
MEGABYTES = 256
"""Memory of one testpmd."""
MBUFS = 16384
_PAGE_MEGABYTES = 2
_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_PROMPT = "testpmd> "


class NotEnoughMemoryError(Exception):
    """The machine has not so many huge pages to give."""


class HugePages(AbstractContextManager["HugePages"]):
    """Free huge pages of 2 MiB for `testpmds` processes at a time, and a mount to take them from. Needs root."""

    def __init__(self, folder: Path, testpmds: int) -> None:
        """Reserve pages and mount them at the new directory `folder`."""
        wanted = testpmds * MEGABYTES // _PAGE_MEGABYTES
        self._before = self._read("nr_hugepages")
        more = max(0, wanted - self._read("free_hugepages"))
        if more:
            (_PAGES / "nr_hugepages").write_text(f"{self._before + more}\n")
        try:
            if self._read("free_hugepages") < wanted:
                raise NotEnoughMemoryError(f"{self._read('free_hugepages')} free huge pages of 2 MiB, need {wanted}")
            folder.mkdir()
            mount = f"mount -t hugetlbfs -o pagesize={_PAGE_MEGABYTES}M none {shlex.quote(str(folder))}"
            command = ["unshare", "--mount", "sh", "-c", f"{mount} && echo ready && exec cat"]
            self._holder = Child(command, folder.with_suffix(".log"))
        except BaseException:
            self._restore()
            raise
        self.folder = folder
        try:
            self._holder.expect("^ready$")
        except BaseException:
            self.__exit__(None, None, None)
            raise

    @staticmethod
    def _read(name: str) -> int:
        """Read one of the kernel's numbers."""
        return int((_PAGES / name).read_text())

    def _restore(self) -> None:
        """Give back what was taken beyond what there was."""
        if self._read("nr_hugepages") != self._before:
            (_PAGES / "nr_hugepages").write_text(f"{self._before}\n")

    def inside(self, *command: str) -> list[str]:
        """Return the command line that runs `command` where the mount is."""
        return ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "--", *command]

    def free(self, prefix: str) -> None:
        """Free the pages of a testpmd that was killed: their files are named after its `prefix`."""
        run(self.inside("sh", "-c", f"rm -f {shlex.quote(f'{self.folder}/{prefix}')}map_*"))

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let the mount go, and give back what was reserved."""
        self._holder.end()
        self._restore()


class Testpmd(AbstractContextManager["Testpmd"]):
    """One testpmd with one port, taking commands. Leaving the context ends it."""

    __test__ = False  # not a test class, whatever its name

    def __init__(
        self,
        vdev: str,
        pages: HugePages,
        folder: Path,
        core: int,
        options: Sequence[str],
        more_eal: Sequence[str] = (),
    ) -> None:
        """Start testpmd on the virtual device `vdev` and wait for its prompt.

        Both its threads run on the processor `core`: the one that reads commands sleeps while the other one forwards.
        """
        folder.mkdir()
        self._pages = pages
        self._prefix = folder.name
        eal = [
            "--lcores",
            f"0@{core},1@{core}",
            "--file-prefix",
            folder.name,
            "--huge-dir",
            str(pages.folder),
            "--no-pci",
            *more_eal,
        ]
        memory = ["-m", str(MEGABYTES), "--single-file-segments", "--no-telemetry", "--vdev", vdev]
        own = ["-i", "--no-mlockall", "--nb-cores=1", f"--total-num-mbufs={MBUFS}"]
        # stdbuf: a file as output makes C libraries write only when a buffer is full.
        self.child = Child(
            pages.inside("stdbuf", "-o0", PROGRAM, *eal, *memory, "--", *own, *options),
            folder / "testpmd.log",
            grace=3.0,
            env={"RUNTIME_DIRECTORY": str(folder)},
        )
        try:
            self.child.expect(re.escape(_PROMPT))
        except BaseException:
            self.child.end()
            raise

    @classmethod
    def virtio_user(
        cls,
        socket: Path,
        pages: HugePages,
        folder: Path,
        *,
        queues: int = 1,
        mode: str = "txonly",
        device: Sequence[str] = (),
        options: Sequence[str] = (),
        eal: Sequence[str] = (),
    ) -> Testpmd:
        """Start a front-end of the back-end at `socket`, on the last processor; it forwards nothing yet.

        `device` are further arguments of the virtual device, `options` of testpmd, `eal` of DPDK.
        """
        more = [*([f"queues={queues}"] if queues > 1 else []), *device]
        vdev = ",".join([f"net_virtio_user0,path={socket},queue_size=256", *more])
        whole = [f"--rxq={queues}", f"--txq={queues}", f"--forward-mode={mode}", *options]
        return cls(vdev, pages, folder, max(os.sched_getaffinity(0)), whole, eal)

    @classmethod
    def vhost(cls, socket: Path, pages: HugePages, folder: Path) -> Testpmd:
        """Start a back-end at `socket`, on the first processor; it takes what comes."""
        options = ["--forward-mode=rxonly", "--auto-start"]
        return cls(f"net_vhost0,iface={socket}", pages, folder, min(os.sched_getaffinity(0)), options)

    def kill(self) -> None:
        """Have it die without a chance to say so."""
        self.child.kill()
        self._pages.free(self._prefix)

    def command(self, text: str) -> str:
        """Carry out one command and return what it printed."""
        self.child.send(f"{text}\n")
        return self.child.expect(rf"{re.escape(text)}\s*\n((?:.*\n)*?)(?={re.escape(_PROMPT)})")[1]

    def stats(self) -> tuple[int, int]:
        """Return the packets the port has received and sent since the start or `clear`."""
        text = self.command("show port stats 0")
        received = re.search(r"RX-packets:\s*(\d+)", text)
        sent = re.search(r"TX-packets:\s*(\d+)", text)
        assert received, text
        assert sent, text
        return int(received[1]), int(sent[1])

    def wait_for_stats(self, received: int = 0, sent: int = 0) -> None:
        """Wait until the port has received and sent at least so many packets more than now."""
        first = self.stats()

        def enough() -> bool:
            now = self.stats()
            return now[0] - first[0] >= received and now[1] - first[1] >= sent

        self.child.wait_for(enough, f"testpmd receives {received} and sends {sent} packets more than {first}")

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let it close its port, then end it."""
        if self.child.running:
            with suppress(AssertionError):
                self.child.send("quit\n")
                self.child.wait(10.0)
        self.child.end()
