"""`vhostmp serve`: the pool of workers, a device for each socket, the server; where they are put together.

Rules: the cheap checks come first (arguments, sockets), the processes after them; whatever fails, what was made before
is undone, and the error is one line that says what to do. Loaded by `cli.py` only when the command is `serve`.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from contextlib import ExitStack
from typing import Final

from vhostmp import logs, server, systemd
from vhostmp.errors import LocalError
from vhostmp.eventloop import EventLoop
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool

log = logging.getLogger(__name__)

OFFLOADS: Final = {"auto": None, "on": True, "off": False}


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP, or until the last inherited connection hangs up.

    Returns: exit status. Raises: VhostError: it cannot be served; says what to do.
    """
    with logs.writing_to(sys.stderr, args.log_level):
        _check(args)
        with ExitStack() as stack:
            loop = stack.enter_context(EventLoop())
            stack.enter_context(loop.ending_on_signals())
            sources = server.open_sources(args.socket_path, args.fd, connect=args.connect)
            for source in sources:
                stack.callback(source.close)
            pool = stack.enter_context(Pool(workers=args.workers))

            def make_device(number: int) -> NetDevice:
                return NetDevice(
                    pool,
                    queue_pairs=args.queue_pairs,
                    backend=args.backend[number % len(args.backend)],
                    name=str(number),
                    offloads=OFFLOADS[args.offloads],
                    mac=args.mac[number] if args.mac else None,
                )

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


def _check(args: argparse.Namespace) -> None:
    """Judge the arguments together, before anything is opened. Raises: LocalError."""
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
