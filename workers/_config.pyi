from collections.abc import Iterable, Mapping
from typing import Any

from vhostmp.shm._memory import MemoryMap

class Backend:
    kind: str
    instance: Any
    def __init__(
        self,
        kind: str,
        pairs: Iterable[int],
        *,
        fds: Mapping[int, int] | None = None,
        header_len: int = 12,
        want: int = 0,
        is_packet: bool = False,
        reference: str = "",
    ) -> None: ...
    def close(self) -> None: ...

class DeviceConfig:
    memory: MemoryMap | None
    backend: Backend | None
    def __init__(
        self,
        generation: int,
        first_ring: int,
        n_rings: int,
        features: int,
        header_len: int,
        memory: MemoryMap | None,
        backend: Backend | None,
        rings: Iterable[Mapping[str, Any]],
    ) -> None: ...
