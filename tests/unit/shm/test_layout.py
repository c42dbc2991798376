"""The description of shared memory: what layout.py says is what C and Cython have, and no two fields collide."""

from __future__ import annotations

import itertools
import struct

import pytest

from vhostmp.shm import layout
from vhostmp.shm.layout import CONSTANTS, FORMATS, STRUCTS, WIDTHS, Field, Struct
from vhostmp.tools import gen_layout

FIELDS = [(entry, field) for entry in STRUCTS for field in entry.fields]
LINE = 128  # bytes: two cache lines, which are fetched together


def test_generated_files_are_up_to_date() -> None:
    """layout.h and layout.pxd are what the generator makes of layout.py."""
    for path, text in gen_layout.generate().items():
        assert path.read_text() == text, f"{path.name} is stale: run `make layout`"


def test_check_finds_a_stale_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`--check` fails, says which file and writes nothing when layout.py has changed."""
    before = {path: path.read_text() for path in gen_layout.generate()}
    monkeypatch.setitem(CONSTANTS, "SOMETHING_NEW", 1)
    monkeypatch.setitem(CONSTANTS, "SEGMENT_VERSION", CONSTANTS["SEGMENT_VERSION"] + 1)
    assert gen_layout.main(["--check"]) == 1
    assert "layout.h" in capsys.readouterr().err
    assert {path: path.read_text() for path in before} == before


@pytest.mark.parametrize("entry", STRUCTS, ids=lambda entry: entry.name)
def test_fields_do_not_collide(entry: Struct) -> None:
    """Every field is aligned, lies inside its struct and overlaps no other."""
    taken: set[int] = set()
    for field in entry.fields:
        width = WIDTHS[field.ctype]
        place = set(range(field.offset, field.offset + width * field.count))
        assert field.offset % width == 0
        assert max(place) < entry.size
        assert not taken & place, field.name
        taken |= place


@pytest.mark.parametrize("entry", STRUCTS, ids=lambda entry: entry.name)
def test_writers_have_lines_of_their_own(entry: Struct) -> None:
    """Fields that only the worker writes and fields that only the control process writes share no 128-byte line.

    Except where the layout says that a field's line is the control process's word to a worker, or changes hands.
    """
    lines: dict[int, set[str]] = {}
    for field in entry.fields:
        for at in range(field.offset, field.offset + WIDTHS[field.ctype] * field.count):
            lines.setdefault(at // LINE, set()).add(field.writer)
    for line, writers in lines.items():
        if line > 0:
            assert len({writer.split(",")[0] for writer in writers}) == 1, f"{entry.name} line {line}: {writers}"


def test_slots_do_not_overlap() -> None:
    """The arrays of the segment follow one another, line by line, and end where the segment ends."""
    ends = [
        (layout.HEADER.size, layout.worker_offset(0)),
        (layout.worker_offset(CONSTANTS["WORKERS_MAX"]), layout.device_offset(0)),
        (layout.device_offset(CONSTANTS["DEVICES_MAX"]), layout.ring_offset(0)),
        (layout.ring_offset(CONSTANTS["RINGS_MAX"]), layout.SEGMENT_SIZE),
    ]
    for end, start in ends:
        assert end == start
        assert start % LINE == 0
    assert all(entry.size % LINE == 0 for entry in STRUCTS)


@pytest.mark.parametrize(("entry", "field"), FIELDS, ids=lambda value: value.name)
def test_read_gives_what_was_written(entry: Struct, field: Field) -> None:
    """`write` puts exactly the field's bytes there, `read` gives them back, at any base and index."""
    base, width = 256, WIDTHS[field.ctype]
    for index in {0, field.count - 1}:
        memory = bytearray(base + entry.size)
        value = (1 << (8 * width)) - 2
        entry.write(memoryview(memory), base, field.name, value, index)
        assert entry.read(bytes(memory), base, field.name, index) == value
        at = base + field.offset + index * width
        assert memory[at : at + width] == struct.pack(f"={FORMATS[field.ctype]}", value)
        assert not any(memory[:at])
        assert not any(memory[at + width :])


def test_unknown_field() -> None:
    """A field that does not exist is a KeyError, not a zero."""
    with pytest.raises(KeyError):
        layout.RING.field("nonesuch")


def test_reasons_have_numbers() -> None:
    """Every reason has a constant with its place in the tuple; 0 is not a reason for a broken ring."""
    for prefix, reasons in (("DROP", layout.DROP_REASONS), ("BROKEN", layout.BROKEN_REASONS)):
        for index, reason in enumerate(reasons):
            if reason:
                assert CONSTANTS[f"{prefix}_{reason.upper()}"] == index
    assert layout.BROKEN_REASONS[0] == ""
    assert layout.RING.field("drops").count >= len(layout.DROP_REASONS)


@pytest.mark.parametrize(
    ("fields", "size", "words"),
    [
        ([Field("a", "u64", 0), Field("b", "u32", 4)], 16, "before the end"),
        ([Field("a", "u32", 2)], 8, "not aligned"),
        ([Field("a", "u64", 8)], 8, "fields end at 16"),
        ([Field("a", "u64", 0), Field("a", "u64", 8)], 16, "used twice"),
        ([Field("a", "u24", 0)], 8, "unknown type"),
        ([Field("a", "u64", 0)], 12, "no multiple of 8"),
        ([Field("class", "u64", 0)], 8, "keyword"),
        ([Field("a", "u8", 0, count=0)], 8, "count 0"),
        ([], 8, "no fields"),
    ],
)
def test_impossible_structs_are_refused(fields: list[Field], size: int, words: str) -> None:
    """The generator refuses a description that C cannot have, in whatever order the fields come."""
    for order in itertools.permutations(fields):
        with pytest.raises(ValueError, match=words):
            gen_layout.c_header([Struct("bad", size, tuple(order))], {})
