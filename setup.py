"""The compiled parts: only what pyproject.toml cannot say.

Every .pyx below vhostmp/ becomes one extension; its module name is its path. Set in the environment:

    VHOSTMP_DEBUG=1   bounds checks in Cython, -O1 -g, an annotated HTML page a file below build/cython; kill points
    VHOSTMP_WITHOUT=journal   leaves the journal out (or: checks, counters), to measure its cost (tools/bench/safety.py)
    CFLAGS            goes before our own flags (the sanitizers come in this way: `make sanitize`)
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

DEBUG = os.environ.get("VHOSTMP_DEBUG") == "1"
FOLDERS = ("shm", "workers", "workers/backends", "workers/devices", "tools")
SOURCES = sorted(path for folder in FOLDERS for path in Path("vhostmp", folder).glob("*.pyx"))
HEADERS = [str(path) for path in sorted(Path("vhostmp").glob("*/*.h"))]
FLAGS = ["-O3", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unused-function", "-Wno-cpp"]
DEBUG_FLAGS = ["-g", "-O1"]
#: What shm/build.h asks for.
MACROS = [
    *([("VMP_WITH_KILL_POINTS", "1")] if DEBUG else []),
    *((f"VMP_NO_{name.upper()}", "1") for name in os.environ.get("VHOSTMP_WITHOUT", "").split()),
]

#: What only the checkout needs: checkers and generators, not for those who install vhostmp.
CHECKOUT_ONLY = {
    *(("vhostmp.tools", name) for name in ("check_installed", "check_order", "gen_layout")),
    ("vhostmp.tools.bench", "safety"),
}


class BuildModules(build_py):
    """Leaves out of the wheel the modules that only the checkout needs."""

    def find_package_modules(self, package, package_dir):
        """List the (package, module, file) triples of a package that get installed."""
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if entry[:2] not in CHECKOUT_ONLY]


def ext(path: Path) -> Extension:
    """Describe one extension; its module name is its path below the checkout."""
    return Extension(
        ".".join(path.with_suffix("").parts),
        [str(path)],
        include_dirs=["vhostmp/shm", "vhostmp/workers"],
        depends=HEADERS,
        define_macros=MACROS,
        extra_compile_args=[*FLAGS, *(DEBUG_FLAGS if DEBUG else [])],
    )


setup(
    cmdclass={"build_py": BuildModules},
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=cythonize(
        [ext(path) for path in SOURCES],
        build_dir="build/cython",
        annotate=DEBUG,
        compiler_directives={
            "language_level": 3,
            "binding": True,
            "boundscheck": DEBUG,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": DEBUG,
            "freethreading_compatible": False,
        },
    ),
)
