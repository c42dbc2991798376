"""Headers, sizes, descriptors and pieces of messages as an enemy sends them."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Sequence

from vhostmp.tools.stress.clause import SETTLE, Context, clause
from vhostmp.tools.stress.consts import ProtocolFeature, Request, bits
from vhostmp.tools.stress.frontend import HEADER, NEED_REPLY, VERSION, mem_table, message, u64, vring, vring_addr
from vhostmp.tools.stress.link import Link, Outcome
from vhostmp.tools.stress.messages import Row, eventfd, memfd, spare, table
from vhostmp.tools.stress.verdict import Failure, NotApplicable

GROWTH = 64 << 20
"""How much memory a back-end may need for a message that says it is long, bytes."""
CHATTER = 20_000
PAUSES = 20

table(
    [
        Row(
            "payload-too-short",
            "Payloads shorter than their messages: DPDK reads what was in its buffer before.",
            "DPDK vhost_user.c:3227",
            Request.SET_VRING_NUM,
            [b"", bytes(1), bytes(4), bytes(7)],
            stopped=True,
        ),
        Row(
            "payload-too-short-addr",
            "SET_VRING_ADDR without its end.",
            "DPDK vhost_user.c:3227",
            Request.SET_VRING_ADDR,
            [vring_addr(0)[:8], vring_addr(0)[:39]],
            stopped=True,
        ),
        Row(
            "payload-too-short-features",
            "SET_FEATURES without its end.",
            "DPDK vhost_user.c:3227",
            Request.SET_FEATURES,
            [b"", bytes(4)],
            stopped=True,
        ),
        Row(
            "payload-too-short-table",
            "SET_MEM_TABLE with fewer regions than it says.",
            "DPDK vhost_user.c:3227; passt vhost_user.c:445",
            Request.SET_MEM_TABLE,
            [mem_table(count=1), mem_table(count=2) + bytes(32)],
            [memfd],
            stopped=True,
        ),
        Row(
            "payload-too-long",
            "Payloads longer than their messages.",
            "vhost-user, header",
            Request.SET_VRING_NUM,
            [vring(0, 64) + bytes(1), vring(0, 64) + bytes(100)],
            stopped=True,
            may=True,
        ),
        Row(
            "fds-on-plain-message",
            "Descriptors with a message that has none.",
            "CVE-2019-14818; CVE-2022-0669",
            Request.SET_VRING_NUM,
            [vring(0, 64)],
            [spare] * 8,
            stopped=True,
            may=True,
        ),
        Row(
            "fds-too-many",
            "More descriptors than regions, and than there may be.",
            "CVE-2019-14818; DPDK 6ec1778134: MSG_CTRUNC",
            Request.SET_MEM_TABLE,
            [mem_table(bytes(32))],
            [memfd] * 33,
            stopped=True,
        ),
        Row(
            "fds-253",
            "As many descriptors as the kernel passes on.",
            "CVE-2019-14818; DPDK 6ec1778134: MSG_CTRUNC",
            Request.SET_VRING_NUM,
            [vring(0, 64)],
            [eventfd] * 253,
            stopped=True,
            may=True,
        ),
    ]
)


@clause("hostile", "header-short", source="QEMU asserts, passt dies; vhost-user, header")
def header_short(ctx: Context) -> None:
    """1 to 11 bytes of a header, and the connection is closed."""
    for size in range(1, HEADER.size):
        link = ctx.connect()
        link.send_raw(message(Request.GET_FEATURES)[:size])
        link.close()


@clause("hostile", "payload-cut", source="vhost-user, header")
def payload_cut(ctx: Context) -> None:
    """A header and a part of its payload, and the connection is closed."""
    data = message(Request.SET_VRING_ADDR, vring_addr(0))
    for size in (12, 13, 20, 51):
        link = ctx.link()
        link.send_raw(data[:size])
        link.close()


@clause("hostile", "byte-at-a-time", source="unix(7): a stream has no borders")
def byte_at_a_time(ctx: Context) -> None:
    """Messages that arrive byte by byte are messages. A back-end may hang up, but not misread them."""
    link = ctx.link()
    for data, request in (
        (message(Request.GET_FEATURES), Request.GET_FEATURES),
        (message(Request.SET_FEATURES, u64(ctx.features())), None),
        (message(Request.GET_FEATURES), Request.GET_FEATURES),
    ):
        try:
            for place in range(len(data)):
                link.send_raw(data[place : place + 1])
                time.sleep(0.001)
            if request and link.reply().request != request:
                raise Failure("a message that came byte by byte was misread")
        except (EOFError, ConnectionError):
            return
    if not link.drain():
        raise Failure("hung up after messages that came byte by byte and were answered")


@clause("hostile", "silence-in-a-message", source="a front-end that is stopped by SIGSTOP")
def silence(ctx: Context) -> None:
    """Half a message, then silence: rings go on, or it hangs up, and the next connection is served after this one."""
    machine = ctx.machine()
    machine.probe()
    machine.link.send_raw(message(Request.SET_VRING_NUM, vring(0, 64))[:14])
    time.sleep(SETTLE)
    if not select.select([machine.link.sock], [], [], 0)[0]:  # it may hang up, too
        machine.probe()
    machine.link.close()


@clause("hostile", "size-huge", source="vhost-user, header; CVE-2020-10722's series")
def size_huge(ctx: Context) -> None:
    """Headers that say that 4 KiB to 4 GiB follow: refused or waited for, but no memory is spent on it."""
    for size in (0x401, 0x1000, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF):
        before = ctx.process.resident() if ctx.process else 0
        link = ctx.link()
        with contextlib.suppress(ConnectionError):
            link.send_raw(message(Request.SET_FEATURES, bytes(512), size=size))
        time.sleep(0.02)
        if ctx.process and ctx.process.resident() > before + GROWTH:
            raise Failure(f"a message that says it has {size} bytes costs as much memory")
        link.close()


@clause("hostile", "flags-of-header", source="vhost-user, header; rust-vmm alone checks")
def flags_of_header(ctx: Context) -> None:
    """Versions 0, 2 and 3, a request that is a reply, and reserved flags: ignored, refused or hung up at."""
    for flags in (0, 2, 3, 5, 0x11, 0x41, 0xFFFFFFF1):
        link = ctx.link()
        link.send_raw(message(Request.SET_VRING_NUM, vring(0, 64), flags=flags))
        link.drain()
        link.close()


@clause("hostile", "need-reply-and-reply", source="vhost-user, REPLY_ACK")
def need_reply_and_reply(ctx: Context) -> None:
    """NEED_REPLY on a message that has a reply: exactly one reply."""
    link = ctx.link()
    if not link.acks:
        raise NotApplicable("REPLY_ACK is not offered")
    for _ in range(3):
        link.send(Request.GET_FEATURES, need_reply=True)
        link.send(Request.GET_PROTOCOL_FEATURES, need_reply=True)
        got = [link.reply().request, link.reply().request]
        if got != [Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES]:
            raise Failure(f"the replies were to requests {got}")


@clause("hostile", "need-reply-not-negotiated", source="vhost-user, REPLY_ACK; DPDK and QEMU acknowledge")
def need_reply_not_negotiated(ctx: Context) -> None:
    """NEED_REPLY where REPLY_ACK was not negotiated: no reply, and the next reply is the right one."""
    link = ctx.link(bits(ProtocolFeature.MQ))
    link.send(Request.SET_VRING_NUM, vring(0, 64), need_reply=True)
    link.send(Request.GET_FEATURES)
    got = link.reply()
    if got.request != Request.GET_FEATURES:
        raise Failure(f"request {got.request} was acknowledged, and REPLY_ACK is not negotiated")


@clause("hostile", "fds-again-and-again", source="CVE-2019-14818: GET_FEATURES with eight descriptors")
def fds_again(ctx: Context) -> None:
    """A thousand messages with eight descriptors that nobody asked for: none stays open."""
    link = ctx.link()
    fds = [ctx.eventfd()] * 8
    before = sum(ctx.process.descriptors().values()) if ctx.process else 0
    for _ in range(1000):
        if link.try_raw(message(Request.GET_FEATURES), fds, Request.GET_FEATURES) is Outcome.CLOSED:
            link.close()
            link = ctx.link()
    if ctx.process and sum(ctx.process.descriptors().values()) > before + 8:
        raise Failure("descriptors that came with GET_FEATURES stay open")


@clause("hostile", "fds-in-two-pieces", source="unix(7), SCM_RIGHTS")
def fds_in_two_pieces(ctx: Context) -> None:
    """A message whose header brings a descriptor and whose payload brings another, and one after its end."""
    for first, second in ((12, 16), (6, 20), (12, 12)):
        link = ctx.link()
        data = message(Request.SET_VRING_CALL, u64(0))
        with contextlib.suppress(ConnectionError):
            link.send_raw(data[:first], [ctx.eventfd()])
            link.send_raw(data[first:second], [ctx.eventfd()])
            link.send_raw(data[second:])
        link.drain()
        link.close()


@clause("hostile", "credentials", source="unix(7), SCM_CREDENTIALS")
def credentials(ctx: Context) -> None:
    """Ancillary data that are no descriptors."""
    link = ctx.link()
    own = struct.pack("3i", os.getpid(), os.getuid(), os.getgid())
    link.sock.sendmsg([message(Request.GET_FEATURES)], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, own)])
    with contextlib.suppress(EOFError):
        if link.reply().request != Request.GET_FEATURES:
            raise Failure("GET_FEATURES with credentials was misread")


@clause("hostile", "many-in-one", source="unix(7): a stream has no borders; vhost-user, communication")
def many_in_one(ctx: Context) -> None:
    """A hundred messages in one piece: answered, in their order."""
    link = ctx.link()
    pair = message(Request.GET_FEATURES) + message(Request.SET_VRING_NUM, vring(0, 64)) + message(15)
    link.send_raw(pair * 100)
    for place in range(200):
        got = link.reply()
        if got.request != (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES)[place % 2]:
            raise Failure(f"reply {place} is to request {got.request}")


@clause("hostile", "replies-unread", source="a front-end that does not read; socket(7), SO_SNDBUF")
def replies_unread(ctx: Context) -> None:
    """Requests without end whose replies nobody reads: the back-end waits or hangs up, and the next one is served."""
    link = ctx.link()
    link.sock.setblocking(False)
    flood = message(Request.GET_FEATURES) * 64
    until = time.monotonic() + 2.0
    quiet = 0
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < until and quiet < PAUSES:
            try:
                link.sock.send(flood)
                quiet = 0
            except BlockingIOError:
                quiet += 1
                time.sleep(0.01)
    link.close()


@clause("hostile", "messages-flood", source="CVE-2019-14818: SET_VRING_NUM again and again", seconds=40)
def messages_flood(ctx: Context) -> None:
    """Twenty thousand messages that each make a back-end allocate: nothing grows."""
    machine = ctx.machine(start=False)
    link = machine.link
    before = ctx.process.resident() if ctx.process else 0
    sizes = [message(Request.SET_VRING_NUM, vring(0, num)) for num in (32768, 64, 1024, 2)]
    ack = message(Request.SET_VRING_NUM, vring(0, 64), flags=VERSION | NEED_REPLY)
    for _ in range(CHATTER // 400):
        link.send_raw(b"".join(sizes) * 100)
        if link.acks:
            link.send_raw(ack)
            link.reply()
        elif not link.drain():
            return
    if ctx.process and ctx.process.resident() > before + GROWTH:
        raise Failure("memory grows with every SET_VRING_NUM")
    machine.start_all()
    machine.probe()


class _CutError(Exception):
    """The connection is to end here."""


class _CutLink(Link):
    """A connection that ends after so many messages, or in the middle of the last one."""

    left = 0
    middle = False

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send, or end."""
        if not self.left:
            if self.middle:
                self.sock.send(data[: len(data) // 2])
            raise _CutError
        self.left -= 1
        super().send_raw(data, fds)


def _cut(ctx: Context, *, middle: bool) -> None:
    for left in range(1, 200):
        link = _CutLink(ctx.connect().sock, ctx.target.patience)
        link.left, link.middle = left, middle
        try:
            link.handshake()
            machine = ctx.machine(link=link)
        except _CutError:
            link.close()
        else:
            machine.link.close()
            return


@clause("hostile", "dropped-between-messages", source="every prefix of a handshake")
def dropped_between(ctx: Context) -> None:
    """The connection is closed after each message of a normal beginning; the next one starts afresh."""
    _cut(ctx, middle=False)


@clause("hostile", "dropped-in-messages", source="every prefix of a handshake")
def dropped_in(ctx: Context) -> None:
    """The connection is closed in the middle of each message of a normal beginning."""
    _cut(ctx, middle=True)
