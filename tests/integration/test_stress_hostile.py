"""The hostile profile of `vhostmp stress` against `vhostmp serve`: every clause that applies passes, nothing leaks.

A subset runs with every other test, all of it with the slow ones.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from tests.integration.serving import serving
from vhostmp.cli import main
from vhostmp.tools.stress.clause import CLAUSES, Context
from vhostmp.tools.stress.clauses import load_all
from vhostmp.tools.stress.explore import explore
from vhostmp.tools.stress.shrink import smaller_numbers
from vhostmp.tools.stress.target import Target
from vhostmp.tools.stress.verdict import Failure

QUICK: Final = (
    "byte-at-a-time",
    "desc-many-bad",
    "dropped-between-messages",
    "fds-again-and-again",
    "indirect-bad-entries",
    "inflight-garbage",
    "log-with-offset",
    "mem-slot-of-live-ring",
    "mem-table-overlap",
    "mem-table-same-numbers",
    "memory-truncated",
    "net-frame-short",
    "packed-garbage",
    "random-bytes",
    "random-descriptors",
    "random-messages",
    "random-timing",
    "request-unknown",
    "ring-head-twice",
    "ring-next-loop",
)
"""One or two of each kind."""
SEED: Final = "1"
FEWEST: Final = 110
"""How many hostile clauses there are, and apply to every class of devices, at least."""
LARGE: Final = 900


def ask(path: Path, pid: int, *words: str) -> tuple[dict[str, str], dict[str, int]]:
    """Run the command; return what failed, by clause, and how many there are of each verdict."""
    report = path.with_suffix(".json")
    main(["stress", "--socket-path", str(path), "--pid", str(pid), "--seed", SEED, "--json", str(report), *words])
    found: dict[str, Any] = json.loads(report.read_text())
    failed = {
        one["id"]: f"{one['detail']} (seed {one['seed']})" for one in found["clauses"] if one["verdict"] == "fail"
    }
    return failed, found["summary"]


def _serve_words(device: str, path: Path) -> Sequence[str]:
    words = ["--device", device, "--socket-path", str(path)]
    if device == "net":
        return [*words, "--backend", "loopback"]
    if device == "blk":
        disk = path.with_suffix(".img")
        disk.write_bytes(bytes(1 << 20))
        return [*words, "--backend", f"file:{disk}"]
    return words


@pytest.mark.slow
def test_some_of_each_kind(tmp_path: Path) -> None:
    """Some hostile clauses of each kind pass against loopback, in both formats of rings."""
    path = tmp_path / "sock"
    words = [word for id_ in QUICK for word in ("--clause", id_)]
    with serving(tmp_path, *_serve_words("net", path)) as server:
        failed, counts = ask(path, server.pid, "--time", "0.2", *words)
    assert failed == {}
    assert counts["pass"] >= len(QUICK)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif("SECONDS" not in os.environ, reason="takes minutes: make slow")
@pytest.mark.parametrize("device", ["net", "blk", "rng"])
def test_every_hostile_clause(tmp_path: Path, device: str) -> None:
    """Every hostile clause that applies passes, for every class of devices."""
    path = tmp_path / "sock"
    with serving(tmp_path, *_serve_words(device, path)) as server:
        failed, counts = ask(path, server.pid, "--device", device, "--profile", "hostile", "--time", "2")
    assert failed == {}
    assert counts["pass"] > FEWEST


def test_every_source_is_named() -> None:
    """There are at least 110 hostile clauses; each says where it is from, and asks one line."""
    load_all()
    hostile = [one for one in CLAUSES.values() if one.profile == "hostile"]
    assert len(hostile) > FEWEST
    assert [one.id for one in hostile if not one.source or not one.question.endswith(".")] == []


@attrs.frozen
class _Number:
    """An operation of a made-up case."""

    value: int

    def smaller(self) -> Iterator[_Number]:
        """Yield simpler ones."""
        return (_Number(value) for value in smaller_numbers(self.value))


def test_a_random_case_that_fails_is_small_and_has_its_seed(tmp_path: Path) -> None:
    """What fails at random is told as its smallest case, with the seed that finds it at once."""
    path = tmp_path / "sock"

    def make(rng: random.Random) -> list[_Number]:
        return [_Number(rng.randrange(1000)) for _ in range(12)]

    def run(_: Context, case: list[_Number]) -> None:
        if any(one.value >= LARGE for one in case):
            raise Failure("too large")

    with serving(tmp_path, *_serve_words("net", path)):
        target = Target(path, "net")
        facts = target.learn()
        with Context(target, facts, 3, seconds=5) as ctx, pytest.raises(Failure) as first:
            explore(ctx, make, run, _Number.smaller)
        assert "smallest case (1 of 12 steps)" in str(first.value)
        assert f"_Number(value={LARGE})" in str(first.value)
        assert first.value.seed is not None
        with Context(target, facts, first.value.seed, seconds=0) as ctx, pytest.raises(Failure) as again:
            explore(ctx, make, run, _Number.smaller)
    assert str(again.value) == str(first.value)
