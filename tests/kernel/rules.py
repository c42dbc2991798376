"""Where vhostmp differs from Linux on purpose: each difference is a row of docs/kernel-differences.md, and a rule here.

A rule is narrow: it looks at what the case did, not only at what came out. Each has an example in `examples.py`, which
is run every time: one that needs its rule no longer is an error.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs

from tests.kernel.case import PAGE, RX, TX, Case, Step, pieces
from tests.kernel.generate import (
    EVENT_IDX,
    INDIRECT_DESC,
    LOG_ALL,
    MRG_RXBUF,
    NOTIFY_ON_EMPTY,
    VERSION_1,
    VIRTIO_NET_HDR,
)
from tests.kernel.play import Seen
from vhostmp.backends import CSUM, HOST_ECN, HOST_TSO4, HOST_TSO6, HOST_UFO, HOST_USO, OFFLOADS, header_len
from vhostmp.net import ACCESS_PLATFORM, GUEST_ANNOUNCE, IN_ORDER, MTU, RING_PACKED, RING_RESET
from vhostmp.tools.stress.ring import INDIRECT, NEXT, RingLayout
from vhostmp.tools.stress.split import NetHeader

EOPNOTSUPP: Final = errno.errorcode[errno.EOPNOTSUPP]
#: Offered by one side only, offloads apart, which Linux leaves to the tap.
LINUX_ALONE: Final = VIRTIO_NET_HDR | 1 << ACCESS_PLATFORM
OURS_ALONE: Final = 1 << MTU | 1 << GUEST_ANNOUNCE | 1 << RING_PACKED | 1 << IN_ORDER | 1 << RING_RESET
#: gso_type -> the feature by which a guest may use it.
SEGMENTS: Final = {1: HOST_TSO4, 3: HOST_UFO, 4: HOST_TSO6, 5: HOST_USO}
NUM_BUFFERS: Final = range(10, 12)


@attrs.define
class RingSet:
    """What was set of one ring."""

    num: int = 0
    addr: dict[str, int] | None = None
    base: int = 0
    kick: str = "none"
    call: str = "none"
    busyloop: int = 0
    started: bool = False
    polled: bool = False
    """Busily, for a while at least, since the case last settled."""

    @property
    def polls(self) -> bool:
        """Whether it is polled busily now."""
        return self.started and bool(self.busyloop)


class Accepted:
    """What the verbs of a case had set before a step: those that the kernel took."""

    def __init__(self, steps: Sequence[Step], seen: Sequence[Seen]) -> None:
        """Go through the steps."""
        self._forget()
        self.called_anew = [False, False]
        for step, what in zip(steps, seen, strict=True):
            if step.name == "settle":
                self.called_anew = [False, False]
                for ring in self.rings:
                    ring.polled = ring.polls
            if "error" in what.what and what.what["error"] is None:
                self._take(step)
                for ring in self.rings:
                    ring.polled |= ring.polls

    def _forget(self) -> None:
        self.features = 0
        self.negotiated = False
        self.table: str | None = None
        self.log = False
        self.rings = [RingSet(), RingSet()]

    def _take(self, step: Step) -> None:
        ring = self.rings[step.ring]
        match step.name:
            case "reset_owner":
                self._forget()
            case "set_features":
                self.features = step.value
                self.negotiated = True
            case "set_mem_table":
                self.table = step.value
            case "set_log_base":
                self.log = True
            case "set_vring_num" | "set_vring_addr" | "set_vring_base" | "set_vring_kick":
                setattr(ring, step.name.removeprefix("set_vring_"), step.value)
            case "set_vring_call":
                ring.call = step.value
                self.called_anew[step.ring] = ring.started
            case "set_vring_busyloop_timeout":
                ring.busyloop = step.value
            case "start" | "stop":
                ring.started = step.name == "start"
            case _:
                pass


@attrs.frozen(eq=False)
class Difference:
    """One field of what was seen at one step, and everything that a rule may want to know."""

    case: Case
    index: int
    field: str
    kernel: Any
    ours: Any
    kernel_seen: Sequence[Seen]
    ours_seen: Sequence[Seen]

    @property
    def step(self) -> Step:
        """The step at which it was seen."""
        return self.case.steps[self.index]

    @property
    def before(self) -> Sequence[Step]:
        """The steps before."""
        return self.case.steps[: self.index]

    @property
    def accepted(self) -> Accepted:
        """What was set."""
        return Accepted(self.before, self.kernel_seen[: self.index])

    @property
    def ring(self) -> int:
        """The ring that it is about."""
        return {"rx": RX, "tx": TX}.get(self.field[:2], self.step.ring)

    def verb(self, name: str, kernel: str | None, ours: str | None) -> bool:
        """Whether it is about the error of that verb, and the errors are these."""
        return self.step.name == name and self.field == "error" and (self.kernel, self.ours) == (kernel, ours)

    def chains(self, ring: int) -> list[dict[str, Any]]:
        """List the chains that the driver added to a ring."""
        return [chain for step in self.before if step.name == "add" and step.ring == ring for chain in step.value]

    def place(self, ring: int) -> RingLayout:
        """Return where a ring is."""
        plan = self.case.rings[ring]
        return RingLayout.at(plan.start, plan.num)

    def event_pages(self) -> set[int]:
        """Return the pages of used->flags and avail_event of both rings."""
        return {at // PAGE for ring in (RX, TX) for at in (self.place(ring).used, self.place(ring).end - 2)}

    def logs(self) -> tuple[set[int], set[int]]:
        """Return the pages that each side logged at this step, without those of `event_pages`."""
        kernel, ours = (set(seen[self.index].what["log"]) for seen in (self.kernel_seen, self.ours_seen))
        return kernel - self.event_pages(), ours - self.event_pages()

    def seen_before(self, side: Sequence[Seen], field: str, value: object) -> bool:
        """Whether a field was seen with a value at an earlier step."""
        return any(seen.what.get(field) == value for seen in side[: self.index])


@attrs.frozen
class Rule:
    """A difference that is meant. `ends`: the sides are in different states from then on."""

    name: str
    ends: bool
    explains: Callable[[Difference], bool]


RULES: Final[list[Rule]] = []
Explains = Callable[[Difference], bool]


def _rule(name: str, *, ends: bool = False) -> Callable[[Explains], Explains]:
    """Make a rule of a function."""

    def register(explains: Explains) -> Explains:
        RULES.append(Rule(name, ends, explains))
        return explains

    return register


def offsets(segments: Sequence[Sequence[int]], wanted: range) -> list[int]:
    """Return where in the memory's file bytes of a list of segments are."""
    found: list[int] = []
    at = 0
    for gpa, length in segments:
        for byte in range(max(wanted.start, at), min(wanted.stop, at + length)):
            found += [offset for offset, _ in pieces(gpa + byte - at, 1)]
        at += length
    return found


