"""Messages that are rare and right: in pieces, together, in another order, twice, parts of the configuration space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.clauses.good_messages import CONFIG_BYTES, read_config
from vhostmp.tools.stress.consts import ProtocolFeature, Request
from vhostmp.tools.stress.frontend import NEED_REPLY, REPLY, VERSION, message, u64, vring
from vhostmp.tools.stress.link import DEFAULT_PROTOCOL, Link
from vhostmp.tools.stress.machine import S_ALL
from vhostmp.tools.stress.verdict import Failure, NotApplicable

STREAM: Final = "vhost-user, Message Specification: a stream of messages"
TWICE: Final = "vhost-user, Front-end message types"


class SlowLink(Link):
    """A connection on which every byte is sent alone; descriptors come with the first one of a message."""

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send byte by byte."""
        super().send_raw(data[:1], fds)
        for at in range(1, len(data)):
            super().send_raw(data[at : at + 1])


@clause("edge", "byte-by-byte", source=STREAM, rings=FORMATS)
def byte_by_byte(ctx: Context) -> None:
    """Every message arrives byte by byte."""
    first = ctx.connect()
    link = SlowLink(first.sock, first.patience)
    link.handshake()
    ctx.machine(link=link).traffic()


@clause("edge", "many-in-one-send", source=STREAM)
def together(ctx: Context) -> None:
    """Many messages arrive at once: each is answered, in their order."""
    link = ctx.link()
    asked = [Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES] * 20
    link.send_raw(b"".join(message(request) for request in asked))
    for request in asked:
        got = link.reply()
        if got.request != request:
            raise Failure(f"request {got.request} was answered where {request} was to be")
    ctx.machine(link=link).probe()


@clause("edge", "split-anywhere", source=STREAM)
def split_anywhere(ctx: Context) -> None:
    """Two messages arrive in two pieces, cut at every byte."""
    link = ctx.link()
    data = message(Request.GET_FEATURES) + message(Request.GET_PROTOCOL_FEATURES)
    for at in range(1, len(data)):
        link.send_raw(data[:at])
        link.send_raw(data[at:])
        got = [link.reply().request, link.reply().request]
        if got != [Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES]:
            raise Failure(f"cut at byte {at}, requests {got} were answered")


@clause("edge", "need-reply-for-replies", source="vhost-user, Communication: REPLY_ACK changes no reply there is")
def need_reply(ctx: Context) -> None:
    """Requests that have a reply of their own ask for an acknowledgement too: they get their reply alone."""
    ctx.need_protocol(ProtocolFeature.REPLY_ACK)
    link = ctx.link()
    for request in (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_FEATURES):
        link.send_raw(message(request, flags=VERSION | NEED_REPLY))
        got = link.reply()
        if got.request != request or not got.flags & REPLY:
            raise Failure(f"request {request} was answered by {got}")
    ctx.machine(link=link).probe()


@clause("edge", "ring-messages-in-any-order", source=TWICE, rings=FORMATS)
def any_order(ctx: Context) -> None:
    """What describes a ring comes in any order before the kick eventfd, some of it twice, rings by turns."""
    for _ in range(6):
        machine = ctx.machine(start=False)
        link = machine.link
        said: list[tuple[Request, bytes, tuple[int, ...]]] = []
        for ring in machine.rings:
            index = ring.index
            said += [
                (Request.SET_VRING_BASE, vring(index, ring.base), ()),
                (Request.SET_VRING_ADDR, machine.addresses(ring), ()),
                (Request.SET_VRING_CALL, u64(index), (ring.call_fd,)),
                (Request.SET_VRING_ERR, u64(index), (ring.err_fd,)),
                (Request.SET_VRING_ENABLE, vring(index, 1), ()),
            ]
        said += ctx.rng.sample(said, 4)
        ctx.rng.shuffle(said)
        # The number of entries comes first: it says how far the addresses reach.
        for ring in ctx.rng.sample(machine.rings, len(machine.rings)):
            link.must(Request.SET_VRING_NUM, vring(ring.index, ring.layout.num))
        for request, payload, fds in said:
            link.must(request, payload, fds)
        for ring in ctx.rng.sample(machine.rings, len(machine.rings)):
            link.must(Request.SET_VRING_KICK, u64(ring.index), [ring.kick_fd])
            ring.running = True
        machine.set_status(S_ALL)
        machine.traffic(16)
        machine.close()


@clause("edge", "protocol-features-twice", source="vhost-user, VHOST_USER_SET_PROTOCOL_FEATURES")
def protocol_twice(ctx: Context) -> None:
    """Protocol features are set, and set again to others, before anything else is said."""
    link = ctx.connect()
    link.look()
    link.take(0)
    link.take(DEFAULT_PROTOCOL)
    link.must(Request.SET_OWNER)
    ctx.machine(link=link).traffic()


@clause("edge", "asked-while-running", source="vhost-user, Communication")
def asked_running(ctx: Context) -> None:
    """Features and queues are asked for again while requests are under way."""
    machine = ctx.machine()
    for _ in range(20):
        machine.offer(8)
        machine.go()
        machine.link.look()
        if machine.link.features_offered != ctx.facts.features:
            raise Failure(f"features {machine.link.features_offered:#x} are offered while rings run")
        machine.collect()


@clause("edge", "features-while-running", source="vhost-user, VHOST_USER_SET_FEATURES: VHOST_F_LOG_ALL", rings=FORMATS)
def features_running(ctx: Context) -> None:
    """The same features are set again while requests are under way, as when logging is switched."""
    machine = ctx.machine()
    for _ in range(10):
        machine.offer(8)
        machine.go()
        machine.link.must(Request.SET_FEATURES, u64(machine.setup.features))
        machine.collect()


@clause("edge", "hang-up-anywhere", source="vhost-user, Communication: the front-end may go at any time", seconds=60)
def hang_up(ctx: Context) -> None:
    """The front-end goes after each message of its handshake, and in the middle of it; the next one is served."""
    said = [
        message(Request.GET_FEATURES),
        message(Request.GET_PROTOCOL_FEATURES),
        message(Request.SET_PROTOCOL_FEATURES, u64(ctx.facts.protocol & DEFAULT_PROTOCOL)),
        message(Request.SET_OWNER),
        message(Request.SET_FEATURES, u64(ctx.features())),
        message(Request.SET_VRING_NUM, vring(0, 64)),
    ]
    data = b"".join(said)
    for at in range(0, len(data), 3):
        link = ctx.connect()
        link.send_raw(data[:at])
        link.close()
    ctx.machine().traffic()


@clause("edge", "config-in-parts", source="vhost-user, VHOST_USER_GET_CONFIG: any offset and size")
def config_parts(ctx: Context) -> None:
    """Every part of the configuration space is the same as in the whole."""
    ctx.need_protocol(ProtocolFeature.CONFIG)
    size = CONFIG_BYTES[ctx.target.device]
    if not size:
        raise NotApplicable("this class of device has no configuration space")
    link = ctx.link()
    whole = read_config(link, 0, size)
    for start in range(size):
        for end in range(start + 1, size + 1):
            if read_config(link, start, end - start) != whole[start:end]:
                raise Failure(f"bytes {start} to {end} are not those of the whole")
