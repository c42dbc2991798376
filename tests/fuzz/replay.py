"""Runs inputs of a target without a fuzzer: for tests, and to say which lines of Python a corpus reaches.

python -m tests.fuzz.replay TARGET FILE ...         what does not hold, if anything
python -m tests.fuzz.replay --lines TARGET FILE ... also "reached of all" lines of the functions that it covers
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, Final

from tests import native
from tests.fuzz.targets import TARGETS, Target

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]


class BrokenPromise(AssertionError):
    """A compiled target says what did not hold."""


def runner(target: Target, module: ModuleType | None = None) -> Callable[[bytes], None]:
    """Return what runs one input, and raises when a promise is broken. `module`: that of a compiled target, built."""
    if not target.native:
        one: Callable[[bytes], None] = importlib.import_module(f"tests.fuzz.{target.module}").one
        return one
    harness = native.load(HERE / f"{target.module}.pyx") if module is None else module
    replay: Callable[[str, bytes], str | None] = harness.replay

    def run(data: bytes) -> None:
        wrong = replay(target.name, data)
        if wrong is not None:
            raise BrokenPromise(wrong)

    return run


def _functions(code: CodeType) -> Iterator[CodeType]:
    """List a module's functions; what is outside of them is run by importing it."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & 2:  # CO_NEWLOCALS: not the body of a class
                yield constant
            yield from _functions(constant)


def _all_lines(path: Path) -> set[tuple[str, int]]:
    """List the lines of the functions in a file that the compiler made code of."""
    found: set[tuple[str, int]] = set()
    for function in _functions(compile(path.read_text(), str(path), "exec")):
        name = str(path.relative_to(ROOT))
        found |= {(name, line) for _, _, line in function.co_lines() if line and line != function.co_firstlineno}
    return found


def reached_lines(target: Target, inputs: Iterable[bytes]) -> tuple[int, int]:
    """Return how many lines of what the target covers the inputs reach, and how many there are."""
    paths = [path for pattern in target.covers for path in sorted(ROOT.glob(pattern))]
    every = {line for path in paths for line in _all_lines(path)}
    names = {str(path): str(path.relative_to(ROOT)) for path in paths}
    names |= {str(ROOT / "vhostmp" / path.relative_to(ROOT)): str(path.relative_to(ROOT)) for path in paths}
    reached: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        name = names.get(frame.f_code.co_filename)
        if name is None:
            return None
        if event == "line":
            reached.add((name, frame.f_lineno))
        return trace

    run = runner(target)
    sys.settrace(trace)
    try:
        for data in inputs:
            run(data)
    finally:
        sys.settrace(None)
    return len(reached & every), len(every)


def main() -> int:
    """Run the files named on the command line."""
    logging.disable(logging.CRITICAL)
    words = sys.argv[1:]
    lines = words[:1] == ["--lines"]
    target, files = TARGETS[words[lines]], words[lines + 1 :]
    inputs = [path.read_bytes() for word in files for path in sorted(_files(Path(word)))]
    if lines:
        print(*reached_lines(target, inputs))
        return 0
    run = runner(target)
    for data in inputs:
        run(data)
    print(f"{target.name}: {len(inputs)} inputs, all promises kept")
    return 0


def _files(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if entry.is_file()] if path.is_dir() else [path]


if __name__ == "__main__":
    sys.exit(main())
