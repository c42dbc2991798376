"""How a server outlives its control process: what is recorded, and how the next one takes it up.

**What dies, and what does not.** `vhostmp serve --control-path P` killed by SIGKILL takes its threads and its tables of
descriptors along. Everything that packets need goes on: workers hold guest memory, eventfds and back-ends of their own;
the truth of each ring is in the control segment. What only the control process had is in its *store* (fdstore.py), and
described by *records* there (keeper.py, records.py): the pool (segment, spawner, workers), and each device with its
listening socket and its connection. The holder, or systemd, keeps the control process's ends of all channels open, so
neither the spawner nor a worker sees an end-of-file, and no front-end sees its socket close.

**The order of things.** Nothing is so before it is recorded, and nothing that is recorded lacks its descriptors:

1. descriptors into the store;
2. the record, with what is *about to be* in force beside what is (kept_device.py);
3. the generation is published; workers change over; the grace period;
4. the message is recorded as *done*, in one store with all that it changed (kept_transport.py);
5. the reply.

A front-end has thus been told nothing that is not on record.

**Adoption**, by a process that was started with the same control path. Two at once cannot be: the holder talks to one,
and takes the next one once that one's connection has ended, which is when it is dead.

1. *Look*: records and their versions, the options of the new process against the devices on record, the layout of the
   control segment. What is wrong here is said in one line; nothing was touched, and the store waits for another.
2. *Processes*: each worker, and the spawner, is asked a question with a token of ours over its channel. Answers to
   questions of the dead one come first and are passed over, so everything that it asked for has been done or has not,
   and the worker says what it holds. A dead worker is replaced (its rings have waited); a dead spawner took all its
   workers along.
3. *Devices*: the published generation says whether the half-done change is in force: forward or back. One flush of that
   same state follows (kept_device.py), after which every worker has what is on record, and nothing else: `drop`. From a
   worker that does not come out of an older state in time nothing is taken before it has.
4. *Connections*: the message that the dead one had taken and not done is done now; a reply not sent yet is sent.

A death in the middle of adoption is like any other: each step ends in what it began with, or in what is on record.

**What is given up**: a guest in the middle of post-copy, whose faults go through threads of ours (its front-end is hung
up on, and the workers that may wait for its pages are killed before anything can release them), and a transfer of
device state, which the front-end is told has failed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import attrs

from vhostmp import kept_device
from vhostmp.backchannel import BackendChannel
from vhostmp.backends import kept_backend
from vhostmp.blk import kept_disk
from vhostmp.consts import ProtocolFeature
from vhostmp.errors import LocalError, VhostError
from vhostmp.handlers import config, iotlb
from vhostmp.keeper import POOL, WHOLE, Keeper
from vhostmp.kept_device import KeptDevice, RecordedDevice, Regions
from vhostmp.parts import DeviceState, Setup, last_id, skip_ids
from vhostmp.plain import Fds
from vhostmp.protocol.state import Event, Phase
from vhostmp.requests import RequestSetup
from vhostmp.session import Session
from vhostmp.shm import layout
from vhostmp.shm.records import Plain
from vhostmp.transport import Listener, socket_of
from vhostmp.workers.processes import WorkerProcess, answers_due

log = logging.getLogger(__name__)

DEVICE: Final = "device."
#: How long answers to the questions of the dead one may take to be read: then what is open is asked once more, seconds.
QUESTIONS_SECONDS: Final = 0.1


def _kept_requests(values: dict[str, Any], fds: list[int]) -> RequestSetup:
    return RequestSetup(**values, fds=fds)


MAKERS: Final[Mapping[str, Callable[[dict[str, Any], list[int]], Setup]]] = {
    "BackendSetup": kept_backend,
    "Disk": kept_disk,
    "RequestSetup": _kept_requests,
}
"""By type: what makes an open back-end of its fields and descriptors."""


@attrs.frozen
class Adopted:
    """When and from whom a server was adopted, for `vhostmp show`: wall clock, seconds."""

    at: float
    count: int
    from_pid: int


class PortRecord:
    """The record of one device, its listening socket and its connection. See `Recorder` and `Committer`."""

    def __init__(self, keeper: Keeper, number: int) -> None:
        """Begin; with `found`, what a control process before us wrote, if anything."""
        self.keeper: Final = keeper
        self.name: Final = f"{DEVICE}{number}"
        self.found: Final[Plain | None] = keeper.found.get(self.name)
        self._device: RecordedDevice | None = None
        self._describe: Callable[[Fds], Plain] | None = None
        self._port: Plain = self.found["port"] if self.found else {"done": 0, "connection": None}
        self._port_fds: Fds = {}

    @property
    def done(self) -> int:
        """The number of the last message that was done, on whatever connection."""
        return int(self._port["done"])

    def attach(self, device: RecordedDevice) -> None:
        """Record a device from now on; its port is what was found."""
        self._device = device
        device.recorder = self

    def begin(self, describe: Callable[[Fds], Plain]) -> None:
        """Record its port too from now on: what `describe` says."""
        self._describe = describe
        self.commit()

    def commit(self) -> None:
        """Write everything as it is now: a message is done, or a connection has come or gone."""
        if self._describe is not None:
            self._port_fds = {}
            self._port = self._describe(self._port_fds)
            self._write(None)

    def in_force(self) -> None:
        """Write the device as it is; of the connection what was so when the last message was done.

        What a verb let go of, a tap say, is free for others once this returns.
        """
        self._write(None)
        self.keeper.sync()

    def coming(self, new: DeviceState) -> None:
        """Write the device as it is, and the state that is about to be published."""
        self._write(new)

    def _write(self, new: DeviceState | None) -> None:
        if self._device is None:
            return
        fds: Fds = dict(self._port_fds)
        device = self._device.describe(fds, new)
        self.keeper.write(self.name, {"device": device, "port": self._port, "ids": last_id()}, fds)

    # --- what was found ---

    def device(self, buf: memoryview) -> KeptDevice:
        """Return the device that was found. LocalError: it is not known which state is in force."""
        assert self.found is not None
        kept = KeptDevice(self.found["device"], self.keeper.take, MAKERS)
        kept.restore(buf)
        return kept

    def listener(self, path: str) -> Listener | None:
        """Return the listening socket that was found, None where there is none."""
        if self.found is None or (number := self.found["port"].get("listener")) is None or not os.path.exists(path):
            return None
        return Listener(socket_of(self.keeper.take(f"listener.{number}")), path, number)


def check(keeper: Keeper, shapes: Sequence[Plain]) -> None:
    """Judge whether what was found is what is to be served now. Raises: LocalError: it is not; says what to do.

    `shapes`: of each device, those fields of its record that options decide, and its socket.
    """
    found = [keeper.found.get(f"{DEVICE}{number}") for number in range(len(shapes))]
    known = sum(name.startswith(DEVICE) for name in keeper.found)
    version = keeper.found[POOL]["version"]
    if version != layout.CONSTANTS["SEGMENT_VERSION"]:
        raise LocalError(
            f"the workers that run have version {version} of the control segment, this program needs "
            f"{layout.CONSTANTS['SEGMENT_VERSION']}: use the one that started them, or --adopt-timeout 0 to end them"
        )
    if known != len(shapes) or None in found:
        raise LocalError(
            f"devices that wait to be served on: {known}, devices given: {len(shapes)}: "
            "use the same options as before, or --adopt-timeout 0 to begin anew"
        )
    for number, (shape, plain) in enumerate(zip(shapes, found, strict=True)):
        assert plain is not None
        before = {**plain["device"], **plain["port"]}
        for name, wanted in shape.items():
            if before.get(name) != wanted:
                raise LocalError(
                    f"device {number} that waits to be served on has {name} {before.get(name)}, and {wanted} is given: "
                    "use the same options as before, or --adopt-timeout 0 to begin anew"
                )


def begin(keeper: Keeper) -> None:
    """Before anything is restored: no number that is in use is given out again."""
    skip_ids(max(int(plain["ids"]) for plain in keeper.found.values()))


def say_who_serves(keeper: Keeper, buf: memoryview) -> None:
    """Say in the slots of all rings that were found who serves them, as the published generations have it."""
    for name, plain in keeper.found.items():
        if name.startswith(DEVICE):
            kept_device.say_who_serves(plain["device"], buf)


def waiting_for_pages(keeper: Keeper) -> set[int]:
    """Return the workers that serve a guest which came in by post-copy: they may wait for pages that do not come."""
    doomed: set[int] = set()
    for plain in (plain["device"] for name, plain in keeper.found.items() if name.startswith(DEVICE)):
        if plain["paged"]:
            for state in filter(None, (plain["state"], plain["next"])):
                doomed.update(state["workers"])
    return doomed


def drop_the_rest(devices: Sequence[RecordedDevice], workers: Sequence[WorkerProcess]) -> list[WorkerProcess]:
    """Have workers drop what no device's state names: what the dead one had sent, or was about to take away.

    Returns those that may still be using that, of which nothing was asked: inside a state that we know nothing of.
    """
    room_due = answers_due()
    late: list[WorkerProcess] = []
    told: list[tuple[WorkerProcess, list[int]]] = []
    unsynchronized = set[int]().union(*(device.unsynchronized for device in devices))
    for worker in workers:
        if worker.index in unsynchronized:
            late.append(worker)
            continue
        named: set[int] = set()
        for device in devices:
            parts, _ = device.state.holdings(worker.index)
            named |= {part.id for part in parts}
        if rest := list(worker.parts - named):
            with contextlib.suppress(VhostError):  # it is dead, and so is what it had
                worker.ask({"op": "drop", "parts": rest}, due=room_due)
                told.append((worker, rest))
    due = answers_due()
    for worker, rest in told:
        try:
            worker.answer(due)
        except VhostError as error:
            log.warning("worker %d keeps what nobody uses: %s", worker.index, error)
        worker.parts -= set(rest)
        for part_id in rest:
            worker.groups.pop(part_id, None)
    return late


# --- a session as plain data ---


def describe_session(session: Session, fds: Fds) -> Plain:
    """Return what a connection has negotiated and set beyond the device's state, as of the message done last."""
    channel = session.channel
    if channel is not None and not channel.closed:
        fds[f"channel.{channel.id}"] = channel.fileno()
    state = session.state
    return {
        "offered": state.offered,
        "phase": state.phase.name,
        "negotiated": state.negotiated,
        "features": state.features,
        "status": state.status,
        "config_changed": session.config_changed,
        "channel": channel.id if channel is not None and not channel.closed else None,
        "inband": None if session.inband is None else session.inband.describe(fds),
        "told_regions": [(key, file, count) for key, (file, count) in session.told_regions.items()],
        "regions": sorted(session.regions_done),
    }


