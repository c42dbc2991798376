"""What is on record, field by field: a change of it needs another number of the schema (vhostmp/keeper.py)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import pytest

from tests.dirty import LOG_ALL, DirtyLog
from tests.integration.restarting import Restarting
from tests.integration.test_dirty_log import LOG_BYTES
from tests.iommu_guest import F_ACCESS_PLATFORM
from tests.net_driver import FEATURES, Guest
from tests.remote_iommu import RemoteDeviceBehindIommu
from vhostmp.consts import ProtocolFeature
from vhostmp.fdstore import find_holder
from vhostmp.keeper import SCHEMA, Keeper
from vhostmp.tools.stress.ring import F_RING_PACKED

NUM: Final = 64
EVERYTHING: Final = ProtocolFeature.INFLIGHT_SHMFD.mask | ProtocolFeature.LOG_SHMFD.mask


def fields(plain: Any, path: str) -> Iterator[str]:
    """Return a line for each object in plain data: where it is, and the names of its fields. Of lists, the first."""
    if isinstance(plain, list):
        for item in cast("list[object]", plain)[:1]:
            yield from fields(item, path)
    elif isinstance(plain, dict):
        known = cast("dict[str, Any]", plain)
        yield f"{path}: {' '.join(sorted(known))}"
        for name in sorted(known):
            yield from fields(known[name], f"{path}.{name}")


def found(server: Restarting) -> dict[str, Any]:
    """Return the records that wait beside a running server."""
    looked = find_holder(str(server.control), look=True)
    assert looked is not None
    with contextlib.closing(Keeper(*looked)) as keeper:
        return dict(keeper.found)


@pytest.mark.slow
def test_fields(tmp_path: Path) -> None:
    """Records have the fields of their schema, and no others. Who changes them raises SCHEMA, and mends this list."""
    with Restarting(tmp_path, "--backend", "loopback", "--iommu") as server:
        with (
            contextlib.closing(RemoteDeviceBehindIommu(server.socket, EVERYTHING)) as device,
            DirtyLog(LOG_BYTES) as log,
            Guest(device.as_net_device(), features=FEATURES | F_RING_PACKED | F_ACCESS_PLATFORM, num=NUM) as guest,
        ):
            bases = guest.stop()
            region, size = device.get_inflight(2, NUM)
            device.set_inflight(region, 0, size, 2, NUM)
            os.close(region)
            for index, base in enumerate(bases):
                guest.start(index, base)
            device.set_log_base(log.fd, log.size)
            device.set_features(guest.features | LOG_ALL)
            records = found(server)
        server.end()
    assert {plain["schema"] for plain in records.values()} == {SCHEMA}
    lines = [line for name, plain in sorted(records.items()) for line in fields(plain, name.partition(".")[0])]
    print("\n".join(lines))
    assert lines == FIELDS[SCHEMA].replace("\n    ", " ").split("\n")[1:-1]


#: By schema. Programs before may be asked to read it, so it stays.
FIELDS: Final = {
    1: """
device: device ids port program schema
device.device: class first_ring generation group_size iotlb name next num_queues offered own owned paged setup
    slot starts state stopping
device.device.iotlb: id
device.device.own: mtu
device.device.setup: fds id type values
device.device.setup.values: header_len interface is_packet kind mtu offloads reference spec
device.device.state: backend draining features group_size held inflight iotlb log log_fd memory rings workers
device.device.state.backend: id kind options setup shared with_fds
device.device.state.backend.options: guest_header
device.device.state.backend.setup: fds id type values
device.device.state.backend.setup.values: header_len interface is_packet kind mtu offloads reference spec
device.device.state.inflight: fds id values
device.device.state.inflight.values: num_queues offset queue_size size
device.device.state.log: fds id values
device.device.state.log.values: offset size
device.device.state.memory: fd_ids fds id regions
device.device.state.rings: avail base busyloop_us call desc enabled err kick log recover size start_id started
    used
device.device.state.rings.call: fds id
device.device.state.rings.kick: fds id
device.port: connection done listener session socket
device.port.connection: done id reply
device.port.session: channel config_changed features inband negotiated offered phase regions status
    told_regions
device.port.session.inband: chosen kicks watched
pool: adoptions control_pid ids modules old_spawner program renewed sandboxed schema segment spare spawner
    version wanted whole workers
"""
}
