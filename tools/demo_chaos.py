"""`vhostmp demo --chaos`: workers are killed at random moments under full load, and everything is counted.

Two things go on at once. One thread kills a worker (now and then all of them) after a random time, wherever it is: in
a work item, in the middle of a swap, while it takes over from the one killed before. Meanwhile back-ends are swapped
and the guest's packet memory is moved, without pause. Before the next kill, packets have come through the replacement.

What is counted, and by whom. The software guests count packets: one that never came back is lost, for the loopback
hands on in one work item what it takes, and repeats both or neither. Pauses are the guests' too: the longest time
without a packet around a kill is what replacing the worker took, from the last packet before the death to the first
one after it. Leaks are what is left when the load has ended: chains that the device has taken and not given back,
descriptors of this process and of the workers, segments.

A back-end in Python takes its turns as well, while the killer waits: what such an object keeps in its memory, its
answers here, dies with the worker, and nobody promises otherwise.

Rules: all that is random follows from the seed, which is printed; the machine's own timing is not repeated with it.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs

from vhostmp.errors import LocalError, VhostError
from vhostmp.shm import layout
from vhostmp.shm.segment import PREFIX, SHM_DIRECTORY
from vhostmp.tools import guest
from vhostmp.tools.demo_stage import LOOPBACK, PATIENCE, POLL_SECONDS, POOL_PIECES, PYTHON, Quantiles, Stage

#: What a worker may have in its hands when it dies, packets: it takes so many chains at a time (workers/_vring.pxd).
BATCH: Final = 64
#: A random time before a kill is at most this, seconds.
RESPITE_SECONDS: Final = 0.1
#: One kill in so many is one of all workers at once.
MASSACRE: Final = 10
#: One act in so many is a move of memory, one is a turn of the back-end in Python; the others are swaps.
ACTS: Final = 8
ACT_SECONDS: Final = 0.005
#: For how long what is held has to be the same before it is what leaks are measured by, seconds.
STEADY_SECONDS: Final = 0.2
#: How long what is over may take to let go of its descriptors, seconds; a leak is there for ever.
LETTING_GO: Final = 20.0


@attrs.define
class Tally:
    """What has happened so far."""

    kills: int = 0
    swaps: int = 0
    refused: int = 0
    most_repeated: int = 0
    stuck: set[int] = attrs.field(factory=set[int])
    pids: set[int] = attrs.field(factory=set[int])
    problems: list[str] = attrs.field(factory=list[str])


@attrs.frozen
class Leaks:
    """What is held: descriptors of this process, of each worker, and segments."""

    own_fds: int
    worker_fds: tuple[int, ...]
    segments: int

    @classmethod
    def count(cls, stage: Stage) -> Leaks:
        """Count what is held now."""
        workers = tuple(len(os.listdir(f"/proc/{worker.pid}/fd")) for worker in stage.pool.workers)
        return cls(len(os.listdir("/proc/self/fd")), workers, len(own_segments()))

    def fds_since(self, before: Leaks) -> int:
        """Return by how many descriptors this is more."""
        pairs = zip((self.own_fds, *self.worker_fds), (before.own_fds, *before.worker_fds), strict=True)
        return sum(max(0, now - then) for now, then in pairs)

    def more_than(self, before: Leaks) -> bool:
        """Whether anything is held that was not before."""
        return self.fds_since(before) > 0 or self.segments > before.segments


def own_segments() -> set[str]:
    """Return the names of this process's segments."""
    return {path.name for path in SHM_DIRECTORY.glob(f"{PREFIX}.{os.getuid()}.{os.getpid()}.*")}


def wait_for(condition: Callable[[], bool], patience: float = PATIENCE) -> bool:
    """Wait until something is so; whether it was within `patience` seconds."""
    limit = time.monotonic() + patience
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(POLL_SECONDS)
    return True


