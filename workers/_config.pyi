from collections.abc import Iterable, Mapping
from typing import Any

from vhostmp.shm._log import LogMap
from vhostmp.shm._memory import MemoryMap

class Backend:
    instance: Any
    def watched(self) -> list[tuple[int, int]]: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...

class DeviceConfig:
    memory: MemoryMap | None
    backend: Backend | None
    dirty_log: LogMap | None
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
    ) -> None: ...
