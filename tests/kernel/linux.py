"""Linux's side: /dev/vhost-net, by its ioctls.

It has a tap of its own for all cases. What the kernel leaves to whoever opens the device is done here as QEMU does it:
the header's length and the offloads of the tap, which a NetDevice sets when features are acked.

The methods that are verbs take the step and where its ring lies. Source: include/uapi/linux/vhost.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from pathlib import Path
from typing import Final

from tests.kernel.arena import Arena, Tap, empty
from tests.kernel.case import RingPlan, Step
from tests.kernel.verbs import descriptor, regions, ring_addresses, ring_descriptor
from vhostmp.backends import (
    IFF_NO_PI,
    IFF_TAP,
    IFF_VNET_HDR,
    OFFLOADS,
    TUN_OFFLOADS,
    TUNSETIFF,
    TUNSETOFFLOAD,
    TUNSETVNETHDRSZ,
    TUNSETVNETLE,
    header_len,
)
from vhostmp.tools.bench.vhost_net import (
    DEVICE,
    NET_SET_BACKEND,
    SET_FEATURES,
    SET_MEM_TABLE,
    SET_OWNER,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    SET_VRING_BUSYLOOP_TIMEOUT,
    SET_VRING_CALL,
    SET_VRING_KICK,
    SET_VRING_NUM,
    R,
    W,
    ioctl_number,
)

GET_FEATURES: Final = ioctl_number(R, 0x00)
RESET_OWNER: Final = ioctl_number(0, 0x02, 0)
SET_LOG_BASE: Final = ioctl_number(W, 0x04)
SET_LOG_FD: Final = ioctl_number(W, 0x07, 4)
GET_VRING_BASE: Final = ioctl_number(W | R, 0x12)
SET_VRING_ERR: Final = ioctl_number(W, 0x22)
OF_A_RING: Final = {
    "set_vring_num": SET_VRING_NUM,
    "set_vring_base": SET_VRING_BASE,
    "set_vring_kick": SET_VRING_KICK,
    "set_vring_call": SET_VRING_CALL,
    "set_vring_err": SET_VRING_ERR,
    "set_vring_busyloop_timeout": SET_VRING_BUSYLOOP_TIMEOUT,
}
NO_FD: Final = -1
#: A work item that gave up its turn is behind the flush that waits for it: so often more than once is enough, but where
#: it polls busily: each flush interrupts it once more.
FLUSHES: Final = 3
#: There are rings for which its worker never sleeps again: how long it may take to do so, seconds.
PATIENCE: Final = 0.05


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return ""


class Kernel:
    """/dev/vhost-net."""

    def __init__(self, arena: Arena, name: str) -> None:
        """Open it, with a tap of that name."""
        self._arena: Final = arena
        self._fd: Final = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        self._tap_fd: Final = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(self._tap_fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        self.tap: Final = Tap(name)
        self._worker: Path | None = None

    def forget(self) -> None:
        """RESET_OWNER leaves nothing of what was set, and needs an owner."""
        try:
            fcntl.ioctl(self._fd, SET_OWNER)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        fcntl.ioctl(self._fd, RESET_OWNER)
        self._set_tap(0)
        empty(self._tap_fd)

    def wait_idle(self) -> None:
        """Any ioctl of the device flushes its worker, one that fails too: a memory table at address 0."""
        for _ in range(FLUSHES):
            try:
                fcntl.ioctl(self._fd, SET_MEM_TABLE, 0)
            except OSError as error:
                if error.errno not in (errno.EFAULT, errno.EPERM):
                    raise
        limit = time.monotonic() + PATIENCE
        while self._works() and time.monotonic() < limit:
            time.sleep(0.0005)

    def _works(self) -> bool:
        """Whether the device's worker, a thread of the kernel or of ours, is awake. Who gives it work wakes it."""
        if self._worker is None or not self._worker.exists():
            name = f"vhost-{os.getpid()}\n"
            threads = (*Path("/proc/self/task").iterdir(), *Path("/proc").glob("[0-9]*"))
            self._worker = next((thread for thread in threads if _text(thread / "comm") == name), None)
        if self._worker is None:
            return False  # nobody has owned the device yet
        return _text(self._worker / "stat").rpartition(") ")[2][:1] not in ("S", "")

    def verb(self, step: Step, plan: RingPlan) -> int | None:
        """Carry out a verb."""
        if step.name in ("set_vring_kick", "set_vring_call", "set_vring_err"):
            fd = ring_descriptor(self._arena, step)
            self._ring(OF_A_RING[step.name], step.ring, NO_FD if fd is None else fd)
            return None
        if step.name in OF_A_RING:
            self._ring(OF_A_RING[step.name], step.ring, step.value)
            return None
        result: int | None = getattr(self, step.name)(step, plan)
        return result

    def set_owner(self, _step: Step, _plan: RingPlan) -> None:
        """VHOST_SET_OWNER."""
        fcntl.ioctl(self._fd, SET_OWNER)

    def reset_owner(self, _step: Step, _plan: RingPlan) -> None:
        """VHOST_RESET_OWNER."""
        fcntl.ioctl(self._fd, RESET_OWNER)

    def get_features(self, _step: Step, _plan: RingPlan) -> int:
        """VHOST_GET_FEATURES."""
        return int.from_bytes(fcntl.ioctl(self._fd, GET_FEATURES, bytes(8)), "little")

    def set_features(self, step: Step, _plan: RingPlan) -> None:
        """VHOST_SET_FEATURES, and the offloads for the tap."""
        fcntl.ioctl(self._fd, SET_FEATURES, struct.pack("Q", step.value & ~OFFLOADS))
        self._set_tap(step.value)

    def set_mem_table(self, step: Step, _plan: RingPlan) -> None:
        """VHOST_SET_MEM_TABLE."""
        table, base = regions(step.value), self._arena.memory.address
        packed = b"".join(struct.pack("QQQQ", gpa, size, base + offset, 0) for gpa, size, offset in table)
        fcntl.ioctl(self._fd, SET_MEM_TABLE, bytearray(struct.pack("II", len(table), 0) + packed))

    def set_log_base(self, _step: Step, _plan: RingPlan) -> None:
        """VHOST_SET_LOG_BASE."""
        fcntl.ioctl(self._fd, SET_LOG_BASE, struct.pack("Q", self._arena.log.address))

    def set_log_fd(self, step: Step, _plan: RingPlan) -> None:
        """VHOST_SET_LOG_FD."""
        fd = descriptor(self._arena, self._arena.log_fd, step.value)
        fcntl.ioctl(self._fd, SET_LOG_FD, struct.pack("i", NO_FD if fd is None else fd))

    def set_vring_addr(self, step: Step, plan: RingPlan) -> None:
        """VHOST_SET_VRING_ADDR."""
        at = ring_addresses(self._arena, plan, step.value)
        packed = struct.pack("IIQQQQ", step.ring, at["flags"], at["desc"], at["used"], at["avail"], at["log"])
        fcntl.ioctl(self._fd, SET_VRING_ADDR, packed)

    def get_vring_base(self, step: Step, _plan: RingPlan) -> int:
        """VHOST_GET_VRING_BASE."""
        return int(struct.unpack("II", self._ring(GET_VRING_BASE, step.ring, 0))[1])

    def start(self, step: Step, _plan: RingPlan) -> None:
        """VHOST_NET_SET_BACKEND with the tap."""
        self._ring(NET_SET_BACKEND, step.ring, self._tap_fd)

    def stop(self, step: Step, _plan: RingPlan) -> None:
        """VHOST_NET_SET_BACKEND with -1."""
        self._ring(NET_SET_BACKEND, step.ring, NO_FD)

    def _ring(self, request: int, ring: int, value: int) -> bytes:
        """Do the ioctl of a struct vhost_vring_state or vhost_vring_file."""
        return fcntl.ioctl(self._fd, request, struct.pack("Ii" if value < 0 else "II", ring, value))

    def _set_tap(self, features: int) -> None:
        """Do as `_negotiate_tap` in vhostmp.backends, and QEMU."""
        wanted = sum(bit for feature, bit in TUN_OFFLOADS.items() if features >> feature & 1)
        fcntl.ioctl(self._tap_fd, TUNSETVNETHDRSZ, struct.pack("i", header_len(features)))
        fcntl.ioctl(self._tap_fd, TUNSETVNETLE, struct.pack("i", 1))
        fcntl.ioctl(self._tap_fd, TUNSETOFFLOAD, wanted)
