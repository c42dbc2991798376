"""What is measured: the table of cases, each with the back-end on both sides, the front-end, the counter, and its goal.

A new case is a new row. What `backend`, `front` and `peer` mean is in `sides.py`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Final

import attrs

#: Formats of virtqueues, by whether they are packed.
RING_FORMATS: Final = ("split", "packed")
SPLIT: Final = RING_FORMATS[:1]
#: Microseconds that our workers poll before they sleep, in the cases that are not about sleeping.
BUSY_POLL_US: Final = 50

PEERS: Final = {
    "dpdk:rxonly": "DPDK net_vhost, testpmd rxonly",
    "dpdk:txonly": "DPDK net_vhost, testpmd txonly",
    "dpdk:macswap": "DPDK net_vhost, testpmd macswap",
    "dpdk:io": "DPDK net_vhost, testpmd io between two ports",
    "dpdk:tap": "DPDK net_vhost, testpmd io to net_tap",
    "write": "bare write() loop",
    "copy": "memcpy() in one thread",
    "poll": "the same, busy polling",
    "one": "the same with one worker",
}
"""What a peer is called in tables."""
OWN: Final = ("send", "receive", "loop")
"""What our own front-end can do; every other `front` is a mode of testpmd."""


@attrs.frozen
class Case:
    """One case.

    `backend` is what `vhostmp serve` runs ({size} is replaced; "tap", "packet" and "patch" get their devices), `front`
    what the front-end does, `peer` a key of PEERS, `counter` the rate: "Tx" (packets the front-end got rid of), "Rx"
    (packets that came to it), "tap" (what the device took). `segments`: how testpmd cuts its packets. `goal` is the
    ratio aimed at, `cost_goal` the same of processor time a packet against DPDK's own count, `gigabits_goal` of bits,
    `ns_goal` nanoseconds a packet while busy, at most.
    """

    name: str
    size: int
    backend: str
    front: str
    peer: str
    counter: str
    goal: float = 0.0
    cost_goal: float = 0.0
    gigabits_goal: float = 0.0
    ns_goal: float = 0.0
    segments: tuple[int, ...] = ()
    workers: int = 1
    devices: int = 1
    busy_poll: int = BUSY_POLL_US
    ring: int = 1024
    formats: Sequence[str] = SPLIT
    packed: bool = False

    @property
    def title(self) -> str:
        """Return name and size, as --case takes it."""
        return f"{self.name}-{self.size}"

    @property
    def ring_format(self) -> str:
        """Return the format of its virtqueues, as --ring takes it."""
        return RING_FORMATS[self.packed]

    @property
    def own(self) -> bool:
        """Whether our own front-end drives it, and not testpmd."""
        return self.front in OWN

    @property
    def needs_dpdk(self) -> bool:
        """Whether one side of it is testpmd."""
        return not self.own or self.peer.startswith("dpdk:")

    @property
    def needs_device(self) -> bool:
        """Whether it needs a network device of its own, and the right to make one."""
        return self.backend in ("tap", "packet")

    @property
    def peer_name(self) -> str:
        """Return the peer's name for people."""
        return PEERS[self.peer]

    @property
    def front_name(self) -> str:
        """Return the front-end's name for people."""
        return f"our own, {self.front}" if self.own else f"testpmd {self.front}"


def _sizes(name: str, backend: str, front: str, peer: str, counter: str, goals: dict[int, float]) -> list[Case]:
    """Return a case for each size of `goals`, in both formats; at 64 bytes processor time is looked at as well."""
    return [
        Case(
            *(name, size, backend, front, peer, counter),
            goal=goal,
            cost_goal=0.25 if size == 64 and peer.startswith("dpdk:") else 0.0,  # noqa: PLR2004 - the smallest
            formats=RING_FORMATS,
        )
        for size, goal in goals.items()
    ]


