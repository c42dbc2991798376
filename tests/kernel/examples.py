"""One case for each rule, as small as it can be, and the same ground for all of them."""

from __future__ import annotations

from typing import Any, Final

from tests.kernel.case import DATA, RING_ROOM, RX, TABLES, TX, Case, RingPlan, Step
from tests.kernel.generate import (
    EVENT_IDX,
    INDIRECT_DESC,
    LOG_ALL,
    MRG_RXBUF,
    NOTIFY_ON_EMPTY,
    OFFLOADS,
    VERSION_1,
    VIRTIO_NET_HDR,
)
from vhostmp.tools.stress.ring import INDIRECT, NEXT
from vhostmp.tools.stress.split import NetHeader

PLANS: Final = (RingPlan(0, 8), RingPlan(RING_ROOM, 8))
#: The same with a used ring that begins on one page and ends on another.
LARGE: Final = (RingPlan(0x6F0, 1024), PLANS[TX])
PLAIN: Final = bytes(12).hex()
SETTLE: Final = Step("settle")
GUEST_OFFLOADS: Final = 1 << 0 | 1 << 1 | 1 << 7  # CSUM, GUEST_CSUM, GUEST_TSO4: a frame may be of 64 KiB


def set_up(features: int = VERSION_1, *, log: bool = False) -> list[Step]:
    """Set both rings up, with the log's verbs if need be."""
    steps = [Step("set_owner"), Step("set_features", 0, features), Step("set_mem_table", 0, "all")]
    if log:
        steps += [Step("set_log_base"), Step("set_log_fd", 0, "event")]
    for ring in (RX, TX):
        steps += [
            Step("set_vring_num", ring, PLANS[ring].num),
            Step("set_vring_addr", ring, {"flags": 1} if log else {}),
            Step("set_vring_kick", ring, "event"),
            Step("set_vring_call", ring, "event"),
            Step("set_vring_err", ring, "event"),
        ]
    return steps


def started(features: int = VERSION_1, *, log: bool = False) -> list[Step]:
    """Set both rings up and start them."""
    return [*set_up(features, log=log), Step("start", RX), Step("start", TX), SETTLE]


def sent(frame: int = 60, header: str = PLAIN, **more: Any) -> dict[str, Any]:
    """Return a chain of one segment with a frame to send."""
    return {"o": [[DATA[TX].start, 12 + frame]], "i": [], "h": header, "f": ["plain", frame, 1], **more}


def empty(*sizes: int, at: int = 0, **more: Any) -> dict[str, Any]:
    """Return a chain with room for a frame."""
    return {"o": [], "i": [[DATA[RX].start + at + 4096 * i, size] for i, size in enumerate(sizes)], **more}


def add(ring: int, *chains: dict[str, Any]) -> Step:
    """Add chains to a ring."""
    return Step("add", ring, list(chains))


def network(*sizes: int) -> Step:
    """Have the network send frames."""
    return Step("frames", 0, [["plain", size, 1, False] for size in sizes])


def header(**fields: int) -> str:
    """Return a header in hexadecimal."""
    return NetHeader(**fields).pack().hex()


def _case(name: str, features: int, steps: list[Step]) -> Case:
    plans = LARGE if name == "event-word-log" else PLANS
    return Case(plans, features, tuple(steps), f"example {name}")


BAD_HEAD: Final = [{"head": 0xFFFF}]

