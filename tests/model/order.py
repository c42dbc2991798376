"""What shm/ORDERING.md claims, as small programs on the memory of weak.py.

Each is the code's own accesses in the code's own order, with the tags of the comments that stand there. With every
order in place nothing bad can happen. Without any single one of them something bad does: else it is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import attrs

from tests.model.journal import packed, packets, split
from tests.model.weak import (
    NONE,
    Op,
    Program,
    Registers,
    Thread,
    expect,
    fence_full,
    load_acquire,
    load_relaxed,
    modify_full,
    store_relaxed,
    store_release,
    wait_until,
)

Words = Mapping[str, int]
READY: Final = 1
RETIRED: Final = -9


# ---- the grace period: R1 to R4


def section(number: int, items: int = 1) -> list[Op]:
    """Some work items that nobody parts (section_pass): section_enter, each of them, section_exit."""
    return [
        store_relaxed("seq", 2 * number + 1),
        fence_full("R1"),
        *(op for item in range(items) for op in _item(f"{number}.{item}")),
        *modify_full("seq", lambda seq: seq + 1, f"x{number}", release="R3"),
    ]


def _item(name: str) -> list[Op]:
    """One work item: refresh, a use of what is in force."""
    g = f"g{name}"
    return [
        load_acquire("generation", g, ""),
        Op("load", lambda r: f"thing{r[g]}", into=f"used{name}", needs=(g,)),
    ]


def _left(seen: str) -> Callable[[int, Registers], bool]:
    """Whether a reader is outside, or has left since the first look."""
    return lambda seq, r: seq % 2 == 0 or r[seen] not in (NONE, seq)


def swap(number: int, readers: int) -> list[Op]:
    """One verb: prepare, publish, synchronize, retire."""
    return [
        store_relaxed(f"thing{number}", READY),
        store_release("generation", number, ""),
        fence_full("R2"),
        *(
            wait_until(
                f"seq{reader}",
                _left(f"seen{number}{reader}"),
                "R4",
                into=f"seen{number}{reader}",
                unless_dead=f"worker{reader}",
            )
            for reader in range(readers)
        ),
        store_relaxed(f"thing{number - 1}", RETIRED),
    ]


def grace_period(readers: int, sections: int, swaps: int, deaths: int = 0, items: int = 1) -> Program:
    """Workers that run work items, so many a section, and a control process that swaps what they use."""
    workers = tuple(
        Thread(
            f"worker{reader}",
            tuple(_of(op, reader) for n in range(sections) for op in section(n, items)),
            may_die=True,
        )
        for reader in range(readers)
    )
    control = Thread("control", tuple(op for n in range(1, swaps + 1) for op in swap(n, readers)))
    things = {f"thing{n}": READY if n == 0 else 0 for n in range(swaps + 1)}
    return Program(
        "grace period",
        (*workers, control),
        {"generation": 0, **{f"seq{reader}": 0 for reader in range(readers)}, **things},
        (
            "shm/epoch.h:vmp_section_enter",
            "shm/epoch.h:vmp_section_exit",
            "shm/epoch.h:vmp_section_pass",
            "shm/epoch.h:vmp_wait_for_reader",
            "shm/_epoch.pyx:publish",
            "shm/_epoch.pyx:synchronize",
            "workers/_loop.pyx:refresh",
            "workers/_loop.pyx:run_item",
        ),
        deaths,
        dead_value=RETIRED,
    )


def _of(op: Op, reader: int) -> Op:
    return attrs.evolve(op, place=f"seq{reader}") if op.place == "seq" else op


def wake_up() -> Program:
    """R5, R6: a section ends while synchronize() goes to sleep. Who sleeps on an ended section sleeps a slice long."""
    worker = [
        *modify_full("seq", lambda seq: seq + 1, "x", fence="R5"),
        load_relaxed("waiters", "waiters"),
    ]
    control = [
        *modify_full("waiters", lambda n: n + 1, "n", fence="R6"),
        load_acquire("seq", "again", ""),
        load_relaxed("seq", "futex"),  # the kernel compares once more; its own order is not relied on
    ]

    def late(_: Words, r: Mapping[str, Registers]) -> str | None:
        sleeps = r["control"]["again"] == r["control"]["futex"] == 1
        return "sleeps on a section that has ended" if sleeps and r["worker"]["waiters"] == 0 else None

    return Program(
        "wake-up",
        (Thread("worker", tuple(worker)), Thread("control", tuple(control))),
        {"seq": 1, "waiters": 0},
        ("shm/epoch.h:vmp_section_exit", "shm/epoch.h:vmp_wait_for_reader"),
        finally_=late,
    )


# ---- a word that says that something else is ready


def message(name: str, store: str, load: str, *functions: str) -> Program:
    """Something is written, then a word that says so; who has seen the word reads it."""
    sender = [store_relaxed("content", READY), store_release("word", 1, store)]
    receiver = [
        wait_until("word", lambda value, _: value == 1, load),
        load_relaxed("content", "content"),
        expect(lambda r: r["content"] == READY, f"{name} is read before it is there", "content"),
    ]
    threads = (Thread("sender", tuple(sender)), Thread("receiver", tuple(receiver)))
    return Program(name, threads, {"content": 0, "word": 0}, functions)


def both_look(name: str, mine: str, its: str, *functions: str) -> Program:
    """Each says something and then looks what the other says: one of the two must see the other."""

    def blind(_: Words, r: Mapping[str, Registers]) -> str | None:
        return f"{name}: both sleep" if r["one"]["saw"] == r["other"]["saw"] == 0 else None

    one = [store_relaxed("a", 1), fence_full(mine), load_relaxed("b", "saw")]
    other = [store_relaxed("b", 1), fence_full(its), load_relaxed("a", "saw")]
    return Program(
        name, (Thread("one", tuple(one)), Thread("other", tuple(other))), {"a": 0, "b": 0}, functions, finally_=blind
    )


def packed_batch() -> Program:
    """V6, D13: used descriptors of a batch, the first one last."""
    device = [
        store_relaxed("buffer", 1),
        store_release("desc1", 1, "V6 not the first"),
        store_release("desc0", 1, "V6 the first"),
    ]
    driver = [
        wait_until("desc0", lambda flags, _: flags == 1, "D13"),
        load_relaxed("desc1", "second"),
        load_relaxed("buffer", "buffer"),
        expect(lambda r: r["second"] == 1, "the second of a batch is not there when the first is", "second"),
        expect(lambda r: r["buffer"] == 1, "a packet is not there when its descriptor is", "buffer"),
    ]
    return Program(
        "packed batch",
        (Thread("device", tuple(device)), Thread("driver", tuple(driver))),
        {"buffer": 0, "desc0": 0, "desc1": 0},
        ("workers/_packed.pyx:write_batch", "workers/_packed.pyx:write_used"),
    )


# ---- the IOTLB: I1, I2


def sequence_lock() -> Program:
    """The writer changes an entry of two words, twice; the reader takes both from one moment."""
    writer: list[Op] = []
    for turn in (1, 2):
        writer += [
            store_relaxed("seq", 2 * turn - 1),
            store_release("iova", turn, "I1 first word"),
            store_release("last", turn, "I1 second word"),
            store_release("seq", 2 * turn, "I1 seq even"),
        ]
    reader = [
        load_acquire("seq", "before", "I2 seq"),
        load_acquire("iova", "iova", "I2 first word"),
        load_acquire("last", "last", "I2 second word"),
        load_relaxed("seq", "after"),
    ]

    def torn(_: Words, r: Mapping[str, Registers]) -> str | None:
        found = r["reader"]
        whole = found["before"] % 2 == 0 and found["before"] == found["after"]
        return "an entry is torn" if whole and found["iova"] != found["last"] else None

    return Program(
        "sequence lock",
        (Thread("writer", tuple(writer)), Thread("reader", tuple(reader))),
        {"seq": 0, "iova": 0, "last": 0},
        ("shm/_iotlb.pyx:iotlb_find", "shm/_iotlb.pyx:_begin", "shm/_iotlb.pyx:_put", "shm/_iotlb.pyx:_end"),
        finally_=torn,
    )


# ---- the dirty log: W1


def dirty_log() -> Program:
    """A page is written and its bit looked at, while the front-end clears bits and copies pages."""
    writer = [
        store_relaxed("page", 1),
        fence_full("W1"),
        load_relaxed("bit", "bit"),
        Op("store", "bit", 1, when=lambda r: r["bit"] == 0, needs=("bit",)),
    ]
    cleaner = [*modify_full("bit", lambda _: 0, "was", fence="the front-end's"), load_relaxed("page", "copied")]

    def lost(words: Words, r: Mapping[str, Registers]) -> str | None:
        return "a write is lost" if words["bit"] == 0 and r["cleaner"]["copied"] == 0 else None

    return Program(
        "dirty log",
        (Thread("writer", tuple(writer)), Thread("cleaner", tuple(cleaner))),
        {"page": 0, "bit": 1},
        ("shm/_log.pyx:log_pages", "shm/_log.pxd:log_order"),
        finally_=lost,
    )


PROGRAMS: Final[Mapping[str, Callable[[], Program]]] = {
    "grace period": lambda: grace_period(readers=1, sections=2, swaps=2),
    "grace period, two workers": lambda: grace_period(readers=2, sections=1, swaps=2, deaths=2),
    "wake-up": wake_up,
    "publish": lambda: message("a configuration", "G1", "G2", "shm/_epoch.pyx:publish", "workers/_loop.pyx:refresh"),
    "devices": lambda: message(
        "a device", "L1 store", "L1 load", "workers/_loop.pyx:look_everywhere", "workers/_loop.pyx:install"
    ),
    "journal, split": split,
    "journal, packed": packed,
    "packets": packets,
    "available, split": lambda: message("an entry", "D1", "V1", "workers/_vring.pyx:vring_fetch"),
    "used, split": lambda: message("a used entry", "V2", "D3", "workers/_vring.pyx:vring_publish"),
    "available, packed": lambda: message("a descriptor", "D11", "V5", "workers/_packed.pyx:packed_fetch"),
    "used, packed": packed_batch,
    "interrupts, split": lambda: both_look("interrupts", "V3", "D4", "workers/_vring.pyx:split_wants_call"),
    "interrupts, packed": lambda: both_look("interrupts", "V7", "D14", "workers/_packed.pyx:packed_wants_call"),
    "kicks": lambda: both_look("kicks", "V4", "D2", "workers/_vring.pyx:vring_enable_notify"),
    "sequence lock": sequence_lock,
    "dirty log": dirty_log,
}
