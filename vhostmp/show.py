"""`vhostmp show` and `vhostmp swap`: ask a running server, print a table for people or, with `--json`, the data itself.

Rules: a key that is missing in an answer is shown as `-`, so that a newer command can look at an older server.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

from vhostmp import control_api
from vhostmp.rings import place

Data = Mapping[str, Any]

_RING_COLUMNS: Final = (
    ("ring", "index"),
    ("size", "size"),
    ("avail", "avail_idx"),
    ("used", "used_idx"),
    ("last", "last_avail_idx"),
    ("kicks", "kicks"),
    ("calls", "calls"),
    ("held back", "calls_suppressed"),
    ("packets", "packets"),
    ("bytes", "bytes"),
    ("copied", "copied"),
    ("repeated", "repeated"),
    ("lost", "lost"),
    ("worker", "worker"),
    ("pid", "worker_pid"),
    ("deaths", "deaths"),
)
_WORKER_COLUMNS: Final = (
    ("worker", "index"),
    ("pid", "pid"),
    ("pairs", "pairs"),
    ("cpu", "cpu"),
    ("restarts", "restarts"),
    ("hangs", "hangs"),
    ("items", "items"),
    ("wake-ups", "wakeups"),
)
_MEBIBYTE: Final = 1 << 20


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lay out columns, right-aligned, two blanks apart; None is `-`."""
    cells = [list(head), *(["-" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _indent(lines: Iterable[str]) -> list[str]:
    return ["  " + line for line in lines]


def _words(value: object) -> str:
    return " ".join(map(str, cast("list[object]", value))) if isinstance(value, list) and value else "-"


def _hex(value: object) -> str:
    return hex(value) if isinstance(value, int) else "-"


def _ring_state(ring: Data) -> str:
    if ring.get("broken"):
        return f"broken: {ring['broken']}"
    if not ring.get("started"):
        return "stopped"
    return "running" if ring.get("enabled") else "disabled"


def _ring_cell(ring: Data, key: str) -> object:
    value = ring.get(key)
    return place(value) if ring.get("packed") and key.endswith("_idx") and isinstance(value, int) else value


def _drops(ring: Data) -> str:
    drops: Data = ring.get("drops") or {}
    return " ".join(f"{reason}={count}" for reason, count in drops.items() if count) or "-"


def _dirty_log(device: Data) -> str:
    size = device.get("log_bytes")
    where = "-" if size is None else f"{size} bytes"
    if not device.get("logging"):
        return "off"
    rings: Sequence[Data] = device.get("queues") or ()
    logged, outside = (sum(ring.get(key) or 0 for ring in rings) for key in ("log_pages", "log_outside"))
    return f"{where}, {logged} pages logged, {outside} outside of it"


def _device(device: Data) -> list[str]:
    connection = "connected" if device.get("connected") else "no front-end"
    facts = (
        ("back-end", device.get("backend")),
        ("generation", device.get("generation")),
        ("socket", f"{device.get('socket')} ({connection})"),
        ("offered", _words(device.get("features"))),
        ("acked", _words(device.get("acked_features"))),
        ("protocol", _words(device.get("protocol_features"))),
        ("dirty log", _dirty_log(device)),
    )
    lines = [
        f"device {device.get('device')} ({device.get('class', '-')})",
        *_indent(f"{name + ':':<12}{value}" for name, value in facts),
    ]
    if device.get("refused"):
        lines += _indent([f"{'refused:':<12}{device['refused']}"])
    if device.get("patch"):
        lines += _indent([f"{'patch:':<12}{device['patch']}"])
    iotlb: Data | None = device.get("iotlb")
    if iotlb:
        lines += _indent([f"{'IOTLB:':<12}" + " ".join(f"{name}={count}" for name, count in iotlb.items())])
    regions: Sequence[Data] = device.get("regions") or ()
    if regions:
        rows = [(_hex(region.get("gpa")), _hex(region.get("size")), _hex(region.get("uva"))) for region in regions]
        lines += ["", *_indent(table(("guest-physical", "size", "front-end address"), rows))]
    rings: Sequence[Data] = device.get("queues") or ()
    if rings:
        head = [title for title, _ in _RING_COLUMNS] + ["state", "drops"]
        cells = [
            [_ring_cell(ring, key) for _, key in _RING_COLUMNS] + [_ring_state(ring), _drops(ring)] for ring in rings
        ]
        lines += ["", *_indent(table(head, cells))]
    return lines


def _memory(worker: Data) -> str:
    size = worker.get("rss_bytes")
    return f"{size / _MEBIBYTE:.1f} MiB" if isinstance(size, int) else "-"


def render(state: Data) -> str:
    """Return the state of a server as text for people, without a last newline."""
    blocks = [_device(device) for device in state.get("devices") or ()]
    workers: Sequence[Data] = state.get("workers") or ()
    return "\n\n".join([*_adopted(state), *("\n".join(block) for block in blocks), render_workers(workers)])


def _adopted(state: Data) -> list[str]:
    """Say when the server took up what another process served, if it did."""
    adopted: Data | None = state.get("adopted")
    if not adopted:
        return []
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(adopted.get("at")))
    if adopted.get("from_pid") == state.get("pid"):
        return [f"upgraded {at}, adoption {adopted.get('count')} of what is served"]
    return [f"adopted {at} from process {adopted.get('from_pid')}, adoption {adopted.get('count')} of these workers"]


def render_workers(workers: Sequence[Data]) -> str:
    """Return the workers of a server as text for people, without a last newline."""
    rows = [[worker.get(key) for _, key in _WORKER_COLUMNS] + [_memory(worker)] for worker in workers]
    return "\n".join(table([title for title, _ in _WORKER_COLUMNS] + ["memory"], rows))


def render_swap(result: Data) -> str:
    """Return the result of a swap as text for people, without a last newline."""
    keys = ("device", "backend", "generation", "grace_us", "pause_us", "packets_crossed", "frames_left")
    values = [result.get(key) for key in keys]
    lines = table(keys, [[f"{value:.1f}" if isinstance(value, float) else value for value in values]])
    if not any(result.get(key) for key in ("grace_us", "pause_us", "packets_crossed")):
        lines = [*lines, "no ring runs: nobody had to wait"]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Do `vhostmp show`; returns the exit status. Raises: LocalError: no answer, or a refusal."""
    state = control_api.call(args.control_path, {"cmd": "show"})
    print(json.dumps(state) if args.json else render(state))
    return 0


def run_swap(args: argparse.Namespace) -> int:
    """Do `vhostmp swap`; returns the exit status. Raises: LocalError: no answer, or a refusal."""
    request = {"cmd": "swap", "device": args.device, "backend": args.backend}
    result = control_api.call(args.control_path, request)
    print(json.dumps(result) if args.json else render_swap(result))
    return 0
