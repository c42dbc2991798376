"""Where a software guest's rings and buffers lie, and the process it lives in.

What it is for: the demo and its tests. `Layout` is the one place that knows where in guest memory what is; a guest
process runs `main` of this module, with its `Spec` as argument and its descriptors inherited.

Guest-physical memory::

    0            base    the rings of every queue pair, RINGS_BYTES each; never moves
    POOL_GPA     pool    the packet buffers of every queue pair; exists twice, only one of them is in the memory table

Rules: a guest process dies with the process that started it (parent-death signal) and opens nothing by name.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from typing import Final

import attrs

from vhostmp.errors import LocalError, SysError
from vhostmp.shm.segment import Segment
from vhostmp.tools import _board, _guest

RINGS_BYTES: Final = 65536
POOL_GPA: Final = 0x1000_0000
PR_SET_PDEATHSIG: Final = 1
#: The longest RX or TX ring that fits in half of RINGS_BYTES.
ENTRIES_MAX: Final = 1024
ENTRIES_MIN: Final = 2
#: Starts a guest process with our own module path, wherever we were imported from.
_BOOT: Final = (
    "import json,sys; sys.path[:] = json.loads(sys.argv[1]); from vhostmp.tools.guest import main; main(sys.argv[2])"
)


@attrs.frozen
class RingPlace:
    """One virtqueue: its entries and the byte offsets of its three parts in the base segment (also their gpa)."""

    entries: int
    desc: int
    avail: int
    used: int

    @classmethod
    def at(cls, start: int, entries: int, *, packed: bool = False) -> RingPlace:
        """Lay a ring of `entries` out from `start`, aligned as virtio 1.3 wants it (16, 2, 4; here up to 128 each).

        Of a packed ring the parts are descriptors and the driver's and the device's event suppression (2.8.10.1).
        """
        avail = start + 16 * entries
        if packed:
            avail = (avail + 127) // 128 * 128
        used = (avail + (4 if packed else 6 + 2 * entries) + 127) // 128 * 128
        return cls(entries, start, avail, used)


@attrs.frozen
class Layout:
    """Guest memory of a device with `pairs` queue pairs. Sizes and offsets in bytes."""

    pairs: int = 1
    tx_entries: int = 256
    rx_entries: int = 512
    packed: bool = False

    def __attrs_post_init__(self) -> None:
        """Refuse rings that do not fit; LocalError."""
        for entries in (self.tx_entries, self.rx_entries):
            if not ENTRIES_MIN <= entries <= ENTRIES_MAX or entries & (entries - 1):
                raise LocalError(f"ring size {entries} is not a power of two from {ENTRIES_MIN} to {ENTRIES_MAX}")

    @property
    def base_size(self) -> int:
        """Size of the base segment."""
        return self.pairs * RINGS_BYTES

    @property
    def pool_stride(self) -> int:
        """Size of one queue pair's part of a pool, whole pages: its transmit slots, then its receive slots."""
        return ((self.tx_entries + self.rx_entries) * _guest.SLOT + 4095) // 4096 * 4096

    @property
    def pool_size(self) -> int:
        """Size of a pool."""
        return self.pairs * self.pool_stride

    def ring(self, index: int) -> RingPlace:
        """Place virtqueue `index`: the receive queue of pair n is 2n, its transmit queue 2n + 1 (virtio 1.3, 5.1.2)."""
        pair, transmit = divmod(index, 2)
        start = pair * RINGS_BYTES + transmit * (RINGS_BYTES // 2)
        entries = self.tx_entries if transmit else self.rx_entries
        return RingPlace.at(start, entries, packed=self.packed)

    def transmit_part(self, pair: int) -> slice:
        """Bytes of a pool that hold the transmit slots of `pair`."""
        start = pair * self.pool_stride
        return slice(start, start + self.tx_entries * _guest.SLOT)


@attrs.frozen
class Spec:
    """Everything a guest process is told. File descriptors are inherited under these very numbers."""

    pair: int
    layout: Layout
    base_fd: int
    pool_fds: tuple[int, int]
    board_fd: int
    tx_kick_fd: int
    tx_call_fd: int
    rx_kick_fd: int
    rx_call_fd: int
    features: int
    sizes: tuple[int, int] = (64, 64)
    indirect_every: int = 61
    spin_seconds: float = 50e-6
    quiet_seconds: float = 1.0
    parent: int = 0

    @property
    def fds(self) -> tuple[int, ...]:
        """All descriptors, to be passed on."""
        return (
            self.base_fd,
            *self.pool_fds,
            self.board_fd,
            self.tx_kick_fd,
            self.tx_call_fd,
            self.rx_kick_fd,
            self.rx_call_fd,
        )

    def to_json(self) -> str:
        """Write the spec as one line."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Read it back."""
        fields = json.loads(text)
        fields["layout"] = Layout(**fields["layout"])
        fields["pool_fds"] = tuple(fields["pool_fds"])
        fields["sizes"] = tuple(fields["sizes"])
        return cls(**fields)


def board_offset(pair: int) -> int:
    """Byte offset of the board of `pair` in the board segment."""
    return pair * ((_board.BOARD_BYTES + 4095) // 4096 * 4096)


def board_segment_size(pairs: int) -> int:
    """Size of the segment that holds the boards of `pairs` guests."""
    return board_offset(pairs)


def make_guest(spec: Spec, base: memoryview, pools: tuple[memoryview, memoryview], board: memoryview) -> _guest.Guest:
    """Make the guest that `spec` describes on memory that is already mapped; its descriptors must be open here."""
    tx, rx = spec.layout.ring(2 * spec.pair + 1), spec.layout.ring(2 * spec.pair)
    offset = spec.pair * spec.layout.pool_stride
    return _guest.Guest(
        base,
        pools,
        board,
        board_offset=board_offset(spec.pair),
        tx=(tx.entries, tx.desc, tx.avail, tx.used, spec.tx_kick_fd, spec.tx_call_fd),
        rx=(rx.entries, rx.desc, rx.avail, rx.used, spec.rx_kick_fd, spec.rx_call_fd),
        pool_offset=offset,
        pool_gpa=POOL_GPA + offset,
        sizes=spec.sizes,
        features=spec.features,
        indirect_every=spec.indirect_every,
        spin_seconds=spec.spin_seconds,
        quiet_seconds=spec.quiet_seconds,
    )


class GuestProcess:
    """A guest in a process of its own."""

    def __init__(self, spec: Spec) -> None:
        """Start it. It waits for the order RUN on its board. SysError when it cannot be started."""
        self.spec: Final = attrs.evolve(spec, parent=os.getpid())
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _BOOT,
                    json.dumps([path or os.getcwd() for path in sys.path]),
                    self.spec.to_json(),
                ],
                pass_fds=self.spec.fds,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C goes to the foreground group: the demo decides when the guest ends
            )
        except OSError as error:
            raise SysError.wrap("cannot start the software guest", error) from error

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process.poll() is not None

    def wait(self, timeout: float) -> None:
        """Wait for its end after STOP was ordered; whoever does not end in `timeout` seconds is killed."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it now. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies, and end at once when that has happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(1)


def main(text: str) -> None:
    """Live the guest that `text`, a Spec as JSON, describes: the program of a guest process."""
    spec = Spec.from_json(text)
    die_with_parent(spec.parent)
    layout = spec.layout
    base = Segment("base", spec.base_fd, layout.base_size, owner=False)
    first, second = (Segment("pool", fd, layout.pool_size, owner=False) for fd in spec.pool_fds)
    board = Segment("board", spec.board_fd, board_segment_size(layout.pairs), owner=False)
    make_guest(spec, base.buf, (first.buf, second.buf), board.buf).run()
