from collections.abc import Iterable, Mapping
from typing import Any

from vhostmp.workers._config import Backend

class Request:
    @property
    def readable(self) -> list[memoryview]: ...
    @property
    def writable(self) -> list[memoryview]: ...
    written: int
    @property
    def again(self) -> bool: ...
    @property
    def readable_bytes(self) -> int: ...
    @property
    def writable_bytes(self) -> int: ...
    def read(self, start: int = 0, size: int = -1) -> bytes: ...
    def write(self, data: bytes | bytearray | memoryview) -> int: ...

class RequestBackend(Backend):
    def __init__(
        self,
        fds: Iterable[int] = (),
        *,
        reference: str,
        arguments: Mapping[str, Any] | None = None,
        device: str = "",
    ) -> None: ...
