"""One fuzz target in this process: `python -m tests.fuzz.one TARGET [argument of libFuzzer ...]`.

Started by run.py, which sets up what the target needs: for a compiled one the instrumented copy as the current folder
and libFuzzer preloaded (build.py), for one in Python atheris. SELF in the environment is a program that starts the same
again: libFuzzer does so to merge.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence

from tests.fuzz.targets import TARGETS, Target


def _native(target: Target, words: Sequence[str]) -> int:
    """Run libFuzzer's main loop on a compiled target. The GIL is held all the time."""
    engine = ctypes.PyDLL(os.environ["ENGINE"])
    address: int = importlib.import_module(f"tests.fuzz.{target.module}").entry(target.name)
    encoded = [word.encode() for word in words]
    argc = ctypes.c_int(len(encoded))
    argv = (ctypes.c_char_p * (len(encoded) + 1))(*encoded, None)
    pointer = ctypes.cast(argv, ctypes.POINTER(ctypes.c_char_p))
    return int(engine.LLVMFuzzerRunDriver(ctypes.byref(argc), ctypes.byref(pointer), ctypes.c_void_p(address)))


def _python(target: Target, words: Sequence[str]) -> int:
    """Run atheris on a target in Python. What it imports is instrumented on the way in, where that counts."""
    import atheris  # noqa: PLC0415 - preloading is all that compiled targets need

    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=list(target.counted)):
        one: Callable[[bytes], None] = importlib.import_module(f"tests.fuzz.{target.module}").one
    atheris.Setup(list(words), one)
    atheris.Fuzz()
    return 0


def main() -> int:
    """Run the target named on the command line."""
    target = TARGETS[sys.argv[1]]
    words = [os.environ["SELF"], *sys.argv[2:]]
    return _native(target, words) if target.native else _python(target, words)


if __name__ == "__main__":
    sys.exit(main())
