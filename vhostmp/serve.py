"""`vhostmp serve`: the pool of workers, a device for each socket, the server; where they are put together.

Rules: the cheap checks come first (arguments, sockets), the processes after them; whatever fails, what was made before
is undone, and the error is one line that says what to do. Loaded by `cli.py` only when the command is `serve`.
"""

from __future__ import annotations

import argparse
import errno
import grp
import json
import logging
import os
import resource
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any, Final

from vhostmp import __version__, adoption, killpoints, logs, patches, server, systemd, transport, upgrade
from vhostmp.adoption import Adopted, PortRecord
from vhostmp.blk import BlkDevice
from vhostmp.deaths import RestartLimit
from vhostmp.device import Device
from vhostmp.errors import LocalError, VhostError
from vhostmp.eventloop import EventLoop
from vhostmp.fdstore import FdStore, HeldStore, find_holder
from vhostmp.keeper import POOL, Keeper, end_what_waits, open_keeper
from vhostmp.kept_device import KeptDevice
from vhostmp.net import NetDevice
from vhostmp.requests import PythonDevice
from vhostmp.rng import RngDevice
from vhostmp.shm.segment import Segment
from vhostmp.sources import Dialer, Source, open_sources
from vhostmp.supervisor import Pool
from vhostmp.systemd_store import open_systemd_store
from vhostmp.upgrade import VARIABLE
from vhostmp.workers.pool import WorkerPool
from vhostmp.workers.processes import WorkerProcess

log = logging.getLogger(__name__)

OFFLOADS: Final = {None: None, "auto": None, "on": True, "off": False}
#: The back-end of each class of device when none is given.
DEFAULT_BACKENDS: Final = {"net": "null", "rng": "urandom"}
#: Until an upgrade's answer is read by who asked; until a worker that could not be renewed is tried again: seconds.
UPGRADE_DELAY: Final = 0.05
RENEWAL_PAUSE: Final = 1.0
#: How often it is looked whether a worker has come out of what it was inside when it was adopted, seconds.
LATE_SECONDS: Final = 0.5
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
    args.version_before = None
    if VARIABLE in os.environ:
        args.ready_fd = None  # whoever waited for it knows
        if not upgrade.is_look():
            args.version_before = upgrade.take_version_before()
    with logs.writing_to(sys.stderr, args.log_level):
        _check(args)
        if upgrade.is_look():
            return _look(args)
        with ExitStack() as stack:
            _raise_descriptor_limit()
            loop = stack.enter_context(EventLoop())
            stack.enter_context(loop.ending_on_signals())
            stack.callback(os.umask, os.umask(0o077))  # whatever is made, by whomever of us, is the owner's alone
            keeper = stack.enter_context(_keeping(args))
            try:
                running = _set_up(args, stack, loop, keeper)
            except BaseException:
                if keeper is not None and keeper.is_adopting:
                    stack.pop_all()  # nothing of what was found is ended: it waits for another one
                    keeper.detach()
                raise
            _ready(args.ready_fd)
            systemd.notify("READY=1")
            serving = "connecting to" if args.connect else "serving on"
            for port in running.ports:
                name, backend = port.device.name, port.device.backend
                log.info("device %s: %s %s, back-end %s", name, serving, port.label, backend)
            if args.version_before is not None:
                log.info("upgraded from %s to %s", args.version_before, __version__)
            running.run()
            log.info("ending")
            if keeper is not None:
                keeper.is_ending = True
                running.pool_changed()
            running.end()
            systemd.notify("STOPPING=1")
    return 0


