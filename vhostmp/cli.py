"""The command line: `vhostmp serve | swap | show | workers | upgrade | demo | bench | stress | qemu-args`.

Rules: a mistake ends in one line on stderr that says what to do, and exit status 2; success is 0; a traceback is never
the answer (VHOSTMP_DEBUG=1 shows the one behind an internal error, status 1). A command's module is imported only when
the command is used, so that `--help` is quick. Follows QEMU's conventions for back-end programs
(docs/interop/vhost-user.rst, "Backend program conventions"): `--socket-path`, `--fd`, `--print-capabilities`, SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn, Protocol, cast

from vhostmp import __version__
from vhostmp.errors import VhostError

CAPABILITIES: Final[dict[str, dict[str, object]]] = {
    "net": {"type": "net"},
    "blk": {"type": "block", "features": ["read-only", "blk-file"]},
    "rng": {"type": "rng"},
}
"""What --print-capabilities prints, by class of device (QEMU docs/interop/vhost-user.json)."""
EXIT_INTERNAL: Final = 1
EXIT_MISTAKE: Final = 2
EXIT_INTERRUPTED: Final = 130
FD_MAX: Final = (1 << 31) - 1
CPU_MAX: Final = 8191  # NR_CPUS of Linux

_LEVELS: Final = ("debug", "info", "warning", "error")

_DESCRIPTION: Final = """\
A vhost-user back-end: gives virtual machines network cards, disks and other devices whose queues worker processes
serve. What stands behind them (a tap device, a network interface, a file, Python code ...) can be swapped under load.
"""

_EPILOG: Final = """\
first steps:
  vhostmp demo                                        see a back-end swapped under full load; needs no root, no QEMU
  vhostmp serve --socket-path /tmp/net0.sock \\
                --control-path /tmp/net0.ctl \\
                --backend loopback                    serve one network device
  qemu-system-x86_64 ... $(vhostmp qemu-args /tmp/net0.sock)
                                                      attach a virtual machine to it
  vhostmp swap --control-path /tmp/net0.ctl tap:tap0  put a tap device behind it, while packets flow
  vhostmp show --control-path /tmp/net0.ctl           see features, memory, rings, counters, workers

Each command has its own help: vhostmp serve --help
"""

_BACKENDS: Final = """\
back-ends (SPEC):
  null                 counts what the guest sends and drops it; null:copy copies it first
  source:BYTES         fills the guest's receive buffers with numbered frames of so many bytes; drops what it sends
  loopback             gives the guest back what it sends
  patch:DEVICE         joins it to another network device of this server, 0 for the first, 1 for the second and so on,
                       which names it in turn: each receives what the other one sends; of offloads what its guest has
                       not negotiated is dropped (--offloads off where one guest takes none and the other sends them)
  tap:NAME             the tap device NAME, created if it is missing (needs CAP_NET_ADMIN, or a tap that you own:
                       ip tuntap add NAME mode tap user $USER)
  tapfd:N[,N...]       the same, open already: inherited descriptors, one a queue pair (IFF_TAP IFF_NO_PI IFF_VNET_HDR)
  packet:IFNAME        all traffic of the network interface IFNAME (needs CAP_NET_RAW)
  python:MODULE:CLASS  your class; or python:/path/to/file.py:CLASS
of a disk (--device blk):
  file:PATH[,readonly][,share]   a file or block device; share: somebody else may write to it too
of a source of random numbers (--device rng):
  urandom              the kernel's generator
  file:PATH            a character device, such as /dev/hwrng
"""

_SERVE_EPILOG: Final = (
    _BACKENDS
    + """
examples:
  vhostmp serve --socket-path /tmp/net0.sock --backend tap:tap0
  vhostmp serve --socket-path /tmp/net0.sock --queue-pairs 4 --workers 4 --backend loopback --control-path /tmp/net0.ctl
  vhostmp serve --socket-path /tmp/a.sock --socket-path /tmp/b.sock --backend tap:tap0 --backend tap:tap1
  vhostmp serve --socket-path /tmp/a.sock --socket-path /tmp/b.sock --backend patch:1 --backend patch:0
  vhostmp serve --device blk --socket-path /tmp/blk0.sock --backend file:disk.img --queues 2
  vhostmp serve --device rng --socket-path /tmp/rng0.sock
  vhostmp serve --device python:console.py:Console --socket-path /tmp/con0.sock
  vhostmp serve --socket-path /tmp/net0.sock --connect     QEMU listens (chardev with server=on), we connect

SIGTERM, SIGINT or SIGHUP end it cleanly. With --fd and a connected socket it ends when the front-end hangs up, else it
waits for the next front-end.
"""
)

_SWAP_EPILOG: Final = (
    _BACKENDS
    + """
