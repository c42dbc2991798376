"""The server: front-ends on sockets, one device for each socket, one event loop for all of them.

Rules: one thread. No read or write blocks: a front-end that stops in the middle of a message, or reads nothing, holds
up nobody. A verb does block until it is done: that is the barrier its reply stands for. Whatever a front-end does ends,
at worst, its own connection, with one log line; the device then stops its rings, forgets the memory and waits for the
next one. The pool and the maker of devices are parameters, so that all of this is tested without them.

Theory of operation: a `Port` joins a device with the place its front-ends come from: a listening socket, a path to
connect to (again, after each hang-up), or one connected socket that was inherited, whose hang-up ends the port. A port
has one connection at most: another one is refused, unless the first proves dead when looked at.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final, Self

import attrs

from vhostmp import __version__, adoption, consts, transport
from vhostmp.adoption import Adopted, PortRecord
from vhostmp.control_api import ControlServer, Request
from vhostmp.errors import LocalError, VhostError
from vhostmp.eventloop import EventLoop, Timer
from vhostmp.kept_device import RecordedDevice
from vhostmp.kept_transport import KeptTransport
from vhostmp.parts import new_id
from vhostmp.protocol.codec import BadMessage, Message
from vhostmp.served import MakeDevice, ServedDevice, ServedPool
from vhostmp.session import Session
from vhostmp.sources import Dialer, Source
from vhostmp.transport import Listener, Transport

log = logging.getLogger(__name__)

BURST: Final = 64
"""Messages handled before other connections get their turn."""

RETRY_SECONDS_MIN: Final = 0.05
RETRY_SECONDS_MAX: Final = 1.0
_ACCEPT_PAUSE_SECONDS: Final = 1.0
_NEVER_RETRIED: Final = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOTSOCK, errno.EINVAL)
#: What has nothing to do with the front-end: told each time.
_OUR_OWN_WANT: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Port:
    """One device and its front-ends, one after the other."""

    def __init__(
        self,
        loop: EventLoop,
        device: ServedDevice,
        source: Source,
        on_finished: Callable[[], None],
        busyloop_us: int = 0,
        record: PortRecord | None = None,
    ) -> None:
        """Begin to serve, or go on.

        Args:
            loop: where callbacks come from.
            device: borrowed; its owner closes it after the port.
            source: taken over; `close` closes it.
            on_finished: called when no front-end can come any more.
            busyloop_us: busy-poll time of each ring, microseconds.
            record: where it is written what outlives this process, and what was found of one before it.

        Raises: LocalError: a place to connect to that trying again cannot help.
        """
        self.device = device
        self.finished = False
        self._loop = loop
        self._source = source
        self._on_finished = on_finished
        self._busyloop_us = busyloop_us
        self._transport: Transport | None = None
        self.session: Session | None = None
        self._retry: Timer | None = None
        self._retry_seconds = 0.0
        self._record = record
        if record is not None and record.found is not None and record.found["port"]["connection"] is not None:
            self._go_on(record, record.found["port"])
        elif record is not None and record.found is not None:
            self._stop_all()  # its front-end had gone, and maybe its rings could not be stopped yet
        if record is not None:
            record.begin(self._describe)
        match source.kind:
            case Listener() as listener:
                loop.watch(listener, self._accept)
            case Dialer(path):
                if self._transport is None:
                    self._connect(path, first=True)
            case sock:
                self._begin(sock)

    @property
    def label(self) -> str:
        """Where its front-ends come from, in words."""
        return self._source.label

    @property
    def connected(self) -> bool:
        """Whether a front-end is connected."""
        return self._transport is not None

    def snapshot(self) -> Mapping[str, Any]:
        """Return the device's state with that of its connection."""
        negotiated = self.session.state.negotiated if self.session else 0
        return {
            **self.device.snapshot(),
            "socket": self._source.label,
            "connected": self.connected,
            "protocol_features": consts.protocol_feature_names(negotiated),
        }

    def close(self) -> None:
        """Hang up and stop waiting for front-ends; the device is left to its owner. May be called twice."""
        if self._retry is not None:
            self._retry.cancel()
        self._drop()
        if isinstance(self._source.kind, Listener) and self._source.kind.fileno() >= 0:
            self._loop.unwatch(self._source.kind)
        self._source.close()

    # --- front-ends come ---

    def _accept(self) -> None:
        assert isinstance(self._source.kind, Listener)
        try:
            sock = self._source.kind.accept()
        except OSError as error:
            log.error("device %s: cannot take a connection: %s", self.device.name, error.strerror)
            self._loop.unwatch(self._source.kind)
            self._retry = self._loop.call_later(_ACCEPT_PAUSE_SECONDS, self._accept_again)
            return
        if sock is None:
            return
        if self._transport is not None:
            self._readable()  # a front-end that was restarted connects before we have seen the old one go
        if self._transport is not None:
            log.warning(
                "device %s: refused a second front-end on %s, one is connected", self.device.name, self._source.label
            )
            sock.close()
            return
        self._begin(sock)

    def _accept_again(self) -> None:
        assert isinstance(self._source.kind, Listener)
        self._loop.watch(self._source.kind, self._accept)

    def _connect(self, path: str, *, first: bool = False) -> None:
        try:
            sock = transport.dial(path)
        except LocalError as error:
            if first and error.errno in _NEVER_RETRIED:
                raise
            level = logging.DEBUG if self._retry_seconds else logging.INFO
            if error.errno in _OUR_OWN_WANT:
                level = logging.ERROR
            log.log(level, "device %s: no front-end yet, will try again: %s", self.device.name, error)
            self._connect_later(path)
            return
        if not self._begin(sock):
            self._connect_later(path)

    def _connect_later(self, path: str) -> None:
        self._retry_seconds = min(max(self._retry_seconds * 2, RETRY_SECONDS_MIN), RETRY_SECONDS_MAX)
        self._retry = self._loop.call_later(self._retry_seconds, lambda: self._connect(path))

    def _begin(self, sock: socket.socket) -> bool:
        """Talk to a front-end. Whether that can be done: not without descriptors, and the socket is closed then."""
        record = self._record
        if record is None:
            connection = Transport(sock)
        else:
            try:
                connection = KeptTransport.connected(sock, record.keeper, record.name, record.done, record)
            except OSError as error:
                log.error("device %s: cannot take a connection: %s", self.device.name, error.strerror)
                return False
        self._talk_over(connection)
        if record is not None:
            record.commit()
        self._loop.watch(connection, self._readable)
        log.info("device %s: front-end connected on %s", self.device.name, self._source.label)
        return True

    def _talk_over(self, connection: Transport) -> Session:
        self._transport = connection
        self.session = Session(self.device, busyloop_us=self._busyloop_us, loop=self._loop)
        self.session.hang_up = self._hang_up
        return self.session

    def _go_on(self, record: PortRecord, port: Mapping[str, Any]) -> None:
        """Take up the connection of a control process that has died."""
        assert isinstance(self.device, RecordedDevice)
        connection = KeptTransport.found(port["connection"], record.keeper, record.name, record)
        adoption.restore_session(self._talk_over(connection), port["session"], self.device, record.keeper)
        if self.device.was_paged:
            log.error("device %s: post-copy does not survive the control process: connection closed", self.device.name)
            self._loop.call_later(0.0, self._hang_up)
        elif connection.pending:
            self._loop.watch(connection, self._writable, write=True)
        else:
            self._loop.watch(connection, self._readable)
            self._loop.call_later(0.0, self._readable)  # its message may not be on the socket any more
        log.info("device %s: front-end on %s goes on", self.device.name, self._source.label)

    def _describe(self, fds: dict[str, int]) -> dict[str, Any]:
        """Return the listening socket and the connection as plain data, with the descriptors that they name."""
        assert self._record is not None
        listener = self._source.kind if isinstance(self._source.kind, Listener) else None
        if listener is not None:
            listener.number = listener.number or new_id()
            fds[f"listener.{listener.number}"] = listener.fileno()
        plain: dict[str, Any] = {
            "socket": self._source.label,
            "listener": None if listener is None else listener.number,
            "done": self._record.done,
            "connection": None,
        }
        if isinstance(self._transport, KeptTransport) and self.session is not None:
            plain["done"] = self._transport.done
            plain["connection"] = self._transport.describe(fds)
            plain["session"] = adoption.describe_session(self.session, fds)
        return plain

    # --- front-ends talk ---

    def _readable(self) -> None:
        for _ in range(BURST):
            if self._transport is None or self._transport.pending or not self._step(self._transport):
                return

    def _step(self, connection: Transport) -> bool:
        """Handle one message. Returns: whether there may be another one."""
        assert self.session is not None
        message: Message | None = None
        try:
            try:
                message = connection.receive()
                if message is None:
                    return False  # descriptors that have come with its first bytes wait with those for the rest
                reply = self.session.handle(message)
            except BadMessage as bad:
                reply = self.session.refuse(bad)  # raised again unless it can be answered
            finally:
                if message is not None:
                    connection.release()
            if self._record is not None and isinstance(self.device, RecordedDevice):
                self.session.message_done(self.device.regions_known())
            connection.finish(reply.data, reply.fds)
        except EOFError as error:
            log.info("device %s: %s", self.device.name, error)
        except BadMessage as bad:
            log.warning("device %s: %s; connection closed", self.device.name, bad)
        except Exception as error:  # a mistake of ours must not take the other devices down
            log.exception("device %s: internal error (%r); connection closed", self.device.name, error)
        else:
            if connection.pending:
                self._loop.watch(connection, self._writable, write=True)
            return True
        self._hang_up()
        return False

    def _writable(self) -> None:
        assert self._transport is not None
        try:
            self._transport.flush()
        except (EOFError, OSError) as error:
            log.info("device %s: %s", self.device.name, error)
            self._hang_up()
            return
        if not self._transport.pending:
            self._loop.watch(self._transport, self._readable)

    # --- front-ends go ---

    def _drop(self) -> None:
        """Close the connection, if there is one, and take the device back."""
        if self._transport is None or self.session is None:
            return
        self._loop.unwatch(self._transport)
        self._transport.close()
        self.session.close()
        self._transport = self.session = None
        self._stop_all()
        if self._record is not None:
            self._record.commit()

    def _stop_all(self) -> None:
        try:
            self.device.stop_all()
        except VhostError as error:
            log.error("device %s: cannot stop the rings: %s", self.device.name, error)
        except Exception:
            log.exception("device %s: internal error while stopping the rings", self.device.name)

    def _hang_up(self) -> None:
        """Drop the connection and wait for the next one, where there can be one."""
        self._drop()
        match self._source.kind:
            case Listener():
                pass
            case Dialer(path):
                self._retry_seconds = 0.0
                self._retry = self._loop.call_later(RETRY_SECONDS_MIN, lambda: self._connect(path))
            case _:
                self.finished = True
                self._on_finished()


