"""Writes shm/layout.h and shm/layout.pxd from shm/layout.py.

What it is for: every struct that two processes share is described once, in Python, where the offset, the writer and
the readers of each field stand beside each other. C and Cython get theirs from here, so that the three cannot differ.

Rules:

* The text depends on layout.py alone (no date, no path, no version), so `--check` can compare byte for byte.
* Every gap becomes a named `pad_<offset>` member, and every offset and size a `_Static_assert`: the compiler proves
  that its idea of the struct is the one layout.py states.
* A description that C cannot have (overlap, misaligned field, size that is no multiple of the alignment) is refused.
* So is one that differs from the header's under the same SEGMENT_VERSION: a program of the one layout would take over
  (vhostmp/adoption.py) a segment of the other. The last line of layout.h has version and digest of the layout.

Run it as `python -m vhostmp.tools.gen_layout [--check]` in the checkout, or as `make layout`.
"""

from __future__ import annotations

import argparse
import hashlib
import keyword
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from vhostmp.shm import layout
from vhostmp.shm.layout import WIDTHS, Field, Struct

SHM = Path(__file__).resolve().parents[1] / "shm"
GENERATED = "generated from shm/layout.py by `make layout`; edit that file, not this one"
INT_MAX = 2**31 - 1
U64_MAX = 2**64 - 1
COLUMNS = 118


def ordered_fields(struct: Struct) -> list[Field]:
    """Give the fields of a struct by offset.

    Raises: ValueError: C could not lay the struct out as described; the message names the struct and the field.
    """
    fields = sorted(struct.fields, key=lambda field: field.offset)
    end, widest = 0, 1
    names: set[str] = set()
    for field in fields:
        where = f"{struct.name}.{field.name}"
        if field.ctype not in WIDTHS:
            raise ValueError(f"{where}: unknown type {field.ctype!r}")
        if not field.name.isidentifier() or keyword.iskeyword(field.name) or field.name in names:
            raise ValueError(f"{where}: name is no identifier, a keyword or used twice")
        if field.count < 1:
            raise ValueError(f"{where}: count {field.count}")
        if field.offset % WIDTHS[field.ctype]:
            raise ValueError(f"{where}: offset {field.offset} is not aligned to {WIDTHS[field.ctype]}")
        if field.offset < end:
            raise ValueError(f"{where}: offset {field.offset} lies before the end {end} of the field before it")
        names.add(field.name)
        end = field.offset + WIDTHS[field.ctype] * field.count
        widest = max(widest, WIDTHS[field.ctype])
    if end > struct.size:
        raise ValueError(f"{struct.name}: fields end at {end}, size is {struct.size}")
    if not fields or struct.size % widest:
        raise ValueError(f"{struct.name}: size {struct.size} is no multiple of {widest}, or there are no fields")
    return fields


def _declaration(field: Field) -> str:
    array = f"[{field.count}]" if field.count > 1 else ""
    return f"uint{8 * WIDTHS[field.ctype]}_t {field.name}{array}"


def _comment(text: str, indent: str) -> list[str]:
    lines = textwrap.wrap(" ".join(text.split()).replace("*/", "* /"), COLUMNS - len(indent) - 6)
    if not lines:
        return []
    lines = [f"{indent}/* {lines[0]}", *(f"{indent} * {line}" for line in lines[1:])]
    return [*lines[:-1], lines[-1] + " */"]


def _padding(start: int, end: int) -> list[str]:
    if start == end:
        return []
    array = f"[{end - start}]" if end - start > 1 else ""
    return [f"    uint8_t pad_{start}{array};"]


def _c_struct(struct: Struct) -> list[str]:
    ctype = f"vmp_{struct.name}"
    out = ["", *_comment(struct.doc, ""), "typedef struct {"]
    end = 0
    fields = ordered_fields(struct)
    for field in fields:
        out += _padding(end, field.offset)
        out += _comment(f"{field.doc.rstrip('.')}. Writer: {field.writer}. Readers: {field.readers}.", "    ")
        out.append(f"    {_declaration(field)};")
        end = field.offset + WIDTHS[field.ctype] * field.count
    out += [*_padding(end, struct.size), f"}} {ctype};"]
    out += [
        f'_Static_assert(offsetof({ctype}, {field.name}) == {field.offset}, "{ctype}.{field.name}");'
        for field in fields
    ]
    out.append(f'_Static_assert(sizeof({ctype}) == {struct.size}, "sizeof {ctype}");')
    return out


def _check_constants(constants: Mapping[str, int]) -> None:
    for name, value in constants.items():
        if not name.isidentifier() or not -INT_MAX <= value <= U64_MAX:
            raise ValueError(f"constant {name} = {value}: no identifier, or outside -INT_MAX..UINT64_MAX")


