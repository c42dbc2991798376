"""The checker of ordering arguments, on small trees: each fault it is there for is put in and must be found."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostmp.tools import check_order

READER = """\
# reader
cdef inline void enter(slot *s) noexcept nogil:
    # ORDER R1 (reader): store s.seq odd, then load generation      [full fence between]
    #   pairs with  R2 (writer.pyx: store, fence, scan)
    #   without it  the scan sees us idle while we
    #               hold the old one.
    #   shown by    tests/test_r.py::test_r
    vmp_fence_full()
"""
WRITER = """\
# writer
def scan():
    # ORDER R2 (updater): store generation, then load s.seq         [full fence between]
    #   pairs with  R1 (reader.pxd: odd, fence, load)
    #   without it  we miss a reader.
    #   shown by    tests/test_r.py
    vmp_fence_full()
    # ORDER D1 (device): load avail.idx, then the entry              [acquire]
    #   pairs with  the driver (virtio 1.3, 2.7.13.3.1: its write barrier)
    #   without it  the entry is read before it was written.
    #   not needed  on an empty ring.
    #   shown by    tests/test_r.py::test_r
    vmp_load_acquire_u16(&avail.idx)
"""


def make_tree(root: Path, reader: str = READER, writer: str = WRITER) -> Path:
    """Lay out a checkout with two source files, a test and an up-to-date table."""
    for folder in ("shm", "workers", "vhostmp", "tools", "tests"):
        (root / folder).mkdir()
    (root / "shm/reader.pxd").write_text(reader)
    (root / "workers/writer.pyx").write_text(writer)
    (root / "tests/test_r.py").write_text("def test_r() -> None:\n    pass\n")
    (root / "vhostmp/shm").symlink_to("../shm")
    (root / check_order.TABLE).write_text(f"# Order\n\n{check_order.BEGIN}\n{check_order.END}\n")
    assert check_order.write_table(root)
    return root


def test_sound_tree_has_no_fault(tmp_path: Path) -> None:
    """Mutual pairs, an outside pair with its source, tests that exist and a fresh table: nothing is reported."""
    root = make_tree(tmp_path)
    assert check_order.check(root) == []
    assert list(check_order.by_tag(check_order.read_tree(root))) == ["D1", "R1", "R2"]


def test_links_are_not_read_twice(tmp_path: Path) -> None:
    """A file that is reachable through a link in vhostmp/ counts once, under its own folder."""
    sources = check_order.read_tree(make_tree(tmp_path))
    assert sorted(source.path for source in sources) == ["shm/reader.pxd", "workers/writer.pyx"]


def test_table_tells_everything(tmp_path: Path) -> None:
    """A row holds the tag, its files, the whole argument (continuation lines joined) and its test."""
    tags = check_order.by_tag(check_order.read_tree(make_tree(tmp_path)))
    assert check_order.table(tags).splitlines()[3] == (
        "| R1 | `shm/reader.pxd` | (reader): store s.seq odd, then load generation      [full fence between]"
        "<br>pairs with R2 (writer.pyx: store, fence, scan)"
        "<br>without it: the scan sees us idle while we hold the old one. | `tests/test_r.py::test_r` |"
    )


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("pairs with  R1", "pairs with  R7", "ORDER R2 pairs with R7, which stands nowhere"),
        ("pairs with  R1", "pairs with  D1", "ORDER R1 pairs with R2, but R2 (workers/writer.pyx:3) does not name R1"),
        ("ORDER R2", "ORDER R3", "ORDER R1 pairs with R2, which stands nowhere"),
        ("    #   pairs with  the driver (virtio 1.3, 2.7.13.3.1: its write barrier)\n", "", "D1 has no 'pairs with'"),
        ("    #   without it  the entry is read before it was written.\n", "", "ORDER D1 has no 'without it'"),
        ("    #   shown by    tests/test_r.py::test_r\n", "", "ORDER D1 has no 'shown by' at any of its sites"),
        ("tests/test_r.py\n", "tests/test_s.py\n", "ORDER R2 is shown by tests/test_s.py, which does not exist"),
        ("::test_r\n", "::test_s\n", "ORDER D1 is shown by tests/test_r.py::test_s, which does not exist"),
        ("tests/test_r.py\n", "good luck\n", "ORDER R2 is shown by no tests/....py"),
        ("the driver (virtio 1.3, 2.7.13.3.1: its write barrier)", "the driver", "ORDER D1 pairs with no tag"),
        ("idx)\n", "idx)\n" + 12 * "    pass\n" + "    vmp_fence_full()\n", "writer.pyx:26: vmp_fence_full"),
        ("idx)\n", "idx)\ncdef int f():\n    vmp_fence_full()\n", "writer.pyx:15: vmp_fence_full without"),
        ("idx)\n", "idx)\n    __atomic_load_n(p, 2)\n", "workers/writer.pyx:14: __atomic_load_n outside shm/atomics.h"),
        ("store generation", "store the generation", "shm/ORDERING.md: the table is not what the blocks say (R2)"),
    ],
)
def test_each_fault_is_found(tmp_path: Path, old: str, new: str, fault: str) -> None:
    """One fault put into a sound tree is reported, with its place."""
    root = make_tree(tmp_path)
    assert old in WRITER
    (root / "workers/writer.pyx").write_text(WRITER.replace(old, new, 1))
    assert [line for line in check_order.check(root) if fault in line] != []


def test_missing_table_is_a_fault(tmp_path: Path) -> None:
    """Without the marks there is no table to compare: that is reported, and --write leaves the file alone."""
    root = make_tree(tmp_path)
    (root / check_order.TABLE).write_text("# Order\n")
    assert not check_order.write_table(root)
    (fault,) = check_order.check(root)
    assert fault.startswith("shm/ORDERING.md: no table between")


def test_short_site_needs_only_the_tag(tmp_path: Path) -> None:
    """A second site of a tag may say no more than its tag; the whole block stands at the first."""
    more = WRITER + "    # ORDER R2 (updater): as above\n    vmp_fence_full()\n"
    root = make_tree(tmp_path, writer=more)
    assert check_order.check(root) == []


def test_a_pair_shares_its_argument(tmp_path: Path) -> None:
    """What goes wrong and which test shows it may stand at one side of a pair alone; the table names the test twice."""
    lines = [line for line in WRITER.splitlines(keepends=True) if "we miss" not in line and "test_r.py\n" not in line]
    root = make_tree(tmp_path, writer="".join(lines))
    assert check_order.check(root) == []
    rows = check_order.table(check_order.by_tag(check_order.read_tree(root))).splitlines()
    assert all(row.endswith("| `tests/test_r.py::test_r` |") for row in rows[2:])


def test_text_is_not_code(tmp_path: Path) -> None:
    """Calls in docstrings and comments need no argument, and neither do the names in a cimport list."""
    text = '"""Uses vmp_fence_full() and\n__atomic_load_n() a lot."""\n# vmp_fence_full()\n'
    root = make_tree(tmp_path, writer=text + "from a cimport (\n    vmp_load_acquire_u16,\n)\n" + WRITER)
    assert check_order.check(root) == []


def test_this_checkout_is_read() -> None:
    """The real tree has tags of the read-copy-update domain: the walk finds them."""
    assert {"R1", "R2", "R3", "R4"} <= set(check_order.by_tag(check_order.read_tree(check_order.ROOT)))
