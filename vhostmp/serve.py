"""`vhostmp serve`: the pool of workers, a device for each socket, the server; where they are put together.

Rules: the cheap checks come first (arguments, sockets), the processes after them; whatever fails, what was made before
is undone, and the error is one line that says what to do. Loaded by `cli.py` only when the command is `serve`.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import resource
import sys
from contextlib import ExitStack
from typing import Final

from vhostmp import logs, server, systemd
from vhostmp.blk import BlkDevice
from vhostmp.device import Device
from vhostmp.errors import LocalError
from vhostmp.eventloop import EventLoop
from vhostmp.net import NetDevice
from vhostmp.requests import PythonDevice
from vhostmp.rng import RngDevice
from vhostmp.supervisor import Pool

log = logging.getLogger(__name__)

OFFLOADS: Final = {None: None, "auto": None, "on": True, "off": False}
#: The back-end of each class of device when none is given.
DEFAULT_BACKENDS: Final = {"net": "null", "rng": "urandom"}
#: Options that only one class of device has.
OWN_OPTIONS: Final = {
    "queue_pairs": "net",
    "offloads": "net",
    "queues": "blk",
}


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP, or until the last inherited connection hangs up.

    Returns: exit status. Raises: VhostError: it cannot be served; says what to do.
    """
    with logs.writing_to(sys.stderr, args.log_level):
        _check(args)
        with ExitStack() as stack:
            _raise_descriptor_limit()
            loop = stack.enter_context(EventLoop())
            stack.enter_context(loop.ending_on_signals())
            sources = server.open_sources(args.socket_path, args.fd, connect=args.connect)
            for source in sources:
                stack.callback(source.close)
            pool = stack.enter_context(Pool(workers=args.workers))

            def make_device(number: int) -> Device:
                return _make_device(args, pool, number)

            running = stack.enter_context(
                server.Server(
                    pool,
                    make_device,
                    sources,
                    control_path=args.control_path,
                    busyloop_us=args.busy_poll,
                    loop=loop,
                )
            )
            _ready(args.ready_fd)
            systemd.notify("READY=1")
            for port in running.ports:
                log.info("device %s: serving on %s, back-end %s", port.device.name, port.label, port.device.backend)
            running.run()
            log.info("ending")
            pool.close()  # before the devices: a worker that hangs is not waited for
            systemd.notify("STOPPING=1")
    return 0


def _make_device(args: argparse.Namespace, pool: Pool, number: int) -> Device:
    """Make the device with that number, of the class that the user chose. Raises: VhostError."""
    backend, name = args.backend[number % len(args.backend)], str(number)
    match args.device:
        case "net":
            pairs, offloads = args.queue_pairs or 1, OFFLOADS[args.offloads]
            mac = args.mac[number] if args.mac else None
            return NetDevice(
                pool,
                queue_pairs=pairs,
                backend=backend,
                name=name,
                offloads=offloads,
                mac=mac,
                iommu=args.iommu,
                ring_reset=args.ring_reset,
            )
        case "blk":
            return BlkDevice(pool, backend=backend, num_queues=args.queues or 1, name=name)
        case "rng":
            return RngDevice(pool, backend=backend, name=name)
        case _:
            return PythonDevice(pool, backend=backend, name=name)


def _check_device(args: argparse.Namespace) -> None:
    """Judge what concerns the class of device, and fill in what follows from it. Raises: LocalError."""
    if args.blk_file is not None:
        if args.backend or args.device not in ("net", "blk"):
            raise LocalError("--blk-file stands for --device blk --backend file:PATH: give either")
        args.device = "blk"
        args.backend = [f"file:{args.blk_file}{',readonly' if args.read_only else ''}"]
    elif args.read_only:
        raise LocalError("--read-only goes with --blk-file: otherwise write --backend file:PATH,readonly")
    for option, device in OWN_OPTIONS.items():
        if getattr(args, option) is not None and args.device != device:
            raise LocalError(f"--{option.replace('_', '-')} goes with --device {device}")
    for option in ("mac", "iommu", "ring_reset"):
        if getattr(args, option) and args.device != "net":
            raise LocalError(f"--{option.replace('_', '-')} goes with --device net")
    if args.device.startswith("python:"):
        if args.backend:
            raise LocalError("--backend goes with --device net, blk or rng: a class of your own is its own back-end")
        args.backend = [args.device]
    if not args.backend:
        if args.device not in DEFAULT_BACKENDS:
            raise LocalError("a disk needs an image: give --backend file:PATH")
        args.backend = [DEFAULT_BACKENDS[args.device]]


def _raise_descriptor_limit() -> None:
    """Allow as many descriptors as the system lets us: 509 memory regions alone take more than the usual 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check(args: argparse.Namespace) -> None:
    """Judge the arguments together, before anything is opened. Raises: LocalError."""
    _check_device(args)
    count = len(args.socket_path) + len(args.fd)
    if not count:
        raise LocalError("nothing to serve: give --socket-path PATH or --fd N")
    if args.socket_path and args.fd:
        raise LocalError("--socket-path and --fd exclude each other: give one of them")
    if args.connect and args.fd:
        raise LocalError("--connect goes with --socket-path: --fd tells by itself whether it listens")
    if len(args.backend) not in (1, count):
        raise LocalError(f"{len(args.backend)} back-ends for {count} sockets: give one for all or one for each")
    if len(args.mac) not in (0, count):
        raise LocalError(f"{len(args.mac)} addresses for {count} sockets: give one for each, or none")
    paths = [os.path.abspath(path) for path in [*args.socket_path, *filter(None, [args.control_path])]]
    for path in paths:
        if paths.count(path) > 1:
            raise LocalError(f"the path {path} is given twice: each socket needs its own")
    fds = [*args.fd, *([args.ready_fd] if args.ready_fd is not None else [])]
    for fd in fds:
        if fds.count(fd) > 1:
            raise LocalError(f"fd {fd} is given twice: each needs its own")
    if args.ready_fd is not None:
        try:
            os.set_inheritable(args.ready_fd, False)
        except (OSError, OverflowError) as error:
            raise LocalError(f"ready fd {args.ready_fd} is not open: pass a descriptor that is", errno.EBADF) from error


def _ready(fd: int | None) -> None:
    """Tell who gave us `fd` that the sockets are there: one newline, then close it."""
    if fd is None:
        return
    try:
        os.write(fd, b"\n")
    except BrokenPipeError:
        log.warning("nobody reads ready fd %d", fd)
    except OSError as error:
        raise LocalError(f"cannot write to ready fd {fd}: {error.strerror}: pass one open for writing") from error
    finally:
        os.close(fd)