#: rule -> steps, and the features that the driver goes by where it is not VERSION_1 alone.
EXAMPLES: Final[dict[str, list[Case]]] = {
    name: [_case(name, features, steps) for features, steps in cases]
    for name, cases in {
        "receive-kicks": [(VERSION_1, [*started(), add(RX, empty(2000)), SETTLE, network(60), SETTLE])],
        "event-word-log": [
            (
                VERSION_1 | EVENT_IDX,
                [
                    *set_up(VERSION_1 | EVENT_IDX | LOG_ALL, log=True),
                    Step("set_vring_num", RX, 1024),
                    Step("start", RX),
                    SETTLE,
                ],
            )
        ],
        "unused-buffers": [
            (
                VERSION_1 | MRG_RXBUF,
                [*started(VERSION_1 | MRG_RXBUF), add(RX, empty(64)), network(500), SETTLE],
            )
        ],
        "polled-words": [(VERSION_1, [*set_up(), Step("set_vring_kick", TX, "none"), Step("start", TX), SETTLE])],
        "polled-without-kick": [
            (
                VERSION_1,
                [*set_up(), Step("set_vring_kick", TX, "none"), Step("start", TX), SETTLE, add(TX, sent()), SETTLE],
            )
        ],
        "no-header-without-features": [
            (
                0,
                [
                    *(step for step in set_up(0) if step.name != "set_features"),
                    Step("start", TX),
                    add(TX, sent()),
                    SETTLE,
                ],
            )
        ],
        "broken-for-good": [
            (VERSION_1, [*started(), add(TX, sent(bad=[{"ahead": 9}])), SETTLE, add(TX, sent()), SETTLE]),
        ],
        "notify-on-empty": [
            (
                VERSION_1 | EVENT_IDX,
                [
                    *started(VERSION_1 | EVENT_IDX | NOTIFY_ON_EMPTY),
                    add(TX, sent()),
                    SETTLE,
                    Step("suppress", TX, {"event": -1}),
                    add(TX, sent(), sent(bad=BAD_HEAD)),
                    SETTLE,
                ],
            )
        ],
        "busy-poll-of-both": [
            (
                VERSION_1,
                [
                    Step("set_owner"),
                    Step("set_mem_table", 0, "all"),
                    Step("set_vring_err", RX, "event"),
                    Step("set_vring_num", TX, PLANS[TX].num),
                    Step("set_vring_addr", TX, {}),
                    Step("set_vring_busyloop_timeout", TX, 50),
                    Step("start", TX),
                    SETTLE,
                ],
            )
        ],
        "error-once": [
            (VERSION_1, [*started(), add(TX, sent(bad=BAD_HEAD)), SETTLE, add(TX, sent()), SETTLE]),
        ],
        "num-buffers": [(VERSION_1, [*started(), add(RX, empty(2000)), SETTLE, network(60), SETTLE])],
        "start-without-num": [
            (0, [Step("set_owner"), Step("set_mem_table", 0, "all"), Step("set_vring_addr", TX, {}), Step("start", TX)])
        ],
        "ring-outside-memory": [
            (VERSION_1, [*set_up(), Step("set_mem_table", 0, "no rings"), Step("start", TX)]),
            (VERSION_1, [*started(), Step("set_mem_table", 0, "none")]),
        ],
        "features-while-running": [(VERSION_1, [*started(), Step("set_features", 0, VERSION_1 | EVENT_IDX)])],
        "log-all-without-log": [(VERSION_1, [*started(), Step("set_features", 0, VERSION_1 | LOG_ALL)])],
        "log-used-without-log-all": [(VERSION_1, [*started(log=True), add(TX, sent()), SETTLE])],
        "start-at-used-index": [
            (
                VERSION_1,
                [*set_up(), Step("set_vring_base", TX, 5), Step("start", TX), Step("get_vring_base", TX), SETTLE],
            )
        ],
        "new-call-fd": [(VERSION_1, [*started(), Step("set_vring_call", TX, "event"), SETTLE])],
        "frame-larger-than-ring": [
            (
                VERSION_1 | MRG_RXBUF,
                [
                    *started(VERSION_1 | MRG_RXBUF),
                    add(RX, *(empty(64, at=4096 * i) for i in range(8))),
                    network(1000, 60),
                    SETTLE,
                ],
            )
        ],
        "wild-receive-index": [
            (
                VERSION_1 | MRG_RXBUF | EVENT_IDX | GUEST_OFFLOADS,
                [
                    *started(VERSION_1 | MRG_RXBUF | EVENT_IDX | GUEST_OFFLOADS),
                    add(
                        RX,
                        *(empty(2048, at=4096 * place) for place in range(3)),
                        empty(726, at=12288),
                        empty(1143, at=16384),
                    ),
                    network(1514, 1514, 1514, 1514),
                    add(RX, empty(1526, at=20480, bad=[{"ahead": 17}])),
                    network(200),
                    SETTLE,
                ],
            )
        ],
        "receive-before-bad-chain": [
            (
                VERSION_1 | MRG_RXBUF,
                [
                    *started(VERSION_1 | MRG_RXBUF),
                    add(RX, empty(64), empty(64, at=4096, bad=BAD_HEAD)),
                    network(500),
                    SETTLE,
                ],
            )
        ],
        "receive-broken-early": [(VERSION_1, [*started(), add(RX, empty(2000, bad=BAD_HEAD)), SETTLE])],
        "features-offered": [
            (VERSION_1, [Step("get_features")]),
            (VERSION_1, [Step("set_owner"), Step("set_features", 0, VERSION_1 | VIRTIO_NET_HDR)]),
        ],
        "more-regions": [(VERSION_1, [Step("set_owner"), Step("set_mem_table", 0, "many")])],
        "overlapping-regions": [(VERSION_1, [Step("set_owner"), Step("set_mem_table", 0, "overlap")])],
        "desc-alignment": [(VERSION_1, [Step("set_owner"), Step("set_vring_addr", TX, {"desc": 8})])],
        "indirect-not-negotiated": [(VERSION_1, [*started(), add(TX, sent(t=TABLES.start)), SETTLE])],
        "indirect-and-next": [
            (
                VERSION_1 | INDIRECT_DESC,
                [
                    *started(VERSION_1 | INDIRECT_DESC),
                    add(TX, sent(t=TABLES.start, bad=[{"desc": -1, "flags": INDIRECT | NEXT, "next": 7}])),
                    SETTLE,
                ],
            )
        ],
        "transmit-without-header": [
            (VERSION_1, [*started(), add(TX, {"o": [[DATA[TX].start, 5]], "i": []}, sent()), SETTLE]),
            (VERSION_1, [*started(), add(TX, {"o": [[DATA[TX].start, 0]], "i": []}, sent()), SETTLE]),
        ],
        "transmit-writable": [(VERSION_1, [*started(), add(TX, sent(i=[[DATA[TX].start + 4096, 0]])), SETTLE])],
        "receive-empty": [
            (VERSION_1, [*started(), add(RX, empty(0), empty(2000, at=4096)), SETTLE, network(60), SETTLE])
        ],
        "bad-header": [
            (
                VERSION_1,
                [*started(VERSION_1 | OFFLOADS), add(TX, sent(header=header(gso_type=1, gso_size=100))), SETTLE],
            ),
            (VERSION_1, [*started(VERSION_1 | OFFLOADS), add(TX, sent(header=header(flags=2, hdr_len=5000))), SETTLE]),
        ],
        "offload-not-negotiated": [
            (VERSION_1, [*started(), add(TX, sent(header=header(flags=1, csum_start=14, csum_offset=6))), SETTLE])
        ],
    }.items()
}

