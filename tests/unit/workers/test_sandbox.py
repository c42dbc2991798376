"""The filter for workers does what its table says: held against a plain evaluation of the program, and of the table."""

from __future__ import annotations

import errno
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostmp.workers.sandbox import NET_RIGHTS, SCOPES, bpf, calls, kernel
from vhostmp.workers.sandbox.bpf import ALLOW, ERRNO, KILL_PROCESS, Only, Verdict

ARCHITECTURE: Final = 0xC000003E
PID, CHANNEL = 4711, 7
ENOSYS, EPERM = ERRNO | errno.ENOSYS, ERRNO | errno.EPERM
WORDS: Final = st.integers(0, (1 << 64) - 1)


def run(program: bytes, number: int, arguments: tuple[int, ...] = (0,) * 6, arch: int = ARCHITECTURE) -> int:
    """Run a filter as the kernel does; AssertionError where it would refuse it. Source: networking/filter.rst."""
    data = struct.pack("=iIQ6Q", number - (1 << 32) if number >> 31 else number, arch, 0, *arguments)
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, k = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        match code:
            case bpf.LD_W_ABS:
                assert k % 4 == 0
                (accumulator,) = struct.unpack_from("=I", data, k)
            case bpf.AND_K:
                accumulator &= k
            case bpf.JA:
                at += k
            case bpf.JEQ_K:
                at += if_true if accumulator == k else if_false
            case bpf.JGE_K:
                at += if_true if accumulator >= k else if_false
            case bpf.RET_K:
                return int(k)
            case _:
                raise AssertionError(f"instruction {code:#x}")


def by_table(verdicts: dict[int, Verdict], number: int, arguments: tuple[int, ...], last: int) -> int:
    """Say what the table says."""
    if number >= bpf.X32_BIT:
        return KILL_PROCESS
    if number > last:
        return ENOSYS
    verdict = verdicts.get(number, Verdict(KILL_PROCESS))
    for only in verdict.conditions:
        value = arguments[only.argument]
        among = (value & 0xFFFF_FFFF & only.mask) in only.values
        if among == only.negated or (only.wide and value >> 32):
            return verdict.otherwise
    return verdict.action


CONDITIONS: Final = st.builds(
    Only,
    argument=st.integers(0, 5),
    values=st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
    mask=st.sampled_from((0xFFFF_FFFF, 7, 4)),
    wide=st.booleans(),
    negated=st.booleans(),
)
VERDICTS: Final = st.builds(
    Verdict,
    action=st.sampled_from((ALLOW, EPERM)),
    conditions=st.lists(CONDITIONS, max_size=3).map(tuple),
    otherwise=st.sampled_from((KILL_PROCESS, EPERM)),
)


@given(
    table=st.dictionaries(st.integers(0, 90), VERDICTS, max_size=60),
    number=st.one_of(st.integers(0, 100), st.integers(0, (1 << 32) - 1)),
    arguments=st.tuples(*[st.one_of(st.integers(0, 8), WORDS)] * 6),
    data=st.data(),
)
def test_program_is_the_table(
    table: dict[int, Verdict], number: int, arguments: tuple[int, ...], data: st.DataObject
) -> None:
    """For any table, call and arguments: the program's answer is the table's; another architecture's is death."""
    hot = data.draw(st.lists(st.sampled_from(sorted(table)), unique=True, max_size=4)) if table else []
    program = bpf.assemble(ARCHITECTURE, table, hot=hot, last=90, unknown=ENOSYS, default=KILL_PROCESS)
    assert run(program, number, arguments) == by_table(table, number, arguments, 90)
    assert run(program, number, arguments, arch=0x40000003) == KILL_PROCESS


def test_a_large_table() -> None:
    """Programs whose halves are farther apart than a conditional jump reaches are right too."""
    table = {number: Verdict(ALLOW, (Only(0, (number,)),), EPERM) for number in range(0, 400, 2)}
    program = bpf.assemble(ARCHITECTURE, table, hot=(), last=400, unknown=ENOSYS, default=KILL_PROCESS)
    for number in range(420):
        for first in (number, 1000):
            arguments = (first, 0, 0, 0, 0, 0)
            assert run(program, number, arguments) == by_table(table, number, arguments, 400)


