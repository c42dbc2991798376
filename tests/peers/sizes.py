"""Watches a network device from outside and says how large the frames get that pass it, each way.

    python sizes.py INTERFACE

Standard output, a line each: ``ready``, and ``in BYTES`` or ``out BYTES`` whenever a frame is larger than any before it
in that direction, as the kernel sees it: "in" is what the device received, from the guest when it is a tap. Ends with
its standard input.
"""

from __future__ import annotations

import os
import select
import socket
import sys

ETH_P_ALL = 3
HEADER_BYTES = 128


def main() -> None:
    """Watch until standard input ends."""
    (interface,) = sys.argv[1:]
    largest = {"in": 0, "out": 0}
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sock:
        sock.bind((interface, ETH_P_ALL))
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([sock, sys.stdin], [], [])
            if sock in ready:
                buffer = bytearray(HEADER_BYTES)
                size, address = sock.recvfrom_into(buffer, HEADER_BYTES, socket.MSG_TRUNC)
                direction = "out" if address[2] == socket.PACKET_OUTGOING else "in"
                if size > largest[direction]:
                    largest[direction] = size
                    print(direction, size, flush=True)
            if sys.stdin in ready and not os.read(sys.stdin.fileno(), 1):
                return


if __name__ == "__main__":
    main()
