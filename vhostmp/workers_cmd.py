"""`vhostmp workers`: list a running server's worker processes, start and end them, move queue pairs between them."""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

from vhostmp import control_api, show

_DESCRIPTION: Final = """\
Lists the worker processes of a running server, starts and ends them, and moves queue pairs between them.
"""

_EPILOG: Final = """\
examples:
  vhostmp workers --control-path /tmp/net0.ctl                   the workers, and how many queue pairs each serves
  vhostmp workers --control-path /tmp/net0.ctl new               start another one; prints its id
  vhostmp workers --control-path /tmp/net0.ctl attach 0 1        have worker 1 serve queue pair 0, while packets flow
  vhostmp workers --control-path /tmp/net0.ctl attach --device 1 0 1
  vhostmp workers --control-path /tmp/net0.ctl free 0            end worker 0, which serves nothing any more

New devices go to the workers with the fewest queue pairs; after that a pair stays where it is until it is attached
elsewhere. Both rings of a pair have the same worker, and so have the same pairs of two devices that are patched to each
other: where one is attached, the other goes too.
"""

_MOVED_KEYS: Final = ("device", "pair", "worker", "pid")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments, after those of every command that asks a running server."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    actions = parser.add_subparsers(metavar="ACTION", dest="action", title="actions (default: list)")
    actions.add_parser("list", help="list the workers")
    actions.add_parser("new", help="start a worker")
    free = actions.add_parser("free", help="end a worker that serves nothing")
    free.add_argument("worker", metavar="ID", type=_whole, help="the worker, as listed")
    attach = actions.add_parser("attach", help="have a worker serve a queue pair")
    attach.add_argument("--device", metavar="D", help="name of the device; needed if there are several")
    attach.add_argument("pair", metavar="PAIR", type=_whole, help="the queue pair, from 0 (or queue, if not in pairs)")
    attach.add_argument("worker", metavar="ID", type=_whole, help="the worker, as listed")


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status. Raises: LocalError: no answer, or a refusal."""
    action = args.action or "list"
    request = {"cmd": "workers", "action": action}
    request |= {name: getattr(args, name) for name in ("device", "pair", "worker") if hasattr(args, name)}
    result = control_api.call(args.control_path, request)
    if args.json:
        print(json.dumps(result))
    elif text := _render(action, result):
        print(text)
    return 0


def _whole(text: str) -> int:
    """Take a whole number from 0 on."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _render(action: str, result: Any) -> str:
    if action == "list":
        return show.render_workers(result.get("workers") or ())
    if action == "attach":
        return "\n".join(show.table(_MOVED_KEYS, [[result.get(key) for key in _MOVED_KEYS]]))
    return str(result.get("worker")) if action == "new" else ""
