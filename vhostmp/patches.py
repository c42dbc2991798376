"""Patches between two network devices of a pool: each receives what the other one sends (`patch:DEVICE`).

A patch has two ends, and each device names the other one: an end is a back-end like any other, opened, swapped in and
swapped away by the verbs of its own device. While only one end is there, what its guest sends waits in its ring.
Workers join the two ends (workers/_patch.pxd) when one worker serves both: so the queue pairs of the two are brought
together when the second end comes, and move together from then on (net.py).

The name of a patch, the names of both devices in order, is the same at both ends, over a death of the control process
too, and no other pair of devices has it: the names of patched devices are their own in a pool.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vhostmp.errors import LocalError

if TYPE_CHECKING:
    from vhostmp.device import Device
    from vhostmp.net import NetDevice
    from vhostmp.supervisor import Pool

PREFIX = "patch:"


def target(spec: str) -> str | None:
    """Return the name of the device that a back-end's specification is a patch to; None: it is none."""
    return spec.removeprefix(PREFIX) if spec.startswith(PREFIX) else None


def ends_of(one: str, other: str) -> tuple[str, ...]:
    """Return the name of the patch between two devices."""
    return tuple(sorted((one, other)))


def check_names(specs: Sequence[str]) -> None:
    """Judge back-ends of network devices that are to be made, called 0, 1 and so on. Raises: LocalError."""
    for number, spec in enumerate(specs):
        if target(spec) == str(number):
            raise LocalError(f"{spec}: that is the device itself: use loopback")
    for number, spec in enumerate(specs):
        other = target(spec)
        if other is None:
            continue
        if not (other.isdecimal() and int(other) < len(specs) and str(int(other)) == other):
            others = " ".join(str(one) for one in range(len(specs)) if one != number)
            if not others:
                raise LocalError(f"{spec}: no other device: give --socket-path once for each")
            raise LocalError(f"{spec}: no device {other!r} among {others}")
        back = target(specs[int(other)])
        if back is not None and back != str(number):
            raise LocalError(
                f"{spec}: device {other} is patched to {back}: a patch has two ends, which name each other"
            )


def check_name(pool: Pool, device: Device) -> None:
    """Judge the name of a device, of any class, that is to be registered. The caller holds the pool's lock.

    Devices may share a name as long as no patch has it at either end, and whom a patch waits for is a network device.
    Raises: LocalError.
    """
    name, twins = device.name, pool.named(device.name)
    waiting = [other.name for other in pool.devices if target(other.backend) == name]
    if twins and (waiting or any(target(one.backend) is not None for one in (device, *twins))):
        raise LocalError(
            f"another device of this pool is called {name!r}, which is an end of a patch: give each a name of its own",
            errno.EEXIST,
        )
    if waiting and device.device_class != "net":
        raise LocalError(
            f"device {waiting[0]} is patched to {name!r}, which is to be a network device and not one of class "
            f"{device.device_class}: give this one a name of its own",
            errno.EEXIST,
        )


def check(pool: Pool, name: str, pairs: int, other: str, *, may_come: bool) -> None:
    """Judge whether device `name`, with so many queue pairs, can be patched to another one.

    `may_come`: that one may not be there yet. The caller holds the pool's lock. Raises: LocalError, with errno ENODEV
    where there is no such device.
    """
    spec = PREFIX + other
    if other == name:
        raise LocalError(f"{spec}: that is the device itself: use loopback")
    if len(pool.named(name)) > 1:
        raise LocalError(f"{spec}: several devices of this pool are called {name!r}: give each a name of its own")
    found = pool.named(other)
    if not found and may_come:
        return
    if not found:
        known = " ".join(sorted(device.name for device in pool.devices if device.name != name))
        why = f"no device {other!r} among {known}" if known else "no other device"
        raise LocalError(f"{spec}: {why}", errno.ENODEV)
    if len(found) > 1:
        raise LocalError(f"{spec}: several devices of this pool are called {other!r}: give each a name of its own")
    device = found[0]
    if device.device_class != "net":
        raise LocalError(f"{spec}: device {other} is none for a network: its class is {device.device_class}")
    if device.num_queues != 2 * pairs:
        raise LocalError(
            f"{spec}: queue pairs of device {other}: {device.num_queues // 2}, of device {name}: {pairs}: "
            "serve both with the same number"
        )
    back = target(device.backend)
    if back is not None and back != name:
        raise LocalError(f"{spec}: device {other} is patched to {back} already: swap its back-end first", errno.EBUSY)


def state(device: NetDevice) -> str | None:
    """Say how it stands with a device's patch, for `vhostmp show`; None: it has none."""
    name = target(device.backend)
    if name is None:
        return None
    found = device.pool.named(name)
    if not found:
        return f"waits: there is no device {name}"
    if target(found[0].backend) != device.name:
        return f"waits: device {name} has back-end {found[0].backend}"
    if found[0].placement != device.placement:
        return "waits: different workers serve its two ends"
    return f"joined to device {name}"
