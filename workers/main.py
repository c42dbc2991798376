"""A worker process: the data thread runs the loop, the channel thread prepares and retires.

Contexts of execution. *Data thread* (the main thread): `Loop.run`, without the GIL; it alone serves rings.
*Channel thread*: answers the control process; maps memory, makes back-ends, watches descriptors before a configuration
is published, and undoes all that a grace period after its successor was. What it does takes no time from the data
thread, but for the GIL where a back-end is written in Python.

Parts. A configuration is made of parts (memory tables, back-ends, descriptors), each with an id that is never used
again. The control process sends a part once and names it by id from then on; `retire` drops it. A back-end grows and
shrinks by groups of rings (queue pairs, say), as they are moved to this worker and away from it. A control process that
takes us over from another one that died asks for an `inventory`, and has what it does not know of `drop`ped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence

import attrs

from vhostmp.errors import LocalError, VhostError, WorkerDied
from vhostmp.shm import layout
from vhostmp.shm._filemap import FileMap
from vhostmp.shm._iotlb import IotlbTable
from vhostmp.shm._life import begin, prepare
from vhostmp.shm._log import LogMap
from vhostmp.shm._memory import MemoryMap
from vhostmp.shm._userfault import new_userfaultfd, register_missing
from vhostmp.shm.memory import MemoryRegion
from vhostmp.shm.segment import Segment
from vhostmp.workers import _signal, imported, leftover, sandbox
from vhostmp.workers._config import Backend, DeviceConfig
from vhostmp.workers._loop import Loop
from vhostmp.workers.backends import python_api
from vhostmp.workers.backends._pairs import NetBackend
from vhostmp.workers.backends._requests import RequestBackend
from vhostmp.workers.channel import Channel, Message, close_all, is_readable
from vhostmp.workers.devices import api as devices
from vhostmp.workers.logs import log_to
from vhostmp.workers.process import set_name

log = logging.getLogger(__name__)
backend_log = logging.getLogger("vhostmp.backend")

#: How long a thread may keep the GIL from another: with a back-end in Python, how long the channel thread can hold the
#: data thread up. The default of 5 ms is felt by a guest.
SWITCH_INTERVAL_SECONDS = 0.0002


@attrs.define(eq=False)
class Part:
    """Something that configurations refer to: something mapped, an IotlbTable, a Backend, or a bare descriptor.

    `fds` and `group_fds` (a back-end's descriptors, by group of rings) are owned.
    """

    value: MemoryMap | FileMap | IotlbTable | Backend | None = None
    fds: list[int] = attrs.field(factory=list[int])
    group_fds: dict[int, int] = attrs.field(factory=dict[int, int])
    watched: list[int] = attrs.field(factory=list[int])
    groups: set[int] = attrs.field(factory=set[int])


class Worker:
    """The channel thread's state."""

    def __init__(self, segment: Segment, channel: Channel, nudge: int) -> None:
        """Get ready to serve a worker slot of `segment`: `begin` says which."""
        self.index = -1
        self._segment = segment
        self._channel = channel
        self._nudge = nudge
        self._notice = os.eventfd(0, os.EFD_CLOEXEC)
        _signal.begin()
        self.loop = Loop(segment.buf, nudge, self._notice)
        self._parts: dict[int, Part] = {}
        self._configs: dict[int, dict[int, DeviceConfig]] = {}
        self._rings: dict[int, range] = {}
        self._names: dict[int, str] = {}
        self._broken: set[int] = set()
        self._unrecovered: set[int] = set()
        self._stopped = False

    def begin(self, index: int) -> None:
        """Serve worker slot `index`; -1: which one is said by the first message. Before any thread runs."""
        if index < 0:
            self._serve_one()
            while is_readable(self._channel.fileno()) and not self._stopped:
                self._serve_one()
        else:
            self._be(index)

    def serve_channel(self) -> None:
        """Answer the control process until it says stop. The channel thread."""
        while not self._stopped:
            self._serve_one()

    def _serve_one(self) -> None:
        try:
            message, fds = self._channel.receive()
        except WorkerDied:
            os._exit(0)  # the control process is gone; spawner.py has the rule
        if message["op"] == "be":  # the only one without an answer
            self._be(message["index"])
            return
        answer, files = self._answer(message, fds)
        self._channel.send(answer, files)
        close_all(files)
        if message["op"] == "stop":
            self._stopped = True
            self.loop.stop()

    def _be(self, index: int) -> None:
        self.index = index
        self.loop.take(index)
        set_name(f"vhostmp-w{index}")

    def count_dropped_record(self) -> None:
        """Count a log record for which the control process had no room."""
        if self.index >= 0:
            base = layout.worker_offset(self.index)
            count = layout.WORKER.read(self._segment.buf, base, "log_dropped")
            layout.WORKER.write(self._segment.buf, base, "log_dropped", count + 1)

    def watch_notices(self) -> None:
        """Log rings that the data thread stopped, and regions that it did not take. The notice thread: asleep else."""
        while True:
            os.eventfd_read(self._notice)
            for device, rings in list(self._rings.items()):
                for ring in rings:
                    self._look(device, rings, ring)

    def _look(self, device: int, rings: range, ring: int) -> None:
        """Log what is wrong with a ring, once."""
        broken, fault = self._word(ring, "broken"), self._word(ring, "region_fault")
        if broken and ring not in self._broken:
            self._broken.add(ring)
            log.warning(
                "device %s: queue %d stopped, the driver broke the rules: %s",
                self._names[device],
                ring - rings.start,
                layout.reason(layout.BROKEN_REASONS, broken),
            )
        elif not broken:
            self._broken.discard(ring)
        if fault and ring not in self._unrecovered:
            self._unrecovered.add(ring)
            log.warning(
                "device %s: queue %d stands where the front-end says: its region of what is in flight is not "
                "used, it is inconsistent: %s",
                self._names[device],
                ring - rings.start,
                layout.reason(layout.REGION_FAULTS, fault),
            )
        elif not fault:
            self._unrecovered.discard(ring)

    def _word(self, ring: int, name: str) -> int:
        return layout.RING.read(self._segment.buf, layout.ring_offset(ring), name)

    def close(self) -> None:
        """Tell python back-ends that the worker ends. After the loop has returned."""
        for part in self._parts.values():
            self._close_backend(part)

    def _answer(self, message: Message, fds: list[int]) -> tuple[Message, list[int]]:
        try:
            return self._do(message, fds)
        except VhostError as error:
            close_all(fds)
            return {"error": str(error), "errno": error.errno}, []
        except OSError as error:
            close_all(fds)
            return {"error": str(error), "errno": error.errno}, []
        except Exception as error:
            close_all(fds)
            log.exception("%s failed", message["op"])
            return {"error": f"{type(error).__name__}: {error}", "errno": 0}, []

    def _do(self, message: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Do what a message asks for; return the answer, and files that go with it."""
        match message["op"]:
            case "fds":
                for part_id, fd in zip(message["ids"], fds, strict=True):
                    self._parts[part_id] = Part(fds=[fd])
            case "map":
                return self._map(message, fds)
            case "retire":
                return self._retire(message)
            case "inventory":
                held = {part_id: sorted(part.groups) for part_id, part in self._parts.items()}
                return {"token": message["token"], "parts": list(held), "groups": list(held.values())}, []
            case "drop":
                for part_id in message["parts"]:
                    self._drop(part_id)
            case "check":
                with python_api.load(message["reference"], python_api.NET_METHODS):
                    return {"files": imported.noted()}, []  # it can be used
            case "describe":
                return {"described": devices.describe(message["reference"]), "files": imported.noted()}, []
            case "prepare":
                self._prepare(message, fds)
            case "announce":
                self._announce(message)
            case _:
                pass  # "stop": the answer is all
        return {}, []

    def _prepare(self, message: Message, fds: list[int]) -> None:
        """Make the parts that come with the message, then the configuration, and install it. All or nothing."""
        made: list[int] = []
        added: list[Message] = []
        try:
            if message["memory_id"] and message["memory_id"] not in self._parts:
                raise LocalError("the memory table was refused")
            if (dirty_log := message.get("dirty_log")) is not None:
                part_id, size, offset = (dirty_log[name] for name in ("id", "size", "offset"))
                self._parts[part_id] = Part(LogMap(fds[0], size, offset))
                made.append(part_id)
                os.close(fds.pop(0))  # the mapping keeps the log
            if (iotlb := message.get("iotlb")) is not None:
                self._parts[iotlb] = Part(IotlbTable(fds[0]), fds=fds[:2])
                made.append(iotlb)
                del fds[:2]
            if (inflight := message.get("inflight")) is not None:
                part_id, size, offset = (inflight[name] for name in ("id", "size", "offset"))
                self._parts[part_id] = Part(FileMap(fds[0], size, offset, "a region of what is in flight"))
                made.append(part_id)
                os.close(fds.pop(0))  # the mapping keeps the region
            for backend in message["backends"]:
                if backend["id"] not in self._parts:
                    self._parts[backend["id"]] = Part()
                    made.append(backend["id"])
                added.append(backend)
                self._add_groups(backend, fds, message)
            for group in message["carried"]:
                made_backend = self._parts[message["backend_id"]].value
                assert isinstance(made_backend, Backend)
                made_backend.put_back(group, leftover.from_file(fds[0]))
                os.close(fds.pop(0))
            self._install(message)
            # A ring that was started anew and breaks again is news again.
            self._broken = {ring for ring in self._broken if self._word(ring, "broken")}
            self._unrecovered = {ring for ring in self._unrecovered if self._word(ring, "region_fault")}
        except BaseException:
            for backend in added:
                self._drop_groups(self._parts[backend["id"]], backend["groups"])
            for part_id in made:
                self._drop(part_id)
            raise

    def _map(self, message: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Map a memory table.

        In post-copy its faults are given up to the control process: the answer has where each region is mapped, and a
        userfaultfd, of which we keep none. It goes ahead of the configuration, so that nobody can be waiting for a page
        before the control process has it.
        """
        regions = [
            MemoryRegion(gpa=gpa, size=size, uva=uva, fd=self._parts.pop(fd_id).fds[0], mmap_offset=offset)
            for fd_id, gpa, size, uva, offset in message["regions"]
        ]
        try:
            memory = MemoryMap(regions)
        finally:
            close_all(region.fd for region in regions)  # the mapping keeps the memory
        answer: Message = {}
        files: list[int] = []
        if message["paged"]:
            try:
                files.append(new_userfaultfd(fds[0] if fds else -1))
                for start, length in memory.mappings():
                    register_missing(files[0], start, length)
            except BaseException:
                close_all(files)
                memory.close()
                raise
            answer["mappings"] = memory.mappings()
        close_all(fds)
        self._parts[message["id"]] = Part(memory)
        return answer, files

    def _add_groups(self, backend: Message, fds: list[int], message: Message) -> None:
        """Give a back-end further groups of rings; make it where this is the first we hear of it.

        `fds`: its descriptors come first, and are taken. Whatever fails, `_drop_groups` and `_drop` undo it.
        """
        part = self._parts[backend["id"]]
        count: int = backend["fds"]
        if backend["shared"]:
            part.fds += fds[:count]
        else:
            part.group_fds.update(zip(backend["groups"], fds[:count], strict=False))
        del fds[:count]
        made = part.value
        if made is None:
            try:
                if backend["kind"] == "requests":
                    made = RequestBackend(part.fds, **backend["options"], device=message["name"])
                else:
                    made = NetBackend(backend["kind"], **backend["options"], device=message["name"])
            except LocalError as error:
                # Whoever hears of the refusal may be a front-end: who wrote the class looks here.
                backend_log.error("device %s: %s", message["name"], error, exc_info=error.__cause__)
                raise
            part.value = made
            if (fd := made.fileno()) >= 0:
                self.loop.watch_device(message["device"], fd)
                part.watched.append(fd)
        assert isinstance(made, Backend)
        for group in backend["groups"]:
            part.groups.add(group)
            for ring, fd in made.add(group, part.group_fds.get(group, -1)):
                self.loop.watch_backend(message["first_ring"] + ring, fd)
                part.watched.append(fd)

    def _drop_groups(self, part: Part, groups: list[int]) -> dict[int, list[bytes]]:
        """Take groups of rings from a back-end. Returns the packets that it had not delivered, by group."""
        left: dict[int, list[bytes]] = {}
        part.groups.difference_update(groups)
        for group in groups:
            if isinstance(part.value, Backend) and (packets := part.value.drop(group)):
                left[group] = packets
            fd = part.group_fds.pop(group, -1)
            if fd in part.watched:
                self.loop.unwatch(fd)
                part.watched.remove(fd)
            close_all([fd] if fd >= 0 else [])
        return left

    def _install(self, message: Message) -> None:
        rings = [
            {**ring, **{kind: self._fd(ring[kind]) for kind in ("kick", "call", "err")}} for ring in message["rings"]
        ]
        memory, backend, dirty_log, draining, iotlb, inflight = (
            self._parts[message[f"{kind}_id"]].value if message[f"{kind}_id"] else None
            for kind in ("memory", "backend", "log", "draining", "iotlb", "inflight")
        )
        if dirty_log is None and message["logging"]:
            dirty_log = LogMap()  # none was given yet: what is written meanwhile is counted as outside of it
        assert memory is None or isinstance(memory, MemoryMap)
        assert backend is None or isinstance(backend, Backend)
        assert draining is None or isinstance(draining, Backend)
        assert dirty_log is None or isinstance(dirty_log, LogMap)
        assert iotlb is None or isinstance(iotlb, IotlbTable)
        assert inflight is None or isinstance(inflight, FileMap)
        config = DeviceConfig(
            message["generation"],
            message["first_ring"],
            message["n_rings"],
            message["features"],
            memory,
            backend,
            rings,
            dirty_log,
            self._fd(message["log_fd"]),
            draining,
            iotlb,
            self._parts[message["iotlb_id"]].fds[1] if iotlb is not None else -1,
            inflight,
        )
        for ring in message["rings"]:
            part = self._parts.get(ring["kick"])
            if part is not None and not part.watched:
                self.loop.watch_kick(message["first_ring"] + ring["index"], part.fds[0])
                part.watched.append(part.fds[0])
        device = message["device"]
        self.loop.install(device, config)
        if layout.DEVICE.read(self._segment.buf, layout.device_offset(device), "generation") == message["generation"]:
            os.eventfd_write(self._nudge, 1)  # in force already: we take a dead worker's place
        self._configs.setdefault(device, {})[message["generation"]] = config
        self._names[device] = message["name"]
        self._rings[device] = range(message["first_ring"], message["first_ring"] + message["n_rings"])

    def _fd(self, part_id: int) -> int:
        return self._parts[part_id].fds[0] if part_id else -1

    def _retire(self, message: Message) -> tuple[Message, list[int]]:
        """Drop every configuration of the device but one, and parts and groups of rings. The grace period is over.

        Answers with the groups for which a back-end had packets left, and a file of them for each.
        """
        # After a refusal nobody has waited for those who may still use an older configuration.
        older: bool = message["older"]
        self.loop.forget(message["device"], message["generation"], older)
        configs = self._configs.get(message["device"], {})
        self._configs[message["device"]] = {
            generation: config
            for generation, config in configs.items()
            if generation == message["generation"] or (older and generation < message["generation"])
        }
        left: dict[int, list[bytes]] = {}
        for gone in message["groups"]:
            if (part := self._parts.get(gone["id"])) is not None:
                left.update(self._drop_groups(part, gone["groups"]))
        for part_id in message["parts"]:
            self._drop(part_id)
        return ({"left": list(left)}, [leftover.to_file(packets) for packets in left.values()]) if left else ({}, [])

    def _announce(self, message: Message) -> None:
        """Have a back-end written in Python, where it has a method for it, announce a guest's address."""
        part = self._parts.get(message["part"])
        if part is None or not isinstance(part.value, Backend):
            return
        if callable(announce := getattr(part.value.instance, "announce", None)):
            try:
                announce(bytes.fromhex(message["mac"]))
            except Exception as error:
                hint = python_api.sandbox_hint(part.value.instance, error)
                log.exception("announcement by the back-end failed%s", hint)

    def _drop(self, part_id: int) -> None:
        part = self._parts.pop(part_id, None)
        if part is None:
            return
        for fd in part.watched:
            self.loop.unwatch(fd)
        self._close_backend(part)
        if isinstance(part.value, MemoryMap | FileMap | IotlbTable):
            part.value.close()
        close_all([*part.fds, *part.group_fds.values()])

    @staticmethod
    def _close_backend(part: Part) -> None:
        if isinstance(part.value, Backend):
            try:
                part.value.close()
            except Exception:
                log.exception("close of the back-end failed")


@attrs.frozen
class Rights:
    """What a worker may do. `modules`: references of what back-ends in Python are made from, to be imported first."""

    sandboxed: bool
    modules: Sequence[str]


def run(index: int, segment_fd: int, segment_name: str, fds: list[int], log_level: int, rights: Rights) -> int:
    """Be worker `index` until told to stop. Called in a process just forked by the spawner.

    `fds` are the channel, the nudge eventfd and the log socket. A spare, whose index is -1, gets ready and waits for
    the message that says which worker it is; what follows that at once it does before it does anything else, so that no
    other thread has to be waited for. Returns the exit status.
    """
    channel_fd, nudge, log_fd = fds
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sandbox.keep_only({segment_fd, *fds})
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    segment = Segment.adopt(segment_fd, segment_name)
    channel = Channel(socket.socket(fileno=channel_fd))
    for reference in rights.modules:
        python_api.preload(reference)
    worker = Worker(segment, channel, nudge)
    log_to(socket.socket(fileno=log_fd), log_level, worker.count_dropped_record)
    prepare()
    if index < 0:
        warm_up()
    if rights.sandboxed:
        segment.keep_mapping_only()
        sandbox.restrict()
        sandbox.close("python" if rights.modules else "worker", channel_fd)
    # They are there before anybody is told that this worker serves: the processor that the control process then gives
    # the data thread is not one that they inherit, and a replacement need not wait until they have started.
    begun = threading.Event()
    for name, target in (("channel", worker.serve_channel), ("notices", worker.watch_notices)):
        threading.Thread(target=_once, args=(begun, target), name=name, daemon=True).start()
    worker.begin(index)
    begin(segment.buf, worker.index)
    begun.set()
    worker.loop.run()
    with contextlib.suppress(Exception):
        worker.close()
    return 0


def _once(begun: threading.Event, serve: Callable[[], None]) -> None:
    begun.wait()
    serve()


def warm_up() -> None:
    """Go through what a worker does first, so that the memory that it writes is this process's own already."""
    ours, theirs = Channel.pair()

    def answer() -> None:
        message, fds = theirs.receive()
        theirs.send(message, fds)
        close_all(fds)

    thread = threading.Thread(target=answer, name="warm-up")
    thread.start()
    ours.send({"op": "nothing", "rings": [{"index": 0, "log": None}]}, [ours.fileno()])
    close_all(ours.receive()[1])
    thread.join()
    ours.close()
    theirs.close()
