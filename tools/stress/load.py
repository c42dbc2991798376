"""`vhostmp stress --load`: keeps the rings of an echoing back-end full, and says how much passes and how long it takes.

Theory of operation. Every queue pair but the first is driven by a process of its own, the compiled guest of
tools/guest.py, which fills its transmit ring as fast as frames come back and checks every byte of each. The first pair
carries one frame at a time, from this process: its way there and back, from before the kick until the frame is found
in the receive ring, is one sample. So latency is that of a frame on an idle pair *beside* loaded ones: it holds the
back-end's scheduling between rings, and nothing of the wait in a loaded ring. Samples go on for the whole run; none is
left out, but when one takes long the next ones are not sent meanwhile (there is no correction for that).

Packets are counted by the guests: those sent and those that came back, right.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

import attrs

from vhostmp.errors import LocalError
from vhostmp.tools import _board, guest
from vhostmp.tools.stress.consts import CALM, Feature, ProtocolFeature, Request, bits, has
from vhostmp.tools.stress.frontend import u64, vring, vring_addr
from vhostmp.tools.stress.link import DEFAULT_PROTOCOL
from vhostmp.tools.stress.machine import S_ALL, Setup
from vhostmp.tools.stress.memory import Memory, Region
from vhostmp.tools.stress.net import NetMachine
from vhostmp.tools.stress.packed import WRAP
from vhostmp.tools.stress.target import Target
from vhostmp.tools.stress.verdict import Failure

SIZES: Final = (60, 1514)
MOST: Final = 15
"""Processes on one socket: their rings lie below those of the first pair."""
SECOND: Final = 1.0
PATIENCE: Final = 5.0
LONGEST_NS: Final = 60_000_000_000
PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)
"""Of the round trips."""


@attrs.frozen
class Load:
    """What is to be done."""

    path: Path
    processes: int = 1
    size: int = 64
    """Bytes of each frame."""
    seconds: float = 5.0
    packed: bool = False


@attrs.frozen
class Report:
    """What was seen."""

    seconds: float
    sent: int
    received: int
    bad: int
    """Frames that were lost, came twice or with other contents."""
    samples: int
    latency_us: dict[str, float]
    """By percentile, and `max`, microseconds."""

    def as_json(self) -> dict[str, object]:
        """Return it as the JSON report has it."""
        return {
            **attrs.asdict(self),
            "sent_per_second": self.sent / self.seconds,
            "received_per_second": self.received / self.seconds,
        }

    def as_table(self) -> str:
        """Return it for people."""
        lines = [
            f"{'sent':<12}{self.sent / self.seconds:>14,.0f} packets/s",
            f"{'received':<12}{self.received / self.seconds:>14,.0f} packets/s",
            f"{'bad':<12}{self.bad:>14,} packets",
            *(f"{name:<12}{value:>14,.1f} us" for name, value in self.latency_us.items()),
        ]
        return "\n".join(lines) + "\n"


class Stage:
    """A connection, the memory of all guests, their processes."""

    def __init__(self, load: Load) -> None:
        """Set everything up; the guests wait. Raises: LocalError, Failure."""
        self.load: Final = load
        self.stack: Final = ExitStack()
        try:
            self._build()
        except BaseException:
            self.stack.close()
            raise

    def _build(self) -> None:
        load, target = self.load, Target(self.load.path, "net")
        target.check()
        facts = target.learn()
        if not facts.echoes:
            raise LocalError("--load needs a back-end that sends frames back, such as 'loopback'")
        if load.packed and not has(facts.features, Feature.RING_PACKED):
            raise LocalError("the back-end does not offer packed rings")
        pairs, needed = facts.queues // 2, load.processes + 1
        if needed > pairs:
            raise LocalError(
                f"--load with --processes {load.processes} needs {needed} queue pairs, and the back-end has {pairs}: "
                f"serve it with more (vhostmp serve --queue-pairs {needed})"
            )
        link = target.connect()
        link.handshake(DEFAULT_PROTOCOL & ~bits(ProtocolFeature.CONFIGURE_MEM_SLOTS))
        packed = bits(Feature.RING_PACKED) if load.packed else 0
        features = facts.features & (CALM | packed | bits(Feature.NET_MQ))
        self.machine = self.stack.enter_context(NetMachine(link, Setup(features), echoes=True))
        self.layout = guest.Layout(pairs=load.processes, packed=load.packed)
        memory = self.machine.memory
        base = memory.add(0, self.layout.base_size)
        pool = memory.add(guest.POOL_GPA, self.layout.pool_size)
        others = Memory()  # of which the device knows nothing
        self.stack.callback(others.close)
        board = others.add(0, guest.board_segment_size(load.processes))
        spare = others.add(guest.POOL_GPA, self.layout.pool_size)
        self.boards: list[_board.Board] = []
        self.stack.callback(self.boards.clear)
        self.boards += [_board.Board(board.buf, guest.board_offset(pair)) for pair in range(load.processes)]
        self.machine.set_mem_table()
        self.machine.start_all()
        self.guests: list[guest.GuestProcess] = []
        self.stack.callback(self._end)
        for pair in range(load.processes):
            fds = [self._ring(index, base) for index in (2 * pair, 2 * pair + 1)]
            self.guests.append(guest.GuestProcess(self._spec(pair, base, pool, spare, board, fds)))
        self.machine.set_status(S_ALL)

    def _ring(self, index: int, base: Region) -> tuple[int, int]:
        """Start a guest's ring; return its kick and call eventfds."""
        link, place, number = self.machine.link, self.layout.ring(index), index + 2
        kick, call = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        self.stack.callback(os.close, kick)
        self.stack.callback(os.close, call)
        link.must(Request.SET_VRING_ENABLE, vring(number, 1))
        link.must(Request.SET_VRING_NUM, vring(number, place.entries))
        link.must(Request.SET_VRING_BASE, vring(number, WRAP << 16 | WRAP if self.load.packed else 0))
        uva = base.uva
        link.must(
            Request.SET_VRING_ADDR,
            vring_addr(number, desc=uva + place.desc, avail=uva + place.avail, used=uva + place.used),
        )
        link.must(Request.SET_VRING_CALL, u64(number), [call])
        link.must(Request.SET_VRING_KICK, u64(number), [kick])
        return kick, call

    def _spec(
        self, pair: int, base: Region, pool: Region, spare: Region, board: Region, fds: list[tuple[int, int]]
    ) -> guest.Spec:
        (rx_kick, rx_call), (tx_kick, tx_call) = fds
        return guest.Spec(
            pair=pair,
            layout=self.layout,
            base_fd=base.fd,
            pool_fds=(pool.fd, spare.fd),
            board_fd=board.fd,
            tx_kick_fd=tx_kick,
            tx_call_fd=tx_call,
            rx_kick_fd=rx_kick,
            rx_call_fd=rx_call,
            features=self.machine.setup.features,
            sizes=(self.load.size, self.load.size),
        )

    def order(self, code: int) -> None:
        """Give all guests an order, and wait until it is done. Failure when one does not, or has ended."""
        waiting = [(board, board.order(code)) for board in self.boards]
        until = time.monotonic() + PATIENCE
        while not all(board.acknowledged(command) for board, command in waiting):
            if time.monotonic() > until or any(process.ended for process in self.guests):
                raise Failure("a guest process has ended, or waits for the back-end for ever")
            time.sleep(0.001)

    def counts(self) -> tuple[int, int, int]:
        """Return how many frames were sent, came back, and were lost, doubled or damaged."""
        each = [board.counters() for board in self.boards]
        bad = sum(one[name] for one in each for name in ("lost", "duplicated", "corrupted", "violations"))
        return sum(one["sent"] for one in each), sum(one["received"] for one in each), bad

    def sample_ns(self) -> int:
        """Send a frame through the first pair, and return how long it took to come back, nanoseconds."""
        machine = self.machine
        machine.post()
        frame = machine.next_frame(max(self.load.size, SIZES[0]))
        machine.send(frame)
        began = time.perf_counter_ns()
        machine.tx().kick()
        ring = machine.rx()
        while not ring.driver.pending():
            if time.perf_counter_ns() - began > LONGEST_NS:
                raise Failure("a frame does not come back")
            if not ring.driver.want_interrupts():
                select.select([ring.call_fd], [], [], PATIENCE)
        took = time.perf_counter_ns() - began
        ring.called(0)
        machine.finish([frame])
        return took

    def _end(self) -> None:
        for board in self.boards:
            board.order(_board.STOP)
        for process in self.guests:
            process.wait(PATIENCE)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the guests and hang up."""
        self.stack.close()


def check(load: Load) -> None:
    """Raise LocalError for what is wrong with a load before anything is started."""
    if not SIZES[0] <= load.size <= SIZES[1]:
        raise LocalError(f"--size {load.size} is not from {SIZES[0]} to {SIZES[1]} bytes")
    if not 1 <= load.processes <= MOST:
        raise LocalError(f"--processes {load.processes} is not from 1 to {MOST}")


def run(load: Load, tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)) -> Report:
    """Load a back-end; `tell` is told once a second how it goes. Raises: LocalError, also for a failing back-end."""
    check(load)
    try:
        from hdrh.histogram import HdrHistogram  # noqa: PLC0415 - an extra
    except ImportError:
        raise LocalError("--load needs the package hdrhistogram: pip install 'vhostmp[stress]'") from None
    histogram = HdrHistogram(1, LONGEST_NS, 3)
    try:
        with Stage(load) as stage:
            stage.order(_board.RUN)
            began = told = time.monotonic()
            before = (0, 0, 0)
            while (now := time.monotonic()) < began + load.seconds:
                histogram.record_value(stage.sample_ns())
                if now > told + SECOND:
                    count = stage.counts()
                    rate = (count[1] - before[1]) / (now - told)
                    tell(f"vhostmp stress: {now - began:.0f} s, {rate:,.0f} packets/s came back, {count[2]} bad")
                    told, before = now, count
            sent, received, _ = stage.counts()
            seconds = time.monotonic() - began
            stage.order(_board.DRAIN)
            bad = stage.counts()[2]
    except (Failure, EOFError, OSError) as error:
        raise LocalError(f"the back-end does not bear the load: {error or type(error).__name__}") from None
    latency = {f"p{at:g}": histogram.get_value_at_percentile(at) / 1e3 for at in PERCENTILES}
    latency["max"] = histogram.get_max_value() / 1e3
    return Report(seconds, sent, received, bad, histogram.get_total_count(), latency)