def _set_up(args: argparse.Namespace, stack: ExitStack, loop: EventLoop, keeper: Keeper | None) -> server.Server:
    """Make everything, or take up what was found; `stack` undoes it. Raises: VhostError."""
    records = [PortRecord(keeper, number) for number in range(_count(args))] if keeper is not None else []
    adopted = adoption.adopted(keeper) if keeper is not None else None
    if keeper is not None and adopted is not None:
        adoption.check(keeper, [_shape(args, number) for number in range(_count(args))])
        adoption.begin(keeper)
        sources = _kept_sources(args, records)
    else:
        sources = open_sources(args.socket_path, args.fd, connect=args.connect, access=_access(args))
    for source in sources:
        stack.callback(source.close)
    pool = stack.enter_context(_make_pool(args, keeper, adopted))
    killpoints.reach("processes" if adopted is not None else "started")
    kept = [record.device(pool.buf) for record in records] if adopted is not None else []

    def make_device(number: int) -> Device:
        return _make_device(args, pool, number, kept[number] if kept else None)

    def settle(devices: Sequence[Any]) -> None:
        for record, device in zip(records, devices, strict=False):
            record.attach(device)
        for device, known in zip(devices, kept, strict=False):
            device.settle_adopted(known)
        for device in devices if kept else ():
            try:
                device.come_together()
            except VhostError as error:
                log.warning("device %s: %s", device.name, error)
        if kept:
            killpoints.reach("settled")
            _drop_the_rest(devices, pool, pool.workers, loop)

    def watch(store: FdStore, begins: bool) -> None:
        if keeper is not None and isinstance(store, HeldStore) and store.fileno() >= 0:
            if begins:
                loop.watch(store, keeper.renew)  # a holder says nothing unasked: it has ended
            else:
                loop.unwatch(store)

    running = stack.enter_context(
        server.Server(
            pool,
            make_device,
            sources,
            control_path=args.control_path,
            busyloop_us=args.busy_poll,
            loop=loop,
            records=records,
            on_ready=settle,
            adopted=adopted,
            upgrade=None if keeper is None else lambda: _upgrade(loop, keeper, adopted),
        )
    )
    # What we have made, by paths that mean the same to the holder and the spawner, wherever those are.
    listening: list[str] = [] if args.connect else args.socket_path
    control: list[str] = [args.control_path] if args.control_path else []
    made = [os.path.abspath(path) for path in [*listening, *control]]
    pool.bequeath([(path, *found) for path in made if (found := transport.identity(path))])
    if keeper is not None:
        killpoints.reach("connected")
        keeper.settle(args.adopt_timeout, made)
        keeper.on_store = watch
        watch(keeper.store, True)
        keeper.claimed()
        pool.changed()
        if args.version_before is not None:
            pool.begin_renewal()
        if pool.is_renewing:
            loop.call_later(0.0, lambda: _renew_workers(pool, loop))
    if adopted is not None:
        _say_adopted(args, pool, adopted)
    return running


def _say_adopted(args: argparse.Namespace, pool: Pool, adopted: Adopted) -> None:
    """Log from whom everything was taken up: in an upgrade from ourselves, of which `run` tells."""
    if args.version_before is None:
        log.warning("adopted what process %d served when it died", adopted.from_pid)
    if pool.sandboxed != (args.sandbox == "on"):
        log.warning("--sandbox %s is for a new start: what was adopted stays as it is", args.sandbox)


def _drop_the_rest(devices: Sequence[Any], pool: Pool, workers: Sequence[WorkerProcess], loop: EventLoop) -> None:
    """Have workers drop what is not on record, those that are inside something older once they have come out."""
    with pool.lock:
        there = [worker for worker in pool.workers if worker in workers]  # the others' places have been taken
        if late := adoption.drop_the_rest(devices, there):
            loop.call_later(LATE_SECONDS, lambda: _drop_the_rest(devices, pool, late, loop))


def _look(args: argparse.Namespace) -> int:
    """Find out whether we could take up what is served, as new code before an upgrade; change nothing. VhostError."""
    found = open_systemd_store() or find_holder(args.control_path, look=True)
    if found is None:
        raise LocalError("nobody holds what is served")
    with closing(Keeper(*found)) as keeper:
        adoption.check(keeper, [_shape(args, number) for number in range(_count(args))])
        segment = Segment.adopt(keeper.take("segment"), keeper.found[POOL]["segment"])
        with segment:
            for number in range(_count(args)):
                PortRecord(keeper, number).device(segment.buf)
    print(json.dumps({"version": __version__}))
    return 0


def _upgrade(loop: EventLoop, keeper: Keeper, adopted: Adopted | None) -> dict[str, Any]:
    """Move to the code that is installed now, as soon as this is answered. LocalError: it cannot go on."""
    if keeper.is_lost:
        raise LocalError("nothing outlives this server, which has nowhere to keep it: the log says why")
    version = upgrade.look(keeper.store.handover())
    loop.call_later(UPGRADE_DELAY, lambda: upgrade.execute(keeper.store.handover()))
    return {"from": __version__, "to": version, "adoptions": adopted.count if adopted is not None else 0}


def _renew_workers(pool: Pool, loop: EventLoop) -> None:
    """Renew one worker, and the next one when front-ends have had their turn."""
    try:
        pool.renew_one()
    except VhostError as error:
        log.error("a worker could not be renewed, will try again: %s", error)
        loop.call_later(RENEWAL_PAUSE, lambda: _renew_workers(pool, loop))
        return
    if pool.is_renewing:
        loop.call_later(0.0, lambda: _renew_workers(pool, loop))


def _count(args: argparse.Namespace) -> int:
    """Return how many devices there are."""
    return len(args.socket_path) + len(args.fd)


@contextmanager
def _keeping(args: argparse.Namespace) -> Generator[Keeper | None]:
    """Open the store of what is to outlive this process; None: nothing is.

    A clean end takes everything along, and so does a failure; but for one to take up what a control process before us
    left: that waits for the next one.
    """
    if args.control_path is None or args.fd or not args.adopt_timeout:
        if args.control_path is not None:
            end_what_waits(args.control_path)
        yield None
        return
    keeper = open_keeper(args.control_path, args.adopt_timeout)
    try:
        yield keeper
    finally:
        if keeper.is_adopting:
            keeper.detach()
        keeper.goodbye()


