"""The layers: who may import whom, and who may open what. Read from the text of every module, nothing is imported.

    errors, consts  <-  shm  <-  workers  <-  the control plane (vhostmp.*)  <-  tools  <-  the command line

Rules: a module imports from its own layer and from those below it. The command line stands on top: `vhostmp demo`
starts a tool, and nothing but `python -m vhostmp` imports it. `vhostmp/__init__.py` is loaded by every worker process,
so at import time it may load the lowest layer alone (a function in it may hand out more, on demand).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("shm", "workers", "vhostmp", "tools")
LAYERS = ("base", "shm", "workers", "control", "tools", "command line")
TOP = LAYERS.index("command line")
BASE = {"vhostmp", "vhostmp.errors", "vhostmp.consts"}
COMMAND_LINE = {"vhostmp.cli", "vhostmp.__main__"}

#: The stress tool is a stranger to what it tests: it has its own words for messages, rings and guest memory, so that a
#: mistake in ours shows. Its load generator shares the compiled guest with the demo.
STRANGER = "vhostmp.tools.stress"
STRANGER_KNOWS = (STRANGER, "vhostmp.errors", "vhostmp.tools._board", "vhostmp.tools._guest", "vhostmp.tools.guest")

#: Modules that may create sockets; everybody else is handed them. The pool makes the pairs through which workers log.
OPENS_SOCKETS = {
    "vhostmp.transport",
    "vhostmp.server",
    "vhostmp.control_api",
    "vhostmp.backends",
    "vhostmp.workers.channel",
    "vhostmp.workers.pool",
}
#: Modules that do no I/O: bytes in, bytes out.
PURE = re.compile(r"vhostmp\.(protocol|errors|consts)\b")
IO_MODULES = {
    "asyncio", "ctypes", "fcntl", "io", "mmap", "multiprocessing", "os", "pathlib", "posix_ipc", "select", "selectors",
    "shutil", "signal", "socket", "socketserver", "subprocess", "tempfile", "threading", "time",
}  # fmt: skip
SOCKET_MAKERS = {"socket", "socketpair", "create_server", "create_connection", "fromfd"}
CYTHON_IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+)?c?import\s+([^#\n]+)", re.M)
C_SOCKET = re.compile(r"\b(?:socket|socketpair|accept4?)\s*\(")
C_MEMORY = re.compile(r"\b(?:mmap|mremap|memfd_create|shm_open|vmp_futex_\w+|SYS_futex)\s*\(")
STRING = re.compile(r'"""(?:.|\n)*?"""|#[^\n]*')


@attrs.frozen
class Module:
    """One source file and the name it is imported by."""

    name: str
    path: Path
    text: str

    @property
    def where(self) -> str:
        """The path below the checkout."""
        return str(self.path.relative_to(ROOT))

    @property
    def tree(self) -> ast.Module:
        """The AST (of a .py file)."""
        return ast.parse(self.text, str(self.path))


def modules(*suffixes: str) -> list[Module]:
    """Every source file of the product with one of these suffixes."""
    found: list[Module] = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in suffixes or any(parent.is_symlink() for parent in path.parents):
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            dotted = ".".join(parts if folder == "vhostmp" else ("vhostmp", *parts))
            found.append(Module(dotted.removesuffix(".__init__"), path, path.read_text()))
    return found


def layer(name: str) -> int:
    """The layer (index into LAYERS) of a dotted module or attribute name."""
    if name in COMMAND_LINE:
        return TOP
    for prefix, which in (("vhostmp.shm", "shm"), ("vhostmp.workers", "workers"), ("vhostmp.tools", "tools")):
        if name == prefix or name.startswith(prefix + "."):
            return LAYERS.index(which)
    if name in BASE or name.startswith(("vhostmp.errors.", "vhostmp.consts.", "vhostmp.__")):
        return LAYERS.index("base")
    return LAYERS.index("control")


def python_imports(tree: ast.AST) -> Iterator[str]:
    """Names that import statements anywhere in the tree mention; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def cython_imports(text: str) -> Iterator[str]:
    """Names that import and cimport lines mention, as in `python_imports`."""
    for found in CYTHON_IMPORT.finditer(STRING.sub("", text)):
        names = [name.split(" as ")[0].strip(" ()") for name in found[2].split(",")]
        yield from (f"{found[1]}.{name}" if found[1] else name for name in names if name or found[1])


