"""The guest's initial file system: busybox, virtio drivers, ethtool and the stream program, packed for the kernel.

Rules: everything comes from programs installed on this machine and from the kernel that ``make peers`` has unpacked;
nothing is kept between test runs. `missing` says in one line what is not there.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import attrs

from tests.peers.processes import run

HERE = Path(__file__).parent / "guest"
DRIVERS = ("virtio_pci", "virtio_net", "virtio_blk", "virtio_rng")


def cache() -> Path:
    """Return the folder ``make peers`` fills (tools/peers.sh)."""
    own = os.environ.get("VHOSTMP_PEERS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vhostmp" / "peers"


def missing() -> str | None:
    """Say what the image needs and this machine lacks; None when all is there."""
    for program in ("busybox", "cpio", "ethtool", "gcc", "ldd"):
        if shutil.which(program) is None:
            return f"no {program} (make peers)"
    if not (cache() / "kernel" / "complete").exists():
        return f"no guest kernel in {cache()} (make peers)"
    return None


@attrs.frozen
class Image:
    """What QEMU boots."""

    kernel: Path
    initrd: Path
    stream: Path
    """The stream program, which runs on the host too."""


def build(folder: Path, drivers: tuple[str, ...] = DRIVERS) -> Image:
    """Make the image in the empty directory `folder`; the guest loads `drivers` when it boots."""
    root = folder / "root"
    for name in ("bin", "lib/modules"):
        (root / name).mkdir(parents=True)
    stream = folder / "stream"
    run(["gcc", "-O2", "-Wall", "-Werror", "-static", "-o", stream, HERE / "stream.c"])
    _install(HERE / "init", root / "init")
    _install(stream, root / "bin" / "stream")
    _install(_program("busybox"), root / "bin" / "busybox")
    install_with_libraries(_program("ethtool"), root)
    modules = _load_order(cache() / "kernel" / "lib" / "modules", drivers)
    for module in modules:
        (root / "lib" / "modules" / _plain_name(module)).write_bytes(_plain_bytes(module))
    (root / "modules").write_text("".join(f"{_plain_name(module)}\n" for module in modules))

    names = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
    packed = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"],
        cwd=root,
        input=names.encode(),
        capture_output=True,
        check=True,
    ).stdout
    initrd = folder / "initrd.gz"
    initrd.write_bytes(gzip.compress(packed, compresslevel=1))
    (kernel,) = (cache() / "kernel" / "boot").glob("vmlinuz-*")
    return Image(kernel, initrd, stream)


def _program(name: str) -> Path:
    """Return the installed program `name`."""
    found = shutil.which(name)
    assert found is not None, name
    return Path(found)


def _install(source: Path, target: Path) -> None:
    """Copy a program."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)


def install_with_libraries(program: Path, root: Path) -> None:
    """Copy a program and the shared libraries it was linked with, to the places where the loader looks for them."""
    _install(program, root / "bin" / program.name)
    install_libraries([program], root)


def install_libraries(files: Sequence[Path], root: Path) -> None:
    """Copy the shared libraries that programs and libraries were linked with."""
    for line in run(["ldd", *files]).splitlines():
        found = re.search(r"(/\S+) \(0x", line)
        if found:
            _install(Path(found[1]), root / found[1].lstrip("/"))


def _plain_name(module: Path) -> str:
    """Return the name of a module file without the ending of its compression."""
    return module.name.removesuffix(".xz")


def _plain_bytes(module: Path) -> bytes:
    """Return the content of a module file; Debian compresses them from version 13 on."""
    content = module.read_bytes()
    return lzma.decompress(content) if module.suffix == ".xz" else content


def _load_order(folder: Path, wanted: tuple[str, ...]) -> list[Path]:
    """Return the module files to load for `wanted`, each behind those it depends on.

    A module says what it depends on in its section .modinfo, as ``depends=a,b``; there is no modules.dep, since nobody
    ran depmod on a kernel that was only unpacked.
    """
    files = {_plain_name(path).removesuffix(".ko").replace("-", "_"): path for path in folder.rglob("*.ko*")}
    order: list[Path] = []

    def add(name: str) -> None:
        if name not in files:
            return  # built into the kernel
        found = re.search(rb"\0depends=([^\0]*)\0", _plain_bytes(files[name]))
        for other in found[1].decode().split(",") if found else ():
            if other:
                add(other.replace("-", "_"))
        if files[name] not in order:
            order.append(files[name])

    for name in wanted:
        add(name)
    return order
