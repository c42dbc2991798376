from collections.abc import Iterable, Mapping
from typing import Any

from vhostmp.shm._filemap import FileMap
from vhostmp.shm._iotlb import IotlbTable
from vhostmp.shm._log import LogMap
from vhostmp.shm._memory import MemoryMap

class Backend:
    instance: Any
    link: int
    def add(self, group: int, fd: int) -> list[tuple[int, int]]: ...
    def drop(self, group: int) -> list[bytes]: ...
    def put_back(self, group: int, packets: list[bytes]) -> None: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...

class DeviceConfig:
    memory: MemoryMap | None
    backend: Backend | None
    dirty_log: LogMap | None
    draining: Backend | None
    iotlb: IotlbTable | None
    inflight: FileMap | None
    def __init__(
        self,
        generation: int,
        first_ring: int,
        n_rings: int,
        features: int,
        memory: MemoryMap | None,
        backend: Backend | None,
        rings: Iterable[Mapping[str, Any]],
        dirty_log: LogMap | None = None,
        log_fd: int = -1,
        draining: Backend | None = None,
        iotlb: IotlbTable | None = None,
        miss_fd: int = -1,
        inflight: FileMap | None = None,
    ) -> None: ...