def imports(module: Module) -> list[str]:
    """The names of our own that a module imports."""
    names = python_imports(module.tree) if module.path.suffix in {".py", ".pyi"} else cython_imports(module.text)
    return [name for name in names if name.split(".")[0] == "vhostmp"]


def without_functions(tree: ast.Module) -> ast.Module:
    """The tree without what runs only when a function is called."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            """Drop it."""

    stripped = Strip().visit(tree)
    assert isinstance(stripped, ast.Module)
    return stripped


def test_every_module_is_seen() -> None:
    """The four folders are read, in all kinds of files: an empty walk would make every rule below hold."""
    names = {module.name for module in modules(".py", ".pyx", ".pxd")}
    assert {"vhostmp", "vhostmp.errors", "vhostmp.shm", "vhostmp.workers", "vhostmp.tools"} <= names
    assert {module.path.suffix for module in modules(".py", ".pyx", ".pxd")} == {".py", ".pyx", ".pxd"}


def test_no_upward_import() -> None:
    """No module imports one of a layer above its own."""
    upward = [
        f"{module.where}: {LAYERS[layer(module.name)]} imports {name} ({LAYERS[layer(name)]})"
        for module in modules(".py", ".pyi", ".pyx", ".pxd")
        if module.name != "vhostmp"
        for name in imports(module)
        if layer(name) > layer(module.name)
    ]
    assert upward == []


def test_command_line_is_not_imported() -> None:
    """Only `python -m vhostmp` imports the command line."""
    users = {module.name for module in modules(".py", ".pyx") if any(layer(name) == TOP for name in imports(module))}
    assert users <= COMMAND_LINE


def test_package_stays_thin() -> None:
    """Importing vhostmp itself loads nothing of ours beyond the lowest layer."""
    (package,) = (module for module in modules(".py") if module.name == "vhostmp")
    names = [name for name in python_imports(without_functions(package.tree)) if name.startswith("vhostmp")]
    assert [name for name in names if layer(name) > 0] == []


def test_lowest_layer_is_stdlib_only() -> None:
    """Errors and consts import neither ours nor third-party code, so that anything may import them."""
    foreign = [
        f"{module.where}: {name}"
        for module in modules(".py")
        if module.name in BASE - {"vhostmp"}
        for name in python_imports(module.tree)
        if name.split(".")[0] not in {"__future__", "collections", "enum", "errno", "typing"} and layer(name) > 0
    ]
    assert foreign == []


def socket_calls(tree: ast.Module) -> Iterator[int]:
    """Lines on which a socket is created through the socket or asyncio module; wrapping a descriptor creates none."""
    made = {f"socket.{name}" for name in SOCKET_MAKERS}
    local: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            local |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            local |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and "fileno" not in {keyword.arg for keyword in node.keywords}:
            head, _, rest = ast.unparse(node.func).partition(".")
            called = f"{local.get(head, head)}.{rest}".rstrip(".")
            if called in made or called.startswith(("socketserver.", "asyncio.open_", "asyncio.start_")):
                yield node.lineno


def test_who_opens_sockets() -> None:
    """Sockets are created by the transport, the servers, the worker channel and the back-ends, by nobody else."""

    def may_open(name: str) -> bool:
        return name in OPENS_SOCKETS or name.startswith(("vhostmp.workers.backends", "vhostmp.tools"))

    opened = [f"{m.where}:{n}" for m in modules(".py") if not may_open(m.name) for n in socket_calls(m.tree)]
    opened += [
        f"{module.where}: {found[0]}"
        for module in modules(".pyx", ".pxd")
        if not may_open(module.name)
        for found in C_SOCKET.finditer(STRING.sub("", module.text))
    ]
    assert opened == []


def is_stranger(name: str) -> bool:
    """Whether a module belongs to the stress tool."""
    return f"{name}.".startswith(f"{STRANGER}.")


def test_strangers_know_nothing_of_us() -> None:
    """The stress tool drives a back-end from outside, over a UNIX socket: nothing of ours is within its reach."""
    known = [
        f"{module.where}: {name}"
        for module in modules(".py")
        if is_stranger(module.name)
        for name in python_imports(module.tree)
        if name.split(".")[0] == "vhostmp" and not f"{name}.".startswith(tuple(f"{k}." for k in STRANGER_KNOWS))
    ]
    assert known == []


def test_who_maps_memory() -> None:
    """Only shm/ maps memory, makes memory files and touches futexes; a stranger has a guest's memory of its own."""
    outside = [
        module
        for module in modules(".py", ".pyx", ".pxd")
        if layer(module.name) != LAYERS.index("shm") and not is_stranger(module.name)
    ]
    used = [
        f"{module.where}: import {name}"
        for module in outside
        if module.path.suffix == ".py"
        for name in python_imports(module.tree)
        if name.split(".")[0] == "mmap" or name == "os.memfd_create"
    ]
    used += [
        f"{module.where}: {found[0]}"
        for module in outside
        for found in C_MEMORY.finditer(STRING.sub("", module.text))
        if module.path.suffix != ".py" or "memfd" in found[0]
    ]
    assert used == []


