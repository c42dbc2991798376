"""The channel on which the back-end asks and the front-end answers (vu "Back-end communication").

Rules: nothing blocks, and nothing waits for an answer inside a verb: what is to happen then is a callback. What the
front-end may do to the channel costs it the channel alone: hanging up, answers to what was not asked, bytes that are
none of the protocol's end it with one log line. Who never reads it costs nothing: what waits is bounded, by one message
of a kind for signals and by `QUEUE_MAX` for the rest, and the event loop is not woken until there is room.

Theory of operation: a *signal* is a message whose repetition says nothing new (an interrupt, "the configuration has
changed"): while one is under way, raising it again makes one more follow, however often that happens. With REPLY_ACK
it is under way until it is acknowledged, which paces us to the front-end; without, until the socket has taken it.
A *post* is sent once, in order. Answers come in the order of the questions.
"""

from __future__ import annotations

import array
import logging
import socket
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Final, TypeAlias

import attrs

from vhostmp import consts
from vhostmp.consts import BackendRequest
from vhostmp.errors import VhostError
from vhostmp.eventloop import EventLoop
from vhostmp.parts import new_id
from vhostmp.protocol.codec import encode_request
from vhostmp.protocol.messages import Header
from vhostmp.protocol.payloads import U64, Empty, FieldError, Payload

log = logging.getLogger(__name__)

QUEUE_MAX: Final = 1024
"""Posts that may wait to be sent or answered."""

OnReply: TypeAlias = Callable[[int | None], None]
"""Called with the answer, 0 for success; with None when the channel ends before it comes."""


@attrs.define
class _Waiting:
    """A message that waits to be sent, `data` being the rest of it, or for its answer."""

    request: BackendRequest
    data: bytes
    fds: tuple[int, ...] = ()
    wants_reply: bool = False
    on_done: OnReply | None = None


