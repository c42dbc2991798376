"""A network back-end's ports: what another worker hands on is looked at before it is kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import pytest

from vhostmp.workers.backends._pairs import NetBackend

HEADER: Final = 12
SHORTEST: Final = HEADER + 14
LONGEST: Final = HEADER + 65562


@pytest.fixture
def descriptor() -> Iterator[int]:
    """Return what a port has: it is not read here."""
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        *((size, False) for size in (0, 1, HEADER, SHORTEST - 1, LONGEST + 1, 1 << 20)),
        *((size, True) for size in (SHORTEST, LONGEST)),
    ],
)
def test_put_back(descriptor: int, size: int, kept: bool) -> None:
    """A port keeps what can be a frame behind a header, whoever wrote it, and nothing else."""
    backend = NetBackend("fd", guest_header=HEADER, header_len=10, want=1526)
    backend.add(0, descriptor)
    frame = bytes(range(256)) * (size // 256 + 1)
    backend.put_back(0, [frame[:size]])
    assert backend.drop(0) == ([frame[:size]] if kept else [])
