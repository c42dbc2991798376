"""What vhostmp uses of multiprocessing_logging, which ships no types of its own."""

import logging
import threading
from typing import Any

def install_mp_handler(logger: logging.Logger | None = None) -> None: ...
def uninstall_mp_handler(logger: logging.Logger | None = None) -> None: ...

class MultiProcessingHandler(logging.Handler):
    sub_handler: logging.Handler
    queue: Any
    _is_closed: bool
    _receive_thread: threading.Thread
    def __init__(self, name: str, sub_handler: logging.Handler | None = None) -> None: ...
    def _receive(self) -> None: ...
