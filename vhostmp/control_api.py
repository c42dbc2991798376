"""The control socket (`--control-path`): how `vhostmp show` and `vhostmp swap` reach a running server.

Rules: a UNIX stream socket, mode 0600. A request is one line of JSON, an object whose `cmd` says what to do; each gets
one line of JSON back, in order: `{"ok": true, "result": ...}` or `{"ok": false, "error": "...", "errno": n}`. A client
that sends no valid line, or one that is too long, gets the error and is hung up on; one that does not read is not read
from. No client can hold up another one or a front-end.

This file knows sockets and lines; what a command does is the server's, given as one function.
"""

from __future__ import annotations

import errno
import json
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from vhostmp import transport
from vhostmp.errors import LocalError, VhostError
from vhostmp.eventloop import EventLoop

log = logging.getLogger(__name__)

Request = Mapping[str, Any]
Handler = Callable[[Request], object]

REQUEST_BYTES_MAX: Final = 64 * 1024
CLIENTS_MAX: Final = 32
_READ_BYTES: Final = 16 * 1024


class ControlServer:
    """Answers control clients from within an event loop."""

    def __init__(self, loop: EventLoop, path: str, handler: Handler) -> None:
        """Listen at `path`.

        Args:
            loop: the loop that this is served from.
            path: the socket; one left by a program that has ended is replaced.
            handler: takes a request, returns what becomes `result`; a VhostError becomes the error.

        Raises: LocalError: the socket cannot be made; says what to do.
        """
        self._loop = loop
        self._handler = handler
        self._clients: set[_Client] = set()
        self._listener = transport.listen(path)
        loop.watch(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            sock = self._listener.accept()
        except OSError as error:
            log.error("control: cannot take a connection: %s", error.strerror)
            # out of descriptors: look again when a client leaves, or in a while
            self._loop.unwatch(self._listener)
            self._loop.call_later(1.0, lambda: self._loop.watch(self._listener, self._accept))
            return
        if sock is None:
            return
        if len(self._clients) >= CLIENTS_MAX:
            log.warning("control: refused a connection, there are %d", CLIENTS_MAX)
            sock.close()
            return
        self._clients.add(_Client(self._loop, sock, self._handler, self._clients.discard))

    def close(self) -> None:
        """Hang up on all clients and remove the socket; may be called twice."""
        for client in tuple(self._clients):
            client.close()
        if self._listener.fileno() >= 0:
            self._loop.unwatch(self._listener)
        self._listener.close()


class _Client:
    """One connection: lines in, lines out."""

    def __init__(
        self, loop: EventLoop, sock: socket.socket, handler: Handler, on_close: Callable[[_Client], None]
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._handler = handler
        self._on_close = on_close
        self._input = bytearray()
        self._output = bytearray()
        self._hang_up = False
        sock.setblocking(False)
        loop.watch(sock, self._read)

    def close(self) -> None:
        self._loop.unwatch(self._sock)
        self._sock.close()
        self._on_close(self)

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._input += data
        self._advance()

    def _advance(self) -> None:
        """Answer whole lines as long as the client reads the answers."""
        while not self._output and not self._hang_up:
            line, newline, rest = self._input.partition(b"\n")
            if not newline:
                if len(line) > REQUEST_BYTES_MAX:
                    text = f"the request is longer than {REQUEST_BYTES_MAX} bytes"
                    self._send(_failure(text, errno.EMSGSIZE), hang_up=True)
                return
            self._input = rest
            reply, hang_up = _answer(bytes(line), self._handler)
            self._send(reply, hang_up=hang_up)

    def _send(self, reply: Mapping[str, object], *, hang_up: bool) -> None:
        self._output += json.dumps(reply).encode() + b"\n"
        self._hang_up = hang_up
        self._flush()

    def _flush(self) -> None:
        try:
            while self._output:
                del self._output[: self._sock.send(self._output)]
        except BlockingIOError:
            self._loop.watch(self._sock, self._write, write=True)
        except OSError:
            self._hang_up = True
            self.close()
        else:
            if self._hang_up:
                self.close()

    def _write(self) -> None:
        self._flush()
        if not self._output and not self._hang_up:
            self._loop.watch(self._sock, self._read)
            self._advance()


def _failure(message: str, code: int) -> Mapping[str, object]:
    return {"ok": False, "error": message, "errno": code}


def _answer(line: bytes, handler: Handler) -> tuple[Mapping[str, object], bool]:
    """Return the reply to a line, and whether the client does not speak our language."""
    try:
        request: object = json.loads(line)
    except (ValueError, RecursionError):
        return _failure("the request is not a line of JSON", errno.EINVAL), True
    if not isinstance(request, dict):
        return _failure("the request is not a JSON object", errno.EINVAL), True
    try:
        return {"ok": True, "result": handler(cast("dict[str, Any]", request))}, False
    except VhostError as error:
        return _failure(str(error), error.errno), False
    except Exception as error:  # a mistake of ours must not take the device down
        log.exception("control: internal error")
        return _failure(f"internal error: {error!r}; the server's log has more", errno.EIO), False


def call(path: str, request: Request, *, timeout: float = 60.0) -> Any:
    """Send one request to a running server and return its result; blocks for at most `timeout` seconds at a time.

    Raises: LocalError: nobody answers at `path`, or the server refuses; its message says what to do.
    """
    with transport.dial(path) as sock:
        sock.settimeout(timeout)
        try:
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as stream:
                line = stream.readline()
        except OSError as error:
            raise LocalError(
                f"no answer from {path}: {error.strerror or error}; "
                "give the path after 'vhostmp serve --control-path', not the front-end's socket",
                error.errno or errno.EIO,
            ) from error
    try:
        reply: dict[str, Any] = json.loads(line)
        if reply["ok"]:
            return reply["result"]
        raise LocalError(str(reply["error"]), int(reply["errno"]))
    except (ValueError, KeyError, TypeError) as error:
        raise LocalError(
            f"{path} does not answer like a vhostmp server: give the path after 'vhostmp serve --control-path'",
            errno.EPROTO,
        ) from error