class BackendChannel:
    """One end of the socket that SET_BACKEND_REQ_FD brought. All methods: the event loop's thread."""

    def __init__(
        self, loop: EventLoop, sock: socket.socket, device: str, *, reply_ack: bool, found: int | None = None
    ) -> None:
        """Take over a connected socket.

        Args:
            loop: where callbacks come from.
            sock: the socket; reads and writes are non-blocking whatever its mode.
            device: name in log lines.
            reply_ack: whether REPLY_ACK is negotiated, so that answers may be asked for.
            found: the number of a channel that a control process before us had: answers to it may still come.
        """
        self.id: Final = new_id() if found is None else found
        self._may_be_late = found is not None
        self._loop = loop
        self._sock = sock
        self._device = device
        self._reply_ack = reply_ack
        self._output: deque[_Waiting] = deque()
        self._unanswered: deque[_Waiting] = deque()
        self._input = b""
        # signals under way; whether to send another one afterwards
        self._signals: dict[Hashable, bool] = {}
        self._writing = False
        self.closed = False
        self.dropped = 0
        """Posts refused because too many waited."""
        loop.watch(sock, self._readable)

    def signal(self, request: BackendRequest, payload: Payload | None = None) -> None:
        """Send a message that says nothing new while one like it is under way; see above. Never fails."""
        if self.closed:
            return
        payload = Empty() if payload is None else payload
        key = (request, payload)
        if key in self._signals:
            self._signals[key] = True
            return
        self._signals[key] = False

        def done(_reply: int | None) -> None:
            if self._signals.pop(key, False):
                self.signal(request, payload)

        self._queue(_Waiting(request, b"", (), self._reply_ack, done), payload)

    def post(
        self, request: BackendRequest, payload: Payload, fds: Sequence[int] = (), on_reply: OnReply | None = None
    ) -> bool:
        """Send a message once, in order.

        Args:
            request: which message.
            payload: its payload.
            fds: descriptors to send with it, borrowed until it is sent or dropped; BACKEND_SEND_FD must be negotiated.
            on_reply: called with the answer; without REPLY_ACK with 0 as soon as the message is sent.

        Returns: whether it will be sent; it is not when the channel is closed or `QUEUE_MAX` wait.
        """
        if self.closed or len(self._output) + len(self._unanswered) >= QUEUE_MAX:
            self.dropped += not self.closed
            return False
        self._queue(_Waiting(request, b"", tuple(fds), self._reply_ack and on_reply is not None, on_reply), payload)
        return True

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Hang up; whoever awaits an answer gets None. May be called twice."""
        if self.closed:
            return
        self.closed = True
        self._loop.unwatch(self._sock)
        self._sock.close()
        waiting = [*self._unanswered, *self._output]
        self._unanswered.clear()
        self._output.clear()
        self._signals.clear()
        for message in waiting:
            if message.on_done is not None:
                message.on_done(None)

    # --- out ---

    def _queue(self, message: _Waiting, payload: Payload) -> None:
        message.data = encode_request(message.request, payload.pack(), need_reply=message.wants_reply)
        self._output.append(message)
        if not self._writing:
            self._flush()

    def _flush(self) -> None:
        """Send what waits, as far as the socket takes it; be woken when it takes more."""
        while self._output and not self.closed:
            message = self._output[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", message.fds))] if message.fds else []
            try:
                sent = self._sock.sendmsg([message.data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if not self._writing:
                    self._writing = True
                    self._loop.watch(self._sock, self._flush, write=True)
                return
            except OSError as error:
                self._end(f"cannot be written to: {error.strerror}")
                return
            message.fds = ()
            message.data = message.data[sent:]
            if message.data:
                continue
            self._output.popleft()
            if message.wants_reply:
                self._unanswered.append(message)
            elif message.on_done is not None:
                message.on_done(0)
        if self._writing and not self.closed:
            self._writing = False
            self._loop.watch(self._sock, self._readable)

    # --- in ---

    def _readable(self) -> None:
        try:
            self._read_answer()
        except BlockingIOError:
            pass
        except EOFError:
            self._end("was closed by the front-end", logging.DEBUG)
        except (FieldError, VhostError) as error:
            self._end(str(error))
        except OSError as error:
            self._end(f"cannot be read from: {error.strerror}")

    def _read_answer(self) -> None:
        """Read once; descriptors that come along are dropped by the kernel, for there is no room for them."""
        size = Header.SIZE + U64.STRUCT.size
        # An answer in one piece: of one that was sent so, no part is lost if we die here.
        data = self._sock.recv(size - len(self._input), socket.MSG_DONTWAIT)
        if not data:
            raise EOFError
        judged = len(self._input) >= Header.SIZE
        self._input += data
        if len(self._input) < Header.SIZE:
            return
        header = Header.unpack(self._input[: Header.SIZE])
        if not judged:
            self._judge(header)
        if len(self._input) < size:
            return
        answer = U64.unpack(self._input[Header.SIZE :]).value
        self._input = b""
        if self._may_be_late and not (self._unanswered and self._unanswered[0].request == header.request):
            return
        message = self._unanswered.popleft()
        if answer:
            log.warning("device %s: the front-end refused %s: %#x", self._device, message.request.name, answer)
        if message.on_done is not None:
            message.on_done(answer)

    def _judge(self, header: Header) -> None:
        """Judge the header of an answer. Raises: FieldError."""
        if not self._unanswered and not self._may_be_late:
            raise FieldError("request", header.request, "is an answer and nothing was asked")
        wanted = self._unanswered[0].request if self._unanswered else header.request
        if header.request != wanted and not self._may_be_late:
            raise FieldError("request", header.request, f"is answered, and {BackendRequest(wanted).name} was asked")
        if (
            header.flags & ~consts.VHOST_USER_NEED_REPLY_FLAG
            != consts.VHOST_USER_VERSION | consts.VHOST_USER_REPLY_FLAG
        ):
            raise FieldError("flags", header.flags, "are not those of an answer")
        if header.size != U64.STRUCT.size:
            raise FieldError("size", header.size, f"is not {U64.STRUCT.size} (bytes)")

    def _end(self, why: str, level: int = logging.WARNING) -> None:
        log.log(level, "device %s: back-end channel closed: %s", self._device, why)
        self.close()