class Chaos:
    """Kills and changes on a stage. `play` is the whole of it."""

    def __init__(
        self, stage: Stage, kills: int, seed: int, show: Callable[[Tally], object], *, calm: bool = False
    ) -> None:
        """Be about to kill `kills` workers; `show` is called now and then with what has happened.

        `calm`: nothing is changed meanwhile, and one worker is killed at a time, when a spare is there for it.
        """
        self.tally: Final = Tally()
        self._stage: Final = stage
        self._kills: Final = kills
        self._show: Final = show
        self._calm: Final = calm
        self._killer_rng: Final = random.Random(f"{seed} kills")
        self._rng: Final = random.Random(f"{seed} acts")
        #: Held for as long as a kill and its consequences last.
        self._killing: Final = threading.Lock()
        self._over: Final = threading.Event()
        self.leaked_descriptors = self.leaked_fds = self.leaked_segments = 0

    def play(self) -> None:
        """Kill and change until all kills are done, or something has gone wrong, which is among the problems then."""
        self._kill(list(range(self._stage.pool.size)))  # what only the first death makes is no leak
        self._stage.wait_for_packets(BATCH)
        self._rest()
        before = self._held()
        killer = threading.Thread(target=self._kill_on, name="demo-killer")
        killer.start()
        try:
            while killer.is_alive():
                if self._calm:
                    time.sleep(ACT_SECONDS)
                else:
                    self._act()
                self._show(self.tally)
        except VhostError as error:
            self.tally.problems.append(str(error))
        finally:
            self._over.set()
            killer.join()
        try:
            while not self.tally.problems and len(self._stage.moves_ns) % POOL_PIECES:
                self._stage.move()  # the memory table has as many regions again as it had at first
            self._stage.settle()
        except VhostError as error:
            self.tally.problems.append(str(error))
        self.leaked_descriptors = self.leaked()
        self._rest()
        wait_for(lambda: not Leaks.count(self._stage).more_than(before), LETTING_GO)
        after = Leaks.count(self._stage)
        self.leaked_fds = after.fds_since(before)
        self.leaked_segments = max(0, after.segments - before.segments)

    # -- kills

    def _kill_on(self) -> None:
        rng, workers = self._killer_rng, self._stage.pool.size
        try:
            while self.tally.kills < self._kills and not self.tally.stuck and not self._over.is_set():
                time.sleep(rng.random() * RESPITE_SECONDS)
                all_at_once = rng.randrange(MASSACRE) == 0 and not self._calm
                victims = list(range(workers)) if all_at_once else [rng.randrange(workers)]
                if self._calm:
                    self._rest()
                with self._killing:
                    self._kill(victims[: self._kills - self.tally.kills])
        except VhostError as error:
            self.tally.problems.append(str(error))

    def _kill(self, victims: list[int]) -> None:
        """Kill some workers, wait until packets come through those that replace them, and look what it has cost."""
        stage = self._stage
        pool, device = stage.pool, stage.device
        hit = [pair for pair in range(stage.layout.pairs) if device.worker_of(2 * pair) in victims]
        boards = [stage.boards[pair] for pair in hit]
        repeated = [board.counters()["duplicated"] for board in boards]
        pids = {index: pool.worker(index).pid for index in victims}
        self.tally.pids.update(pids.values())
        for board in boards:
            board.swap_mark()
        for index in victims:
            pool.worker(index).kill()
            self.tally.kills += 1
        try:
            if not wait_for(lambda: all(pool.worker(index).pid != pid for index, pid in pids.items())):
                raise VhostError(f"worker {victims} has no replacement after {PATIENCE:g} s")
            # So many that all that was on its way when the worker died has come twice, if it does.
            targets = [board.counters()["received"] + stage.layout.rx_entries for board in boards]
            for pair, board, target in zip(hit, boards, targets, strict=True):
                if not wait_for(lambda board=board, target=target: board.counters()["received"] >= target):  # type: ignore[misc]
                    self.tally.stuck.update((2 * pair, 2 * pair + 1))
            if self.tally.stuck:
                raise VhostError(f"no packets for {PATIENCE:g} s after a kill: {stage.describe_rings()}")
        finally:
            for board in boards:
                board.swap_mark()
        for board, before in zip(boards, repeated, strict=True):
            self.tally.most_repeated = max(self.tally.most_repeated, board.counters()["duplicated"] - before)

    # -- changes

    def _act(self) -> None:
        choice = self._rng.randrange(ACTS)
        if choice == 0:
            self._stage.move()
        elif choice == 1:
            with self._killing:
                self._swap(PYTHON)
                self._stage.wait_for_packets(BATCH)
                self._swap(LOOPBACK)
                self._stage.wait_for_packets(BATCH)
        else:
            self._swap(LOOPBACK)
        time.sleep(self._rng.random() * ACT_SECONDS)

    def _swap(self, spec: str) -> None:
        try:
            self._stage.device.set_backend(spec)
            self.tally.swaps += 1
        except LocalError as error:
            # It died while it made the new back-end: of that, for all anybody knows. The old one goes on.
            if "while it prepared the new back-end" not in str(error):
                raise
            self.tally.refused += 1

    # -- what is left

    def _rest(self) -> None:
        """Wait until the dead are gone and a spare is ready: what they hold is theirs until then."""
        pool = self._stage.pool
        if not wait_for(lambda: pool.has_spare and not pool.dying):
            self.tally.problems.append("a dead worker is not gone, or no spare is made")

    def _held(self) -> Leaks:
        """Count what is held once that is steady: who was just made may still open something, or close it."""
        held, since = Leaks.count(self._stage), time.monotonic()

        def steady() -> bool:
            nonlocal held, since
            if (now := Leaks.count(self._stage)) != held:
                held, since = now, time.monotonic()
            return time.monotonic() > since + STEADY_SECONDS

        wait_for(steady, LETTING_GO)
        return held

    def leaked(self, patience: float = PATIENCE) -> int:
        """Count chains that the device has and has not given back, `patience` seconds after the load has ended."""
        stage = self._stage

        def missing() -> int:
            boards = [board.counters() for board in stage.boards]
            sent = sum(counters["tx_held"] for counters in boards)
            offered = sum(stage.layout.rx_entries - counters["rx_held"] for counters in boards)
            return sent + offered + sum(self._taken(index) for index in range(2 * stage.layout.pairs))

        wait_for(lambda: missing() == 0, patience)
        return missing()

    def _taken(self, index: int) -> int:
        """Return how many chains of a ring the device has taken and not given back. Each is one entry of the ring."""
        offset = layout.ring_offset(self._stage.device.first_ring + index)
        taken, given = (layout.RING.read(self._stage.pool.buf, offset, name) for name in ("last_avail_idx", "used_idx"))
        entries = self._stage.layout.ring(index).entries
        if self._stage.layout.packed:  # positions: the wrap counter is bit 15
            taken, given = ((place & 0x7FFF) + entries * (place >> 15 ^ 1) for place in (taken, given))
            return (taken - given) % (2 * entries)
        return (taken - given) % (1 << 16)


