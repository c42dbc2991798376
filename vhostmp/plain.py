"""A device's state as plain data, and back: for the record that outlives the control process (keeper.py).

`describe_*` return what JSON can hold and add the descriptors it speaks of, by name, to `fds`; nothing is duplicated.
`restore_*` take the descriptors with `take(name)` and own them. A name holds the number of a part or set-up, which is
never used again, so a name means one descriptor for good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias, TypeVar, cast

import attrs

from vhostmp.parts import BackendPart, DeviceState, InflightPart, LogPart, MemoryPart, Part, RingState, Setup
from vhostmp.shm.memory import MemoryRegion, MemoryTable
from vhostmp.shm.records import Plain

Fds: TypeAlias = dict[str, int]
Take: TypeAlias = Callable[[str], int]
P = TypeVar("P", bound=Part)
T = TypeVar("T")

_RING_PARTS: Final = ("kick", "call", "err")
_NOT_PLAIN: Final = ("fds", "negotiate", "arguments", "ends", "id")


def _fd_name(what: str, number: int, place: int) -> str:
    return f"{what}.{number}.{place}"


def _part(part: Part, fds: Fds, what: str = "part") -> Plain:
    """Return what is common to all parts."""
    fds.update({_fd_name(what, part.id, place): fd for place, fd in enumerate(part.fds)})
    return {"id": part.id, "fds": len(part.fds)}


def _fds_of(plain: Plain, take: Take, what: str = "part") -> tuple[int, ...]:
    return tuple(take(_fd_name(what, plain["id"], place)) for place in range(plain["fds"]))


def describe_setup(setup: Setup, fds: Fds) -> Plain:
    """Return an open back-end."""
    fds.update({_fd_name("setup", setup.id, place): fd for place, fd in enumerate(setup.fds)})
    fields = [field.name for field in attrs.fields(cast("Any", type(setup))) if field.name not in _NOT_PLAIN]
    values = {name: getattr(setup, name) for name in fields}
    return {"id": setup.id, "type": type(setup).__name__, "fds": len(setup.fds), "values": values}


class Setups:
    """Open back-ends that were found, each restored once, by whoever knows its type."""

    def __init__(self, makers: Mapping[str, Callable[[dict[str, Any], list[int]], Setup]], take: Take) -> None:
        """`makers`: by type, what makes one from its fields and descriptors."""
        self._makers = makers
        self._take = take
        self._made: dict[int, Setup] = {}

    def restore(self, plain: Plain) -> Setup:
        """Return a back-end; the same one for the same number."""
        number: int = plain["id"]
        if number not in self._made:
            fds = list(_fds_of(plain, self._take, "setup"))
            self._made[number] = self._makers[plain["type"]]({**plain["values"], "id": number}, fds)
        return self._made[number]


def _backend(part: BackendPart, fds: Fds) -> Plain:
    assert part.setup is not None
    return {
        "id": part.id,
        "setup": describe_setup(part.setup, fds),
        "with_fds": bool(part.fds),
        "kind": part.kind,
        "options": dict(part.options),
        "shared": part.shared,
    }


def _restore_backend(plain: Plain, setups: Setups) -> BackendPart:
    setup = setups.restore(plain["setup"])
    return BackendPart(
        id=plain["id"],
        setup=setup,
        fds=tuple(setup.fds) if plain["with_fds"] else (),
        borrowed=True,
        kind=plain["kind"],
        options=plain["options"],
        shared=plain["shared"],
        reopened=getattr(setup, "reopened", frozenset[int]()),
    )


def _ring(ring: RingState, fds: Fds) -> Plain:
    plain = {field.name: getattr(ring, field.name) for field in attrs.fields(RingState)}
    for name in _RING_PARTS:
        part = plain[name]
        plain[name] = None if part is None else _part(part, fds)
    return plain


def _restore_ring(plain: Plain, parts: _Parts) -> RingState:
    values: dict[str, Any] = {**plain, **{name: parts.restore(Part, plain[name]) for name in _RING_PARTS}}
    return RingState(**values)


def _sized(part: Part, fds: Fds) -> Plain:
    """Return a part whose other fields are numbers."""
    fields = [field.name for field in attrs.fields(type(part)) if field.name not in ("id", "fds", "borrowed")]
    return {**_part(part, fds), "values": {name: getattr(part, name) for name in fields}}


class _Parts:
    """Parts that were found: one that two states name is restored once."""

    def __init__(self, take: Take, known: dict[int, Part]) -> None:
        self._take = take
        self._known = known

    def restore(self, kind: type[P], plain: Plain | None) -> P | None:
        if plain is None:
            return None
        number: int = plain["id"]
        if number not in self._known:
            values: dict[str, Any] = plain.get("values", {})
            self._known[number] = kind(id=number, fds=_fds_of(plain, self._take), **values)
        return cast("P", self._known[number])

    def memory(self, plain: Plain | None) -> MemoryPart | None:
        if plain is None:
            return None
        number: int = plain["id"]
        if number not in self._known:
            fds = _fds_of(plain, self._take)
            regions = tuple(
                MemoryRegion(gpa=gpa, size=size, uva=uva, fd=fd, mmap_offset=offset)
                for fd, (gpa, size, uva, offset) in zip(fds, plain["regions"], strict=True)
            )
            self._known[number] = MemoryPart(
                id=number, fds=fds, table=MemoryTable(regions), fd_ids=tuple(plain["fd_ids"])
            )
        return cast("MemoryPart", self._known[number])


def _memory(memory: MemoryPart, fds: Fds) -> Plain:
    regions = [(r.gpa, r.size, r.uva, r.mmap_offset) for r in memory.table]
    return {**_part(memory, fds), "fd_ids": list(memory.fd_ids), "regions": regions}


class Described:
    """What was said of a device's rings and its memory, of which there can be hundreds: nothing of them ever changes.

    A message changes a ring at the most, and another thing is another object, so all but that need not be gone through.
    """

    def __init__(self) -> None:
        """Know nothing."""
        self._known: dict[int, tuple[object, Plain, Fds]] = {}
        self._before = self._known

    def turn(self) -> None:
        """Forget what was not asked for since the last time."""
        self._before, self._known = self._known, {}

    def of(self, thing: T, fds: Fds, describe: Callable[[T, Fds], Plain]) -> Plain:
        """Return what `describe` says, or said, of a thing, and add its descriptors."""
        key = id(thing)  # of what we hold: no other thing has it
        known = self._known.get(key) or self._before.get(key)
        if known is None:
            own: Fds = {}
            known = thing, describe(thing, own), own
        self._known[key] = known
        fds.update(known[2])
        return known[1]


def describe_state(state: DeviceState, fds: Fds, described: Described | None = None) -> Plain:
    """Return a state, which is not to be changed. Memory that is still paged cannot be adopted: post-copy is no part.

    `described`: what was said of states of the same device before.
    """
    described = described or Described()
    memory = state.memory
    return {
        "backend": _backend(state.backend, fds),
        "draining": None if state.draining is None else _backend(state.draining, fds),
        "rings": [described.of(ring, fds, _ring) for ring in state.rings],
        "workers": list(state.workers),
        "group_size": state.group_size,
        "features": state.features,
        "memory": None if memory is None else described.of(memory, fds, _memory),
        "log": None if state.log is None else _sized(state.log, fds),
        "log_fd": None if state.log_fd is None else _part(state.log_fd, fds),
        "inflight": None if state.inflight is None else _sized(state.inflight, fds),
        "iotlb": state.iotlb is not None,
        "held": sorted(state.held),
    }


def restore_state(plain: Plain, setups: Setups, known: dict[int, Part], take: Take, iotlb: Part | None) -> DeviceState:
    """Return a state from what `describe_state` returned.

    `known`: parts by number, those of the device's other states; more are added. `iotlb`: the part of the device's.
    """
    parts = _Parts(take, known)
    return DeviceState(
        backend=_restore_backend(plain["backend"], setups),
        draining=None if plain["draining"] is None else _restore_backend(plain["draining"], setups),
        rings=tuple(_restore_ring(ring, parts) for ring in plain["rings"]),
        workers=tuple(plain["workers"]),
        group_size=plain["group_size"],
        features=plain["features"],
        memory=parts.memory(plain["memory"]),
        log=parts.restore(LogPart, plain["log"]),
        log_fd=parts.restore(Part, plain["log_fd"]),
        inflight=parts.restore(InflightPart, plain["inflight"]),
        iotlb=iotlb if plain["iotlb"] else None,
        held=frozenset(plain["held"]),
    )
