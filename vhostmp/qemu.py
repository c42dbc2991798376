"""The QEMU options that attach a virtual machine to a vhost-user socket, and ``vhostmp qemu-args`` which prints them.

Rules: this file starts at most one program, ``qemu --version``, and only to learn how that QEMU spells "try again when
the back-end went away": ``reconnect=SECONDS`` before 9.2, ``reconnect-ms=MILLISECONDS`` from 9.2 (7.2 refuses the new
name, and the old one is deprecated in 9.2). Nothing here opens the socket or needs a back-end to run.

What the options are for:

- the guest's memory must be shared, since worker processes map it: a memfd object, named as the machine's memory;
- one character device for the socket. QEMU is the client unless the back-end connects (``vhostmp serve --connect``);
- a disk or a source of random numbers is one device behind that; a network card is
  one netdev and one virtio-net-pci card; with several queue pairs ``mq=on`` and an MSI-X vector for each ring, for the
  control queue and for configuration changes (2 N + 2), since rings that share a vector cannot be signalled directly;
- without MSI-X (``vectors=0``) where asked: QEMU 7.2.22 without KVM ends with a segmentation fault when the driver
  starts a vhost-user card that has MSI-X, since it takes a way that only KVM has (seen in msix_set_vector_notifiers);
- behind a virtual IOMMU, where asked: Intel's, which must come before the devices it translates for and tells them
  what the guest takes back (device-iotlb); a card whose driver has to use it (iommu_platform) and is none from before
  virtio 1.0, which know of no IOMMU (disable-legacy), and to which it is told (ats). That is a capability of PCI
  Express, which QEMU's cards have behind a port only. Without it a guest that invalidates a domain as a whole, as Linux
  does by default, is not heard by vhost at all: the card goes on writing to memory that the guest uses otherwise
  (seen with 7.2.22);
- memory, machine and IOMMU are there once: with the first device of a virtual machine. Further ones (``index``) have
  ids of their own, and where they need a port, a chassis of its own.

Words are printed as they are, for the shell only splits and globs what ``$(...)`` gives it, and takes no quotes away.

Source: QEMU docs/interop/vhost-user.rst; QEMU docs/about/deprecated.rst, "reconnect" (9.2).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final

import attrs

from vhostmp.errors import LocalError

DEFAULT_PROGRAM = "qemu-system-x86_64"
DEFAULT_MEMORY = "1G"
RECONNECT_MS = 1000
MAX_QUEUE_PAIRS = 128
"""A ring's index is 8 bits wide in SET_VRING_KICK and its like, and each pair has two rings."""
MAX_PATH_BYTES = 107
"""`sun_path` holds 108 bytes, one of which ends the string (unix(7))."""
PROBE_SECONDS = 10.0

_IOMMU = ("-device", "intel-iommu,device-iotlb=on")
_VERSION = re.compile(r"\bversion (\d+)\.(\d+)")
_MEMORY = re.compile(r"[1-9][0-9]*[MG]")
_SPLIT_OR_GLOBBED = re.compile(r"[\s*?\[\\]")


@attrs.frozen(order=True)
class Version:
    """A QEMU version; the third number changes no option."""

    major: int
    minor: int

    def __str__(self) -> str:
        """Write it as QEMU does."""
        return f"{self.major}.{self.minor}"


RECONNECT_MS_SINCE = Version(9, 2)

Runner = Callable[[Sequence[str]], str]
"""Runs a program and returns its standard output; raises OSError or subprocess.SubprocessError when that fails."""


def run_program(command: Sequence[str]) -> str:
    """Run `command` and return what it printed.

    Raises:
        OSError: it cannot be started.
        subprocess.SubprocessError: it failed, or took longer than PROBE_SECONDS.
    """
    return subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_SECONDS
    ).stdout


def parse_version(text: str) -> Version | None:
    """Find the version in what ``qemu --version`` printed; None when there is none."""
    found = _VERSION.search(text)
    return Version(int(found[1]), int(found[2])) if found else None


def probe_version(program: str = DEFAULT_PROGRAM, runner: Runner = run_program) -> Version | None:
    """Ask `program` for its version; None when it is not there, fails, or prints something else."""
    try:
        return parse_version(runner([program, "--version"]))
    except (OSError, subprocess.SubprocessError):
        return None


def _absolute(path: str) -> str:
    """Make a path absolute; the type checker cannot follow os.path.abspath itself as a converter."""
    return os.path.abspath(path)