@attrs.frozen
class Report:
    """What a run came to. `problems` is empty when all went well. Times in milliseconds."""

    kills: int
    lost_tx: int
    duplicated: int
    stuck_rings: int
    leaked_descriptors: int
    leaked_fds: int
    leaked_segments: int
    replacement_ms: dict[str, float]
    seed: int
    packets: int
    swaps: int
    refused: int
    moves: int
    most_repeated: int
    seconds: float
    problems: tuple[str, ...] = ()
    pauses_ms: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        names = (
            *("kills", "lost_tx", "duplicated", "stuck_rings", "leaked_descriptors", "leaked_fds", "leaked_segments"),
            *("replacement_ms", "seed", "packets", "seconds", "most_repeated", "swaps", "refused", "moves"),
        )
        return {name: getattr(self, name) for name in names}

    def to_table(self) -> str:
        """Return the table for people."""
        times = self.replacement_ms
        rows = [
            ("kills", f"{self.kills:,}  (seed {self.seed})"),
            ("packets", f"{self.packets:,}  ({self.packets / max(self.seconds, 1e-9) / 1e6:.2f} million a second)"),
            ("lost", f"{self.lost_tx:,}"),
            ("duplicated", f"{self.duplicated:,}  (at most {self.most_repeated:,} by one kill)"),
            ("swaps", f"{self.swaps:,}, and {self.refused:,} refused as a worker was killed in them"),
            ("memory moves", f"{self.moves:,}"),
            ("stuck rings", f"{self.stuck_rings:,}"),
            ("leaked", f"{self.leaked_descriptors:,} ring descriptors, {self.leaked_fds:,} file descriptors, "
             f"{self.leaked_segments:,} segments"),
            ("replacement", f"median {times['p50']:.1f} ms, 99 % {times['p99']:.1f} ms, max {times['max']:.1f} ms"),
        ]  # fmt: skip
        return "\n".join(f"{name:<14}{text}" for name, text in rows)


