"""The system calls that a worker and a pager may make, with who makes each; and what becomes of the others.

Three kinds of answers to what is not allowed:

- *EPERM* for what a back-end in Python may try by mistake or in good faith (files, sockets, processes, ids, timers):
  its author gets a PermissionError with a traceback, and the guest loses a batch at most.
- *the end of the process*, by SIGSYS, for everything else (ptrace, other processes' memory, mounts, modules, BPF, keys,
  io_uring ...): nobody calls that by mistake, so who does has been taken over, and is not to try another one. The death
  is logged, counted and shown like every other; the replacement begins with clean memory.
- *ENOSYS* for clone3, whose flags a filter cannot see, and for what is newer than this table: the C library then takes
  the older call.

Each entry says who uses it. tests/integration/test_sandbox_calls.py watches workers at work and compares: a call that
nobody makes has no place here, and one that is made and not here is found before a user finds it.

Numbers: x86-64, aarch64; "-" where the machine has no such call. Source: Linux, arch/x86/entry/syscalls/syscall_64.tbl,
include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import errno
import functools
import re
import sys
from collections.abc import Iterator
from typing import Final

import attrs

from vhostmp.workers.sandbox import kernel
from vhostmp.workers.sandbox.bpf import (
    ALLOW,
    INSTRUCTION_BYTES,
    JEQ_K,
    KILL_PROCESS,
    OPERAND,
    Only,
    Verdict,
    assemble,
    errno_action,
)
from vhostmp.workers.sandbox.kernel import PR_SET_NAME

#: The newest call that this table's author has judged: those of Linux 6.10.
LAST_KNOWN: Final = 462
WORKER, PYTHON, PAGER = "worker", "python", "pager"
"""Kinds of processes: a worker without back-ends in Python, one with them, a pager."""

PROT_EXEC: Final = 4
AT_EMPTY_PATH: Final = 0x1000
# linux/sched.h: what a thread has, and what is a process's or a namespace's
CLONE_THREAD: Final = 0x100 | 0x800 | 0x10000  # VM, SIGHAND, THREAD
CLONE_NEW: Final = 0x20000 | 0x7E000000
F_GETFL, F_DUPFD_CLOEXEC = 3, 1030
# linux/falloc.h: KEEP_SIZE with PUNCH_HOLE or ZERO_RANGE
PUNCH_HOLE, ZERO_RANGE = 0x03, 0x11
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F
USERFAULTFD_IOC_NEW, UFFDIO_API, UFFDIO_REGISTER = 0xAA00, 0xC018AA3F, 0xC020AA00

_EPERM: Final = errno_action(errno.EPERM)

#: These stand for the process's id and the number of its channel's descriptor: no argument has such values.
OWN, CHANNEL = 0xFFFF_FFF0, 0xFFFF_FFF1


@attrs.frozen
class Call:
    """An allowed call: who makes it and what for, and which arguments it may have (EPERM with others)."""

    name: str
    numbers: tuple[int | None, int | None]
    kinds: frozenset[str]
    used_by: str
    only: tuple[Only, ...] = ()
    hot: bool = False

    @property
    def number(self) -> int | None:
        """Its number on this machine."""
        return self.numbers[0 if kernel.MACHINE == "x86_64" else 1]


def _call(line: str, used_by: str, kinds: str = "worker python", *only: Only, hot: bool = False) -> Call:
    name, *numbers = line.split()
    x86_64, aarch64 = (None if number == "-" else int(number) for number in numbers)
    return Call(name, (x86_64, aarch64), frozenset(kinds.split()), used_by, only, hot)


_ALL: Final = "worker python pager"

ALLOWED: Final = (
    # -- the data path
    _call("writev 20 66", "tap and packet sockets: a frame to the network", hot=True),
    _call("readv 19 65", "tap and packet sockets: a frame from the network", hot=True),
    _call("io_submit 209 2", "an interrupt to the guest, a message to the front-end (_signal.pyx)", hot=True),
    _call("preadv2 327 286", "taking a kick without sleeping; a disk's reads", hot=True),
    _call("epoll_wait 232 -", "sleeping until there is work", hot=True),
    _call("epoll_pwait 281 22", "the same where there is no epoll_wait", hot=True),
    _call("write 1 64", "an eventfd of our own, the fallback of _signal.pyx", hot=True),
    _call("read 0 63", "an eventfd of our own; what a character device of random bytes has", hot=True),
    _call("futex 202 98", "locks of threads; waking who waits for a grace period", _ALL, hot=True),
    _call("io_getevents 208 4", "clearing what io_submit has left lying"),
    _call("poll 7 -", "the fallback of _signal.pyx; a character device of random bytes"),
    _call("ppoll 271 73", "the same where there is no poll"),
    _call("pwritev2 328 287", "a disk's writes"),
    _call("pread64 17 67", "frames left over, and the note of a disk's flushes"),
    _call("pwrite64 18 68", "zeroes to a disk that has no other way, and the note of its flushes"),
    _call("fallocate 285 47", "discard, write-zeroes of a disk", "worker python", Only(1, (PUNCH_HOLE, ZERO_RANGE))),
    _call("fdatasync 75 83", "a disk's flush"),
    _call("flock 73 32", "one flush of a disk at a time among its workers"),
    _call("getrandom 318 278", "random bytes for a guest"),
    # -- the channel and the log
    _call("recvmsg 47 212", "messages of the control process, with descriptors", _ALL),
    _call("sendmsg 46 211", "answers, over the channel alone: a name could come with it", _ALL, Only(0, (CHANNEL,))),
    _call("recvfrom 45 207", "the pager's touching threads; sockets of back-ends in Python", "python pager"),
    _call("sendto 44 206", "log records; the pager's touching threads; naming nobody", _ALL, Only(4, (0,), wide=True)),
    # -- preparing and retiring
    _call(
        "ioctl 16 29",
        # Not FIONBIO: whether an open file blocks concerns whoever shares it, the control process among them.
        "discard of a block device; userfaultfds in post-copy",
        "worker python",
        Only(1, (BLKDISCARD, BLKZEROOUT, USERFAULTFD_IOC_NEW, UFFDIO_API, UFFDIO_REGISTER)),
    ),
    _call("ioctl 16 29", "userfaultfds", PAGER, Only(1, (USERFAULTFD_IOC_NEW, UFFDIO_API, UFFDIO_REGISTER))),
    _call("epoll_ctl 233 21", "watching kicks and back-ends"),
    # Not the channel's: its number would be free for another socket, whose sendmsg could name somebody.
    _call("close 3 57", "descriptors that are not needed any more", _ALL, Only(0, (CHANNEL,), negated=True)),
    _call("fcntl 72 25", "duplicates of descriptors", _ALL, Only(1, (F_DUPFD_CLOEXEC, F_GETFL))),
    _call("fstat 5 80", "the size of a file that was sent", _ALL),
    _call("newfstatat 262 79", "the same, as the C library asks it", _ALL, Only(3, (AT_EMPTY_PATH,), AT_EMPTY_PATH)),
    _call("memfd_create 319 279", "frames that go along with a queue pair to another worker"),
    _call("eventfd2 290 19", "a disk's and an entropy device's way to have a queue looked at again"),
    _call("pipe2 293 59", "the end of the thread that reads random bytes"),
    # -- memory
    _call("mmap 9 222", "guest memory, logs, the heap, stacks; nothing executable", _ALL, Only(2, (0,), PROT_EXEC)),
    _call("munmap 11 215", "the same when it ends", _ALL),
    _call("mprotect 10 226", "the heap, stacks of threads; nothing executable", _ALL, Only(2, (0,), PROT_EXEC)),
    _call("mremap 25 216", "the heap: a large block that grows", _ALL),
    _call("madvise 28 233", "guest memory that is kept out of core dumps; stacks of threads that have ended", _ALL),
    _call("brk 12 214", "the heap", _ALL),
    # -- threads, signals, the end
    _call("clone 56 220", "a thread for flushes, for random bytes, of a back-end in Python", "worker python",
          Only(0, (CLONE_THREAD,), CLONE_THREAD | CLONE_NEW)),
    _call("rseq 334 293", "a thread's start"),
    _call("set_robust_list 273 99", "a thread's start"),
    _call("rt_sigprocmask 14 135", "a thread's start and end", _ALL),
    _call("gettid 186 178", "a thread's start", _ALL),
    _call("getpid 39 172", "log records; the check of who has made the asynchronous context", _ALL),
    _call("exit 60 93", "a thread's end", _ALL),
    _call("exit_group 231 94", "the end", _ALL),
    _call("tgkill 234 131", "abort(): of the process itself alone", _ALL, Only(0, (OWN,))),
    _call("rt_sigaction 13 134", "abort()", _ALL),
    _call("rt_sigreturn 15 139", "coming back from a signal handler", _ALL),
    _call("prctl 157 167", "the name of a spare that becomes a worker", "worker python", Only(0, (PR_SET_NAME,))),
    _call("restart_syscall 219 128", "going on after SIGSTOP and SIGCONT", _ALL),
    # -- time, where the vDSO has to ask the kernel
    _call("clock_gettime 228 113", "a CPU's time; all of them on a machine without a usable counter", _ALL),
    _call("clock_nanosleep 230 115", "sleeping, in back-ends in Python and in a flush that is tried again"),
    # -- what back-ends in Python ask for and is harmless
    _call("pselect6 270 72", "select.select", PYTHON),
    _call("select 23 -", "the same, with older C libraries", PYTHON),
    _call("lseek 8 62", "a file that a module has opened", PYTHON),
    _call("getppid 110 173", "os.getppid", PYTHON),
    _call("getuid 102 174", "os.getuid", PYTHON),
    _call("geteuid 107 175", "os.geteuid", PYTHON),
    _call("getgid 104 176", "os.getgid", PYTHON),
    _call("getegid 108 177", "os.getegid", PYTHON),
    _call("uname 63 160", "os.uname, platform", PYTHON),
    _call("times 100 153", "os.times", PYTHON),
    _call("getrusage 98 165", "resource.getrusage", PYTHON),
    _call("sched_getaffinity 204 123", "os.sched_getaffinity, os.cpu_count", PYTHON),
    _call("sched_yield 24 124", "os.sched_yield", PYTHON),
)  # fmt: skip

_REFUSED: Final = """
files: access 21 -, faccessat 269 48, faccessat2 439 439, open 2 -, openat 257 56, openat2 437 437, creat 85 -,
name_to_handle_at 303 264, open_by_handle_at 304 265, stat 4 -, lstat 6 -, statx 332 291, statfs 137 43,
fstatfs 138 44, readlink 89 -, readlinkat 267 78, getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80 49,
fchdir 81 50, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38,
renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, mknod 133 -, mknodat 259 33,
truncate 76 45, ftruncate 77 46, chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -,
fchown 93 55, lchown 94 -, fchownat 260 54, utime 132 -, utimes 235 -, utimensat 280 88, futimesat 261 -,
umask 95 166, getxattr 191 8, lgetxattr 192 9, fgetxattr 193 10, listxattr 194 11, llistxattr 195 12,
flistxattr 196 13, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15,
fremovexattr 199 16, inotify_init 253 -, inotify_init1 294 26, inotify_add_watch 254 27, fanotify_init 300 262,
sendfile 40 71, splice 275 76, tee 276 77, vmsplice 278 75, copy_file_range 326 285, sync 162 81, syncfs 306 267,
fsync 74 82, sync_file_range 277 84, fadvise64 221 223
sockets: socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242,
getsockname 51 204, getpeername 52 205, setsockopt 54 208, getsockopt 55 209, shutdown 48 210, sendmmsg 307 269,
recvmmsg 299 243, preadv 295 69, pwritev 296 70, readahead 187 213, inotify_rm_watch 255 28
processes: fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, wait4 61 260, waitid 247 95, kill 62 129,
tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_open 434 434, pidfd_send_signal 424 424,
getpgrp 111 -, getpgid 121 155, setpgid 109 154, getsid 124 156, setsid 112 157, getpriority 140 141,
setpriority 141 140, sched_setaffinity 203 122, sched_setscheduler 144 119, sched_getscheduler 145 120,
sched_getparam 143 121, sched_setparam 142 118, sched_setattr 314 274, sched_getattr 315 275, ioprio_set 251 30,
ioprio_get 252 31, getgroups 115 158, getresuid 118 148, getresgid 120 150, setuid 105 146, setgid 106 144,
setreuid 113 145, setregid 114 143, setresuid 117 147, setresgid 119 149, setgroups 116 159, setfsuid 122 151,
setfsgid 123 152, capget 125 90, capset 126 91, getrlimit 97 163, setrlimit 160 164, prlimit64 302 261,
sysinfo 99 179, syslog 103 116, arch_prctl 158 -, getcpu 309 168, membarrier 324 283
time and signals: alarm 37 -, getitimer 36 102, setitimer 38 103, timer_create 222 107, timer_settime 223 110,
timer_gettime 224 108, timer_delete 226 111, timerfd_create 283 85, timerfd_settime 286 86, timerfd_gettime 287 87,
signalfd 282 -, signalfd4 289 74, pause 34 -, rt_sigsuspend 130 133, rt_sigtimedwait 128 137, rt_sigpending 127 136,
timer_getoverrun 225 109, sched_get_priority_max 146 125, sched_get_priority_min 147 126,
sched_rr_get_interval 148 127, sigaltstack 131 132, nanosleep 35 101, clock_getres 229 114, gettimeofday 96 169,
time 201 -
descriptors and memory: dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, epoll_create 213 -, epoll_create1 291 20,
close_range 436 436, mlock 149 228, munlock 150 229, mlockall 151 230, munlockall 152 231, mlock2 325 284,
mincore 27 232, msync 26 227, memfd_secret 447 447, shmget 29 194, shmat 30 196, shmctl 31 195, shmdt 67 197,
semget 64 190, semop 65 193, semctl 66 191, semtimedop 220 192, msgget 68 186, msgsnd 69 189, msgrcv 70 188,
msgctl 71 187, mq_open 240 180, mq_unlink 241 181, mq_timedsend 242 182, mq_timedreceive 243 183, mq_notify 244 184,
mq_getsetattr 245 185, eventfd 284 -, epoll_pwait2 441 441, futex_waitv 449 449, get_robust_list 274 100,
get_mempolicy 239 236, set_mempolicy 238 237, mbind 237 235
fences: landlock_create_ruleset 444 444, landlock_add_rule 445 445, landlock_restrict_self 446 446, seccomp 317 277
"""
CLONE3: Final = 435


def _refused() -> Iterator[tuple[str, int | None, int | None]]:
    """Go through the calls that are answered EPERM, as (name, number on x86-64, number on aarch64)."""
    for entry in re.finditer(r"(\w+) (\d+|-) (\d+|-)", _REFUSED):
        name, *numbers = entry.groups()
        x86_64, aarch64 = (None if number == "-" else int(number) for number in numbers)
        yield name, x86_64, aarch64


def table() -> Iterator[tuple[str, int | None, int | None]]:
    """Go through all calls that are known here, as (name, number on x86-64, number on aarch64)."""
    yield from ((call.name, *call.numbers) for call in ALLOWED)
    yield from _refused()
    yield "clone3", CLONE3, CLONE3


def refused() -> Iterator[tuple[str, int]]:
    """Go through the calls that are answered EPERM, as (name, number on this machine)."""
    for name, x86_64, aarch64 in _refused():
        number = x86_64 if kernel.MACHINE == "x86_64" else aarch64
        if number is not None:
            yield name, number


@functools.cache
def template(kind: str) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    """Return the filter for a kind of process, and where in it OWN and CHANNEL are to be replaced: (offset, which).

    The spawner calls it once for each, so that no worker has to. OSError: no such machine.
    """
    verdicts = {number: Verdict(_EPERM) for _, number in refused()}
    verdicts[CLONE3] = Verdict(errno_action(errno.ENOSYS))
    hot: list[int] = []
    for call in ALLOWED:
        if call.number is not None:
            if kind in call.kinds:
                verdicts[call.number] = Verdict(ALLOW, call.only, _EPERM)
                hot += [call.number] if call.hot else []
            else:
                verdicts.setdefault(call.number, Verdict(_EPERM))
    code = assemble(
        kernel.architecture(),
        verdicts,
        hot=hot,
        last=LAST_KNOWN,
        unknown=errno_action(errno.ENOSYS),
        default=KILL_PROCESS,
    )
    places = [
        (offset + OPERAND, which)
        for offset in range(0, len(code), INSTRUCTION_BYTES)
        for which in (OWN, CHANNEL)
        if code[offset : offset + 2] == JEQ_K.to_bytes(2, sys.byteorder)
        and int.from_bytes(code[offset + OPERAND : offset + INSTRUCTION_BYTES], sys.byteorder) == which
    ]
    return code, tuple(places)


def program(kind: str, own_pid: int, channel: int) -> bytes:
    """Return the filter for process `own_pid` of a kind, whose channel is that descriptor. OSError: no such machine."""
    code, places = template(kind)
    patched = bytearray(code)
    for offset, which in places:
        value = own_pid if which == OWN else channel
        patched[offset : offset + 4] = value.to_bytes(4, sys.byteorder)
    return bytes(patched)
