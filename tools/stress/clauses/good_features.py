"""What a careful driver and front-end negotiate: features, alone and together, and protocol features."""

from __future__ import annotations

from typing import Final

from vhostmp.tools.stress.clause import FORMATS, Context, clause
from vhostmp.tools.stress.consts import DRIVABLE, Feature, ProtocolFeature, bits, has
from vhostmp.tools.stress.frontend import u64
from vhostmp.tools.stress.link import DEFAULT_PROTOCOL
from vhostmp.tools.stress.net import NetMachine
from vhostmp.tools.stress.verdict import Failure, NotApplicable

SUBSETS: Final = 16
LEGACY: Final = (1 << 32) - 1
"""What a driver from before VERSION_1 knows of."""
BASIC: Final = bits(Feature.VERSION_1, Feature.PROTOCOL_FEATURES)
OFFLOADS: Final = bits(
    Feature.NET_CSUM,
    Feature.NET_GUEST_CSUM,
    Feature.NET_GUEST_TSO4,
    Feature.NET_GUEST_TSO6,
    Feature.NET_GUEST_ECN,
    Feature.NET_GUEST_UFO,
    Feature.NET_HOST_TSO4,
    Feature.NET_HOST_TSO6,
    Feature.NET_HOST_ECN,
    Feature.NET_HOST_UFO,
)
WHOLE: Final = 65562
"""Room for the longest frame that offloads may bring, with its header (virtio 1.3, 5.1.6.3.1)."""
NEEDS: Final = (
    (ProtocolFeature.BACKEND_SEND_FD, ProtocolFeature.BACKEND_REQ),
    (ProtocolFeature.GET_VRING_BASE_INFLIGHT, ProtocolFeature.INFLIGHT_SHMFD),
)
PLAIN: Final = bits(*ProtocolFeature) & ~bits(ProtocolFeature.INBAND_NOTIFICATIONS, ProtocolFeature.XEN_MMAP)
"""Protocol features that a front-end can take and go on as ever: known ones, which change neither how rings are run nor
how memory is described."""


def complete(mask: int) -> int:
    """Take protocol features out of a mask that mean nothing without another one, which it lacks."""
    for bit, needed in NEEDS:
        if not has(mask, needed):
            mask &= ~bits(bit)
    return mask


def drivable(ctx: Context) -> list[int]:
    """Return the feature bits to choose from, in this clause's format of rings."""
    mask = ctx.facts.features & DRIVABLE & ~bits(Feature.RING_PACKED)
    return [bit for bit in range(64) if has(mask, bit)]


def tried(ctx: Context, mask: int) -> None:
    """Have a machine with these features do some work."""
    if ctx.packed:
        ctx.need(Feature.RING_PACKED)
        mask |= bits(Feature.RING_PACKED, Feature.VERSION_1)
    if not has(mask, Feature.VERSION_1):
        mask &= LEGACY
    with ctx.machine(ctx.setup(features=mask & ctx.facts.features)) as machine:
        try:
            machine.traffic(20)
        except Failure as failure:
            raise Failure(f"with features {mask:#x}: {failure}") from None


@clause("good", "features-alone", source="virtio 1.3, 2.2 and 6", rings=FORMATS)
def alone(ctx: Context) -> None:
    """Each ring feature that is offered, alone."""
    for bit in drivable(ctx):
        tried(ctx, BASIC | bits(bit))


@clause("good", "features-all", source="virtio 1.3, 2.2 and 6", rings=FORMATS)
def together(ctx: Context) -> None:
    """All ring features that are offered, together."""
    tried(ctx, bits(*drivable(ctx)))


@clause("good", "features-subsets", source="virtio 1.3, 2.2.1", rings=FORMATS)
def subsets(ctx: Context) -> None:
    """A sample of all subsets of the ring features that are offered."""
    choice = drivable(ctx)
    for _ in range(SUBSETS):
        tried(ctx, BASIC | bits(*(bit for bit in choice if ctx.rng.getrandbits(1))))


@clause("good", "features-legacy", source="virtio 1.3, 6.2 and 7.4", rings=("split",))
def legacy(ctx: Context) -> None:
    """A driver from before VERSION_1: with each feature that it may know alone, with all, with none."""
    if ctx.target.device == "blk":
        raise NotApplicable("the tool's disk driver is a modern one")
    old = [bit for bit in drivable(ctx) if has(LEGACY, bit)]
    for chosen in ([], *([bit] for bit in old), old):
        tried(ctx, bits(*chosen))


