"""What a worker leaves of a ring when it is killed in the middle of a batch, on the memory of weak.py: J1 to J4.

A worker gives two batches back; it is killed anywhere, in any order of its stores that C11 permits. A replacement takes
the ring up (vring_attach), gives one more batch back, and may be killed as well; so a third one finds what two deaths
have left. Each finds the ring where it stands, and in the end every chain is back once: none missing, none twice.

Between two batches stands vmp_fence_own_death: a fence for the compiler, which is all that a death asks for. Here it is
a full one, since a thread of this memory may perform its stores in whatever order it could have been compiled to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs

from tests.model.weak import (
    Op,
    Program,
    Registers,
    Thread,
    Value,
    expect,
    fence_full,
    load_acquire,
    load_relaxed,
    store_relaxed,
    store_release,
    wait_until,
)

Words = Mapping[str, int]


def _supervisor(worker: str, fork: str) -> Thread:
    """Forks a replacement once a worker is proved dead."""
    return Thread(
        f"supervisor of {worker}",
        (wait_until("life", lambda _value, _r: False, "", unless_dead=worker), store_release(fork, 1, "")),
        may_wait=True,
    )


# ---- split rings: vring_publish, split_attach


def _split_batch(end: Value, needs: tuple[str, ...] = ()) -> list[Op]:
    """vring_publish, up to `end`."""
    return [
        store_relaxed("slot.batch_avail_idx", end, needs=needs),
        store_relaxed("slot.batch_used_idx", end, needs=needs),
        store_release("used->idx", end, "V2", needs=needs),
        store_release("slot.last_avail_idx", end, "J1 last_avail_idx", needs=needs),
        store_release("slot.used_idx", end, "J1 used_idx", needs=needs),
        fence_full("J1 before the next batch"),
    ]


def _split_attach() -> list[Op]:
    """split_attach, but for a fresh start."""
    read = ("ring", "used", "avail", "batch_used", "batch_avail")

    def published(r: Registers) -> bool:
        return r["ring"] != r["used"] and r["ring"] == r["batch_used"]

    return [
        load_acquire("used->idx", "ring", "J2"),
        load_relaxed("slot.used_idx", "used"),
        load_relaxed("slot.last_avail_idx", "avail"),
        load_relaxed("slot.batch_used_idx", "batch_used"),
        load_relaxed("slot.batch_avail_idx", "batch_avail"),
        expect(
            lambda r: (r["batch_avail"] if published(r) else r["avail"]) == r["ring"],
            "the replacement takes chains a second time, or leaves some out",
            *read,
        ),
        expect(
            lambda r: (r["ring"] if published(r) else r["used"]) == r["ring"],
            "the replacement gives chains back where others are",
            *read,
        ),
        store_release(
            "slot.last_avail_idx", lambda r: r["batch_avail"], "J1 repaired first", when=published, needs=read
        ),
        store_release("slot.used_idx", lambda r: r["ring"], "J1 repaired last", when=published, needs=read),
        fence_full("J1 after a repair"),
    ]


def split(batches: int = 2) -> Program:
    """A split ring, its worker, and two that come after it."""
    first = [op for end in range(1, batches + 1) for op in _split_batch(end)]
    # Chains are taken with an acquire (V1) before any is given back.
    after = [
        *_split_attach(),
        load_acquire("avail->idx", "available", ""),
        *_split_batch(lambda r: r["ring"] + 1, ("ring",)),
    ]
    return Program(
        "split journal",
        (
            Thread("worker 1", tuple(first), may_die=True),
            _supervisor("worker 1", "fork 2"),
            Thread("worker 2", tuple(after), may_die=True, starts="fork 2"),
            _supervisor("worker 2", "fork 3"),
            Thread("worker 3", tuple(after), starts="fork 3"),
        ),
        {
            "avail->idx": 9,
            "used->idx": 0,
            "slot.used_idx": 0,
            "slot.last_avail_idx": 0,
            "slot.batch_used_idx": 0,
            "slot.batch_avail_idx": 0,
            "fork 2": 0,
            "fork 3": 0,
            "life": 0,
        },
        ("workers/_vring.pyx:vring_publish", "workers/_vring.pyx:split_attach", "workers/pool.py:replace"),
        deaths=2,
    )


# ---- what becomes of the packets


def packets() -> Program:
    """Two split rings in one: a chain is sent, or a frame is read into it. One worker dies, the second goes on.

    A read takes a frame from the back-end for good. Transmit: what the driver has back was sent. Receive: no frame is
    in two chains that the driver has back, and each of them has one.
    """

    def batch(turn: int, end: Value, needs: tuple[str, ...] = ()) -> list[Op]:
        frame = f"frame{turn}"

        def chain(r: Registers) -> int:
            return end(r) if callable(end) else end

        return [
            load_relaxed("frames", frame),
            store_relaxed("frames", lambda r: r[frame] + 1, needs=(frame,)),
            Op("store", lambda r: f"received {chain(r)}", lambda r: r[frame], needs=(frame, *needs)),
            Op("store", lambda r: f"sent {chain(r)}", 1, needs=needs),
            *_split_batch(end, needs),
        ]

    def wrong(words: Words, _: Mapping[str, Registers]) -> str | None:
        back = range(1, words["used->idx"] + 1)
        if not all(words[f"sent {chain}"] for chain in back):
            return "a chain is given back that was not sent"
        frames = [words[f"received {chain}"] for chain in back]
        if 0 in frames:
            return "a chain is given back without its frame"
        return "a frame is delivered twice" if len(set(frames)) < len(frames) else None

    fetch = load_acquire("avail->idx", "available", "")
    after = [*_split_attach(), fetch, *batch(2, lambda r: r["ring"] + 1, ("ring",))]

    def quiet(ops: list[Op]) -> tuple[Op, ...]:
        """What J1 is for is seen in split()."""
        return tuple(attrs.evolve(op, tag="") if op.tag.startswith("J") else op for op in ops)

    return Program(
        "packets",
        (
            Thread("worker 1", quiet(batch(1, 1)), may_die=True),
            _supervisor("worker 1", "fork 2"),
            Thread("worker 2", quiet(after), starts="fork 2"),
        ),
        {
            **dict.fromkeys(("received 1", "received 2", "sent 1", "sent 2"), 0),
            "frames": 1,
            "avail->idx": 9,
            **dict.fromkeys(("used->idx", "slot.used_idx", "slot.last_avail_idx", "slot.batch_used_idx"), 0),
            **dict.fromkeys(("slot.batch_avail_idx", "fork 2", "life"), 0),
        },
        ("workers/_vring.pyx:vring_give_back", "workers/_vring.pyx:vring_publish", "workers/_vring.pyx:split_attach"),
        deaths=1,
        finally_=wrong,
    )


# ---- packed rings: packed_give_back, packed_publish, packed_attach


def _packed_batch(start: int, next_batch: Callable[[], list[Op]] | None = None) -> list[Op]:
    """Two chains of one descriptor each, from position `start`: packed_give_back and packed_publish."""
    ops = [
        store_relaxed("entry 0", start + 1),
        store_relaxed("entry 1", start + 2),
        store_relaxed("slot.batch_start_idx", start),
        store_relaxed("slot.batch_used_idx", start + 2),
        store_release("slot.batch_n", 2, "J3 batch_n"),
        store_release(f"desc {start + 1}", start + 2, "J3 descriptors"),
        store_release(f"desc {start}", start + 1, "V6 the first"),
        store_release("slot.used_idx", start + 2, "J3 used_idx"),
        store_release("slot.batch_n", 0, "J3 batch_n = 0"),
        fence_full("J3 before the next batch"),
    ]
    return ops + (next_batch() if next_batch else [])


def _packed_attach() -> list[Op]:
    """packed_attach: finish what was begun."""
    read = ("n", "start", "end", "e0", "e1", "flags")

    def begun(r: Registers) -> bool:
        return r["n"] > 0

    def hidden(r: Registers) -> bool:
        return begun(r) and r["flags"] == 0

    return [
        load_acquire("slot.batch_n", "n", "J4"),
        load_relaxed("slot.batch_start_idx", "start"),
        load_relaxed("slot.batch_used_idx", "end"),
        load_relaxed("entry 0", "e0"),
        load_relaxed("entry 1", "e1"),
        Op("load", lambda r: f"desc {r['start']}", into="flags", needs=("n", "start"), acquire=True),
        Op("store", lambda r: f"desc {r['start'] + 1}", lambda r: r["e1"], release=True, tag="J3 finished descriptors",
           when=hidden, needs=read),
        Op("store", lambda r: f"desc {r['start']}", lambda r: r["e0"], release=True, tag="J3 finished, the first",
           when=hidden, needs=read),
        store_release("slot.used_idx", lambda r: r["end"], "J3 finished used_idx", when=begun, needs=read),
        store_release("slot.batch_n", 0, "J3 finished batch_n = 0", when=begun, needs=read),
    ]  # fmt: skip


def packed() -> Program:
    """A packed ring of four descriptors, its worker, and two that come after it."""

    def wrong(words: Words, _: Mapping[str, Registers]) -> str | None:
        stands = words["slot.used_idx"]
        for position in range(4):
            there = words[f"desc {position}"]
            if there not in (0, position + 1):
                return f"position {position} has the id of another chain"
            if (there != 0) != (position < stands):
                return "used descriptors stand among available ones, and nothing tells them apart"
        return None

    return Program(
        "packed journal",
        (
            Thread("worker 1", tuple(_packed_batch(0, lambda: _packed_batch(2))), may_die=True),
            _supervisor("worker 1", "fork 2"),
            Thread("worker 2", tuple(_packed_attach()), may_die=True, starts="fork 2"),
            _supervisor("worker 2", "fork 3"),
            Thread("worker 3", tuple(_packed_attach()), starts="fork 3"),
        ),
        {
            **{f"desc {position}": 0 for position in range(4)},
            "entry 0": 0,
            "entry 1": 0,
            "slot.batch_start_idx": 0,
            "slot.batch_used_idx": 0,
            "slot.batch_n": 0,
            "slot.used_idx": 0,
            "fork 2": 0,
            "fork 3": 0,
            "life": 0,
        },
        ("workers/_packed.pyx:packed_publish", "workers/_packed.pyx:write_batch", "workers/_packed.pyx:packed_attach"),
        deaths=2,
        finally_=wrong,
    )
