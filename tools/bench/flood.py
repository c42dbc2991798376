"""The front-end of our own, in a process of its own: connects to a back-end's sockets and drives them (_flood.pyx).

testpmd saturates at some 50 million packets a second whatever the back-end does; this one goes on, and needs neither
DPDK nor huge pages nor rights. Any vhost-user back-end will do that works in order, ours or DPDK's.

Rules: the harness makes the *board*, a page or two of shared memory, and looks at it; the process writes its counters
there and is asked for nothing. It says on stderr, in one line, what it cannot do. Guest memory is in huge pages where
the kernel has some to spare.
Source: vhost-user (QEMU docs/interop/vhost-user.rst), virtio 1.3, 5.1.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Final

import attrs

from vhostmp.errors import LocalError, VhostError
from vhostmp.shm.segment import Segment
from vhostmp.tools import _flood
from vhostmp.tools.bench.programs import PATIENCE, Program
from vhostmp.tools.guest import RINGS_BYTES, RingPlace
from vhostmp.tools.stress.consts import Feature, ProtocolFeature, Request, bits, has
from vhostmp.tools.stress.frontend import Frontend, ProtocolError, log_area, mem_table, region, u64, vring, vring_addr

GPA: Final = 0x1000_0000
LINE: Final = 64
#: Of a receive buffer, and of a transmit one that is not larger; an odd number of lines, for the cache's sake.
STRIDE: Final = 35 * LINE
HEADER: Final = 12
PACKED_START: Final = 0x8000_8000
#: virtio_net_hdr of a TCP segment to be cut: NEEDS_CSUM, TCPV4, header length, gso_size, csum_start, csum_offset.
TSO_HEADER: Final = struct.pack("<BBHHHHH", 1, 1, 54, 1448, 34, 16, 0)
TSO_FROM: Final = 1515
PROTOCOL: Final = bits(ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.LOG_SHMFD)
VRING_LOG: Final = 1
LOG_BYTES: Final = 1 << 20


@attrs.frozen
class Spec:
    """What the process is to do, one flow for each socket.

    `way` is "send" (to the device), "receive" (from it), "loop" (both, each packet comes back), "ping" (one packet at a
    time, asleep meanwhile), or, with the eventfds `fds` instead of sockets, "ask" and "answer" (the same without any
    device). `gap_ns`: time between two packets of a flow, 0 for full speed; of a `greedy` run the first flow has none.
    `log`: the back-end is to log the pages that it writes to.
    """

    sockets: Sequence[str]
    way: str
    size: int = 64
    ring: int = 1024
    packed: bool = False
    event_idx: bool = False
    gap_ns: int = 0
    greedy: bool = False
    log: bool = False
    fds: Sequence[int] = ()
    board_fd: int = -1

    def to_json(self) -> str:
        """Write it as one line."""
        return json.dumps(attrs.asdict(self))


def tso_frame(size: int) -> bytes:
    """Return the first 54 bytes of a TCP/IPv4 frame of `size` bytes, to an address that nobody has."""
    addresses = bytes([198, 18, 0, 1, 198, 18, 0, 2])  # RFC 2544: for benchmarks
    ip = struct.pack(">BBHHHBBH", 0x45, 0, size - 14, 0, 0x4000, 64, 6, 0) + addresses
    ip = ip[:10] + struct.pack(">H", _inverted_sum(ip)) + ip[12:]
    # What stands in the checksum's place is the sum over the pseudo-header (virtio 1.3, 5.1.6.2.1).
    pseudo = addresses + struct.pack(">HH", 6, size - 34)
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 0, 0, 0x50, 0x10, 0xFFFF, 0xFFFF ^ _inverted_sum(pseudo), 0)
    return b"\x02\0\0\0\0\x02\x02\0\0\0\0\x01\x08\0" + ip + tcp


def _inverted_sum(data: bytes) -> int:
    total = sum(data[::2]) * 256 + sum(data[1::2])
    while total > 0xFFFF:  # noqa: PLR2004 - 16 bits
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF ^ total


class Board:
    """What front-end and harness share: counters, times, and the request to stop."""

    def __init__(self, fd: int = -1) -> None:
        """Make it, or map the one behind `fd`."""
        size = _flood.BOARD_BYTES
        self._segment: Final = Segment.nameless(size) if fd < 0 else Segment("board", fd, size, owner=False)
        self.fd: Final = self._segment.fd
        self.view: Final = self._segment.buf
        self._words: Final = self.view.cast("Q")

    @property
    def running(self) -> bool:
        """Whether the front-end has come so far."""
        return bool(self._words[_flood.STATE_WORD] == 1)

    def stop(self) -> None:
        """Ask for the end."""
        self._words[_flood.STOP_WORD] = 1

    def again(self) -> None:
        """Be as before the first start, but for the counters: for who drives the same flows once more."""
        self._words[_flood.STATE_WORD] = self._words[_flood.STOP_WORD] = 0

    def totals(self) -> dict[str, int]:
        """Return the counters, all flows together."""
        names = ("Tx", "Rx", "bad", "lost", "kicks")
        first, step = _flood.FLOWS_WORD, _flood.WORDS_PER_FLOW
        end = first + step * _flood.MOST_FLOWS
        words = self._words[first:end].tolist()
        return {name: sum(words[at::step]) for at, name in enumerate(names)}

    def each(self, flows: int) -> list[int]:
        """Return the packets that each of the first `flows` flows has received."""
        first, step = _flood.FLOWS_WORD, _flood.WORDS_PER_FLOW
        return [self._words[first + step * flow + 1] for flow in range(flows)]

    def times(self) -> list[int]:
        """Return how many packets took how long: `_flood.value_of` says what an index stands for."""
        return self._words[_flood.TIMES_WORD : _flood.TIMES_WORD + _flood.TIMES_COUNT].tolist()

    def close(self) -> None:
        """Give it back."""
        self._words.release()
        self._segment.close()

    @property
    def closed(self) -> bool:
        """Whether it has been given back."""
        return self._segment.fd < 0


class Flood(Program):
    """The front-end's process, as the harness sees it."""

    def __init__(self, spec: Spec, core: int) -> None:
        """Start it and wait until it drives. LocalError with its reason when it does not."""
        self.board: Final = Board()
        spec = attrs.evolve(spec, board_fd=self.board.fd)
        command = [sys.executable, "-m", "vhostmp.tools.bench.flood", spec.to_json()]
        try:
            super().__init__(command, core, pass_fds=[self.board.fd, *spec.fds])
        except BaseException:
            self.board.close()
            raise
        try:
            limit = time.monotonic() + PATIENCE
            while not self.board.running:
                self.check()
                if time.monotonic() > limit:
                    raise LocalError(f"our front-end was not ready in {PATIENCE:g} s")
                time.sleep(0.002)
        except BaseException:
            self.end()
            raise
        self._last = (time.monotonic_ns(), self.board.totals())

    def rates(self) -> dict[str, float]:
        """Return packets a second since the last call: {"Rx": ..., "Tx": ...}. LocalError when there were bad ones."""
        now = (time.monotonic_ns(), self.board.totals())
        (then_ns, then), self._last = self._last, now
        if now[1]["bad"]:
            raise LocalError(f"{now[1]['bad']} packets or ring entries were not what they should be")
        return {name: (now[1][name] - then[name]) * 1e9 / (now[0] - then_ns) for name in ("Rx", "Tx")}

    def end(self, grace: float = 3.0) -> None:
        """Have it stop, which hangs up in order, and end it. Idempotent."""
        if self.board.closed:
            return
        self.board.stop()
        self._wait_for_end(0.2)
        super().end(grace)
        self.board.close()


