"""A control process that the spawner tests start and kill: a pool with a device under traffic, and busy threads.

Run as `python -m tests.integration.embedder WORKERS`. It prints one JSON line when everything runs, with its segment
and its processes, and goes on until it is killed. Its guest counts on: traffic never stops.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from tests.helpers import descendants
from tests.integration.traffic import Traffic
from tests.net_driver import Guest
from vhostmp.net import NetDevice
from vhostmp.supervisor import Pool


def spin() -> None:
    """Keep a thread busy with what threads do: allocate, take locks, import."""
    lock = threading.Lock()
    while True:
        with lock:
            _ = [bytes(n) for n in range(100)]


def main() -> None:
    """Start everything, say so, and stay."""
    pool = Pool(workers=int(sys.argv[1]))
    guest = Guest(NetDevice(pool, backend="loopback"))
    traffic = Traffic(guest.pairs[0])
    traffic.progress(100)
    threading.Thread(target=spin, daemon=True).start()
    names = [pool.segment_name, guest.rings.name, guest.buffers.memory.name]
    print(json.dumps({"pids": sorted(descendants(os.getpid())), "segments": names}), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