def _make_pool(args: argparse.Namespace, keeper: Keeper | None, adopted: Adopted | None) -> Pool:
    """Start the workers, or take up those that run."""
    care: dict[str, Any] = {"watchdog": args.watchdog, "restart_limit": args.restart_limit, "cpus": args.cpus}
    if keeper is None:
        return Pool(workers=args.workers, sandbox=args.sandbox == "on", **care)

    def changed(pool: WorkerPool) -> None:
        plain, fds = pool.describe()
        is_whole = (adopted is not None or keeper.is_claimed) and not keeper.is_ending
        keeper.write(POOL, adoption.describe_pool(plain, adopted, is_whole=is_whole), fds)

    if adopted is None:
        return Pool(workers=args.workers, sandbox=args.sandbox == "on", changed=changed, keeper=keeper, **care)
    found = keeper.found[POOL], keeper.take
    care |= {"doomed": adoption.waiting_for_pages(keeper), "keeper": keeper}
    return Pool(changed=changed, found=found, before_deaths=lambda buf: adoption.say_who_serves(keeper, buf), **care)


def _shape(args: argparse.Namespace, number: int) -> dict[str, Any]:
    """Return what the options say of a device that cannot change while it is served."""
    shape: dict[str, Any] = {"class": args.device if args.device in ("net", "blk", "rng") else "python"}
    shape["socket"] = args.socket_path[number]
    if args.device == "net":
        shape["num_queues"] = 2 * (args.queue_pairs or 1)
    elif args.device == "blk":
        shape["num_queues"] = args.queues or 1
    return shape


def _kept_sources(args: argparse.Namespace, records: Sequence[PortRecord]) -> list[Source]:
    """Return where front-ends come from: listening sockets that were found, or paths to connect to."""
    if args.version_before is not None:
        with suppress(VhostError, OSError):  # whoever listens there next says more
            transport.remove_stale(args.control_path, ours=True)
    sources: list[Source] = []
    for path, record in zip(args.socket_path, records, strict=True):
        listener = record.listener(path)
        if listener is None and not args.connect:
            listener = transport.listen(path, _access(args))
        sources.append(Source(Dialer(path) if listener is None else listener, path))
    return sources


def _access(args: argparse.Namespace) -> transport.Access:
    """Return who may connect to our sockets. Raises: LocalError: there is no such group."""
    gid: int | None = None
    if (group := args.socket_group) is not None:
        try:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise LocalError(f"no group {group!r}: give one of /etc/group, or a number") from None
    mode = args.socket_mode if args.socket_mode is not None else 0o600 if gid is None else 0o660
    return transport.Access(mode, gid)


def _make_device(args: argparse.Namespace, pool: Pool, number: int, kept: KeptDevice | None) -> Device:
    """Make the device with that number, of the class that the user chose; or go on with it. Raises: VhostError."""
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
                kept=kept,
            )
        case "blk":
            return BlkDevice(pool, backend=backend, num_queues=args.queues or 1, name=name, kept=kept)
        case "rng":
            return RngDevice(pool, backend=backend, name=name, kept=kept)
        case _:
            return PythonDevice(pool, backend=backend, name=name, kept=kept)


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
    if args.device == "net":
        patches.check_names([args.backend[number % len(args.backend)] for number in range(_count(args))])


def _raise_descriptor_limit() -> None:
    """Allow as many descriptors as the system lets us: 509 memory regions alone take more than the usual 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check(args: argparse.Namespace) -> None:
    """Judge the arguments together, before anything is opened. Raises: LocalError."""
    _check_device(args)
    args.restart_limit = RestartLimit.parse(args.restart_limit)
    count = len(args.socket_path) + len(args.fd)
    if not count:
        raise LocalError("nothing to serve: give --socket-path PATH or --fd N")
    if args.socket_path and args.fd:
        raise LocalError("--socket-path and --fd exclude each other: give one of them")
    if (args.socket_mode is not None or args.socket_group is not None) and (args.connect or not args.socket_path):
        raise LocalError("--socket-mode and --socket-group go with --socket-path, where we listen")
    if args.connect and args.fd:
        raise LocalError("--connect goes with --socket-path: --fd tells by itself whether it listens")
    if len(args.backend) not in (1, count):
        raise LocalError(f"sockets: {count}, back-ends: {len(args.backend)}: give one for all or one for each")
    if len(args.mac) not in (0, count):
        raise LocalError(f"sockets: {count}, addresses: {len(args.mac)}: give one for each, or none")
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
