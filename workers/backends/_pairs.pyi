from collections.abc import Sequence

from vhostmp.workers._config import Backend

class NetBackend(Backend):
    kind: str
    def __init__(
        self,
        kind: str,
        *,
        guest_header: int = 12,
        header_len: int = 12,
        want: int = 0,
        is_packet: bool = False,
        reference: str = "",
        size: int = 0,
        ends: Sequence[str] = (),
        device: str = "",
    ) -> None: ...
