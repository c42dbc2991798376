"""Checks that every ordered access to shared memory carries its argument.

What it is for: an acquire, a release or a fence is right only together with another access, often in another file, and
the reason is invisible in the code. So each stands under a comment block with a tag:

    ORDER R1 (reader): store slot.seq odd, then load device.generation   [full fence between]
      pairs with  R2 (_epoch.pyx synchronize: generation published, fence, scan of slot.seq)
      without it  the load may pass the store: ...
      not needed  ... (optional: what needs no order, and why)
      shown by    tests/torture/test_epoch.py::test_no_use_after_retire

and shm/ORDERING.md holds a table of all tags, written from these blocks by `--write`, between the two marks.

Rules:

* A tag may stand at several sites; one of them carries the whole block, the others at least the line with the tag.
* A pair is mutual: what R1 pairs with names R1 in turn. It has one argument: `without it` and `shown by` stand at one
  of the two or at both. Where the other side is not ours (the driver in the guest, the kernel), the line says who it
  is and, in parentheses, where that side's order is written down.
* `shown by` names a test file, or a test in it, that exists.
* Ordered calls (`__atomic_*`, fences, `vmp_*_acquire/_release/_full*`) stand at most REACH lines below a block, in the
  function that holds the block or right below it begins.
* `__atomic_*` and C11 fences stand in shm/atomics.h alone, which defines what the others call.

Run it as `python -m vhostmp.tools.check_order [--write]` in the checkout, or as `make order`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import attrs

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("shm", "workers", "vhostmp", "tools")
SUFFIXES = {".pyx", ".pxd", ".py", ".h"}
TABLE = "shm/ORDERING.md"
BEGIN = "<!-- table: written by `python -m vhostmp.tools.check_order --write` -->"
END = "<!-- end of table -->"
REACH = 12

DEFINES = {"shm/atomics.h", "shm/atomics.pxd"}
FUNCTION = re.compile(r"^\s*(?:(?:cdef|cpdef|def|static)\b.*\(|class\b|cdef class\b)")
BARE = re.compile(r"\b(?:__atomic_\w+|__sync_\w+|atomic_(?:thread|signal)_fence)\b")
ORDERED = re.compile(r"\b(?:vmp_\w*_(?:acquire|release|full)(?:_\w+)?)\s*\(")
COMMENT = re.compile(r"^\s*(?:#|//|/\*+|\*(?!/))\s?(?P<text>.*?)\s*(?:\*/)?\s*$")
SITE = re.compile(r"^\s*ORDER (?P<tag>[A-Z]+[0-9]+[a-z]?)\b\s*(?P<head>.*)$")
KEY = re.compile(r"^\s+(?P<key>pairs with|without it|not needed|shown by)\s+(?P<text>.*)$")
TAG = re.compile(r"\b[A-Z]+[0-9]+[a-z]?\b")
TEST = re.compile(r"(?P<path>tests/[\w/]+\.py)(?:::(?P<name>[\w:]+))?")


@attrs.frozen
class Site:
    """One ORDER block: where it stands and what it says under each key (`head` is the rest of the first line)."""

    tag: str
    path: str
    first: int
    last: int
    said: dict[str, str]

    @property
    def where(self) -> str:
        """File and line, as compilers write them."""
        return f"{self.path}:{self.first}"


@attrs.frozen
class Source:
    """What one file holds: its blocks, where functions begin, and the ordered calls (line, text) in the code."""

    path: str
    functions: tuple[int, ...]
    sites: tuple[Site, ...]
    ordered: tuple[tuple[int, str], ...]
    bare: tuple[tuple[int, str], ...]


def _sites(path: str, lines: Sequence[str]) -> Iterator[Site]:
    tag, first, key = "", 0, "head"
    said: dict[str, str] = {}
    for number, line in enumerate([*lines, ""], start=1):
        comment = COMMENT.match(line)
        start = SITE.match(comment["text"]) if comment else None
        if tag and (start or not comment):
            yield Site(tag, path, first, number - 1, said)
            tag = ""
        if start:
            tag, first, key, said = start["tag"], number, "head", {"head": start["head"]}
        elif tag and comment:
            entry = KEY.match(comment["text"])
            key = entry["key"] if entry else key
            more = entry["text"] if entry else comment["text"].strip()
            said[key] = f"{said.get(key, '')} {more}".strip()


def _code(lines: Iterable[str], c: bool) -> Iterator[tuple[int, str]]:
    """Number the lines, with comments and (in Python and Cython) docstrings taken out."""
    inside = ""
    for number, line in enumerate(lines, start=1):
        text = line
        if inside:
            _, found, text = text.partition(inside)
            if not found:
                continue
            inside = ""
        for mark, end in (("/*", "*/"),) if c else (('"""', '"""'), ("'''", "'''")):
            while mark in text:
                before, _, rest = text.partition(mark)
                _, found, after = rest.partition(end)
                text = before + after
                if not found:
                    inside = end
                    break
        yield number, text.split("//" if c else "#", maxsplit=1)[0]


def parse(path: str, text: str) -> Source:
    """Read one file; `path` is relative to the checkout."""
    lines = text.splitlines()
    code = list(_code(lines, c=path.endswith(".h")))
    return Source(
        path,
        tuple(number for number, line in code if FUNCTION.match(line)),
        tuple(_sites(path, lines)),
        tuple((number, found[0].rstrip("( ")) for number, line in code for found in ORDERED.finditer(line)),
        tuple((number, found[0]) for number, line in code for found in BARE.finditer(line)),
    )


def read_tree(root: Path) -> list[Source]:
    """Read every source file below the checkout's folders; the links in vhostmp/ are not followed."""
    paths: list[Path] = []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            inside = path.relative_to(root)
            links = any((root / parent).is_symlink() for parent in inside.parents)
            if path.suffix in SUFFIXES and path.is_file() and not links:
                paths.append(path)
    return [parse(str(path.relative_to(root)), path.read_text()) for path in paths]


