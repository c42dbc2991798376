"""Every input that the fuzzers' corpora hold, run once without a fuzzer: seeds, and what once broke a promise."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.fuzz.replay import runner
from tests.fuzz.targets import CORPUS, INPUT_BYTES_MAX, TARGETS, Target

CORPUS_BYTES_MAX: Final = 300 << 10


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_promises_are_kept(target: Target) -> None:
    """No input of a target's corpus breaks a promise; there are some."""
    inputs = target.seeds()
    assert inputs, f"no inputs in {target.corpus}"
    run = runner(target)
    for name, data in inputs.items():
        try:
            run(data)
        except Exception as error:
            raise AssertionError(f"input {name} of {target.name}: {type(error).__name__}: {error}") from error


def test_corpora_are_small() -> None:
    """What is committed are seeds, each short enough to be used, and there is no corpus without a target."""
    assert {path.stem for path in CORPUS.iterdir()} == TARGETS.keys()
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) < CORPUS_BYTES_MAX
    for target in TARGETS.values():
        assert max(len(data) for data in target.seeds().values()) <= INPUT_BYTES_MAX


def test_seeds_survive_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New seeds take the place of the old, but for what once found something; a fuzzer is given them all."""
    monkeypatch.setattr("tests.fuzz.targets.CORPUS", tmp_path)
    target = Target("made", "codec", ())
    target.corpus.write_text("00\nfound a-bug 0102\n03\n")
    assert target.seeds() == {"1": b"\0", "a-bug": b"\1\2", "3": b"\3"}
    target.keep([b"\5\6\7", b"\4"])
    assert target.corpus.read_text() == "found a-bug 0102\n04\n050607\n"
    folder = target.unpack(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == target.seeds()


def test_any_input_means_something() -> None:
    """Targets take nothing, and a few bytes of the same, without complaint: a fuzzer begins there."""
    for target in TARGETS.values():
        run = runner(target)
        for data in (b"", *(bytes([value]) * 64 for value in (0, 1, 0x55, 0x80, 0xFF))):
            run(data)