def perform(
    workers: int,
    layout: guest.Layout,
    kills: int,
    seed: int,
    show: Callable[[Callable[[], str]], object],
    *,
    calm: bool = False,
) -> Report:
    """Play the whole piece on a stage of its own. Does not raise VhostError once that is built.

    `show` is given now and then what makes a line of where things are. `calm`: see Chaos.
    """
    fds, segments = len(os.listdir("/proc/self/fd")), own_segments()
    with Stage(workers=workers, layout=layout) as stage:
        started = time.monotonic()

        def line(tally: Tally) -> str:
            counters = stage.counters()
            return (
                f"{tally.kills:>6,}/{kills:,} kills  {counters['received']:>13,} packets  {tally.swaps:>6,} swaps  "
                f"{len(stage.moves_ns):>5,} moves  {counters['lost']} lost  {counters['duplicated']} duplicated"
            )

        chaos = Chaos(stage, kills, seed, lambda tally: show(lambda: line(tally)), calm=calm)
        chaos.play()
        seconds = time.monotonic() - started
        counters, moves, strays = stage.counters(), len(stage.moves_ns), stage.stray_writes
        pauses = tuple(pause / 1e6 for pause in stage.pauses_ns())
        times = Quantiles.of(pauses)
        broken = sum(bool(queue["broken"]) for queue in stage.device.snapshot()["queues"])
    tally = chaos.tally

    def left() -> int:
        return max(0, len(os.listdir("/proc/self/fd")) - fds)

    wait_for(lambda: not left(), LETTING_GO)  # whoever reads a worker's log hangs up a little after the worker
    report = Report(
        kills=tally.kills,
        lost_tx=counters["lost"],
        duplicated=counters["duplicated"],
        stuck_rings=max(len(tally.stuck), broken),
        leaked_descriptors=chaos.leaked_descriptors,
        leaked_fds=chaos.leaked_fds + left(),
        leaked_segments=chaos.leaked_segments + len(own_segments() - segments),
        replacement_ms=attrs.asdict(times),
        seed=seed,
        packets=counters["received"],
        swaps=tally.swaps,
        refused=tally.refused,
        moves=moves,
        most_repeated=tally.most_repeated,
        pauses_ms=pauses,
        seconds=seconds,
    )
    wrong = [f"{counters[name]:,} packets {name}" for name in ("reordered", "corrupted") if counters[name]]
    if counters["violations"]:
        wrong.append(f"{counters['violations']:,} used entries that no correct device writes")
    if strays:
        wrong.append(f"old guest memory was written to after {strays} memory moves")
    return attrs.evolve(report, problems=(*tally.problems, *wrong, *judge(report, tally)))


def judge(report: Report, tally: Tally) -> list[str]:
    """Return what was wrong, a line each."""
    names = ("lost_tx", "stuck_rings", "leaked_descriptors", "leaked_fds", "leaked_segments")
    wrong = [f"{name.replace('_', ' ')}: {getattr(report, name):,}" for name in names if getattr(report, name)]
    if report.most_repeated > BATCH:
        wrong.append(f"one kill repeated {report.most_repeated} packets, which is more than a batch of {BATCH}")
    left = [pid for pid in tally.pids if Path(f"/proc/{pid}").exists()]
    if left:
        wrong.append(f"processes of killed workers are left: {left}")
    return wrong