def restore_session(session: Session, plain: Plain, device: RecordedDevice, keeper: Keeper) -> None:
    """Have a new session go on where that of the dead control process stood."""
    state = session.state
    state.offered, state.negotiated = plain["offered"], plain["negotiated"]
    state.features, state.status = plain["features"], plain["status"]
    state.phase = Phase[plain["phase"]]
    session.started = {index for index, ring in enumerate(device.state.rings) if ring.started}
    if state.phase in (Phase.OWNED, Phase.RUNNING):
        state.advance(Event.RING_STARTED if session.started else Event.ALL_STOPPED)
    session.told_regions = {
        cast("tuple[int, int, int]", tuple(key)): (cast("tuple[int, int, int]", tuple(file)), count)
        for key, file, count in plain["told_regions"]
    }
    before: Regions = frozenset(cast("tuple[int, int, int]", tuple(region)) for region in plain["regions"])
    now = device.regions_known()
    session.regions_done, session.again_added, session.again_removed = before, now - before, before - now
    if plain["inband"] is not None and session.inband is not None:
        session.inband.go_on(plain["inband"], keeper.take)
    if plain["channel"] is not None:
        assert session.loop is not None
        sock = socket_of(keeper.take(f"channel.{plain['channel']}"))
        ack = state.has(ProtocolFeature.REPLY_ACK)
        session.set_channel(BackendChannel(session.loop, sock, device.name, reply_ack=ack, found=plain["channel"]))
    if session.loop is not None:  # without a channel, too: what waits is asked on the one to come
        session.loop.call_later(QUESTIONS_SECONDS, lambda: iotlb.ask_what_was_open(session))
    session.config_changed = True  # whoever was killed may have been about to say so: once too often is harmless
    if session.started:
        config.tell_config_change(session)


def adopted(keeper: Keeper) -> Adopted | None:
    """Return what to say of the adoption that has just taken place; None: there was none."""
    pool = keeper.found.get(POOL)
    if pool is None:
        return None
    return Adopted(time.time(), int(pool.get("adoptions", 0)) + 1, int(pool.get("control_pid", 0)))


def describe_pool(plain: Plain, by: Adopted | None, *, is_whole: bool) -> Plain:
    """Return the record of the pool: `plain` is what it says of itself, `is_whole`: see WHOLE."""
    return {
        WHOLE: is_whole,
        **plain,
        "ids": last_id(),
        "control_pid": os.getpid(),
        "adoptions": by.count if by is not None else 0,
    }
