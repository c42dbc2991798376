"""The generator of layout.h and layout.pxd, on small descriptions and with the real compiler."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vhostmp.shm.layout import CONSTANTS, STRUCTS, Field, Struct
from vhostmp.tools import gen_layout

GAPS = Struct(
    "gaps",
    32,
    (
        Field("late", "u32", 12, doc="comes second"),
        Field("first", "u8", 0, doc="comes first"),
        Field("many", "u16", 20, count=3, writer="worker", readers="control", doc="three of them"),
    ),
    "A struct with gaps.",
)


def compile_c(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Compile a header with every warning as an error, without making a file."""
    (folder / "layout.h").write_text(text)
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wpadded", "-Werror", "-fsyntax-only", "-x", "c"]
    return subprocess.run([*command, str(folder / "layout.h")], capture_output=True, text=True, timeout=60, check=False)


def test_members_stand_in_order_of_offset_with_named_padding() -> None:
    """Fields are laid out by offset whatever their order in the description; every gap is a member of its own."""
    text = gen_layout.c_header([GAPS], {})
    body = text[text.index("typedef struct {") : text.index("} vmp_gaps;")]
    members = [line.strip() for line in body.splitlines() if line.endswith(";")]
    assert members == [
        "uint8_t first;",
        "uint8_t pad_1[11];",
        "uint32_t late;",
        "uint8_t pad_16[4];",
        "uint16_t many[3];",
        "uint8_t pad_26[6];",
    ]


def test_writer_and_readers_are_told() -> None:
    """The comment of a field says what it means, who writes and who reads it."""
    assert "/* three of them. Writer: worker. Readers: control. */" in gen_layout.c_header([GAPS], {})


def test_constants_of_every_size() -> None:
    """Small constants are ints and members of an enum; one beyond an int is a uint64_t in C and in Cython."""
    constants = {"SMALL": 7, "NEGATIVE": -1, "LARGE": 2**31, "LARGEST": 2**64 - 1}
    header = gen_layout.c_header([GAPS], constants)
    assert "#define VMP_SMALL 7\n#define VMP_NEGATIVE (-1)\n#define VMP_LARGE UINT64_C(0x80000000)" in header
    cython = gen_layout.cython_declarations([GAPS], constants)
    assert "    enum:\n        VMP_SMALL\n        VMP_NEGATIVE\n    const uint64_t VMP_LARGE\n" in cython


def test_cython_sees_the_fields_without_padding() -> None:
    """The Cython view has the fields alone, in the order of C."""
    text = gen_layout.cython_declarations([GAPS], {})
    assert text.endswith(
        "    ctypedef struct vmp_gaps:\n        uint8_t first\n        uint32_t late\n        uint16_t many[3]\n"
    )


@pytest.mark.parametrize(
    ("size", "fields", "message"),
    [
        (8, (Field("a", "u32", 0), Field("b", "u16", 2)), "t.b: offset 2 lies before the end 4"),
        (8, (Field("a", "u32", 2),), "t.a: offset 2 is not aligned to 4"),
        (8, (Field("a", "u32", 0, count=3),), "t: fields end at 12, size is 8"),
        (12, (Field("a", "u64", 0),), "t: size 12 is no multiple of 8"),
        (8, (Field("a", "f32", 0),), "t.a: unknown type 'f32'"),
        (8, (Field("a", "u32", 0), Field("a", "u32", 4)), "t.a: name is no identifier, a keyword or used twice"),
        (8, (Field("from", "u32", 0),), "t.from: name is no identifier, a keyword or used twice"),
        (8, (Field("a", "u32", 0, count=0),), "t.a: count 0"),
        (8, (), "t: size 8 is no multiple of 1, or there are no fields"),
    ],
)
def test_what_c_cannot_have_is_refused(size: int, fields: tuple[Field, ...], message: str) -> None:
    """A description with an overlap, a misaligned field or a wrong size gives no text but an error that names it."""
    with pytest.raises(ValueError, match="^" + message.replace("'", ".")):
        gen_layout.c_header([Struct("t", size, fields, "")], {})


