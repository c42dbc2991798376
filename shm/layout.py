"""Every struct that lives in the control segment: field, offset, width, who writes it, who reads it.

This file is the one source. `make layout` (tools/gen_layout.py) writes layout.h and layout.pxd from it, with an
assertion on each offset; Python reads the same fields through `read` and `write` below, for `vhostmp show`.

Rules:
- All numbers are host byte order: a segment never leaves the machine.
- Each field has one writer at a time. A field that changes hands (the ring state: control process while the ring is
  stopped, its worker while it runs) says when.
- What two processes write stands in different 128-byte lines (two 64-byte lines are fetched together).
- No pointers: each process maps the segment elsewhere.

The segment::

    0            header                       one
    4096         worker[WORKERS_MAX]          one slot a worker: read-side sequence, what it is doing, its counters
    ...          device[DEVICES_MAX]          the published generation of each device
    ...          ring[RINGS_MAX]              the truth of each virtqueue, and its counters
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import attrs

WIDTHS: Final = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
FORMATS: Final = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}


@attrs.frozen
class Field:
    """One field: `count` numbers of type `ctype` from byte `offset` of its struct."""

    name: str
    ctype: str
    offset: int
    count: int = 1
    writer: str = "control"
    readers: str = "all"
    doc: str = ""


@attrs.frozen
class Struct:
    """One struct of `size` bytes."""

    name: str
    size: int
    fields: tuple[Field, ...]
    doc: str = ""

    def field(self, name: str) -> Field:
        """Return the field called `name`; KeyError when there is none."""
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(name)

    def read(self, buf: memoryview | bytes, base: int, name: str, index: int = 0) -> int:
        """Read one number of the struct at `base`.

        For counters and diagnosis: single copy on every machine we run on, but without order.
        """
        field = self.field(name)
        value: int = struct.unpack_from(FORMATS[field.ctype], buf, base + field.offset + index * WIDTHS[field.ctype])[0]
        return value

    def write(self, buf: memoryview, base: int, name: str, value: int, index: int = 0) -> None:
        """Write one number of the struct at `base`. Only where nobody else reads it (set-up, stopped rings)."""
        field = self.field(name)
        struct.pack_into(FORMATS[field.ctype], buf, base + field.offset + index * WIDTHS[field.ctype], value)


#: Why a packet did not get through. The index is the place in `ring.drops`.
DROP_REASONS: Final = (
    "null",  # the null back-end swallows everything
    "short",  # shorter than a header or than an Ethernet header
    "oversize",  # longer than any frame we carry
    "header",  # virtio_net_hdr that contradicts the packet
    "offload",  # asks for an offload that the receiver did not negotiate
    "disabled",  # the ring (or its partner) is disabled
    "no_room",  # no receive buffer is large enough
    "backend_full",  # the tap's or socket's queue is full
    "backend_error",  # the back-end's system call or Python code failed
)

#: Why a ring was stopped: the value of `ring.broken`; 0 is "not broken".
BROKEN_REASONS: Final = (
    "",
    "avail_idx",
    "head",
    "next",
    "loop",
    "indirect",
    "indirect_len",
    "order",
    "address",
    "length",
    "segments",
    "direction",
    "memory",
    "deaths",
)

#: What is wrong with a region of what is in flight: the value of `ring.region_fault`; 0 is "nothing".
REGION_FAULTS: Final = (
    "",
    "version",  # another layout
    "desc_num",  # another number of entries than was said, or fewer than the ring has
    "used_idx",  # a position outside the ring
    "free_head",  # no entry
    "free_list",  # a free entry that leads nowhere, or in a circle
    "inflight",  # a mark that is neither 0 nor 1
    "counter",  # two chains taken at the same time
    "chain",  # entries in flight that are no chain, or more than the ring has descriptors
    "memory",  # none of ours left to look at it
)


def reason(reasons: Sequence[str], value: int) -> str:
    """Return the word for a reason that a worker noted, who may have noted anything."""
    return reasons[value] if value < len(reasons) else f"unknown ({value})"


#: Places of the data path at which a debug build can make a worker die, in the order in which a packet comes by them
#: (shm/build.h). The index + 1 is the value of `ring.kill_point`.
KILL_POINTS: Final = (
    "kick_read",  # the eventfd was read, nothing else
    "fetched",  # chains were looked at, none was begun
    "begun",  # a chain was marked in the journal, what is to be done with it was not begun
    "sent",  # a system call has sent a frame
    "received",  # a system call has read a frame
    "held",  # a frame that was read waits in the worker's memory
    "copied",  # frames are in receive buffers that are not given back
    "delivered",  # the receive ring has them, the transmit ring does not know
    "transmitted",  # Python has taken a batch
    "answered",  # Python has returned frames
    "processed",  # Python has served requests
    "returning",  # chains are about to be given back
    "returned",  # used elements are written (split), or noted (packed)
    "noted",  # the slot says what the indices will be
    "half_shown",  # packed: used descriptors are written but for the first
    "shown",  # the driver can see the batch
    "avail_noted",  # slot.last_avail_idx says so
    "used_noted",  # slot.used_idx says so too
    "unmarked",  # the journal's marks are gone, its used index is that before the batch
    "published",  # all of it is done
    "calling",  # the driver is about to be told, if it wants
    "called",  # it was told
    "hushed",  # it was told that no kicks are needed
    "asked",  # it was asked for kicks, and may have made something available before it saw that
    "settling",  # a replacement has found what a death has cost, and not counted it
    "settled",  # it has counted that, and the journal still says so
)

#: Chains that can be between being given back and being shown to the driver, of one ring: a burst (workers/_vring.pxd).
JOURNAL_ENTRIES: Final = 64

CONSTANTS: Final[dict[str, int]] = {
    "SEGMENT_MAGIC": int.from_bytes(b"vhostmp\0", "little"),
    "SEGMENT_VERSION": 4,
    "SEGMENT_READY": 1,
    "WORKERS_MAX": 64,
    "DEVICES_MAX": 1024,
    "RINGS_MAX": 4096,
    "DROP_REASONS": len(DROP_REASONS),
    **{f"DROP_{name.upper()}": index for index, name in enumerate(DROP_REASONS)},
    **{f"BROKEN_{name.upper()}": index for index, name in enumerate(BROKEN_REASONS) if name},
    **{f"REGION_{name.upper()}": index for index, name in enumerate(REGION_FAULTS) if name},
    "JOURNAL_ENTRIES": JOURNAL_ENTRIES,
    **{f"KILL_{name.upper()}": index for index, name in enumerate(KILL_POINTS, 1)},
}

HEADER: Final = Struct(
    "header",
    4096,
    (
        Field("magic", "u64", 0, doc="SEGMENT_MAGIC"),
        Field("version", "u32", 8, doc="SEGMENT_VERSION; another one is refused"),
        Field("state", "u32", 12, doc="0 while being made, then SEGMENT_READY (store-release): openers wait for it"),
        Field("size", "u64", 16, doc="bytes of the whole segment"),
        Field("owner_pid", "u32", 24, doc="the control process"),
        Field(
            "owner_start",
            "u64",
            32,
            doc="its start time in clock ticks since boot: pid and start name a process for good",
        ),
    ),
    "What the segment is and whose.",
)

WORKER: Final = Struct(
    "worker",
    256,
    (
        Field("seq", "u32", 0, writer="worker", readers="control", doc="odd inside a read-side section; a futex"),
        Field("waiters", "u32", 4, writer="control", readers="worker", doc="synchronize() calls that wait for seq"),
        Field("doing", "u32", 8, writer="worker", readers="control", doc="1 + ring number being served, 0 outside"),
        Field("asleep", "u32", 12, writer="worker", readers="control", doc="1 while blocked in epoll"),
        Field("pid", "u32", 16, writer="control", doc="0: no worker has this slot"),
        Field("restarts", "u32", 20, doc="how often the worker of this slot was replaced"),
        Field(
            "life",
            "u32",
            24,
            writer="worker, then the kernel",
            readers="control",
            doc="robust futex of the data thread: FUTEX_WAITERS and its id, or FUTEX_OWNER_DIED once "
            "it has ended; 0: not begun",
        ),
        Field(
            "fault", "u32", 28, writer="worker", readers="control", doc="signal that it is dying of by its own doing"
        ),
        Field("hangs", "u32", 32, doc="how often the watchdog killed the worker of this slot"),
        Field("items", "u64", 128, writer="worker", doc="work items run"),
        Field("wakeups", "u64", 136, writer="worker", doc="returns from a blocking epoll_wait"),
        Field("polls", "u64", 144, writer="worker", doc="empty polls while busy-polling"),
        Field("busy_ns", "u64", 152, writer="worker", doc="time inside work items that moved packets, nanoseconds"),
        Field(
            "switch_ns",
            "u64",
            160,
            writer="worker",
            doc="gap that the last change of generation left between two work items, nanoseconds",
        ),
        Field("switches", "u64", 168, writer="worker", doc="changes of generation seen"),
        Field(
            "log_dropped", "u64", 176, writer="worker", doc="log records that the control process did not take in time"
        ),
    ),
    "A worker's reader slot and counters.",
)

DEVICE: Final = Struct(
    "device",
    128,
    (
        Field("generation", "u64", 0, doc="the published configuration (store-release); 0: no device here"),
        Field("rings", "u32", 8, doc="how many ring slots it has"),
        Field("first_ring", "u32", 12, doc="the first of them"),
    ),
    "The published generation of a device.",
)

RING: Final = Struct(
    "ring",
    2688,
    (
        # The truth of the ring. Written by its worker while the ring runs, by the control process while it is stopped.
        # Indices of a packed ring are positions: offset, and wrap counter in bit 15 (workers/_packed.pyx).
        Field("last_avail_idx", "u16", 0, writer="worker, control while stopped", doc="next available entry to take"),
        Field("used_idx", "u16", 2, writer="worker, control while stopped", doc="used index published to the driver"),
        Field(
            "used_valid",
            "u16",
            4,
            writer="worker, control while stopped",
            doc="0: used_idx is to be read from the ring",
        ),
        Field("batch_avail_idx", "u16", 6, writer="worker", doc="last_avail_idx once the batch being published is out"),
        Field("batch_used_idx", "u16", 8, writer="worker", doc="used_idx once the batch being published is out"),
        Field("size", "u16", 10, doc="entries, 0 until set"),
        Field("broken", "u32", 12, writer="worker, control while stopped", doc="a BROKEN_ reason, 0 when whole"),
        Field("worker", "u32", 16, doc="1 + worker slot that serves it, 0: none"),
        Field("started", "u32", 20, doc="1 while started"),
        Field("enabled", "u32", 24, doc="1 while enabled"),
        Field("avail_idx", "u16", 28, writer="worker", doc="the driver's index when last looked at"),
        Field("batch_start_idx", "u16", 30, writer="worker", doc="packed: used_idx before the batch being published"),
        Field(
            "source_mac",
            "u64",
            32,
            writer="worker",
            doc="Ethernet source of a frame the guest sent: byte 0 in the low byte",
        ),
        Field(
            "batch_n",
            "u16",
            40,
            writer="worker, control while stopped",
            doc="packed: chains in the batch being published, 0: none is",
        ),
        Field(
            "recover",
            "u16",
            42,
            doc="packed: 1 when it was started for the first time since the front-end gave its region of what is in "
            "flight: that says where it stands, if anybody has begun it",
        ),
        Field(
            "region_fault",
            "u16",
            44,
            writer="worker",
            doc="packed: a REGION_FAULTS index: why that region was not taken; 0: it was, or there is none",
        ),
        Field(
            "died",
            "u16",
            46,
            writer="control, worker once it has taken the ring up",
            doc="1: the worker that served it has died, and nobody has taken it up since",
        ),
        # What goes with the journal (workers/_journal.pxd).
        Field(
            "effect_idx",
            "u16",
            48,
            writer="worker",
            doc="loopback, patch: the partner's used_idx before what is begun: while it is that, nothing came of it",
        ),
        Field("effect_valid", "u16", 50, writer="worker", doc="1: effect_idx means something"),
        Field("effect_ring", "u32", 60, writer="worker", doc="of which ring slot, in bits 0-30; bit 31: a packed one"),
        Field(
            "batch_waiting",
            "u32",
            52,
            writer="worker",
            doc="1 + `waiting` once the batch being published is out; 0: that does not change it",
        ),
        Field(
            "slips_known",
            "u16",
            56,
            writer="worker",
            doc="1: the next two are what `repeated` and `lost` are once a death is counted",
        ),
        Field("repeated_next", "u64", 64, writer="worker", doc="`repeated` with the last death in it"),
        Field("lost_next", "u64", 72, writer="worker", doc="`lost` with the last death in it"),
        # Debug builds: where to die (shm/build.h).
        Field(
            "kill_point", "u32", 80, writer="tests, worker", readers="worker", doc="1 + place in KILL_POINTS; 0: none"
        ),
        Field(
            "kill_left", "u32", 84, writer="tests, worker", readers="worker", doc="dies at this pass, 1: the next one"
        ),
        Field(
            "kill_signal",
            "u32",
            88,
            writer="tests",
            readers="worker",
            doc="of this signal; 0: it stays there until it is killed, its other threads go on",
        ),
        Field(
            "begun_bursts",
            "u64",
            96,
            writer="worker",
            doc="frames of a batch of several bursts that were begun and are done again after a death, without entries "
            "in the journal: 16 bits each burst, that which is published next in the lowest",
        ),
        Field("deaths", "u32", 116, doc="workers that died in a work item of it, since it was registered"),
        Field(
            "waiting",
            "u32",
            120,
            writer="worker",
            doc="frames that were taken from the back-end and wait in the worker's memory for buffers",
        ),
        # Counters, written by the worker.
        Field("packets", "u64", 128, writer="worker", doc="packets that went through"),
        Field("bytes", "u64", 136, writer="worker", doc="their bytes, without the virtio header"),
        Field("kicks", "u64", 144, writer="worker", doc="notifications from the driver that were read"),
        Field("calls", "u64", 152, writer="worker", doc="interrupts sent"),
        Field("calls_suppressed", "u64", 160, writer="worker", doc="interrupts the driver did not want"),
        Field("batches", "u64", 168, writer="worker", doc="used index updates"),
        Field("copied", "u64", 176, writer="worker", doc="bytes of frames that the worker itself copied"),
        Field("log_pages", "u64", 184, writer="worker", doc="bits of the dirty log set that were clear"),
        Field("log_outside", "u64", 192, writer="worker", doc="written pages for which the dirty log has no bit"),
        Field(
            "repeated",
            "u64",
            200,
            writer="worker",
            doc="packets or requests that a worker had begun when it died, and its replacement did again",
        ),
        Field("lost", "u64", 208, writer="worker", doc="packets taken from the back-end that a worker took with it"),
        Field("drops", "u64", 256, count=16, writer="worker", doc="by DROP_ reason"),
        # Behind an IOMMU.
        Field("miss_iova", "u64", 384, writer="worker", readers="control", doc="what it needs an IOTLB entry for"),
        Field(
            "miss",
            "u32",
            392,
            writer="worker",
            readers="control",
            doc="bits 0-1: access that it needs (1 to read, 2 to write); above: counts the reports",
        ),
        Field("miss_version", "u32", 396, writer="worker", readers="control", doc="the IOTLB's when it was missed"),
        Field("iotlb_hits", "u64", 400, writer="worker", doc="look-ups in the IOTLB that found an entry"),
        Field("iotlb_misses", "u64", 408, writer="worker", doc="look-ups that did not, and were reported"),
        Field("iotlb_unusable", "u64", 416, writer="worker", doc="entries found that guest memory does not hold"),
        Field("miss_begun", "u32", 424, writer="worker", readers="control", doc="what `miss` is or is about to be"),
        Field(
            "journal",
            "u64",
            512,
            count=4 + 4 * JOURNAL_ENTRIES,
            writer="worker",
            doc="what is taken, done and not published, in the layout of vhost-user's region of what is in flight: 64 "
            "entries of 16 (split) or 32 (packed) bytes (workers/_journal.pxd)",
        ),
    ),
    "One virtqueue.",
)

STRUCTS: Final = (HEADER, WORKER, DEVICE, RING)

WORKERS_OFFSET: Final = HEADER.size
DEVICES_OFFSET: Final = WORKERS_OFFSET + CONSTANTS["WORKERS_MAX"] * WORKER.size
RINGS_OFFSET: Final = DEVICES_OFFSET + CONSTANTS["DEVICES_MAX"] * DEVICE.size
SEGMENT_SIZE: Final = RINGS_OFFSET + CONSTANTS["RINGS_MAX"] * RING.size
CONSTANTS.update(
    WORKERS_OFFSET=WORKERS_OFFSET, DEVICES_OFFSET=DEVICES_OFFSET, RINGS_OFFSET=RINGS_OFFSET, SEGMENT_SIZE=SEGMENT_SIZE
)


def worker_offset(index: int) -> int:
    """Byte offset of a worker's slot in the control segment."""
    return WORKERS_OFFSET + index * WORKER.size


def device_offset(index: int) -> int:
    """Byte offset of a device's slot in the control segment."""
    return DEVICES_OFFSET + index * DEVICE.size


def ring_offset(index: int) -> int:
    """Byte offset of a ring's slot in the control segment."""
    return RINGS_OFFSET + index * RING.size
