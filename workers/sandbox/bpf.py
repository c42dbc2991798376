"""A small assembler for seccomp filters: from a table of system calls to a program for the kernel's classic BPF.

What a filter decides. The kernel shows it the architecture, the number of the call and its six arguments, never what a
pointer points to. Calls of another architecture's numbering, and of x32 on x86-64, end the process: the same number is
another call there. Numbers beyond the last one that the table's author knew are answered ENOSYS, as an older kernel
would: a C library tries new calls first and falls back.

Speed. The kernel works out, once, which numbers are allowed whatever the arguments, and runs no filter for those
(seccomp_cache_prepare, Linux 5.11). On older kernels the calls of the data path are compared first, one by one, and the
rest by halving.

Source: seccomp(2); Linux include/uapi/linux/filter.h, Documentation/networking/filter.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

KILL_PROCESS: Final = 0x8000_0000
ERRNO: Final = 0x0005_0000
USER_NOTIF: Final = 0x7FC0_0000
ALLOW: Final = 0x7FFF_0000

#: struct seccomp_data
NUMBER: Final = 0
ARCHITECTURE: Final = 4
ARGUMENTS: Final = 16
X32_BIT: Final = 0x4000_0000

LD_W_ABS, AND_K, JA, JEQ_K, JGE_K, RET_K = 0x20, 0x54, 0x05, 0x15, 0x35, 0x06
FAR: Final = 255  # a conditional jump reaches no farther
PROGRAM_MAX: Final = 4096
_INSTRUCTION: Final = struct.Struct("=HBBI")
INSTRUCTION_BYTES, OPERAND = 8, 4  # the size of one, and where in it its operand is

Instruction = tuple[int, int, int, int]


@attrs.frozen
class Only:
    """A condition: an argument (0 to 5), masked, is one of these values. 32 bits; `wide`: the upper 32 are zero too.

    With `negated`: it is none of them.
    """

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFF_FFFF
    wide: bool = False
    negated: bool = False


@attrs.frozen
class Verdict:
    """What becomes of a call: `action` where all conditions hold, `otherwise` else."""

    action: int
    conditions: tuple[Only, ...] = ()
    otherwise: int = KILL_PROCESS


def errno_action(number: int) -> int:
    """Return the action that refuses a call with an errno."""
    return ERRNO | number


def assemble(
    architecture: int, verdicts: Mapping[int, Verdict], *, hot: Sequence[int], last: int, unknown: int, default: int
) -> bytes:
    """Return a program: an array of struct sock_filter.

    `verdicts` are by number, `hot` the numbers that are compared first. Others up to number `last` meet with the action
    `default`, those behind it with `unknown`.
    """
    spans = _spans(verdicts, last, unknown, default)
    code: list[Instruction] = [
        (LD_W_ABS, 0, 0, ARCHITECTURE),
        (JEQ_K, 1, 0, architecture),
        (RET_K, 0, 0, KILL_PROCESS),
        (LD_W_ABS, 0, 0, NUMBER),
        (JGE_K, 0, 1, X32_BIT),
        (RET_K, 0, 0, KILL_PROCESS),
    ]
    for number in hot:
        leaf = _leaf(verdicts[number])
        code += [(JEQ_K, 0, len(leaf), number), *leaf]
    code += _halve(spans)
    assert len(code) <= PROGRAM_MAX
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in code)


def _spans(verdicts: Mapping[int, Verdict], last: int, unknown: int, default: int) -> list[tuple[int, Verdict]]:
    """Return where each run of numbers with the same verdict begins, ascending from 0."""
    spans: list[tuple[int, Verdict]] = []
    for number in range(last + 1):
        verdict = verdicts.get(number, Verdict(default))
        if not spans or spans[-1][1] != verdict:
            spans.append((number, verdict))
    return [*spans, (last + 1, Verdict(unknown))]


def _halve(spans: Sequence[tuple[int, Verdict]]) -> list[Instruction]:
    if len(spans) == 1:
        return _leaf(spans[0][1])
    middle = len(spans) // 2
    below, above = _halve(spans[:middle]), _halve(spans[middle:])
    if len(below) <= FAR:
        return [(JGE_K, len(below), 0, spans[middle][0]), *below, *above]
    return [(JGE_K, 0, 1, spans[middle][0]), (JA, 0, 0, len(below)), *below, *above]


def _leaf(verdict: Verdict) -> list[Instruction]:
    """Return the instructions for one verdict; they end in a return, whichever way they go."""
    code: list[Instruction] = []
    for only in verdict.conditions:
        if only.wide:
            code += [(LD_W_ABS, 0, 0, ARGUMENTS + 8 * only.argument + 4), (JEQ_K, 1, 0, 0)]
            code.append((RET_K, 0, 0, verdict.otherwise))
        code.append((LD_W_ABS, 0, 0, ARGUMENTS + 8 * only.argument))
        if only.mask != 0xFFFF_FFFF:  # noqa: PLR2004 - all bits
            code.append((AND_K, 0, 0, only.mask))
        rest = len(only.values)
        for index, value in enumerate(only.values):
            # over the other comparisons: to what follows the return, or to the return itself, behind a jump over it
            code.append((JEQ_K, rest - index, 0, value))
        code += [(JA, 0, 0, 1)] if only.negated else []
        code.append((RET_K, 0, 0, verdict.otherwise))
    code.append((RET_K, 0, 0, verdict.action))
    return code
