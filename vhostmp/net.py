"""The virtio-net device: which features it offers, over the generic Device."""

from __future__ import annotations

import contextlib
import errno
import json
import struct
from typing import TYPE_CHECKING, Any, Final, cast

from vhostmp import killpoints, patches, steps
from vhostmp.backends import OFFLOADS, BackendSetup, open_backend
from vhostmp.consts import mask
from vhostmp.device import Device
from vhostmp.errors import LocalError, SynchronizeTimeout, VhostError
from vhostmp.kept_device import KeptDevice
from vhostmp.parts import Setup
from vhostmp.shm import layout
from vhostmp.shm.records import Plain

if TYPE_CHECKING:
    from vhostmp.supervisor import Pool

MTU, MAC, STATUS, GUEST_ANNOUNCE = 3, 5, 16, 21
MRG_RXBUF, MQ, NOTIFY_ON_EMPTY, INDIRECT_DESC, EVENT_IDX = 15, 22, 24, 28, 29
VERSION_1, RING_PACKED, IN_ORDER, RING_RESET = 32, 34, 35, 40
BASE_FEATURES: Final = mask((MRG_RXBUF, NOTIFY_ON_EMPTY, INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED, IN_ORDER))
ACCESS_PLATFORM: Final = 33
QUEUE_PAIRS_MAX: Final = 128
MTU_MIN: Final = 68
MTU_MAX: Final = 65535
MAC_LENGTH: Final = 6
STATE_VERSION: Final = 1
LINK_UP, SPEED_UNKNOWN, DUPLEX_UNKNOWN = 1, 0xFFFFFFFF, 0xFF
_CONFIG: Final = struct.Struct("<6sHHHIB")  # struct virtio_net_config up to duplex (virtio 1.3, 5.1.4)