class Server:
    """All ports, and the control socket."""

    def __init__(
        self,
        pool: ServedPool,
        make_device: MakeDevice,
        sources: Sequence[Source],
        *,
        control_path: str | None = None,
        busyloop_us: int = 0,
        loop: EventLoop | None = None,
        records: Sequence[PortRecord] = (),
        on_ready: Callable[[Sequence[ServedDevice]], None] = lambda devices: None,
        adopted: Adopted | None = None,
        upgrade: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """Make the devices and begin to serve; `run` then does the work.

        Args:
            pool: borrowed; asked for its state, and for workers more or fewer.
            make_device: takes the number of a source, returns its device; the server closes it.
            sources: taken over, also when this fails.
            control_path: where to listen for `vhostmp show`, `swap` and `workers`; None for nowhere.
            busyloop_us: busy-poll time of each ring, microseconds.
            loop: the event loop, borrowed; None to make one.
            records: of each device, where it is written what outlives this process; none: nothing does.
            on_ready: called with the devices before any front-end is served.
            adopted: from whom this server was adopted, to be shown.
            upgrade: what moves this server to other code, if anything can.

        Raises: VhostError: from a device or a socket; everything made so far is closed.
        """
        self._pool = pool
        self._adopted = adopted
        self._upgrade = upgrade
        self._stack = ExitStack()
        self._ports: list[Port] = []
        with ExitStack() as undo:
            if adopted is None:  # else nothing is undone: what was found waits for another one
                undo.callback(self._stack.close)
            self.loop = self._stack.enter_context(EventLoop()) if loop is None else loop
            for source in sources:
                self._stack.callback(source.close)
            if control_path is not None:
                self._stack.callback(ControlServer(self.loop, control_path, self.command).close)
            devices: list[ServedDevice] = []
            for number in range(len(sources)):
                device = make_device(number)
                self._stack.callback(device.close)
                devices.append(device)
            on_ready(devices)
            for number, (device, source) in enumerate(zip(devices, sources, strict=True)):
                record = records[number] if records else None
                port = Port(self.loop, device, source, self._port_finished, busyloop_us, record)
                self._stack.callback(port.close)
                self._ports.append(port)
            undo.pop_all()

    @property
    def ports(self) -> Sequence[Port]:
        """The ports, in the order of the sources."""
        return tuple(self._ports)

    def run(self) -> None:
        """Serve until the loop is stopped, or until no front-end can come any more."""
        self.loop.run()

    def pool_changed(self) -> None:
        """Have what is recorded of the workers written once more."""
        self._pool.changed()

    def end(self) -> None:
        """End in order: workers before devices, so that one that hangs is not waited for."""
        self._pool.close()
        self.close()

    def close(self) -> None:
        """Hang up, close devices and sockets, remove paths; may be called twice."""
        self._stack.close()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def _port_finished(self) -> None:
        if all(port.finished for port in self._ports):
            self.loop.stop()

    # --- the control socket's commands ---

    def command(self, request: Request) -> object:
        """Do what a control client asks for and return the result. Raises: VhostError: says why not."""
        match request:
            case {"cmd": "show"}:
                return self._show()
            case {"cmd": "swap", "backend": str(spec)}:
                return self._swap(request.get("device"), spec)
            case {"cmd": "swap"}:
                raise LocalError("swap needs a back-end: give one as 'backend'")
            case {"cmd": "workers"}:
                return self._workers(request)
            case {"cmd": "upgrade"}:
                if self._upgrade is None:
                    raise LocalError("nothing outlives this server: upgrade it by ending it and starting it again")
                return self._upgrade()
            case _:
                raise LocalError(f"unknown command {request.get('cmd')!r}: use 'show', 'swap', 'workers' or 'upgrade'")

    def _workers(self, request: Request) -> Mapping[str, Any]:
        match request:
            case {"action": "list"}:
                return self._pool.snapshot()
            case {"action": "new"}:
                return {"worker": self._pool.new_worker()}
            case {"action": "free", "worker": int(worker)}:
                self._pool.free_worker(worker)
                return {"worker": worker}
            case {"action": "attach", "pair": int(pair), "worker": int(worker)}:
                device = self._device(request.get("device"))
                device.attach_worker(pair, worker)
                pids = {found["index"]: found["pid"] for found in self._pool.snapshot()["workers"]}
                return {"device": device.name, "pair": pair, "worker": worker, "pid": pids.get(worker)}
            case _:
                raise LocalError("workers takes an 'action': list, new, free ('worker') or attach ('pair', 'worker')")

    def _show(self) -> Mapping[str, Any]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "adoptions": 0 if self._adopted is None else self._adopted.count,
            "adopted": None if self._adopted is None else attrs.asdict(self._adopted),
            **self._pool.snapshot(),
            "devices": [port.snapshot() for port in self._ports],
        }

    def _device(self, name: object) -> ServedDevice:
        """Return the device that is named, or the only one."""
        names = [port.device.name for port in self._ports]
        if name is None and len(names) == 1:
            name = names[0]
        if name is None:
            raise LocalError(f"there are several devices: say which with --device, one of {' '.join(names)}")
        device = next((port.device for port in self._ports if port.device.name == name), None)
        if device is None:
            raise LocalError(f"no device {name}: use --device with one of {' '.join(names)}", errno.ENODEV)
        return device

    def _swap(self, name: object, spec: str) -> Mapping[str, Any]:
        device = self._device(name)
        result = device.set_backend(spec)
        return {
            "device": device.name,
            "backend": spec,
            "generation": result.generation,
            "grace_us": result.grace_us,
            "pause_us": result.pause_us,
            "packets_crossed": result.packets_crossed,
            "frames_left": result.frames_left,
        }