def c_header(structs: Sequence[Struct], constants: Mapping[str, int]) -> str:
    """Give the text of layout.h.

    Raises: ValueError: a description that C cannot have.
    """
    _check_constants(constants)
    out = [
        "/* layout.h - every struct in shared memory.",
        f" * {GENERATED}. */",
        "#ifndef VMP_LAYOUT_H",
        "#define VMP_LAYOUT_H",
        "",
        "#include <stddef.h>",
        "#include <stdint.h>",
        "",
    ]
    for name, value in constants.items():
        text = str(value) if 0 <= value <= INT_MAX else f"({value})" if value < 0 else f"UINT64_C({value:#x})"
        out.append(f"#define VMP_{name} {text}")
    for struct in structs:
        out += _c_struct(struct)
    return "\n".join([*out, "", "#endif", ""])


def cython_declarations(structs: Sequence[Struct], constants: Mapping[str, int]) -> str:
    """Give the text of layout.pxd: the same structs without padding, the constants as an enum.

    A constant beyond a C int is declared as a uint64_t, since Cython takes the members of an enum for ints.

    Raises: ValueError: a description that C cannot have.
    """
    _check_constants(constants)
    out = [
        '"""Cython\'s view of layout.h: every struct in shared memory.',
        "",
        f"{GENERATED[0].upper()}{GENERATED[1:]}.",
        '"""',
        "",
        "from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t",
        "",
        "",
        'cdef extern from "layout.h" nogil:',
    ]
    small = [name for name, value in constants.items() if value <= INT_MAX]
    if small:
        out += ["    enum:", *(f"        VMP_{name}" for name in small)]
    out += [f"    const uint64_t VMP_{name}" for name, value in constants.items() if value > INT_MAX]
    for struct in structs:
        out += ["", f"    ctypedef struct vmp_{struct.name}:"]
        out += [f"        {_declaration(field)}" for field in ordered_fields(struct)]
    return "\n".join([*out, ""])


def layout_line(structs: Sequence[Struct], constants: Mapping[str, int]) -> str:
    """Give the line that says which layout this is: its SEGMENT_VERSION, and a digest of what programs must agree upon.

    Not of comments, nor of what only tests of the same build use.
    """
    agreed = {name: n for name, n in constants.items() if name != "SEGMENT_VERSION" and not name.startswith("KILL_")}
    fields = [
        (struct.name, struct.size, [(one.name, one.ctype, one.offset, one.count) for one in ordered_fields(struct)])
        for struct in structs
    ]
    digest = hashlib.sha256(repr((fields, sorted(agreed.items()))).encode()).hexdigest()
    return f"/* SEGMENT_VERSION {constants['SEGMENT_VERSION']}: layout {digest[:32]} */"


def check_version(line: str, header: Path) -> None:
    """Compare a layout's line with that of a header. ValueError: another layout of the same version."""
    for old in header.read_text().splitlines() if header.is_file() else ():
        if old != line and old.partition(":")[0] == line.partition(":")[0]:
            raise ValueError("the layout is another one than in layout.h: raise SEGMENT_VERSION in shm/layout.py")


def generate() -> dict[Path, str]:
    """Give the text of each generated file from the layout.py in this checkout.

    Raises: ValueError: a struct or constant that C cannot have, two structs of one name, or a SEGMENT_VERSION that is
    another layout's.
    """
    if Path(layout.__file__).resolve().parent != SHM:
        raise ValueError(f"vhostmp.shm.layout comes from {layout.__file__}, not from this checkout")
    if len({struct.name for struct in layout.STRUCTS}) != len(layout.STRUCTS):
        raise ValueError("two structs have the same name")
    line = layout_line(layout.STRUCTS, layout.CONSTANTS)
    check_version(line, SHM / "layout.h")
    return {
        SHM / "layout.h": f"{c_header(layout.STRUCTS, layout.CONSTANTS)}{line}\n",
        SHM / "layout.pxd": cython_declarations(layout.STRUCTS, layout.CONSTANTS),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, or compare them with `--check`; 0, 1 where they differ, 2 where layout.py cannot be laid out."""
    parser = argparse.ArgumentParser(prog="gen_layout", description="Write shm/layout.h and shm/layout.pxd.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is not up to date")
    check: bool = parser.parse_args(arguments).check
    try:
        texts = generate()
    except ValueError as error:
        print(f"gen_layout: {error}", file=sys.stderr)
        return 2
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        if check:
            print(f"gen_layout: shm/{path.name} is not what layout.py says: run `make layout`", file=sys.stderr)
        else:
            path.write_text(texts[path])
            print(f"gen_layout: wrote shm/{path.name}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