class NetDevice(Device):
    """A network device with `queue_pairs` pairs of a receive (even) and a transmit (odd) ring (virtio 1.3, 5.1.2)."""

    device_class = "net"
    _mtu = 0

    def __init__(
        self,
        pool: Pool,
        *,
        queue_pairs: int = 1,
        backend: str = "null",
        name: str = "0",
        offloads: bool | None = None,
        mac: bytes | None = None,
        iommu: bool = False,
        ring_reset: bool = True,
        kept: KeptDevice | None = None,
    ) -> None:
        """Open the back-end and register with the pool.

        `offloads`: offer checksum and segmentation offloads: True, False, or None for "when the back-end carries them".
        What is offered stays the same for the device's life, so it decides to what one can swap: a tap or a packet
        socket carries them, null, loopback and patch carry whatever there is, a back-end in Python carries none.

        `backend`: as `vhostmp serve --backend`. Of a patch the other device may come later: what is sent waits for it.

        `name`: its own in the pool where a patch has it at either end; else others may have it too.

        `mac`: the guest's Ethernet address, 6 bytes, for a front-end that asks the back-end for the configuration
        space. None leaves the space to the front-end, as QEMU wants it, which then has an address of its own.

        `iommu`: offer ACCESS_PLATFORM, for guests behind a virtual IOMMU: front-ends that ack it translate addresses.

        `ring_reset`: offer RING_RESET, for a front-end that stops a ring (`stop_vring`) when the guest resets it.

        `kept`: go on with the device that was found; its back-end and offloads are as they were.

        Raises LocalError or SysError in one line that says what to do; nothing is left then.
        """
        if mac is not None and (len(mac) != MAC_LENGTH or mac[0] & 1 or not any(mac)):
            raise LocalError(f"{mac.hex(':') or 'an empty string'} is no unicast Ethernet address of 6 bytes")
        if not 1 <= queue_pairs <= QUEUE_PAIRS_MAX:
            raise LocalError(f"{queue_pairs} queue pairs: choose 1 to {QUEUE_PAIRS_MAX}")
        # MTU and GUEST_ANNOUNCE are between guest and front-end, which offers them if we do
        features = BASE_FEATURES | 1 << MTU | 1 << GUEST_ANNOUNCE | (1 << MQ if queue_pairs > 1 else 0)
        setup = _open(pool, backend, queue_pairs) if kept is None else _network_of(kept, name)
        if kept is None and offloads and not setup.offloads:
            setup.close()
            raise LocalError(f"back-end {backend} carries no offloads: serve with --offloads off or auto")
        if offloads is not False:
            features |= setup.offloads & OFFLOADS
        if mac is not None:
            features |= 1 << MAC | 1 << STATUS
        if iommu:
            features |= 1 << ACCESS_PLATFORM
        if ring_reset:
            features |= 1 << RING_RESET
        with pool.lock:  # nobody takes the name, or moves the other end of a patch, before it is registered
            if kept is None:
                try:
                    _be_an_end(pool, setup, queue_pairs, name, may_come=True)
                except BaseException:
                    setup.close()
                    raise
            super().__init__(
                pool, num_queues=2 * queue_pairs, setup=setup, name=name, offered=features, group_size=2, kept=kept
            )
        if mac is not None:
            self.config = _CONFIG.pack(mac, LINK_UP, queue_pairs, setup.mtu, SPEED_UNKNOWN, DUPLEX_UNKNOWN)

        if kept is not None:
            self._mtu = int(kept.own["mtu"])

    def _own_record(self) -> Plain:
        return {"mtu": self._mtu}

    @property
    def queue_num(self) -> int:
        """Queue pairs: what QEMU takes the answer to GET_QUEUE_NUM for with a network device."""
        return self.num_queues // 2

    def send_rarp(self, mac: bytes) -> None:
        """Announce a guest's Ethernet address (6 bytes) to the network behind the back-end."""
        if len(mac) != MAC_LENGTH:
            raise LocalError(f"an Ethernet address has 6 bytes, not {len(mac)}")
        with self._lock:
            self._announce(mac)

    def set_mtu(self, mtu: int) -> None:
        """Take the MTU that the guest is told, 68 to 65,535 bytes; it is kept until the front-end has gone.

        EINVAL outside, E2BIG above that of the link behind the back-end, also of one that is to be swapped in later.
        """
        with self._lock:
            self._check_owner()
            if not MTU_MIN <= mtu <= MTU_MAX:
                raise LocalError(f"an MTU has {MTU_MIN} to {MTU_MAX} bytes, not {mtu}")
            self._check_mtu(self._network, mtu)
            self._mtu = mtu

    def stop_all(self) -> None:
        """The front-end is gone: as for every device, and forget the MTU."""
        with self._lock:
            self._mtu = 0
            super().stop_all()

    @staticmethod
    def _check_mtu(setup: BackendSetup, mtu: int) -> None:
        if setup.kind == "fd" and setup.link_mtu() < mtu:
            raise LocalError(
                f"the guest's MTU of {mtu} bytes is above the {setup.mtu} of {setup.spec}: raise that with ip link set",
                errno.E2BIG,
            )

    def _announce(self, mac: bytes) -> None:
        """Tell the network behind the back-end where the guest is now."""
        self._network.announce(mac)
        worker = self._pool.worker(self.worker_of(0))
        if self._network.kind == "python" and self._state.backend.id in worker.parts:
            with contextlib.suppress(VhostError):  # the pool replaces a worker that died of it, or hangs
                worker.ask({"op": "announce", "part": self._state.backend.id, "mac": mac.hex()})
                worker.answer()

    # -- the other end of a patch (patches.py) -----------------------------------------------------------------------

    @property
    def pool(self) -> Pool:
        """The pool that it belongs to."""
        return self._pool

    def _other_end(self, spec: str) -> NetDevice | None:
        """Return the device that a patch goes to, if that is an end of it too."""
        for device in self._pool.named(patches.target(spec) or ""):
            if isinstance(device, NetDevice) and patches.target(device.backend) == self.name:
                return device
        return None

    def _choose_workers(self, groups: int) -> tuple[int, ...]:
        other = self._other_end(self._setup.spec)
        return super()._choose_workers(groups) if other is None else other.placement

    def _make_way(self, setup: Setup) -> None:
        """Go where the other end of a patch is served: what is to be joined is served by the same worker."""
        if (other := self._other_end(setup.spec)) is not None:
            for pair, worker in enumerate(other.placement):
                super().attach_worker(pair, worker)

    def attach_worker(self, group: int, worker: int) -> None:
        """Have a worker serve a queue pair; where it is patched, that at the other end goes with it.

        Packets wait between the moves of the two. Whatever fails, both are where they were, or what is left is done
        later, as with any move (steps.py).
        """
        with self._lock:
            other = self._other_end(self.backend)
            before = self.placement[group] if group < len(self.placement) else worker
            super().attach_worker(group, worker)
            if other is None:
                return
            killpoints.reach("one end moved")
            try:
                Device.attach_worker(other, group, worker)
            except BaseException as error:
                if not isinstance(error, SynchronizeTimeout):  # else whoever is stuck would be waited for once more
                    with contextlib.suppress(VhostError):
                        super().attach_worker(group, before)
                raise

    def come_together(self) -> None:
        """Have the other end of a patch be served by the same workers. VhostError: not now."""
        with self._lock:
            if self._closed or (other := self._other_end(self.backend)) is None:
                return
            for pair, worker in enumerate(self.placement):
                if other.placement[pair] != worker:
                    Device.attach_worker(other, pair, worker)

    def snapshot(self) -> dict[str, Any]:
        """Return everything that `vhostmp show` prints of the device."""
        with self._lock:
            return {**super().snapshot(), "patch": patches.state(self)}

    @property
    def _network(self) -> BackendSetup:
        assert isinstance(self._setup, BackendSetup)
        return self._setup

    def save_state(self) -> bytes:
        """Return what the front-end does not know: the address that the guest sends from, what its rings moved."""
        with self._lock:
            mac = self._guest_mac()
            rings = [self._moved(index) for index in range(self.num_queues)]
        state = {"version": STATE_VERSION, "class": self.device_class, "mac": mac and mac.hex(":"), "rings": rings}
        return json.dumps(state, separators=(",", ":")).encode()

    def load_state(self, data: bytes) -> None:
        """Take what `save_state` returned at the source, which may have had fewer or more rings. EBUSY while one runs.

        EINVAL: it is nothing that `save_state` returns; nothing has changed then.
        """
        mac, rings = _parse_state(data)
        with self._lock:
            self._check_open()
            if self._state.live:
                raise LocalError("a ring runs: stop all of them first", errno.EBUSY)
            for index, moved in enumerate(rings[: self.num_queues]):
                for name, value in zip(("packets", "bytes"), moved, strict=True):
                    layout.RING.write(self._pool.buf, self._ring_offset(index), name, value)
            if self.num_queues > 1:
                layout.RING.write(self._pool.buf, self._ring_offset(1), "source_mac", int.from_bytes(mac, "little"))

    def _moved(self, index: int) -> list[int]:
        buf, offset = self._pool.buf, self._ring_offset(index)
        return [layout.RING.read(buf, offset, name) for name in ("packets", "bytes")]

    def _open(self, spec: str) -> BackendSetup:
        pairs = self.num_queues // 2
        setup = _open(self._pool, spec, pairs)
        try:
            _be_an_end(self._pool, setup, pairs, self.name)
            self._check_mtu(setup, self._mtu)
        except BaseException:
            setup.close()
            raise
        return setup

    def _drainable(self) -> list[int]:
        """List the queue pairs with a queue in the kernel, of a tap say, and a receive ring that takes frames."""
        if self._state.backend.kind != "fd":
            return []
        return [pair for pair, ring in enumerate(self._state.rings[::2]) if ring.started and ring.enabled]

    def _discard(self, old: Setup) -> int:
        """Count and drop the frames that are left in the queues of a tap or packet socket."""
        return steps.discard(old.fds) if isinstance(old, BackendSetup) else 0

    def _swapped(self) -> None:
        """Tell the network behind the new back-end where the guest is now."""
        if (mac := self._guest_mac()) is not None:
            self._announce(mac)

    def _guest_mac(self) -> bytes | None:
        """Return the source address of what the guest sent last, if it sent anything through a tap or packet socket."""
        for index in range(1, self.num_queues, 2):
            if mac := layout.RING.read(self._pool.buf, self._ring_offset(index), "source_mac"):
                return mac.to_bytes(8, "little")[:MAC_LENGTH]
        return None