@pytest.mark.parametrize("kind", [calls.WORKER, calls.PYTHON, calls.PAGER])
@pytest.mark.skipif(kernel.MACHINE != "x86_64", reason="for the numbers of x86-64")
def test_programs_of_each_kind(kind: str) -> None:
    """What a kind of process may do is what the table lists for it; its id and its channel are in their places."""
    program = calls.program(kind, PID, CHANNEL)
    allowed = {call.number: call for call in calls.ALLOWED if kind in call.kinds and call.number is not None}
    refused = {number for _, number in calls.refused()} | {c.number for c in calls.ALLOWED} - allowed.keys()
    for number in range(calls.LAST_KNOWN + 10):
        if number in allowed:
            arguments = [0] * 6
            for only in allowed[number].only:
                if only.negated:
                    assert run(program, number, (CHANNEL, 0, 0, 0, 0, 0)) == EPERM
                    continue
                value = only.values[0]
                arguments[only.argument] = {calls.OWN: PID, calls.CHANNEL: CHANNEL}.get(value, value)
            assert run(program, number, tuple(arguments)) == ALLOW
            for only in (only for only in allowed[number].only if not only.negated):
                wrong = [*arguments[: only.argument], 0xFFFF_FFFF ^ arguments[only.argument], 0, 0, 0, 0, 0]
                assert run(program, number, tuple(wrong[:6])) == EPERM
        elif number in refused:
            assert run(program, number) == EPERM
        else:
            assert run(program, number) == (ENOSYS if number > calls.LAST_KNOWN or number == 435 else KILL_PROCESS)  # noqa: PLR2004


def numbers_of(header: Path) -> dict[str, int]:
    """Return the numbers of calls that a header defines."""
    return {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)$", header.read_text(), re.M)}


def test_numbers_are_the_kernels() -> None:
    """The numbers of x86-64 are those of the system's header; those of aarch64 where the generic header says one."""
    headers = [Path(p) for p in ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")]
    if not all(header.exists() for header in headers):
        pytest.skip("needs the kernel's headers")
    x86_64, generic = (numbers_of(header) for header in headers)
    checked = 0
    for name, *numbers in calls.table():
        for known, number in zip((x86_64, generic), numbers, strict=True):
            if name in known and number is not None:
                assert known[name] == number, name
                checked += 1
    assert checked > 300  # noqa: PLR2004 - most of them


def test_nothing_is_said_twice() -> None:
    """A call is allowed once for each kind, or refused."""
    names = [name for name, _ in calls.refused()]
    assert len(names) == len(set(names))
    for kind in (calls.WORKER, calls.PYTHON, calls.PAGER):
        allowed = [call.name for call in calls.ALLOWED if kind in call.kinds]
        assert len(allowed) == len(set(allowed))
        assert not set(allowed) & set(names)


#: Has more descriptors than it was given.
HOARDS: Final = """
import json, os
from vhostmp.workers import sandbox
fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
sandbox.keep_only(fds[1:3])
def is_open(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
print(json.dumps([fds[1:3], [fd for fd in range(1000) if is_open(fd)]]))
"""


def test_descriptors_that_nobody_gave() -> None:
    """All but those that are to be kept, and the standard streams, are closed."""
    done = subprocess.run([sys.executable, "-c", HOARDS], stdout=subprocess.PIPE, text=True, check=True)
    kept, left = json.loads(done.stdout)
    assert left == [0, 1, 2, *kept]


#: Tries what Landlock alone has to refuse, and says what came of each.
TRIES: Final = """
import json, os, socket
from vhostmp.workers import sandbox
from vhostmp.workers.sandbox import kernel
parent = os.getppid()
name = chr(0) + "vhostmp-%d" % os.getpid()
listener = socket.socket(socket.AF_UNIX); listener.bind(name); listener.listen()
ended, end = os.pipe()
if not os.fork():  # one outside, which listens as long as we live
    os.close(end); os.read(ended, 1); os._exit(0)
sandbox.restrict()
abi = kernel.landlock_abi()
def outcome(what):
    try: what()
    except OSError as error: return error.errno
    return 0
print(json.dumps({
    "abi": abi,
    "read": outcome(lambda: os.open("/etc/passwd", os.O_RDONLY)),
    "write": outcome(lambda: os.open("/tmp", os.O_TMPFILE | os.O_RDWR)),
    "exec": outcome(lambda: os.execv("/bin/true", ["true"])),
    "tcp": outcome(lambda: socket.socket(socket.AF_INET).bind(("127.0.0.1", 0))),
    "abstract": outcome(lambda: socket.socket(socket.AF_UNIX).connect(name)),
    "signal": outcome(lambda: os.kill(parent, 0)),
}), flush=True)
os.close(1); os._exit(0)
"""


def test_landlock_by_itself() -> None:
    """Should a call get past the filter: no path can be opened or executed, no port bound, nobody outside reached."""
    with subprocess.Popen([sys.executable, "-c", TRIES], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        found = json.loads(child.stdout.readline())
        child.kill()
    abi = found.pop("abi")
    if not abi:
        pytest.skip("the kernel has no Landlock")
    wanted = {"read": errno.EACCES, "write": errno.EACCES, "exec": errno.EACCES}
    wanted |= {"tcp": errno.EACCES} if abi >= min(NET_RIGHTS) else {}
    wanted |= {"abstract": errno.EPERM, "signal": errno.EPERM} if abi >= min(SCOPES) else {}
    assert {name: number for name, number in found.items() if name in wanted} == wanted
