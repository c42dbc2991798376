"""`vhostmp upgrade`: a running server moves to the code that is installed now, without a packet lost.

The same road as after a death (adoption.py), taken on purpose, in four steps:

1. The server has its own command line run by the code that is installed now, as a process that only *looks*: it reads
   the records, maps the control segment, makes the devices of what it finds, and changes nothing. What it refuses (a
   control segment of another layout, records of another schema, options that it has not, code that does not start) ends
   the upgrade in one line, and the old code goes on serving.
2. The server executes that code in its own place: same process, same command line. Its descriptors close, the holder
   sees it go and come, and it adopts what it served a moment ago. Workers forward meanwhile.
3. It starts a new spawner.
4. One worker after the other: its rings move to a spare worker of the new spawner, by the road of every move
   (steps.py), it ends, a new one takes its slot, and the rings move back. Then the old spawner ends.

Should it die in the middle, the next one goes on with what is left of step 4: the pool's record says which workers are
the old spawner's.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from vhostmp import __version__, control_api
from vhostmp.errors import LocalError, SysError
from vhostmp.systemd_store import HANDED, as_handed

log = logging.getLogger(__name__)

#: In the environment of code that is run by an upgrade: "look", or "go on" with the version before.
VARIABLE: Final = "VHOSTMP_UPGRADE"
LOOK: Final = "look"
#: How long the new code may take to say what it thinks, and everything to be moved to it, seconds.
LOOK_SECONDS: Final = 30.0
DONE_SECONDS: Final = 120.0
_POLL_SECONDS: Final = 0.05


def is_look() -> bool:
    """Whether we are to look, and change nothing."""
    return os.environ.get(VARIABLE) == LOOK


def take_version_before() -> str | None:
    """Return the version of the code that executed us in its place, once; None: nothing did."""
    return os.environ.pop(VARIABLE, None)


def command_line() -> list[str]:
    """Return how this server was started."""
    return [sys.executable, *sys.orig_argv[1:]]


def look(handed: Mapping[str, int]) -> str:
    """Have the code that is installed now look at what it would take up. Returns: its version.

    `handed`: FdStore.handover.

    Raises: LocalError: it refuses, or does not start; in one line. SysError: there is no room for a process.
    """
    try:
        done = subprocess.run(
            command_line(),
            env=_environment(LOOK, handed),
            pass_fds=tuple(handed.values()),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LOOK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LocalError(f"the new code says nothing within {LOOK_SECONDS:g} s: the old one goes on") from error
    except OSError as error:
        raise SysError.wrap("cannot start the new code", error) from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise LocalError(f"the new code cannot go on, and the old one does: {said.removeprefix('vhostmp: ')}")
    try:
        return str(json.loads(done.stdout)["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise LocalError("the new code does not know how to be upgraded to: the old one goes on") from error


def _environment(what: str, handed: Mapping[str, int]) -> dict[str, str]:
    return {**os.environ, VARIABLE: what, **({HANDED: as_handed(handed)} if handed else {})}


def execute(handed: Mapping[str, int]) -> None:
    """Execute the code that is installed now in place of this process. Returns when that fails, which is logged."""
    sys.stdout.flush()
    sys.stderr.flush()
    words = command_line()
    try:
        for fd in handed.values():
            os.set_inheritable(fd, True)
        os.execve(words[0], words, _environment(__version__, handed))
    except OSError as error:
        for fd in handed.values():
            os.set_inheritable(fd, False)
        log.error("cannot execute the new code, the old one goes on: %s", error.strerror)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments, after those of every command that asks a running server."""
    parser.description = (
        "Move a running server to the code that is installed now, workers included, one at a time. What it cannot go "
        "on with is said in one line, and the old code goes on serving."
    )
    parser.epilog = "example:\n  pip install --upgrade vhostmp && vhostmp upgrade --control-path /run/net0.ctl"


def run(args: argparse.Namespace) -> int:
    """Do it, and wait until it is done; returns the exit status. Raises: LocalError: a refusal, or no answer."""
    begun: Mapping[str, Any] = control_api.call(args.control_path, {"cmd": "upgrade"})
    started, limit = time.monotonic(), time.monotonic() + DONE_SECONDS
    state = None
    while state is None or state.get("adoptions", 0) <= begun["adoptions"] or state.get("renewing"):
        if time.monotonic() > limit:
            raise LocalError(f"not done within {DONE_SECONDS:g} s: the server's log has more")
        time.sleep(_POLL_SECONDS)
        try:
            state = control_api.call(args.control_path, {"cmd": "show"})
        except LocalError:
            state = None  # between two programs
    result: dict[str, Any] = {
        "from": begun["from"],
        "to": state["version"],
        "pid": state["pid"],
        "workers": [worker["pid"] for worker in state["workers"]],
        "seconds": round(time.monotonic() - started, 3),
    }
    if args.json:
        print(json.dumps(result))
    else:
        pids = " ".join(map(str, result["workers"]))
        print(f"{result['from']} -> {result['to']} in {result['seconds']:.1f} s; workers: {pids}")
    return 0