def _parse_state(data: bytes) -> tuple[bytes, list[list[int]]]:
    """Judge a state that came from outside. Returns: the address, empty for none, and (packets, bytes) of each ring."""
    try:
        state = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LocalError("the device state is not JSON") from error
    match state:
        case {"version": int(version)} if version != STATE_VERSION:
            raise LocalError(f"the device state has version {version}, not {STATE_VERSION}")
        case {"version": int(), "class": "net", "mac": None | str() as mac, "rings": list()}:
            rings = cast("list[object]", state["rings"])
        case _:
            raise LocalError("the device state is not that of a network device")
    try:
        address = bytes.fromhex((mac or "").replace(":", ""))
    except ValueError:
        address = b"?"
    if len(address) not in (0, MAC_LENGTH):
        raise LocalError("the device state holds no Ethernet address of 6 bytes")
    counters: list[list[int]] = []
    for moved in rings:
        match moved:
            case [int(packets), int(size)] if 0 <= packets < 1 << 64 and 0 <= size < 1 << 64:
                counters.append([packets, size])
            case _:
                raise LocalError("the device state has counters that are not of 64 bits")
    return address, counters


def _network_of(kept: KeptDevice, name: str) -> BackendSetup:
    assert isinstance(kept.setup, BackendSetup)
    if (other := patches.target(kept.setup.spec)) is not None:
        kept.setup.ends = patches.ends_of(name, other)
    return kept.setup


def _open(pool: Pool, spec: str, pairs: int) -> BackendSetup:
    """Open a back-end; one in Python is looked at by a worker, so that a mistake shows before its use."""
    setup = open_backend(spec, pairs)
    if setup.kind == "python":
        pool.check_python(setup.reference)
    return setup


def _be_an_end(pool: Pool, setup: BackendSetup, pairs: int, name: str, *, may_come: bool = False) -> None:
    """Judge an open back-end of device `name` that is a patch, and tell it which. The caller holds the pool's lock.

    `may_come`: the other end may not be there yet. Raises: LocalError.
    """
    if (other := patches.target(setup.spec)) is not None:
        patches.check(pool, name, pairs, other, may_come=may_come)
        setup.ends = patches.ends_of(name, other)