def _bad(d: Difference, ring: int) -> list[dict[str, Any]]:
    """List the chains of a ring that break a rule."""
    return [chain for chain in d.chains(ring) if "bad" in chain]


# -- what says nothing about the outcome


@_rule("receive-kicks")
def _receive_kicks(d: Difference) -> bool:
    return d.field == "rx words"


@_rule("log-used-without-log-all")
def _log_used_without_log_all(d: Difference) -> bool:
    """Linux logs a used ring by its own flag alone."""
    accepted = d.accepted
    flagged = any((ring.addr or {}).get("flags") for ring in accepted.rings)
    return d.field in ("log", "log call") and flagged and not d.ours and not accepted.features & LOG_ALL


@_rule("event-word-log")
def _event_word_log(d: Difference) -> bool:
    kernel, ours = d.logs() if d.field in ("log", "log call") else (None, None)
    return kernel is not None and (kernel == ours if d.field == "log" else not kernel and not ours)


@_rule("unused-buffers")
def _unused_buffers(d: Difference) -> bool:
    if d.field == "unused":
        return True
    if d.field not in ("log", "log call"):
        return False
    pages = {
        page
        for chain in d.chains(RX)
        for gpa, length in chain["i"]
        for page in range(gpa // PAGE, (gpa + max(length, 1) - 1) // PAGE + 1)
    }
    kernel, ours = d.logs()
    return kernel < ours and ours - kernel <= pages


@_rule("stopped-words")
def _stopped_words(d: Difference) -> bool:
    seen = [side[index].what for side in (d.kernel_seen, d.ours_seen) for index in range(d.index + 1)]
    return d.field == "tx words" and (bool(_bad(d, TX)) or any(what.get("tx err") for what in seen))


@_rule("polled-words")
def _polled_words(d: Difference) -> bool:
    return d.field == "tx words" and d.accepted.rings[TX].kick != "event"


@_rule("error-once")
def _error_once(d: Difference) -> bool:
    return d.field in ("rx err", "tx err") and bool(d.kernel) and d.seen_before(d.ours_seen, d.field, True)


@_rule("num-buffers")
def _num_buffers(d: Difference) -> bool:
    if d.field != "memory" or d.case.features & MRG_RXBUF or not d.case.features & VERSION_1:
        return False
    places = {offset for chain in d.chains(RX) for offset in offsets(chain["i"], NUM_BUFFERS)}
    return {at for at, (one, other) in enumerate(zip(d.kernel, d.ours, strict=True)) if one != other} <= places


@_rule("notify-on-empty")
def _notify_on_empty(d: Difference) -> bool:
    both = NOTIFY_ON_EMPTY | EVENT_IDX
    return d.field in ("rx call", "tx call") and bool(d.kernel) and d.accepted.features & both == both


# -- verbs


@_rule("features-offered", ends=True)
def _features_offered(d: Difference) -> bool:
    if d.step.name == "get_features" and d.field == "result":
        kernel, ours = int(d.kernel), int(d.ours)
        return kernel & ~ours == LINUX_ALONE and ours & ~kernel & ~OFFLOADS == OURS_ALONE
    return d.verb("set_features", None, EOPNOTSUPP) and d.step.value & LINUX_ALONE != 0


@_rule("more-regions", ends=True)
def _more_regions(d: Difference) -> bool:
    return d.verb("set_mem_table", "E2BIG", None) and d.step.value == "many"


@_rule("overlapping-regions", ends=True)
def _overlapping_regions(d: Difference) -> bool:
    return d.verb("set_mem_table", None, "EINVAL") and d.step.value == "overlap"


@_rule("desc-alignment", ends=True)
def _desc_alignment(d: Difference) -> bool:
    return d.verb("set_vring_addr", None, "EINVAL") and d.step.value.get("desc", 0) % 16 != 0


@_rule("start-without-num", ends=True)
def _start_without_num(d: Difference) -> bool:
    return d.verb("start", None, "EINVAL") and not d.accepted.rings[d.step.ring].num


@_rule("ring-outside-memory", ends=True)
def _ring_outside_memory(d: Difference) -> bool:
    if d.verb("set_mem_table", None, "EFAULT"):
        return d.step.value in ("none", "no rings") and any(ring.started for ring in d.accepted.rings)
    return d.verb("start", None, "EFAULT") and d.accepted.table in (None, "none", "no rings")


@_rule("features-while-running", ends=True)
def _features_while_running(d: Difference) -> bool:
    accepted = d.accepted
    changed = accepted.features ^ d.step.value if d.step.name == "set_features" else 0
    return d.verb("set_features", None, "EBUSY") and changed & ~LOG_ALL != 0


@_rule("log-all-without-log", ends=True)
def _log_all_without_log(d: Difference) -> bool:
    return d.verb("set_features", None, "EFAULT") and d.step.value & LOG_ALL != 0 and not d.accepted.log


@_rule("start-at-used-index", ends=True)
def _start_at_used_index(d: Difference) -> bool:
    bases = [ring.base for ring in d.accepted.rings]
    return any(base != plan.base for base, plan in zip(bases, d.case.rings, strict=True))


@_rule("new-call-fd")
def _new_call_fd(d: Difference) -> bool:
    return d.field in ("rx call", "tx call") and bool(d.ours) and d.accepted.called_anew[d.ring]


@_rule("busy-poll-of-both")
def _busy_poll_of_both(d: Difference) -> bool:
    rings = d.accepted.rings
    other = rings[TX if d.ring == RX else RX]
    return d.field in ("rx err", "tx err") and bool(d.kernel) and other.polled and not rings[d.ring].started


@_rule("broken-for-good", ends=True)
def _broken_for_good(d: Difference) -> bool:
    """An available index that was wrong is right again."""
    for ring in (RX, TX):
        adds = [step for step in d.before if step.name == "add" and step.ring == ring]
        wrong = [any("ahead" in bad for chain in step.value for bad in chain.get("bad", ())) for step in adds]
        if any(wrong) and not wrong[-1]:
            return _ends_sending(d) or d.field.startswith("rx ") or d.field == "unused"
    return False


# -- receiving


@_rule("frame-larger-than-ring", ends=True)
def _frame_larger_than_ring(d: Difference) -> bool:
    waiting = d.kernel_seen[d.index].what.get("rx waiting")
    return waiting == d.case.rings[RX].num


@_rule("wild-receive-index", ends=True)
def _wild_receive_index(d: Difference) -> bool:
    """An available index of the receive ring too far ahead: Linux goes on with what it has read before, we stop."""
    adds = [step for step in d.before if step.name == "add" and step.ring == RX]
    wild = any("ahead" in bad for step in adds for chain in step.value for bad in chain.get("bad", ()))
    return wild and (d.field.startswith("rx ") or d.field in ("memory", "unused", "log"))


@_rule("receive-broken-early")
def _receive_broken_early(d: Difference) -> bool:
    return d.field == "rx err" and d.ours and bool(_bad(d, RX)) and not d.seen_before(d.ours_seen, "rx err", True)


@_rule("receive-before-bad-chain", ends=True)
def _receive_before_bad_chain(d: Difference) -> bool:
    if not _bad(d, RX) or not d.accepted.features & MRG_RXBUF:
        return False
    stopped_alone = bool(d.kernel) and not d.seen_before(d.ours_seen, "rx err", True)
    return stopped_alone if d.field == "rx err" else d.field == "rx used"


@_rule("receive-empty", ends=True)
def _receive_empty(d: Difference) -> bool:
    chains = d.chains(RX)
    return (
        d.field == "rx err" and bool(d.kernel) and any(not sum(length for _, length in chain["i"]) for chain in chains)
    )


# -- sending


def _ends_sending(d: Difference) -> bool:
    """Whether it shows first that one side has sent something and the other has not."""
    return d.field in ("frames", "tx err", "tx call", "memory", "log", "log call") or d.field.startswith("tx used")


@_rule("polled-without-kick", ends=True)
def _polled_without_kick(d: Difference) -> bool:
    return _ends_sending(d) and d.accepted.rings[TX].kick != "event" and bool(d.chains(TX))


@_rule("no-header-without-features", ends=True)
def _no_header_without_features(d: Difference) -> bool:
    return (_ends_sending(d) or d.field.startswith("rx used")) and not d.accepted.negotiated


@_rule("indirect-not-negotiated", ends=True)
def _indirect_not_negotiated(d: Difference) -> bool:
    return _ends_sending(d) and not d.accepted.features & INDIRECT_DESC and any("t" in chain for chain in d.chains(TX))


@_rule("indirect-and-next", ends=True)
def _indirect_and_next(d: Difference) -> bool:
    flags = [bad.get("flags", 0) for chain in _bad(d, TX) for bad in chain["bad"] if "desc" in bad]
    return _ends_sending(d) and any(flag & (INDIRECT | NEXT) == INDIRECT | NEXT for flag in flags)


@_rule("transmit-without-header", ends=True)
def _transmit_without_header(d: Difference) -> bool:
    least = header_len(d.accepted.features)
    return _ends_sending(d) and any(sum(length for _, length in chain["o"]) < least for chain in d.chains(TX))


@_rule("transmit-writable", ends=True)
def _transmit_writable(d: Difference) -> bool:
    return _ends_sending(d) and any(chain["i"] for chain in d.chains(TX))


@_rule("bad-header", ends=True)
def _bad_header(d: Difference) -> bool:
    return _ends_sending(d) and any(_asks_badly(chain) for chain in d.chains(TX) if "h" in chain)


def _asks_badly(chain: dict[str, Any]) -> bool:
    """Whether a header does not go with its frame (virtio 1.3, 5.1.6.2)."""
    asked = NetHeader.unpack(bytes.fromhex(chain["h"]))
    size = chain["f"][1]
    if asked.flags & NetHeader.NEEDS_CSUM and asked.csum_start + asked.csum_offset + 2 > size:
        return True
    if asked.hdr_len > size:
        return True
    return asked.gso_type != NetHeader.GSO_NONE and not (asked.gso_size and asked.flags & NetHeader.NEEDS_CSUM)


@_rule("offload-not-negotiated", ends=True)
def _offload_not_negotiated(d: Difference) -> bool:
    asked = [NetHeader.unpack(bytes.fromhex(chain["h"])) for chain in d.chains(TX) if "h" in chain]
    return _ends_sending(d) and any(_needs(header) & ~d.accepted.features for header in asked)


def _needs(header: NetHeader) -> int:
    """Return the features that a header asks for."""
    needed = 1 << CSUM if header.flags & NetHeader.NEEDS_CSUM else 0
    needed |= 1 << HOST_ECN if header.gso_type & NetHeader.GSO_ECN else 0
    segments = SEGMENTS.get(header.gso_type & ~NetHeader.GSO_ECN)
    return needed if segments is None else needed | 1 << segments