def _number(tag: str) -> int:
    return int(re.sub(r"\D", "", tag))


def by_tag(sources: Iterable[Source]) -> dict[str, list[Site]]:
    """Collect the sites of each tag, tags in natural order (R2 before R10)."""
    tags: dict[str, list[Site]] = {}
    for source in sources:
        for site in source.sites:
            tags.setdefault(site.tag, []).append(site)
    return {tag: tags[tag] for tag in sorted(tags, key=lambda tag: (re.sub(r"\d.*", "", tag), _number(tag), tag))}


def _said(sites: Iterable[Site], key: str) -> str:
    return "; ".join(dict.fromkeys(site.said[key] for site in sites if site.said.get(key)))


def _pairs(sites: Iterable[Site]) -> set[str]:
    """Give the tags named before the parenthesis of each `pairs with`."""
    return {tag for site in sites for tag in TAG.findall(site.said.get("pairs with", "").partition("(")[0])}


def _argument(tags: dict[str, list[Site]], tag: str, key: str) -> str:
    """Give what a tag says under a key or, where it says nothing, what its pairs say."""
    pairs = (_said(tags[pair], key) for pair in sorted(_pairs(tags[tag])) if pair in tags)
    return _said(tags[tag], key) or "; ".join(dict.fromkeys(said for said in pairs if said))


def table(tags: dict[str, list[Site]]) -> str:
    """Give the table of all tags, in Markdown."""
    rows = ["| tag | sites | argument | shown by |", "|---|---|---|---|"]
    for tag, sites in tags.items():
        places = ", ".join(f"`{path}`" for path in dict.fromkeys(site.path for site in sites))
        whole = [site for site in sites if "pairs with" in site.said] or sites
        parts = [_said(whole, "head"), f"pairs with {_said(whole, 'pairs with')}"]
        parts += [f"{key}: {_said(whole, key)}" for key in ("without it", "not needed") if _said(whole, key)]
        argument = "<br>".join(parts).replace("|", "\\|")
        tests = ", ".join(f"`{found[0]}`" for found in TEST.finditer(_argument(tags, tag, "shown by")))
        rows.append(f"| {tag} | {places} | {argument} | {tests} |")
    return "\n".join(rows)


