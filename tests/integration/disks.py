"""A disk's requests, as a guest makes them: what the tests of disks share. Source: virtio 1.3, 5.2.6."""

from __future__ import annotations

from typing import Final

from tests.request_driver import FEATURES, Answer, RequestGuest, blk_header
from vhostmp import consts

SECTOR: Final = 512
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP: Final = 1
ALL: Final = FEATURES | consts.mask([1, 2, 5, 6, 9, 10, 11, 12, 13, 14])


def status(answer: Answer) -> int:
    """Return the last byte of what could be written."""
    return answer.data[-1]


def read(guest: RequestGuest, sector: int, count: int, queue: int = 0) -> bytes:
    """Read sectors."""
    answer = guest.ask(blk_header(IN, sector), [count * SECTOR, 1], queue=queue)
    assert (status(answer), answer.length) == (OK, count * SECTOR + 1)
    return answer.data[:-1]


def write(guest: RequestGuest, sector: int, data: bytes, queue: int = 0) -> None:
    """Write sectors."""
    answer = guest.ask([blk_header(OUT, sector), data], [1], queue=queue)
    assert (status(answer), answer.length) == (OK, 1)
