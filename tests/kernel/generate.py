"""Random cases, each from its seed alone: verbs in good and bad orders, and traffic on rings of all shapes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

from tests.kernel import frames
from tests.kernel.case import (
    DATA,
    FAR_DATA,
    HOLE,
    PAGE,
    RING_ROOM,
    RX,
    TABLES,
    TX,
    Case,
    RingPlan,
    Step,
)
from vhostmp.backends import CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, header_len
from vhostmp.tools.stress.ring import DESC_BYTES, INDIRECT, NEXT, WRITE
from vhostmp.tools.stress.split import NetHeader

NOTIFY_ON_EMPTY: Final = 1 << 24
LOG_ALL: Final = 1 << 26
INDIRECT_DESC: Final = 1 << 28
EVENT_IDX: Final = 1 << 29
VERSION_1: Final = 1 << 32
MRG_RXBUF: Final = 1 << 15
VIRTIO_NET_HDR: Final = 1 << 27  # of Linux alone: it adds and removes the header itself
OFFLOADS: Final = 1 << CSUM | 1 << GUEST_CSUM | 1 << HOST_TSO4 | 1 << GUEST_TSO4

SIZES: Final = (1, 2, 4, 8, 8, 16, 16, 64, 256, 1024)
FEATURES: Final = (
    (VERSION_1, 0.75),
    (MRG_RXBUF, 0.5),
    (EVENT_IDX, 0.5),
    (INDIRECT_DESC, 0.6),
    (NOTIFY_ON_EMPTY, 0.15),
    (OFFLOADS, 0.4),
)
ORDINARY: Final = 1514
REACH: Final = 1 << 16
#: Just before a region of memory ends and the next begins, in either ring's buffers.
EDGES: Final = (0x43E00, 0x57E00)
FDS: Final = ("event", "event", "event", "none", "closed", "file")


class Author:
    """Writes one case."""

    def __init__(self, seed: str) -> None:
        """Draw what the rings look like."""
        self._seed: Final = seed
        self._rng: Final = random.Random(seed)
        self._rings: Final = (self._plan(0), self._plan(1))
        self._features = 0
        self._steps: Final[list[Step]] = []
        self._number = 0
        self._table = TABLES.start
        self._data = [self._rng.choice((area.start, edge)) for area, edge in zip(DATA, EDGES, strict=True)]
        self._far = [area.start for area in FAR_DATA]

    def case(self) -> Case:
        """Write it."""
        if self._chance(0.65):
            self._verbs()
        else:
            self._traffic()
        return Case(self._rings, self._features, tuple(self._steps), self._seed)

    # -- small things

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def _do(self, name: str, ring: int = 0, value: Any = None) -> None:
        self._steps.append(Step(name, ring, value))

    def _plan(self, ring: int) -> RingPlan:
        num = self._rng.choice(SIZES)
        slack = RING_ROOM - 26 * num - 64
        start = ring * RING_ROOM + self._rng.randrange(0, slack, 16)
        base = self._rng.choice((0, 0, 1, 0xFFFF, 0xFFFE, 0x10000 - num, self._rng.randrange(REACH)))
        return RingPlan(start, num, base & 0xFFFF)

    def _draw_features(self) -> int:
        return sum(bits for bits, probability in FEATURES if self._chance(probability))

    def _place(self, ring: int, length: int) -> int | None:
        """Take a range of buffer memory: none overlap. None when there is no room left."""
        gap = self._rng.choice((0, 0, 1, 3, 64, 2000))
        places, areas = (self._far, FAR_DATA) if self._chance(0.05) else (self._data, DATA)
        at = places[ring]
        if at + length > areas[ring].stop:
            return None
        places[ring] = at + length + gap
        return at

    def _split(self, ring: int, length: int, most: int) -> list[list[int]] | None:
        """Cut `length` bytes into up to `most` segments, some of them empty. None when there is no room left."""
        rng = self._rng
        count = min(rng.choice((1, 1, 2, 2, 3, 5)), most)
        cuts = sorted(
            rng.choice((rng.randint(0, length), min(length, rng.choice((1, 10, 12, 26))))) for _ in range(count - 1)
        )
        sizes = [high - low for low, high in zip([0, *cuts], [*cuts, length], strict=True)]
        places = [self._place(ring, size) for size in sizes]
        if any(place is None for place in places):
            return None
        return [[place, size] for place, size in zip(places, sizes, strict=True) if place is not None]

    def _take_table(self, entries: int) -> int | None:
        size = DESC_BYTES * entries
        if self._table + size + 8 > TABLES.stop:
            return None
        at = self._table + (4 if self._chance(0.1) else 0)
        self._table += size + 16
        return at

    # -- verbs

    def _verbs(self) -> None:
        """Any verbs in any order, mostly in one that leads somewhere."""
        rng = self._rng
        self._features = self._draw_features()
        good = self._set_up()
        if self._chance(0.5):
            good += [Step("start", ring) for ring in rng.sample((RX, TX), 2)]
        steps = [step for step in good if self._chance(0.93)]
        for _ in range(rng.randint(1, 8)):
            steps.insert(rng.randint(0, len(steps)), self._any_verb())
        if self._chance(0.2):
            rng.shuffle(steps)
        steps += [Step("settle"), Step("get_vring_base", RX), Step("get_vring_base", TX)]
        self._steps.extend(steps)

    def _set_up(self) -> list[Step]:
        """What leads to rings that can be started."""
        rng = self._rng
        log = self._chance(0.3)
        steps = [Step("set_features", 0, self._features | (LOG_ALL if log else 0)), Step("set_mem_table", 0, "all")]
        if log or self._chance(0.1):
            steps += [Step("set_log_base"), Step("set_log_fd", 0, rng.choice(("event", "none")))]
        for ring in (RX, TX):
            plan = self._rings[ring]
            steps += [
                Step("set_vring_num", ring, plan.num),
                Step("set_vring_addr", ring, {"flags": 1} if log else {}),
                Step("set_vring_base", ring, plan.base),
                Step("set_vring_kick", ring, "event"),
                Step("set_vring_call", ring, "event"),
                Step("set_vring_err", ring, "event"),
            ]
            if self._chance(0.1):
                steps.append(Step("set_vring_busyloop_timeout", ring, rng.choice((0, 20, 200))))
        rng.shuffle(steps)
        return [Step("set_owner"), *steps]

    def _any_verb(self) -> Step:
        """Return a verb with arguments good or bad."""
        rng = self._rng
        ring = rng.choice((RX, TX, RX, TX, RX, TX, 2, 7))
        plan = self._rings[ring % 2]
        choices: tuple[Callable[[], Step], ...] = (
            lambda: Step("set_owner"),
            lambda: Step("reset_owner"),
            lambda: Step("set_features", 0, rng.choice((self._features, 1 << 50, 1 << 5 | VERSION_1, self._features))),
            lambda: Step("set_mem_table", 0, rng.choice(("all", "all", "none", "empty region", "wrap", "part"))),
            lambda: Step("set_log_base"),
            lambda: Step("set_log_fd", 0, rng.choice(FDS)),
            lambda: Step("set_vring_num", ring, rng.choice((0, 3, plan.num, plan.num, 0x10000, 0x18000, 1 << 31))),
            lambda: Step("set_vring_addr", ring, rng.choice(({}, {"flags": 2}, {"avail": 1}, {"used": 2}, {"log": 2}))),
            lambda: Step("set_vring_base", ring, rng.choice((plan.base, plan.base, 0x10000, 1 << 31))),
            lambda: Step("get_vring_base", ring),
            lambda: Step(rng.choice(("set_vring_kick", "set_vring_call", "set_vring_err")), ring, rng.choice(FDS)),
            lambda: Step("set_vring_busyloop_timeout", ring, rng.choice((0, 1, 100))),
            lambda: Step("start", ring % 2),
            lambda: Step("stop", ring % 2),
        )
        return rng.choice(choices)()

    # -- traffic

    def _traffic(self) -> None:
        """Rings that are set up well, and what goes through them."""
        rng = self._rng
        self._features = self._draw_features()
        self._steps.extend(self._set_up())
        for ring in (RX, TX):
            if self._chance(0.3):
                self._add(ring)
        for ring in rng.sample((RX, TX), 2):
            self._do("start", ring)
        self._do("settle")
        rounds = rng.randint(1, 4)
        spoiled = rng.randrange(rounds) if self._chance(0.2) else -1
        for number in range(rounds):
            self._round(spoil=number == spoiled)
        for ring in rng.sample((RX, TX), 2):
            self._do("get_vring_base", ring)
            if self._chance(0.5):
                self._do("stop", ring)
                self._do("get_vring_base", ring)
        self._do("settle")

    def _round(self, *, spoil: bool) -> None:
        rng = self._rng
        if self._chance(0.35):
            ring = rng.choice((RX, TX))
            if self._features & EVENT_IDX:
                self._do("suppress", ring, {"event": rng.choice((0, 0, 1, 2, 5, -1, 0x8000))})
            else:
                self._do("suppress", ring, {"flags": rng.choice((0, 1))})
        if self._chance(0.3):
            self._meanwhile(rng.choice((RX, TX)))
        for _ in range(rng.randint(1, 3)):
            action = rng.choice(("rx", "tx", "tx", "frames"))
            if action == "frames":
                self._frames()
            else:
                self._add(RX if action == "rx" else TX)
        if spoil:
            self._spoiled(rng.choice((TX, TX, RX)))
        self._do("settle")

    def _meanwhile(self, ring: int) -> None:
        """Verbs while a ring runs."""
        logging = any(step.name == "set_features" and step.value & LOG_ALL for step in self._steps)
        choices: list[list[Step]] = [
            [Step("get_vring_base", ring)],
            [
                Step("stop", ring),
                Step("get_vring_base", ring),
                Step("set_vring_base", ring, "last"),
                Step("start", ring),
            ],
            [Step("stop", ring), Step("start", ring)],
            [Step("set_vring_num", ring, 4)],
            [Step("set_vring_base", ring, 0)],
            [Step("set_vring_err", ring, "event")],
            [Step("set_vring_kick", ring, "event")],
            [Step("set_mem_table", 0, "all")],
            [Step("set_vring_busyloop_timeout", ring, 50)],
            [Step("set_owner")],
        ]
        if logging:
            choices += [
                [Step("set_log_base")],
                [Step("set_log_fd", 0, "event")],
                [Step("set_features", 0, self._features)],
                [
                    Step("set_features", 0, self._features),
                    Step("settle"),
                    Step("set_features", 0, self._features | LOG_ALL),
                ],
                [Step("set_vring_addr", ring, {"flags": 1})],
            ]
        self._steps.extend(self._rng.choice(choices))

    def _frames(self) -> None:
        rng = self._rng
        listed: list[list[Any]] = []
        for _ in range(rng.choice((1, 1, 2, 4, 9))):
            kind = rng.choice(("plain", "plain", "udp", "tcp"))
            size = rng.choice((60, 60, 200, ORDINARY, rng.randint(14, ORDINARY)))
            self._number += 1
            listed.append([kind, size, self._number, kind != "plain" and self._chance(0.3)])
        self._do("frames", 0, listed)

    def _add(self, ring: int) -> None:
        count = min(self._rng.choice((1, 1, 2, 3, 5, 20)), self._rings[ring].num)
        if chains := self._chains(ring, count):
            self._do("add", ring, chains)

    def _chains(self, ring: int, count: int) -> list[dict[str, Any]]:
        """Return so many chains, or fewer: as many as there is room for."""
        return [chain for chain in (self._chain(ring) for _ in range(count)) if chain is not None]

    def _chain(self, ring: int) -> dict[str, Any] | None:
        chain = self._receive() if ring == RX else self._transmit()
        if chain is None:
            return None
        entries = len(chain["o"]) + len(chain["i"])
        if self._features & INDIRECT_DESC and (self._chance(0.4) or entries > self._rings[ring].num):
            table = self._take_table(entries)
            if table is None:
                return None
            chain["t"] = table
        return chain

    def _most(self, ring: int) -> int:
        return 5 if self._features & INDIRECT_DESC else min(5, self._rings[ring].num)

    def _receive(self) -> dict[str, Any] | None:
        rng = self._rng
        header = header_len(self._features)
        if self._features & MRG_RXBUF:
            size = rng.choice((header, 64, 128, 700, ORDINARY + header, PAGE, rng.randint(1, 2000)))
        else:
            size = rng.choice((ORDINARY + header, ORDINARY + header, 2048, rng.randint(header + 14, 2000)))
        segments = self._split(RX, size, self._most(RX))
        return None if segments is None else {"o": [], "i": segments}

    def _transmit(self) -> dict[str, Any] | None:
        rng = self._rng
        kind = rng.choice(("plain", "plain", "udp", "tcp"))
        size = rng.choice((60, 60, 200, 200, ORDINARY, rng.randint(14, ORDINARY)))
        if self._chance(0.08):
            size = rng.choice((3000, 9000, 20000))
        size = max(size, frames.LEAST[kind])
        self._number += 1
        header = NetHeader()
        if kind != "plain" and self._features & OFFLOADS and self._chance(0.6):
            segment = rng.choice((100, 1000)) if kind == "tcp" and size > ORDINARY else 0
            header = frames.offload(kind, segment)
        if self._chance(0.02):
            header = self._any_header(size)
        segments = self._split(TX, header_len(self._features) + size, self._most(TX))
        if segments is None:
            return None
        return {"o": segments, "i": [], "h": header.pack().hex(), "f": [kind, size, self._number]}

    def _any_header(self, size: int) -> NetHeader:
        """Return a header that may ask for anything."""
        rng = self._rng
        return NetHeader(
            flags=rng.choice((0, 1, 1, 2, 3)),
            gso_type=rng.choice((0, 0, 1, 3, 4, 5, 0x81, 9)),
            hdr_len=rng.choice((0, 54, size, size + 1, 0xFFFF)),
            gso_size=rng.choice((0, 1, 100, 1000)),
            csum_start=rng.choice((0, 14, 34, size - 2, size, size + 12, 0xFFFF)),
            csum_offset=rng.choice((0, 6, 16, 0xFFFF)),
        )

    def _spoiled(self, ring: int) -> None:
        """Add chains of which one breaks a rule, and see to it that it is met."""
        rng = self._rng
        num = self._rings[ring].num
        chain = self._chain(ring)
        if chain is None:
            return
        here = len(chain["o"]) + len(chain["i"]) - 1
        direction = WRITE if ring == RX else 0
        bad = rng.choice(
            (
                {"desc": here, "addr": HOLE},
                {"desc": here, "addr": FAR_DATA[1].stop - 8, "len": 64},
                {"desc": here, "flags": NEXT | direction, "next": 0xFFFF if "t" in chain else num},
                {"desc": here, "flags": NEXT | direction, "next": 0 if "t" in chain else rng.randrange(num)},
                {"head": num},
                {"head": 0xFFFF},
                {"ahead": num + 1},
            )
        )
        if "t" in chain and self._chance(0.5):
            bad = rng.choice(({"desc": here, "flags": INDIRECT}, {"desc": -1, "len": 24}, {"desc": -1, "addr": HOLE}))
        chain["bad"] = [bad]
        self._do("add", ring, [*self._chains(ring, rng.choice((0, 0, 1, 3))), chain])
        if ring == RX:
            for _ in range(2):
                self._frames()


def generate(seed: str) -> Case:
    """Return the case of that seed."""
    return Author(seed).case()
