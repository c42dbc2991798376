"""The back-end under test: where it is, how a connection to it is made, and what it is found to offer.

Rules: a back-end listens (`vhostmp stress` connects) or connects (`--listen`: `vhostmp stress` listens, and waits for
it before each clause). One connection at a time: a back-end need not serve two front-ends on one socket. One that was
started a moment ago is waited for, once, before anything is asked.
"""

from __future__ import annotations

import contextlib
import socket
import stat
import struct
import time
from collections.abc import Generator
from pathlib import Path
from typing import Final

import attrs

from vhostmp.errors import LocalError
from vhostmp.tools.stress.blk import BlkMachine
from vhostmp.tools.stress.consts import CALM, ProtocolFeature, Request, has
from vhostmp.tools.stress.link import DEFAULT_PROTOCOL, Link
from vhostmp.tools.stress.machine import Machine, Setup
from vhostmp.tools.stress.net import NetMachine
from vhostmp.tools.stress.rng import RngMachine
from vhostmp.tools.stress.verdict import Failure

PATIENCE: Final = 5.0
"""How long a back-end may take to connect or to answer, seconds."""
DEVICES: Final = ("net", "blk", "rng")
STARTING: Final = 5.0
"""How long its socket is waited for at the most when nobody listens there yet, seconds."""
SLOTS_PLAIN: Final = 8  # regions in SET_MEM_TABLE (vhost-user, "Memory regions description")


@attrs.frozen
class Facts:
    """What a back-end offers, and does."""

    features: int
    protocol: int
    queues: int
    """Rings that it serves (net: two for each pair)."""
    slots: int
    """Memory regions that it takes one by one (CONFIGURE_MEM_SLOTS), 0 when it does not."""
    echoes: bool
    """Net: whether a frame that was sent comes back on the same pair."""


class Listener:
    """Where a back-end that connects is waited for."""

    def __init__(self, path: Path) -> None:
        """Listen. LocalError when the path is taken or no socket can be made there.

        A socket on which nobody listens, because whoever did was killed, is replaced.
        """
        self.path: Final = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if _is_stale(path):
                path.unlink(missing_ok=True)
            self._sock.bind(str(path))
            self._sock.listen()
        except OSError as error:
            self._sock.close()
            raise LocalError(f"cannot listen on {path}: {error.strerror or error}") from error

    def accept(self, patience: float) -> socket.socket:
        """Wait for the back-end. TimeoutError when it does not come."""
        self._sock.settimeout(patience)
        return self._sock.accept()[0]

    def close(self) -> None:
        """Remove the socket."""
        self._sock.close()
        self.path.unlink(missing_ok=True)


def _is_stale(path: Path) -> bool:
    """Whether there is a socket at `path` on which nobody listens."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


class Target:
    """A back-end, through one socket."""

    def __init__(
        self, path: Path, device: str, *, listener: Listener | None = None, patience: float = PATIENCE
    ) -> None:
        """`device`: its class, one of DEVICES. `listener`: where it connects, borrowed; None: it listens."""
        self.path: Final = path
        self.device: Final = device
        self.patience: Final = patience
        self._listener = listener

    def connect(self) -> Link:
        """Return a new connection. Failure when the back-end cannot be reached."""
        try:
            if self._listener is None:
                return Link.connect(self.path, self.patience)
            return Link(self._listener.accept(self.patience), self.patience)
        except TimeoutError:
            what = f"take a connection to {self.path}" if self._listener is None else f"connect to {self.path}"
            raise Failure(f"the back-end did not {what} in {self.patience:g} s") from None
        except OSError as error:
            raise Failure(f"cannot connect to {self.path}: {error.strerror or error}") from None

    def check(self) -> int:
        """Raise LocalError when there is certainly no back-end: to be told before any clause runs.

        Waits for one that is starting, for `patience` or STARTING seconds, whichever is less.

        Returns: the process that listens, see `peer_pid`; 0 where the back-end connects.
        """
        if self._listener is not None:
            return 0
        until = time.monotonic() + min(self.patience, STARTING)
        try:
            while True:
                try:
                    return self._listening()
                except (FileNotFoundError, ConnectionRefusedError):
                    if time.monotonic() > until:
                        raise
                time.sleep(0.02)
        except FileNotFoundError:
            raise LocalError(f"there is no socket {self.path}: start the back-end first, or use --listen") from None
        except ConnectionRefusedError:
            raise LocalError(f"nobody listens on {self.path}: start the back-end first, or use --listen") from None
        except PermissionError:
            raise LocalError(f"no permission to use {self.path}: run as its owner, or as root") from None
        except TimeoutError as error:
            raise LocalError(f"{error}: is the back-end busy with another front-end?") from None
        except OSError as error:
            raise LocalError(f"cannot use {self.path}: {error.strerror}") from None

    def _listening(self) -> int:
        """Return the process that listens. OSError when it cannot be reached, LocalError for what is no socket."""
        if not stat.S_ISSOCK(self.path.stat().st_mode):
            raise LocalError(f"{self.path} is not a socket: give the path that the back-end listens on")
        link = Link.connect(self.path, self.patience)
        try:
            return peer_pid(link)
        finally:
            link.close()

    def machine(self, link: Link, setup: Setup, *, echoes: bool = False) -> Machine:
        """Return a machine on a connection that has been through its handshake."""
        if self.device == "net":
            return NetMachine(link, setup, echoes=echoes)
        return (BlkMachine if self.device == "blk" else RngMachine)(link, setup)

    def learn(self) -> Facts:
        """Find out what the back-end offers. Failure when it does not even get so far as to work."""
        link = self.connect()
        try:
            link.handshake(DEFAULT_PROTOCOL)
            features, protocol = link.features_offered, link.protocol_offered
            queues = {"net": 2}.get(self.device, 1)
            if has(protocol, ProtocolFeature.MQ):
                queues = link.get_u64(Request.GET_QUEUE_NUM) * queues
            slots = 0
            if has(protocol, ProtocolFeature.CONFIGURE_MEM_SLOTS):
                slots = link.get_u64(Request.GET_MAX_MEM_SLOTS)
        finally:
            link.close()
        facts = Facts(features, protocol, queues, slots, echoes=False)
        if self.device == "net":
            with doubting(self.device):
                facts = attrs.evolve(facts, echoes=self._echoes(facts))
        return facts

    def _echoes(self, facts: Facts) -> bool:
        """Whether a frame comes back. It must at least be taken."""
        link = self.connect()
        link.handshake()
        with NetMachine(link, Setup(facts.features & CALM)) as machine:
            machine.start_all()
            machine.post()
            frame = machine.next_frame()
            machine.send(frame)
            machine.tx().kick()
            machine.finish([frame])
            try:
                machine.receive(patience=0.5)
            except Failure:
                return False
        return True


def peer_pid(link: Link) -> int:
    """Return the process at the other end (unix(7), SO_PEERCRED): that which called listen(), or that which connected.

    0 when nobody can say: it is in another container.
    """
    raw = link.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[0])


@contextlib.contextmanager
def doubting(device: str) -> Generator[None]:
    """Where a back-end does not do the first thing that its class is for, ask whether that is its class."""
    try:
        yield
    except Failure as error:
        raise Failure(f"{error}: is its class of device {device}? (--device)", error.seed) from None
