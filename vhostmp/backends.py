"""Control-side set-up of a network device's back-ends: from what a user writes to a part that workers can use.

`null`, `null:copy`, `source:BYTES`, `loopback`, `patch:DEVICE`, `tap:NAME`, `tapfd:N[,N...]`, `packet:IFNAME`,
`python:MODULE:CLASS`, `python:FILE.py:CLASS`.

Rules: everything that needs a name, a permission or a file is done here, once; a worker gets descriptors. A back-end is
opened before anything is published, so a mistake changes nothing. What it offers is what it can carry: the offload bits
that it has no support for are not offered to the guest, and it is refused for a guest that has them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, Final

import attrs

from vhostmp.consts import feature_names, mask
from vhostmp.errors import LocalError, SysError
from vhostmp.parts import BackendPart, new_id
from vhostmp.workers.channel import close_all

# virtio 1.3, 5.1.3: what a guest may leave to us, and what it accepts from us.
CSUM, GUEST_CSUM = 0, 1
GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_UFO = 7, 8, 9, 10
HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_UFO = 11, 12, 13, 14
GUEST_USO4, GUEST_USO6, HOST_USO = 54, 55, 56
TCP_OFFLOADS: Final = mask((CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, HOST_TSO4, HOST_TSO6, HOST_ECN))
UFO_OFFLOADS: Final = mask((GUEST_UFO, HOST_UFO))
USO_OFFLOADS: Final = mask((GUEST_USO4, GUEST_USO6, HOST_USO))
OFFLOADS: Final = TCP_OFFLOADS | UFO_OFFLOADS | USO_OFFLOADS
LARGE_RECEIVE: Final = mask((GUEST_TSO4, GUEST_TSO6, GUEST_UFO, GUEST_USO4, GUEST_USO6))

# linux/if_tun.h
TUNSETIFF: Final = 0x400454CA
TUNGETIFF: Final = 0x800454D2
TUNGETFEATURES: Final = 0x800454CF
TUNSETOFFLOAD: Final = 0x400454D0
TUNSETVNETHDRSZ: Final = 0x400454D8
TUNSETVNETLE: Final = 0x400454DC
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
IFF_MULTI_QUEUE: Final = 0x0100
#: guest's feature -> TUN_F_ bit
TUN_OFFLOADS: Final = {
    GUEST_CSUM: 0x01,
    GUEST_TSO4: 0x02,
    GUEST_TSO6: 0x04,
    GUEST_ECN: 0x08,
    GUEST_UFO: 0x10,
    GUEST_USO4: 0x20,
    GUEST_USO6: 0x40,
}
# linux/if.h, linux/sockios.h, linux/if_packet.h
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFMTU = 0x8913, 0x8914, 0x8921
IFF_UP: Final = 1
ETH_P_ALL: Final = 3
ETH_P_RARP: Final = 0x8035
SOL_PACKET: Final = 263
PACKET_ADD_MEMBERSHIP, PACKET_VNET_HDR, PACKET_FANOUT, PACKET_IGNORE_OUTGOING, PACKET_VNET_HDR_SZ = 1, 15, 18, 23, 24
SO_RCVBUFFORCE: Final = 33
PACKET_RECEIVE_BYTES: Final = 8 << 20
PACKET_MR_PROMISC: Final = 1
PACKET_HEADER: Final = 10
PACKET_FANOUT_HASH, PACKET_FANOUT_FLAG_UNIQUEID = 0, 0x2000

VERSION_1: Final = 1 << 32
MRG_RXBUF: Final = 1 << 15
FRAME_OVERHEAD: Final = 14 + 8  # Ethernet header and two VLAN tags
LARGE_FRAME: Final = 65562
SOURCE_MIN: Final = 60  # of a frame without its checksum (IEEE 802.3, 3.2.8)
IFNAMSIZ: Final = 16


def header_len(features: int) -> int:
    """Return the length of virtio_net_hdr in bytes (virtio 1.3, 5.1.6.1)."""
    return 12 if features & (VERSION_1 | MRG_RXBUF) else 10


@attrs.define(eq=False)
class BackendSetup:
    """An open back-end. `offloads` are the feature bits that it can carry; `fds` one a queue pair, or none."""

    spec: str
    kind: str
    #: The interface behind it, where there is one.
    interface: str = ""
    offloads: int = 0
    fds: list[int] = attrs.field(factory=list[int])
    mtu: int = 1500
    is_packet: bool = False
    #: python: the class; source: the bytes of a frame
    reference: str = ""
    header_len: int = 12
    #: Of a patch: the names of the two devices, in order (patches.py). They follow from those: not recorded.
    ends: tuple[str, ...] = ()
    negotiate: Callable[[BackendSetup, int, int], int] | None = None
    id: int = attrs.field(factory=new_id)

    def part(self, features: int) -> BackendPart:
        """Set the back-end up for what the guest acked and return the part that workers make theirs from.

        Raises LocalError when the guest has acked what the back-end cannot carry, SysError when the kernel refuses.
        """
        missing = features & OFFLOADS & ~self.offloads
        if missing and self.kind in ("fd", "python"):
            raise LocalError(
                f"back-end {self.spec} cannot carry {' '.join(feature_names(missing))}, which the guest negotiated: "
                "serve with --offloads off to swap to it",
                errno.EOPNOTSUPP,
            )
        guest_header = header_len(features)
        options: dict[str, Any] = {"guest_header": guest_header}
        if self.kind == "python":
            options["reference"] = self.reference
        elif self.kind == "source":
            options["size"] = int(self.reference)
        elif self.kind == "patch":
            options["ends"] = list(self.ends)
        if self.kind != "fd":
            return BackendPart(setup=self, kind=self.kind, options=options)
        self.header_len = self.negotiate(self, features, guest_header) if self.negotiate else guest_header
        large = features & LARGE_RECEIVE
        want = guest_header + (LARGE_FRAME if large else self.link_mtu() + FRAME_OVERHEAD)
        options |= {"header_len": self.header_len, "want": want, "is_packet": self.is_packet}
        return BackendPart(setup=self, kind=self.kind, options=options, fds=tuple(self.fds), borrowed=True)

    def link_mtu(self) -> int:
        """Return the MTU of the link behind it, in bytes, as it is now: whoever owns the link may have changed it."""
        if self.kind == "fd":
            with contextlib.suppress(OSError):
                self.mtu = _interface(self.interface, SIOCGIFMTU)
        return self.mtu

    def announce(self, mac: bytes) -> None:
        """Tell the network behind it where `mac` is now, by a RARP request from it. Errors do not matter."""
        if not self.fds:
            return
        frame = (
            b"\xff" * 6 + mac + struct.pack("!HHHBBH", ETH_P_RARP, 1, 0x0800, 6, 4, 3) + mac + bytes(4) + mac + bytes(4)
        )
        with contextlib.suppress(OSError):
            os.write(self.fds[0], bytes(self.header_len) + frame.ljust(60, b"\0"))

    def close(self) -> None:
        """Close its descriptors: a tap that is not persistent goes away with them. No worker uses them any more."""
        close_all(self.fds)
        self.fds = []


def kept_backend(values: dict[str, Any], fds: list[int]) -> BackendSetup:
    """Return a back-end that a control process before us opened: its fields but for `fds`, which are taken over."""
    setup = BackendSetup(**values, fds=fds)
    if setup.kind == "fd":
        setup.negotiate = _negotiate_packet if setup.is_packet else _negotiate_tap
    return setup


def open_backend(spec: str, pairs: int) -> BackendSetup:
    """Open the back-end that `spec` names for `pairs` queue pairs.

    Raises LocalError or SysError in one line that says what to do; nothing is left open then.
    """
    if spec in _SIMPLE:
        return BackendSetup(spec, _SIMPLE[spec])
    kind, _, argument = spec.partition(":")
    if kind == "file":
        raise LocalError(f"{spec}: a file is the back-end of a disk: add --device blk")
    if kind in _OPEN and not argument:
        raise LocalError(f"{spec!r} is not complete: write {_FORMS[kind]}")
    if kind not in _OPEN:
        raise _unknown(spec)
    return _OPEN[kind](spec, argument, pairs)


def _unknown(spec: str) -> LocalError:
    return LocalError(
        f"no back-end {spec!r}: use null, null:copy, source:BYTES, loopback, patch:DEVICE, tap:NAME, tapfd:N, "
        "packet:IFNAME, python:MODULE:CLASS or python:FILE.py:CLASS"
    )


def _open_patch(spec: str, argument: str, pairs: int) -> BackendSetup:
    del argument, pairs
    # What the other guest does not take is dropped as it comes: it may be another one tomorrow.
    return BackendSetup(spec, "patch", offloads=OFFLOADS)


def _open_source(spec: str, size: str, pairs: int) -> BackendSetup:
    del pairs
    if not (size.isascii() and size.isdecimal()) or not SOURCE_MIN <= int(size) <= LARGE_FRAME:
        raise LocalError(f"{spec}: say how long frames are, {SOURCE_MIN} to {LARGE_FRAME} bytes, such as source:64")
    return BackendSetup(spec, "source", reference=size)


def _open_python(spec: str, argument: str, pairs: int) -> BackendSetup:
    del pairs
    where, _, name = argument.rpartition(":")
    if not where or not name:
        raise LocalError(f"{spec!r} is not complete: write {_FORMS['python']}")
    # A worker's working directory is ours, but say so explicitly: a swap may come from somewhere else.
    return BackendSetup(
        spec, "python", reference=f"{os.path.abspath(where) if where.endswith('.py') else where}:{name}"
    )


def _check_name(kind: str, name: str) -> None:
    if not 0 < len(name.encode()) < IFNAMSIZ or "/" in name or any(c.isspace() for c in name):
        raise LocalError(f"{kind}:{name}: an interface name has 1 to 15 bytes, no blanks and no slash")


def _ifreq(name: str, value: int = 0, code: str = "H") -> bytes:
    return struct.pack(f"16s{code}", name.encode(), value).ljust(40, b"\0")


def _interface(name: str, request: int, value: int = 0) -> int:
    """Ask the kernel about an interface (SIOCGIFFLAGS: 16 bits, SIOCGIFMTU: 32 bits)."""
    code = "i" if request == SIOCGIFMTU else "H"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, request, _ifreq(name, value, code))
    return int(struct.unpack_from(code, answer, IFNAMSIZ)[0])


def _open_tap(spec: str, name: str, pairs: int) -> BackendSetup:
    """Open a tap, which is created unless it exists: one queue a pair.

    Source: Linux, Documentation/networking/tuntap.rst.
    """
    _check_name("tap", name)
    fds: list[int] = []
    try:
        for _ in range(pairs):
            fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            _attach_tap(fds[-1], name, multi=pairs > 1)
        offloads = _tap_offloads(fds[0])
        with contextlib.suppress(PermissionError):  # whoever made the tap for us brings it up
            _interface(name, SIOCSIFFLAGS, _interface(name, SIOCGIFFLAGS) | IFF_UP)
        return BackendSetup(spec, "fd", name, offloads, fds, _interface(name, SIOCGIFMTU), negotiate=_negotiate_tap)
    except FileNotFoundError as error:
        close_all(fds)
        raise SysError(f"{spec}: there is no /dev/net/tun: load the module tun", error.errno) from error
    except PermissionError as error:
        close_all(fds)
        raise SysError(
            f"{spec}: no permission: run as root, or have root make it: ip tuntap add {name} mode tap user $USER",
            error.errno,
        ) from error
    except OSError as error:
        close_all(fds)
        if error.errno == errno.EBUSY:
            raise SysError(
                f"{spec}: the tap is in use, by another process or another device of this one: choose another name",
                error.errno,
            ) from error
        if error.errno == errno.EINVAL and pairs > 1:
            raise SysError(
                f"{spec}: not a tap with several queues: make it with ip tuntap add {name} mode tap multi_queue",
                error.errno,
            ) from error
        if error.errno == errno.EINVAL:
            raise SysError(
                f"{spec}: an interface of that name exists and is not a tap: choose another name", error.errno
            ) from error
        raise SysError.wrap(spec, error) from error


def _attach_tap(fd: int, name: str, *, multi: bool) -> None:
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    try:
        fcntl.ioctl(fd, TUNSETIFF, _ifreq(name, flags | (IFF_MULTI_QUEUE if multi else 0)))
    except OSError as error:
        if multi or error.errno != errno.EINVAL:
            raise
        # One queue of a tap that was made for several.
        fcntl.ioctl(fd, TUNSETIFF, _ifreq(name, flags | IFF_MULTI_QUEUE))


def _take_tap(spec: str, numbers: str, pairs: int) -> BackendSetup:
    """Use a tap that whoever started us has opened: descriptors, one a pair, which stay open for a later swap back.

    So the program needs no rights of its own: all that is asked of the tap goes by its descriptor.
    """
    given = numbers.split(",")
    if not all(number.isdecimal() for number in given):
        raise LocalError(f"{spec}: give the numbers of inherited descriptors, such as tapfd:3 or tapfd:3,4")
    if len(given) != pairs:
        raise LocalError(f"{spec}: descriptors: {len(given)}, queue pairs: {pairs}: give one for each")
    fds: list[int] = []
    names: set[str] = set()
    try:
        for number in map(int, given):
            try:
                answer = fcntl.ioctl(number, TUNGETIFF, _ifreq(""))
            except (OSError, OverflowError) as error:
                raise LocalError(
                    f"{spec}: descriptor {number} is not a tap: open /dev/net/tun, TUNSETIFF, and pass it on",
                    errno.EBADF,
                ) from error
            names.add(answer[:IFNAMSIZ].rstrip(b"\0").decode(errors="replace"))
            (flags,) = struct.unpack_from("H", answer, IFNAMSIZ)
            wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
            if flags & wanted != wanted:
                raise LocalError(f"{spec}: descriptor {number} was not opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR")
            os.set_inheritable(number, False)
            os.set_blocking(number, False)
            fds.append(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3))
        if len(names) > 1:
            raise LocalError(f"{spec}: descriptors of different taps: {' '.join(sorted(names))}")
        setup = BackendSetup(spec, "fd", names.pop(), _tap_offloads(fds[0]), fds, negotiate=_negotiate_tap)
    except OSError as error:
        close_all(fds)
        raise SysError.wrap(spec, error) from error
    except BaseException:
        close_all(fds)
        raise
    setup.link_mtu()  # where it is in a network of its own, that cannot be asked
    return setup


def _tap_offloads(fd: int) -> int:
    """Try what the kernel takes: UDP segmentation is of 6.2 and later."""
    offloads = TCP_OFFLOADS | UFO_OFFLOADS
    try:
        fcntl.ioctl(fd, TUNSETOFFLOAD, TUN_OFFLOADS[GUEST_CSUM] | TUN_OFFLOADS[GUEST_USO4] | TUN_OFFLOADS[GUEST_USO6])
        offloads |= USO_OFFLOADS
    except OSError:
        pass
    fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
    return offloads


def _negotiate_tap(setup: BackendSetup, features: int, header_len: int) -> int:
    """Tell the tap which header we speak and what the guest accepts. Returns the header's length."""
    wanted = sum(bit for feature, bit in TUN_OFFLOADS.items() if features >> feature & 1)
    try:
        for fd in setup.fds:
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", header_len))
            fcntl.ioctl(fd, TUNSETVNETLE, struct.pack("i", 1))
            fcntl.ioctl(fd, TUNSETOFFLOAD, wanted)
    except OSError as error:
        raise SysError.wrap(f"{setup.spec}: the tap does not take the guest's offloads", error) from error
    return header_len


