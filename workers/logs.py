"""Log records of worker processes, on their way into the control process's logging.

multiprocessing-logging's handler does the work at both ends: it renders records in the worker and hands them on from a
thread in the control process. Its queue is replaced. A multiprocessing.Queue has a lock in shared memory that a killed
worker may hold for ever, and it wakes up five times a second; here each worker has a socket of its own instead. A send
never blocks: a record for which there is no room is counted in the worker's slot and dropped. The receiving thread
sleeps until there is a record and ends when its worker does.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable
from queue import Empty
from typing import Any, Final

from multiprocessing_logging import MultiProcessingHandler

RECORD_MAX: Final = 32768
_FIELDS: Final = (
    "name",
    "msg",
    "levelno",
    "levelname",
    "process",
    "processName",
    "created",
    "pathname",
    "lineno",
    "exc_text",
)


class RecordSocket:
    """The part of multiprocessing.Queue's interface that the handler uses, over a SOCK_SEQPACKET socket."""

    def __init__(self, sock: socket.socket, dropped: Callable[[], None] = lambda: None) -> None:
        """Take over a connected socket. `dropped` is called for each record that could not be sent."""
        self._sock = sock
        self._dropped = dropped

    def put_nowait(self, record: logging.LogRecord) -> None:
        """Send a record without blocking."""
        fields = {name: getattr(record, name, None) for name in _FIELDS}
        fields["msg"] = str(fields["msg"])[: RECORD_MAX // 4]
        fields["exc_text"] = fields["exc_text"] and str(fields["exc_text"])[: RECORD_MAX // 4]
        try:
            self._sock.send(json.dumps(fields).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            self._dropped()

    def get(self, timeout: float | None = None) -> logging.LogRecord:
        """Return the next record; sleeps until there is one, without `timeout`. EOFError once the worker ended."""
        del timeout
        data = self._sock.recv(RECORD_MAX)
        if not data:
            raise EOFError
        try:
            return logging.makeLogRecord({name: value for name, value in json.loads(data).items() if name in _FIELDS})
        except (ValueError, AttributeError) as error:
            raise Empty from error  # not a record: a worker may send anything

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def qsize(self) -> int:
        """Nothing is ever held back: 0."""
        return 0

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def join_thread(self) -> None:
        """There is no feeder thread."""


class _Reemit(logging.Handler):
    """Gives a worker's record to the logger of its name, as if it had been logged in this process."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


class WorkerLogHandler(MultiProcessingHandler):
    """One worker's log: made with `receiving` in the control process, with `sending` in the worker."""

    def __init__(self, sock: socket.socket, dropped: Callable[[], None] = lambda: None) -> None:
        """Use `sock`. MultiProcessingHandler's own __init__ would make the queue and the thread that we replace."""
        logging.Handler.__init__(self)
        self.sub_handler = _Reemit()
        self.queue = RecordSocket(sock, dropped)
        self._is_closed = False

    @classmethod
    def receiving(cls, sock: socket.socket, name: str) -> WorkerLogHandler:
        """Control side: hand on each record that comes, from a thread that ends with the worker."""
        handler = cls(sock)
        handler._receive_thread = threading.Thread(target=handler._receive, name=name, daemon=True)
        handler._receive_thread.start()
        return handler

    @classmethod
    def sending(cls, sock: socket.socket, dropped: Callable[[], None]) -> WorkerLogHandler:
        """Worker side: send each record of the root logger."""
        return cls(sock, dropped)

    def fileno(self) -> int:
        """Return the socket's descriptor; it lives as long as the handler, or its thread."""
        return int(self.queue.fileno())

    def close(self) -> None:
        """Forget the handler; the thread ends at the worker's end-of-file."""
        logging.Handler.close(self)


def log_to(sock: socket.socket, level: int, dropped: Callable[[], None]) -> None:
    """Worker side: send every log record of this process, from `level` up, to the control process."""
    root: Any = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(WorkerLogHandler.sending(sock, dropped))
    root.setLevel(level)