examples:
  vhostmp swap --control-path /tmp/net0.ctl tap:tap0
  vhostmp swap --control-path /tmp/net0.ctl --device 1 --json loopback

prints: generation       number of the configuration that workers have; it stays while no ring runs: they have none
        grace_us         until no worker could use the old back-end any more, microseconds
        pause_us         longest time in which no packet moved, microseconds
        packets_crossed  packets that moved while the swap went on
        frames_left      frames in the old back-end's queue that were dropped: the guest had no buffers for them
"""
)

_SHOW_EPILOG: Final = """\
examples:
  vhostmp show --control-path /tmp/net0.ctl
  vhostmp show --control-path /tmp/net0.ctl --json | jq '.devices[0].queues'

prints, of each device, what it offered and what the front-end took of it, the guest's memory, and of each ring:
        avail, used, last   avail_idx and used_idx as the ring has them; the next available entry that we take
        kicks, calls        notifications from the driver that were read; interrupts sent to it
        held back           interrupts that the driver did not want
        packets, bytes      what went through; requests of a disk, or of another device, are counted as packets
        copied              bytes of frames that the worker itself copied; what the kernel copies is not among them
        repeated, lost      packets or requests that a worker's death had done again, or that went with it
        deaths              how many workers ended while they were at this ring
        state               running, disabled or stopped by the front-end, or broken, and why
        drops               what was dropped, by reason
of each worker:
        restarts, hangs     how often it was replaced; how often since it stood still (serve --watchdog)
        items, wake-ups     pieces of work done; how often it woke from sleep for them
        memory              what is resident of it
"""

_SERVE_DESCRIPTION: Final = """\
Serves devices, network cards if not told otherwise, to front-ends such as QEMU: one on each socket, until SIGTERM.
"""
_SWAP_DESCRIPTION: Final = """\
Puts another back-end behind a device of a running server, while packets flow; the guest keeps its device.
"""
_SHOW_DESCRIPTION: Final = """\
Shows what a running server serves: its devices, their rings with counters, and the workers behind them.
"""


class Command(Protocol):
    """What the module of a command offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do it; returns the exit status. Raises: VhostError."""
        ...


LAZY_COMMANDS: Final = {
    "demo": ("vhostmp.tools.demo", "swap back-ends under full load and count every packet; needs no root, no QEMU"),
    "bench": ("vhostmp.tools.bench.command", "measure it beside DPDK's vhost and bare loops; --quick needs nothing"),
    "stress": ("vhostmp.tools.stress.command", "find what is wrong with a vhost-user back-end, ours or another"),
    "upgrade": ("vhostmp.upgrade", "move a running server to the code that is installed now, without a packet lost"),
    "workers": ("vhostmp.workers_cmd", "list, start and end worker processes; move queue pairs between them"),
    "qemu-args": ("vhostmp.qemu", "print the QEMU options that attach a virtual machine to a socket"),
}
"""Commands of other modules: name, module with `add_arguments` and `run`, help."""

ASKING_COMMANDS: Final = ("workers", "upgrade")
"""Those of them that ask a running server."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Keep line breaks in texts; an option must be written in full."""
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit with status 2."""
        _complain(f"{message}; see '{self.prog} --help'")
        raise SystemExit(EXIT_MISTAKE)


def _complain(message: str) -> None:
    """Print one line on stderr, if there is a stderr."""
    line = " ".join(message.split())
    with suppress(OSError, AttributeError):
        print(f"vhostmp: {line}", file=sys.stderr, flush=True)


def _number(low: int, high: int, unit: str = "") -> Any:
    """Return an argument type: a whole number in low..high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number in {low}..{high}{unit}")
        return value

    return parse