_BAD_HEADERS: Final = (
    {"flags": 1, "csum_start": 500},
    {"flags": 1, "csum_start": 70},
    {"flags": 1, "csum_start": 59},
    {"flags": 1, "gso_type": 1, "gso_size": 100, "hdr_len": 1000, "csum_start": 14, "csum_offset": 6},
    {"flags": 1, "gso_type": 1, "csum_start": 14},
    {"flags": 1, "gso_type": 4, "gso_size": 9, "csum_start": 14},
    {"flags": 1, "gso_type": 9, "gso_size": 100, "csum_start": 14},
    {"flags": 1, "gso_type": 0x80, "csum_start": 14},
)
#: Rules without an example, and why.
TIMED: Final = {
    "stopped-words": "they differ where one side asks for kicks between two chains and the other takes both at once",
}

#: Mistakes of a driver that both sides take alike.
AGREED: Final = [
    *(
        _case(
            "agreed", VERSION_1, [*started(VERSION_1 | OFFLOADS), add(TX, sent(header=header(**bad)), sent()), SETTLE]
        )
        for bad in _BAD_HEADERS
    ),
    _case("agreed", VERSION_1, [*started(), add(TX, {"o": [[DATA[TX].start, 12 + 9]], "i": []}, sent()), SETTLE]),
]
