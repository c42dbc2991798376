"""A server for one machine that boots from the network: an address by DHCP, a file of one block by TFTP.

    python bootserver.py INTERFACE SERVER-ADDRESS CLIENT-ADDRESS FILE

Standard output, a line each: ``ready``, ``offered MAC``, ``leased MAC ADDRESS``, ``asked ADDRESS NAME`` for the file,
and ``taken ADDRESS`` once the client has acknowledged all of it. Ends when its standard input does.

Rules: run inside the network namespace, as a program of its own. Everything it does not understand it ignores: this is
no server for more than a test. Sources: RFC 2131, RFC 2132 (DHCP), RFC 1350 (TFTP).
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
from pathlib import Path

DHCP_SERVER_PORT, DHCP_CLIENT_PORT, TFTP_PORT = 67, 68, 69
BOOTREQUEST, BOOTREPLY = 1, 2
COOKIE = b"\x63\x82\x53\x63"
_BOOTP = struct.Struct("!4B I 2H 4s 4s 4s 4s 16s 64s 128s 4s")
"""op, hardware type, its length, hops; transaction; seconds, flags; four addresses; hardware address; names; cookie."""
DISCOVER, OFFER, REQUEST, ACK = 1, 2, 3, 5
PAD, NETMASK, ROUTER, LEASE_SECONDS, KIND, SERVER, END = 0, 1, 3, 51, 53, 54, 255
RRQ, DATA, TFTP_ACK = 1, 3, 4
BLOCK_BYTES = 512


def say(*words: object) -> None:
    """Print a line at once."""
    print(*words, flush=True)


def options(data: bytes) -> dict[int, bytes]:
    """Take the options of a DHCP message apart."""
    found: dict[int, bytes] = {}
    place = 0
    while place < len(data) and data[place] != END:
        if data[place] == PAD:
            place += 1
            continue
        code, length = data[place : place + 2]
        found[code] = data[place + 2 : place + 2 + length]
        place += 2 + length
    return found


class BootServer:
    """The sockets, and what is served."""

    def __init__(self, interface: str, server: str, client: str, file: Path) -> None:
        """Bind both ports to the interface."""
        self._server = socket.inet_aton(server)
        self._client = client
        self._file = file
        self.dhcp = self._bind(interface, DHCP_SERVER_PORT)
        self.dhcp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.tftp = self._bind(interface, TFTP_PORT)

    @staticmethod
    def _bind(interface: str, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        sock.bind(("", port))
        return sock

    def answer_dhcp(self) -> None:
        """Offer, or lease, the one address."""
        data = self.dhcp.recv(2048)
        if len(data) < _BOOTP.size:
            return
        op, kind, length, _, xid, _, flags, *_, mac, _, _, cookie = _BOOTP.unpack_from(data)
        asked = options(data[_BOOTP.size :]).get(KIND, b"\0")[0]
        if op != BOOTREQUEST or cookie != COOKIE or asked not in (DISCOVER, REQUEST):
            return
        answer = OFFER if asked == DISCOVER else ACK
        none, name = bytes(4), str(self._file.name).encode()
        reply = _BOOTP.pack(
            *(BOOTREPLY, kind, length, 0, xid, 0, flags),
            *(none, socket.inet_aton(self._client), self._server, none, mac, b"", name, COOKIE),
        )
        for code, value in (
            (KIND, bytes([answer])),
            (SERVER, self._server),
            (LEASE_SECONDS, struct.pack("!I", 3600)),
            (NETMASK, socket.inet_aton("255.255.255.0")),
            (ROUTER, self._server),
        ):
            reply += bytes([code, len(value)]) + value
        self.dhcp.sendto(reply + bytes([END]), ("255.255.255.255", DHCP_CLIENT_PORT))
        who = mac[:length].hex(":")
        say(*(("offered", who) if answer == OFFER else ("leased", who, self._client)))

    def answer_tftp(self) -> None:
        """Send the one block, and take note of its acknowledgement; a client that wants options gets none of them."""
        data, address = self.tftp.recvfrom(2048)
        (op,) = struct.unpack_from("!H", data)
        if op == RRQ:
            say("asked", address[0], data[2:].split(b"\0")[0].decode())
            self.tftp.sendto(struct.pack("!HH", DATA, 1) + self._file.read_bytes()[: BLOCK_BYTES - 1], address)
        elif data == struct.pack("!HH", TFTP_ACK, 1):
            say("taken", address[0])


def main() -> None:
    """Serve until standard input ends."""
    interface, server, client, file = sys.argv[1:]
    served = BootServer(interface, server, client, Path(file))
    say("ready")
    while True:
        ready, _, _ = select.select([served.dhcp, served.tftp, sys.stdin], [], [])
        if served.dhcp in ready:
            served.answer_dhcp()
        if served.tftp in ready:
            served.answer_tftp()
        if sys.stdin in ready and not os.read(sys.stdin.fileno(), 1):
            return


if __name__ == "__main__":
    main()