@attrs.frozen(kw_only=True)
class Card:
    """A device behind a vhost-user socket, and the machine it is for.

    Raises: LocalError: a value is out of range; the message says which.
    """

    path: str = attrs.field(converter=_absolute)
    """The socket; made absolute, since QEMU may be started elsewhere."""
    device: str = "net"
    """Its class: net, blk or rng."""
    queues: int = 1
    """Of a disk: not more than the back-end serves (``vhostmp serve --queues``)."""
    queue_pairs: int = 1
    """Of a network card: 1 to MAX_QUEUE_PAIRS; not more than the back-end serves (``vhostmp serve --queue-pairs``)."""
    memory: str = DEFAULT_MEMORY
    """The guest's memory, a number of MiB or GiB such as ``512M`` or ``1G``."""
    connect: bool = False
    """The back-end connects to QEMU, which listens; otherwise QEMU connects, and again after it lost the back-end."""
    msix: bool = True
    """False gives the card the one old interrupt line, for a QEMU without KVM (see above)."""
    iommu: bool = False
    """A network card behind a virtual IOMMU; the back-end has to translate too (``vhostmp serve --iommu``)."""
    index: int = 0
    """Which of the devices of its virtual machine: the first one, 0, comes with memory, machine and IOMMU."""

    def __attrs_post_init__(self) -> None:
        """Refuse what QEMU or the socket could not take."""
        length = len(os.fsencode(self.path))
        if length > MAX_PATH_BYTES:
            raise LocalError(f"socket path is {length} bytes long, more than {MAX_PATH_BYTES}: {self.path}")
        if _SPLIT_OR_GLOBBED.search(self.path):
            raise LocalError(f"the shell would take {self.path!r} apart in $(...): no blank, *, ?, [ or \\ in the path")
        if self.index < 0:
            raise LocalError(f"index {self.index} is not 0, for the first device, or more")
        if self.device.startswith("python:"):
            raise LocalError(
                "no class of device of one's own in QEMU: attach the one it has for that class, if it has one, such as "
                "vhost-user-i2c-pci, to a chardev for the socket; it needs shared memory, as a network card does"
            )
        if self.device not in DEVICES:
            raise LocalError(f"no class of device {self.device!r}: choose one of {' '.join(DEVICES)}")
        if self.iommu and self.device != "net":
            raise LocalError(f"an IOMMU goes with a network card, not with {self.device}")
        if not 1 <= self.queues <= 2 * MAX_QUEUE_PAIRS:
            raise LocalError(f"{self.queues} queues are not within 1 to {2 * MAX_QUEUE_PAIRS}")
        if not 1 <= self.queue_pairs <= MAX_QUEUE_PAIRS:
            raise LocalError(f"{self.queue_pairs} queue pairs are not within 1 to {MAX_QUEUE_PAIRS}")
        if not _MEMORY.fullmatch(self.memory):
            raise LocalError(
                f"memory '{self.memory}' is not a whole number followed by M or G, such as {DEFAULT_MEMORY}"
            )


def options(card: Card, version: Version | None = None) -> list[str]:
    """Make the QEMU options for `card`.

    Args:
        card: what to attach.
        version: the QEMU they are for; None takes RECONNECT_MS_SINCE or newer.

    Returns:
        Words for a command line, in pairs of an option and its value; a comma in the path is doubled, as QEMU wants.
    """
    socket = f"socket,id={_char(card)},path={card.path.replace(',', ',,')}"
    if card.connect:
        socket += ",server=on,wait=off"
    elif card.device == "rng":
        pass  # QEMU does not wait for the connection of one that reconnects, and ends with a failed assertion (7.2.22)
    elif version is None or version >= RECONNECT_MS_SINCE:
        socket += f",reconnect-ms={RECONNECT_MS}"
    else:
        socket += f",reconnect={RECONNECT_MS // 1000}"
    return [*([] if card.index else _machine(card)), "-chardev", socket, *DEVICES[card.device](card)]


def _machine(card: Card) -> list[str]:
    return [
        *("-m", card.memory),
        *("-object", f"memory-backend-memfd,id=vhostmp-mem,size={card.memory},share=on"),
        *("-machine", "q35,memory-backend=vhostmp-mem"),
        *(_IOMMU if card.iommu else ()),
    ]


def _char(card: Card) -> str:
    return f"vhostmp-char{card.index}"


def _net(card: Card) -> list[str]:
    netdev = f"vhost-user,id=vhostmp-net{card.index},chardev={_char(card)}"
    device = f"virtio-net-pci,netdev=vhostmp-net{card.index}"
    if card.queue_pairs > 1:
        netdev += f",queues={card.queue_pairs}"
        device += ",mq=on"
    if not card.msix:
        device += ",vectors=0"
    elif card.queue_pairs > 1:
        device += f",vectors={2 * card.queue_pairs + 2}"
    if not card.iommu:
        return ["-netdev", netdev, "-device", device]
    port = f"pcie-root-port,id=vhostmp-port{card.index}" + (f",chassis={card.index}" if card.index else "")
    device += f",bus=vhostmp-port{card.index},iommu_platform=on,ats=on,disable-legacy=on"
    return ["-netdev", netdev, "-device", port, "-device", device]