def _tag_faults(tags: dict[str, list[Site]], root: Path) -> Iterator[str]:
    for tag, sites in tags.items():
        where = sites[0].where
        if not _said(sites, "pairs with"):
            yield f"{where}: ORDER {tag} has no 'pairs with' at any of its sites"
        for key in ("without it", "shown by"):
            if not _argument(tags, tag, key):
                yield f"{where}: ORDER {tag} has no '{key}' at any of its sites, nor has its pair"
        pairs = _pairs(sites)
        for pair in sorted(pairs):
            if pair not in tags:
                yield f"{where}: ORDER {tag} pairs with {pair}, which stands nowhere"
            elif tag not in _pairs(tags[pair]):
                yield f"{where}: ORDER {tag} pairs with {pair}, but {pair} ({tags[pair][0].where}) does not name {tag}"
        if not pairs and _said(sites, "pairs with") and "(" not in _said(sites, "pairs with"):
            yield f"{where}: ORDER {tag} pairs with no tag: say who it is and (where that side's order is written)"
        tests = list(TEST.finditer(_said(sites, "shown by")))
        if _said(sites, "shown by") and not tests:
            yield f"{where}: ORDER {tag} is shown by no tests/....py"
        for test in tests:
            path = root / test["path"]
            name = (test["name"] or "").split("::")[-1]
            if not path.is_file() or (name and not re.search(rf"^\s*(?:def|class) {name}\b", path.read_text(), re.M)):
                yield f"{where}: ORDER {tag} is shown by {test[0]}, which does not exist"


def _call_faults(sources: Iterable[Source]) -> Iterator[str]:
    for source in sources:
        if source.path in DEFINES:
            continue
        for number, call in source.bare:
            yield f"{source.path}:{number}: {call} outside shm/atomics.h"
        for number, call in source.ordered:
            function = max((start for start in source.functions if start <= number), default=0)
            if not any(function <= site.last + 1 <= number <= site.last + REACH for site in source.sites):
                yield f"{source.path}:{number}: {call} without an ORDER block in the {REACH} lines above it"


def _table_faults(tags: dict[str, list[Site]], text: str) -> Iterator[str]:
    _, found, rest = text.partition(BEGIN)
    written, closed, _ = rest.partition(END)
    if not found or not closed:
        yield f"{TABLE}: no table between '{BEGIN}' and '{END}'"
    elif written.strip() != table(tags):
        rows = set(written.split("\n"))
        stale = [row.split("|")[1].strip() for row in table(tags).split("\n") if row not in rows]
        yield f"{TABLE}: the table is not what the blocks say ({', '.join(stale) or 'rows too many'}): run with --write"


def check(root: Path) -> list[str]:
    """Give every fault found in the checkout, one line each, the file and line first."""
    sources = read_tree(root)
    tags = by_tag(sources)
    path = root / TABLE
    return [
        *_tag_faults(tags, root),
        *_call_faults(sources),
        *_table_faults(tags, path.read_text() if path.is_file() else ""),
    ]


def write_table(root: Path) -> bool:
    """Put the present table between the marks of shm/ORDERING.md; False when the marks are not there."""
    path = root / TABLE
    before, found, rest = path.read_text().partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        return False
    path.write_text(f"{before}{BEGIN}\n{table(by_tag(read_tree(root)))}\n{END}{after}")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the checkout, after writing the table with `--write`; 1 when there is a fault."""
    parser = argparse.ArgumentParser(prog="check_order", description="Check the arguments of ordered accesses.")
    parser.add_argument("--write", action="store_true", help=f"write the table in {TABLE} first")
    if parser.parse_args(arguments).write:
        write_table(ROOT)
    faults = check(ROOT)
    for fault in faults:
        print(fault, file=sys.stderr)
    tags = by_tag(read_tree(ROOT))
    print(f"check_order: {len(tags)} tags at {sum(map(len, tags.values()))} sites, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