def _enlarge_receive_buffer(sock: socket.socket) -> None:
    """Make room for what comes in while the worker or the guest is busy: the default holds three large TCP segments.

    Beyond the system's limit (net.core.rmem_max) where we have CAP_NET_ADMIN, else up to it. Source: socket(7).
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, PACKET_RECEIVE_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PACKET_RECEIVE_BYTES)


def _open_packet(spec: str, name: str, pairs: int) -> BackendSetup:
    """Open packet sockets on an interface, one a pair, flows spread by hash. Source: packet(7)."""
    _check_name("packet", name)
    fds: list[int] = []
    group = 0
    try:
        index = socket.if_nametoindex(name)
        for _ in range(pairs):
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
            fds.append(sock.detach())
            with socket.socket(fileno=os.dup(fds[-1])) as sock:
                _enlarge_receive_buffer(sock)
                sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
                sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
                sock.setsockopt(
                    SOL_PACKET, PACKET_ADD_MEMBERSHIP, struct.pack("iHH8s", index, PACKET_MR_PROMISC, 0, b"")
                )
                sock.bind((name, ETH_P_ALL))
                if pairs > 1:
                    flags = PACKET_FANOUT_HASH | (PACKET_FANOUT_FLAG_UNIQUEID if group == 0 else 0)
                    sock.setsockopt(SOL_PACKET, PACKET_FANOUT, flags << 16 | group)
                    group = sock.getsockopt(SOL_PACKET, PACKET_FANOUT) & 0xFFFF
        mtu = _interface(name, SIOCGIFMTU)
        offloads = _packet_offloads(fds[0])
    except PermissionError as error:
        close_all(fds)
        raise SysError(
            f"{spec}: no permission for packet sockets: run as root or with CAP_NET_RAW", error.errno
        ) from error
    except OSError as error:
        close_all(fds)
        if error.errno in (None, errno.ENODEV, errno.ENXIO):  # if_nametoindex sets none
            raise SysError(f"{spec}: no interface {name}: see ip link for those there are", errno.ENODEV) from error
        raise SysError.wrap(spec, error) from error
    return BackendSetup(spec, "fd", name, offloads, fds, mtu, is_packet=True, negotiate=_negotiate_packet)


def _packet_offloads(fd: int) -> int:
    """Return what the header in front of a frame can say: of UDP segmentation it speaks from Linux 6.2 on.

    A socket cannot be asked that; but one that takes a header's length is of 6.6 or later.
    """
    offloads = TCP_OFFLOADS | UFO_OFFLOADS
    with socket.socket(fileno=os.dup(fd)) as sock, contextlib.suppress(OSError):
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR_SZ, PACKET_HEADER)
        offloads |= USO_OFFLOADS
    return offloads


def _negotiate_packet(setup: BackendSetup, features: int, header_len: int) -> int:
    """Choose the header's length, all that a packet socket lets us: it hands on whatever header a frame has."""
    del features
    for fd in setup.fds:
        with socket.socket(fileno=os.dup(fd)) as sock:
            try:
                sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR_SZ, header_len)
            except OSError:
                return PACKET_HEADER  # before Linux 6.6 there is but one length
    return header_len


#: How those are written that need more than their kind.
_FORMS: Final = {
    "source": "source:BYTES",
    "patch": "patch:DEVICE",
    "tap": "tap:NAME",
    "tapfd": "tapfd:N",
    "packet": "packet:IFNAME",
    "python": "python:MODULE:CLASS or python:FILE.py:CLASS",
}
#: Specs of which there is nothing to open: the kind of each.
_SIMPLE: Final = {"null": "null", "null:copy": "null-copy", "loopback": "loopback"}
#: By what stands before the colon of the others: opens it, given the spec, what stands behind, and the queue pairs.
_OPEN: Final[dict[str, Callable[[str, str, int], BackendSetup]]] = {
    "source": _open_source,
    "patch": _open_patch,
    "tap": _open_tap,
    "tapfd": _take_tap,
    "packet": _open_packet,
    "python": _open_python,
}