_HERE: Final = "vhostmp.tools.bench"
CASES: Final = (
    *_sizes("null", "null", "txonly", "dpdk:rxonly", "Tx", {64: 1.05, 512: 0.0, 1500: 2.4}),
    *_sizes("copy", "null:copy", "txonly", "dpdk:rxonly", "Tx", {64: 1.0, 512: 0.0, 1500: 1.5}),
    *_sizes("source", "source:{size}", "rxonly", "dpdk:txonly", "Rx", {64: 2.5, 512: 3.0, 1500: 1.85}),
    *_sizes("loopback", "loopback", "flowgen", "dpdk:macswap", "Rx", {64: 1.08, 512: 1.65, 1500: 2.5}),
    *(
        Case("patch", size, "patch", "flowgen", "dpdk:io", "Rx", goal=goal, devices=2, formats=RING_FORMATS)
        for size, goal in ((64, 1.1), (1500, 2.5))
    ),
    Case("segments", 64, "null:copy", "txonly", "dpdk:rxonly", "Tx", goal=1.0, segments=(32, 32)),
    Case("segments", 1500, "null:copy", "txonly", "dpdk:rxonly", "Tx", goal=1.4, segments=(500, 500, 500)),
    *_sizes("send", "null:copy", "send", "dpdk:rxonly", "Tx", {64: 3.5, 1500: 0.0}),
    *_sizes("receive", "source:{size}", "receive", "dpdk:txonly", "Rx", {64: 8.0, 1500: 0.0}),
    *_sizes("loop", "loopback", "loop", "dpdk:macswap", "Rx", {64: 5.5, 1500: 0.0}),
    *(Case("tap", size, "tap", "send", "write", "tap", goal=0.95) for size in (64, 1500)),
    *(Case("tap-dpdk", size, "tap", "send", "dpdk:tap", "tap", goal=1.15) for size in (64, 1500)),
    Case("tso", 65226, "tap", "send", "write", "tap", gigabits_goal=20.0, ring=256),
    *(Case("packet", size, "packet", "send", "write", "tap") for size in (64, 1500)),
    *(Case("memory", size, "loopback", "loop", "copy", "Rx") for size in (64, 1500)),
    Case("memory-null", 64, "null", "send", "copy", "Tx"),
    Case("python-batch", 64, f"python:{_HERE}.numpy_backend:Batches", "send", "copy", "Tx", ns_goal=40.0),
    Case("python-burst", 64, f"python:{_HERE}.numpy_backend:Bursts", "send", "copy", "Tx", ns_goal=100.0),
    Case("python-views", 64, f"python:{_HERE}.python_backend:Views", "send", "copy", "Tx", ns_goal=300.0),
    Case("event", 64, "null", "txonly", "poll", "Tx", busy_poll=0),
    Case("event-loop", 64, "loopback", "loop", "poll", "Rx", busy_poll=0),
    Case("workers", 64, "loopback", "loop", "one", "Rx", workers=2, devices=2),
)

QUICK: Final = ("memory-null-64", "memory-64", "memory-1500", "tap-64", "null-64", "loopback-64", "loop-64")
"""What --quick measures, in this order, as far as time and machine allow."""


def choose(names: Sequence[str], formats: Sequence[str] | None = None) -> list[Case]:
    """Return the cases that `names` (patterns of a name or of a name with its size) select.

    In the ring formats asked for, or else in those each case is defined for.
    """
    return [
        attrs.evolve(case, packed=form == RING_FORMATS[1])
        for case in CASES
        for form in (formats or case.formats)
        if any(fnmatch.fnmatch(case.title, name) or case.name == name for name in names)
    ]


def quick(names: Sequence[str], formats: Sequence[str] | None = None) -> list[Case]:
    """Return the cases of a first look, the cheapest first; with names only those of them."""
    return [
        attrs.evolve(case, packed=form == RING_FORMATS[1], goal=0.0, cost_goal=0.0, gigabits_goal=0.0)
        for title in QUICK
        for case in CASES
        if case.title == title and any(fnmatch.fnmatch(title, name) or case.name == name for name in names)
        for form in (formats or SPLIT)
    ]
