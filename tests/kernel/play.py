"""Carries a case out on one side and notes what could be seen of it.

What a step's value is:

    set_features            the bits; those of offloads go to the tap where the kernel does not know them
    set_mem_table           a name, see `verbs.regions`
    set_log_fd, set_vring_kick, _call, _err     "event", "none", "closed", "file"
    set_vring_addr          how far each part is from its place, {"desc": 8}, and {"flags", "log"}
    set_vring_base          a number, or "last": what get_vring_base returned last
    start, stop             NET_SET_BACKEND with the tap, and with -1
    suppress                {"flags"} of the available ring, or {"event"}: used_event, from where the driver stands
    add                     chains; they are published together and kicked for
    frames                  what the network sends: [kind, size, number, whether its checksum is left to be done]
    settle                  waits until all is done, and looks at everything

A chain is {"o": readable, "i": writable segments of [gpa, bytes]}, with "t" the address of an indirect table, "f" the
frame [kind, size, number] that it holds, "h" the header before it in hexadecimal, and "bad" what is wrong with it:
{"desc": place, "addr", "len", "flags", "next"}, {"head": number} or {"ahead": by how much the index is moved}.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Any, Final, cast

import attrs

from tests.kernel import frames
from tests.kernel.arena import Arena, fired
from tests.kernel.case import RX, TX, Case, Step, pieces
from tests.kernel.verbs import Side
from vhostmp.backends import header_len
from vhostmp.tools.stress.ring import DESC_BYTES, DeviceError, RingLayout, Segment
from vhostmp.tools.stress.split import SplitDriver, pack_descriptor

_DESC: Final = struct.Struct("<QIHH")
RINGS: Final = (RX, TX)


@attrs.frozen
class Seen:
    """What could be seen at one step: of a verb its error and its result, of `settle` all else."""

    what: dict[str, Any]
    memory: bytes = b""


class Player:
    """One case on one side."""

    def __init__(self, case: Case, side: Side, arena: Arena) -> None:
        """Begin: everything is as if just opened, and the rings are there, empty."""
        self._case: Final = case
        self._side: Final = side
        self._arena: Final = arena
        self._last_base = [0, 0]
        self._open: Final[dict[tuple[int, int], None]] = {}
        arena.reset()
        self._layouts: Final = [RingLayout.at(plan.start, plan.num) for plan in case.rings]
        self._drivers: Final = [
            SplitDriver(arena.memory.buf, layout, features=case.features, first_idx=plan.base)
            for layout, plan in zip(self._layouts, case.rings, strict=True)
        ]
        side.tap.received()

    def run(self) -> list[Seen]:
        """Carry out all steps."""
        try:
            return [self._step(step) for step in self._case.steps]
        finally:
            self._side.forget()
            for driver in self._drivers:
                driver.close()

    def _step(self, step: Step) -> Seen:
        match step.name:
            case "suppress":
                return self._suppress(step)
            case "add":
                return self._add(step)
            case "frames":
                for kind, size, number, partial in step.value:
                    header = frames.offload(kind).pack()[:10] if partial else bytes(10)
                    self._side.tap.send(frames.build(kind, size, number), header)
                return Seen({})
            case "settle":
                return self._settle()
            case _:
                return self._verb(step)

    def _verb(self, step: Step) -> Seen:
        plan = self._case.rings[step.ring if step.ring < len(RINGS) else 0]
        if step.name == "set_vring_base" and step.value == "last":
            step = attrs.evolve(step, value=self._last_base[step.ring])
        try:
            result = self._side.verb(step, plan)
        except OSError as error:
            return Seen({"error": errno.errorcode.get(error.errno or 0, str(error))})
        if step.name == "start":
            # The first look at a ring is the device's own: whether a stop comes before it is not left to chance.
            self._side.wait_idle()
        if step.name == "get_vring_base" and result is not None:
            self._last_base[step.ring] = result
        return Seen({"error": None, "result": result})

    def _suppress(self, step: Step) -> Seen:
        driver = self._drivers[step.ring]
        if "flags" in step.value:
            driver.set_avail_flags(step.value["flags"])
        else:
            driver.set_used_event(driver.last_used + step.value["event"])
        return Seen({})

    def _add(self, step: Step) -> Seen:
        driver = self._drivers[step.ring]
        if any("ahead" in bad for chain in step.value for bad in chain.get("bad", ())):
            # A wild index takes with it what waits in the ring: whether frames came before it is not left to chance.
            self._side.wait_idle()
        ahead = 0
        full = 0
        for chain in step.value:
            try:
                head = driver.add(_segments(chain["o"]), _segments(chain["i"]), table=chain.get("t"))
            except IndexError:
                full += 1
                continue
            self._open.update((segment, None) for segment in _segments(chain["i"]) if segment[1])
            if "f" in chain:
                header = bytes.fromhex(chain["h"])[: header_len(self._case.features)]
                self._scatter(chain["o"], header + frames.build(*chain["f"]))
            for bad in chain.get("bad", ()):
                ahead += bad.get("ahead", 0)
                self._spoil(driver, head, chain, bad)
        driver.publish()
        if ahead:
            driver.set_avail_idx(driver.avail_idx + ahead)
        os.eventfd_write(self._arena.kicks[step.ring], 1)
        return Seen({"full": full})

    def _scatter(self, segments: list[list[int]], data: bytes) -> None:
        for gpa, length in segments:
            self._arena.write(gpa, data[:length])
            data = data[length:]

    def _spoil(self, driver: SplitDriver, head: int, chain: dict[str, Any], bad: dict[str, int]) -> None:
        """Make a descriptor, or the entry of the available ring, what it must not be."""
        if "head" in bad:
            driver.avail_idx = (driver.avail_idx - 1) & 0xFFFF
            driver.offer(bad["head"])
            return
        if "desc" not in bad:
            return
        index = bad["desc"]
        if "t" in chain and index >= 0:
            at = chain["t"] + DESC_BYTES * index
        else:
            slots = driver.in_flight[head].slots
            at = driver.layout.desc + DESC_BYTES * slots[index if "t" not in chain else 0]
        addr, length, flags, following = cast("tuple[int, int, int, int]", _DESC.unpack_from(driver.buf, at))
        raw = pack_descriptor(
            bad.get("addr", addr), bad.get("len", length), bad.get("flags", flags), bad.get("next", following)
        )
        driver.buf[at : at + DESC_BYTES] = raw

    def _settle(self) -> Seen:
        self._side.wait_idle()
        arena, what = self._arena, dict[str, Any]()
        memory = bytearray(arena.memory.buf)
        for ring in RINGS:
            name = "rx" if ring == RX else "tx"
            driver, place = self._drivers[ring], self._layouts[ring]
            what[f"{name} used idx"] = driver.used_idx
            what[f"{name} used"] = self._reap(driver)
            what[f"{name} words"] = [driver.used_flags, driver.avail_event]
            what[f"{name} call"] = fired(arena.calls[ring])
            what[f"{name} err"] = fired(arena.errs[ring])
            memory[place.used : place.used + 2] = memory[place.end - 2 : place.end] = bytes(2)
        what["frames"] = [frame.hex() for frame in self._side.tap.received()]
        what["log"] = arena.take_log()
        what["log call"] = fired(arena.log_fd)
        what["rx waiting"] = len(self._drivers[RX].in_flight)
        what["unused"] = self._unused(memory)
        return Seen(what, bytes(memory))

    def _reap(self, driver: SplitDriver) -> Any:
        """Return the used elements. With one that is wrong the driver stops, and what it says is seen too."""
        count = min(driver.pending(), driver.num)
        start = driver.layout.used + 4
        elements: list[Any] = [
            list(struct.unpack_from("<II", driver.buf, start + 8 * ((driver.last_used + i) % driver.num)))
            for i in range(count)
        ]
        try:
            found = driver.reap()
        except DeviceError as error:
            return [*elements, str(error)]
        for used in found:
            self._written(used.chain.writable, used.length or 0)
        return elements

    def _written(self, segments: list[Segment], length: int) -> None:
        """Note that the first `length` bytes of a chain have been written, and the rest is as the device left it."""
        for gpa, size in segments:
            if not size:
                continue
            del self._open[gpa, size]
            done = min(size, length)
            length -= done
            if done < size:
                self._open[gpa + done, size - done] = None

    def _unused(self, memory: bytearray) -> bytes:
        """Return what is in buffers that the device may write and says nothing of, and blank it."""
        found: list[bytes] = []
        for gpa, length in self._open:
            for offset, size in pieces(gpa, length):
                found.append(bytes(memory[offset : offset + size]))
                memory[offset : offset + size] = bytes(size)
        return b"".join(found)


def _segments(listed: list[list[int]]) -> list[tuple[int, int]]:
    return [(gpa, length) for gpa, length in listed]


def play(case: Case, side: Side, arena: Arena) -> list[Seen]:
    """Carry a case out; one Seen a step."""
    return Player(case, side, arena).run()