# -- in the process itself -------------------------------------------------------------------------------------------


def _wanted(spec: Spec, offered: int) -> int:
    """Choose features, or say which one is missing."""
    needed = {Feature.VERSION_1: "virtio 1", Feature.IN_ORDER: "work in order"}
    if spec.packed:
        needed[Feature.RING_PACKED] = "packed rings"
    if spec.size >= TSO_FROM:
        needed |= {Feature.NET_CSUM: "checksums", Feature.NET_HOST_TSO4: "segmentation"}
    if spec.log:
        needed[Feature.LOG_ALL] = "a log of what it writes"
    for feature, name in needed.items():
        if not has(offered, feature):
            raise LocalError(f"the back-end does not offer {name}")
    extra = (Feature.PROTOCOL_FEATURES, Feature.NET_MRG_RXBUF, *([Feature.EVENT_IDX] if spec.event_idx else []))
    return offered & bits(*needed, *extra)


def _connect(spec: Spec, number: int, board: Board, stack: ExitStack) -> _flood.Flow:
    """Set up the device behind one socket, its first queue pair; returns the flow to drive."""
    link = stack.enter_context(Frontend.connect(spec.sockets[number]))
    link.send(Request.SET_OWNER)
    features = _wanted(spec, link.ask(Request.GET_FEATURES).u64)
    link.send(Request.SET_FEATURES, u64(features))
    if has(features, Feature.PROTOCOL_FEATURES):
        protocol = link.ask(Request.GET_PROTOCOL_FEATURES).u64
        link.send(Request.SET_PROTOCOL_FEATURES, u64(protocol & PROTOCOL))
    stride = (HEADER + spec.size + LINE) // (2 * LINE) * 2 * LINE + LINE
    strides = (max(STRIDE, stride), max(STRIDE, stride) if spec.way != "send" else STRIDE)
    memory = stack.enter_context(Segment.nameless(RINGS_BYTES + spec.ring * sum(strides), huge=True))
    uva = GPA + (number << 32)
    link.send(Request.SET_MEM_TABLE, mem_table(region(GPA, memory.size, uva)), [memory.fd])
    if spec.log:
        log = stack.enter_context(Segment.nameless(LOG_BYTES))  # a bit a page from 0 on: far beyond our memory
        link.ask(Request.SET_LOG_BASE, log_area(LOG_BYTES), [log.fd])
    rings: list[tuple[int, int, int, int, int, int]] = []
    for index in range(2):
        place = RingPlace.at(index * RINGS_BYTES // 2, spec.ring, packed=spec.packed)
        kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        call = os.eventfd(0, os.EFD_CLOEXEC)  # blocks: `ping` sleeps there
        stack.callback(os.close, kick)
        stack.callback(os.close, call)
        link.send(Request.SET_VRING_NUM, vring(index, spec.ring))
        link.send(Request.SET_VRING_BASE, vring(index, PACKED_START if spec.packed else 0))
        at = {name: uva + getattr(place, name) for name in ("desc", "avail", "used")}
        link.send(Request.SET_VRING_ADDR, vring_addr(index, VRING_LOG * spec.log, log=GPA + place.used, **at))
        link.send(Request.SET_VRING_CALL, u64(index), [call])
        link.send(Request.SET_VRING_KICK, u64(index), [kick])
        link.send(Request.SET_VRING_ENABLE, vring(index, 1))
        rings.append((spec.ring, place.desc, place.avail, place.used, kick, call))
    link.ask(Request.GET_FEATURES)  # answered in order: all of it is done
    flow = _flood.Flow(
        memory.buf,
        board.view,
        number,
        gpa=GPA,
        tx=rings[1],
        rx=rings[0],
        slots=RINGS_BYTES,
        strides=strides,
        size=spec.size,
        header=TSO_HEADER if spec.size >= TSO_FROM else bytes(HEADER),
        sends=spec.way != "receive",
        receives=spec.way != "send",
        packed=spec.packed,
        event_idx=spec.event_idx,
        gap_ns=0 if spec.greedy and number == 0 else spec.gap_ns,
    )
    if spec.size >= TSO_FROM:
        flow.preset(TSO_HEADER + tso_frame(spec.size))
    return flow


def main(text: str) -> int:
    """Be the front-end that `text`, a Spec as JSON, describes; returns the exit status."""
    spec = Spec(**json.loads(text))
    board = Board(spec.board_fd)
    try:
        with ExitStack() as stack:
            flows = [_connect(spec, number, board, stack) for number in range(len(spec.sockets))]
            if spec.way == "ask":
                _flood.ping_eventfd(spec.fds[0], spec.fds[1], board.view, spec.gap_ns)
            elif spec.way == "answer":
                _flood.answer_eventfd(spec.fds[0], spec.fds[1], board.view)
            elif spec.way == "ping":
                _flood.ping(flows[0], board.view)
            else:
                _flood.flood(flows, board.view)
            flows.clear()
    except (VhostError, OSError, EOFError, ProtocolError) as error:
        with suppress(OSError):
            print(f"our front-end: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