@pytest.mark.parametrize("value", [-(2**31), 2**64])
def test_constants_out_of_range_are_refused(value: int) -> None:
    """A constant that fits neither an int nor an unsigned 64-bit value is an error."""
    with pytest.raises(ValueError, match="constant WIDE"):
        gen_layout.c_header([GAPS], {"WIDE": value})


@pytest.mark.slow
def test_compiler_agrees_with_every_offset(tmp_path: Path) -> None:
    """The real layout compiles with pedantic warnings: no implicit padding, each offset and size as stated."""
    done = compile_c(tmp_path, gen_layout.c_header(STRUCTS, CONSTANTS))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_compiler_notices_a_moved_field(tmp_path: Path) -> None:
    """The assertions in the header are live: a member moved by hand does not compile."""
    text = gen_layout.c_header([GAPS], {}).replace("uint8_t pad_1[11];", "uint8_t pad_1[7];")
    done = compile_c(tmp_path, text)
    assert done.returncode != 0
    assert "vmp_gaps.late" in done.stderr


def test_version_of_another_layout(tmp_path: Path) -> None:
    """A layout that differs from the header's in what programs must agree upon has to have another version."""
    header = tmp_path / "layout.h"
    version, small = {"SEGMENT_VERSION": 7, "KILL_HERE": 1}, Struct("s", 8, (Field("a", "u32", 0, doc="one"),))
    line = gen_layout.layout_line([small], version)
    gen_layout.check_version(line, header)  # there is none yet
    header.write_text(f"...\n{line}\n")
    same = Struct("s", 8, (Field("a", "u32", 0, writer="worker", doc="another word for it"),), "Of a struct.")
    gen_layout.check_version(gen_layout.layout_line([same], {**version, "KILL_HERE": 2}), header)
    for structs, constants in (
        ([Struct("s", 8, (Field("a", "u32", 4),))], {}),
        ([Struct("s", 8, (Field("a", "u16", 0),))], {}),
        ([Struct("s", 8, (Field("b", "u32", 0),))], {}),
        ([Struct("s", 8, (Field("a", "u32", 0, count=2),))], {}),
        ([Struct("s", 16, (Field("a", "u32", 0),))], {}),
        ([small, GAPS], {}),
        ([small], {"RINGS_MAX": 2}),
    ):
        with pytest.raises(ValueError, match="raise SEGMENT_VERSION"):
            gen_layout.check_version(gen_layout.layout_line(structs, {**version, **constants}), header)
        gen_layout.check_version(
            gen_layout.layout_line(structs, {**version, **constants, "SEGMENT_VERSION": 8}), header
        )


def test_check_fails_for_a_version_that_was_forgotten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real layout with one more constant is refused, with `--check` and without, and nothing is written."""
    before = (gen_layout.SHM / "layout.h").read_text()
    monkeypatch.setitem(CONSTANTS, "ONE_MORE", 1)
    assert [gen_layout.main(["--check"]), gen_layout.main([])] == [2, 2]
    assert capsys.readouterr().err.count("raise SEGMENT_VERSION") == len(("--check", ""))
    assert (gen_layout.SHM / "layout.h").read_text() == before


def test_check_tells_a_stale_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--check` writes nothing and fails while a file differs; a run without it writes both, after which it passes."""
    monkeypatch.setattr(gen_layout, "generate", lambda: {tmp_path / "layout.h": "new", tmp_path / "layout.pxd": "same"})
    (tmp_path / "layout.pxd").write_text("same")
    assert gen_layout.main(["--check"]) == 1
    assert "shm/layout.h is not what layout.py says" in capsys.readouterr().err
    assert not (tmp_path / "layout.h").exists()
    assert gen_layout.main([]) == 0
    assert gen_layout.main(["--check"]) == 0