@clause("good", "features-without-bit-30", source="vhost-user, Ring states", rings=FORMATS)
def without_bit_30(ctx: Context) -> None:
    """Without VHOST_USER_F_PROTOCOL_FEATURES rings are enabled from their start."""
    tried(ctx, ctx.features(without=[Feature.PROTOCOL_FEATURES]))


@clause("good", "features-twice", source="vhost-user, VHOST_USER_SET_FEATURES")
def twice(ctx: Context) -> None:
    """The features are set again, first others and then the same, before rings start: the last ones count."""
    machine = ctx.machine(start=False)
    for mask in (BASIC & ctx.facts.features, ctx.features(), ctx.features()):
        machine.link.must(1 + 1, u64(mask))
    machine.start_all().traffic()


@clause("good", "features-same", source="vhost-user, VHOST_USER_GET_FEATURES")
def same(ctx: Context) -> None:
    """Each connection is offered the same features, however often it asks, and whatever the one before it took."""
    for _ in range(3):
        link = ctx.link()
        link.look()
        offered = (link.features_offered, link.protocol_offered)
        if offered != (ctx.facts.features, ctx.facts.protocol):
            raise Failure(f"features {offered[0]:#x} and protocol features {offered[1]:#x} are offered now")
        ctx.machine(link=link).probe()
        link.close()


@clause("good", "offloads", source="virtio 1.3, 5.1.3.1", rings=FORMATS, devices=("net",))
def offloads(ctx: Context) -> None:
    """Subsets of the offloads, as far as one that is taken needs no other; plain frames pass as ever."""
    offered = ctx.facts.features & OFFLOADS
    if not offered:
        raise NotApplicable("no offload is offered")
    for chosen in (offered, *(offered & ctx.rng.getrandbits(64) for _ in range(6))):
        mask = chosen
        if not has(mask, Feature.NET_CSUM):
            mask &= ~bits(*range(Feature.NET_HOST_TSO4, Feature.NET_HOST_UFO + 1))
        if not has(mask, Feature.NET_GUEST_CSUM):
            mask &= ~bits(*range(Feature.NET_GUEST_TSO4, Feature.NET_GUEST_UFO + 1))
        if not mask & bits(Feature.NET_HOST_TSO4, Feature.NET_HOST_TSO6):
            mask &= ~bits(Feature.NET_HOST_ECN)
        if not mask & bits(Feature.NET_GUEST_TSO4, Feature.NET_GUEST_TSO6):
            mask &= ~bits(Feature.NET_GUEST_ECN)
        machine = ctx.machine(ctx.setup(features=ctx.features() | mask, num=32), start=False)
        assert isinstance(machine, NetMachine)
        if not machine.mergeable:
            machine.room = WHOLE
        with machine.start_all():
            machine.traffic()


@clause("good", "protocol-features-alone", source="vhost-user, VHOST_USER_SET_PROTOCOL_FEATURES")
def protocol_alone(ctx: Context) -> None:
    """Each protocol feature that is offered, alone or with the one that it needs, and none."""
    offered = ctx.facts.protocol & PLAIN
    alone = (bit for bit in range(64) if has(offered, bit))
    for mask in (0, *(1 << bit for bit in alone), *(bits(*pair) & offered for pair in NEEDS)):
        with ctx.machine(link=ctx.link(protocol=complete(mask))) as machine:
            machine.probe()


@clause("good", "protocol-features-all", source="vhost-user, VHOST_USER_SET_PROTOCOL_FEATURES", rings=FORMATS)
def protocol_all(ctx: Context) -> None:
    """All protocol features that are offered, together."""
    ctx.machine(link=ctx.link(protocol=ctx.facts.protocol & PLAIN)).traffic()


@clause("good", "protocol-features-subsets", source="vhost-user, VHOST_USER_SET_PROTOCOL_FEATURES")
def protocol_subsets(ctx: Context) -> None:
    """A sample of all subsets of the protocol features that are offered."""
    offered = ctx.facts.protocol & PLAIN
    for _ in range(SUBSETS):
        with ctx.machine(link=ctx.link(protocol=complete(offered & ctx.rng.getrandbits(64)))) as machine:
            machine.probe()


@clause("good", "no-reply-ack", source="vhost-user, Communication", rings=FORMATS)
def no_reply_ack(ctx: Context) -> None:
    """Without REPLY_ACK no message but those that have a reply of their own is answered."""
    ctx.machine(link=ctx.link(protocol=DEFAULT_PROTOCOL & ~bits(ProtocolFeature.REPLY_ACK))).traffic()