def _blk(card: Card) -> list[str]:
    # Without num-queues QEMU takes as many as the guest has processors, and refuses a back-end with fewer.
    device = f"vhost-user-blk-pci,chardev={_char(card)},num-queues={card.queues}"
    return ["-device", device if card.msix else f"{device},vectors=0"]


def _rng(card: Card) -> list[str]:
    device = f"vhost-user-rng-pci,chardev={_char(card)}"
    return ["-device", device if card.msix else f"{device},vectors=0"]


DEVICES: Final[dict[str, Callable[[Card], list[str]]]] = {"net": _net, "blk": _blk, "rng": _rng}
"""By class of device, the options that make it, behind the character device."""


def format_options(words: Sequence[str]) -> str:
    """Write `options` one to a line. No word has a blank (`Card` refuses a path that has one)."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return "".join(f"{option} {value}\n" for option, value in pairs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``vhostmp qemu-args`` on `parser`; `run` takes what it parses."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Print the QEMU options that give a virtual machine a network card, a disk or a source of random numbers\n"
        "behind the vhost-user socket PATH."
    )
    parser.epilog = (
        "examples:\n"
        "  vhostmp serve --socket-path /tmp/net0.sock --backend tap:tap0 &\n"
        "  qemu-system-x86_64 -accel kvm -drive file=disk.img $(vhostmp qemu-args /tmp/net0.sock)\n"
        "\n"
        "  qemu-system-x86_64 -accel kvm $(vhostmp qemu-args --device blk /tmp/blk0.sock) \\\n"
        "                                $(vhostmp qemu-args --index 1 /tmp/net0.sock)    two devices for one machine\n"
    )
    parser.add_argument("path", metavar="PATH", help="the socket of vhostmp serve --socket-path")
    parser.add_argument(
        "--device", default="net", metavar="CLASS", help="class of the device: net, blk or rng (default: %(default)s)"
    )
    parser.add_argument(
        "--queues", type=int, default=1, metavar="N", help="queues of a disk; serve as many (default: %(default)s)"
    )
    parser.add_argument(
        "--queue-pairs",
        type=int,
        default=1,
        metavar="N",
        help="queue pairs of the card; serve with as many (default: %(default)s)",
    )
    parser.add_argument(
        "--index",
        type=int,
        default=0,
        metavar="N",
        help="which of several devices of that virtual machine: the first, 0, brings its memory, all others are "
        "1, 2 and so on (default: 0)",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help=f"memory of the guest, in M or G; with index 0 (default: {DEFAULT_MEMORY})"
    )
    parser.add_argument(
        "--connect", action="store_true", help="QEMU listens on PATH and the back-end connects to it (serve --connect)"
    )
    parser.add_argument(
        "--iommu",
        action="store_true",
        help="put the card behind a virtual IOMMU, which comes with index 0; serve with --iommu, and start Linux "
        "guests with intel_iommu=on",
    )
    parser.add_argument(
        "--no-msix",
        dest="msix",
        action="store_false",
        help="for a guest without KVM (-accel tcg) under QEMU 7.2, which crashes on vhost-user with MSI-X",
    )
    parser.add_argument(
        "--qemu",
        metavar="PROGRAM",
        help=f"the QEMU to be started, which is asked for its version (default: {DEFAULT_PROGRAM})",
    )


def run(args: argparse.Namespace, runner: Runner = run_program) -> int:
    """Carry out ``vhostmp qemu-args``: options on standard output; a remark on standard error if there is no QEMU.

    Returns:
        The exit status, 0.

    Raises:
        LocalError: an argument is out of range, or the QEMU that it names does not tell its version; the command line
            turns it into one line and exit status 2.
    """
    if args.index and args.memory is not None:
        raise LocalError(f"--memory goes with the first device, not with --index {args.index}")
    card = Card(
        path=args.path,
        device=args.device,
        queues=args.queues,
        queue_pairs=args.queue_pairs,
        memory=DEFAULT_MEMORY if args.memory is None else args.memory,
        connect=args.connect,
        msix=args.msix,
        iommu=args.iommu,
        index=args.index,
    )
    version = probe_version(args.qemu or DEFAULT_PROGRAM, runner)
    if version is None and args.qemu is not None:
        raise LocalError(f"'{args.qemu} --version' tells no version: give --qemu the QEMU that is to be started")
    if version is None:
        sys.stderr.write(
            f"vhostmp: cannot run {DEFAULT_PROGRAM} --version; options are for QEMU {RECONNECT_MS_SINCE} or newer\n"
        )
    sys.stdout.write(format_options(options(card, version)))
    return 0