def test_protocol_does_no_io() -> None:
    """The protocol package and the lowest layer turn values into bytes and back: no file, socket, clock or thread."""
    io: list[str] = []
    for module in modules(".py"):
        if PURE.match(module.name):
            io += [f"{module.where}: import {n}" for n in python_imports(module.tree) if n.split(".")[0] in IO_MODULES]
            calls = (node for node in ast.walk(module.tree) if isinstance(node, ast.Call))
            io += [f"{module.where}: {ast.unparse(n.func)}" for n in calls if ast.unparse(n.func) in {"open", "print"}]
    assert io == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from vhostmp.shm.atomics cimport a, b", ["vhostmp.shm.atomics.a", "vhostmp.shm.atomics.b"]),
        ("from vhostmp.shm.layout cimport (\n    vmp_ring,\n)", ["vhostmp.shm.layout."]),
        ("cimport vhostmp.supervisor as s", ["vhostmp.supervisor"]),
        ("    import vhostmp.session  # late", ["vhostmp.session"]),
        ('"""\nimport vhostmp.net\n"""', []),
    ],
)
def test_cython_imports_are_read(text: str, expected: list[str]) -> None:
    """The reader of import lines sees each form that Cython has, and no import in a docstring."""
    assert list(cython_imports(text)) == expected


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("import socket\nsocket.socket()", [2]),
        ("from socket import socketpair as pair\npair()", [2]),
        ("import socket as s\ndef f(x: s.socket) -> None: x.send(b'')", []),
        ("import socket\nsocket.socket(fileno=3)", []),
        ("import asyncio\nasyncio.start_unix_server(f)", [2]),
    ],
)
def test_socket_calls_are_seen(text: str, lines: list[int]) -> None:
    """Creating a socket is seen under any local name; using one that was handed over is not counted."""
    assert list(socket_calls(ast.parse(text))) == lines


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vhostmp.errors.LocalError", "base"),
        ("vhostmp.__version__", "base"),
        ("vhostmp.shm", "shm"),
        ("vhostmp.workers.backends._tap", "workers"),
        ("vhostmp.supervisor.Pool", "control"),
        ("vhostmp.tools.demo", "tools"),
        ("vhostmp.cli", "command line"),
    ],
)
def test_layer_of_a_name(name: str, expected: str) -> None:
    """Each name belongs to the layer its path says."""
    assert LAYERS[layer(name)] == expected