def _processors(text: str) -> tuple[int, ...]:
    """Parse a list of processors as taskset(1) has it, 0,2-4. Whether there are such is the pool's to say."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not (first.isascii() and first.isdecimal()) or (dash and not (last.isascii() and last.isdecimal())):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of processors: write 2 or 0,2-4")
        low, high = int(first), int(last or first)
        if not low <= high <= CPU_MAX:
            raise argparse.ArgumentTypeError(f"{part!r} are no processors: write the first, the last, up to {CPU_MAX}")
        found.extend(range(low, high + 1))
    return tuple(dict.fromkeys(found))


def _mac(text: str) -> bytes:
    """Parse an Ethernet address; which are good is the device's to say."""
    try:
        return bytes(int(part, 16) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no Ethernet address: write it as 02:00:00:00:00:01") from None


def _mode(text: str) -> int:
    """Parse permission bits."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:  # noqa: PLR2004 - all that a socket has
        raise argparse.ArgumentTypeError(f"{text!r} are no permissions: write them in octal, such as 0660")
    return mode


def _device_class(text: str) -> str:
    if text not in CAPABILITIES and not text.startswith("python:"):
        classes = ", ".join(CAPABILITIES)
        raise argparse.ArgumentTypeError(f"{text!r} is none of {classes}, python:MODULE:CLASS, python:FILE.py:CLASS")
    return text


def _capabilities(words: Sequence[str]) -> dict[str, object]:
    """Return what to print for the class of device that the words name; all others are ignored."""
    parser = Parser(add_help=False)
    parser.add_argument("--device", nargs="?", default="net")
    parser.add_argument("--blk-file", nargs="?")
    known, _ = parser.parse_known_args(list(words))
    name = "blk" if known.blk_file is not None else known.device
    return CAPABILITIES.get(name, CAPABILITIES["net"])


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_serve)
    where = parser.add_argument_group("where front-ends come from (one of the first two)")
    where.add_argument(
        "--socket-path",
        metavar="PATH",
        action="append",
        default=[],
        help="listen on this UNIX socket; give it again for another device",
    )
    where.add_argument(
        "--socket-mode",
        metavar="OCTAL",
        type=_mode,
        help="permissions of these sockets (default: 0600; 0660 with --socket-group)",
    )
    where.add_argument("--socket-group", metavar="GROUP", help="group of these sockets, by name or number")
    where.add_argument(
        "--fd",
        metavar="N",
        action="append",
        default=[],
        type=_number(0, FD_MAX),
        help="use this inherited socket, listening or connected",
    )
    where.add_argument(
        "--connect", action="store_true", help="connect to PATH instead of listening there, again after each hang-up"
    )
    what = parser.add_argument_group("what they get")
    what.add_argument(
        "--device",
        metavar="CLASS",
        type=_device_class,
        default="net",
        help="class of the devices: net, blk, rng, or python:FILE.py:CLASS, your own (default: net)",
    )
    what.add_argument(
        "--backend",
        metavar="SPEC",
        action="append",
        help="what stands behind the queues, see below; once for all devices or once for each (default: null, urandom)",
    )
    what.add_argument(
        "--queue-pairs", metavar="N", type=_number(1, 128), help="queue pairs of a network device (default: 1)"
    )
    what.add_argument(
        "--offloads",
        choices=("auto", "on", "off"),
        help="checksum and segmentation offloads; auto: when the first back-end is tap, packet or patch "
        "(default: auto)",
    )
    what.add_argument(
        "--iommu",
        action="store_true",
        help="offer ACCESS_PLATFORM: for a guest behind a virtual IOMMU (QEMU: iommu_platform=on for the device)",
    )
    what.add_argument(
        "--ring-reset",
        action="store_true",
        help="offer RING_RESET: for a front-end that stops a queue that the guest resets (QEMU 7.2 does not: "
        "ethtool -G in the guest would break it)",
    )
    what.add_argument(
        "--mac",
        metavar="ADDRESS",
        action="append",
        default=[],
        type=_mac,
        help="the guest's address, for front-ends that ask the back-end (QEMU does not: its own mac= counts); "
        "once for each device",
    )
    what.add_argument("--queues", metavar="N", type=_number(1, 128), help="queues of a disk (default: 1)")
    what.add_argument("--blk-file", metavar="PATH", help="same as --device blk --backend file:PATH")
    what.add_argument("--read-only", action="store_true", help="with --blk-file: same as file:PATH,readonly")
    how = parser.add_argument_group("how it is served")
    how.add_argument(
        "--workers", metavar="N", type=_number(1, 64), default=1, help="worker processes for all devices (default: 1)"
    )
    how.add_argument(
        "--cpus",
        metavar="LIST",
        type=_processors,
        default=(),
        help="processors for the workers, as 2,4-6: worker n gets the n-th, round and round (default: any)",
    )
    how.add_argument(
        "--busy-poll",
        metavar="US",
        type=_number(0, 1_000_000, " (microseconds)"),
        default=0,
        help="poll a ring for so many microseconds before sleeping (default: 0)",
    )
    how.add_argument(
        "--sandbox",
        choices=("on", "off"),
        default="on",
        help="off: workers keep all rights, for a back-end in Python that opens files or sockets after it was imported "
        "(default: on)",
    )
    how.add_argument(
        "--watchdog",
        metavar="SECONDS",
        type=float,
        default=10.0,
        help="replace a worker that stands still for so long, in a Python back-end say; 0: never (default: 10)",
    )
    how.add_argument(
        "--restart-limit",
        metavar="N/SECONDS",
        default="5/10",
        help="stop a queue whose work has killed N workers within SECONDS, until its front-end starts it anew; "
        "0: never (default: 5/10)",
    )
    how.add_argument(
        "--control-path", metavar="CTL", help="UNIX socket for 'vhostmp show', 'swap', 'workers' and 'upgrade'"
    )
    how.add_argument(
        "--adopt-timeout",
        metavar="S",
        type=_number(0, 86_400, " (seconds)"),
        default=60,
        help="with --control-path: for how long everything goes on when this process is killed, until it is started "
        "again with the same options; 0: not at all, and what still goes on is ended first (default: 60)",
    )
    how.add_argument(
        "--ready-fd",
        metavar="N",
        type=_number(0, FD_MAX),
        help="write a newline to this descriptor and close it once front-ends can connect",
    )
    how.add_argument(
        "--log-level", choices=_LEVELS, default="info", help="least level written to stderr (default: info)"
    )
    how.add_argument(
        "--verbose", "-v", dest="log_level", action="store_const", const="debug", help="same as --log-level debug"
    )
    how.add_argument(
        "--print-capabilities", action="store_true", help="print what this program can do as JSON, and nothing else"
    )


def _serve(args: argparse.Namespace) -> int:
    return _module("vhostmp.serve").run(args)


def _add_control(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--control-path", metavar="CTL", required=True, help="the path after 'vhostmp serve --control-path'"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def _add_swap(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_swap)
    _add_control(parser)
    parser.add_argument(
        "--device", metavar="D", help="name of the device, '0' for the first; needed if there are several"
    )
    parser.add_argument("backend", metavar="SPEC", help="the new back-end, see below")


def _swap(args: argparse.Namespace) -> int:
    return int(importlib.import_module("vhostmp.show").run_swap(args))


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_show)
    _add_control(parser)


def _show(args: argparse.Namespace) -> int:
    return int(importlib.import_module("vhostmp.show").run(args))


def _module(name: str) -> Command:
    return cast("Command", importlib.import_module(name))


def make_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; of the lazy commands only `command` gets its arguments."""
    parser = Parser(prog="vhostmp", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"vhostmp {__version__}")
    parser.add_argument(
        "--print-capabilities", action="store_true", help="print what this program can do as JSON, and nothing else"
    )
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, add, text, description, epilog in (
        ("serve", _add_serve, "serve network cards, disks and other devices", _SERVE_DESCRIPTION, _SERVE_EPILOG),
        ("swap", _add_swap, "replace the back-end of a running device", _SWAP_DESCRIPTION, _SWAP_EPILOG),
        ("show", _add_show, "show the state of a running server", _SHOW_DESCRIPTION, _SHOW_EPILOG),
    ):
        add(commands.add_parser(name, help=text, description=description, epilog=epilog))
    for name, (module, text) in LAZY_COMMANDS.items():
        lazy = commands.add_parser(name, help=text)
        if name == command:
            if name in ASKING_COMMANDS:
                _add_control(lazy)
            lazy.set_defaults(run=_module(module).run)
            _module(module).add_arguments(lazy)
    for one in commands.choices.values():
        one.set_defaults(error=one.error)
    return parser


def _run(words: Sequence[str]) -> int:
    """Run a command. Raises: VhostError, or SystemExit from the parser."""
    parser = make_parser(words[0] if words else None)
    args, unknown = parser.parse_known_args(words)
    if unknown:  # told by the command, whose help knows better than ours
        vars(args).get("error", parser.error)(f"unrecognized arguments: {' '.join(unknown)}")
    if "run" not in args:
        parser.error("no command given")
    status = args.run(args)
    sys.stdout.flush()
    return int(status)


def _failed(error: Exception) -> int:
    """Say what no command has dealt with, a mistake of ours or output that cannot be written; returns the status."""
    if isinstance(error, OSError):
        try:
            print(flush=True)  # whether it was our output: what could not be written may be gone from the buffer
        except OSError as again:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # as in `main`
            _complain(f"cannot write standard output: {again.strerror}")
            return EXIT_MISTAKE
    if os.environ.get("VHOSTMP_DEBUG") == "1":
        raise error
    _complain(f"internal error: {error!r}; run again with VHOSTMP_DEBUG=1 in the environment to see where")
    return EXIT_INTERNAL


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--print-capabilities" in words:  # and everything else is ignored, see the conventions
        print(json.dumps(_capabilities(words)))
        return 0
    if words and words[0].partition("=")[0] in ("--socket-path", "--fd", "--device", "--blk-file"):
        words.insert(0, "serve")  # who runs back-end programs knows no commands
    try:
        status = _run(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else EXIT_MISTAKE
    except VhostError as error:
        _complain(str(error))
        status = EXIT_MISTAKE
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has gone; keep the interpreter from complaining about it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:
        status = _failed(error)
    return status
