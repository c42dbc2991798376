"""What a service manager expects of us: log levels the journal understands, and word of being ready and of ending.

Rules: everything here is optional for who runs us; nothing fails when there is no service manager.
Source: systemd, sd_notify(3) and sd-daemon(3); systemd.exec(5), JOURNAL_STREAM.
"""

from __future__ import annotations

import logging
import os
from typing import Final

from vhostmp import transport

log = logging.getLogger(__name__)

JOURNAL_STREAM: Final = "JOURNAL_STREAM"
NOTIFY_SOCKET: Final = "NOTIFY_SOCKET"


def writes_to_journal(fd: int) -> bool:
    """Whether `fd` is the stream that the journal reads: $JOURNAL_STREAM holds its device and inode."""
    device, _, inode = os.environ.get(JOURNAL_STREAM, "").partition(":")
    try:
        status = os.fstat(fd)
        return (int(device), int(inode)) == (status.st_dev, status.st_ino)
    except (OSError, ValueError):
        return False


def notify(state: str) -> None:
    """Tell the service manager of our state (`READY=1`, `STOPPING=1`), if $NOTIFY_SOCKET names one; never fails."""
    address = os.environ.get(NOTIFY_SOCKET)
    if not address:
        return
    try:
        transport.send_datagram(address, state.encode())
    except (OSError, ValueError) as error:
        log.warning("cannot notify %s: %s", address, error)
