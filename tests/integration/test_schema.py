"""What is on record, field by field: a change of it needs another number of the schema (vhostmp/keeper.py)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Final, cast

import pytest

from tests.dirty import LOG_ALL, DirtyLog
from tests.helpers import wait_until
from tests.integration.restarting import Restarting
from tests.integration.test_dirty_log import LOG_BYTES
from tests.iommu_guest import F_ACCESS_PLATFORM
from tests.net_driver import FEATURES, Guest
from tests.remote_iommu import RemoteDeviceBehindIommu
from vhostmp.adoption import DEVICE
from vhostmp.consts import ProtocolFeature
from vhostmp.fdstore import find_holder
from vhostmp.keeper import POOL, SCHEMA, WHOLE, Keeper
from vhostmp.tools.stress.ring import F_RING_PACKED

HERE: Final = Path(__file__).parent
NUM: Final = 64
#: What differs from device to device.
OWN: Final = ("device.device.own", "device.device.setup", "device.device.state.backend")
EVERYTHING: Final = ProtocolFeature.INFLIGHT_SHMFD.mask | ProtocolFeature.LOG_SHMFD.mask


def fields(plain: Any, path: str) -> Iterator[str]:
    """Return a line for each object in plain data: where it is, and the names of its fields. Of lists, the first."""
    if isinstance(plain, list):
        for item in cast("list[object]", plain)[:1]:
            yield from fields(item, path)
    elif isinstance(plain, dict):
        known = cast("dict[str, Any]", plain)
        yield f"{path}: {' '.join(sorted(known))}".rstrip()
        for name in sorted(known):
            yield from fields(known[name], f"{path}.{name}")


def found(server: Restarting) -> dict[str, Any]:
    """Return the records that wait beside a running server, as soon as the holder has taken all of its queue."""
    records: dict[str, Any] = {}

    def look() -> bool:
        looked = find_holder(str(server.control), look=True)
        assert looked is not None
        with contextlib.closing(Keeper(*looked)) as keeper:
            records.update(keeper.found)
        return bool(records.get(POOL, {}).get(WHOLE)) and f"{DEVICE}0" in records

    wait_until(look, what="a server that is ready")
    return records


@contextlib.contextmanager
def eventfd() -> Generator[int]:
    """Make one."""
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def lines_of(records: dict[str, Any]) -> list[str]:
    """Return the lines of records, which are all of this schema, and print them."""
    assert {plain["schema"] for plain in records.values()} == {SCHEMA}
    lines = [line for name, plain in sorted(records.items()) for line in fields(plain, name.partition(".")[0])]
    print("\n".join(lines))
    return lines


def known(text: str) -> list[str]:
    """Return lines that were written down, of which long ones go on indented."""
    return text.replace("\n    ", " ").split("\n")[1:-1]


@pytest.mark.slow
def test_fields(tmp_path: Path) -> None:
    """Records have the fields of their schema, and no others. Who changes them raises SCHEMA, and mends this list."""
    with Restarting(tmp_path, "--backend", "loopback", "--iommu") as server:
        with (
            contextlib.closing(RemoteDeviceBehindIommu(server.socket, EVERYTHING)) as device,
            DirtyLog(LOG_BYTES) as log,
            eventfd() as event,
            Guest(device.as_net_device(), features=FEATURES | F_RING_PACKED | F_ACCESS_PLATFORM, num=NUM) as guest,
        ):
            bases = guest.stop()
            region, size = device.get_inflight(2, NUM)
            device.set_inflight(region, 0, size, 2, NUM)
            os.close(region)
            for index, base in enumerate(bases):
                guest.start(index, base)
            device.set_log_base(log.fd, log.size)
            for index in range(2):
                device.set_vring_err(index, event)
            device.set_log_fd(event)
            device.set_features(guest.features | LOG_ALL)
            records = found(server)
        server.end()
    assert lines_of(records) == known(FIELDS[SCHEMA])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blk", "rng", "python", "python back-end"])
def test_fields_of_other_devices(tmp_path: Path, kind: str) -> None:
    """The same of what other devices have of their own, and of a back-end written in Python."""
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    options = {
        "blk": ["--device", "blk", "--backend", f"file:{tmp_path}/disk"],
        "rng": ["--device", "rng"],
        "python": ["--device", f"python:{HERE}/devices.py:Echo"],
        "python back-end": ["--backend", f"python:{HERE}/backends.py:Mirror"],
    }
    with Restarting(tmp_path, *options[kind]) as server:
        lines = lines_of(found(server))
        server.end()
    own = [line for line in lines if line.startswith(OWN)]
    assert own == known(OTHERS[SCHEMA][kind])


#: By schema. Programs before may be asked to read it, so it stays.
FIELDS: Final = {
    1: """
device: device ids port program schema
device.device: class first_ring generation group_size iotlb name next num_queues offered own owned paged setup
    slot state stopping
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
device.device.state.log_fd: fds id
device.device.state.memory: fd_ids fds id regions
device.device.state.rings: avail base busyloop_us call desc enabled err kick log recover size start_id started
    used
device.device.state.rings.call: fds id
device.device.state.rings.err: fds id
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

#: The same of other devices: lines that begin with OWN.
OTHERS: Final = {
    1: {
        "blk": """
device.device.own:
device.device.setup: fds id type values
device.device.setup.values: alignment_offset block_bytes discard_bytes is_device min_io_bytes opt_io_bytes
    physical_bytes read_only reference sectors spec write_back
device.device.state.backend: id kind options setup shared with_fds
device.device.state.backend.options: arguments reference
device.device.state.backend.options.arguments: device_block discards read_only sectors serial write_through
device.device.state.backend.setup: fds id type values
device.device.state.backend.setup.values: alignment_offset block_bytes discard_bytes is_device min_io_bytes
    opt_io_bytes physical_bytes read_only reference sectors spec write_back
""",
        "rng": """
device.device.own:
device.device.setup: fds id type values
device.device.setup.values: reference spec
device.device.state.backend: id kind options setup shared with_fds
device.device.state.backend.options: arguments reference
device.device.state.backend.options.arguments:
device.device.state.backend.setup: fds id type values
device.device.state.backend.setup.values: reference spec
""",
        "python": """
device.device.own: described
device.device.own.described: config device_id features num_queues queues_together
device.device.setup: fds id type values
device.device.setup.values: reference spec
device.device.state.backend: id kind options setup shared with_fds
device.device.state.backend.options: arguments reference
device.device.state.backend.options.arguments:
device.device.state.backend.setup: fds id type values
device.device.state.backend.setup.values: reference spec
""",
        "python back-end": """
device.device.own: mtu
device.device.setup: fds id type values
device.device.setup.values: header_len interface is_packet kind mtu offloads reference spec
device.device.state.backend: id kind options setup shared with_fds
device.device.state.backend.options: guest_header reference
device.device.state.backend.setup: fds id type values
device.device.state.backend.setup.values: header_len interface is_packet kind mtu offloads reference spec
""",
    }
}
